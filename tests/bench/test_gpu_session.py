"""tools/gpu_session.sh, with a stand-in for Python that says what it was asked for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools/gpu_session.sh"
STAND_IN = """#!/bin/sh
echo "$TRITON_INTERPRET $*" >> "$ASKED"
case "$*" in
*--resume*|*"-m pytest"*) exit 0;;
*) exit $STATUS;;
esac
"""


def run(folder: Path, *arguments: str, status: int = 0) -> tuple[int, list[str]]:
    """Its exit status, and what Python was asked for."""
    python, asked = folder / "python", folder / "asked"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    asked.unlink(missing_ok=True)
    environment = {"PYTHON": str(python), "OUT": str(folder / "out"), "ASKED": str(asked), "STATUS": str(status)}
    done = subprocess.run([SCRIPT, *arguments], env=os.environ | environment, capture_output=True, timeout=60)
    return done.returncode, asked.read_text().splitlines() if asked.exists() else []


def value(command: str, flag: str) -> int:
    return int(command.partition(flag)[2][1:].split()[0])


@pytest.mark.parametrize(("status", "calls"), [(0, 2), (1, 2), (3, 3), (139, 3)])
def test_the_first_command_measures_and_tests_in_time(tmp_path: Path, status: int, calls: int) -> None:
    """A process that was lost has another try."""
    code, asked = run(tmp_path, "first", "abc", status=status)
    assert len(asked) == calls and code == (1 if status == 1 else 0)
    rows, *_, tests = asked
    assert rows.startswith("0 benchmarks/gpu.py --json") and "--commit abc" in rows
    assert 325 <= value(rows, "--seconds") <= 330 and 500 <= value(tests, "--session-timeout") <= 545
    assert value(rows, "--seconds") + 20 + 25 + 200 <= 580
    assert (" --resume" in asked[1]) == (calls == 3)
    assert "tests/gpu --ignore" in tests and {path.name for path in (tmp_path / "out").iterdir()} == {
        "gpu.log",
        "tests.log",
    }


def test_the_others(tmp_path: Path) -> None:
    assert "--again one two" in run(tmp_path, "rows", "abc", "100", "one", "two")[1][0]
    assert run(tmp_path, "rows", "abc", "100")[1][0].endswith("--resume")
    code, (asked,) = run(tmp_path, "small", "50")
    assert "test_triton_norm.py" in asked and asked.endswith("-k not compiled") and "--session-timeout=50" in asked
    code, (asked,) = run(tmp_path, "tests", "50", "tests/gpu/test_seam.py")
    assert asked.endswith("--session-timeout=50 tests/gpu/test_seam.py")
    code, (asked,) = run(tmp_path, "script", "50", "gpu_phases.py", "--minutes", "2", status=1)
    assert code == 1 and asked.startswith("0 benchmarks/gpu_phases.py --json") and asked.endswith("--minutes 2")
    assert run(tmp_path, "second")[0] == 2
