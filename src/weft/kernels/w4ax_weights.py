"""What every backend is given for a linear layer with 4-bit weights: the arguments of `pack_w4ax`, checked.

Plain tensors, as `weft.comet` has them; each backend brings them into the layout that its kernels read best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

BLOCK = 128  # channels that share a scale


@dataclass(frozen=True, slots=True)
class Form:
    """How a row is prepared: place i takes channel permutation[i] (int32 [K], or None); the blocks from `outliers` on
    go through a Hadamard transform where `hadamard` says so; the leading `eight` blocks get 8 bits, the others 4."""

    channels: int
    permutation: torch.Tensor | None
    outliers: int
    eight: int
    hadamard: bool

    @property
    def blocks(self) -> int:
        return self.channels // BLOCK

    def to(self, device: torch.device) -> Form:
        order = self.permutation
        return self if order is None else replace(self, permutation=order.to(device))


@dataclass(frozen=True, slots=True)
class Weights:
    """values int8 [N, K]; scales float32 [N, K / 128]; bias float32 [N] or None; zeros int8 [N, K / 128] or None.

    The leading `wide` blocks, all or none of the outlier blocks, hold values of 8 bits.
    """

    values: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    zeros: torch.Tensor | None
    wide: int
    form: Form

    @property
    def outputs(self) -> int:
        return self.values.shape[0]


def check_weights(
    values: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    permutation: torch.Tensor | None,
    outlier_blocks: int,
    hadamard: bool,
    zeros: torch.Tensor | None,
    exact_a4: bool,
) -> Weights:
    """The arguments of `pack_w4ax` as contiguous tensors. Raises ValueError, TypeError."""
    if values.dtype is not torch.int8:
        raise TypeError(f"values are {values.dtype}; they must be int8")
    if values.dim() != 2 or 0 in values.shape or values.shape[1] % BLOCK:
        raise ValueError(
            f"values have shape {list(values.shape)}; they must be [out, in], and {BLOCK} must divide `in`"
        )
    outputs, inputs = values.shape
    blocks = inputs // BLOCK
    if scales.shape != (outputs, blocks):
        raise ValueError(f"scales have shape {list(scales.shape)}; this weight needs {[outputs, blocks]}")
    stored = scales.to(torch.float32).contiguous()
    if not bool(stored.isfinite().all()):
        raise ValueError("scales must be finite float32 numbers")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias has shape {list(bias.shape)}; this weight needs {[outputs]}")
    if not 0 <= outlier_blocks <= blocks:
        raise ValueError(f"{outlier_blocks = }; {inputs} channels have {blocks} blocks")
    eight = outlier_blocks if exact_a4 else blocks
    return Weights(
        values.contiguous(),
        stored,
        None if bias is None else bias.to(torch.float32).contiguous(),
        _zeros(zeros, outputs, blocks),
        _wide_blocks(values, outlier_blocks),
        Form(inputs, _order(permutation, inputs), outlier_blocks, eight, hadamard),
    )


def compact_scales(scales: torch.Tensor) -> torch.Tensor:
    """As bfloat16 where it holds all of them exactly, else as they are."""
    short = scales.to(torch.bfloat16)
    return short if torch.equal(short.float(), scales) else scales


def _zeros(zeros: torch.Tensor | None, outputs: int, blocks: int) -> torch.Tensor | None:
    if zeros is None:
        return None
    if zeros.dtype is not torch.int8:
        raise TypeError(f"zeros are {zeros.dtype}; they must be int8")
    if zeros.shape != (outputs, blocks):
        raise ValueError(f"zeros have shape {list(zeros.shape)}; this weight needs {[outputs, blocks]}")
    least, most = int(zeros.min()), int(zeros.max())
    if least < -8 or most > 7:
        raise ValueError(f"zeros go from {least} to {most}; they must be -8 to 7")
    return zeros.contiguous()


def _wide_blocks(values: torch.Tensor, outlier_blocks: int) -> int:
    """How many leading blocks need 8 bits: all outlier blocks, or none. Raises ValueError for a value out of range."""
    border = outlier_blocks * BLOCK
    outliers, others = values[:, :border], values[:, border:]
    for part, low, high in ((outliers, -128, 127), (others, -8, 7)):
        if part.numel() and not low <= int(part.min()) <= int(part.max()) <= high:
            raise ValueError(f"values go from {int(part.min())} to {int(part.max())}; they must be {low} to {high}")
    narrow = not outliers.numel() or -8 <= int(outliers.min()) <= int(outliers.max()) <= 7
    return 0 if narrow else outlier_blocks


def _order(permutation: torch.Tensor | None, inputs: int) -> torch.Tensor | None:
    """int32, checked: the kernels read where it points."""
    if permutation is None:
        return None
    places = torch.arange(inputs, device=permutation.device)
    if permutation.shape != (inputs,) or not torch.equal(permutation.long().sort().values, places):
        raise ValueError(f"the permutation must hold each of 0 to {inputs - 1} once")
    return permutation.to(torch.int32).contiguous()
