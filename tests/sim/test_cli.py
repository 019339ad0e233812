"""`weft simulate` and `weft plan`: what they print and write, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from weft.cli import main
from weft.config import EngineConfig
from weft.errors import ConfigError
from weft.sim.estimate import cost_of, setup_of
from weft.sim.hardware import find_gpu
from weft.sim.models import find_model

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


@pytest.mark.parametrize("partition", ["off", "1:1", "turns:1:1", "auto", "paper"])
def test_every_partition_is_measured_against_targets(partition: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--partition", partition, *LOAD, *TARGETS]) == 0
    assert "TTFT 0.5 s, TPOT 0.05 s" in capsys.readouterr().out


def test_the_plan_names_the_cheapest_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    prices = ["--price", "h100=3", "--price", "a100-80=1.5", "--tp", "1", "--partitions", "off"]
    assert main(["plan", *prices[:-1], "turns:1:1", "--rate", "2", *LOAD, *TARGETS]) == 0
    assert "--partition turns:1:1, " in capsys.readouterr().out
    assert main(["plan", *prices, "--rate", "30", *LOAD, *TARGETS, "--json", str(out)]) == 0
    words = capsys.readouterr().out
    assert "cheapest (simulated): " in words
    content = json.loads(out.read_text())
    best, other = content["verdicts"]
    assert best["replicas"] and (other["price"] is None or other["price"] >= best["price"]) and other["reason"]
    other = ["--price", "l40s=1", "--tp", "1", "--partitions", "off", "--slo-ttft", "5"]
    assert main(["plan", *other, "--rate", "2", *LOAD]) == 0
    assert "is uncalibrated" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", *prices, "--rate", "30", *LOAD, "--slo-ttft", "0.001"]) == 1
    assert "no configuration meets the targets" in capsys.readouterr().out


def test_a_plan_may_weave_where_there_are_ranks_to_join(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    flags = ["plan", "--price", "a100-80=1", "--tp", "1", "4", "--partitions", "off", "--weave", "--rate", "2", *LOAD]
    assert main([*flags, *TARGETS, "--json", str(out)]) == 0
    names = {row["candidate"] for row in json.loads(out.read_text())["verdicts"]}
    assert names == {"1 x a100-80, bf16, --partition off", "4 x a100-80, bf16, woven, --partition off"}


def test_a_plan_takes_the_gpu_of_the_file_whatever_its_name(tmp_path: Path) -> None:
    """Fitted on an H100, such a file has the name of the GPU whose constants it took."""
    mine, out = tmp_path / "a=b.json", tmp_path / "plan.json"
    gpu = asdict(find_gpu("h100"))
    mine.write_text(json.dumps(gpu | {"host": {"step": 0.01, "sequence": 0.0}}))
    flags = ["plan", "--price", "h100=3", "--price", f"{mine}=2", "--tp", "1", "--partitions", "off", "--rate", "2"]
    assert main([*flags, *LOAD, *TARGETS, "--json", str(out)]) == 0
    rows = {row["candidate"]: row for row in json.loads(out.read_text())["verdicts"]}
    assert set(rows) == {"1 x h100, bf16, --partition off", f"1 x {mine}, bf16, --partition off"}
    tpot = rows[f"1 x {mine}, bf16, --partition off"]["totals"]["tpot"]["p50"]
    assert tpot > 0.015, "more than ten milliseconds of the host in each step"


def test_everything_that_is_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--seconds", "-1", "--max-gpus", "0"]) == 2
    words = " ".join(capsys.readouterr().err.split())
    assert "--seconds is -1.0" in words and "there is no --price" in words and "--max-gpus is 0" in words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["simulate", "--gpu", "h1000"], "--gpu: no GPU is called 'h1000'; there are"),
        (["simulate", "--model", "nothing"], "--model: no model is called 'nothing'; there are"),
        (["simulate", "--model", "llama-3-70b"], "more ranks (--tp)"),
        (["simulate", "--rates", "0"], "--rates has 0; it must be between 1e-06 and 1e+06"),
        (["simulate", "--rates", "1e30"], "--rates has 1e+30; it must be between 1e-06 and 1e+06"),
        (["plan", "--rate", "1e30"], "--rate has 1e+30; it must be between 1e-06 and 1e+06"),
        (["simulate", "--burstiness", "1e-9"], "--burstiness is 1e-09; it must be between 0.01 and 10000"),
        (["simulate", "--seconds", "1e30"], "--seconds is 1e+30; it must be more than 0 and at most 1e+09"),
        (["simulate", "--replicas", "0"], "--replicas is 0; it must be at least 1"),
        (["simulate", "--replicas", "2", "--prefill-replicas", "2"], "--prefill-replicas is 2"),
        (["simulate", "--replicas", "2", "--prefill-replicas", "1", "--partition", "1:1"], "not go with --partition"),
        (["simulate", "--replicas", "2", "--prefill-replicas", "1", "--processes", "2"], "not go with --processes"),
        (["simulate", "--processes", "0"], "--processes is 0; it must be at least 1"),
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
        (["plan", "--price", "h1000=2"], "--price: no GPU is called 'h1000'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_flag(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_one_mistake_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--replicas", "0"]) == 2
    assert "--prefill-replicas" not in capsys.readouterr().err
    assert main(["simulate", "--prefill-replicas", "-1"]) == 2
    assert "--prefill-replicas is -1; it must be at least 0" in " ".join(capsys.readouterr().err.split())


def test_a_replica_has_the_kv_that_its_weights_leave_room_for() -> None:
    """Llama-3-8B: 8.03 billion weights of two bytes, and 128 KiB of KV for a token, in nine tenths of 85.5 GB."""
    config = EngineConfig(max_model_len=8192)
    one = setup_of(cost_of(find_model("llama-3-8b"), find_gpu("h100"), 1, "bf16"), config)
    assert one.capacity.blocks * 16 == pytest.approx((0.9 * 85.5e9 - 16.06e9) / 2**17, rel=0.01)
    four = setup_of(cost_of(find_model("llama-3-8b"), find_gpu("h100"), 1, "w4a8", "int4"), config)
    assert four.capacity.blocks > 3.7 * one.capacity.blocks
    with pytest.raises(ConfigError, match="llama-3-70b in bf16 on 1 x h100: weights of 141 GB"):
        setup_of(cost_of(find_model("llama-3-70b"), find_gpu("h100"), 1, "bf16"), config)
