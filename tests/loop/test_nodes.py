"""Ranks on several nodes, here on one host: node 0 in this process, the others in threads or processes of their own."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.loop.steps import collect, plan

import weft
from weft.config import EngineConfig
from weft.devices.simulated import continuation
from weft.errors import CheckpointError, DeviceError, RankLost
from weft.ipc.channel import MAX_MESSAGE_BYTES
from weft.ipc.ranks import Begun, End, FromNode, Gone, Hello, Refusal, ToNode, Welcome
from weft.ipc.stream import Stream
from weft.loop import nodes
from weft.loop.nodes import agreement, free_port, ranks_of, serve_node
from weft.loop.ranks import RankedDevice, open_ranks

COMMAND = (sys.executable, str(Path(__file__).with_name("stub_rank.py")))
KILLED = 1  # of stub_rank.py
MODEL = Path("good")


def configured(ranks: int = 2, count: int = 2) -> EngineConfig:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    return EngineConfig(tensor_parallel_size=ranks, nnodes=count, dist_init_addr=address, rank_timeout=5.0)


@contextmanager
def opened(config: EngineConfig) -> Iterator[tuple[RankedDevice, list[Future[None]]]]:
    """Node 0's device, and what becomes of the other nodes."""
    with ThreadPoolExecutor(config.nnodes) as pool:
        others = [
            pool.submit(serve_node, replace(config, node_rank=number), MODEL, COMMAND)
            for number in range(1, config.nnodes)
        ]
        device = open_ranks(config, MODEL, lambda _phase: None, COMMAND)
        try:
            yield device, others
        finally:
            device.close()


@pytest.mark.parametrize(("ranks", "count"), [(2, 2), (4, 2), (3, 3)])
def test_nodes_are_one_device(ranks: int, count: int) -> None:
    with opened(configured(ranks, count)) as (device, others):
        assert f"{ranks} ranks" in device.describe().device and device.capacity().blocks == 40
        for step in range(1, 10):
            device.submit(plan(step, 50 + step))
        for result in collect(device, 9):
            (sampled,) = result.sampled
            assert (sampled.token,) == continuation([50 + sampled.sequence, 8, 9], 1, 4096)
        device.close()
        for other in others:
            other.result(20)


def test_a_rank_of_another_node_that_is_killed() -> None:
    with opened(configured()) as (device, (other,)):
        device.submit(plan(1, KILLED))
        with pytest.raises(RankLost, match="rank 1 was killed by SIGKILL"):
            collect(device, 1)
        device.close()
        other.exception(20)  # it ends, whichever of the two it has heard of first


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [("broken", CheckpointError, "rank 1: model.safetensors is cut short"), ("gone", DeviceError, "rank 1 ended with")],
)
def test_a_node_tells_what_its_ranks_ended_of(model: str, kind: type[Exception], words: str) -> None:
    config = configured()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(serve_node, replace(config, node_rank=1), Path(model), COMMAND)
        with pytest.raises(kind, match=words):
            open_ranks(config, Path(model), lambda _phase: None, COMMAND)
        with pytest.raises(kind, match=words):
            other.result(20)


def test_a_node_that_leaves_before_all_have_come_may_come_again() -> None:
    config = configured(3, 3)
    with ThreadPoolExecutor(3) as pool:
        device = pool.submit(open_ranks, config, MODEL, lambda _phase: None, COMMAND)
        agreed = agreement(config, MODEL)
        assert ask(config, Hello(1, agreed), seconds=0.5) == []
        others = [pool.submit(serve_node, replace(config, node_rank=node), MODEL, COMMAND) for node in (1, 2)]
        device.result(20).close()
        for other in others:
            other.result(20)


def test_an_address_of_the_sixth_version() -> None:
    try:
        config = replace(configured(), dist_init_addr=f"[::1]:{free_port('::1')}")
    except OSError:
        pytest.skip("this machine has no IPv6")
    with opened(config) as (device, _):
        device.submit(plan(1, 50))
        assert collect(device, 1)[0].error is None


def test_a_node_that_is_killed() -> None:
    config = configured()
    script = (
        "import sys, msgspec; from pathlib import Path; from weft.config import EngineConfig; from weft.loop.nodes "
        "import serve_node; serve_node(msgspec.json.decode(sys.argv[1], type=EngineConfig), Path('good'), sys.argv[2:])"
    )
    words = msgspec.json.encode(replace(config, node_rank=1)).decode()
    with subprocess.Popen([sys.executable, "-c", script, words, *COMMAND]) as process:
        device = open_ranks(config, MODEL, lambda _phase: None, COMMAND)
        try:
            process.kill()
            with pytest.raises(RankLost, match="rank 1 is out of reach: the connection was closed"):
                collect(device, 1)
        finally:
            device.close()


@contextmanager
def waiting(config: EngineConfig) -> Iterator[None]:
    """Node 0, as long as it waits for others; it is given one at the end."""
    with ThreadPoolExecutor(2) as pool:
        device = pool.submit(open_ranks, config, MODEL, lambda _phase: None, COMMAND)
        try:
            yield
        finally:
            other = pool.submit(serve_node, replace(config, node_rank=1), MODEL, COMMAND)
            device.result(20).close()
            other.result(20)


def ask(config: EngineConfig, *messages: Any, seconds: float = 20) -> list[Any]:
    """What node 0 answers to these first words, within so many seconds."""
    host, _, port = (config.dist_init_addr or "").partition(":")
    end = time.monotonic() + 20
    while True:
        try:
            connection = socket.create_connection((host, int(port)), timeout=20)
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.01)
    stream: Stream[Any] = Stream(connection, ToNode, 20)
    try:
        for message in messages:
            stream.send(message)
        found: list[Any] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found += stream.take()
            time.sleep(0.01)
    except OSError:
        return found
    finally:
        stream.close()
    return found


def test_who_is_refused() -> None:
    config = configured()
    with waiting(config):
        agreed = agreement(config, MODEL)
        for node in (0, 2, -1):
            (refusal,) = ask(config, Hello(node, agreed))
            words = f"--node-rank is {node}; node 0 still waits for 1"
            assert isinstance(refusal, Refusal) and refusal.error == words
        for changes, words in (
            ({"shape": "another"}, "the model's config.json is not the same as on node 0"),
            ({"version": "0.0.0"}, f"this is weft 0.0.0, and node 0 has {weft.__version__}"),
        ):
            (refusal,) = ask(config, Hello(1, msgspec.structs.replace(agreed, **changes)))
            assert refusal == Refusal(words)
        (refusal,) = ask(config, Begun(1, "x"))
        assert isinstance(refusal, Refusal) and "Begun" in refusal.error
        assert ask(config, "no message at all") == []
        with pytest.raises(DeviceError, match="--block-size is 32, and on node 0 it is 16; only --node-rank"):
            serve_node(replace(config, node_rank=1, block_size=32), MODEL, COMMAND)
    assert agreement(replace(config, cores="0", node_rank=1), MODEL) == agreed


def test_nobody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "MEET_SECONDS", 0.2)
    config = configured(3, 3)
    with pytest.raises(DeviceError, match=r"node 1 and 2 did not come within 0\.2 s"):
        open_ranks(config, MODEL, lambda _phase: None, COMMAND)
    with pytest.raises(DeviceError, match="node 1 does not reach node 0 at 127"):
        serve_node(replace(config, node_rank=1), MODEL, COMMAND)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(DeviceError, match="node 0 cannot listen there"),
    ):
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        open_ranks(replace(config, dist_init_addr=address), MODEL, lambda _phase: None, COMMAND)


def test_ranks_are_divided_among_nodes() -> None:
    config = configured(6, 3)
    assert [list(ranks_of(config, node)) for node in range(3)] == [[0, 1], [2, 3], [4, 5]]


@given(st.lists(st.integers(0, 2000), max_size=6), st.integers(1, 700))
@settings(deadline=None, max_examples=40)
def test_messages_arrive_whole_however_they_are_cut(sizes: list[int], piece: int) -> None:
    ours, theirs = pair()
    sent = [Gone(number, "x" * size) for number, size in enumerate(sizes)]
    encoded = [msgspec.msgpack.encode(message) for message in sent]
    data = b"".join(len(one).to_bytes(4, "little") + one for one in encoded)
    stream: Stream[FromNode] = Stream(ours, FromNode, 5)
    try:
        found: list[Any] = []
        for start in range(0, len(data), piece):
            theirs.sendall(data[start : start + piece])
            found += stream.take()
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            while True:
                found += stream.take()
        assert found == sent
    finally:
        stream.close()
        theirs.close()


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    return ours, theirs


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x05\0\0\0hello", "not a message"),
        ((MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"), "at most"),
        (b"\x01\0\0\0\xc0", "not a message"),
    ],
)
def test_bytes_that_are_no_message_end_the_connection(data: bytes, words: str) -> None:
    ours, theirs = pair()
    stream: Stream[ToNode] = Stream(ours, ToNode, 5)
    try:
        theirs.sendall(data)
        with pytest.raises(ConnectionError, match=words):
            while not stream.take():
                pass
    finally:
        stream.close()
        theirs.close()


def test_what_is_sent_is_what_arrives() -> None:
    ours, theirs = pair()
    sender: Stream[FromNode] = Stream(ours, FromNode, 5)
    receiver: Stream[ToNode] = Stream(theirs, ToNode, 5)
    timer = threading.Timer(0.01, lambda: sender.send(End()))
    try:
        timer.start()
        found: list[Any] = []
        while not found:
            found = receiver.take()
        assert found == [End()] and sender.address == "127.0.0.1"
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)  # or a host without power is not missed
        assert not isinstance(found[0], Welcome)
    finally:
        timer.join()
        sender.close()
        receiver.close()
