"""A weft server as a process of its own, for the benchmarks that drive it from outside."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from weft.bench.client import fetch
from weft.bench.wire import Address, WireError

READY_SECONDS = 600.0  # three servers may load at once, beside others
STOP_SECONDS = 45.0
POLL_SECONDS = 0.02
METRIC = re.compile(r"^(?:vllm:|weft:|weft_)?(\w+?)(?:\{(.*)\})? ([0-9.eE+-]+)$", re.MULTILINE)


class ServerError(RuntimeError):
    """The server did not start, or ended by itself."""


class Server:
    """`weft serve ARGUMENTS` on a free port of 127.0.0.1. started: time.perf_counter() just before its exec."""

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        self.address = Address("127.0.0.1", free_port(), tls=False, base="")
        self._log = tempfile.NamedTemporaryFile("w+", prefix="weft-serve-", suffix=".log")  # noqa: SIM115
        command = [sys.executable, "-m", "weft", "serve", *arguments, "--port", str(self.address.port)]
        self.started = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """All that the server has printed."""
        return Path(self._log.name).read_text()

    def check_alive(self) -> None:
        """Raise ServerError with the server's last words when it has ended."""
        if self._process.poll() is not None:
            words = "\n".join(self.log.strip().splitlines()[-10:])
            raise ServerError(f"weft serve ended with {self._process.returncode}:\n{words}")

    async def wait_ready(self) -> None:
        """Until /health/ready says so. Raises ServerError."""
        while time.perf_counter() - self.started < READY_SECONDS:
            self.check_alive()
            try:
                status, _ = await fetch(self.address, "/health/ready")
            except (OSError, WireError):
                status = 0
            if status == 200:
                return
            await asyncio.sleep(POLL_SECONDS)
        raise ServerError(f"weft serve was not ready after {READY_SECONDS:g} s:\n{self.log}")

    async def metrics(self) -> dict[str, float]:
        """Every sample of /metrics without its prefix, such as num_requests_running and kv_blocks.held."""
        _, body = await fetch(self.address, "/metrics")
        found: dict[str, float] = {}
        for name, labels, value in METRIC.findall(body.decode()):
            state = re.search(r'state="(\w+)"', labels)
            key = f"{name}.{state[1]}" if state else name
            found[key] = found.get(key, 0.0) + float(value)
        return found

    def stop(self) -> int:
        """End it as an operator would, by SIGTERM; its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._log.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
