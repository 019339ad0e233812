"""From float weights to integers: a searched scale for each output and block, and rounding that makes up for errors.

GPTQ: columns are rounded one after the other, and what a rounding did to the outputs is put right as well as possible
in the columns that are still to come. With H = E[x xᵀ] of the inputs and U the upper Cholesky factor of H⁻¹, rounding
column i with the error e costs e / U[i, i] times row i of U in the later columns. The order is that of the prepared
input, so that the outlier blocks, where an error costs most, are rounded first and made up for by all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from weft.comet.packing import BLOCK
from weft.comet.reference import QuantisedLinear

SHRINKS = tuple(1.0 - 0.05 * step for step in range(11))
DAMPING = 0.01  # of the mean of H's diagonal, added to the diagonal
STRONGER = 10.0
STRONGEST = 1.0


@dataclass(frozen=True, slots=True)
class Rounding:
    """outlier_bits: of the weights in the outlier blocks, 4 or 8. compensate: GPTQ, else every weight to its nearest.
    search: try smaller scales than those that clip nothing."""

    outlier_bits: int = 4
    compensate: bool = True
    search: bool = True


def quantise_weight(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hessian: torch.Tensor | None,
    outlier_blocks: int,
    rounding: Rounding,
    warn: Callable[[str], None],
) -> QuantisedLinear:
    """Prepared float32 weight [N, K] -> integers and scales.

    hessian: float64 [K, K], the second moments of the prepared input; None weighs all columns alike and rounds to the
    nearest. `warn` is told when it cannot be used.
    """
    weight = weight.clone()
    outputs, inputs = weight.shape
    factor = None
    diagonal = torch.ones(inputs)
    if hessian is not None:
        diagonal = hessian.diagonal().float()
        if rounding.compensate:
            factor = inverse_factor(hessian, warn)
    values = torch.empty(outputs, inputs, dtype=torch.int8)
    scales = torch.empty(outputs, inputs // BLOCK)
    for block in range(inputs // BLOCK):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        eight = block < outlier_blocks and rounding.outlier_bits == 8
        scale = find_scales(weight[:, part], diagonal[part], 8 if eight else 4, rounding.search)
        lowest, highest = (-127, 127) if eight else (-8, 7)
        if factor is None:
            values[:, part] = _round(weight[:, part], scale, lowest, highest).to(torch.int8)
        else:
            values[:, part] = _compensated(weight, part, scale, factor, lowest, highest)
        scales[:, block] = scale[:, 0]
    return QuantisedLinear(values, scales, bias)


def find_scales(block: torch.Tensor, importance: torch.Tensor, bits: int, search: bool) -> torch.Tensor:
    """The scale [N, 1] of each row of [N, 128], a bfloat16 number in float32, that loses least.

    4 bits: the element of largest magnitude, or a fraction of it, becomes -8 (so a scale may be negative); 8 bits:
    127 steps to the largest magnitude. importance [128] weighs the squared errors.
    """
    if bits == 8:
        return _as_stored(block.abs().amax(dim=-1, keepdim=True) / 127)
    low, high = block.amin(dim=-1, keepdim=True), block.amax(dim=-1, keepdim=True)
    full = torch.where(-low >= high, low, high) / -8
    best, least = _as_stored(full), torch.full_like(full, torch.inf)
    if not search:
        return best
    for shrink in SHRINKS:
        for sign in (1.0, -1.0):
            scale = _as_stored(full * (shrink * sign))
            lost = (_round(block, scale, -8, 7) * scale - block).square() @ importance[:, None]
            best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    return best


def inverse_factor(hessian: torch.Tensor, warn: Callable[[str], None]) -> torch.Tensor | None:
    """The upper Cholesky factor of the damped inverse, float32 [K, K]; None, with a warning, if there is none."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    damping = DAMPING
    while mean > 0 and damping <= STRONGEST:
        damped = hessian + torch.eye(len(hessian), dtype=torch.float64) * (damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return torch.as_tensor(upper, dtype=torch.float32)
        damping *= STRONGER
    warn("the second moments of its input are not positive definite: its weights are rounded to the nearest")
    return None


def _compensated(
    weight: torch.Tensor, part: slice, scale: torch.Tensor, factor: torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """Round the columns of `part`, and put their errors into the later columns of `weight`, in place."""
    block = weight[:, part].T.contiguous()  # a column of the weight is a row here, so that it lies together in memory
    local, scale = factor[part, part], scale[:, 0]
    values, errors = torch.empty_like(block), torch.empty_like(block)
    for column in range(len(block)):
        rounded = _round(block[column], scale, lowest, highest)
        error = (block[column] - rounded * scale) / local[column, column]
        block[column + 1 :].addr_(local[column, column + 1 :], error, alpha=-1)
        values[column], errors[column] = rounded, error
    weight[:, part.stop :] -= errors.T @ factor[part, part.stop :]
    return values.T.to(torch.int8)


def _round(x: torch.Tensor, scale: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, (x / scale).round()).clamp(lowest, highest)


def _as_stored(scale: torch.Tensor) -> torch.Tensor:
    return scale.bfloat16().float()
