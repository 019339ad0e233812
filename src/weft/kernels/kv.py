"""Keys and values in 8 or 4 bits: what is stored, to the bit, and what attention makes of it.

Each head of each token is on its own: key (after rotary) and value, float32 [D], are spread, quantised and stored as

    codes   D integers of 0 .. top, which is 255 (8 bits) or 15 (4 bits)
    scale   bfloat16: the step between two codes
    zero    8 bits: the place of 0.0 among the codes, in whole (8 bits) or sixteenth steps (4 bits)

so that D = 64 takes 35 bytes instead of bfloat16's 128. Arithmetic is float32 with one rounding per operation, halves
to even. `spread` is a Hadamard transform behind a fixed pattern of signs, where D is a power of two: an outlier channel
becomes a little of every channel. Queries are spread as keys are (and divided by D), and what attention sums up is
gathered again; scores and sums stay what they were.

    v = spread(x)                       signs, then sums and differences of channels 1, 2, 4 ... apart
    scale = bfloat16(max(v, 0) / top - min(v, 0) / top)
    zero  = round(-min(v, 0) / scale * steps)            steps: 1 (8 bits) or 16 (4 bits); at most 255
    code  = round(v / scale + zero / steps)              at most top
    v'    = (code - zero / steps) * scale

With AVX-512, queries of bfloat16 are rounded to 8 bits as well (whole steps of a 127th of the greatest, of each head of
each token), for integers are multiplied twice as fast: 0.7 % of a query, where the codes of a key are off by 11 %
(4 bits) or 0.7 % (8 bits).

A head with a NaN or an infinity has the scale NaN and codes of 0, so whoever reads it gets NaN; one whose scale would
be under 2^-100 is all zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BITS = {"int8": 8, "int4": 4}
STEPS = {8: 1, 4: 16}
TINY = 2.0**-100


def bits_of(cache: str, dtype: torch.dtype) -> int | None:
    """Bits of a code, or None for keys and values as they are. Raises ValueError."""
    if cache == "bf16" and dtype is not torch.bfloat16:
        raise ValueError(
            f"a KV cache of bf16 needs activations of bfloat16, and they are {str(dtype).removeprefix('torch.')}; "
            "auto, int8 and int4 would work"
        )
    if cache not in ("auto", "bf16", *BITS):
        raise ValueError(f"there is no KV cache of {cache!r}; what would work: auto, bf16, {', '.join(BITS)}")
    return BITS.get(cache)


def token_bytes(kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str) -> int:
    """Bytes of one token's keys and values in one layer, as the C++ kernels store them."""
    bits = bits_of(cache, dtype)
    multiple = 32 if bits == 4 else 16  # the channels of values are padded
    channels = head_dim + -(-head_dim // multiple) * multiple
    return kv_heads * (channels * dtype.itemsize if bits is None else channels * bits // 8 + 6)


def spreads(head_dim: int) -> bool:
    return head_dim & (head_dim - 1) == 0


def spread(x: torch.Tensor) -> torch.Tensor:
    """x float32 [..., D] -> the same, transformed (not normalised: D times `gather` of it is x) or untouched."""
    return _hadamard(x * signs(x.shape[-1])) if spreads(x.shape[-1]) else x


def gather(x: torch.Tensor) -> torch.Tensor:
    """What undoes `spread`; exact but for its sums, for D is a power of two."""
    return _hadamard(x) * signs(x.shape[-1]) / x.shape[-1] if spreads(x.shape[-1]) else x


def signs(size: int) -> torch.Tensor:
    """+1 or -1 for each channel. The pattern is a bent function's, which looks like no row of a Hadamard matrix: values
    that were transformed already (`weft quantize` does so) are not transformed back to where they came from."""
    return torch.tensor([-1.0 if (i & i >> 1 & 0x55).bit_count() % 2 else 1.0 for i in range(size)])


def _hadamard(x: torch.Tensor) -> torch.Tensor:
    stride = 1
    while stride < x.shape[-1]:
        first, second = x.reshape(*x.shape[:-1], x.shape[-1] // (2 * stride), 2, stride).unbind(-2)
        x = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        stride *= 2
    return x


def quantise(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x float32 [..., D] -> codes uint8 [..., D], scale bfloat16 [...], zero uint8 [...]."""
    top, steps = torch.tensor(2.0**bits - 1), STEPS[bits]  # a tensor: torch divides by it once
    low, high = x.amin(dim=-1, keepdim=True).clamp(max=0), x.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = (high / top - low / top).bfloat16()
    usable = x.isfinite().all(dim=-1, keepdim=True) & (scale >= TINY)
    step = torch.where(usable, scale.float(), 1.0)
    x, low = torch.where(usable, x, 0.0), torch.where(usable, low, 0.0)
    zero = (-low / step * steps).round().clamp(max=255)
    codes = (x / step + zero / steps).round().clamp(0, 2**bits - 1)
    nan, nothing = torch.tensor(0x7FC0, dtype=torch.int16).view(torch.bfloat16), scale.new_zeros(())
    scale = torch.where(usable, scale, torch.where(scale < TINY, nothing, nan))  # a NaN is under nothing
    return codes.byte(), scale.squeeze(-1), zero.byte().squeeze(-1)


def dequantise(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """What was quantised, float32 [..., D]."""
    return (codes.float() - zero[..., None].float() / STEPS[bits]) * scale[..., None].float()


@dataclass(frozen=True, slots=True)
class Codes:
    """codes uint8 [blocks, block_size, kv_heads, head_dim], scales bfloat16 and zeros uint8 [.., kv_heads]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @staticmethod
    def make(blocks: int, block_size: int, kv_heads: int, head_dim: int) -> Codes:
        shape = (blocks, block_size, kv_heads)
        numbers = torch.zeros(shape, dtype=torch.uint8)
        return Codes(torch.zeros(*shape, head_dim, dtype=torch.uint8), numbers.bfloat16(), numbers)


@dataclass(frozen=True, slots=True)
class QuantisedKv:
    """One layer's keys and values for the reference kernels."""

    keys: Codes
    values: Codes
    bits: int

    @property
    def block_size(self) -> int:
        return self.keys.codes.shape[1]

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """float32 [T, kv_heads, head_dim] each, into slots [T]."""
        at = (slots // self.block_size, slots % self.block_size)
        for part, x in ((self.keys, keys), (self.values, values)):
            codes, scale, zero = quantise(spread(x), self.bits)
            part.codes[at], part.scales[at], part.zeros[at] = codes, scale, zero

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Whole blocks to others."""
        for part in (self.keys, self.values):
            for numbers in (part.codes, part.scales, part.zeros):
                numbers[list(target)] = numbers[list(source)]

    def read(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of these blocks as they were spread, float32 [slots, kv_heads, head_dim] each."""
        keys, values = (
            dequantise(part.codes[blocks], part.scales[blocks], part.zeros[blocks], self.bits).flatten(0, 1)
            for part in (self.keys, self.values)
        )
        return keys, values

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """float32 [.., head_dim] -> what the stored keys are multiplied by."""
        return spread(q) / q.shape[-1] if spreads(q.shape[-1]) else q

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """Weighted sums of stored values, float32 [.., head_dim] -> attention's output."""
        return gather(x)
