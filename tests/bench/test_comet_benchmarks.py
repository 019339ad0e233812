"""The parts of the quantised benchmarks that measure nothing: models, turns, claims, traces."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from weft.bench.stats import Record, Slo
from weft.bench.traffic import Shot, Size
from weft.comet.hadamard import hadamard
from weft.comet.linear import QuantisedReferenceKernels
from weft.models.families import read_config
from weft.models.loader import load_weights

FOLDER = Path(__file__).parents[2] / "benchmarks"
SHAPE = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"intermediate_size": 640, "vocab_size": 160, "max_position_embeddings": 256}
LAYER = "model.layers.1."


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/ by its name."""
    for folder in (FOLDER, FOLDER / "peers"):
        monkeypatch.syspath_prepend(str(folder))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def plain(scripts: Any, tmp_path: Path) -> Path:
    models = scripts("models")
    folder: Path = models.random_llama(tmp_path, {**models.LLAMA_1B, **SHAPE}, "tiny")
    return folder


def loud(original: torch.Tensor, found: torch.Tensor) -> float:
    """The error's share of the length."""
    return float((original.float() - found).norm() / original.float().norm())


def test_the_fmpq_model_loads_and_its_weights_are_near_the_originals(scripts: Any, plain: Path, tmp_path: Path) -> None:
    from weft.comet.checkpoint import parse, read_layer
    from weft.comet.outer import read_embedding, read_head
    from weft.models.checkpoint import Checkpoint

    folder = scripts("quantised_models").fmpq(plain, tmp_path)
    config = read_config(folder)
    form = parse(config.quantization, config)
    before, after = Checkpoint(plain), Checkpoint(folder)
    names = [name for name in after.entries if name.startswith(LAYER)]
    tensors = {name.removeprefix(LAYER): tensor for name, tensor in after.take(names).items()}
    layer = read_layer(tensors, form, config, 1, folder)

    def original(name: str) -> torch.Tensor:
        return before.take([f"{LAYER}{name}.weight"])[f"{LAYER}{name}.weight"].float()

    def unprepared(site: str) -> torch.Tensor:
        """The stored weight with its columns back in the model's order."""
        one = layer.sites[site]
        weight = one.linear.dequantised()
        if one.form.hadamard:  # its own inverse, but for the factor that was divided by
            kept = 128 * one.form.outlier_blocks
            weight = torch.cat((weight[:, :kept], hadamard(weight[:, kept:], 128)), dim=1)
        back = torch.empty_like(weight)
        back[:, slice(None) if one.form.permutation is None else one.form.permutation.long()] = weight
        return back

    qkv = torch.cat([original(f"self_attn.{name}_proj") for name in "qkv"])
    assert loud(qkv, unprepared("attention")) < 0.12
    assert loud(original("self_attn.o_proj"), unprepared("output")) < 0.12
    # gate, up and down agree on an order of the inner channels; no product depends on it.
    gate, up = unprepared("mlp").chunk(2)
    wanted = original("mlp.down_proj") @ (original("mlp.gate_proj") * original("mlp.up_proj"))
    assert loud(wanted, unprepared("down") @ (gate * up)) < 0.3
    embedding = read_embedding(after.take([n for n in after.entries if "embed" in n]), form, config, folder)
    assert loud(before.take(["model.embed_tokens.weight"])["model.embed_tokens.weight"], embedding.dequantised()) < 0.01
    head = read_head(after.take([n for n in after.entries if "lm_head" in n]), form, config, folder)
    assert loud(before.take(["lm_head.weight"])["lm_head.weight"], head.linear.dequantised()) < 0.01


def test_the_fmpq_model_has_8_bit_blocks_and_transforms_and_is_made_once(
    scripts: Any, plain: Path, tmp_path: Path
) -> None:
    quantised_models = scripts("quantised_models")
    folder = quantised_models.fmpq(plain, tmp_path)
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert content["outlier_blocks"] == {"attention": [0, 0], "output": [0, 0], "mlp": [0, 0], "down": [0, 0]}
    assert content["hadamard"]["down"] == [True, True] and content["hadamard"]["mlp"] == [False, False]
    assert len(load_weights(folder, read_config(folder), QuantisedReferenceKernels((0,)), torch.bfloat16).layers) == 2
    made = (folder / "config.json").stat().st_mtime_ns
    assert quantised_models.fmpq(plain, tmp_path) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    (plain / "model.safetensors").touch()
    quantised_models.fmpq(plain, tmp_path)
    assert (folder / "config.json").stat().st_mtime_ns > made


def test_a_tenth_of_the_1b_models_blocks_keep_8_bits(scripts: Any) -> None:
    from weft.models.families import parse_config

    config = parse_config(scripts("models").LLAMA_1B)
    form = scripts("quantised_models").fmpq_config(config)
    assert {site: counts[0] for site, counts in form.outlier_blocks.items()} == {
        "attention": 2,
        "output": 2,
        "mlp": 2,
        "down": 4,
    }
    assert (form.head.weight_bits, form.embedding_bits) == (4, 4)


def test_the_int8_model_is_one_that_weft_reads_too_and_rows_are_near(scripts: Any, plain: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = scripts("quantised_models").w8a8(plain, tmp_path)
    stored = load_file(folder / "model.safetensors")
    name = f"{LAYER}mlp.up_proj.weight"
    values, scale = stored[name], stored[f"{name}_scale"]
    assert values.dtype == torch.int8 and scale.shape == (640, 1)
    assert loud(load_file(plain / "model.safetensors")[name], values.float() * scale.float()) < 0.01
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert len(load_weights(folder, read_config(folder), QuantisedReferenceKernels((0,)), torch.bfloat16).layers) == 2


def test_a_row_of_zeros_has_an_int8_form(scripts: Any) -> None:
    values, scale = scripts("quantised_models").int8_rows(torch.zeros(2, 8))
    assert not values.any() and torch.isfinite(scale).all()


def turn(contest: Any, rates: dict[str, float], **bandwidths: float) -> Any:
    """bandwidths: what a contestant's turn ended with, where it was not 10."""
    start = {"bandwidth": 10.0, "integers": 1.0}
    return contest.Turn(rates, {name: (start, {**start, "bandwidth": bandwidths.get(name, 10.0)}) for name in rates})


def test_the_best_peer_has_the_highest_median_and_a_ratio_is_of_single_rounds(scripts: Any) -> None:
    contest = scripts("contest")
    turns = [
        turn(contest, {"weft": 10.0, "a": 5.0, "b": 4.0}),
        turn(contest, {"weft": 20.0, "a": 5.0, "b": 40.0}),
        turn(contest, {"weft": 30.0, "a": 6.0, "b": 3.0}),
    ]
    assert contest.best_peer(turns) == "a"
    assert contest.ratios(turns)["a"].figure.median == 4.0  # 2, 4, 5
    assert contest.ratios(turns)["b"].figure.median == 2.5  # 2.5, 0.5, 10, where the medians' quotient is 5
    wanted = {"best": ("x", contest.BEST), "b": ("x", "b"), "absent": ("x", "c"), "nothing": ("y", contest.BEST)}
    assert contest.claims(wanted, {"x": turns}) == {"best": 4.0, "b": 2.5}


def test_a_peer_that_fails_later_counts_in_the_rounds_it_made(scripts: Any) -> None:
    contest = scripts("contest")
    turns = [turn(contest, {"weft": 10.0, "a": 5.0}), turn(contest, {"weft": 10.0})]
    assert contest.ratios(turns)["a"].figure.count == 1
    assert contest.best_peer([turn(contest, {"weft": 1.0})]) is None


def test_a_pair_whose_probes_moved_does_not_count_where_enough_others_did_not(scripts: Any) -> None:
    contest = scripts("contest")
    rates = {"weft": 10.0, "a": 5.0, "b": 2.0}
    good = [turn(contest, rates, a=9.0), turn(contest, rates), turn(contest, rates)]
    bad = turn(contest, {**rates, "weft": 100.0}, a=7.0)
    assert bad.steady("weft", "b") and not bad.steady("weft", "a")
    found = contest.ratios([*good, bad])
    assert (found["a"].figure.high, found["a"].rounds, found["a"].steady) == (2.0, 4, 3)
    assert (found["b"].figure.high, found["b"].steady) == (50.0, 4)
    few = contest.ratios([good[0], good[1], bad])["a"]
    assert (few.figure.count, few.steady) == (3, 2)


class Scripted:
    """Answers with lists of lengths; a number that is negative is a failure."""

    def __init__(self, contest: Any, length: int, seconds: float) -> None:
        self.contest, self.length, self.seconds = contest, length, seconds
        self.engine, self.load_seconds, self.asked = "scripted", 0.0, 0

    def ask(self, op: str, **question: Any) -> dict[str, Any]:
        self.asked += 1
        if not question:
            return {"bandwidth": 1.0, "integers": 1.0}
        if self.length < 0:
            raise self.contest.ContestantError("it broke")
        lengths = [self.length or question["output"]] * len(question["prompts"])
        return {"seconds": self.seconds, "first": 0.0, "last": self.seconds, "lengths": lengths}


@pytest.mark.parametrize(("length", "reason"), [(-1, "it broke"), (3, "instead of 2 times 5")])
def test_who_fails_drops_out_and_the_others_go_on(scripts: Any, length: int, reason: str) -> None:
    contest, case = scripts("contest"), scripts("serve_cpu").Case("many", 2, 8, 5)
    held = contest.Contest(Scripted(contest, 0, 1.0))
    one, other = Scripted(contest, 0, 2.0), Scripted(contest, length, 1.0)
    held.loaded = [(contest.Entrant(n, ("many",), 0.0, lambda: one), c) for n, c in (("weft", one), ("a", other))]
    rng = np.random.default_rng(0)
    turns, done = contest.rounds(held, [contest.Question(case, 100, repeats=2)], rng, 3, float("inf"))
    assert done == 3 and reason in held.failed["a"] and other.asked == 1
    assert [made.rates for made in turns["many"]] == [{"weft": 5.0}] * 3
    assert list(turns["many"][0].probes) == ["weft", "a"] and list(turns["many"][1].probes) == ["weft"]


def test_a_peer_that_cannot_be_had_or_held_is_a_reason_not_an_end(scripts: Any) -> None:
    from contextlib import ExitStack

    contest = scripts("contest")

    def absent() -> Any:
        raise contest.ContestantError("not set up")

    held = contest.Contest(Scripted(contest, 0, 1.0))
    with ExitStack() as stack:
        held.load([contest.Entrant("a", (), 0.0, absent), contest.Entrant("b", (), 1e6, absent)], stack)
    assert held.failed["a"] == "not set up" and "GiB" in held.failed["b"] and held.loaded == []


def test_no_round_begins_that_would_end_after_the_deadline(scripts: Any) -> None:
    contest, case = scripts("contest"), scripts("serve_cpu").Case("one", 1, 8, 5)
    held = contest.Contest(Scripted(contest, 0, 1.0))
    question = contest.Question(case, 100)
    _, done = contest.rounds(held, [question], np.random.default_rng(0), 5, float("-inf"))
    assert done == 1


def test_the_limit_in_4_bits_is_reading_or_multiplying(scripts: Any) -> None:
    comet, models, contest = scripts("comet_cpu"), scripts("models"), scripts("contest")
    shape = models.Shape(vocabulary=1000, body=900_000_000, head=100_000_000)
    probe = {"bandwidth": 33e9, "integers": 1e12}
    made = [contest.Turn({"weft": 1.0}, {"weft": (probe, probe)})]
    prefill, decode, batch, _ = comet.CASES
    assert comet._limit(decode, shape, made).median == pytest.approx(33e9 / (1e9 * 4.125 / 8))
    assert comet._limit(prefill, shape, made).median == pytest.approx(512 / ((2 * 512 * 0.9e9 + 0.2e9) / 1e12))
    # 16 sequences: 32 ms of arithmetic a step, 15.6 ms of reading.
    seconds = (2 * 2048 * 0.9e9 + 16 * 0.2e9) / 1e12 + 127 * 0.032
    assert comet._limit(batch, shape, made).median == pytest.approx(2048 / seconds)


def test_every_claim_of_the_contest_names_a_case_and_a_peer_that_exist(scripts: Any) -> None:
    comet = scripts("comet_cpu")
    cases = {case.name for case in comet.CASES}
    for case, peer in comet.CLAIMS.values():
        assert case in cases and peer in {comet.BEST, *comet.SHORT.values()}


def record(due: float, error: str | None = None) -> Record:
    return Record(due, due, due + 0.1, due + 0.2, due + 0.2, 8, 3, error=error)


def outcome(serving: Any, tokens: list[list[int]], errors: dict[int, str] | None = None, **more: Any) -> Any:
    records = [record(float(i), (errors or {}).get(i)) for i in range(len(tokens))]
    return serving.Outcome(records, tokens, **more)


def test_an_answer_is_wrong_when_a_token_differs_and_an_error_is_no_wrong_answer(scripts: Any) -> None:
    serving = scripts("comet_serving")
    run = outcome(serving, [[1, 2], [3, 9], [5], []], {3: "HTTP 500"})
    assert run.wrong([[1, 2], [3, 4], [5, 6], [7]]) == [1, 2]
    assert run.errors() == 1


def test_the_serving_claims_add_up(scripts: Any) -> None:
    serving = scripts("comet_serving")
    scale = serving.Scale((0.5, 1.0), 1.0, 1.0, (8, 8), Slo(ttft=1.0, tpot=1.0), 1.0)
    truth = [[1], [2], [3]]
    runs = {
        (serving.FOUR, 0.5): outcome(serving, truth[:2]),
        (serving.BF16, 0.5): outcome(serving, [[7], [8]]),  # another precision: not compared
        (serving.FOUR, 1.0): outcome(serving, [[1], [2], [4]]),
        (serving.BF16, 1.0): outcome(serving, [[7], [8], [9]], {0: "e", 1: "e"}),
    }
    pressure = outcome(serving, truth, {0: "e"}, preemptions=5.0, samples=[(0.5, 2.0), (1.0, 3.0)])
    found = serving.Found(truth, runs, pressure, {serving.FOUR: 89.0, serving.BF16: 25.0})
    claims = serving._claims(found, scale)
    assert (claims["compared"], claims["mismatches"], claims["errors"]) == (7.0, 1.0, 3.0)
    assert (claims["preemptions"], claims["pool_usage"]) == (5.0, 1.0)
    assert claims["concurrent_sequences_ratio"] == pytest.approx(3.56)
    # 2 good ones within 1.2 s, 3 within 2.2 s; BF16: 2 within 1.2 s at the lower rate.
    assert claims["goodput_vs_bf16"] == pytest.approx((2 / 1.2) / (2 / 1.2))


def test_without_goodput_in_bf16_there_is_no_ratio(scripts: Any) -> None:
    serving = scripts("comet_serving")
    scale = serving.Scale((1.0,), 1.0, 1.0, (8, 8), Slo(ttft=1.0, tpot=1.0), 1.0)
    runs = {
        (serving.FOUR, 1.0): outcome(serving, [[1]]),
        (serving.BF16, 1.0): outcome(serving, [[1]], {0: "e"}),
    }
    found = serving.Found([[1]], runs, outcome(serving, [[1]]), {serving.FOUR: 4.0, serving.BF16: 1.0})
    assert "goodput_vs_bf16" not in serving._claims(found, scale)


def test_a_trace_is_cut_by_time_and_by_length(scripts: Any) -> None:
    serving = scripts("comet_serving")
    rows = [(5.0, Size(1600, 40)), (6.0, Size(8000, 4)), (9.0, Size(16, 4000)), (20.0, Size(1, 1))]
    assert [serving.count_within(rows, seconds) for seconds in (0.0, 1.0, 4.0, 100.0)] == [1, 2, 3, 4]
    assert serving.after(rows, 6.0) == rows[1:]
    with pytest.raises(SystemExit, match="--skip is 21"):
        serving.after(rows, 21.0)
    sizes, cut = serving.fitted(rows, serving.LLAMA)
    assert sizes == [Size(100, 20), Size(256, 2), Size(1, 240), Size(1, 1)]
    assert cut == 2


def test_a_drawn_trace_is_like_the_real_ones_rate_and_lengths(scripts: Any) -> None:
    serving = scripts("comet_serving")
    rows = serving.drawn_trace(np.random.default_rng(0), 4000)
    assert 4000 / rows[-1][0] == pytest.approx(5.9, rel=0.1)
    assert np.median([size.input for _, size in rows]) == pytest.approx(1000, rel=0.1)
    assert min(min(size.input, size.output) for _, size in rows) >= 1


def test_the_pool_holds_whole_blocks_of_bf16(scripts: Any) -> None:
    from weft.models.families import parse_config

    config = parse_config(scripts("models").LLAMA_1B)
    assert scripts("comet_serving").pool_bytes(config, 401) == 416 * 22 * 2 * 4 * 64 * 2


def test_requests_of_a_lower_rate_are_among_those_of_the_highest(scripts: Any, tmp_path: Path) -> None:
    from weft.models.families import parse_config

    serving = scripts("comet_serving")
    arguments = type("Arguments", (), {"trace": None, "seconds": 4.0, "skip": 9.0})
    config = parse_config(scripts("models").LLAMA_1B)
    loads, notes = serving._loads(arguments, serving.BUILTIN, config, np.random.default_rng(1))
    few, many = loads[1.0], loads[4.0]
    assert 0 < len(few) < len(many) and [shot.prompt for shot in few] == [shot.prompt for shot in many[: len(few)]]
    assert few[-1].due <= 4.0 and many[-1].due <= 4.0
    assert all(isinstance(shot, Shot) and len(shot.prompt) == shot.input_tokens for shot in many)
    assert "NO TRACE" in notes[0]


def test_gguf_and_openvino_forms_are_made_again_only_when_the_model_is_newer(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer_models = scripts("peer_models")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    commands: list[list[str]] = []

    def run(*command: object) -> None:
        commands.append([str(part) for part in command])
        next(Path(part) for part in commands[-1] if part.endswith(".part")).write_text("made")

    monkeypatch.setattr(peer_models, "_run", run)
    out = peer_models.gguf(folder, Path("python"), tmp_path, "q4_0")
    assert out.name == "model-q4_0.gguf" and out.read_text() == "made" and len(commands) == 2
    peer_models.gguf(folder, Path("python"), tmp_path, "q8_0")
    assert len(commands) == 3 and commands[-1][-1] == "q8_0"
    peer_models.gguf(folder, Path("python"), tmp_path, "q4_0")
    assert len(commands) == 3
    later = out.stat().st_mtime + 10
    import os

    os.utime(folder / "config.json", (later, later))
    peer_models.gguf(folder, Path("python"), tmp_path)
    assert len(commands) == 4
