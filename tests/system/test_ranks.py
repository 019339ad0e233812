"""Several ranks as users start them: they answer like one, and a rank that ends or hangs ends the server in words."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from weft.config import EngineConfig
from weft.core.request import Request, TokenOutput
from weft.core.sampling import SamplingParams
from weft.loop.build import open_engine

READY_SECONDS = 120.0
PROMPTS = [tuple(range(5 + number, 60 + 40 * number)) for number in range(3)]
POOL = ("--num-blocks", "200", "--max-model-len", "512", "--max-num-batched-tokens", "128")
SETTINGS = {"num_blocks": 200, "max_model_len": 512, "max_num_batched_tokens": 128, "dtype": "float32"}
LENGTH = 20


@dataclass
class Server:
    """A server with ranks, its address and what it has written."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def rank(self, number: int) -> int:
        """The process of a rank: they are started in order, below the engine process."""
        (engine,) = children(self.process.pid)
        return sorted(children(engine))[number]


def children(parent: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@contextmanager
def ranked(log: Path, *flags: str) -> Iterator[Server]:
    """A server of the built-in model on two ranks."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    command = [sys.executable, "-m", "weft", "serve", "-tp", "2", *POOL, *flags, "--port", str(port)]
    with log.open("w") as words:
        process = subprocess.Popen(command, stdout=words, stderr=words)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        end = time.monotonic() + READY_SECONDS
        while not ready(server.url):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def greedy_of_one() -> list[list[int]]:
    """What one rank answers."""
    engine, _ = open_engine(EngineConfig(**SETTINGS), lambda phase: None)  # type: ignore[arg-type]
    try:
        for number, prompt in enumerate(PROMPTS):
            engine.submit(Request(str(number), prompt, SamplingParams(LENGTH, temperature=0.0, ignore_eos=True)))
        tokens: dict[str, list[int]] = {}
        while not engine.idle:
            for event in engine.step(10.0):
                if isinstance(event, TokenOutput):
                    tokens.setdefault(event.request, []).append(event.token)
        return [tokens[str(number)] for number in range(len(PROMPTS))]
    finally:
        engine.close()


def body(prompts: object, length: int, *, stream: bool) -> dict[str, object]:
    settings = {"max_tokens": length, "temperature": 0, "ignore_eos": True, "stream": stream}
    return {"prompt": prompts, "return_token_ids": True, **settings}


@dataclass
class Answer:
    """What a client was told, and when the answer ended."""

    text: str = ""
    ended: float = 0.0


def ask(server: Server, number: int, answers: list[Answer]) -> None:
    """A request that goes on for as long as it may, as a stream or not."""
    prompt = list(range(10 + number, 40 + number))
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{server.url}/v1/completions", json=body(prompt, 400, stream=number % 2 == 0)) as reply,
    ):
        for part in reply.iter_text():
            answers[number].text += part
    answers[number].ended = time.monotonic()


def lose(server: Server, rank: int, number: signal.Signals) -> tuple[float, list[Answer]]:
    """Send a signal to a rank under load: when, and how the requests ended. The signal is taken back at the end."""
    answers = [Answer() for _ in range(4)]
    threads = [threading.Thread(target=ask, args=(server, each, answers)) for each in range(4)]
    for thread in threads:
        thread.start()
    while not all(answers[each].text for each in (0, 2)):  # the streams run
        time.sleep(0.01)
    os.kill(server.rank(rank), number)
    when = time.monotonic()
    for thread in threads:
        thread.join(60)
    return when, answers


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_two_ranks_answer_like_one_until_one_is_lost(tmp_path: Path, number: signal.Signals) -> None:
    """Shared memory for the one that is killed; gloo, woven steps and two lanes for the one that hangs. Prompts come in
    chunks, and the second time from the prefix cache."""
    stops = number is signal.SIGSTOP
    flags = ["--dtype", "float32", "--rank-timeout", "2"]
    flags += ["--collective", "gloo", "--weave", "woven", "--partition", "100%:100%"] if stops else []
    with ranked(tmp_path / "log", *flags) as server:
        wanted = greedy_of_one()
        for _ in range(2):
            reply = httpx.post(f"{server.url}/v1/completions", json=body(PROMPTS, LENGTH, stream=False), timeout=60)
            assert reply.status_code == 200, reply.text
            assert [choice["token_ids"] for choice in reply.json()["choices"]] == wanted
        when, answers = lose(server, 1, number)
        for answer in answers:
            assert answer.text.count('"error"') == 1 and "rank 1" in answer.text, answer.text[-500:]
            assert answer.ended - when < (2 + 1 if stops else 0) + 5
        assert server.process.wait(10) == 1
        words = server.log.read_text()
    assert f"rank 1 {'did not come within 2 s' if stops else 'was killed by SIGKILL'}" in words.splitlines()[-1], words
