"""Several ranks as users start them: they answer like one, and a rank that ends or hangs ends the server in words."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.system.load import ask_until

Post = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass
class Ranked:
    """A server of the built-in model on two ranks. lost: descriptors of ranks that were sent a signal."""

    server: Any
    lost: list[int] = field(default_factory=list)

    def lose(self, number: int, sent: signal.Signals) -> None:
        """Send a signal to a rank. They are started in order, below the engine process."""
        (engine,) = children(self.server.process.pid)
        self.lost.append(os.pidfd_open(sorted(children(engine))[number]))
        signal.pidfd_send_signal(self.lost[-1], sent)

    def close(self) -> None:
        """Whatever has become of the server, no rank that was stopped may stay."""
        for descriptor in self.lost:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)


def children(parent: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def compare(post: Post, alone: Any) -> None:
    """With what one rank answers. post: a body to /v1/completions, and its answer."""
    for _ in range(2):  # the second time from the prefix cache
        assert [one["token_ids"] for one in post(alone.body())["choices"]] == alone.greedy
    prompt, settings = alone.prompts[-1], {"temperature": 0.8, "top_p": 0.9, "seed": 7, "prompt_logprobs": 1}
    (choice,) = post(alone.body() | settings | {"prompt": prompt})["choices"]
    assert choice["token_ids"] == alone.drawn
    rows = zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
    assert [row[str(token)]["logprob"] for token, row in rows] == pytest.approx(alone.scores, abs=1e-3)


TIMEOUT, MARGIN = 2.0, 1.5
SHM = ["--collective", "shm"]
TCP = ["--collective", "gloo"]


@pytest.mark.parametrize(
    ("flags", "number", "rank"),
    [
        (SHM, signal.SIGKILL, 0),
        ([*SHM, "--partition", "auto"], signal.SIGSTOP, 0),
        ([*TCP, "--weave", "woven", "--partition", "100%:100%"], signal.SIGSTOP, 1),
        ([*TCP, "--weave", "plain"], signal.SIGSTOP, 1),
        (TCP, signal.SIGKILL, 1),
    ],
)
def test_two_ranks_answer_like_one_until_one_is_lost(
    started: Any, alone: Any, tmp_path: Path, flags: list[str], number: signal.Signals, rank: int
) -> None:
    """Prompts come in chunks."""
    stops = number is signal.SIGSTOP
    settings = ["-tp", "2", *alone.flags, *flags, "--rank-timeout", str(TIMEOUT)]
    with started(tmp_path / "log", *settings) as server, closing(Ranked(server)) as ranked:

        def post(content: dict[str, Any]) -> dict[str, Any]:
            reply = httpx.post(f"{server.url}/v1/completions", json=content, timeout=60)
            assert reply.status_code == 200, reply.text
            return dict(reply.json())

        compare(post, alone)
        when, answers = ask_until(lambda: ranked.lose(rank, number), server.url, alone.body())
        for answer in answers:
            assert answer.text.count('"error"') == 1 and f"rank {rank}" in answer.text, answer.text[-500:]
            assert answer.ended - when < (TIMEOUT + 1 + MARGIN if stops else 5)
        assert server.process.wait(10) == 1
        words = server.log.read_text()
    # Who is stopped is missed at a seam by the other rank, or at the end of a step by the engine.
    ended = rf"did not .* within {TIMEOUT:g} s" if stops else "was killed by SIGKILL"
    assert re.search(rf"rank {rank}( \(process \d+\))? {ended}", words.splitlines()[-1]), words


def test_a_server_that_is_paused_as_a_whole_goes_on(started: Any, alone: Any, tmp_path: Path) -> None:
    """As a container that is frozen, for longer than its ranks wait for one another."""
    with started(tmp_path / "log", "-tp", "2", *alone.flags, *SHM, "--rank-timeout", str(TIMEOUT)) as server:
        (engine,) = children(server.process.pid)

        def pause() -> None:
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for process in (server.process.pid, engine, *children(engine)):
                    os.kill(process, number)
                time.sleep(TIMEOUT + 2 if number == signal.SIGSTOP else 0)

        _, answers = ask_until(pause, server.url, alone.body())
        assert all('"error"' not in answer.text and '"length"' in answer.text for answer in answers), answers
        assert server.process.poll() is None


def test_a_rank_that_hangs_ends_with_the_server(started: Any, alone: Any, tmp_path: Path) -> None:
    with started(tmp_path / "log", "-tp", "2", *alone.flags) as server, closing(Ranked(server)) as ranked:
        ranked.lose(1, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0, server.log.read_text()
        assert select.select(ranked.lost, [], [], 5)[0] == ranked.lost


CLIENT = """
import json, sys, time, httpx
url, body = sys.argv[1], json.loads(sys.argv[2])
end = time.monotonic() + 120
while time.monotonic() < end:
    try:
        if httpx.get(url + "/health/ready", timeout=5).status_code == 200:
            break
    except httpx.TransportError:
        pass
    time.sleep(0.1)
print(httpx.post(url + "/v1/completions", json=body, timeout=60).text)
"""


@contextmanager
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces, of the addresses 10.78.0.1 and 10.78.0.2."""
    names = f"weft-test-{os.getpid()}-0", f"weft-test-{os.getpid()}-1"
    first, second = names
    links = [("10.78.0.1/24", "weft0"), ("10.78.0.2/24", "weft1")]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(
            ["ip", "-n", first, "link", "add", "weft0", "type", "veth", "peer", "name", "weft1", "netns", second],
            check=True,
        )
        for name, (address, link) in zip(names, links, strict=True):
            subprocess.run(["ip", "-n", name, "addr", "add", address, "dev", link], check=True)
            for each in (link, "lo"):
                subprocess.run(["ip", "-n", name, "link", "set", each, "up"], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip")
def test_two_hosts_answer_like_one(alone: Any, tmp_path: Path) -> None:
    flags = [*alone.flags, "--rank-timeout", "20", "-tp", "2", "--nnodes", "2"]
    flags += ["--dist-init-addr", "10.78.0.1:29500", "--port", "8000"]
    with namespaces() as names, ExitStack() as stack:
        logs = [tmp_path / "0", tmp_path / "1"]
        nodes = []
        for number, (name, log) in enumerate(zip(names, logs, strict=True)):
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "weft", "serve", *flags]
            words = stack.enter_context(log.open("w"))
            nodes.append(subprocess.Popen([*command, "--node-rank", str(number)], stdout=words, stderr=words))
            stack.callback(nodes[-1].wait)
            stack.callback(nodes[-1].kill)
        asking = ["ip", "netns", "exec", names[0], sys.executable, "-c", CLIENT, "http://127.0.0.1:8000"]
        content = json.dumps(alone.body())
        reply = subprocess.run([*asking, content], capture_output=True, text=True, timeout=180, check=False)
        assert reply.returncode == 0, (reply.stderr, [log.read_text() for log in logs])
        assert [choice["token_ids"] for choice in json.loads(reply.stdout)["choices"]] == alone.greedy
        nodes[0].send_signal(signal.SIGTERM)
        assert [node.wait(30) for node in nodes] == [0, 0], [log.read_text() for log in logs]
