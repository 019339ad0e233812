"""Ranks on several hosts, started by hand: `weft serve` with --nnodes, once on each.

Node 0 has the front end, the engine and the first ranks. It listens at --dist-init-addr, and at no other address; the
others connect to it, are told where the ranks meet, start theirs, and pass messages between them and the engine:

    engine on node 0 ──▶ its own ranks (rank_processes.py)
           └──── TCP ──▶ node 1 ──▶ its ranks

The connections carry plans and results, not rows; those go from rank to rank over TCP. Nobody asks who connects: the
addresses must be ones that only the nodes can reach.
"""

from __future__ import annotations

import hashlib
import logging
import select
import socket
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path

import weft
from weft.config import EngineConfig, parse_address
from weft.errors import DeviceError, WeftError
from weft.ipc.ranks import (
    Agreement,
    End,
    FromNode,
    Gone,
    Heard,
    Hello,
    Lost,
    Meeting,
    Refusal,
    ToNode,
    ToRank,
    Welcome,
    loss,
    new_name,
)
from weft.ipc.stream import Message, Stream
from weft.loop.rank_processes import END_SECONDS, RANK, Ranks, start_ranks

LOOPBACK = "127.0.0.1"
# Seconds in which the nodes must have been started.
MEET_SECONDS = 600.0
RETRY_SECONDS = 0.5
CHECK_SECONDS = 1.0

log = logging.getLogger(__name__)


class Nodes:
    """All ranks: those of this host, and those of others."""

    def __init__(self, hosts: Sequence[str], local: Ranks, others: dict[Stream[FromNode], range]) -> None:
        """hosts: each rank's, by address. others: their connections, and which ranks they have."""
        self.where = whereabouts(hosts)
        self._ranks = len(hosts)
        self._local = local
        self._others = dict(others)

    def __len__(self) -> int:
        return self._ranks

    def send(self, message: ToRank) -> None:
        self._local.send(message)
        for node, ranks in list(self._others.items()):  # `listen`, in another thread, takes lost ones away
            try:
                node.send(message)
            except OSError as error:  # `listen` will say what has become of them
                log.warning("ranks %d to %d cannot be told anything: %s", ranks[0], ranks[-1], error)

    def listen(self, timeout: float | None = None, also: Collection[int] = ()) -> list[Heard]:
        found = self._local.listen(timeout, [*also, *(node.fileno() for node in self._others)])
        for node, ranks in list(self._others.items()):
            try:
                found += [message for message in node.take() if not isinstance(message, Hello)]
            except OSError as error:
                del self._others[node]
                node.close()
                found += [Gone(rank, f"is out of reach: {error}") for rank in ranks]
        return found

    def close(self, seconds: float = END_SECONDS) -> None:
        """The others end their ranks when the connection does."""
        self._local.close(seconds)
        for node in self._others:
            node.close()
        self._others.clear()


def open_nodes(config: EngineConfig, model: Path, say: Callable[[str], None], command: Sequence[str] = RANK) -> Nodes:
    """Node 0: wait for the others, and start everybody's ranks. Raises ConfigError or DeviceError."""
    host, port = parse_address(config.dist_init_addr or "")
    try:
        listener = listen(host, port)
    except OSError as error:
        raise DeviceError(f"--dist-init-addr is {host}:{port}, and node 0 cannot listen there: {error}") from error
    say(f"wait for {config.nnodes - 1} other node{'s' if config.nnodes > 2 else ''}")
    others: dict[int, Stream[FromNode]] = {}
    try:
        with listener:
            wanted, agreed = range(1, config.nnodes), agreement(config, model)
            missing = meet(listener, wanted, agreed, others, seconds=MEET_SECONDS, timeout=config.rank_timeout)
        if missing:
            raise DeviceError(f"node {' and '.join(map(str, missing))} did not come within {MEET_SECONDS:g} s")
        meeting = Meeting(new_name(), host, free_port(host))
        addresses = [host, *(_welcome(number, others[number], meeting) for number in wanted)]
        hosts = [address for number, address in enumerate(addresses) for _ in ranks_of(config, number)]
        local = start_ranks(config, model, ranks_of(config, 0), meeting, host, command)
    except BaseException:
        for node in others.values():
            node.close()
        raise
    return Nodes(hosts, local, {node: ranks_of(config, number) for number, node in others.items()})


def serve_node(config: EngineConfig, model: Path, command: Sequence[str] = RANK) -> None:
    """Another node: ranks for node 0, until it is done with them. Raises DeviceError when it is gone otherwise."""

    def start(meeting: Meeting, bind: str) -> Ranks:
        return start_ranks(config, model, ranks_of(config, config.node_rank), meeting, bind, command)

    hello = Hello(config.node_rank, agreement(config, model))
    serve_ranks(parse_address(config.dist_init_addr or ""), hello, config.rank_timeout, start)


def serve_ranks(address: tuple[str, int], hello: Hello, timeout: float, start: Callable[[Meeting, str], Ranks]) -> None:
    """Ranks for node 0 at `address`, until it is done with them. start: takes where the ranks meet, and this host's
    address. Raises DeviceError when node 0 is gone otherwise, what a rank was lost for, and what `start` raises."""
    host, port = address
    log.info("node %d calls node 0 at %s:%d", hello.node, host, port)
    connection = _connect(host, port, hello.node)
    node: Stream[ToNode] = Stream(connection, ToNode, timeout)
    try:
        node.send(hello)
        log.info("node %d waits for the others", hello.node)
        answer = _first(node)
        if isinstance(answer, Refusal):
            raise DeviceError(answer.error)
        if not isinstance(answer, Welcome):
            raise DeviceError(f"node 0 said {type(answer).__name__} before it welcomed this node")
        ranks = start(answer.meeting, node.address)
        try:
            _pass_on(node, ranks)
        except BaseException:
            ranks.close(0.0)
            raise
        ranks.close()
    except OSError as error:
        raise DeviceError(f"node 0 at {host}:{port} is gone: {error}") from error
    finally:
        node.close()


def _pass_on(node: Stream[ToNode], ranks: Ranks) -> None:
    """Between node 0 and the ranks, until an End comes. Raises what the first rank was lost for once the last one has
    ended, or node 0 has left because of it; OSError when that has left otherwise."""
    left = len(ranks)
    lost: list[WeftError] = []
    try:
        while left:
            for heard in ranks.listen(None, (node.fileno(),)):
                if isinstance(heard, Lost | Gone):
                    lost.append(loss(heard))
                left -= isinstance(heard, Gone)
                node.send(heard)
            for message in node.take():
                if isinstance(message, Welcome | Refusal):
                    raise DeviceError("node 0 does not remember this node")
                ranks.send(message)
                if isinstance(message, End):
                    return
    except OSError:
        if not lost:
            raise
    raise lost[0]


def ranks_of(config: EngineConfig, node: int) -> range:
    each = config.tensor_parallel_size // config.nnodes
    return range(node * each, (node + 1) * each)


def agreement(config: EngineConfig, model: Path) -> Agreement:
    common = replace(config, node_rank=0, cores=None, model="", revision=None)
    file = model / "config.json"
    shape = file.read_bytes() if file.exists() else b""
    return Agreement(weft.__version__, common, hashlib.sha256(shape).hexdigest())


def listen(host: str, port: int) -> socket.socket:
    """Raises OSError."""
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def free_port(host: str) -> int:
    """One that nobody listens at now."""
    with listen(host, 0) as chosen:
        port: int = chosen.getsockname()[1]
        return port


def meet(
    listener: socket.socket,
    nodes: range,
    agreed: Agreement,
    others: dict[int, Stream[FromNode]],
    *,
    seconds: float,
    timeout: float,
    check: Callable[[], None] | None = None,
) -> list[int]:
    """Wait for these nodes, up to `seconds`, and fill `others` with their connections; returns which have not come.

    agreed: what they must bring. timeout: seconds that one may take to say something. check: called every
    second, to raise what ends the waiting.
    """
    end = time.monotonic() + seconds
    while len(others) < len(nodes) and time.monotonic() < end:
        if check is not None:
            check()
        listener.settimeout(min(CHECK_SECONDS, max(0.0, end - time.monotonic())))
        try:
            connection, peer = listener.accept()
        except (TimeoutError, BlockingIOError):
            continue
        node: Stream[FromNode] = Stream(connection, FromNode, timeout)
        try:
            hello = _first(node, timeout)
            _forget_ended(others)
            refusal = _refusal(hello, nodes, agreed, others)
            if refusal is not None:
                node.send(Refusal(refusal))
        except (OSError, DeviceError) as error:
            refusal = str(error)
        if refusal is None and isinstance(hello, Hello):
            others[hello.node] = node
        else:
            log.warning("%s:%d was refused: %s", *peer[:2], refusal)
            node.close()
    return [node for node in nodes if node not in others]


def _forget_ended(others: dict[int, Stream[FromNode]]) -> None:
    """Nodes that have left again may be started anew."""
    for number, node in list(others.items()):
        try:
            node.take()  # nobody says anything before the welcome
        except OSError as error:
            log.warning("node %d has left: %s", number, error)
            del others[number]
            node.close()


def _welcome(number: int, node: Stream[FromNode], meeting: Meeting) -> str:
    """Tell a node to start its ranks; its address."""
    try:
        node.send(Welcome(meeting))
        return node.peer
    except OSError as error:
        raise DeviceError(f"node {number} is gone: {error}") from error


def _refusal(hello: FromNode, nodes: range, agreed: Agreement, others: Collection[int]) -> str | None:
    if not isinstance(hello, Hello):
        return f"the first word was {type(hello).__name__}"
    if hello.node not in nodes or hello.node in others:
        missing = ", ".join(str(node) for node in nodes if node not in others)
        return f"--node-rank is {hello.node}; node 0 still waits for {missing}"
    return _difference(hello.agreement, agreed)


def _difference(theirs: Agreement, ours: Agreement) -> str | None:
    if theirs.version != ours.version:
        return f"this is weft {theirs.version}, and node 0 has {ours.version}"
    for spec in fields(EngineConfig):
        there, here = getattr(theirs.settings, spec.name), getattr(ours.settings, spec.name)
        if there != here:
            flag = f"--{spec.name.replace('_', '-')}"
            return f"{flag} is {there}, and on node 0 it is {here}; only --node-rank, --cores and MODEL may differ"
    return None if theirs.shape == ours.shape else "the model's config.json is not the same as on node 0"


def whereabouts(hosts: Sequence[str]) -> str:
    """Which ranks are where, for the end of an error. hosts: each rank's."""
    parts = []
    for host, ranks in groupby(range(len(hosts)), key=lambda rank: hosts[rank]):
        first, *rest = ranks
        parts.append(f"ranks {first} to {rest[-1]} on {host}" if rest else f"rank {first} on {host}")
    return f" ({', '.join(parts)})"


def _connect(host: str, port: int, node: int) -> socket.socket:
    end = time.monotonic() + MEET_SECONDS
    while True:
        try:
            return socket.create_connection((host, port), timeout=10)
        except OSError as error:
            if time.monotonic() > end:
                raise DeviceError(f"node {node} does not reach node 0 at {host}:{port}: {error}") from error
            time.sleep(RETRY_SECONDS)


def _first(node: Stream[Message], timeout: float | None = None) -> Message:
    """The first message of a connection. Raises OSError, or DeviceError when it does not come in time."""
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        left = None if end is None else max(0.0, end - time.monotonic())
        if not select.select([node.fileno()], [], [], left)[0]:
            raise DeviceError(f"the first word did not come within {timeout:g} s")
        if found := node.take():
            return found[0]
