"""Keys and values on a GPU: paged storage as tensors, and what Triton kernels that write and read it share.

Of each block the slots of one head lie together: [blocks, kv_heads, block_size, ...]. Quantised heads are those of
kernels/kv.py to the bit; in 4 bits byte j of a head has the codes of channels j (low half) and D / 2 + j (high half).
A head is always read as its two halves, so that nothing has to be interleaved. Importing this module needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from weft.kernels.kv import bits_of, signs
from weft.kernels.triton_numbers import KINDS, helper
from weft.kernels.triton_quantise import hadamard

_TINY = tl.constexpr(2.0**-100)
_ROUND = tl.constexpr(1.5 * 2.0**23)
PLAIN = 16  # stands for the bits of keys and values that keep their type


@helper
def quantised_heads(x, BITS: tl.constexpr):
    """Spread heads float32 [N, D] -> (codes int32 [N, D], the bits of the bfloat16 scale [N], zeros float32 [N]).

    kernels/kv.py's `quantise`, operation by operation: compile without fused multiply-adds.
    """
    top: tl.constexpr = 2**BITS - 1
    steps: tl.constexpr = 1 if BITS == 8 else 16
    finite_value = tl.abs(x) < float("inf")
    finite = tl.min(finite_value.to(tl.int32), axis=1) == 1
    x = tl.where(finite_value, x, 0.0)
    low, high = tl.minimum(tl.min(x, axis=1), 0.0), tl.maximum(tl.max(x, axis=1), 0.0)
    tops = tl.full(high.shape, top * 1.0, tl.float32)
    whole = tl.div_rn(high, tops) - tl.div_rn(low, tops)
    # Rounded to bfloat16 by hand: the interpreter's conversion cuts off.
    bits = whole.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    scale = (bits << 16).to(tl.float32, bitcast=True)
    usable = finite & (scale >= _TINY)
    step = tl.where(usable, scale, 1.0)
    low = tl.where(usable, low, 0.0)
    zero = tl.minimum((tl.div_rn(-low, step) * steps + _ROUND) - _ROUND, 255.0)
    place = (
        tl.div_rn(tl.where(usable[:, None], x, 0.0), tl.zeros(x.shape, tl.float32) + step[:, None])
        + (zero / steps)[:, None]
    )
    code = tl.minimum(tl.maximum((place + _ROUND) - _ROUND, 0.0), top * 1.0).to(tl.int32)
    return code, tl.where(usable, bits, tl.where(finite, 0, 0x7FC0)), zero


@helper
def spread_heads(first, second, signs, N: tl.constexpr, D: tl.constexpr, LOG: tl.constexpr):
    """Halves of heads float32 [N, D / 2] -> spread heads [N, D], D = 2**LOG."""
    heads = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (N, D))
    return hadamard(heads * tl.load(signs + tl.arange(0, D))[None, :], N, D, LOG)


@helper
def gathered_heads(first, second, signs, N: tl.constexpr, D: tl.constexpr, LOG: tl.constexpr):
    """What undoes `spread_heads`: halves [N, D / 2] -> halves."""
    heads = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (N, D))
    heads = hadamard(heads, N, D, LOG) * tl.load(signs + tl.arange(0, D))[None, :] * (1.0 / D)
    return tl.split(tl.permute(tl.reshape(heads, (N, 2, D // 2)), (0, 2, 1)))


@helper
def _nibbles(both):
    """uint8 [N, HALF] -> the low and the high halves as bfloat16. With a code in its last bits, 128.0 is 128 + code,
    and 128 less is exact: two codes in two instructions, where a conversion of each to a float takes far longer."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, part, one, less;
        mov.b32 one, 0x3F803F80;
        mov.b32 less, 0xC300C300;
        and.b32 low, $4, 0x0F0F0F0F;
        shr.u32 high, $4, 4;
        and.b32 high, high, 0x0F0F0F0F;
        prmt.b32 part, low, 0x43434343, 0x4140;
        fma.rn.bf16x2 $0, part, one, less;
        prmt.b32 part, low, 0x43434343, 0x4342;
        fma.rn.bf16x2 $1, part, one, less;
        prmt.b32 part, high, 0x43434343, 0x4140;
        fma.rn.bf16x2 $2, part, one, less;
        prmt.b32 part, high, 0x43434343, 0x4342;
        fma.rn.bf16x2 $3, part, one, less;
        }""",
        "=r,=r,=r,=r,r",
        [both],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@helper
def halves(codes, target, inside, D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    """Heads `target` [N] -> their first and second D / 2 channels, [N, HALF] each, zeros behind; HALF a power of 2."""
    column = tl.arange(0, HALF)[None, :]
    mask = inside[:, None] & (column < D // 2)
    if BITS == 4:
        both = tl.load(codes + target[:, None] * (D // 2) + column, mask=mask, other=0)
        if tl.bfloat16 == KIND:
            return _nibbles(both)
        first, second = (both & 15).to(tl.float32), (both >> 4).to(tl.float32)
    else:
        at = target[:, None] * D + column
        first, second = tl.load(codes + at, mask=mask, other=0), tl.load(codes + at + D // 2, mask=mask, other=0)
        if BITS == 8:
            first, second = first.to(tl.float32), second.to(tl.float32)
    return first.to(KIND), second.to(KIND)


@helper
def numbers_of(numbers, target, inside, BITS: tl.constexpr):
    """(scale, zero in steps of a code) of heads `target` [N], float32."""
    word = tl.load(numbers + target, mask=inside, other=0).to(tl.uint32, bitcast=True)
    steps: tl.constexpr = 1 if BITS == 8 else 16
    return (word << 16).to(tl.float32, bitcast=True), (word >> 16).to(tl.float32) * (1.0 / steps)


@dataclass(frozen=True, slots=True)
class Part:
    """Keys or values, [blocks, kv_heads, block_size, ...] each.

    codes: [..., D] as they are, or uint8 [..., D * bits / 8]. numbers: int32, of quantised heads, else None: the bits
    of the bfloat16 scale in the low half, the zero above. They are whole words because `cp.async`, which brings a tile
    to shared memory while another is computed, copies 4 bytes or more: scales of 2 bytes would be waited for.
    """

    codes: torch.Tensor
    numbers: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class TritonKv:
    """One layer's keys and values. bits: 16 for what keeps the type of the activations. signs: float32 [D], of
    quantised heads."""

    keys: Part
    values: Part
    head_dim: int
    bits: int
    signs: torch.Tensor | None

    @property
    def block_size(self) -> int:
        return self.keys.codes.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.keys.codes.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """As the kernels take them: codes and numbers of the keys, then of the values."""
        return self.keys.codes, self.keys.numbers, self.values.codes, self.values.numbers

    @property
    def half(self) -> int:
        """Channels of half a head, as the kernels pad it."""
        return max(16, int(triton.next_power_of_2(self.head_dim // 2)))

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors if tensor is not None)


def make_kv(
    blocks: int,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    cache: str = "auto",
    device: torch.device | str = "cuda",
) -> TritonKv:
    """Empty storage for activations of `dtype`; cache as Kernels.make_kv. Raises TypeError, ValueError."""
    if dtype not in KINDS:
        raise TypeError(f"the KV is for {dtype}; the Triton kernels take float32, bfloat16 and float16")
    bits = _bits(head_dim, dtype, cache)
    shape = (blocks, kv_heads, block_size)

    def part() -> Part:
        if bits is None:
            return Part(torch.zeros(*shape, head_dim, dtype=dtype, device=device))
        return Part(
            torch.zeros(*shape, head_dim * bits // 8, dtype=torch.uint8, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
        )

    return TritonKv(part(), part(), head_dim, bits or PLAIN, None if bits is None else signs(head_dim).to(device))


def token_bytes(kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str) -> int:
    """Bytes of one token's keys and values in one layer, as `make_kv` stores them. Raises ValueError for what it
    refuses."""
    bits = _bits(head_dim, dtype, cache)
    return 2 * kv_heads * (head_dim * dtype.itemsize if bits is None else head_dim * bits // 8 + 4)


def _bits(head_dim: int, dtype: torch.dtype, cache: str) -> int | None:
    """As `bits_of`, for heads that the kernels take."""
    bits = bits_of(cache, dtype)
    if head_dim % 2 or not 2 <= head_dim <= 256:
        raise ValueError(f"{head_dim = }; the Triton kernels take even numbers of channels up to 256")
    if bits is not None and (head_dim < 32 or head_dim & (head_dim - 1)):
        raise ValueError(f"{head_dim = }; with a KV cache of {cache} the Triton kernels take 32, 64, 128 and 256")
    return bits
