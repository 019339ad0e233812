"""Drives the strands of one rank: while one strand computes, the other's seam is on its way.

    compute   a₁      b₁      a₂      b₂      a₃  ...        aₙ: strand a's n-th stage
    seams         a₁      b₁      a₂      b₂                  each begins when its stage ends, and is waited for
                                                              before the stage of its strand that follows

At the first seam of a strand nothing is exchanged, so that it is a part of the first stage: the embedding is the same
on all ranks. Each normalises all of its rows, by the same kernels, and keeps those that it owns; messages would have
nothing beside them. Ranks first meet, and compare what they are about to do, at the seam that follows.

There is one thread that computes, and one seam at a time is carried out (tokenweave.md §6). Strand a is always ahead:
so the keys and values of a prompt's first part are there when its second part attends in the same layer. With one
strand this is the fused mode: every seam is waited for at once. Which strands there are, and how they are cut, is the
same on all ranks; so the seams come in the same order everywhere.

With two strands each seam must be over within the one stage beside it. Attention and its projections are often a
quarter of a layer only, and as many bytes follow it as follow the rest: then a rank waits, though its link is idle half
of the time. With three strands there are two stages in between, so that short stages and long ones even out, if seams
may wait for one another: a communication thread is given the next one before the last has ended.

Where strands rejoin, an operator that they share (the experts of a mixture) is computed once, for the rows of all: at
twice the exposed seams, those of the last strand before it and of the first one after it.

    compute   a₁      b₁              ab₂             a₃      b₃              ab₄
    seams         a₁      b₁              a₂  b₂          a₃      b₃
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from weft.weave.background import Queue
from weft.weave.collective import Collective, Join, Quantise
from weft.weave.seam import Joined, Seam, Shared, Strand
from weft.weave.split import even_bounds, kept_bounds


def no_format(_packed: Any) -> Quantise | None:
    """Rows travel in the model's dtype."""
    return None


class _Thread:
    """A strand: who owns its rows, what its last stop gave (None before the first stage), the operator that it waits
    for together with the others, and its value at the end."""

    def __init__(self, strand: Strand, kept: Sequence[int] | None) -> None:
        self.kept = kept
        self.bounds: tuple[int, ...] = ()
        self.given: Joined | torch.Tensor | None = None
        self.waits: Shared | None = None
        self.value: torch.Tensor | None = None
        self._strand = strand

    def stage(self) -> Seam | Shared | None:
        """Compute up to the next stop; None at the end."""
        try:
            return self._strand.send(self.given)
        except StopIteration as end:
            self.value = end.value
            return None


class _Flight:
    """The seams on their way, in the order in which they were begun, and the strands that they belong to."""

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._begun: deque[tuple[_Thread, Any]] = deque()

    def start(self, thread: _Thread, join: Join) -> None:
        self._begun.append((thread, self._collective.start(join)))

    def land(self, wanted: _Thread | None = None) -> None:
        """Wait until this strand has none; None: until no strand has one."""
        while any(wanted in (None, thread) for thread, _ in self._begun):
            thread, pending = self._begun.popleft()
            joined = self._collective.finish(pending)
            thread.given = joined.hidden, joined.residual


class Weaver:
    """Carries out the strands of this rank through its group.

    begin: what the first seam of a strand gives, all rows of the residual with it, as one rank carries it out
    (`Decoder.join`). formats: how rows travel to a packed linear that alone reads them. rejoin: whether an operator
    that strands can share is computed for all of them at once.
    """

    def __init__(
        self,
        collective: Collective,
        begin: Callable[[Seam], Joined],
        formats: Callable[[Any], Quantise | None] = no_format,
        *,
        rejoin: bool = False,
    ) -> None:
        self._collective = collective
        self._begin = begin
        self._formats = formats
        self._rejoin = rejoin
        self._ahead = isinstance(collective, Queue)

    def weave(self, strands: Sequence[Strand], kept: Sequence[Sequence[int]] | None = None) -> list[torch.Tensor]:
        """Drive these strands to the end. Returns their values.

        kept: of each strand, the rows that its batch keeps, for batches on a device that nobody should wait for.

        Raises what a stage raises, once the seams in flight have ended: the other ranks wait for this one's part.
        """
        known: Sequence[Sequence[int] | None] = [None] * len(strands) if kept is None else kept
        threads = [_Thread(strand, rows) for strand, rows in zip(strands, known, strict=True)]
        flight = _Flight(self._collective)
        try:
            while any(thread.value is None for thread in threads):
                for thread in threads:
                    if thread.value is None:
                        self._advance(thread, flight)
                _share(threads)
        finally:
            flight.land()
        return [thread.value for thread in threads if thread.value is not None]

    def _advance(self, thread: _Thread, flight: _Flight) -> None:
        """One stage of a strand, and the start of the seam after it; or up to where it waits for the others."""
        flight.land(thread)
        while (stop := thread.stage()) is not None:
            if isinstance(stop, Seam) and stop.residual is not None:
                self._start(thread, stop, stop.residual, flight)
                return
            if isinstance(stop, Shared) and self._rejoin:
                thread.waits = stop
                return
            thread.given = self._enter(thread, stop) if isinstance(stop, Seam) else stop.operator(stop.rows)
            del stop  # the next stage needs none of its rows

    def _enter(self, thread: _Thread, seam: Seam) -> Joined:
        """The first seam, at which nothing is exchanged. What is kept is a copy, since it is updated in place; and the
        rows of others need not stay."""
        thread.bounds = even_bounds(len(seam.partial), self._collective.ranks)
        first, end = self._collective.owned(thread.bounds)
        hidden, residual = self._begin(seam)
        return hidden, residual[first:end].clone()

    def _start(self, thread: _Thread, seam: Seam, residual: torch.Tensor, flight: _Flight) -> None:
        if not self._ahead:
            flight.land()
        join = self._join(thread, seam, residual)
        if len(seam.partial):
            flight.start(thread, join)
        else:  # no row of this strand goes on; all ranks know, so that none waits for another
            thread.given = seam.partial, seam.partial

    def _join(self, thread: _Thread, seam: Seam, residual: torch.Tensor) -> Join:
        if seam.kept is not None and seam.kept.kept is not None:
            kept = seam.kept.kept.tolist() if thread.kept is None else thread.kept
            first, end = self._collective.owned(thread.bounds)
            thread.bounds = kept_bounds(thread.bounds, kept)
            own = seam.kept.kept[bisect_left(kept, first) : bisect_left(kept, end)]
            residual = residual.index_select(0, own - first)
        return Join(
            partial=seam.partial,
            residual=residual,
            weight=seam.weight,
            eps=seam.eps,
            bounds=thread.bounds,
            quantise=None if seam.reader is None else self._formats(seam.reader),
        )


def _share(threads: Sequence[_Thread]) -> None:
    """Compute the operator that strands wait for: all of them or none, since they have the same layers."""
    waiting = [(thread, thread.waits) for thread in threads if thread.waits is not None]
    if not waiting:
        return
    rows = [shared.rows for _, shared in waiting]
    together = waiting[0][1].operator(torch.cat(rows) if len(rows) > 1 else rows[0])
    for (thread, _), own in zip(waiting, torch.split(together, [len(each) for each in rows]), strict=True):
        thread.given, thread.waits = own, None
