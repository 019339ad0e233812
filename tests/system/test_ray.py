"""Ranks on two nodes of a real Ray cluster: they answer like one, an actor that is killed ends the server in words, and
nothing that was taken of Ray is left."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil
import pytest

from weft.config import EngineConfig
from weft.core.request import Request, TokenOutput
from weft.core.sampling import SamplingParams
from weft.loop.build import open_engine

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (the extra weft[ray])")

NODES = ("127.0.0.2", "127.0.0.3")
READY_SECONDS = 120.0
END_SECONDS = 30.0
PROMPTS = [list(range(5 + number, 60 + 40 * number)) for number in range(3)]
LENGTH = 20
SETTINGS = {"num_blocks": 200, "max_model_len": 512, "max_num_batched_tokens": 128, "dtype": "float32"}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@dataclass
class Cluster:
    """Two nodes, of one CPU each. idle: its processes when it does nothing."""

    address: str
    process: psutil.Process
    idle: set[psutil.Process]

    def busy(self) -> set[psutil.Process]:
        """The actors, and the processes of ranks below them."""
        return set(self.process.children(recursive=True)) - self.idle

    def actor(self, node: str) -> psutil.Process:
        """The actor on a node."""
        (found,) = (
            one
            for one in self.busy()
            if one.cmdline()[0].startswith("ray::RankActor") and f"--node_ip_address={node}" in one.parent().cmdline()
        )
        return found

    def settle(self) -> None:
        """Wait until it does nothing again."""
        end = time.monotonic() + END_SECONDS
        while left := self.busy():
            assert time.monotonic() < end, left
            time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="weft-ray-")  # a short one: sockets lie in it
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("ray_nodes.py")), *NODES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | quiet,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    seen: set[psutil.Process] = set()
    try:
        address = process.stdout.readline().strip()
        assert address, "the nodes did not start"
        itself = psutil.Process(process.pid)
        seen = set(itself.children(recursive=True))
        yield Cluster(address, itself, seen)
    finally:
        process.stdin.close()
        process.wait(END_SECONDS)
        process.stdout.close()
        _, left = psutil.wait_procs(seen, END_SECONDS)
        assert not left
        shutil.rmtree(folder)


@contextmanager
def serving(cluster: Cluster, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server with a rank on each node, and its address."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    command = [sys.executable, "-m", "weft", "serve", "-tp", "2", "--port", str(port), *FLAGS]
    command += ["--distributed-executor-backend", "ray", "--ray-address", cluster.address]
    with log.open("w") as words:
        process = subprocess.Popen(command, stdout=words, stderr=words)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + READY_SECONDS
        while not ready(url):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield process, url
    finally:
        process.kill()
        process.wait()


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def alone() -> list[list[int]]:
    """What one rank answers to PROMPTS."""
    engine, _ = open_engine(EngineConfig(**SETTINGS), lambda phase: None)  # type: ignore[arg-type]
    try:
        for number, prompt in enumerate(PROMPTS):
            engine.submit(Request(str(number), tuple(prompt), SamplingParams(LENGTH, temperature=0.0, ignore_eos=True)))
        tokens: list[list[int]] = [[] for _ in PROMPTS]
        while not engine.idle:
            for event in engine.step(10.0):
                if isinstance(event, TokenOutput) and event.token is not None:
                    tokens[int(event.request)].append(event.token)
        return tokens
    finally:
        engine.close()


def body(prompts: object, length: int, *, stream: bool) -> dict[str, object]:
    settings = {"max_tokens": length, "temperature": 0, "ignore_eos": True, "stream": stream}
    return {"prompt": prompts, "return_token_ids": True, **settings}


def test_ranks_of_two_nodes_answer_like_one(cluster: Cluster, tmp_path: Path) -> None:
    with serving(cluster, tmp_path / "log") as (process, url):
        ranks = [cluster.actor(node).children() for node in NODES]
        assert [len(one) for one in ranks] == [1, 1]
        reply = httpx.post(f"{url}/v1/completions", json=body(PROMPTS, LENGTH, stream=False), timeout=60)
        assert [choice["token_ids"] for choice in reply.json()["choices"]] == alone()
        process.send_signal(signal.SIGTERM)
        assert process.wait(END_SECONDS) == 0, (tmp_path / "log").read_text()
    cluster.settle()


def test_an_actor_that_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    """There is room for it only if the server before has given back its placement group."""
    answers = ["", "", "", ""]
    with serving(cluster, tmp_path / "log") as (process, url):

        def ask(number: int) -> None:
            """As a stream or not."""
            content = body([10 + number] * 30, 400, stream=number % 2 == 0)
            with (
                httpx.Client(timeout=60) as client,
                client.stream("POST", f"{url}/v1/completions", json=content) as reply,
            ):
                for part in reply.iter_text():
                    answers[number] += part

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(answers))]
        for thread in threads:
            thread.start()
        while not all(answers[::2]):  # the streams run
            time.sleep(0.01)
        cluster.actor(NODES[1]).kill()
        for thread in threads:
            thread.join(60)
        assert process.wait(END_SECONDS) == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    for words in (*answers, last):
        found = re.search(r"rank (\d) is out of reach: .* \(rank 0 on \S+, rank 1 on \S+\)", words)
        assert found is not None and f"rank {found[1]} on {NODES[1]}" in words, words
    assert all(answer.count('"error"') == 1 for answer in answers)
    cluster.settle()
