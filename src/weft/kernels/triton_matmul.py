"""Triton: products with 4-bit weights (8-bit in the wide blocks) on the INT8 or the 16-bit units of a GPU.

A program owns a tile [M, N] of the output and runs its whole loop over K, block after block in the reference's order:
the wide blocks come first, and precision depends on the block alone, so that all programs have the same work and no
scheduling of unequal tiles is called for. A block's 128 channels are summed exactly in int32, then added to the float32
total with the product of its two scales, each operation rounded: the bits are those of weft/comet/reference.py, in
any tile and beside any other rows. Launch with enable_fp_fusion=False for that.

Weights lie block after block: [K / 128, N, 64] bytes, byte j of a row holds channel j in its low half and channel
64 + j in its high half, so that a tile is one run of memory and the halves are two products with contiguous rows.
For INT8 a nibble stays in the high half of its byte: 16 times the value, with its sign. The sum is a multiple of 16,
and below 2**31 by far, so that the shift at the end is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from weft.kernels.triton_numbers import helper, rounded


@helper
def _packed_tile(weight, block, n, outputs):
    """int8 [N, 64] of one block."""
    at = (block * outputs + n).to(tl.int64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    return tl.load(weight + at, mask=(n < outputs)[:, None], other=0)


@helper
def _wide_tile(wide, block, n, outputs):
    """int8 [N, 128] of one block."""
    at = (block * outputs + n).to(tl.int64)[:, None] * 128 + tl.arange(0, 128)[None, :]
    return tl.load(wide + at, mask=(n < outputs)[:, None], other=0)


@helper
def _row_tile(x, block, m, rows, channels, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """[M, SIZE] of one block, from its channel FIRST on."""
    at = m.to(tl.int64)[:, None] * channels + block * 128 + FIRST + tl.arange(0, SIZE)[None, :]
    return tl.load(x + at, mask=(m < rows)[:, None], other=0)


@helper
def _store_tile(y, total, bias, m, n, rows, outputs):
    inside = n < outputs
    if bias is not None:
        total += tl.load(bias + n, mask=inside, other=0.0)[None, :]
    at = m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(y + at, rounded(total, y.dtype.element_ty), mask=(m < rows)[:, None] & inside[None, :])


@helper
def _add_block(total, sums, block, m, n, row_scales, row_totals, scales, zeros, sums_out, rows, outputs, blocks):
    """total + float(sums) * (row scale * weight scale), where sums is int32 [M, N] of one block."""
    row, column = m < rows, n < outputs
    at = m.to(tl.int64) * blocks + block
    if zeros is not None:
        zero = tl.load(zeros + block * outputs + n, mask=column, other=0).to(tl.int32)
        sums -= tl.load(row_totals + at, mask=row, other=0)[:, None] * zero[None, :]
    if sums_out is not None:
        place = (block * rows + m).to(tl.int64)[:, None] * outputs + n[None, :]
        tl.store(sums_out + place, sums, mask=row[:, None] & column[None, :])
    row_scale = tl.load(row_scales + at, mask=row, other=0.0)
    scale = tl.load(scales + block * outputs + n, mask=column, other=0.0).to(tl.float32)
    return total + sums.to(tl.float32) * (row_scale[:, None] * scale[None, :])


@triton.jit(do_not_specialize=["rows"])
def w4a8_kernel(
    x,  # int8 [T, K]
    row_scales,  # float32 [T, K / 128]
    row_totals,  # int32 [T, K / 128]: the sums of a block's values
    wide,  # int8 [wide_blocks, N, 128] or None
    weight,  # int8 [K / 128 - wide_blocks, N, 64]
    scales,  # float32 or bfloat16 [K / 128, N]
    zeros,  # int8 [K / 128, N] or None
    bias,  # float32 [N] or None
    y,  # [T, N]
    sums_out,  # int32 [K / 128, T, N] or None: the accumulators
    rows,
    outputs,
    blocks,
    wide_blocks,
    M: tl.constexpr,
    N: tl.constexpr,
):
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    channels = blocks * 128
    total = tl.zeros((M, N), tl.float32)
    if wide is not None:
        for block in range(wide_blocks):
            values = _row_tile(x, block, m, rows, channels, 0, 128)
            sums = tl.dot(values, tl.trans(_wide_tile(wide, block, n, outputs)), out_dtype=tl.int32)
            total = _add_block(
                total, sums, block, m, n, row_scales, row_totals, scales, zeros, sums_out, rows, outputs, blocks
            )
    for block in range(wide_blocks, blocks):
        packed = _packed_tile(weight, block - wide_blocks, n, outputs)
        first = _row_tile(x, block, m, rows, channels, 0, 64)
        second = _row_tile(x, block, m, rows, channels, 64, 64)
        sums = tl.dot(first, tl.trans(packed << 4), out_dtype=tl.int32)
        sums = tl.dot(second, tl.trans(packed & -16), sums, out_dtype=tl.int32) >> 4
        total = _add_block(
            total, sums, block, m, n, row_scales, row_totals, scales, zeros, sums_out, rows, outputs, blocks
        )
    _store_tile(y, total, bias, m, n, rows, outputs)


@helper
def _floats(values, zeros, block, n, outputs, KIND: tl.constexpr):
    """int8 [N, k] -> [k, N] of a 16-bit type, less the zeros: at most 135, which it holds exactly."""
    values = values.to(tl.int16)
    if zeros is not None:
        values -= tl.load(zeros + block * outputs + n, mask=n < outputs, other=0).to(tl.int16)[:, None]
    return tl.trans(values.to(tl.float32).to(KIND))


@triton.jit(do_not_specialize=["rows"])
def w4a16_kernel(
    x,  # bfloat16 or float16 [T, K], prepared
    wide,
    weight,
    scales,
    zeros,
    bias,
    y,
    rows,
    outputs,
    blocks,
    wide_blocks,
    M: tl.constexpr,
    N: tl.constexpr,
    KIND: tl.constexpr,  # of the operands: x's, and float32 for the interpreter
):
    """As w4a8_kernel, with rows that are not quantised: integers of the weights as 16-bit floats, sums in float32."""
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    channels = blocks * 128
    total = tl.zeros((M, N), tl.float32)
    if wide is not None:
        for block in range(wide_blocks):
            values = _floats(_wide_tile(wide, block, n, outputs), zeros, block, n, outputs, KIND)
            sums = tl.dot(_row_tile(x, block, m, rows, channels, 0, 128).to(KIND), values)
            scale = tl.load(scales + block * outputs + n, mask=n < outputs, other=0.0).to(tl.float32)
            total += sums * scale[None, :]
    for block in range(wide_blocks, blocks):
        packed = _packed_tile(weight, block - wide_blocks, n, outputs)
        low = _floats((packed << 4) >> 4, zeros, block, n, outputs, KIND)
        sums = tl.dot(_row_tile(x, block, m, rows, channels, 0, 64).to(KIND), low)
        high = _floats(packed >> 4, zeros, block, n, outputs, KIND)
        sums = tl.dot(_row_tile(x, block, m, rows, channels, 64, 64).to(KIND), high, sums)
        scale = tl.load(scales + block * outputs + n, mask=n < outputs, other=0.0).to(tl.float32)
        total += sums * scale[None, :]
    _store_tile(y, total, bias, m, n, rows, outputs)
