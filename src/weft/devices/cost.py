"""How long a step takes, on a device that exists only on paper."""

from __future__ import annotations

from dataclasses import dataclass

from weft.core.plan import Plan


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of a step: `fixed`, and on the whole device `per_token` for each token that is computed and
    `per_context` for each KV slot that is read. A lane with a part of the device's shares takes longer accordingly."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_context: float = 0.0

    def seconds(self, plan: Plan, share: float = 1.0) -> float:
        """share: the lane's part of the device, in (0, 1]."""
        context = sum(piece.end for piece in plan.slices)
        return self.fixed + (self.per_token * plan.tokens + self.per_context * context) / share


FREE = CostModel()
# A small model on a small accelerator: 2 ms for a step, 20k tokens/s of prefill.
SMALL = CostModel(fixed=2e-3, per_token=50e-6, per_context=0.1e-6)
