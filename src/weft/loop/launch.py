"""Starts the engine process, and ends it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from weft.config import EngineConfig
from weft.errors import DeviceError
from weft.ipc.channel import make_folder

WORKER = (sys.executable, "-m", "weft.loop.worker")
# Seconds that an engine process gets to end by itself.
END_SECONDS = 10.0


class Orders(msgspec.Struct, frozen=True):
    """The first line of the engine process's standard input. The rest stays open: it ends when the parent does."""

    config: EngineConfig
    folder: str
    log_level: str


@dataclass(frozen=True, slots=True)
class Launched:
    """An engine process and the folder of the sockets to it. started: time.monotonic() just before it was."""

    process: subprocess.Popen[bytes]
    folder: Path
    started: float

    def wait(self) -> str:
        """Wait for its end; how it ended, in words."""
        return ending(self.process.wait())

    def end(self, seconds: float = END_SECONDS) -> None:
        """Let it end by itself, which it does when its standard input closes, or else kill it; remove the folder."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def launch(config: EngineConfig, *, log_level: str = "warning", command: Sequence[str] = WORKER) -> Launched:
    """Start an engine process. Returns at once; EngineClient hears what becomes of it.

    Raises ConfigError for an unusable temporary folder, DeviceError when there can be no process.
    """
    folder = make_folder()
    started = time.monotonic()
    try:
        # Its standard output is this process's standard error: only this one speaks on standard output. Without a
        # buffer, what could not be written does not come up again when the input is closed.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, bufsize=0)
    except OSError as error:
        shutil.rmtree(folder)
        raise DeviceError(f"the engine process cannot be started: {error}") from error
    orders = msgspec.json.encode(Orders(config, os.fspath(folder), log_level)) + b"\n"
    with contextlib.suppress(BrokenPipeError):  # it has ended already, which whoever waits for it will see
        if process.stdin is not None:
            process.stdin.write(orders)
    return Launched(process, folder, started)


def ending(code: int) -> str:
    """How a process with this exit code of subprocess's ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (which the system does when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
