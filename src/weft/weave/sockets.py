"""Messages between ranks over plain TCP connections, one for each pair of ranks, without a thread of their own.

Whoever waits for a message moves all of them: what is to be sent goes out as far as the system takes it, what arrives
goes where it was asked for, and then the thread sleeps until much of what is missing has come (SO_RCVLOWAT). Gloo wakes
for every piece that arrives, in a thread in between; on a rank's only core both are taken from the computation.

Messages of a connection arrive in the order in which they were sent, and must be asked for in that order. So they have
neither tags nor lengths: both sides know from the plan of a seam what follows it.
"""

from __future__ import annotations

import hmac
import secrets
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any

import torch

from weft.errors import DeviceError
from weft.weave.messages import Messages

ENOUGH = 1 << 18  # bytes that must have come, at most, before a sleeping thread is woken
TOKEN_BYTES, RANK_BYTES = 16, 4
HELLO_SECONDS = 5.0  # that a caller may take to say who it is


def connect_sockets(store: Any, rank: int, ranks: int, *, bind: str = "127.0.0.1", timeout: float) -> Messages:
    """As `weft.weave.distributed.connect`. Each rank listens at a port of its own until those after it have called,
    who show by a number from the store that they belong to the group. Raises DeviceError."""
    links: dict[int, socket.socket] = {}
    try:
        token, family = secrets.token_bytes(TOKEN_BYTES), socket.AF_INET6 if ":" in bind else socket.AF_INET
        with socket.create_server((bind, 0), family=family) as listening:
            store.set(str(rank), f"{token.hex()} {listening.getsockname()[1]} {bind}")
            for other in range(rank):
                links[other] = _call(store, rank, other, timeout)
            _answer(listening, token, range(rank + 1, ranks), links, timeout)
        for link in links.values():
            link.setblocking(False)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (OSError, RuntimeError) as error:
        for link in links.values():
            link.close()
        raise DeviceError(f"rank {rank} cannot join the {ranks} ranks from {bind}: {error}") from error
    group = Sockets(links)
    return Messages(group, rank, ranks, timeout, exact=True, close=group.close)


def _call(store: Any, rank: int, other: int, timeout: float) -> socket.socket:
    store.wait([str(other)], timedelta(seconds=timeout))
    token, port, host = store.get(str(other)).decode().split(maxsplit=2)
    link = socket.create_connection((host, int(port)), timeout)
    link.sendall(bytes.fromhex(token) + rank.to_bytes(RANK_BYTES, "little"))
    return link


def _answer(
    listening: socket.socket, token: bytes, expected: Collection[int], links: dict[int, socket.socket], timeout: float
) -> None:
    """Take the calls of these ranks; a caller that is none of them is sent away."""
    end = time.monotonic() + timeout
    while missing := [rank for rank in expected if rank not in links]:
        listening.settimeout(max(end - time.monotonic(), 1e-3))
        try:
            link, _ = listening.accept()
        except TimeoutError:
            raise TimeoutError(f"rank {missing[0]} did not call within {timeout:g} s") from None
        caller = _hello(link, token)
        if caller in missing:
            links[caller] = link
        else:
            link.close()


def _hello(link: socket.socket, token: bytes) -> int | None:
    """Which rank calls; None for somebody who does not know the token."""
    link.settimeout(HELLO_SECONDS)
    try:
        hello = link.recv(TOKEN_BYTES + RANK_BYTES, socket.MSG_WAITALL)
    except OSError:
        return None
    known = hmac.compare_digest(hello[:TOKEN_BYTES], token)
    return int.from_bytes(hello[TOKEN_BYTES:], "little") if known else None


class Transfer:
    """A tensor on its way to or from a rank. left: its bytes that have not been moved yet."""

    __slots__ = ("_sockets", "left", "rank")

    def __init__(self, sockets: Sockets, rank: int, left: memoryview) -> None:
        self.rank = rank
        self.left = left
        self._sockets = sockets

    def wait(self, timeout: timedelta) -> None:
        """Raises TimeoutError, or ConnectionError for a rank that has ended or left."""
        if self.left:
            self._sockets.complete(self, timeout.total_seconds())


class Sockets:
    """The connections of one rank, by the ranks at their other ends; what `Messages` wants of torch.distributed."""

    def __init__(self, links: dict[int, socket.socket]) -> None:
        self._peers = {rank: _Peer(link) for rank, link in links.items()}

    def send(self, tensors: list[torch.Tensor], rank: int, _tag: int) -> Transfer:
        """A contiguous tensor, which must stay as it is until this was waited for."""
        return self._post(tensors, rank, self._peers[rank].out)

    def recv(self, tensors: list[torch.Tensor], rank: int, _tag: int) -> Transfer:
        """Into a contiguous tensor."""
        return self._post(tensors, rank, self._peers[rank].into)

    def complete(self, transfer: Transfer, seconds: float) -> None:
        """Move messages until this one is through. Raises as `Transfer.wait`."""
        end = time.monotonic() + seconds
        while True:
            for peer in self._peers.values():
                peer.move()
            if not transfer.left:
                return
            if (error := self._peers[transfer.rank].error) is not None:
                raise ConnectionError(str(error)) from error
            if (left := end - time.monotonic()) <= 0:
                raise TimeoutError
            _sleep(self._peers.values(), left)

    def close(self) -> None:
        for peer in self._peers.values():
            peer.link.close()

    def _post(self, tensors: list[torch.Tensor], rank: int, queue: deque[Transfer]) -> Transfer:
        (tensor,) = tensors
        transfer = Transfer(self, rank, memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        if transfer.left:
            queue.append(transfer)
        return transfer


class _Peer:
    """One connection. out, into: what is to be moved, in order. error: why nothing is moved any more."""

    __slots__ = ("_enough", "error", "into", "link", "out")

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.out: deque[Transfer] = deque()
        self.into: deque[Transfer] = deque()
        self.error: OSError | None = None
        self._enough = 1

    def move(self) -> None:
        """All that can be moved at once. What came before the other side has left is still taken."""
        for queue, call in ((self.out, self.link.send), (self.into, self.link.recv_into)):
            try:
                _move(queue, call)
            except OSError as error:
                self.error = error

    def wanted(self) -> int:
        """The events that it waits for. Wakes for a message, or for much of one."""
        if self.into and (enough := min(len(self.into[0].left), ENOUGH)) != self._enough:
            self.link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, enough)
            self._enough = enough
        return (select.POLLIN if self.into else 0) | (select.POLLOUT if self.out else 0)


def _move(queue: deque[Transfer], call: Callable[[memoryview], int]) -> None:
    """Until the system takes, or has, no more."""
    while queue:
        first = queue[0]
        try:
            count = call(first.left)
        except BlockingIOError:
            return
        if count == 0:
            raise ConnectionResetError("the other side has closed the connection")
        first.left = first.left[count:]
        if first.left:
            return
        queue.popleft()


def _sleep(peers: Collection[_Peer], seconds: float) -> None:
    """Until something can be moved."""
    poll = select.poll()
    for peer in peers:
        if peer.error is None and (events := peer.wanted()):
            poll.register(peer.link, events)
    poll.poll(1000 * seconds)
