"""Ranks of one or more hosts, joined by torch.distributed: gloo between CPUs.

Rows cross as messages of exactly the rows that are meant for a rank, so shards may be of any size. A seam is two
rounds: every rank sends each owner its part of the owner's rows, and every owner sends its joined rows to all. Messages
are asked for as early as can be: gloo sends what the other side has asked for at once, all else a round trip later.

A message that is longer than its receiver thinks ends the process, inside gloo. So what comes before the plans were
compared goes into memory that is large enough for any.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from weft.errors import DeviceError, RankLost
from weft.weave.collective import Join, Joined, check, fingerprint, plan_of
from weft.weave.rows import JoinRows, arrived

_PLAN, _PART, _ROWS = range(3)  # tags; messages of one tag arrive in the order in which they were sent


def meet(host: str, port: int, rank: int, ranks: int, *, timeout: float) -> dist.Store:
    """Where ranks find one another: rank 0 listens at this address, and at no other. Raises DeviceError."""
    try:
        listening = socket.create_server((host, port)).detach() if rank == 0 else None
        return dist.TCPStore(
            host,
            port,
            ranks,
            is_master=rank == 0,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            master_listen_fd=listening,
        )
    except (OSError, RuntimeError) as error:
        raise DeviceError(f"rank {rank} cannot meet the others at {host}:{port}: {error}") from error


def connect(store: dist.Store, rank: int, ranks: int, *, bind: str = "127.0.0.1", timeout: float) -> Any:
    """A gloo group of its own, which no global state of torch knows. Several groups need a dist.PrefixStore each.

    bind: this rank's address, at which the others reach it. Raises DeviceError.
    """
    try:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=bind)]
        options._timeout = timedelta(seconds=timeout)
        return dist.ProcessGroupGloo(store, rank, ranks, options)
    except RuntimeError as error:
        raise DeviceError(f"rank {rank} cannot join the {ranks} ranks from {bind}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Message:
    """A tensor on its way to or from a rank; rank None: to and from all."""

    rank: int | None
    tensor: torch.Tensor
    work: Any


class _Messages:
    """Messages between the ranks of a group: each has a time-out, and an error that names the rank."""

    def __init__(self, group: Any, rank: int, ranks: int, timeout: float) -> None:
        self.others = [other for other in range(ranks) if other != rank]
        self._group = group
        self._rank = rank
        self._timeout = timeout
        self._seam = 0
        self._failed: str | None = None

    def begin(self) -> None:
        """The next seam."""
        if self._failed is not None:
            raise RankLost(self._failed)
        self._seam += 1

    def exchange(self, plan: tuple[Any, ...], rows: int) -> tuple[list[_Message], list[_Message]]:
        """Send the plan to all, and ask for theirs: (asked, sent)."""
        own = torch.tensor([fingerprint(plan), rows])
        asked = [self.receive(torch.empty_like(own), other, _PLAN) for other in self.others]
        return asked, [self.send(own, other, _PLAN) for other in self.others]

    def compare(self, asked: list[_Message], sent: list[_Message]) -> None:
        """Another plan is said rather than that a rank has left, for it may have left because of a plan."""
        failures = [self._failure(message) for message in asked]
        own = sent[0].tensor.tolist() if sent else []
        for message, failure in zip(asked, failures, strict=True):
            theirs = message.tensor.tolist()
            if failure is None and theirs != own:
                self.fail(f"rank {message.rank} came with another plan: its rows are {theirs[1]}, those here {own[1]}")
        for failure in failures:
            if failure is not None:
                self.fail(*failure)

    def send(self, tensor: torch.Tensor, rank: int, tag: int) -> _Message:
        return self._post("send", tensor, rank, tag)

    def receive(self, into: torch.Tensor, rank: int, tag: int) -> _Message:
        return self._post("recv", into, rank, tag)

    def wait(self, message: _Message) -> torch.Tensor:
        failure = self._failure(message)
        if failure is not None:
            self.fail(*failure)
        return message.tensor

    def all_reduce(self, tensor: torch.Tensor) -> _Message:
        return _Message(None, tensor, self._group.allreduce([tensor]))

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """`Collective.gather`."""
        rows = rows.contiguous()
        self.begin()
        self.compare(*self.exchange(("gather", tuple(rows.shape), str(rows.dtype)), len(rows)))
        found = [rows if rank == self._rank else torch.empty_like(rows) for rank in range(len(self.others) + 1)]
        if rows.numel():
            asked = [self.receive(found[rank], rank, _ROWS) for rank in self.others]
            for message in (*asked, *[self.send(rows, rank, _ROWS) for rank in self.others]):
                self.wait(message)
        return found

    def fail(self, why: str, cause: Exception | None = None) -> NoReturn:
        self._failed = f"seam {self._seam}: {why}"
        self.close()
        raise RankLost(self._failed) from cause

    def close(self) -> None:
        self._group = None  # closes the connections, which the others notice
        self._failed = self._failed or f"rank {self._rank} has left its group"

    def _failure(self, message: _Message) -> tuple[str, Exception] | None:
        """None once the message has come; otherwise what is wrong, and why."""
        try:
            message.work.wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            who = "another rank" if message.rank is None else f"rank {message.rank}"
            late = "Timed out" in str(error)
            return f"{who} {f'did not come within {self._timeout:g} s' if late else 'has ended or left'}", error
        return None

    def _post(self, kind: str, tensor: torch.Tensor, rank: int, tag: int) -> _Message:
        try:
            return _Message(rank, tensor, getattr(self._group, kind)([tensor], rank, tag))
        except RuntimeError as error:
            self.fail(f"rank {rank} has ended or left", error)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A seam in flight: what was asked of the others, and what was sent to them and must stay as it is."""

    join: Join
    plans: list[_Message]
    parts: dict[int, _Message]
    sent: list[_Message]


class DistributedCollective:
    """One rank, in the fused order: reduce-scatter, the owner's work, all-gather. A rank of W sends 2 (W - 1) / W of
    the bytes of all rows, as in an all-reduce."""

    def __init__(
        self, group: Any, rank: int, ranks: int, join_rows: JoinRows, *, timeout: float, capacity: int
    ) -> None:
        """group: of `connect`. timeout: seconds that a rank waits for another's message. capacity: the most bytes of
        partial sums that one rank gives to another in a seam, the same on all ranks; memory is taken as it is used."""
        self.rank, self.ranks = rank, ranks
        self._messages = _Messages(group, rank, ranks, timeout)
        self._join_rows = join_rows
        self._room = torch.empty((ranks, -(-capacity // 64) * 64), dtype=torch.uint8)

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return bounds[self.rank], bounds[self.rank + 1]

    def start(self, join: Join) -> _Pending:
        partial, bounds = join.partial, join.bounds
        check(join, self.rank, self.ranks, self.owned(bounds))
        largest = max(end - first for first, end in pairwise(bounds))
        if largest * partial.shape[1] * partial.element_size() > self._room.shape[1]:
            raise ValueError(f"{largest} rows of one rank are more than the capacity of {self._room.shape[1]} bytes")
        messages = self._messages
        messages.begin()
        plans, sent = messages.exchange(plan_of(join), len(partial))
        parts = {}
        if not join.replicated:
            if bounds[self.rank] < bounds[self.rank + 1]:
                parts = {rank: messages.receive(self._room[rank], rank, _PART) for rank in messages.others}
            sent += [
                messages.send(partial[bounds[rank] : bounds[rank + 1]], rank, _PART)
                for rank in messages.others
                if bounds[rank] < bounds[rank + 1]
            ]
        return _Pending(join, plans, parts, sent)

    def finish(self, pending: _Pending) -> Joined:
        join, messages, bounds = pending.join, self._messages, pending.join.bounds
        messages.compare(pending.plans, pending.sent)
        wire = self._wire(join)
        first, end = self.owned(bounds)
        coming = [
            messages.receive(wire[bounds[rank] : bounds[rank + 1]], rank, _ROWS)
            for rank in messages.others
            if bounds[rank] < bounds[rank + 1]
        ]
        rows, residual = self._join_rows(self._parts(pending), join.residual, join.weight, join.eps, join.quantise)
        sent = pending.sent + [messages.send(rows, rank, _ROWS) for rank in messages.others if first < end]
        wire[first:end] = rows
        for message in (*coming, *sent):
            messages.wait(message)
        return arrived(wire, join, residual)

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return self._messages.gather(rows)

    def close(self) -> None:
        self._messages.close()

    @staticmethod
    def _wire(join: Join) -> torch.Tensor:
        """Memory for all rows as they travel."""
        if join.quantise is None:
            return join.weight.new_empty(join.partial.shape)
        return torch.empty((len(join.partial), join.quantise.row_bytes), dtype=torch.uint8)

    def _parts(self, pending: _Pending) -> list[torch.Tensor]:
        """Of all ranks, in their order: the sums of this rank's own rows."""
        first, end = self.owned(pending.join.bounds)
        own = pending.join.partial[first:end]
        if not pending.parts:
            return [own]
        return [
            own
            if rank == self.rank
            else self._messages.wait(pending.parts[rank])[: own.nbytes].view(own.dtype).view(own.shape)
            for rank in range(self.ranks)
        ]


class AllReduceCollective:
    """The plain baseline: every rank sums all rows, normalises them all and keeps the whole residual. Its bits are not
    those of the other collectives: the all-reduce has its own order, and rounds to the dtype of the partial sums."""

    def __init__(self, group: Any, rank: int, ranks: int, join_rows: JoinRows, *, timeout: float) -> None:
        self.rank, self.ranks = rank, ranks
        self._messages = _Messages(group, rank, ranks, timeout)
        self._join_rows = join_rows

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return 0, bounds[-1]

    def start(self, join: Join) -> tuple[Join, _Message | None]:
        check(join, self.rank, self.ranks, self.owned(join.bounds))
        self._messages.begin()
        if join.replicated or not join.partial.numel():
            return join, None
        return join, self._messages.all_reduce(join.partial.clone())

    def finish(self, pending: tuple[Join, _Message | None]) -> Joined:
        join, summed = pending
        total = join.partial if summed is None else self._messages.wait(summed)
        rows, residual = self._join_rows([total], join.residual, join.weight, join.eps, join.quantise)
        return arrived(rows, join, residual)

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return self._messages.gather(rows)

    def close(self) -> None:
        self._messages.close()
