"""Triton: keys and values in 8 or 4 bits, written to paged blocks, and attention that reads them.

kernels/kv.py says what is stored, to the bit, and what attention makes of it. The dequantisation is folded into the
products: with codes c, scale s and zero z,

    q . k = s (q . c - z sum(q))        sum over tokens of p v = sum (p s) c - sum (p s) z

so that codes go to the tensor cores as they are, integers that 16-bit floats hold exactly. In 4 bits byte j of a head
has the codes of channels j (low half) and D / 2 + j (high half): two products, nothing interleaved. Importing this
module needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from weft.kernels.base import Batch
from weft.kernels.kv import BITS, STEPS, signs
from weft.kernels.triton_quantise import hadamard

_TINY = tl.constexpr(2.0**-100)
_ROUND = tl.constexpr(1.5 * 2.0**23)
_TOKENS = 64  # that a program reads at once
_LEAST_HEADS = 16  # of a product on tensor cores


@triton.jit
def write_kernel(x, slots, signs, codes, scales, zeros, D: tl.constexpr, LOG: tl.constexpr, BITS: tl.constexpr):
    """One head of one token: x [T, heads, D] -> codes [slots, heads, D * BITS / 8], scales (bits of bfloat16) and zeros
    [slots, heads]."""
    token, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    channel = tl.arange(0, D)
    at = (token * heads + head).to(tl.int64) * D
    spread = tl.load(x + at + channel).to(tl.float32) * tl.load(signs + channel)
    spread = tl.reshape(hadamard(tl.reshape(spread, (1, D)), 1, D, LOG), (D,))
    top: tl.constexpr = 2**BITS - 1
    steps: tl.constexpr = 1 if BITS == 8 else 16
    finite_value = tl.abs(spread) < float("inf")
    finite = tl.min(finite_value.to(tl.int32), axis=0) == 1
    spread = tl.where(finite_value, spread, 0.0)
    low, high = tl.minimum(tl.min(spread, axis=0), 0.0), tl.maximum(tl.max(spread, axis=0), 0.0)
    whole = tl.div_rn(high, top * 1.0) - tl.div_rn(low, top * 1.0)
    # Rounded to bfloat16 by hand: the interpreter's conversion cuts off.
    bits = whole.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    scale = (bits << 16).to(tl.float32, bitcast=True)
    usable = finite & (scale >= _TINY)
    step = tl.where(usable, scale, 1.0)
    low = tl.where(usable, low, 0.0)
    zero = tl.minimum((tl.div_rn(-low, step) * steps + _ROUND) - _ROUND, 255.0)
    place = tl.div_rn(tl.where(usable, spread, 0.0), tl.zeros((D,), tl.float32) + step) + zero / steps
    code = tl.minimum(tl.maximum((place + _ROUND) - _ROUND, 0.0), top * 1.0).to(tl.int32)
    target = tl.load(slots + token) * heads + head
    tl.store(scales + target, tl.where(usable, bits, tl.where(finite, 0, 0x7FC0)).to(tl.int16))
    tl.store(zeros + target, zero.to(tl.int32).to(tl.uint8))
    if BITS == 8:
        tl.store(codes + target * D + channel, code.to(tl.uint8))
    else:
        first, second = tl.split(tl.permute(tl.reshape(code, (2, D // 2)), (1, 0)))
        tl.store(codes + target * (D // 2) + tl.arange(0, D // 2), (first | (second << 4)).to(tl.uint8))


@triton.jit
def _halves(codes, target, inside, D: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    """The codes of heads `target` [N] -> their first and second D / 2 channels, [N, D / 2] each."""
    column = tl.arange(0, D // 2)[None, :]
    if BITS == 8:
        at = target[:, None] * D + column
        first = tl.load(codes + at, mask=inside[:, None], other=0)
        second = tl.load(codes + at + D // 2, mask=inside[:, None], other=0)
    else:
        both = tl.load(codes + target[:, None] * (D // 2) + column, mask=inside[:, None], other=0)
        first, second = both & 15, both >> 4
    return first.to(tl.float32).to(KIND), second.to(tl.float32).to(KIND)


@triton.jit
def _numbers(scales, zeros, target, inside, STEPS: tl.constexpr):
    """(scale, zero in steps of a code) of heads `target` [N], float32."""
    bits = tl.load(scales + target, mask=inside, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    zero = tl.load(zeros + target, mask=inside, other=0).to(tl.float32) * (1.0 / STEPS)
    return (bits << 16).to(tl.float32, bitcast=True), zero


@triton.jit
def attention_kernel(
    q,  # [T, kv_heads * GROUP, D]
    signs,  # float32 [D]
    key_codes,
    key_scales,
    key_zeros,
    value_codes,
    value_scales,
    value_zeros,
    sequences,  # int32 [T]: the row of `tables` that a token reads
    positions,  # int32 [T]
    tables,  # int32 [sequences, width]
    out,  # as q
    width,
    block_size,
    scale,
    window,  # a token attends to so many positions, its own included
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # GROUP or more: what a product wants
    D: tl.constexpr,
    LOG: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    TOKENS: tl.constexpr,
    KIND: tl.constexpr,
):
    """One token's queries on one head of keys and values: softmax as it goes, all sums in float32."""
    token, head, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    group, channel = tl.arange(0, HEADS), tl.arange(0, D)
    at = ((token * kv_heads + head).to(tl.int64) * GROUP + group)[:, None] * D + channel[None, :]
    sign = tl.load(signs + channel)[None, :]
    queries = tl.load(q + at, mask=(group < GROUP)[:, None], other=0.0).to(tl.float32) * sign
    queries = (hadamard(queries, HEADS, D, LOG) * (1.0 / D)).to(KIND)
    total = tl.sum(queries.to(tl.float32), axis=1)
    first_half, second_half = tl.split(tl.permute(tl.reshape(queries, (HEADS, 2, D // 2)), (0, 2, 1)))
    position = tl.load(positions + token)
    table = tables + tl.load(sequences + token).to(tl.int64) * width
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((HEADS,), tl.float32)
    zero_sum = tl.zeros((HEADS,), tl.float32)
    first_sum = tl.zeros((HEADS, D // 2), tl.float32)
    second_sum = tl.zeros((HEADS, D // 2), tl.float32)
    begin = tl.maximum(position - window + 1, 0)
    for start in range(begin, position + 1, TOKENS):
        place = start + tl.arange(0, TOKENS)
        inside = place <= position
        block = tl.load(table + place // block_size, mask=inside, other=0).to(tl.int64)
        target = (block * block_size + place % block_size) * kv_heads + head
        step, zero = _numbers(key_scales, key_zeros, target, inside, STEPS)
        first, second = _halves(key_codes, target, inside, D, BITS, KIND)
        scores = tl.dot(first_half, tl.trans(first), input_precision="ieee")
        scores = tl.dot(second_half, tl.trans(second), scores, input_precision="ieee")
        scores = (scores - total[:, None] * zero[None, :]) * (step * scale)[None, :]
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights, fade = tl.exp(scores - higher[:, None]), tl.exp(highest - higher)
        step, zero = _numbers(value_scales, value_zeros, target, inside, STEPS)
        scaled = weights * step[None, :]
        first, second = _halves(value_codes, target, inside, D, BITS, KIND)
        rounded = scaled.to(KIND)
        first_sum = tl.dot(rounded, first, first_sum * fade[:, None], input_precision="ieee")
        second_sum = tl.dot(rounded, second, second_sum * fade[:, None], input_precision="ieee")
        # The same rounded factors as in the products, so that codes at their zero give nothing.
        zero_sum = zero_sum * fade + tl.sum(rounded.to(tl.float32) * zero[None, :], axis=1)
        weight_sum = weight_sum * fade + tl.sum(weights, axis=1)
        highest = higher
    both = tl.permute(tl.join(first_sum, second_sum), (0, 2, 1))
    result = (tl.reshape(both, (HEADS, D)) - zero_sum[:, None]) / weight_sum[:, None]
    result = hadamard(result, HEADS, D, LOG) * sign * (1.0 / D)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=(group < GROUP)[:, None])


@dataclass(frozen=True, slots=True)
class Part:
    """Keys or values: codes uint8 [blocks, block_size, kv_heads, D * bits / 8]; scales int16 (the bits of bfloat16) and
    zeros uint8 [blocks, block_size, kv_heads]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


@dataclass(frozen=True, slots=True)
class TritonKv:
    """One layer's keys and values."""

    keys: Part
    values: Part
    signs: torch.Tensor
    bits: int

    @property
    def block_size(self) -> int:
        return self.keys.codes.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.keys.codes.shape[2]

    @property
    def head_dim(self) -> int:
        return len(self.signs)

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for kv in (self.keys, self.values) for part in (kv.codes, kv.scales, kv.zeros))


def make_kv(
    blocks: int, block_size: int, kv_heads: int, head_dim: int, cache: str, device: torch.device | str = "cuda"
) -> TritonKv:
    """Empty storage. cache: int8 or int4. Raises ValueError."""
    if cache not in BITS:
        raise ValueError(f"there is no quantised KV cache of {cache!r}; what would work: {', '.join(BITS)}")
    if not 32 <= head_dim <= 256 or head_dim & (head_dim - 1):
        raise ValueError(f"{head_dim = }; the Triton kernels take heads of 32, 64, 128 and 256 channels")
    shape = (blocks, block_size, kv_heads)

    def part() -> Part:
        return Part(
            torch.zeros(*shape, head_dim * BITS[cache] // 8, dtype=torch.uint8, device=device),
            torch.zeros(shape, dtype=torch.int16, device=device),
            torch.zeros(shape, dtype=torch.uint8, device=device),
        )

    return TritonKv(part(), part(), signs(head_dim).to(device), BITS[cache])


def write(kv: TritonKv, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Keys (after rotary) and values [T, kv_heads, D], contiguous, into slots int64 [T]. Raises ValueError."""
    for part, x in ((kv.keys, keys), (kv.values, values)):
        if x.shape != (len(slots), kv.kv_heads, kv.head_dim) or not x.is_contiguous():
            wanted = [len(slots), kv.kv_heads, kv.head_dim]
            raise ValueError(f"keys or values are {list(x.shape)} {x.stride()}; they must be contiguous {wanted}")
        if len(slots):
            write_kernel[(len(slots), kv.kv_heads)](
                x,
                slots,
                kv.signs,
                part.codes,
                part.scales,
                part.zeros,
                D=kv.head_dim,
                LOG=kv.head_dim.bit_length() - 1,
                BITS=kv.bits,
                num_warps=1,
                enable_fp_fusion=False,
            )


def attention(
    q: torch.Tensor, kv: TritonKv, batch: Batch, heads: int, scale: float, window: int | None = None
) -> torch.Tensor:
    """As Kernels.attention (base.py): causal, paged, grouped queries [T, heads * D] -> same. Raises ValueError."""
    if q.shape != (len(batch.positions), heads * kv.head_dim) or not q.is_contiguous() or heads % kv.kv_heads:
        raise ValueError(
            f"q is {list(q.shape)} {q.stride()}; it must be contiguous {[len(batch.positions), heads * kv.head_dim]}, "
            f"and {kv.kv_heads} kv heads must divide {heads} heads"
        )
    out = torch.empty_like(q)
    if not len(q):
        return out
    group = heads // kv.kv_heads
    lengths = batch.starts[1:] - batch.starts[:-1]
    sequences = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths).to(torch.int32)
    kind = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[q.dtype]
    parts = [tensor for part in (kv.keys, kv.values) for tensor in (part.codes, part.scales, part.zeros)]
    attention_kernel[(len(q), kv.kv_heads)](
        q,
        kv.signs,
        *parts,
        sequences,
        batch.positions,
        batch.tables,
        out,
        batch.tables.shape[1],
        kv.block_size,
        scale,
        window or 2**30,
        GROUP=group,
        HEADS=max(_LEAST_HEADS, triton.next_power_of_2(group)),
        D=kv.head_dim,
        LOG=kv.head_dim.bit_length() - 1,
        BITS=kv.bits,
        STEPS=STEPS[kv.bits],
        TOKENS=_TOKENS,
        KIND=kind,
    )
    return out
