"""Triton: residual, norm, permutation, Hadamard and quantisation of rows in one kernel (triton_rows.py launches it).

A norm takes a pass over the row at first, in the tile of triton_norm.py's and with its bits; a second pass does the
rest, in tiles of BLOCKS blocks of 128 channels. Without a norm the tiles are programs of their own. From the normalised
row on, the values and scales are those of weft/comet/reference.py bit for bit, which takes

* the same operations in the same order, each rounded: compiled without contraction of a product and a sum;
* correctly rounded division (`div_rn`), for `/` is approximate on a GPU;
* rounding to the nearest even integer by adding and subtracting 1.5 * 2**23, for scaled values are far below it.

Importing this module needs triton. Set TRITON_INTERPRET=1 before, and the kernels run on a CPU, slowly, through numpy.
"""

from __future__ import annotations

import triton
import triton.language as tl

from weft.kernels.triton_norm import gated, inverse_root
from weft.kernels.triton_numbers import helper, rounded

_TINY = tl.constexpr(2.0**-100)  # a block with no larger magnitude is zero
_ROUND = tl.constexpr(1.5 * 2.0**23)


@helper
def _butterfly(x, ROWS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    pairs = tl.permute(tl.reshape(x, (ROWS, SIZE // (2 * STRIDE), 2, STRIDE)), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2)), (ROWS, SIZE))


@helper
def hadamard(x, ROWS: tl.constexpr, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """[ROWS, SIZE], SIZE = 2**STAGES: strides 1, 2, 4 ... as weft/comet/hadamard.py has them."""
    for stage in tl.static_range(STAGES):
        x = _butterfly(x, ROWS, SIZE, 2**stage)
    return x


@helper
def _quantised(x, eight):
    """float32 [B, 128], and which of the blocks get 8 bits (the others get 4) -> (int8, scales [B])."""
    finite_value = tl.abs(x) < float("inf")
    finite = tl.min(finite_value.to(tl.int32), axis=1) == 1
    x = tl.where(finite_value, x, 0.0)
    low, high = tl.min(x, axis=1), tl.max(x, axis=1)
    largest = tl.maximum(-low, high)
    usable = finite & (largest >= _TINY)
    extreme = tl.where(eight, largest, tl.where(-low >= high, low, high))
    extreme = tl.where(usable, extreme, 1.0)
    reciprocal = tl.div_rn(tl.full(extreme.shape, 1.0, tl.float32), extreme)
    inverse = reciprocal * tl.where(eight, 127.0, -8.0)
    scaled = tl.where(usable[:, None], x * inverse[:, None], 0.0)
    rounded = (scaled + _ROUND) - _ROUND
    rounded = tl.maximum(rounded, tl.where(eight, -127.0, -8.0)[:, None])
    rounded = tl.minimum(rounded, tl.where(eight, 127.0, 7.0)[:, None])
    scale = tl.div_rn(extreme, tl.where(eight, 127.0, -8.0))
    return rounded.to(tl.int8), tl.where(usable, scale, tl.where(finite, 0.0, float("nan")))


@helper
def _packed(nibbles, BLOCKS: tl.constexpr):
    """int8 [BLOCKS, 128] -> uint8 [BLOCKS, 64]: the low four bits of neighbours, the first in the low half."""
    even, odd = tl.split(tl.reshape(nibbles, (BLOCKS, 64, 2)))
    return ((even & 15) | ((odd & 15) << 4)).to(tl.uint8, bitcast=True)


@triton.jit
def rows_kernel(
    x,  # [T, K]; [T, 2 K] where GATED
    residual,  # [T, K] of x's type, or None: becomes the sum
    weight,  # [K] of the norm, or None
    permutation,  # int32 [K] or None
    values,  # int8 [T, K]; uint8 [T, (eight + blocks) * 64] where NIBBLES; [T, K] of x's type where not QUANTISE
    scales,  # float32 [T, blocks]
    totals,  # int32 [T, blocks]
    outliers,
    eight,
    eps,
    K: tl.constexpr,
    SIZE: tl.constexpr,  # K or more
    HADAMARD: tl.constexpr,
    QUANTISE: tl.constexpr,
    NIBBLES: tl.constexpr,
    GATED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kind = x.dtype.element_ty
    blocks = K // 128
    x += row * K * (2 if GATED else 1)
    if weight is not None:
        column = tl.arange(0, SIZE)[None, :]
        hidden = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
        if residual is not None:
            residual += row * K
            hidden = rounded(hidden + tl.load(residual + column, mask=column < K, other=0.0).to(tl.float32), kind)
            tl.store(residual + column, hidden, mask=column < K)
            tl.debug_barrier()  # one thread's sum is another thread's input below
            hidden = hidden.to(tl.float32)
            x = residual
        factor = inverse_root(hidden, K, eps)
    for first in range(tl.program_id(1) * BLOCKS, blocks, tl.num_programs(1) * BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        inside = block < blocks
        at = block[:, None] * 128 + tl.arange(0, 128)[None, :]
        mask = inside[:, None]
        source = at
        if permutation is not None:
            source = tl.load(permutation + at, mask=mask, other=0)
        prepared = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(x + source + K, mask=mask, other=0.0).to(tl.float32)
            prepared = rounded(gated(prepared, up), kind).to(tl.float32)
        if weight is not None:
            gain = tl.load(weight + source, mask=mask, other=0.0).to(tl.float32)
            prepared = rounded(prepared * factor[:, None] * gain, kind).to(tl.float32)
        if HADAMARD:
            prepared = tl.where((block >= outliers)[:, None], hadamard(prepared, BLOCKS, 128, 7), prepared)
        if QUANTISE:
            quantised, scale = _quantised(prepared, block < eight)
            tl.store(scales + row * blocks + block, scale, mask=inside)
            tl.store(totals + row * blocks + block, tl.sum(quantised.to(tl.int32), axis=1), mask=inside)
            if NIBBLES:
                # A block of 8 bits is two planes of nibbles: value = 16 * first + second, the second without a sign.
                plane = row * (eight + blocks) + block + tl.minimum(block, eight)
                place = plane[:, None] * 64 + tl.arange(0, 64)[None, :]
                wide = (block < eight)[:, None]
                upper = _packed(tl.where(wide, quantised >> 4, quantised), BLOCKS)
                tl.store(values + place, upper, mask=mask)
                tl.store(values + place + 64, _packed(quantised, BLOCKS), mask=mask & wide)
            else:
                tl.store(values + row * K + at, quantised, mask=mask)
        else:
            tl.store(values + row * K + at, rounded(prepared, kind), mask=mask)
