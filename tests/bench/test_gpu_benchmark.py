"""The benchmark of a GPU, interpreted on a tiny shape: every kind of row, and what becomes of a run that goes wrong."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weft.devices.cuda_streams import open_gpu

FOLDER = Path(__file__).parents[2] / "benchmarks"
CLAIMS = {
    "decode_of_bandwidth",
    "prefill_of_matmul_peak",
    "attention_decode_of_bandwidth",
    "host_gap_percent",
    "throughput_vs_transformers",
    "w4a8kv4_vs_bf16_throughput",
}
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, and the interpreter is off"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of the interpreter
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield importlib.import_module("gpu")
    torch.set_num_threads(threads)


def results(gpu: Any, path: Path, planned: list[str], sizes: Any, commit: str = "1" * 40) -> Any:
    module = importlib.import_module("gpu_results")
    about = {"device": "some GPU", "commit": commit, "quick": False}
    arguments = argparse.Namespace(json=path, quick=False)
    return module.Results(arguments, planned, about, lambda rows: gpu.claims(rows, sizes))


def open_bench() -> Any:
    sizes = importlib.import_module("gpu_model").TINY
    return importlib.import_module("gpu_bench").Bench(open_gpu(), sizes, 1.0)


def test_a_killed_run_leaves_its_rows_and_goes_on(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All kinds of rows, and all claims."""
    out = tmp_path / "gpu.json"
    arguments = ["--dry-run", "--quick", "--json", str(out), "--commit", "abc"]
    process = subprocess.Popen([sys.executable, str(FOLDER / "gpu.py"), *arguments], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not out.exists() or len(json.loads(out.read_text())["rows"]) < 4:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = json.loads(out.read_text())
    names = [row["name"] for row in killed["rows"]]
    assert names[:4] == ["copy", "product BF16", "product INT8", "attention bf16, 3 at 40"]
    assert "BF16 decode, 1 at 20" in killed["missing"] and set(killed["claims"]) == {"attention_decode_of_bandwidth"}

    monkeypatch.setattr("sys.argv", ["gpu.py", *arguments, "--resume"])
    gpu.main()
    whole = json.loads(out.read_text())
    assert whole["missing"] == [] and not any("error" in row for row in whole["rows"])
    assert whole["rows"][: len(names)] == killed["rows"]
    assert [row["name"] for row in whole["rows"]] == names + killed["missing"]
    assert set(whole["claims"]) == CLAIMS
    assert (whole["commit"], whole["device"]) == ("abc", "interpreted on this CPU")
    rows = {row["name"]: row for row in whole["rows"]}
    decode = rows["BF16 decode, 3 at 20"]
    assert decode["tokens_per_second"] == pytest.approx(3 / decode["seconds"]["median"])
    assert decode["host_gap"] == pytest.approx(decode["seconds"]["median"] / decode["device_seconds"] - 1)  # one round
    assert decode["of_limit"] == pytest.approx(decode["limit_seconds"] / decode["seconds"]["median"])
    assert decode["transformers_difference"] < 0.1 and decode["gpu"] == {} and whole["machine"]["cuda"] is None
    assert decode["times_transformers"] > 0 and "times_transformers" not in rows["W4A8KV4 decode, as many as fit at 40"]
    # Linear layers: q, k, v, o, gate, up, down and the output layer, two bytes a weight.
    linears = 128 * (128 + 32 + 32 + 128 + 3 * 128 + 128)
    kv = 3 * 20 * 2 * 32 * 2
    assert decode["bytes"] == 2 * linears + kv
    assert decode["operations"] == 3 * 2 * linears + 4 * 4 * 32 * 3 * 20
    printed = capsys.readouterr().out
    assert all(f"{name} = " in printed for name in CLAIMS) and "MISSING" not in printed


def test_the_whole_run_has_every_row_of_the_issue(gpu: Any) -> None:
    sizes = importlib.import_module("gpu_model").REAL
    rows = list(gpu._rows(sizes, claims_only=False))
    for name in ("BF16", "W4A16", "W4A8KV4"):
        wanted = {f"{name} prefill, {tokens}" for tokens in (512, 4096, 16384)}
        wanted |= {f"{name} decode, {b} at {c}" for b in (1, 8, 64, 256) for c in (1024, 8192)}
        assert wanted <= set(rows)
    quick = list(gpu._rows(sizes, claims_only=True))
    assert [name for name in rows if name in quick] == quick  # what claims need comes first
    assert max(map(rows.index, quick)) < rows.index("BF16 decode, 8 at 1024")
    assert rows[len(quick) :][:6] == [
        "attention int4, 64 at 8192",
        "profile of W4A8KV4 decode, as many as fit at 8192",
        "profile of BF16 decode, 64 at 1024",
        "profile of BF16 decode, 1 at 1024",
        "BF16 batch-invariant decode, 64 at 1024",
        "BF16 decode, 64 at 1024, one joins every 4 steps",
    ]


def test_four_bits_with_sixteen_bit_activations(gpu: Any) -> None:
    bench, rows = open_bench(), importlib.import_module("gpu_rows")
    bench.limits = {"copy": 1e12, "bf16": 1e15, "int8": 2e15}
    row = rows.prefill_row(bench, "W4A16", 3)
    # Half a byte a weight, and a scale of two bytes for 128 of them.
    linears = 128 * (128 + 32 + 32 + 128 + 3 * 128 + 128)
    assert row["bytes"] == linears // 2 + 2 * linears // 128 + 3 * 2 * 32 * 2
    assert row["limit_seconds"] == max(row["bytes"] / 1e12, row["operations"] / 1e15)
    assert bench.model("W4A8KV4").weights is bench.model("W4A16").weights


def test_rows_that_fail_say_why_and_the_others_go_on(gpu: Any, tmp_path: Path) -> None:
    model = importlib.import_module("gpu_model")

    def no_memory(bench: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def too_large(bench: Any) -> Any:
        raise model.DoesNotFit("its keys and values take 64.0 GiB, and 50.0 are free for them")

    rows = {
        "copy": lambda bench: {"rate": 3e12},
        "one": no_memory,
        "two": too_large,
        "three": lambda bench: {"rate": 1.0},
    }
    found = results(gpu, tmp_path / "out.json", list(rows), model.REAL)
    bench = SimpleNamespace(gpu=SimpleNamespace(device=torch.device("cpu")), budget=1.0, limits={})
    gpu._measure(bench, rows, found, rows, time.monotonic() + 60)
    content = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert content["one"]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert content["two"]["skipped"].startswith("its keys and values take 64.0 GiB")
    assert content["three"]["rate"] == 1.0 and bench.limits == {"copy": 3e12}
    assert found.failed() == ["one"] and found.missing() == []


def test_no_row_begins_when_the_time_is_over(gpu: Any, tmp_path: Path) -> None:
    sizes = importlib.import_module("gpu_model").REAL
    found = results(gpu, tmp_path / "out.json", ["one"], sizes)
    bench = SimpleNamespace(budget=5.0, limits={})
    gpu._measure(bench, {"one": lambda bench: {"rate": 1.0}}, found, ["one"], time.monotonic() + 4)
    assert found.missing() == ["one"]


def test_a_row_that_takes_too_long_ends_the_run(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    statuses: list[int] = []
    monkeypatch.setattr(gpu.os, "_exit", lambda status: (statuses.append(status), ended.set()))
    with gpu._ended(0.05):
        assert ended.wait(10.0) and statuses == [3]
    with gpu._ended(0.05):
        pass
    assert not ended.clear() and not ended.wait(0.1) and statuses == [3]


def test_a_steps_time_on_the_device_is_that_of_one_which_waited_there(gpu: Any) -> None:
    """Behind a hold: the first step was computed ahead, and has nothing to do with it."""
    plan, rows = importlib.import_module("weft.core.plan"), importlib.import_module("gpu_rows")
    done: list[str] = []
    seconds = {2: 9.0, 3: 0.25}

    def poll(timeout: float) -> list[Any]:
        number = len(done)
        ticket, sampled = plan.Ticket(number, plan.Lane.MIXED), (plan.Sampled(0, 5, None),)
        return [plan.Result(ticket, sampled, seconds=seconds[number])]

    device = SimpleNamespace(submit=lambda given: done.append(f"step {given.step}"), poll=poll)
    decoding = rows.Decoding(device, 2, 1, 3, lambda: done.append("hold"))
    assert decoding.alone() == 0.25 and done == ["hold", "step 1", "step 2"]


def test_a_lost_device_ends_the_run_with_what_there_is(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = importlib.import_module("gpu_model")

    def stuck(bench: Any) -> Any:
        raise model.Stuck("a step gave no result within 120 s")

    found = results(gpu, tmp_path / "out.json", ["one", "two"], model.REAL)
    monkeypatch.setattr(gpu.os, "_exit", sys.exit)  # which waits for threads that a lost device keeps
    bench, rows = SimpleNamespace(budget=1.0, limits={}), {"one": stuck, "two": stuck}
    with pytest.raises(SystemExit) as ended:
        gpu._measure(bench, rows, found, rows, time.monotonic() + 60)
    assert ended.value.code == 3 and "--resume goes on" in capsys.readouterr().err
    content = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in content["rows"]] == ["one"] and content["missing"] == ["two"]


def test_what_another_device_measured_is_not_gone_on_with(gpu: Any, tmp_path: Path) -> None:
    sizes = importlib.import_module("gpu_model").REAL
    found = results(gpu, tmp_path / "out.json", ["one"], sizes)
    found.add("one", {"rate": 1.0})
    content = json.loads((tmp_path / "out.json").read_text())
    (tmp_path / "out.json").write_text(json.dumps({**content, "device": "another GPU"}))
    with pytest.raises(ValueError, match="device = 'another GPU', and now it is 'some GPU'"):
        results(gpu, tmp_path / "out.json", ["one"], sizes).resume()


def test_a_changed_commit_goes_on_with_what_there_is(gpu: Any, tmp_path: Path) -> None:
    """Rows of other commits, of other plans and of no interest now stay; those that failed have another try."""
    sizes, out, names = (
        importlib.import_module("gpu_model").REAL,
        tmp_path / "out.json",
        ["copy", "one", "two", "three"],
    )
    found = results(gpu, out, [*names, "gone"], sizes)
    found.add("gone", {"rate": 4.0})
    found.add("copy", {"rate": 3.0})
    found.add("one", {"error": "OutOfMemoryError"})
    found.add("two", {"rate": 2.0})
    found = results(gpu, out, names, sizes, "2" * 40)
    found.resume()
    assert found.todo(names, ()) == ["three", "one"]
    assert found.todo(names, {"two"}) == ["two", "three", "one"]
    assert found.todo(["copy", "two"], ()) == []
    assert found.older() == ["gone", "copy", "one", "two"]
    bench = SimpleNamespace(gpu=SimpleNamespace(device=torch.device("cpu")), budget=1.0, limits={})
    seen: list[dict[str, float]] = []

    def measure(bench: Any) -> Any:
        seen.append(dict(bench.limits))
        return {"rate": 5.0}

    gpu._measure(bench, dict.fromkeys(names, measure), found, ["two"], time.monotonic() + 60)
    content = json.loads(out.read_text())
    assert seen == [{"copy": 3.0}] and content["missing"] == ["three"]
    assert {row["name"]: row.get("rate") for row in content["rows"]} == {
        "gone": 4.0,
        "copy": 3.0,
        "one": None,
        "two": 5.0,
    }
    assert [row["commit"][0] for row in content["rows"]] == ["1", "1", "1", "2"]


def test_without_transformers_rows_say_so(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    bench, rows = open_bench(), importlib.import_module("gpu_rows")
    row = rows.decode_row(bench, "BF16", 1, 20)
    assert row["transformers"].startswith("ModuleNotFoundError") and row["seconds"]["median"] > 0
    assert row["limit"] == "not measured" and "of_limit" not in row


def test_a_peer_that_fails_on_the_way_is_left_out(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, peer, rows = open_bench(), importlib.import_module("gpu_peer"), importlib.import_module("gpu_rows")

    def no_memory(self: Any, count: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(peer.Decoding, "steps", no_memory)
    row = rows.decode_row(bench, "BF16", 1, 20)
    assert row["transformers"] == "OutOfMemoryError: CUDA out of memory." and row["seconds"]["median"] > 0


def test_a_peer_that_computes_another_model_is_left_out(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, peer = open_bench(), importlib.import_module("gpu_peer")
    plain = bench.model("BF16")
    state = peer._state(plain)
    wrong = {**state, "model.layers.0.mlp.gate_proj.weight": torch.randn_like(state["lm_head.weight"])}
    wrong["lm_head.weight"] = state["lm_head.weight"].roll(1, 0)
    monkeypatch.setattr(peer, "_state", lambda model: wrong)
    assert "it computes another model" in bench.peer(plain)


def test_what_does_not_fit_names_what_would(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = open_bench()
    model, rows = (importlib.import_module(name) for name in ("gpu_model", "gpu_rows"))
    plain = bench.model("BF16")
    slots = 32  # of one sequence at 20 tokens and half the room, in whole blocks
    monkeypatch.setattr(bench.gpu, "memory", lambda: (2 * slots * plain.token_bytes, 10**9))
    with pytest.raises(model.DoesNotFit, match="2 sequences would fit"):
        rows.decode_row(bench, "BF16", 4, 20)


def test_a_profile_says_where_the_time_went(gpu: Any) -> None:
    bench, rows = open_bench(), importlib.import_module("gpu_rows")
    row = rows.profile_row(bench, "W4A8KV4", None, 20)
    assert (row["batch"], row["steps"]) == (2, 4)
    assert (
        gpu._words(row) == "0.000 ms in kernels, 0.000 ms between them"
    )  # the lane's threads have no device's kernels
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        torch.ones(300, 300) @ torch.ones(300, 300)
    ((start, end, _),) = [one for one in rows.spans_of(seen, rows.DeviceType.CPU) if one[2] == "aten::mm"]
    assert 1e-6 < end - start < 10
    spans = [(0.0, 1.0, "a"), (1.5, 2.0, "b"), (1.6, 1.8, "a"), (5.0, 6.0, "a")]
    found = rows.account(reversed(spans))
    assert found["busy_seconds"] == pytest.approx(2.7) and found["gap_seconds"] == pytest.approx(3.5)
    assert [(one["name"], one["calls"]) for one in found["kernels"]] == [("a", 3), ("b", 1)]
    assert found["longest_gaps"][0] == {"seconds": 3.0, "after": "b", "before": "a"}
    assert rows.account([])["gap_seconds"] == 0.0


def test_decode_with_newcomers_and_with_products_of_its_own(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, rows = open_bench(), importlib.import_module("gpu_rows")
    plans: list[Any] = []
    answer = rows.answer
    monkeypatch.setattr(rows, "answer", lambda device, plan: (plans.append(plan), answer(device, plan))[1])
    row = rows.joining_row(bench, "BF16", 3, 20)
    assert row["newcomer"] == 5 and row["seconds"]["median"] > 0
    for number, plan in enumerate(plans):
        lengths = [len(piece.tokens) for piece in plan.slices]
        assert sorted(lengths) == ([1, 1, 5] if number % 4 == 0 else [1, 1, 1])
        assert all(piece.start == 0 for piece in plan.slices if len(piece.tokens) == 5)
    joined = sum(number % 4 == 0 for number in range(len(plans)))  # the first of them before any step
    assert len({piece.sequence for plan in plans for piece in plan.slices}) == 3 - 1 + joined
    row = rows.decode_row(bench, "BF16 batch-invariant", 2, 20)
    assert row["seconds"]["median"] > 0 and "transformers" not in row and "times_transformers" not in row
    assert bench.model("BF16 batch-invariant").weights is bench.model("BF16").weights


def test_what_the_device_says_of_its_clocks(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = importlib.import_module("gpu_state")
    assert state.gpu_state(torch.device("cpu")) == {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="12-34"))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = state.gpu_state(torch.device("cuda", 0))
    assert len(found) == 2 and set(found.values()) == {"FileNotFoundError"}
    tool = tmp_path / "nvidia-smi"
    answer = "580.1, P0, 1980, 3201, 1980, 512.30, 700.00, 51"
    tool.write_text(f'#!/bin/sh\ncase "$*" in *GPU-12-34*driver*) echo "{answer}";; *) exit 2; esac\n')
    tool.chmod(0o755)
    found = state.gpu_state(torch.device("cuda", 0))
    assert (found["driver_version"], found["clocks.sm"], found["temperature.gpu"]) == ("580.1", "1980", "51")
    assert found["no clocks_event_reasons.active"] == "CalledProcessError"
