"""Whether to weave: the seconds of a step in each mode, from what was measured at start-up.

Stages and seams alternate. In one strand each seam is waited for, so that times add up. Woven, the stages of one strand
and the seams of the others go side by side: a stage begins when the one before it has ended and the seam of its strand
has come, a seam when its stage and the seam before it have ended. While they go side by side, both take longer:

    max(stage, seam) + drag * min(stage, seam)        drag 0: side by side at no cost; 1: as if one after the other

The digest's break-even (tokenweave.md §9) is contained in it: what is hidden must be worth more than what parts cost
over one whole, in stages (the split tax) and in seams (a latency does not halve). Where a halved seam costs as much as
a whole one, weaving loses, and is not chosen.

Of a mixture of experts the second stage takes nearly as long for a part of the rows as for all, since a part takes most
of the experts, too. Strands that rejoin there wait for all of their seams instead, and then compute it once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

FEW = 3  # layers after which each takes as long as the last
GAIN = 0.03  # of a step's time that a less simple mode must be expected to save: measurements have errors


class Mode(str, Enum):
    """How the seams of a step are carried out.

    plain: one strand; every rank sums and normalises all rows (AllReduce + RMSNorm). one-shot: likewise, but every rank
    sends all it has to all others: more bytes among more than two ranks, and one latency instead of two. fused: one
    strand; each rank sums and normalises its own rows, which are then gathered. woven: two strands or more; the fused
    seams of some are on their way while another computes. rejoined: woven, but experts are computed once, for all
    strands; their seams are on their way beside attention only.
    """

    PLAIN = "plain"
    ONE_SHOT = "one-shot"
    FUSED = "fused"
    WOVEN = "woven"
    REJOINED = "rejoined"

    @property
    def seams(self) -> Mode:
        """The mode whose collective carries out its seams."""
        return Mode.WOVEN if self is Mode.REJOINED else self


COLLECTIVES = tuple(mode for mode in Mode if mode.seams is mode)  # the modes that have one of their own


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
    none can be. program: stages and seams of the layer in a fused step that is one program, which steps up to its last
    point are. mixed: whether `feed` is that of experts, where strands may rejoin."""

    layers: int
    attend: Curve
    feed: Curve
    seams: Mapping[Mode, Curve]
    drag: float | None
    program: Curve | None = None
    mixed: bool = False

    def seconds(self, mode: Mode, strands: Sequence[int]) -> float:
        """Of a step whose strands would have so many tokens each, if it were woven."""
        if mode.seams is Mode.WOVEN and self.drag is not None and len(strands) > 1:
            return self._woven(strands, self.drag, rejoin=mode is Mode.REJOINED)
        seam, tokens = self.seams[mode], sum(strands)
        if mode is Mode.FUSED and self.program is not None and tokens <= self.program.points[-1][0]:
            return self.layers * self.program(tokens)
        return self.layers * (self.attend(tokens) + self.feed(tokens) + 2 * seam(tokens))

    def _woven(self, strands: Sequence[int], drag: float, *, rejoin: bool) -> float:
        """By the clock, for a few layers; those that follow take as long as the last of them."""
        seams = [self.seams[Mode.FUSED](own) for own in strands]
        stages = [[self.attend(own) for own in strands]]
        if not rejoin:
            stages.append([self.feed(own) for own in strands])
        now = before = 0.0
        come = [0.0] * len(strands)  # when the last seam of each strand ends
        few = min(self.layers, FEW)
        for _ in range(few):
            before = now
            for stage in stages:
                for strand, seam in enumerate(seams):
                    begun = max(now, come[strand])
                    beside = drag * min(stage[strand], max(0.0, max(come) - begun))
                    now = begun + stage[strand] + beside
                    come = [end + beside if end > begun else end for end in come]
                    come[strand] = max(now, *come) + seam
            if rejoin:  # with nothing beside it: all seams have come, and the next begin when it ends
                now = max(now, *come) + self.feed(sum(strands))
                for strand, seam in enumerate(seams):
                    come[strand] = max(now, *come) + seam
        return max(now, *come) + (self.layers - few) * (now - before)


def choose_mode(costs: Costs, tokens: int, cuts: Sequence[tuple[int, ...]] = ()) -> tuple[Mode, tuple[int, ...]]:
    """The mode that a step had best be carried out in, and the tokens of its strands: a less simple one only where it
    is expected to gain.

    cuts: the strands that it may be woven in, fewer first; one that is not cut is no choice.
    """
    ways: list[tuple[Mode, tuple[int, ...]]] = [(mode, (tokens,)) for mode in Mode if mode in costs.seams]
    if costs.drag is not None:
        woven = [Mode.WOVEN, Mode.REJOINED] if costs.mixed else [Mode.WOVEN]
        ways += [(mode, strands) for mode in woven for strands in cuts if len(strands) > 1]
    best = ways[0]
    for rival in ways[1:]:
        if costs.seconds(*rival) <= (1 - GAIN) * costs.seconds(*best):
            best = rival
    return best


def slowest(measured: Sequence[Sequence[float]]) -> list[float]:
    """Of each number the largest that any rank has measured: what all ranks go by, so that all decide alike."""
    return [max(values) for values in zip(*measured, strict=True)]
