"""Ranks on two nodes of a real Ray cluster: they answer like one, an actor that is killed ends the server in words, and
nothing that was taken of Ray is left."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.system.load import ask_until

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (the extra weft[ray])")

NODES = ("127.0.0.2", "127.0.0.3")
END_SECONDS = 30.0


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


def flags(cluster: Cluster, alone: Any) -> list[str]:
    """For a server with a rank on each node."""
    return ["-tp", "2", *alone.flags, "--distributed-executor-backend", "ray", "--ray-address", cluster.address]


def test_ranks_of_two_nodes_answer_like_one(cluster: Cluster, started: Any, alone: Any, tmp_path: Path) -> None:
    with started(tmp_path / "log", *flags(cluster, alone)) as server:
        ranks = [cluster.actor(node).children() for node in NODES]
        assert [len(one) for one in ranks] == [1, 1]
        reply = httpx.post(f"{server.url}/v1/completions", json=alone.body(), timeout=60)
        assert [choice["token_ids"] for choice in reply.json()["choices"]] == alone.greedy
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(END_SECONDS) == 0, server.log.read_text()
    cluster.settle()


def test_an_actor_that_is_killed(cluster: Cluster, started: Any, alone: Any, tmp_path: Path) -> None:
    """There is room for it only if the server before has given back its placement group."""
    with started(tmp_path / "log", *flags(cluster, alone)) as server:
        _, answers = ask_until(lambda: cluster.actor(NODES[1]).kill(), server.url, alone.body())
        assert server.process.wait(END_SECONDS) == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    for words in (*(answer.text for answer in answers), last):
        found = re.search(r"rank (\d) is out of reach: .* \(rank 0 on \S+, rank 1 on \S+\)", words)
        assert found is not None and f"rank {found[1]} on {NODES[1]}" in words, words
    assert all(answer.text.count('"error"') == 1 for answer in answers)
    cluster.settle()
