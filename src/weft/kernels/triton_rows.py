"""Rows of activations made ready for a quantised product on a GPU: what goes in, what comes out, and the launch.

weft/comet/reference.py says what is computed; triton_quantise.py computes it. Importing this module needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from weft.kernels.triton_quantise import rows_kernel
from weft.kernels.triton_tiles import NORM, QUANTISE, architecture
from weft.kernels.w4ax_weights import BLOCK, Form

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm; of residual + x where there is a residual, which becomes the sum."""

    weight: torch.Tensor
    eps: float
    residual: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """Quantised rows.

    values: int8 [T, K], or nibbles uint8 [T, (eight + K / 128) * 64] for the CUDA kernels.
    scales: float32 [T, K / 128]. totals: int32 [T, K / 128], the sum of a block's values.
    """

    values: torch.Tensor
    scales: torch.Tensor
    totals: torch.Tensor


def quantise_rows(
    x: torch.Tensor, form: Form, norm: Norm | None = None, *, nibbles: bool = False, gated: bool = False
) -> Rows:
    """x [T, K], normalised where `norm` is given, prepared and quantised as `form` says.

    nibbles: in the layout of the CUDA kernels. gated: x is [T, 2 K], and silu(first half) * second half is what is
    prepared. What is normalised or gated has the bits of triton_norm.py. Raises TypeError, ValueError.
    """
    _check(x, form, norm, gated)
    rows, blocks = len(x), form.blocks
    width, kind = ((form.eight + blocks) * BLOCK // 2, torch.uint8) if nibbles else (form.channels, torch.int8)
    values = torch.empty(rows, width, dtype=kind, device=x.device)
    scales = torch.empty(rows, blocks, dtype=torch.float32, device=x.device)
    totals = torch.empty(rows, blocks, dtype=torch.int32, device=x.device)
    _launch(x, form, norm, values, (scales, totals), nibbles=nibbles, gated=gated)
    return Rows(values, scales, totals)


def prepare_rows(x: torch.Tensor, form: Form, norm: Norm | None = None, *, gated: bool = False) -> torch.Tensor:
    """x [T, K], permuted and transformed but not quantised, in x's type: the input of a product with 16-bit rows."""
    _check(x, form, norm, gated)
    if not gated and norm is None and form.permutation is None and not (form.hadamard and form.outliers < form.blocks):
        return x
    prepared = x.new_empty(len(x), form.channels)
    _launch(x, form, norm, prepared, (None, None), nibbles=False, gated=gated)
    return prepared


def _launch(
    x: torch.Tensor,
    form: Form,
    norm: Norm | None,
    values: torch.Tensor,
    quantised: tuple[torch.Tensor, torch.Tensor] | tuple[None, None],
    *,
    nibbles: bool,
    gated: bool,
) -> None:
    """quantised: scales and totals; None where the values are floats."""
    if not len(x):
        return
    key = architecture(x.device)
    blocks, warps = QUANTISE[key]
    if norm is not None:
        _, warps = NORM[key]
    # A row's program normalises all of it; without a norm its tiles are independent.
    rows_kernel[(len(x), 1 if norm is not None else triton.cdiv(form.blocks, blocks))](
        x,
        None if norm is None else norm.residual,
        None if norm is None else norm.weight,
        form.permutation,
        values,
        *quantised,
        form.outliers,
        form.eight,
        0.0 if norm is None else norm.eps,
        K=form.channels,
        SIZE=triton.next_power_of_2(form.channels),
        HADAMARD=form.hadamard,
        QUANTISE=quantised[0] is not None,
        NIBBLES=nibbles,
        GATED=gated,
        BLOCKS=blocks,
        num_warps=warps,
        enable_fp_fusion=False,
    )


def _check(x: torch.Tensor, form: Form, norm: Norm | None, gated: bool) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"x is {x.dtype}; the Triton kernels take float32, bfloat16 and float16")
    columns = form.channels * (2 if gated else 1)
    if x.dim() != 2 or x.shape[1] != columns or not x.is_contiguous():
        raise ValueError(f"x is {list(x.shape)} {x.stride()}; it must be contiguous [T, {columns}]")
    if gated and norm is not None:
        raise ValueError("a gated activation follows no norm")
    if norm is None:
        return
    if norm.weight.shape != (form.channels,) or not norm.weight.is_contiguous():
        raise ValueError(f"the norm's weight is {list(norm.weight.shape)}; it must be contiguous [{form.channels}]")
    residual = norm.residual
    if residual is not None and (residual.shape != x.shape or not residual.is_contiguous()):
        raise ValueError(f"the residual is {list(residual.shape)}; it must be contiguous {list(x.shape)}, as x")
    if residual is not None and residual.dtype is not x.dtype:
        raise TypeError(f"the residual is {residual.dtype} and x {x.dtype}; they must be of one type")
