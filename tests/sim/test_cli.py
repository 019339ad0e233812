"""`weft simulate` and `weft plan`: what they print and write, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft.cli import main
from weft.sim.estimate import cost_of, find_gpu, find_model

LOAD = ["--dataset-name", "random", "--seconds", "5", "--random-input-len", "200", "--random-output-len", "20"]
TARGETS = ["--slo-ttft", "0.5", "--slo-tpot", "0.05"]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n" + "".join(f"{n / 10},{100 + n},8\n" for n in range(50)))
    return path


def test_a_run_is_printed_written_and_drawn(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    flags = [
        "--dataset-name",
        "trace",
        "--dataset-path",
        str(trace),
        "--rates",
        "1",
        "4",
        "--partition",
        "1:1",
        *TARGETS,
    ]
    assert main(["simulate", *flags, "--json", str(out), "--plot", str(picture)]) == 0
    words = capsys.readouterr().out
    assert "simulated" in words and "trace.csv, 4 times its rate for 1 s" in words
    content = json.loads(out.read_text())
    assert content["simulated"] is True and [run["completed"] for run in content["runs"]] == [50, 50]
    assert content["settings"]["partition"] == "1:1" and set(content["runs"][0]["timeline"]["share"]) == {
        "prefill",
        "decode",
    }
    assert picture.stat().st_size > 20_000


def test_a_fleet_with_a_failure_and_one_with_phases_apart(capsys: pytest.CaptureFixture[str]) -> None:
    fleet = ["simulate", "--replicas", "3", "--rates", "20", *LOAD]
    assert main([*fleet, "--fail", "1:1:2", "--day-shape", "1,2", "--day-part", "2"]) == 0
    assert "went on elsewhere" in capsys.readouterr().out
    assert main([*fleet, "--prefill-replicas", "1"]) == 0


def test_the_plan_names_the_cheapest_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    prices = ["--price", "h100=3", "--price", "a100-80=1.5", "--tp", "1", "--partitions", "off"]
    assert main(["plan", *prices, "--rate", "30", *LOAD, *TARGETS, "--json", str(out)]) == 0
    words = capsys.readouterr().out
    assert "cheapest (simulated): " in words
    content = json.loads(out.read_text())
    best, other = content["verdicts"]
    assert best["replicas"] and (other["price"] is None or other["price"] >= best["price"]) and other["reason"]
    assert main(["plan", *prices, "--rate", "30", *LOAD, "--slo-ttft", "0.001"]) == 1
    assert "no configuration meets the targets" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["simulate", "--gpu", "h1000"], "--gpu is 'h1000'; it must be one of"),
        (["simulate", "--model", "nothing"], "--model is 'nothing'; it must be one of"),
        (["simulate", "--model", "llama-3-70b"], "more ranks (--tp)"),
        (["simulate", "--rates", "0"], "--rates has 0.0; each must be more than 0"),
        (["simulate", "--replicas", "0"], "--replicas is 0; it must be at least 1"),
        (["simulate", "--replicas", "2", "--prefill-replicas", "2"], "--prefill-replicas is 2"),
        (["simulate", "--replicas", "2", "--prefill-replicas", "1", "--partition", "1:1"], "not go with --partition"),
        (["simulate", "--fail", "1:2"], "'1:2' is not AT:COUNT:REPAIR"),
        (["simulate", "--partition", "1"], "--partition is '1'"),
        (["plan", "--partitions", "off", "pd:1:1"], "--partitions is 'pd:1:1'; simulated phases on devices of"),
        (["simulate", "--day-shape", "0,0"], "'0,0' is no list of factors"),
        (["simulate", "--slo-ttft", "-1"], "--slo-ttft is -1.0; it must be more than 0"),
        (["simulate", "--dataset-name", "trace"], "needs --dataset-path"),
        (["simulate", "--trace-copies", "2"], "is no trace"),
        (["simulate", "--max-num-batched-tokens", "8"], "less than --max-num-seqs"),
        (["simulate", "--routr", "x"], "did you mean --router?"),
        (["plan", "--slo-ttft", "1"], "there is no --price"),
        (["plan", "--price", "h100=2"], "there is no target"),
        (["plan", "--price", "h100"], "is not GPU=X"),
        (["plan", "--price", "h1000=2"], "--gpu is 'h1000'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_flag(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_roofline_by_hand() -> None:
    """Llama-3-8B: 7.5 billion weights in the layers and the head, and 128 KiB of KV for a token."""
    model, gpu = find_model("llama-3-8b"), find_gpu("h100")
    assert model.weights == pytest.approx(7.5e9, rel=0.01) and model.kv * 2 == 128 * 1024
    cost = cost_of(model, gpu, 1, "bf16")
    assert cost.weights == pytest.approx(2 * 7.5e9 / (3.35e12 * 0.8), rel=0.01)
    assert cost.per_token == pytest.approx(2 * 7.5e9 / (989e12 * 0.6), rel=0.01)
    four = cost_of(model, gpu, 4, "w4a16", "int4")
    assert four.weights == pytest.approx(cost.weights / 16) and four.per_context == pytest.approx(cost.per_context / 16)


def test_a_model_is_read_from_its_config(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    model = find_model(str(tmp_path))
    assert model.kv == 2 * 2 * 64 and model.weights == 2 * (4 * 64 * 64 + 3 * 64 * 128) + 6400
    (tmp_path / "config.json").write_text(json.dumps({**shape, "num_local_experts": 8}))
    assert main(["simulate", "--model", str(tmp_path)]) == 2
