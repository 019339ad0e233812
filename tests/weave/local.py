"""Collectives within one process: a rank that is alone, and ranks that are threads. They are the truth that those of
weft are compared with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from weft.errors import RankLost
from weft.weave.collective import Join, Joined, check, plan_of
from weft.weave.rows import JoinRows, arrived


class Alone:
    """The only rank: what `Kernels.add_rms_norm` gives."""

    rank, ranks = 0, 1

    def __init__(self, join_rows: JoinRows) -> None:
        self._join_rows = join_rows

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return bounds[0], bounds[1]

    def start(self, join: Join) -> Join:
        check(join, 0, 1, self.owned(join.bounds))
        return join

    def finish(self, pending: Join) -> Joined:
        rows, residual = self._join_rows(
            [pending.partial], pending.residual, pending.weight, pending.eps, pending.quantise
        )
        return arrived(rows, pending, residual)

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [rows]

    def close(self) -> None:
        pass


class Threads:
    """What the ranks of one process share. Each rank's `ThreadCollective` belongs to one thread.

    pause: called with (rank, number of the seam, "start" or "finish") where a rank could be late: a test sleeps there.
    """

    def __init__(
        self,
        ranks: int,
        join_rows: JoinRows,
        *,
        timeout: float = 10.0,
        pause: Callable[[int, int, str], None] = lambda _rank, _seam, _stage: None,
    ) -> None:
        self.ranks = ranks
        self.join_rows = join_rows
        self.timeout = timeout
        self.pause = pause
        self.left: set[int] = set()
        self._given: list[tuple[int, Any]] = [(0, None)] * ranks  # of each rank: seams given, and the last of them
        self._joined: list[tuple[int, Any]] = [(0, None)] * ranks
        self._changed = threading.Condition()

    def collectives(self) -> list[ThreadCollective]:
        """One for each rank, in order."""
        return [ThreadCollective(self, rank) for rank in range(self.ranks)]

    def give(self, rank: int, seam: int, value: Any) -> None:
        with self._changed:
            self._given[rank] = (seam, value)
            self._changed.notify_all()

    def given(self, seam: int) -> list[Any]:
        return self._wait(self._given, seam)

    def join(self, rank: int, seam: int, value: Any) -> list[Any]:
        with self._changed:
            self._joined[rank] = (seam, value)
            self._changed.notify_all()
        return self._wait(self._joined, seam)

    def leave(self, rank: int) -> None:
        with self._changed:
            self.left.add(rank)
            self._changed.notify_all()

    def _wait(self, values: list[tuple[int, Any]], seam: int) -> list[Any]:
        def missing() -> list[int]:
            return [rank for rank, (number, _) in enumerate(values) if number < seam]

        with self._changed:
            in_time = self._changed.wait_for(lambda: not missing() or self.left & set(missing()), self.timeout)
            if late := missing():
                why = "has left" if in_time else f"did not come within {self.timeout:g} s"
                raise RankLost(f"seam {seam}: rank {' and '.join(map(str, late))} {why}")
            return [value for _, value in values]


class ThreadCollective:
    """One rank of a `Threads`: it gives its part, joins its own rows once all have given, and takes what all joined.
    Nothing is overwritten too early: a rank joins the next seam once all have given that, so after they took this."""

    def __init__(self, group: Threads, rank: int) -> None:
        self.rank, self.ranks = rank, group.ranks
        self._group = group
        self._seam = 0

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return bounds[self.rank], bounds[self.rank + 1]

    def start(self, join: Join) -> Join:
        check(join, self.rank, self.ranks, self.owned(join.bounds))
        self._give("start", plan_of(join), join.partial)
        return join

    def finish(self, pending: Join) -> Joined:
        first, end = self.owned(pending.bounds)
        parts = [part[first:end] for part in self._given(plan_of(pending))]
        rows, residual = self._group.join_rows(parts, pending.residual, pending.weight, pending.eps, pending.quantise)
        return arrived(torch.cat(self._join(rows)), pending, residual)

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        plan = ("gather", tuple(rows.shape), str(rows.dtype))
        self._give("start", plan, None)
        self._given(plan)
        return [part.clone() for part in self._join(rows)]

    def close(self) -> None:
        self._group.leave(self.rank)

    def _give(self, stage: str, plan: tuple[Any, ...], part: torch.Tensor | None) -> None:
        self._seam += 1
        self._group.pause(self.rank, self._seam, stage)
        self._group.give(self.rank, self._seam, (plan, part))

    def _given(self, plan: tuple[Any, ...]) -> list[Any]:
        self._group.pause(self.rank, self._seam, "finish")
        given = self._group.given(self._seam)
        for rank, (other, _) in enumerate(given):
            if other != plan:
                self.close()
                raise RankLost(f"seam {self._seam}: rank {rank} came with another plan: {other}, here {plan}")
        return [part for _, part in given]

    def _join(self, rows: torch.Tensor) -> list[Any]:
        return self._group.join(self.rank, self._seam, rows)
