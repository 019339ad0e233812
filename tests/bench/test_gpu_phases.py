"""gpu_phases.py as far as a machine without a GPU runs it: every row comes out, and is in the file at every moment."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from weft.core.plan import Capacity, Partition
from weft.devices.cost import CostModel
from weft.devices.simulated import Faults, SimulatedDevice
from weft.phases.observations import Targets

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_phases.py"


def run(*arguments: str, interpret: bool) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    return done.stdout


def test_all_rows_come_out_interpreted(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "out.json"
    printed = run("--quick", "--json", str(file), interpret=True)
    content = json.loads(file.read_text())
    rows = content["rows"]
    assert "nothing is divided" in printed and "not finished" not in content["notes"]
    assert content["claims"] == {}, "an interpreter shows nothing"
    curves = {(row["what"], row["share"]) for row in rows if row["part"] == "curves"}
    assert len(curves) == 2 * 3
    assert len([row for row in rows if row["part"] == "beside"]) == 2 * 6
    (recorded,) = [row for row in rows if row["what"] == "decode graph on a new share"]
    assert (recorded["part"], recorded["share"]) == ("parts", 4) and recorded["seconds"] > 0 and "bytes" in recorded
    served = {row["what"]: row for row in rows if row["part"] == "serving"}
    assert {"one request alone", "chunk 4", "split 4:4", "overlap", "auto"} <= served.keys()
    assert all(0 <= row["met"] <= row["requests"] for row in served.values() if "met" in row)
    assert max(row["met"] for row in served.values() if "met" in row) > 0
    assert all(row["alone"] > 0 and row["beside"] > 0 for row in rows if row["part"] == "beside")


@pytest.mark.parametrize("failing", [True, False])
def test_a_graph_that_is_not_recorded_leaves_a_row_that_says_why(
    monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    serving = importlib.import_module("gpu_phases_serving")
    gpu = SimpleNamespace(memory=lambda: (1000, 2000))
    faults = Faults(failed=frozenset({3} if failing else ()))
    device = SimulatedDevice(Capacity(256, 16, 64, 16, 8, 256, 97), Partition(8, 8), faults=faults)
    try:
        row = serving.recording(gpu, device)
    finally:
        device.close()
    wanted = "step 3 failed: simulated fault" if failing else "nothing was recorded anew"
    assert row == {"part": "parts", "what": "decode graph on a new share", "share": 4, "error": wanted}


def test_who_comes_last_has_as_long_as_his_targets_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody is within them on a device that is fast enough; nobody is where he would have been too late anyway."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    serving = importlib.import_module("gpu_phases_serving")
    traffic = serving.Traffic(inputs=8, outputs=8, seconds=0.3, chunks=(16,), most_tokens=64, seats=16)
    capacity = Capacity(256, 16, 64, 16, 8, 256, 97)
    for tpot, served in ((1.0, True), (1e-4, False)):
        targets = Targets(1.0, tpot)
        for name, controller in serving.contestants(capacity, targets, traffic).items():
            shots = [
                shot for shot in serving.load(traffic, 50.0, capacity, seed=1) if shot.request.params.max_tokens > 1
            ]
            device = SimulatedDevice(capacity, Partition(8, 8), cost=CostModel(fixed=0.01))
            try:
                found = serving.outcome(device, controller, shots, traffic, targets)
            finally:
                device.close()
            assert max(shot.due + 0.01 * shot.request.params.max_tokens for shot in shots) > traffic.seconds
            assert found["requests"] == len(shots) > 5, name
            assert found["met"] == (len(shots) if served else 0), name


def test_a_run_that_has_no_time_leaves_what_it_has(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "out.json"
    run("--minutes", "0", "--json", str(file), interpret=True)
    content = json.loads(file.read_text())
    assert len(content["rows"]) == 1 and "before the end" in content["notes"][-1]


def test_without_a_gpu_it_says_so() -> None:
    pytest.importorskip("triton")
    assert "nothing measured: --device is cuda" in run("--quick", interpret=False)
