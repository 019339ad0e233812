"""Ranks of one or more hosts, joined by TCP connections of our own, one for each pair of ranks (csrc/links.h).

What gloo's messages cost beyond the work of the system is saved: it wakes a thread of its own for every piece that
arrives, and whoever waits after that. On a rank's only core both are taken from the computation.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from collections.abc import Collection
from datetime import timedelta
from typing import Any

from weft import _native
from weft.errors import DeviceError
from weft.kernels.cpu import CpuKernels
from weft.weave.native import NativeCollective

TOKEN_BYTES, RANK_BYTES = 16, 4
HELLO_SECONDS = 5.0  # that a caller may take to say who it is


def open_sockets(
    store: Any, rank: int, ranks: int, kernels: CpuKernels, *, bind: str = "127.0.0.1", timeout: float
) -> NativeCollective:
    """Meets the other ranks; several groups need a torch.distributed.PrefixStore each. A rank listens at a port of its
    own until those after it have called, who show by a number from the store that they belong to the group.

    bind: this rank's address, at which the others reach it. timeout: seconds that a rank waits for another's next byte.
    Raises DeviceError.
    """
    links: dict[int, socket.socket] = {}
    try:
        token, family = secrets.token_bytes(TOKEN_BYTES), socket.AF_INET6 if ":" in bind else socket.AF_INET
        with socket.create_server((bind, 0), family=family) as listening:
            without_pacing(listening)  # and so those that it accepts
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
    files = [links[other].detach() if other in links else -1 for other in range(ranks)]
    return NativeCollective(_native.Links(rank, files, timeout), kernels)


def without_pacing(link: socket.socket) -> None:
    """Take another congestion control where this one's is bbr, which sends small pieces by timers. Their interrupts are
    taken from the computation: a fifth of what the messages of a woven step cost it (docs/weave.md). To be called
    before the connection is there, since one that was paced stays so."""
    if not link.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"bbr"):
        return
    for name in (b"cubic", b"reno"):
        try:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
        except OSError:  # this kernel lacks it, or lets only its administrator choose it
            continue
        return


def _call(store: Any, rank: int, other: int, timeout: float) -> socket.socket:
    store.wait([str(other)], timedelta(seconds=timeout))
    token, port, host = store.get(str(other)).decode().split(maxsplit=2)
    link = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        link.settimeout(timeout)
        without_pacing(link)
        link.connect((host, int(port)))
    except BaseException:
        link.close()
        raise
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
    hello = b""
    try:
        while more := link.recv(TOKEN_BYTES + RANK_BYTES - len(hello)):
            hello += more
    except OSError:
        return None
    known = hmac.compare_digest(hello[:TOKEN_BYTES], token)
    return int.from_bytes(hello[TOKEN_BYTES:], "little") if known else None
