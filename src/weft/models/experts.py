"""The feed of a layer with experts, out of the kernels that every layer has.

    hidden ─▶ router ─▶ softmax, the best few ─▶ of each row: experts and their weights                     route
    hidden ─▶ the rows of one expert ─▶ gate_up ─▶ silu · mul ─▶ down ─▶ · weight ─▶ sum of the rows        mix

Invariant (kernels/base.py): each row's bits depend on that row alone. The kernels keep it; what torch does here keeps
it where it goes row by row, in one order, or rounds each value correctly. So a row's experts are added in ascending
order, whichever have other rows too, and no function that torch approximates (a sigmoid) is computed across rows: where
the vectors of such a loop end depends on the number of rows, and what is behind them is approximated in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from weft.kernels.base import Kernels
from weft.models.mixtures import ROUTERS, SHARED, SHARED_GATE, Experts, expert_names


@dataclass(frozen=True, slots=True)
class Mixture:
    """One layer's packed linears: the router's, those of each expert by its number, and those of the shared expert,
    which are None where there is none. experts: as many as the linears are for, so of a rank its own part."""

    experts: Experts
    router: Any
    gate_up: tuple[Any, ...]
    down: tuple[Any, ...]
    shared_gate: Any = None
    shared_gate_up: Any = None
    shared_down: Any = None


def route(logits: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [T, count] -> the weights, float32 [T, active], and the numbers, int64 [T, active], of the experts that
    each row takes, the greatest weight first."""
    weights, chosen = logits.softmax(dim=1).topk(experts.active, dim=1)
    if experts.normalised:
        weights = weights / weights.cumsum(dim=1)[:, -1:]  # which adds one by one, however many rows there are
    return weights, chosen


def mix(hidden: torch.Tensor, mixture: Mixture, kernels: Kernels) -> torch.Tensor:
    """[T, D] -> partial [T, D], summed in float32 and rounded once. T may be 0."""
    experts = mixture.experts
    weights, chosen = route(kernels.linear(hidden, mixture.router, torch.float32), experts)
    by_expert = chosen.flatten().argsort(stable=True)  # so the rows of each expert are in order
    counts = chosen.flatten().bincount(minlength=experts.count).tolist()
    rows = torch.split(by_expert // experts.active, counts)
    shares = torch.split(weights.flatten()[by_expert].unsqueeze(1), counts)
    total = torch.zeros(hidden.shape, dtype=torch.float32)
    for expert, (own, share) in enumerate(zip(rows, shares, strict=True)):
        if len(own):
            taken = hidden.index_select(0, own)
            given = _feed(taken, mixture.gate_up[expert], mixture.down[expert], kernels)
            total.index_add_(0, own, given.mul_(share))
    if experts.shared:
        given = _feed(hidden, mixture.shared_gate_up, mixture.shared_down, kernels)
        total.add_(given.mul_(_sigmoid(kernels.linear(hidden, mixture.shared_gate, torch.float32))))
    return total.to(hidden.dtype)


def take_mixture(
    take: Callable[[Sequence[str]], dict[str, torch.Tensor]],
    prefix: str,
    family: str,
    experts: Experts,
    kernels: Kernels,
    dtype: torch.dtype,
) -> Mixture:
    """Packed from the tensors that `take` gives by their names, which begin with `prefix`: one expert after the other,
    so that no more of them is held than one."""

    def pack(*linears: Sequence[str]) -> list[Any]:
        """Each of these, whose names' outputs come one after the other."""
        tensors = take([f"{prefix}{name}.weight" for names in linears for name in names])
        parts = [[tensors.pop(f"{prefix}{name}.weight").to(dtype) for name in names] for names in linears]
        return [kernels.pack_linear(torch.cat(part)) for part in parts]

    (router,) = pack([ROUTERS[family]])
    packed = [pack([gate, up], [down]) for gate, up, down in (expert_names(family, at) for at in range(experts.count))]
    mixture = Mixture(experts, router, tuple(gate_up for gate_up, _ in packed), tuple(down for _, down in packed))
    if not experts.shared:
        return mixture
    gate, up, down = SHARED
    shared_gate, shared_gate_up, shared_down = pack([SHARED_GATE], [gate, up], [down])
    return replace(mixture, shared_gate=shared_gate, shared_gate_up=shared_gate_up, shared_down=shared_down)


def _feed(x: torch.Tensor, gate_up: Any, down: Any, kernels: Kernels) -> torch.Tensor:
    """[R, D] -> float32 [R, D], a tensor of its own."""
    return kernels.linear(kernels.silu_mul(kernels.linear(x, gate_up), down), down, torch.float32)


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    """float32 [T, 1] -> the same: e^x / (e^x + e^0), since torch takes a softmax row by row."""
    return torch.cat((x, torch.zeros_like(x)), dim=1).softmax(dim=1)[:, :1]
