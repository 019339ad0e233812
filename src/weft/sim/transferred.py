"""Decode replicas of PD disaggregation: they get the KV of a prompt, and compute none of it.

The scheduler knows no KV that comes from elsewhere. So it plans the prompt as always, with all its blocks, and the cost
counts only its last token: the step in which a prompt arrives costs what a decode step costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from weft.core.plan import Plan, Slice
from weft.devices.virtual import Cost
from weft.sim.replica import Setup


@dataclass(frozen=True, slots=True)
class Transferred:
    """The cost of a step of which all tokens of a slice but its last one are there already."""

    cost: Cost

    def seconds(self, plan: Plan, share: float = 1.0, rival: float = 0.0) -> float:
        return self.cost.seconds(replace(plan, slices=tuple(map(_last, plan.slices))), share, rival)

    def repeated(self, plan: Plan) -> list[float]:
        return self.cost.repeated(plan)


def received(setup: Setup) -> Setup:
    """The same replica, for requests whose prompts others have computed. A step takes as many tokens as can come."""
    config, capacity = setup.config, setup.capacity
    most = capacity.max_model_len * capacity.max_slices
    return Setup(
        replace(config, partition="off", slo_ttft=None, slo_tpot=None, max_num_batched_tokens=most),
        replace(capacity, max_tokens=most),
        Transferred(setup.cost),
    )


def _last(piece: Slice) -> Slice:
    if len(piece.tokens) == 1:
        return piece
    return piece._replace(start=piece.end - 1, tokens=piece.tokens[-1:])
