"""Servers as users start them: `weft serve` in a process of its own, one for all tests that want the same."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

READY_SECONDS = 120.0


@pytest.fixture(scope="session")
def served() -> Callable[..., AbstractContextManager[str]]:
    """Starts a server with the flags given, for a `with` block; its value is the address."""
    return serve


@contextmanager
def serve(*flags: str) -> Iterator[str]:
    """The address of a server that was started with these flags; it must end well when it is told to."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "weft", "serve", *flags, "--port", str(port)], stdout=log, stderr=log
        )
        try:
            end = time.monotonic() + READY_SECONDS
            while not _ready(url):
                words = Path(log.name).read_text()
                assert process.poll() is None and time.monotonic() < end, words
                time.sleep(0.05)
            yield url
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, Path(log.name).read_text()
        finally:
            process.kill()
            process.wait()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="session")
def simulated() -> Iterator[str]:
    """A server on the simulated device."""
    with serve("--device", "simulated", "--log-level", "warning") as url:
        yield url


@pytest.fixture(scope="session")
def builtin() -> Iterator[str]:
    """A server of the built-in model on this CPU, under two names."""
    with serve("--served-model-name", "builtin", "--served-model-name", "gpt-like", "--log-level", "warning") as url:
        yield url
