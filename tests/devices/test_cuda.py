"""The cuda device, interpreted where there is no GPU, against the CPU's reference kernels and sampler.

The contract of all devices is in test_contract.py, computing ahead in test_cuda_ahead.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

pytest.importorskip("triton", reason="triton is not installed")

from weft.comet import reference
from weft.comet.checkpoint import FmpqConfig, QuantisedLayer, QuantisedSite, layer_tensors, site_shapes
from weft.comet.linear import QuantisedReferenceKernels
from weft.comet.reference import InputForm, QuantisedLinear
from weft.config import EngineConfig
from weft.core.plan import Lane, Plan, Result, Sampling, Slice
from weft.core.request import Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.devices import cuda, cuda_trial, open_device
from weft.devices.base import Device
from weft.devices.cuda_draw import start_draw
from weft.devices.cuda_forward import CudaForward, buckets
from weft.devices.cuda_memory import Usage, check_weights, size_gpu_pool
from weft.devices.cuda_streams import Immediate, Interpreted, Work, open_gpu
from weft.errors import ConfigError
from weft.kernels import triton_linear, triton_norm
from weft.kernels.triton import TritonKernels
from weft.kernels.triton_attention import slices_of
from weft.kernels.triton_tiles import LINEAR, W4A8, W4A16
from weft.kernels.triton_w4ax import tile_of
from weft.loop.build import open_engine
from weft.models import sampler
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.families import ModelConfig, read_config
from weft.models.loader import EMBEDDING, load_weights, move, tensor_shapes

BLOCK, VOCABULARY, POISON = 16, 97, 96  # POISON: the token whose embedding is NaN
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
MIB = 2**20
SCORED = SamplingParams(temperature=0.0, logprobs=3)
SMALL: dict[str, Any] = {"num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64}
# One core: torch's threads wait for each other when another process wants one.
TRUTH = {"device": "cpu", "kernels": "reference", "cores": str(min(os.sched_getaffinity(0)))}
PROMPTS = ([7 * i % 90 for i in range(25)], [3, 4, 5], [8])
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def outer_and_layers(folder: Path) -> dict[str, torch.Tensor]:
    shapes = tensor_shapes(read_config(folder))
    tensors = {
        name: torch.ones(shape) if name.endswith("norm.weight") else torch.randn(shape, generator=random(3)) * 0.2
        for name, shape in shapes.items()
    }
    tensors[EMBEDDING][POISON] = math.nan
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights and one embedding of NaN."""
    made = tmp_path_factory.mktemp("tiny")
    (made / "config.json").write_text(json.dumps(SHAPE))
    save_file(outer_and_layers(made), made / "model.safetensors")
    return made


@pytest.fixture(scope="module")
def fmpq(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """One layer of random integers of 4 bits, 8 in outlier blocks."""
    made = tmp_path_factory.mktemp("fmpq")
    model = replace(read_config(folder), layers=1)
    outliers = {"attention": (1,), "output": (0,), "mlp": (0,), "down": (1,)}
    form = FmpqConfig(8, outliers, dict.fromkeys(outliers, (True,)))
    tensors = {name: tensor for name, tensor in outer_and_layers(folder).items() if ".layers." not in name}
    for index in range(model.layers):
        layer = layer_tensors(random_integers(form, model, index), form, model)
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    described = {"num_hidden_layers": 1, "quantization_config": form.as_json()}
    (made / "config.json").write_text(json.dumps(SHAPE | described))
    save_file(tensors, made / "model.safetensors")
    return made


def random_integers(form: FmpqConfig, model: ModelConfig, index: int) -> QuantisedLayer:
    sites = {}
    for number, (site, (rows, columns)) in enumerate(site_shapes(model).items()):
        chance, count, wide = random(10 * index + number), sum(rows.values()), form.outlier_blocks[site][index] * 128
        values = torch.randint(-8, 8, (count, columns), generator=chance, dtype=torch.int8)
        values[:, :wide] = torch.randint(-127, 128, (count, wide), generator=chance)
        scales = torch.rand(count, columns // 128, generator=chance) * 0.03
        scales[:, : wide // 128] /= 16
        order = None if site == "down" else torch.randperm(columns, generator=chance).int()
        sites[site] = QuantisedSite(
            InputForm(columns, order, form.outlier_blocks[site][index], form.hadamard[site][index]),
            QuantisedLinear(values, scales.bfloat16().float(), None),
        )
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return QuantisedLayer(sites, {name: torch.ones(model.hidden_size) for name in norms})


Open = Callable[..., Device]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens devices on a checkpoint and closes them after the test."""
    devices: list[Device] = []

    def opener(folder: Path, **given: Any) -> Device:
        config = EngineConfig(**{"device": "cuda", "model": str(folder)} | SMALL | given)
        config.validate()
        devices.append(open_device(config, folder, lambda phase: None))
        return devices[-1]

    yield opener
    for device in devices:
        device.close()


def piece(sequence: int, tokens: Sequence[int], start: int = 0, params: SamplingParams = SCORED, **more: Any) -> Slice:
    """A slice of a sequence that has four blocks of its own."""
    blocks = tuple(range(4 * sequence, 4 * sequence + 4))
    sample = Sampling(params, sequence, start + len(tokens))
    return Slice(sequence, start, tuple(tokens), blocks, **{"sample": sample} | more)


def carry_out(device: Device, *plans: Plan) -> list[Result]:
    """Submit the plans and wait for their results."""
    for plan in plans:
        device.submit(plan)
    results: list[Result] = []
    while len(results) < len(plans):
        found = device.poll(60.0)
        assert found, "no result within a minute"
        results += found
    return results


def one(device: Device, *slices: Slice) -> Result:
    (result,) = carry_out(device, Plan(1, Lane.MIXED, slices))
    return result


def tokens_of(result: Result) -> dict[int, int]:
    return {sampled.sequence: sampled.token for sampled in result.sampled}


# ---------------------------------------------------------------- what it computes


def scores(device: Device) -> torch.Tensor:
    """Log-probabilities [3, 3, 97] of three sequences: prompts in chunks and together, then decode steps with given
    tokens. -100 but for the 5 most probable."""
    params = SamplingParams(temperature=0.0, logprobs=5)
    steps = [(piece(0, PROMPTS[0][:18], sample=None), piece(1, PROMPTS[1], params=params))]
    steps.append((piece(0, PROMPTS[0][18:], 18, params), piece(1, [9], 3, params), piece(2, PROMPTS[2], params=params)))
    for step in range(2):
        begins = (25 + step, 4 + step, 1 + step)
        steps.append(tuple(piece(i, [11 + step], begin, params) for i, begin in enumerate(begins)))
    first, *results = carry_out(device, *(Plan(number, Lane.MIXED, slices) for number, slices in enumerate(steps)))
    assert first.error is None and set(tokens_of(first)) == {1}
    found = torch.full((len(results), 3, VOCABULARY), -100.0)
    for row, result in enumerate(results):
        assert not result.failed and result.error is None and len(result.sampled) == 3
        for sampled in result.sampled:
            assert sampled.score is not None and sampled.token == sampled.score.token == sampled.score.top[0][0]
            for token, logprob in sampled.score.top:
                found[row, sampled.sequence, token] = logprob
    return found


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Over what both have."""
    both = (found > -100) & (expected > -100)
    assert both.sum() > 0.7 * (expected > -100).sum()
    return float((found - expected)[both].abs().max())


@pytest.mark.parametrize(
    ("weights", "dtype", "cache", "backend", "tolerance"),
    [
        ("folder", "float32", "auto", "triton", 1e-4),
        ("folder", "float32", "int4", "triton", 5e-3),
        ("folder", "float32", "int4", "torch", 5e-3),
        ("folder", "bfloat16", "bf16", "triton", 0.04),  # CPUs that multiply bfloat16 round at other places
        ("fmpq", "float32", "int8", "triton", 5e-3),
    ],
)
def test_each_precision_says_what_the_reference_says(
    opened: Open, request: pytest.FixtureRequest, weights: str, dtype: str, cache: str, backend: str, tolerance: float
) -> None:
    """Prefill in chunks, mixed and decode batches."""
    place = request.getfixturevalue(weights)
    settings = {"dtype": dtype, "kv_cache_dtype": cache}
    device = opened(place, attention_backend=backend, **settings)
    found = scores(device)
    expected = scores(opened(place, **TRUTH, **settings))
    assert distance(found, expected) < tolerance
    words = device.describe()
    assert words.dtype.startswith(dtype) and (cache in words.dtype) == (cache in ("int8", "int4"))
    assert words.kernels.endswith(f"attention {backend}")
    if cache == "int4":
        exact = scores(opened(place, **TRUTH, dtype="float32"))
        assert distance(found, exact) > 2 * tolerance  # fewer bits do something


class SixteenBit(QuantisedReferenceKernels):
    """W4A16 in floats: the prepared input as it is, the weight as its integers say."""

    def linear(self, x: torch.Tensor, packed: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        if not isinstance(packed, QuantisedSite):
            return super().linear(x, packed, dtype)
        prepared = reference.prepare(x, packed.form).to(x.dtype).float()
        return (prepared @ packed.linear.dequantised().T).to(dtype or x.dtype)


def test_w4a16_leaves_activations_in_16_bits(opened: Open, fmpq: Path) -> None:
    model, kernels = read_config(fmpq), SixteenBit(())
    decoder = Decoder(model, load_weights(fmpq, model, kernels, torch.bfloat16), kernels, 64)
    batch = make_batch([Slice(0, 0, tuple(PROMPTS[0][:5]), (0,))], BLOCK)
    logits = decoder.logits(decoder.hidden(batch, decoder.make_kv(1, BLOCK)))[-1]
    expected = logits.log_softmax(-1)
    far = []
    for w4a16 in (True, False):
        device = opened(fmpq, dtype="bfloat16", w4a16=w4a16)
        assert ("W4A16" in device.describe().kernels) == w4a16
        score = (
            one(device, piece(0, PROMPTS[0][:5], params=SamplingParams(temperature=0.0, logprobs=20))).sampled[0].score
        )
        assert score is not None
        far.append(sum(abs(logprob - float(expected[token])) for token, logprob in score.top) / 20)
    assert far[0] < 0.003 < 0.01 < far[1]


class Apart(TritonKernels):
    """Norms and activations give rows, which linears then quantise in a kernel of their own."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, _reader: Any = None) -> Any:
        return super().rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, _reader: Any = None
    ) -> Any:
        return super().add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor, _reader: Any = None) -> Any:
        return super().silu_mul(gate_up)


@pytest.mark.parametrize("precision", [{}, {"exact_a4": True}, {"sixteen": True}], ids=["W4A8", "exact-a4", "W4A16"])
def test_a_quantised_model_joins_norms_and_activations_with_what_follows(
    fmpq: Path, precision: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the last norm, which no quantised linear reads, has a kernel of its own; and no bit is another."""
    alone: list[str] = []
    for name in ("rms_norm", "add_rms_norm", "silu_mul"):
        given = getattr(triton_norm, name)
        monkeypatch.setattr(
            triton_norm, name, lambda *more, name=name, given=given: (alone.append(name), given(*more))[1]
        )
    gpu, model, outcome = open_gpu(), read_config(fmpq), []
    for make in (TritonKernels, Apart):
        kernels = make(gpu.device, **precision)
        decoder = Decoder(model, move(load_weights(fmpq, model, kernels, torch.bfloat16), gpu.device), kernels, 64)
        kv, stream = decoder.make_kv(8, BLOCK), gpu.stream()
        forward = CudaForward(gpu, stream, decoder, kv, BLOCK, max_slices=2, graphs=True)
        pieces = (piece(0, PROMPTS[0][:20]), piece(1, PROMPTS[1])), (piece(0, [5], 20), piece(1, [6], 3))
        with stream.use():
            logits = [forward.run(pieces[0], [19, 22]).clone(), forward.run(pieces[1], [0, 1]).clone()]
        outcome.append((logits, kv[0].keys.codes, kv[0].values.codes, alone[:]))
        alone.clear()
    (found, *stored, joined), (expected, *also, apart) = outcome
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(stored, also, strict=True))
    steps = len(joined)  # a graph's step is launched when it is captured and when it is replayed
    assert joined == ["add_rms_norm"] * steps and steps >= 2
    assert apart == ["rms_norm", "add_rms_norm", "silu_mul", "add_rms_norm"] * steps


def test_batch_invariant_gives_a_prompt_in_chunks_the_bits_of_the_whole(
    opened: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag reaches all products; what it is good for is in test_cuda_invariant.py."""
    asked: list[int] = []
    linear = triton_linear.linear
    monkeypatch.setattr(triton_linear, "linear", lambda x, *more: (asked.append(len(x)), linear(x, *more))[1])
    device = opened(folder, dtype="bfloat16", batch_invariant=True)
    assert device.describe().kernels.endswith("batch-invariant")
    whole = one(device, piece(0, PROMPTS[0]))
    one(device, piece(1, PROMPTS[0][:18], sample=None), piece(2, PROMPTS[1]))
    parts = one(device, piece(1, PROMPTS[0][18:], 18), piece(3, PROMPTS[2]))
    (expected,), (found, _) = whole.sampled, parts.sampled
    assert found.score is not None and (found.token, found.score) == (expected.token, expected.score)
    assert len(asked) == 3 * (2 * 4 + 1) and set(asked) == {25, 21, 8, 1, 2}


# ---------------------------------------------------------------- what it draws


few = settings(max_examples=15, deadline=None)
ids = st.integers(0, VOCABULARY - 1)


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.4, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 1, 5])),
        top_p=draw(st.sampled_from([1.0, 0.5, 0.95])),
        min_p=draw(st.sampled_from([0.0, 0.05])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.7])),
        logit_bias=draw(st.sampled_from([(), ((3, 5.0), (7, -100.0))])),
        logprobs=draw(st.sampled_from([None, 0, 3])),
    )
    seen = draw(st.lists(ids, max_size=5)) if params.penalised else []
    forbidden = draw(st.sampled_from([(), (5, 6), tuple(range(VOCABULARY)), (VOCABULARY + 3,)]))
    seed, position = draw(st.integers(-(2**63), 2**64 - 1)), draw(st.integers(0, 99))
    return Sampling(params, seed, position, (), tuple(seen), forbidden)


@few
@given(
    given=st.lists(st.tuples(samplings(), st.sampled_from(["fine", "fine", "nan", "inf", "-inf"])), max_size=5),
    seed=st.integers(0, 2**31),
)
@example(
    given=[
        (Sampling(SamplingParams(), 1, 2), "nan"),
        (Sampling(SamplingParams(logprobs=2), 1, 2, forbidden=(5,)), "inf"),
        (Sampling(SamplingParams(), 1, 2, forbidden=tuple(range(VOCABULARY))), "fine"),
        (Sampling(SamplingParams(logprobs=0), 1, 2), "fine"),
    ],
    seed=0,
)
def test_whatever_is_asked_the_draw_is_the_cpus(given: list[tuple[Sampling, str]], seed: int) -> None:
    gpu = open_gpu()
    asked = [sampling for sampling, _ in given]
    logits = torch.randn(len(given), VOCABULARY, generator=random(seed)) * 3
    for row, (_, spoilt) in enumerate(given):
        if spoilt in ("nan", "inf"):
            logits[row, 5] = float(spoilt)
        elif spoilt == "-inf":
            logits[row] = -torch.inf
    drawn = torch.full((8,), -1, device=gpu.device)
    before = logits.clone()
    found = start_draw(gpu, logits.to(gpu.device), asked, drawn)
    gpu.settle()
    expected = sampler.sample(logits, asked)
    for outcome, wanted, token in zip(found.read(), expected, drawn.tolist(), strict=False):
        assert 0 <= token < VOCABULARY  # a token to go on with, whatever became of the row
        if isinstance(wanted, str):
            assert outcome == wanted
            continue
        assert not isinstance(outcome, str) and outcome[0] == wanted[0] == token
        if wanted[1] is None:
            assert outcome[1] is None
            continue
        assert outcome[1] is not None and outcome[1].rank == wanted[1].rank
        assert outcome[1].logprob == pytest.approx(wanted[1].logprob, rel=1e-6, abs=2e-6)
        assert [other for other, _ in outcome[1].top] == [other for other, _ in wanted[1].top]
    assert drawn[len(given) :].tolist() == [-1] * (8 - len(given))
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))


REQUESTS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=5),
    "sampled": SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=5),
    "two": SamplingParams(temperature=1.0, top_k=20, min_p=0.01, seed=-3, n=2, logprobs=2, max_tokens=4),
    "penalised": SamplingParams(temperature=0.7, repetition_penalty=1.2, presence_penalty=0.3, seed=8, max_tokens=3),
    "biased": SamplingParams(temperature=0.0, logit_bias=((5, 4.0), (6, -100.0)), logprobs=0, max_tokens=4),
    "longer": SamplingParams(temperature=1.0, min_tokens=2, stop_token_ids=tuple(range(40)), seed=9, max_tokens=4),
}


def answers(
    folder: Path, given: dict[str, Any], *names: str, then: str | None = None
) -> dict[tuple[str, int], list[Any]]:
    """What each sequence of the requests got: tokens, and an error at the end if there was one. then: one that comes
    when the others are done."""
    engine, _ = open_engine(EngineConfig(**SMALL | given, model=str(folder)), lambda phase: None)
    found: dict[tuple[str, int], list[Any]] = {}
    try:
        for name in names:
            engine.submit(Request(name, tuple(PROMPTS[len(name) % 3]), REQUESTS[name]))
        while not engine.idle:
            for event in engine.step(60.0):
                if isinstance(event, TokenOutput):
                    found.setdefault((event.request, event.index), []).append(event.token)
                elif isinstance(event, RequestEnd) and event.error is not None:
                    found.setdefault((event.request, 0), []).append(event.error)
            if engine.idle and then is not None:
                engine.submit(Request(then, tuple(PROMPTS[len(then) % 3]), REQUESTS[then]))
                then = None
    finally:
        engine.close()
    return found


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[tuple[str, int], list[Any]]:
    return answers(folder, TRUTH, *REQUESTS)


def test_seeded_requests_get_the_cpus_tokens_computed_ahead(
    folder: Path, expected: dict[tuple[str, int], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: set[SamplingParams] = set()
    run = CudaForward.run

    def watched(self: CudaForward, slices: Sequence[Slice], rows: Any, feeds: Any = None) -> torch.Tensor:
        ahead.update(one.sample.params for one in slices if feeds is not None and one.sample is not None)
        return run(self, slices, rows, feeds)

    monkeypatch.setattr(CudaForward, "run", watched)
    assert len(expected) == 7 and all(tokens for tokens in expected.values())
    assert answers(folder, {"device": "cuda"}, *REQUESTS) == expected
    # All but those whose next draw depends on tokens that the host has not seen.
    assert {params.temperature for params in ahead} >= {0.0, 0.8} and not any(params.penalised for params in ahead)
    assert any(params.logprobs is not None for params in ahead)


# ---------------------------------------------------------------- what fails


def test_a_row_of_nan_fails_alone(opened: Open, folder: Path) -> None:
    device = opened(folder)
    good = one(device, piece(1, [3, 4, 5]), piece(2, [8, 9]))
    mixed = one(
        device,
        piece(1, [3, 4, 5]),
        piece(3, [3, POISON, 5]),
        piece(2, [8, 9]),
        piece(4, [3, POISON, 5], prompt_logprobs=0),
        piece(5, [POISON], params=SamplingParams(temperature=1.0, logit_bias=((5, 9.0),))),
    )
    assert mixed.error is None and mixed.prompt_scores == ()
    assert tokens_of(mixed) == tokens_of(good) and set(tokens_of(good)) == {1, 2}
    assert set(dict(mixed.failed)) == {3, 4, 5} and all("NaN" in reason for _, reason in mixed.failed)
    # In decode steps, too, after which a step is computed ahead from a token that such a row has not.
    token = tokens_of(good)[1]
    both = one(device, piece(1, [token], 3), piece(3, [POISON], 3))
    assert [failed for failed, _ in both.failed] == [3]
    ahead = one(device, piece(1, [tokens_of(both)[1]], 4))
    assert tokens_of(both) == tokens_of(one(device, piece(1, [token], 3)))
    assert tokens_of(ahead) == tokens_of(one(device, piece(1, [tokens_of(both)[1]], 4)))


def test_a_step_that_raises_fails_alone(opened: Open, folder: Path) -> None:
    device = opened(folder)
    good, no_blocks, again = carry_out(
        device,
        Plan(1, Lane.MIXED, (piece(1, [3, 4]),)),
        Plan(2, Lane.MIXED, (Slice(2, 0, (1, 2, 3), (0,), Sampling(SCORED, 0, 3)), Slice(3, 0, (1,), ()))),
        Plan(3, Lane.MIXED, (piece(1, [3, 4]),)),
    )
    assert no_blocks.error is not None and no_blocks.error.startswith("ValueError: ")
    assert good.error is None and good.sampled == again.sampled


def test_a_failing_step_ends_its_requests_only(
    folder: Path, expected: dict[tuple[str, int], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request comes when the others are done, and there is no memory for it: they have what they should."""
    run = CudaForward.run

    def fails(self: CudaForward, slices: Sequence[Slice], rows: Any, feeds: Any = None) -> torch.Tensor:
        if any(piece.sample is not None and piece.sample.params.penalised for piece in slices):
            raise torch.OutOfMemoryError("there is none left")
        return run(self, slices, rows, feeds)

    monkeypatch.setattr(CudaForward, "run", fails)
    found = answers(folder, {"device": "cuda"}, "greedy", then="penalised")
    assert "OutOfMemoryError: there is none left" in found.pop(("penalised", 0))[-1]
    assert found == {("greedy", 0): expected["greedy", 0]}


def test_close_ends_the_threads_and_loses_no_result(opened: Open, folder: Path) -> None:
    before = threading.active_count()
    device = opened(folder)
    assert threading.active_count() == before + 2
    for step in range(8):
        device.submit(Plan(step, Lane.MIXED, (piece(step, [3, 4]),)))
    device.close()
    device.close()
    assert threading.active_count() == before
    results = device.poll(0.0)
    assert [result.ticket.step for result in results] == list(range(8))
    assert {result.error for result in results} <= {None, "the device is closed"}
    assert device.lanes() == (Lane.MIXED,) and device.poll(0.0) == []


# ---------------------------------------------------------------- graphs


class Recording(Immediate):
    """A stream whose graphs are told apart by number: `replayed` has which one was launched when."""

    def __init__(self) -> None:
        super().__init__(threading.RLock())
        self.captured = 0
        self.replayed: list[int] = []

    def capture(self, work: Work) -> Work:
        number, self.captured = self.captured, self.captured + 1
        work()  # as on a GPU, once before it is recorded

        def replay() -> None:
            self.replayed.append(number)
            work()

        return replay


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    """The first layer of the model; with products whose bits do not depend on the number of rows, as those of torch do
    on some CPUs."""
    model, gpu = replace(read_config(folder), layers=1, windows=(None,)), open_gpu()
    kernels = TritonKernels(gpu.device, invariant=True)
    weights = load_weights(folder, read_config(folder), kernels, torch.float32)
    return Decoder(model, move(replace(weights, layers=weights.layers[:1]), gpu.device), kernels, 64)


def forward_of(decoder: Decoder, stream: Any, *, graphs: bool, cache: str = "auto") -> tuple[CudaForward, list[Any]]:
    kv = decoder.make_kv(32, BLOCK, cache)
    return CudaForward(open_gpu(), stream, decoder, kv, BLOCK, max_slices=7, graphs=graphs), kv


@given(most=st.integers(1, 1024))
def test_buckets_are_few_and_waste_little(most: int) -> None:
    sizes = buckets(most)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] == most and len(sizes) <= 2 * most.bit_length() + 1
    for count in range(1, most + 1):
        size = min(size for size in sizes if size >= count)
        assert size < 2 * count and (count <= 16 or 2 * size < 3 * count + 3)


@torch.inference_mode()
def test_graphs_are_captured_when_they_are_needed_the_largest_first(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Recording()
    forward, _ = forward_of(decoder, stream, graphs=True)
    sizes: list[int] = []
    record = forward._record
    monkeypatch.setattr(forward, "_record", lambda size: (sizes.append(size), record(size))[1])
    prompt = piece(1, [3, 4])
    forward.run([prompt], [1])
    assert sizes == []  # prompts go without
    for count, wanted in ((3, [7, 4]), (4, [7, 4]), (1, [7, 4, 1]), (7, [7, 4, 1])):
        forward.run([piece(i, [5], 2) for i in range(count)], range(count))
        assert sizes == wanted and stream.captured == len(wanted)
        assert stream.replayed[-1] == wanted.index(min(size for size in wanted if size >= count))
    assert len(stream.replayed) == 4


@torch.inference_mode()
@pytest.mark.parametrize("cache", ["auto", "int4"])
def test_rows_that_fill_a_bucket_up_change_nothing(decoder: Decoder, cache: str) -> None:
    """Logits and keys and values are the bits of a decode step without graphs, and nobody else's slots are touched."""
    made = [forward_of(decoder, Recording(), graphs=graphs, cache=cache) for graphs in (True, False)]
    feeds: list[int] | None
    for step, feeds in enumerate((None, [0, 1, 2, 3, 4])):
        slices = [piece(i, [9 + i + step], 17 + step) for i in range(5)]
        logits = []
        for forward, _ in made:
            forward.drawn[:5] = torch.arange(40, 45)
            logits.append(forward.run(slices, range(5), feeds).clone())
        assert torch.equal(*logits) and logits[0].isfinite().all()
        fed = [piece(i, [40 + i], 17 + step) for i in range(5)] if feeds else slices
        assert torch.equal(made[1][0].run(fed, range(5)), logits[0])
    for one, other in zip(made[0][1], made[1][1], strict=True):
        for mine, theirs in zip(one.tensors, other.tensors, strict=True):
            assert mine is theirs is None or torch.equal(mine, theirs)
    written = made[0][1][0].keys.codes.ne(0).any(-1).any(1)  # [blocks, slots]
    assert written.nonzero().tolist() == [[4 * i + 1, slot] for i in range(5) for slot in (1, 2)]


# ---------------------------------------------------------------- memory


class Measured(Interpreted):
    """A GPU that runs what it is asked to measure: each time it takes a MiB more."""

    def __init__(self, free: list[int], total: int = 10 * 2**30) -> None:
        super().__init__()
        self.free, self.total = free, total
        self.measured = 0
        self.settled = False

    def memory(self) -> tuple[int, int]:
        return self.free.pop(0), self.total

    def peak(self, work: Work) -> int:
        self.measured += 1
        work()
        return self.measured * MIB

    def settle(self) -> None:
        self.settled = True


def test_the_memory_table_adds_up_after_steps_were_tried_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Measured([9 * 2**30, 8 * 2**30])
    monkeypatch.setattr(cuda, "open_gpu", lambda: gpu)
    phases: list[str] = []
    config = EngineConfig(device="cuda", model=str(folder), max_num_seqs=2, max_num_batched_tokens=20)
    device = open_device(config, folder, phases.append)
    try:
        assert phases == ["open the GPU", "weights", "kernels", "KV pool"] and gpu.settled
        rows, capacity = dict(device.memory()), device.capacity()
        whole = rows.pop("the device's memory")
        assert whole == gpu.total == sum(rows.values())
        assert rows["activations, at the peak"] == 2 * MIB  # the second of three
        assert rows["decode graphs"] == 3 * MIB + 2 * VOCABULARY * 4
        assert rows["other processes and CUDA"] + rows["weights"] == 2 * 2**30  # what is not free by then
        assert rows["KV pool"] == capacity.blocks * BLOCK * 2 * 2 * 2 * 32 * 4
        assert capacity.blocks == 2 * 128 // BLOCK  # all sequences at full length: there is room
    finally:
        device.close()


def test_every_kernel_that_can_be_called_was_tried_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever decides which kernel it is, for all steps of up to 300 rows and 200 slices."""
    seats, tokens, tried = 200, 300, []

    def run(self: Any, slices: Sequence[Slice], rows: Sequence[int]) -> torch.Tensor:
        tried.append((slices, rows))
        return torch.zeros(len(rows), VOCABULARY)

    def key(rows: int, slices: int) -> tuple[Any, ...]:
        few = [tile_of(table[90], rows, outputs) for table in (W4A8, W4A16) for outputs in (4096, 6144, 28672)]
        return (*few, LINEAR[90].of(rows)), (slices_of(slices), rows == slices)

    drawn: set[tuple[bool, ...]] = set()
    monkeypatch.setattr(CudaForward, "run", run)
    monkeypatch.setattr(
        cuda_trial,
        "start_draw",
        lambda gpu, logits, asked, _: drawn.add((asked[0].params.greedy, asked[0].params.penalised, len(logits) > 0)),
    )
    model, kernels = replace(read_config(folder), context=1024), TritonKernels(torch.device("cpu"))
    weights = load_weights(folder, model, kernels, torch.float32)
    config = EngineConfig(max_num_seqs=seats, max_num_batched_tokens=tokens)
    cuda_trial.try_out(Measured([]), config, model, kernels, weights)
    found = {key(sum(len(one.tokens) for one in slices), len(slices)) for slices, _ in tried}
    products, attention = {one for one, _ in found}, {one for _, one in found}
    for rows in range(1, tokens + 1):
        for slices in range(1, min(rows, seats) + 1):
            assert key(rows, slices)[0] in products and key(rows, slices)[1] in attention, (rows, slices)
    assert drawn == {(True, False, True), (False, True, True)}
    assert max(sum(len(one.tokens) for one in slices) for slices, _ in tried) == tokens
    # Decode keeps sums for all blocks of a table, and a graph's tables are as long as a sequence may be.
    assert {len(one.blocks) for one in tried[-1][0]} == {1024 // BLOCK} and len(tried[-1][0]) == seats


def pool(usage: Usage, **given: Any) -> Any:
    return size_gpu_pool(EngineConfig(**{"block_size": BLOCK} | given), 128, 1024, usage)


@given(parts=st.tuples(*[st.integers(0, 400) for _ in range(4)]), share=st.sampled_from([0.05, 0.5, 0.9, 1.0]))
def test_the_pool_has_what_is_left_or_the_error_says_what_would_fit(parts: tuple[int, ...], share: float) -> None:
    usage = Usage(1000 * MIB, *(part * MIB for part in parts))
    try:
        made = pool(usage, gpu_memory_utilization=share)
    except ConfigError as error:
        assert str(error).startswith(f"--gpu-memory-utilization is {share:g}: ")
        fits = re.search(r"--gpu-memory-utilization (\d\.\d\d) holds one block", str(error))
        if fits is None:
            assert "have to be free" in str(error) and usage.taken + 1024 * BLOCK > usage.total * 0.99
        else:
            assert float(fits[1]) > share
            assert pool(usage, gpu_memory_utilization=float(fits[1])).blocks >= 1
    else:
        left = int(usage.total * share) - usage.taken
        assert made.blocks == min(left // (1024 * BLOCK), 64 * 8)  # sequences of 8 blocks


def test_a_pool_that_does_not_fit_names_the_flag_and_what_fits() -> None:
    usage = Usage(1000 * MIB, 100 * MIB, 300 * MIB, 50 * MIB, 50 * MIB)
    with pytest.raises(ConfigError, match=r"--num-blocks is 30000.*at most (\d+)") as caught:
        pool(usage, num_blocks=30000)
    most = int(str(caught.value).rsplit(" ", 1)[1])
    assert pool(usage, num_blocks=most).blocks == most == 400 * MIB // (1024 * BLOCK)
    with pytest.raises(ConfigError, match=f"at most {most}$"):
        pool(usage, num_blocks=most + 1)
    with pytest.raises(ConfigError, match=r"--kv-cache-memory-bytes is 524288000; 419430400 bytes .* at most that"):
        pool(usage, kv_cache_memory_bytes=500 * MIB)
    with pytest.raises(ConfigError, match="--max-model-len is 200; the checkpoint's context is 128"):
        pool(usage, max_model_len=200)
    check_weights(2**30, 2**30, 2**31)
    with pytest.raises(ConfigError, match=r"take 1.50 GiB, and 1.00 GiB of the device's 2.00 GiB are free.*--dtype"):
        check_weights(3 * 2**29, 2**30, 2**31)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cores": "0"}, "--cores is 0, and it is for --device cpu; leave it out"),
        ({"kernels": "reference"}, "--kernels is reference, and it is for --device cpu"),
        ({"kv_cache_dtype": "bf16"}, "--kv-cache-dtype is bf16: .*float32; auto, int8 and int4 would work"),
        ({"exact_a4": True}, "--exact-a4 is for fmpq checkpoints"),
        ({"w4a16": True}, "--w4a16 is for 4-bit weights, and those of .* are not quantised; leave it out"),
        ({"w4a16": True, "exact_a4": True}, "--w4a16 leaves activations in 16 bits, and --exact-a4 .* give one"),
        ({"w4a16": True, "device": "cpu"}, "--w4a16 is for --device cuda, and --device is cpu.*leave it out"),
        ({"batch_invariant": True}, "--batch-invariant needs bfloat16, and the weights are in float32; --dtype"),
        ({"batch_invariant": True, "device": "cpu"}, "--batch-invariant is for --device cuda, and --device is cpu"),
        (
            {"batch_invariant": True, "attention_backend": "torch"},
            "--batch-invariant needs .*triton.* is torch",
        ),
        ({"batch_invariant": True, "tensor_parallel_size": 2}, "several ranks needs --weave fused.*; it is auto"),
        ({"attention_backend": "flashinfer", "tensor_parallel_size": 2}, "told of one batch in a step.* triton works"),
        ({"attention_backend": "flashinfer"}, "flashinfer, whose kernels run on a GPU only.* work: triton, torch"),
        ({"attention_backend": "torch", "device": "cpu"}, "--attention-backend is torch, and --device cpu .* cuda"),
        ({"max_model_len": 4096}, "--max-model-len is 4096; the checkpoint's context is 128"),
    ],
)
def test_a_setting_that_cannot_be_names_itself_and_what_works(
    opened: Open, folder: Path, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        opened(folder, **given)


def test_experts_are_refused_before_weights_are_read(opened: Open, tiny_experts: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_experts / "config.json", tmp_path)  # and nothing else
    with pytest.raises(ConfigError, match=r"--device is cuda, and .* is a mixtral with 5 experts .*--device cpu"):
        opened(tmp_path)


def test_w4a16_needs_bfloat16(opened: Open, fmpq: Path) -> None:
    with pytest.raises(ConfigError, match=r"--w4a16 needs .* and they are in float32; --dtype bfloat16 works"):
        opened(fmpq, w4a16=True)


def test_without_triton_the_error_says_how_to_get_it(
    opened: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.devices.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--device is cuda, and .* triton.*pip install triton.*--device cpu"):
        opened(folder)


def test_without_a_gpu_the_error_says_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.devices import cuda_streams
    from weft.errors import DeviceError

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cuda_streams.torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"--device is cuda, and .*--device cpu.*TRITON_INTERPRET=1"):
        open_gpu()
    old = {"is_available": lambda: True, "get_device_capability": lambda index: (7, 5)}
    for name, function in (old | {"get_device_name": lambda index: "an old GPU"}).items():
        monkeypatch.setattr(cuda_streams.torch.cuda, name, function)
    with pytest.raises(DeviceError, match=r"an old GPU has compute capability 7.5; .* need 8.0 .*--device cpu works"):
        open_gpu()
