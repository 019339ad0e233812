"""How long the experts of a layer take: the weights of those that have tokens, and rows that are filled up for each."""

from __future__ import annotations

from typing import Any

import numpy as np

from weft.sim.gemm import OUTPUT_BITS, Operands
from weft.sim.hardware import MoeFit, Part


def active_experts(experts: int, top_k: float, tokens: Any) -> Any:
    """How many of the experts have a token, on average, when every token takes `top_k` of them at random."""
    return experts * (1.0 - (1.0 - top_k / experts) ** tokens)


def moe_seconds(
    fit: MoeFit,
    part: Part,
    tokens: Any,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: float,
    operands: Operands,
) -> Any:
    """Of both products (three matrices) of all experts. intermediate: of one expert, on one rank.
    experts: on this rank. top_k: of them that a token takes, which may be less than one where experts are spread over
    ranks. Never less than operations and bytes take at the peaks."""
    active = active_experts(experts, top_k, tokens)
    rows = tokens * top_k
    weights = 3.0 * hidden * intermediate
    flops = 2.0 * weights * rows
    moved = (active * weights * operands.weights + rows * hidden * (operands.inputs + OUTPUT_BITS)) / 8
    compute = 2.0 * weights * (rows + active * fit.pad) / (part.flops * fit.math)
    memory = moved / (fit.dram * part.bandwidth)
    whole = (compute**fit.overlap + memory**fit.overlap) ** (1.0 / fit.overlap)
    least = np.maximum(flops / part.flops, moved / part.bandwidth)
    return fit.launch + active * fit.expert + np.maximum(whole, least)
