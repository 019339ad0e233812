"""The truth of the W4Ax linear layer: exact integers, a few lines of torch each. Other backends are compared with it.

The input of a linear layer is first *prepared* (`InputForm`): its channels are permuted, the leading `outlier_blocks`
blocks of 128 channels stay as they are, and the others go through a Hadamard transform where the form says so. Then
every row is quantised block by block:

    8 bits   a = max |x|;  s = a / 127;  q = rint(x * (127 / a)), from -127 to 127
    4 bits   e = the element of largest magnitude (the negative one among equals);
             s = e / -8;  q = rint(x * (-8 / e)), clipped to -8 .. 7: so e itself is -8, and all 16 levels are in use.
             A scale may be negative.

All in float32, one rounding for each operation, halves to even; 127 / a and -8 / e are a reciprocal and a product, as
torch divides a number by a tensor. A block whose largest magnitude is under 2**-100 is zero with scale 0; a block with
an infinity or a NaN has scale NaN, so that its outputs are NaN.

Weights are integers of 4 bits (or 8, for the outlier blocks) with one scale for each output and block; checkpoints of
others also have a zero point z for each. Then

    accumulator[t, n, b] = (sum over the block of q_x * q_w) - z * (sum over the block of q_x)      int32, exact
    y[t, n] = sum over b, in order, of accumulator * (scale_x[t, b] * scale_w[n, b]), + bias      float32
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weft.comet.hadamard import hadamard
from weft.comet.packing import BLOCK, split

TINY = 2.0**-100


@dataclass(frozen=True, slots=True)
class InputForm:
    """How the input of one or more linear layers is prepared.

    permutation: int [K]; place i of the prepared input takes channel permutation[i]. None: as they come.
    outlier_blocks: how many leading blocks keep 8-bit activations.
    hadamard: whether the other blocks are transformed.
    """

    channels: int
    permutation: torch.Tensor | None
    outlier_blocks: int
    hadamard: bool

    @property
    def blocks(self) -> int:
        return self.channels // BLOCK


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """values int8 [T, K], scales float32 [T, K / 128]."""

    values: torch.Tensor
    scales: torch.Tensor

    def dequantised(self) -> torch.Tensor:
        """float32 [T, K]."""
        return (split(self.values) * self.scales[..., None]).flatten(-2)


@dataclass(frozen=True, slots=True)
class QuantisedLinear:
    """Integer weights [N, K] (int8; -8..7, in the outlier blocks up to -128..127), columns in the order of the prepared
    input; scales float32 [N, K / 128]; bias float32 [N] or None; zeros int8 [N, K / 128], -8..7, None where all are 0.
    A weight is (value - zero) * scale.
    """

    values: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    zeros: torch.Tensor | None = None

    def dequantised(self) -> torch.Tensor:
        """float32 [N, K]."""
        values = split(self.values).float()
        values = values if self.zeros is None else values - self.zeros[..., None]
        return (values * self.scales[..., None]).flatten(-2)


def prepare(x: torch.Tensor, form: InputForm) -> torch.Tensor:
    """[..., K] -> float32 [..., K], permuted and transformed."""
    x = x.float() if form.permutation is None else x[..., form.permutation.long()].float()
    return rotate(x, form)


def rotate(x: torch.Tensor, form: InputForm) -> torch.Tensor:
    """The Hadamard transform of the blocks of `x` [..., K] that are not outlier blocks."""
    kept = form.outlier_blocks * BLOCK
    if not form.hadamard or kept == x.shape[-1]:
        return x
    return torch.cat((x[..., :kept], hadamard(x[..., kept:], BLOCK)), dim=-1)


def quantise_rows(prepared: torch.Tensor, outlier_blocks: int, *, exact_a4: bool) -> QuantisedRows:
    """Quantise float32 [T, K]: the leading `outlier_blocks` blocks to 8 bits, the others to 4 (8 unless `exact_a4`)."""
    blocks = split(prepared)
    eight = outlier_blocks if exact_a4 else blocks.shape[-2]
    parts = (_quantise8(blocks[..., :eight, :]), _quantise4(blocks[..., eight:, :]))
    values = torch.cat([part[0] for part in parts], dim=-2)
    return QuantisedRows(values.flatten(-2), torch.cat([part[1] for part in parts], dim=-1))


def accumulate(rows: QuantisedRows, weight: QuantisedLinear) -> torch.Tensor:
    """int32 [T, N, K / 128]: the integer dot products of each block, zero points subtracted."""
    x = split(rows.values.int())
    w = split(weight.values.int())
    # int32 products of torch are exact; a block's sum is at most 128 * 136 * 127, far from overflow.
    products = torch.stack([x[:, block] @ w[:, block].T for block in range(x.shape[1])], dim=-1)
    if weight.zeros is None:
        return products
    totals = x.sum(dim=-1, dtype=torch.int32)
    return products - totals[:, None, :] * weight.zeros.int()


def combine(accumulators: torch.Tensor, rows: QuantisedRows, weight: QuantisedLinear) -> torch.Tensor:
    """float32 [T, N] from the accumulators, block after block."""
    total = torch.zeros(accumulators.shape[:2])
    for block in range(accumulators.shape[-1]):
        scale = rows.scales[:, block, None] * weight.scales[None, :, block]
        total = total + accumulators[..., block].float() * scale
    return total if weight.bias is None else total + weight.bias


def linear(x: torch.Tensor, form: InputForm, weight: QuantisedLinear, *, exact_a4: bool = False) -> torch.Tensor:
    """[T, K] -> [T, N] in x's dtype. exact_a4: 4-bit activations as the paper has them, else 8 bits everywhere."""
    rows = quantise_rows(prepare(x, form), form.outlier_blocks, exact_a4=exact_a4)
    return combine(accumulate(rows, weight), rows, weight).to(x.dtype)


def _quantise8(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., B, 128] -> (int8 of that shape, float32 [..., B])."""
    largest = blocks.abs().amax(dim=-1)
    return _with_scale(blocks, largest, largest / 127, 127 / largest, -127, 127)


def _quantise4(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = blocks.amin(dim=-1), blocks.amax(dim=-1)
    extreme = torch.where(-low >= high, low, high)
    return _with_scale(blocks, torch.maximum(-low, high), extreme / -8, -8 / extreme, -8, 7)


def _with_scale(
    blocks: torch.Tensor,
    largest: torch.Tensor,
    scale: torch.Tensor,
    inverse: torch.Tensor,
    lowest: int,
    highest: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    finite = torch.isfinite(largest)
    usable = finite & (largest >= TINY)
    inverse = torch.where(usable, inverse, 0.0)
    scaled = torch.where(usable[..., None], blocks, 0.0) * inverse[..., None]
    values = scaled.round().clamp(lowest, highest).to(torch.int8)
    scale = torch.where(usable, scale, torch.where(finite, 0.0, torch.nan))
    return values, scale
