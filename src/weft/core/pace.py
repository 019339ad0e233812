"""How fast the lanes go, from the seconds of their results: so that prefill leaves decode the blocks to grow."""

from __future__ import annotations

import math

from weft.core.plan import Lane, Plan

# Weight of the newest step in the running means.
NEWEST = 0.2
# Steps of growth that are kept free at most: more would keep the pool empty for a prompt that takes minutes.
LEASE_MOST = 256


class Pace:
    """Running means of a decode step, and of a token of a prompt, on lanes of their own."""

    def __init__(self) -> None:
        self._step = 0.0
        self._token = 0.0

    def note(self, plan: Plan, seconds: float) -> None:
        if seconds <= 0:
            return
        if plan.lane is Lane.PREFILL:
            self._token = _mean(self._token, seconds / plan.tokens)
        elif plan.lane is Lane.DECODE and plan.tokens == len(plan.slices):
            self._step = _mean(self._step, seconds)

    def decode_steps(self, tokens: int) -> int:
        """Decode steps that are likely to be taken while a prompt of so many tokens is prefilled; at least 1."""
        if not self._step or not self._token:
            return 1
        return max(1, min(LEASE_MOST, math.ceil(tokens * self._token / self._step)))


def _mean(before: float, value: float) -> float:
    return value if not before else before + NEWEST * (value - before)
