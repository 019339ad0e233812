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
from typing import Any

import torch
import torch.distributed

from weft.errors import DeviceError
from weft.weave.collective import Join, Joined, check, plan_of
from weft.weave.messages import GRACE, Message, Messages, Tag, open_gloo
from weft.weave.rows import JoinRows, arrived

_dist: Any = torch.distributed  # its types lack much of what it has


def meet(host: str, port: int, rank: int, ranks: int, *, timeout: float) -> Any:
    """Where ranks find one another: rank 0 listens at this address, and at no other. Raises DeviceError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family).detach() if rank == 0 else None
        return _dist.TCPStore(
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


def connect(store: Any, rank: int, ranks: int, *, bind: str = "127.0.0.1", timeout: float) -> Messages:
    """A gloo group of its own, which no global state of torch knows, for one or several collectives that take turns.
    Several groups need a torch.distributed.PrefixStore each.

    bind: this rank's address, at which the others reach it. timeout: seconds that a rank waits for another's message.
    Raises DeviceError.
    """
    try:
        # Of sums: the connections must outlive one that is late.
        group = open_gloo(store, rank, ranks, bind=bind, timeout=timeout + GRACE)
        return Messages(group, rank, ranks, timeout)
    except RuntimeError as error:
        raise DeviceError(f"rank {rank} cannot join the {ranks} ranks from {bind}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Pending:
    """A seam in flight: what was asked of the others, and what was sent to them and must stay as it is."""

    join: Join
    plans: list[Message]
    parts: dict[int, Message]
    sent: list[Message]


class DistributedCollective:
    """One rank. In two rounds: reduce-scatter, the owner's work, all-gather; a rank of W sends 2 (W - 1) / W of the
    bytes of all rows, as in an all-reduce. Or in one round, for few rows. The bits are the same."""

    def __init__(self, messages: Messages, join_rows: JoinRows, *, capacity: int, one_round: bool = False) -> None:
        """messages: of `connect`. capacity: the most bytes of partial sums that one rank gives to another in a seam,
        the same on all ranks; memory is taken as it is used.

        one_round: every rank sends all its partial sums to all, and each sums and normalises all rows for itself. That
        is W - 1 times the bytes of all rows (for two ranks: no more than else), but one latency less.
        """
        self.rank, self.ranks = messages.rank, messages.ranks
        self._messages = messages
        self._join_rows = join_rows
        self._room = torch.empty((self.ranks, -(-capacity // 64) * 64), dtype=torch.uint8)
        self._one_round = one_round

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return self._share(self.rank, bounds)

    def start(self, join: Join) -> _Pending:
        partial, messages = join.partial, self._messages
        check(join, self.rank, self.ranks, self.owned(join.bounds))
        shares = {rank: partial[slice(*self._share(rank, join.bounds))] for rank in range(self.ranks)}
        largest = max(share.nbytes for share in shares.values())
        if largest > self._room.shape[1]:
            raise ValueError(f"{largest} bytes for one rank are more than the capacity of {self._room.shape[1]}")
        messages.begin()
        plans, sent = messages.exchange(plan_of(join), len(partial))
        parts = {}
        if len(shares[self.rank]):
            parts = {rank: messages.receive(self._room[rank], rank, Tag.PART) for rank in messages.others}
        sent += [messages.send(shares[rank], rank, Tag.PART) for rank in messages.others if len(shares[rank])]
        return _Pending(join, plans, parts, sent)

    def finish(self, pending: _Pending) -> Joined:
        join, messages = pending.join, self._messages
        messages.compare(pending.plans, pending.sent)
        wire = self._wire(join)
        coming = self._ask(wire, join.bounds)
        rows, residual = self._join_rows(self._parts(pending), join.residual, join.weight, join.eps, join.quantise)
        sent = [] if self._one_round or not len(rows) else [messages.send(rows, to, Tag.ROWS) for to in messages.others]
        wire[slice(*self.owned(join.bounds))] = rows
        messages.wait([*coming, *sent, *pending.sent])
        return arrived(wire, join, residual)

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return self._messages.gather(rows)

    def close(self) -> None:
        self._messages.close()

    def _share(self, rank: int, bounds: tuple[int, ...]) -> tuple[int, int]:
        """The rows that a rank sums."""
        return (0, bounds[-1]) if self._one_round else (bounds[rank], bounds[rank + 1])

    def _ask(self, wire: torch.Tensor, bounds: tuple[int, ...]) -> list[Message]:
        """For the rows that others have joined, into their place."""
        if self._one_round:
            return []
        shares = {rank: wire[bounds[rank] : bounds[rank + 1]] for rank in self._messages.others}
        return [self._messages.receive(share, rank, Tag.ROWS) for rank, share in shares.items() if len(share)]

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
        self._messages.wait(pending.parts.values())
        return [
            own if rank == self.rank else self._room[rank, : own.nbytes].view(own.dtype).view(own.shape)
            for rank in range(self.ranks)
        ]


@dataclass(frozen=True, slots=True)
class _Summing:
    """A seam in flight. plans: asked and sent, where they are to be compared first. work: of `total`, if it is on its
    way."""

    join: Join
    plan: tuple[Any, ...]
    plans: tuple[list[Message], list[Message]] | None
    total: torch.Tensor
    work: Any


class AllReduceCollective:
    """The plain baseline: every rank sums all rows, normalises them all and keeps the whole residual. Its bits are not
    those of the other collectives: the all-reduce has its own order, and rounds to the dtype of the partial sums.

    Plans are compared only where they are not those of the seam before, and after a gather, which ends a step: a few
    times in a step, and no sum waits for it elsewhere. A rank that thinks otherwise sends a plan and sums nothing; the
    others, who wait for it, then find that.
    """

    def __init__(self, messages: Messages, join_rows: JoinRows) -> None:
        self.rank, self.ranks = messages.rank, messages.ranks
        self._messages = messages
        self._join_rows = join_rows
        self._agreed: tuple[Any, ...] | None = None
        self._patience = messages.timeout + GRACE  # the others may wait for a sum first

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return 0, bounds[-1]

    def start(self, join: Join) -> _Summing:
        check(join, self.rank, self.ranks, self.owned(join.bounds))
        self._messages.begin()
        plan = plan_of(join)
        if plan != self._agreed:
            return _Summing(join, plan, self._messages.exchange(plan, len(join.partial)), join.partial, None)
        return self._sum(join, plan)

    def finish(self, pending: _Summing) -> Joined:
        join = pending.join
        if pending.plans is not None:
            self._messages.compare(*pending.plans, self._patience)
            self._agreed = pending.plan
            pending = self._sum(join, pending.plan)
        if pending.work is not None:
            self._messages.wait_sum(pending.work, pending.plan, len(join.partial))
        rows, residual = self._join_rows([pending.total], join.residual, join.weight, join.eps, join.quantise)
        return arrived(rows, join, residual)

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        self._agreed = None
        return self._messages.gather(rows, self._patience)

    def close(self) -> None:
        self._messages.close()

    def _sum(self, join: Join, plan: tuple[Any, ...]) -> _Summing:
        if not join.partial.numel():
            return _Summing(join, plan, None, join.partial, None)
        total = join.partial.clone()
        return _Summing(join, plan, None, total, self._messages.begin_sum(total))
