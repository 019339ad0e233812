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
from dataclasses import dataclass
from pathlib import Path

import pytest

READY_SECONDS = 120.0


@dataclass
class Server:
    """A server, its address, and where it writes its words."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path


@pytest.fixture(scope="session")
def started() -> Callable[..., AbstractContextManager[Server]]:
    """Starts a server with a file for its words and the flags given, for a `with` block, after which it is killed if it
    has not ended."""
    return start


@pytest.fixture(scope="session")
def served() -> Callable[..., AbstractContextManager[str]]:
    """Starts a server with the flags given, for a `with` block; its value is the address."""
    return serve


@contextmanager
def start(log: Path, *flags: str) -> Iterator[Server]:
    """A server that was started with these flags, once it is ready."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    with log.open("w") as words:
        command = [sys.executable, "-m", "weft", "serve", *flags, "--port", str(port)]
        process = subprocess.Popen(command, stdout=words, stderr=words)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        end = time.monotonic() + READY_SECONDS
        while not _ready(server.url):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()


@contextmanager
def serve(*flags: str) -> Iterator[str]:
    """The address of a server that was started with these flags; it must end well when it is told to."""
    with tempfile.TemporaryDirectory() as folder, start(Path(folder) / "log", *flags) as server:
        yield server.url
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0, server.log.read_text()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@dataclass
class Alone:
    """What one rank of the built-in model answers with these flags: `length` tokens to each prompt, greedy; and to the
    last one drawn with a seed, and the scores of its tokens."""

    flags: tuple[str, ...]
    prompts: list[tuple[int, ...]]
    length: int
    greedy: list[list[int]]
    drawn: list[int]
    scores: list[float]

    def body(self) -> dict[str, object]:
        """What to post to /v1/completions for the greedy answers."""
        settings = {"max_tokens": self.length, "temperature": 0, "ignore_eos": True, "stream": False}
        return {"prompt": self.prompts, "return_token_ids": True, **settings}


@pytest.fixture(scope="session")
def alone() -> Alone:
    from weft.config import EngineConfig
    from weft.core.request import PromptScores, Request, TokenOutput
    from weft.core.sampling import SamplingParams
    from weft.loop.build import open_engine

    settings = {"num_blocks": 200, "max_model_len": 512, "max_num_batched_tokens": 128, "dtype": "float32"}
    prompts, length = [tuple(range(5 + number, 60 + 40 * number)) for number in range(3)], 20
    engine, _ = open_engine(EngineConfig(**settings), lambda phase: None)  # type: ignore[arg-type]
    try:
        for number, prompt in enumerate(prompts):
            engine.submit(Request(str(number), prompt, SamplingParams(length, temperature=0.0, ignore_eos=True)))
        draw = SamplingParams(length, temperature=0.8, top_p=0.9, seed=7, ignore_eos=True, prompt_logprobs=1)
        engine.submit(Request("drawn", prompts[-1], draw))
        tokens: dict[str, list[int]] = {}
        scores: list[float] = []
        while not engine.idle:
            for event in engine.step(10.0):
                if isinstance(event, TokenOutput) and event.token is not None:
                    tokens.setdefault(event.request, []).append(event.token)
                elif isinstance(event, PromptScores):
                    scores = [score.logprob for score in event.scores]
    finally:
        engine.close()
    flags = tuple(word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value)))
    greedy = [tokens[str(number)] for number in range(len(prompts))]
    return Alone(flags, prompts, length, greedy, tokens["drawn"], scores)


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
