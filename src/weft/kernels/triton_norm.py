"""Triton: RMSNorm with and without a residual, and the gated activation: one pass over memory each.

kernels/reference.py says what is computed; a row's sum has an order of its own, the same for every row. The forms that
quantise in the same pass are in triton_quantise.py, with the same bits: so nothing is contracted here either. Importing
this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from weft.kernels.triton_numbers import KINDS, helper, rounded
from weft.kernels.triton_tiles import ACTIVATION, NORM, architecture


@helper
def inverse_root(hidden, D: tl.constexpr, eps):
    """float32 [ROWS, D or more] -> [ROWS]: by what rows are multiplied to be normalised."""
    return tl.rsqrt(tl.sum(hidden * hidden, axis=1) / D + eps)


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x,  # [T, D]
    residual,  # [T, D] of x's type, or None: becomes the sum
    weight,  # [D]
    out,  # [T, D] of x's type
    rows,
    eps,
    D: tl.constexpr,
    SIZE: tl.constexpr,  # D or more
    ROWS: tl.constexpr,
):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    mask = (row < rows)[:, None] & (column < D)[None, :]
    kind = out.dtype.element_ty
    hidden = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        hidden = rounded(hidden + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32), kind)
        tl.store(residual + at, hidden, mask=mask)
        hidden = hidden.to(tl.float32)
    factor = inverse_root(hidden, D, eps)
    gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out + at, rounded(hidden * factor[:, None] * gain[None, :], kind), mask=mask)


@helper
def gated(gate, up):
    """silu(gate) * up, float32; no power of e overflows on the way."""
    small = tl.exp(-tl.abs(gate))
    return gate * (tl.where(gate >= 0.0, 1.0, small) / (1.0 + small)) * up


@triton.jit(do_not_specialize=["rows"])
def gate_kernel(
    gate_up,  # [T, 2 F]
    out,  # [T, F]
    rows,
    columns,  # F
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    source = gate_up + at + row.to(tl.int64)[:, None] * columns
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, rounded(gated(gate, up), out.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As Kernels.rms_norm (base.py). Raises TypeError, ValueError."""
    return _norm(x, None, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As Kernels.add_rms_norm (base.py): residual += x, in place. Raises TypeError, ValueError."""
    if residual.shape != x.shape or residual.dtype is not x.dtype or not residual.is_contiguous():
        raise ValueError(
            f"the residual is {residual.dtype} {list(residual.shape)}; it must be contiguous {x.dtype} {list(x.shape)}"
        )
    return _norm(x, residual, weight, eps), residual


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As Kernels.silu_mul (base.py). Raises TypeError, ValueError."""
    _check(gate_up, "gate_up")
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[1]} columns; it must be [T, 2 F]")
    count, columns = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(count, columns)
    if count:
        rows, width, warps = ACTIVATION[architecture(gate_up.device)]
        gate_kernel[(triton.cdiv(count, rows), triton.cdiv(columns, width))](
            gate_up, out, count, columns, ROWS=rows, COLUMNS=width, num_warps=warps, enable_fp_fusion=False
        )
    return out


def _norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    _check(x, "x")
    count, size = x.shape
    if weight.shape != (size,):
        raise ValueError(f"the norm's weight is {list(weight.shape)}; x has {size} columns")
    out = torch.empty_like(x)
    if count:
        rows, warps = NORM[architecture(x.device)]
        norm_kernel[(triton.cdiv(count, rows),)](
            x,
            residual,
            weight,
            out,
            count,
            eps,
            D=size,
            SIZE=triton.next_power_of_2(size),
            ROWS=rows,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return out


def _check(x: torch.Tensor, what: str) -> None:
    if x.dtype not in KINDS:
        raise TypeError(f"{what} is {x.dtype}; the Triton kernels take float32, bfloat16 and float16")
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"{what} must be contiguous [T, columns], not {list(x.shape)} {x.stride()}")
