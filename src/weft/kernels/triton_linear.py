"""Triton: plain products whose bits do not depend on the number of rows, for --batch-invariant.

cuBLAS picks an algorithm by shape, and algorithms sum over K in orders of their own. Here a program owns a tile [M, N]
of the output and runs its whole loop over K in steps of one size, in order, all sums in float32: an output takes the
same operations on the same numbers in whatever tile, row of a tile and batch it is. Few rows take a lower tile, so that
less of it is empty; both heights have the same step and, as compiled, the same instruction (tools/check_triton.py
compares them). What is left to the hardware is the order of sums within one instruction.

Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from weft.kernels.reference import PlainLinear
from weft.kernels.triton_numbers import product_kind, rounded
from weft.kernels.triton_tiles import LINEAR, LinearTile, architecture


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,  # [T, K]
    weight,  # [N, K]
    bias,  # [N] or None
    y,  # [T, N]
    rows,  # T
    outputs,  # N
    channels,  # K
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,  # of the operands: x's, and float32 for the interpreter
):
    row, output = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    channel = tl.arange(0, K)
    x_at = x + row.to(tl.int64)[:, None] * channels + channel[None, :]
    weight_at = weight + output.to(tl.int64)[:, None] * channels + channel[None, :]
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, channels, K):
        inside = channel[None, :] < channels - start
        left = tl.load(x_at + start, mask=(row < rows)[:, None] & inside, other=0.0).to(KIND)
        right = tl.load(weight_at + start, mask=(output < outputs)[:, None] & inside, other=0.0).to(KIND)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(y + at, rounded(total, y.dtype.element_ty), mask=(row < rows)[:, None] & (output < outputs)[None, :])


def linear(
    x: torch.Tensor, packed: PlainLinear, dtype: torch.dtype | None = None, *, tile: LinearTile | None = None
) -> torch.Tensor:
    """As Kernels.linear (base.py). tile: other than that of this GPU. Raises TypeError, ValueError."""
    outputs, channels = packed.weight.shape
    if x.dim() != 2 or x.shape[1] != channels or not x.is_contiguous():
        raise ValueError(f"x is {list(x.shape)} {x.stride()}; it must be contiguous [T, {channels}]")
    if packed.weight.dtype is not x.dtype:
        raise TypeError(f"x is {x.dtype} and the weight {packed.weight.dtype}; they must be of one type")
    tile, rows = tile or LINEAR[architecture(x.device)], len(x)
    y = torch.empty(rows, outputs, dtype=dtype or x.dtype, device=x.device)
    if rows:
        height, warps, stages = tile.of(rows)
        linear_kernel[(triton.cdiv(rows, height), triton.cdiv(outputs, tile.columns))](
            x,
            packed.weight,
            packed.bias,
            y,
            rows,
            outputs,
            channels,
            M=height,
            N=tile.columns,
            K=tile.channels,
            KIND=product_kind(x.dtype),
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=False,
        )
    return y
