"""gpu_phases.py as far as a machine without a GPU runs it: every row comes out, and is in the file at every moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_phases.py"


def run(*arguments: str, interpret: bool) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
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
    served = {row["what"]: row for row in rows if row["part"] == "serving"}
    assert {"one request alone", "chunk 4", "split 4:4", "overlap", "auto"} <= served.keys()
    assert all(0 <= row["met"] <= row["requests"] for row in served.values() if "met" in row)
    assert max(row["met"] for row in served.values() if "met" in row) > 0
    assert all(row["alone"] > 0 and row["beside"] > 0 for row in rows if row["part"] == "beside")


def test_a_run_that_has_no_time_leaves_what_it_has(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "out.json"
    run("--minutes", "0", "--json", str(file), interpret=True)
    content = json.loads(file.read_text())
    assert len(content["rows"]) == 1 and "before the end" in content["notes"][-1]


def test_without_a_gpu_it_says_so() -> None:
    pytest.importorskip("triton")
    assert "nothing measured: --device is cuda" in run("--quick", interpret=False)
