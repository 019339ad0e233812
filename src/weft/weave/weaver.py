"""Drives the strands of one rank: while one strand computes, the other's seam is on its way.

    compute   a₁      b₁      a₂      b₂      a₃  ...        aₙ: strand a's n-th stage
    seams         a₁      b₁      a₂      b₂                  each begins when its stage ends, and is waited for
                                                              before the stage of its strand that follows

There is one thread that computes, and one seam in flight (tokenweave.md §6). Strand a is always a stage ahead: so the
keys and values of a prompt's first part are there when its second part attends in the same layer. With one strand this
is the fused mode: every seam is waited for at once. Which strands there are, and how they are cut, is the same on all
ranks; so the seams come in the same order everywhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch

from weft.weave.collective import Collective, Join, Quantise
from weft.weave.seam import Joined, Seam, Strand
from weft.weave.split import even_bounds, kept_bounds


def no_format(_packed: Any) -> Quantise | None:
    """Rows travel in the model's dtype."""
    return None


class _Thread:
    """A strand: who owns its rows, what its last seam gave (None before the first stage), and its value at the end."""

    def __init__(self, strand: Strand) -> None:
        self.bounds: tuple[int, ...] = ()
        self.joined: Joined | None = None
        self.value: torch.Tensor | None = None
        self._strand = strand

    def stage(self) -> Seam | None:
        """Compute up to the next seam; None at the end."""
        try:
            return next(self._strand) if self.joined is None else self._strand.send(self.joined)
        except StopIteration as end:
            self.value = end.value
            return None


class _Flight:
    """The seam on its way, if there is one, and the strand that it belongs to."""

    def __init__(self, collective: Collective) -> None:
        self.thread: _Thread | None = None
        self._collective = collective
        self._pending: Any = None

    def start(self, thread: _Thread, join: Join) -> None:
        self._pending = self._collective.start(join)
        self.thread = thread

    def land(self) -> None:
        """Wait for it. There may be none."""
        if self.thread is not None:
            thread, self.thread = self.thread, None
            joined = self._collective.finish(self._pending)
            thread.joined = joined.hidden, joined.residual


class Weaver:
    """Carries out the strands of this rank through its group.

    formats: how rows travel to a packed linear that alone reads them.
    """

    def __init__(self, collective: Collective, formats: Callable[[Any], Quantise | None] = no_format) -> None:
        self._collective = collective
        self._formats = formats

    def weave(self, strands: Sequence[Strand]) -> list[torch.Tensor]:
        """Drive one strand, or two, to the end. Returns their values.

        Raises what a stage raises, once the seam in flight has ended: the other ranks wait for this one's part.
        """
        threads = [_Thread(strand) for strand in strands]
        flight = _Flight(self._collective)
        try:
            while any(thread.value is None for thread in threads):
                for thread in threads:
                    if thread.value is None:
                        self._advance(thread, flight)
        finally:
            flight.land()
        return [thread.value for thread in threads if thread.value is not None]

    def _advance(self, thread: _Thread, flight: _Flight) -> None:
        """One stage of a strand, and the start of the seam after it."""
        if flight.thread is thread:
            flight.land()
        seam = thread.stage()
        if seam is None:
            return
        flight.land()
        join = self._join(thread, seam)
        if len(seam.partial):
            flight.start(thread, join)
        else:  # no row of this strand goes on; all ranks know, so that none waits for another
            thread.joined = seam.partial, seam.partial

    def _join(self, thread: _Thread, seam: Seam) -> Join:
        residual = seam.residual
        if residual is None:
            thread.bounds = even_bounds(len(seam.partial), self._collective.ranks)
        elif seam.kept is not None and seam.kept.kept is not None:
            kept = seam.kept.kept.tolist()
            first, end = self._collective.owned(thread.bounds)
            thread.bounds = kept_bounds(thread.bounds, kept)
            own = kept[bisect_left(kept, first) : bisect_left(kept, end)]
            residual = residual[[row - first for row in own]]
        return Join(
            partial=seam.partial,
            residual=residual,
            weight=seam.weight,
            eps=seam.eps,
            bounds=thread.bounds,
            replicated=residual is None,
            quantise=None if seam.reader is None else self._formats(seam.reader),
        )
