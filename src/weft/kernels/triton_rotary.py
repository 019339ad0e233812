"""Triton: norms of q and k by head, rotation, and the write of keys and values to their slots, in one kernel.

The bits of a rotated head are those of kernels/reference.py (compiled without fused multiply-adds), and so is what is
stored of it in 8 or 4 bits; the norm's sum has an order of its own. Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from weft.kernels.base import Batch
from weft.kernels.triton_kv import TritonKv, quantised_heads, spread_heads
from weft.kernels.triton_numbers import helper, rounded
from weft.kernels.triton_tiles import ROTARY, architecture


@helper
def _normalised(first, second, norm, column, inside, eps, D: tl.constexpr):
    mean = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / D
    factor = tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))[:, None]
    gain = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    gain_more = tl.load(norm + column + D // 2, mask=inside, other=0.0).to(tl.float32)[None, :]
    return first * factor * gain, second * factor * gain_more


@helper
def _written(
    first, second, codes, numbers, signs, target, mask, ROWS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    LOG: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Heads float32 [ROWS, D / 2] in halves to the places `target` [ROWS] of one part of a TritonKv."""
    column = tl.arange(0, HALF)[None, :]
    if BITS == 16:
        inside = mask[:, None] & (column < D // 2)
        at = codes + target[:, None] * D + column
        kind = codes.dtype.element_ty
        tl.store(at, rounded(first, kind), mask=inside)
        tl.store(at + D // 2, rounded(second, kind), mask=inside)
    else:
        code, bits, zero = quantised_heads(spread_heads(first, second, signs, ROWS, D, LOG), BITS)
        tl.store(numbers + target, bits.to(tl.int32) | (zero.to(tl.int32) << 16), mask=mask)
        low, high = tl.split(tl.permute(tl.reshape(code, (ROWS, 2, D // 2)), (0, 2, 1)))
        if BITS == 8:
            at = codes + target[:, None] * D + column
            tl.store(at, low.to(tl.uint8), mask=mask[:, None])
            tl.store(at + D // 2, high.to(tl.uint8), mask=mask[:, None])
        else:
            packed = (low | (high << 4)).to(tl.uint8)
            tl.store(codes + target[:, None] * (D // 2) + column, packed, mask=mask[:, None])


@triton.jit(do_not_specialize=["tokens"])
def rotary_kernel(
    qkv,  # [T, (heads + 2 * kv_heads) * D]
    cos, sin,  # float32 [positions, D / 2]
    q_norm, k_norm,  # [D] or None
    positions,  # int32 [T]
    slots,  # int64 [T]; -1: the row is padding
    signs, key_codes, key_numbers, value_codes, value_numbers,  # a TritonKv
    q,  # [T, heads * D]
    tokens,  # T
    heads, kv_heads, block_size, eps,
    ROWS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, LOG: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One head of ROWS tokens: a query, a key or a value."""
    token, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    column = tl.arange(0, HALF)
    inside = column < D // 2
    mask = token < tokens
    both = mask[:, None] & inside[None, :]
    at = qkv + (token.to(tl.int64) * (heads + 2 * kv_heads) + head)[:, None] * D + column[None, :]
    first = tl.load(at, mask=both, other=0.0).to(tl.float32)
    second = tl.load(at + D // 2, mask=both, other=0.0).to(tl.float32)
    if head < heads + kv_heads:
        if q_norm is not None:  # noqa: SIM102  (known when compiled; the other is not)
            if head < heads:
                first, second = _normalised(first, second, q_norm, column, inside, eps, D)
        if k_norm is not None:  # noqa: SIM102
            if head >= heads:
                first, second = _normalised(first, second, k_norm, column, inside, eps, D)
        angle = tl.load(positions + token, mask=mask, other=0).to(tl.int64)[:, None] * (D // 2) + column[None, :]
        cosine, sine = tl.load(cos + angle, mask=both, other=0.0), tl.load(sin + angle, mask=both, other=0.0)
        first, second = first * cosine - second * sine, second * cosine + first * sine
    if head < heads:
        if BITS < 16:
            turned = spread_heads(first, second, signs, ROWS, D, LOG) * (1.0 / D)
            first, second = tl.split(tl.permute(tl.reshape(turned, (ROWS, 2, D // 2)), (0, 2, 1)))
        target = q + (token.to(tl.int64) * heads + head)[:, None] * D + column[None, :]
        kind = q.dtype.element_ty
        tl.store(target, rounded(first, kind), mask=both)
        tl.store(target + D // 2, rounded(second, kind), mask=both)
    else:
        slot = tl.load(slots + token, mask=mask, other=-1)
        mask = slot >= 0
        kv_head = (head - heads) % kv_heads
        place = (slot // block_size * kv_heads + kv_head) * block_size + slot % block_size
        if head < heads + kv_heads:
            _written(first, second, key_codes, key_numbers, signs, place, mask, ROWS, D, HALF, LOG, BITS)
        else:
            _written(first, second, value_codes, value_numbers, signs, place, mask, ROWS, D, HALF, LOG, BITS)


def rotary_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: TritonKv,
    batch: Batch,
    heads: int,
    kv_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """As Kernels.rotary_write (base.py); a row whose slot is -1 is padding, and writes nothing. q is spread as the
    keys of `kv` are. Raises ValueError."""
    tokens, head_dim = len(qkv), kv.head_dim
    if kv_heads != kv.kv_heads or heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads = } must be a multiple of {kv_heads = }, and the KV has {kv.kv_heads}")
    wanted = (len(batch.positions), (heads + 2 * kv_heads) * head_dim)
    if qkv.shape != wanted or not qkv.is_contiguous():
        raise ValueError(f"qkv is {list(qkv.shape)} {qkv.stride()}; it must be contiguous {list(wanted)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape[1] != head_dim // 2 or not table.is_contiguous():
            raise ValueError(f"{name} is {list(table.shape)}; it must be contiguous [positions, {head_dim // 2}]")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and norm.shape != (head_dim,):
            raise ValueError(f"{name} is {list(norm.shape)}; it must be {[head_dim]}")
    q = qkv.new_empty(tokens, heads * head_dim)
    if not tokens:
        return q
    rows, warps = ROTARY[architecture(qkv.device)]
    rotary_kernel[(triton.cdiv(tokens, rows), heads + 2 * kv_heads)](
        qkv, cos, sin, q_norm, k_norm, batch.positions, batch.slots, kv.signs, *kv.tensors, q, tokens, heads, kv_heads,
        kv.block_size, eps, ROWS=rows, D=head_dim, HALF=kv.half, LOG=head_dim.bit_length() - 1, BITS=kv.bits,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return q
