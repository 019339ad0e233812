"""How long a step takes, on a device that exists only on paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from weft.core.plan import Plan


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of a step, on the whole device and alone.

    fixed: whatever the share (launches, sampling). per_token: arithmetic, for each token that is computed; takes 1 /
    share as long on a share. weights, per_context: memory, to read the weights once and each KV slot; a share of
    `saturation` has all of the memory's bandwidth, a smaller one its part of it. contention: how much longer memory
    takes beside a rival with the whole device, in proportion to the rival's share. per_copied: a link, for each KV slot
    that goes from the prefill to the decode phase's pool.

    Shares that add up to more than the device (lanes on the same cores) shrink in proportion while both compute.
    """

    fixed: float = 0.0
    per_token: float = 0.0
    per_context: float = 0.0
    weights: float = 0.0
    saturation: float = 1.0
    contention: float = 0.0
    per_copied: float = 0.0

    def seconds(self, plan: Plan, share: float = 1.0, rival: float = 0.0) -> float:
        """share: the lane's part of the device, in (0, 1]. rival: that of a lane which computes beside it, or 0.
        Each part of a step that is cut costs `fixed` anew."""
        context = sum([piece.start + len(piece.tokens) for piece in plan.slices])
        own = share / max(1.0, share + rival)
        memory = (self.weights + self.per_context * context) / min(1.0, own / self.saturation)
        work = self.per_token * plan.tokens / own + memory * (1.0 + self.contention * rival)
        copied = sum([piece.start for piece in plan.slices if piece.source]) if self.per_copied else 0
        return self.fixed + self.per_copied * copied + work / plan.parts

    def repeated(self, plan: Plan) -> list[float]:
        """As `Cost.repeated`."""
        return one_by_one(self.seconds, plan)


def one_by_one(seconds: Callable[[Plan], float], plan: Plan) -> list[float]:
    """Of each time that a plan is carried out: every slice is one position further than the time before."""
    pieces = [[piece._replace(start=piece.start + time) for piece in plan.slices] for time in range(plan.repeats)]
    return [seconds(replace(plan, slices=tuple(slices), repeats=1)) for slices in pieces]


FREE = CostModel()
# A small model on a small accelerator: 2 ms for a step, 20k tokens/s of prefill.
SMALL = CostModel(fixed=2e-3, per_token=50e-6, per_context=0.1e-6)
