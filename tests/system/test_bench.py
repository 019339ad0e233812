"""The measuring tools against a real server: a short soak, and `weft bench serve`."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("device", ["simulated", "cpu"])
def test_clients_that_hang_up_leave_nothing_behind(device: str, tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    command = [sys.executable, str(BENCHMARKS / "soak.py"), "--device", device, "--json", str(report)]
    run = subprocess.run(
        [*command, "--minutes", "0.08", "--clients", "24"], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stdout + run.stderr
    content = json.loads(report.read_text())
    claims, row = content["claims"], content["rows"][0]
    assert claims[f"{device}_errors"] == 0, row["errors"]
    assert claims[f"{device}_mismatches"] == 0
    assert claims[f"{device}_baseline_s"] is not None and math.isfinite(claims[f"{device}_baseline_s"])
    assert row["compared"] > 0 and all(count > 0 for count in row["requests"].values())
    assert device != "simulated" or claims["simulated_preemptions"] > 0


def test_bench_serve_measures_a_weft_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    serving = importlib.import_module("serving")
    report = tmp_path / "bench.json"
    with serving.Server(["--device", "simulated", "--log-level", "warning"]) as server:
        asyncio.run(server.wait_ready())
        flags = ["--url", f"http://{server.address.netloc}", "--json", str(report), "--ignore-eos"]
        flags += ["--num-prompts", "12", "--request-rate", "50", "--random-input-len", "20", "--random-output-len", "8"]
        run = subprocess.run(
            [sys.executable, "-m", "weft", "bench", "serve", *flags], capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stderr
        summary = json.loads(report.read_text())["summary"]
        assert (summary["completed"], summary["failed"], summary["output_tokens"]) == (12, 0, 96)
        assert summary["input_tokens"] == 12 * 20
        assert server.stop() == 0
