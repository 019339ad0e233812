"""Starting and ending a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from weft.config import EngineConfig
from weft.errors import DeviceError
from weft.loop.launch import ending, launch

# Says what it was told, then does as its argument says.
CHILD = """
import json, sys, time
orders = json.loads(sys.stdin.readline())
open(orders["folder"] + "/orders", "w").write(json.dumps(orders))
if sys.argv[1] == "obeys":
    sys.stdin.read()
else:
    time.sleep(600)
"""


class Ended(subprocess.Popen[bytes]):
    """A process that nobody can tell anything, since it has ended."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)


def until(path: Path) -> str:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


@pytest.mark.parametrize("manner", ["obeys", "ignores"])
def test_the_process_is_told_its_orders_and_ends_when_it_is_told_to_or_is_killed(manner: str) -> None:
    config = EngineConfig(model="some/model", cores="0-1", num_blocks=7, seed=2**63)
    launched = launch(config, log_level="debug", command=(sys.executable, "-c", CHILD, manner))
    orders = json.loads(until(launched.folder / "orders"))
    assert (orders["folder"], orders["log_level"]) == (str(launched.folder), "debug")
    assert EngineConfig(**orders["config"]) == config
    launched.end(5.0 if manner == "obeys" else 0.1)
    assert launched.wait() == ("ended with exit code 0" if manner == "obeys" else ending(-9))
    assert not launched.folder.exists()
    launched.end()


def test_a_process_that_cannot_be_started_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(DeviceError, match="cannot be started"):
        launch(EngineConfig(), command=(str(tmp_path / "missing"),))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [1, 2**20])  # less and more than what a buffer holds
def test_a_process_that_ends_before_it_is_told_anything_is_no_error_yet(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", Ended)
    launched = launch(EngineConfig(model="x" * length), command=("true",))
    assert launched.wait() == "ended with exit code 0"
    launched.end()
    assert not launched.folder.exists()


def test_endings_in_words() -> None:
    assert ending(0) == "ended with exit code 0"
    assert ending(3) == "ended with exit code 3"
    assert ending(-11) == "was killed by SIGSEGV"
    assert ending(-9) == "was killed by SIGKILL (which the system does when memory runs out)"
    assert ending(-77) == "was killed by signal 77"
