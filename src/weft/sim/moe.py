"""How long the experts of a layer take: the weights of those that have tokens, and the arithmetic of the tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from weft.sim.gemm import OUTPUT_BITS, Operands
from weft.sim.hardware import MoeFit, Part

COLUMNS = 128  # of the intermediate state in a tile, which is filled up
BETWEEN = 6  # times that as much as the intermediate state is read or written: two halves, the gate, its product


def active_experts(experts: Any, top_k: Any, tokens: Any) -> Any:
    """How many of the experts have a token, on average, when every token takes `top_k` of them at random."""
    return experts * (1.0 - (1.0 - top_k / experts) ** tokens)


def moe_seconds(
    fit: MoeFit,
    part: Part,
    tokens: Any,
    hidden: Any,
    intermediate: Any,
    experts: Any,
    top_k: Any,
    operands: Operands,
) -> Any:
    """Of both products (three matrices) of all experts. intermediate: of one expert, on one rank.
    experts: on this rank. top_k: of them that a token takes, which may be less than one where experts are spread over
    ranks. Arithmetic and memory take turns, as in measured times: few tiles of an expert are there to overlap."""
    active = active_experts(experts, top_k, tokens)
    rows = tokens * top_k
    weights = 3.0 * hidden * intermediate
    between = BETWEEN * intermediate * OUTPUT_BITS
    moved = (active * weights * operands.weights + rows * (hidden * (operands.inputs + OUTPUT_BITS) + between)) / 8
    compute = 6.0 * hidden * np.ceil(intermediate / COLUMNS) * COLUMNS * rows / (part.flops * fit.math)
    memory = moved / (fit.dram * part.bandwidth)
    return fit.launch + active * fit.expert + compute + memory
