"""Whose turn it is when two lanes share a device by time: the one that has had less of it, for its part.

Every lane has a clock that runs at 1 / part while the lane computes; the lane that is behind goes next (stride
scheduling). A lane without work saves nothing up: when it comes back, it starts where the other one is.
"""

from __future__ import annotations

from weft.core.plan import Lane, Partition


class Turns:
    """parts: of the time, for the prefill and the decode lane."""

    def __init__(self, parts: Partition) -> None:
        self._parts = {Lane.PREFILL: parts.prefill, Lane.DECODE: parts.decode}
        self._clocks = {Lane.PREFILL: 0.0, Lane.DECODE: 0.0}
        self._last: Lane | None = None

    def order(self) -> tuple[Lane, Lane]:
        """Who is asked first, and who gets the turn if that one has nothing to do. Decode first where they are even."""
        if self._clocks[Lane.PREFILL] < self._clocks[Lane.DECODE]:
            return Lane.PREFILL, Lane.DECODE
        return Lane.DECODE, Lane.PREFILL

    def used(self, lane: Lane, seconds: float) -> None:
        """A lane had a turn. The other one gets no credit for having let it pass for want of work."""
        first = self.order()[0]
        if lane is not first:
            self._clocks[first] = max(self._clocks[first], self._clocks[lane])
        self._clocks[lane] += seconds / self._parts[lane]
