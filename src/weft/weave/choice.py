"""Whether to weave: the seconds of a step in each mode, from what was measured at start-up.

Stages and seams alternate. In one strand each seam is waited for, so that times add up. Woven, stage i of one strand
and the seam before it, which is the other strand's, go side by side:

    max(stage, seam) + drag * min(stage, seam)        drag 0: side by side at no cost; 1: as if one after the other

The digest's break-even (tokenweave.md §9) is contained in it: what is hidden must be worth more than what two halves
cost over one whole, in stages (the split tax) and in seams (a latency does not halve). Where a halved seam costs as
much as a whole one, weaving loses, and is not chosen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

GAIN = 0.03  # of a step's time that a less simple mode must be expected to save: measurements have errors


class Mode(str, Enum):
    """How the seams of a step are carried out.

    plain: one strand; every rank sums and normalises all rows (AllReduce + RMSNorm). one-shot: likewise, but every rank
    sends all it has to all others: more bytes among more than two ranks, and one latency instead of two. fused: one
    strand; each rank sums and normalises its own rows, which are then gathered. woven: two strands; the fused seam of
    one is on its way while the other computes.
    """

    PLAIN = "plain"
    ONE_SHOT = "one-shot"
    FUSED = "fused"
    WOVEN = "woven"


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by tokens, through measured points in ascending order: straight between them and beyond the last, level
    before the first, which is the latency floor."""

    points: tuple[tuple[int, float], ...]

    def __call__(self, tokens: float) -> float:
        points = self.points
        if tokens <= points[0][0] or len(points) == 1:
            return points[0][1]
        at = min(bisect_right(points, (tokens, float("inf"))), len(points) - 1)
        (left, low), (right, high) = points[at - 1], points[at]
        return low + (high - low) * (tokens - left) / (right - left)


@dataclass(frozen=True, slots=True)
class Costs:
    """What one layer costs on the slowest rank. attend, feed: its two stages. seams: one with nothing beside it, in
    each mode of one strand that there is; fused is always among them. drag: of a fused seam beside a stage; None where
    none can be."""

    layers: int
    attend: Curve
    feed: Curve
    seams: Mapping[Mode, Curve]
    drag: float | None

    def seconds(self, mode: Mode, tokens: int, prefix: int) -> float:
        """Of a step of so many tokens, of which `prefix` are the first strand's, where there are two."""
        if mode is Mode.WOVEN and self.drag is not None and 0 < prefix < tokens:
            return self._woven(prefix, tokens - prefix, self.drag)
        seam = self.seams[mode]
        return self.layers * (self.attend(tokens) + self.feed(tokens) + 2 * seam(tokens))

    def _woven(self, prefix: int, suffix: int, drag: float) -> float:
        """Each stage beside the other strand's seam; the last seam of the second strand beside nothing."""
        before, after = self.seams[Mode.FUSED](prefix), self.seams[Mode.FUSED](suffix)
        pairs = (
            (self.attend(prefix), after),
            (self.attend(suffix), before),
            (self.feed(prefix), after),
            (self.feed(suffix), before),
        )
        layer = sum(max(pair) + drag * min(pair) for pair in pairs)
        return self.layers * layer + after


def choose_mode(costs: Costs, tokens: int, prefix: int) -> Mode:
    """The mode that a step had best be carried out in: a less simple one only where it is expected to gain.

    prefix: tokens of the first strand, if the step were woven; all of them where it cannot be cut.
    """
    best, *rivals = [mode for mode in Mode if mode in costs.seams]
    if costs.drag is not None and 0 < prefix < tokens:
        rivals.append(Mode.WOVEN)
    for rival in rivals:
        if costs.seconds(rival, tokens, prefix) <= (1 - GAIN) * costs.seconds(best, tokens, prefix):
            best = rival
    return best


def slowest(measured: Sequence[Sequence[float]]) -> list[float]:
    """Of each number the largest that any rank has measured: what all ranks go by, so that all decide alike."""
    return [max(values) for values in zip(*measured, strict=True)]
