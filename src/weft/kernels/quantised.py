"""Linear layers with 4-bit weights and integer activations, for the kernels of the C++ extension.

Plain tensors and numbers in, as `weft.comet` has them: its reference.py says what is computed, and the results are the
same bits. One call prepares and quantises the input, one multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weft import _native

BLOCK = 128  # channels that share a scale
# Of a quantised block of one row: the values, their scale and their sum, and its part of a row more (csrc/w4ax.h).
ROW_BYTES = BLOCK + 16
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True, slots=True)
class W4AxLinear:
    """A packed quantised weight. Its memory is given back when the object goes."""

    native: _native.PackedW4Ax
    inputs: int
    outputs: int

    @property
    def bytes(self) -> int:
        return self.native.bytes


def pack_w4ax(
    backend: _native.Backend,
    values: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    permutation: torch.Tensor | None = None,
    outlier_blocks: int = 0,
    hadamard: bool = False,
    zeros: torch.Tensor | None = None,
    exact_a4: bool = False,
) -> W4AxLinear:
    """Repack values int8 [N, K], -8 to 7, with scales [N, K / 128] and zeros int8 [N, K / 128] or None; bias [N].

    A weight is (value - zero) * scale. Scales that bfloat16 holds exactly take half the memory without zeros.
    The first `outlier_blocks` blocks of 128 channels may hold values from -128 to 127; they then keep 8 bits. The input
    is prepared first: place i takes channel permutation[i], and with `hadamard` the other blocks are transformed. Its
    blocks are quantised to 8 bits; with `exact_a4` those that are no outlier blocks to 4. Raises ValueError, TypeError.
    """
    outputs, inputs = _shape(values)
    blocks = inputs // BLOCK
    if scales.shape != (outputs, blocks):
        raise ValueError(
            f"scales have shape {list(scales.shape)}; values of {[outputs, inputs]} need {[outputs, blocks]}"
        )
    stored = scales.to(torch.float32).contiguous()
    if not bool(stored.isfinite().all()):
        raise ValueError("scales must be finite")
    if zeros is not None and (zeros.dtype is not torch.int8 or zeros.shape != (outputs, blocks)):
        raise ValueError(f"zeros are {zeros.dtype} {list(zeros.shape)}; they must be int8 {[outputs, blocks]}")
    offsets = None if zeros is None else zeros.contiguous()
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias has shape {list(bias.shape)}; the weight needs {[outputs]}")
    if not 0 <= outlier_blocks <= blocks:
        raise ValueError(f"{outlier_blocks = }; {inputs} channels have {blocks} blocks")
    rows = values.contiguous()
    floats = None if bias is None else bias.to(torch.float32).contiguous()
    order = None if permutation is None else _order(permutation, inputs)
    native = _native.PackedW4Ax(
        backend,
        rows.data_ptr(),
        stored.data_ptr(),
        0 if offsets is None else offsets.data_ptr(),
        0 if floats is None else floats.data_ptr(),
        0 if order is None else order.data_ptr(),
        outputs,
        inputs,
        outlier_blocks,
        _wide_blocks(rows, outlier_blocks),
        hadamard,
        exact_a4,
        offsets is not None or not torch.equal(stored.bfloat16().float(), stored),
    )
    return W4AxLinear(native, inputs, outputs)


def linear_into(backend: _native.Backend, x: torch.Tensor, packed: W4AxLinear, y: torch.Tensor) -> torch.Tensor:
    """x [T, in] float32 or bfloat16 -> y [T, out] of x's type or float32, which is returned."""
    quantised = quantise_rows(backend, x, packed)
    rows = x.shape[0]
    if y.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"x is {x.dtype} and y {y.dtype}; y must be that or float32")
    if y.shape != (rows, packed.outputs) or not y.is_contiguous():
        raise ValueError(f"y is {list(y.shape)} {y.stride()}; it must be contiguous {[rows, packed.outputs]}")
    backend.multiply_w4ax(packed.native, quantised.data_ptr(), rows, y.data_ptr(), _TYPES[y.dtype])
    return y


def quantise_rows(backend: _native.Backend, x: torch.Tensor, packed: W4AxLinear) -> torch.Tensor:
    """x [T, in], prepared and quantised for `packed`, as the product wants it; `unpack_rows` splits it."""
    kind = _TYPES.get(x.dtype)
    if kind is None:
        raise TypeError(f"x is {x.dtype}; the C++ kernels take float32 and bfloat16")
    rows = x.shape[0]
    if x.shape != (rows, packed.inputs) or not x.is_contiguous():
        raise ValueError(f"x is {list(x.shape)} {x.stride()}; it must be contiguous [T, {packed.inputs}]")
    quantised = torch.empty(rows * packed.inputs // BLOCK * ROW_BYTES, dtype=torch.uint8)
    backend.quantise_w4ax(packed.native, x.data_ptr(), rows, kind, quantised.data_ptr())
    return quantised


def unpack_rows(quantised: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values int8 [T, K], scales float32 [T, K / 128], sums of the values int32 [T, K / 128])."""
    blocks = len(quantised) // max(rows * ROW_BYTES, 1)
    stride = rows + 1 if rows >= 32 and rows % 8 == 0 else rows
    sizes = [blocks * stride * BLOCK, blocks * stride * 4, blocks * stride * 4]
    values, scales, totals = torch.split(quantised[: sum(sizes)], sizes)
    return (
        values.view(torch.int8).view(blocks, stride, BLOCK)[:, :rows].transpose(0, 1).reshape(rows, blocks * BLOCK),
        scales.view(torch.float32).view(blocks, stride)[:, :rows].T.contiguous(),
        totals.view(torch.int32).view(blocks, stride)[:, :rows].T.contiguous(),
    )


def _shape(values: torch.Tensor) -> tuple[int, int]:
    if values.dtype is not torch.int8:
        raise TypeError(f"values are {values.dtype}; they must be int8")
    if values.dim() != 2 or 0 in values.shape or values.shape[1] % BLOCK:
        raise ValueError(
            f"values have shape {list(values.shape)}; they must be [out, in], and {BLOCK} must divide `in`"
        )
    outputs, inputs = values.shape
    return outputs, inputs


def _wide_blocks(values: torch.Tensor, outlier_blocks: int) -> int:
    """How many leading blocks need 8 bits: all outlier blocks, or none. Raises ValueError for a value out of range."""
    border = outlier_blocks * BLOCK
    outliers, others = values[:, :border], values[:, border:]
    for part, low, high in ((outliers, -128, 127), (others, -8, 7)):
        if part.numel() and not low <= int(part.min()) <= int(part.max()) <= high:
            raise ValueError(f"values go from {int(part.min())} to {int(part.max())}; they must be {low} to {high}")
    narrow = not outliers.numel() or -8 <= int(outliers.min()) <= int(outliers.max()) <= 7
    return 0 if narrow else outlier_blocks


def _order(permutation: torch.Tensor, inputs: int) -> torch.Tensor:
    """int32, checked: the kernels read where it points."""
    if permutation.shape != (inputs,) or not torch.equal(permutation.long().sort().values, torch.arange(inputs)):
        raise ValueError(f"the permutation must hold each of 0 to {inputs - 1} once")
    return permutation.to(torch.int32).contiguous()
