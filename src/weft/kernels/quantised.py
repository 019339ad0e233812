"""Linear layers with 4-bit weights and integer activations, for the kernels of the C++ extension.

Plain tensors and numbers in, as `weft.comet` has them: its reference.py says what is computed, and the results are the
same bits. One call prepares and quantises the input, one multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weft import _native
from weft.kernels.w4ax_weights import BLOCK, check_weights, compact_scales

# Of a quantised block of one row: the values, their scale and their sum, and its part of a row more (csrc/w4ax.h).
ROW_BYTES = BLOCK + 16
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # csrc/kernels.h: Type


@dataclass(frozen=True, slots=True)
class W4AxLinear:
    """A packed quantised weight. Its memory is given back when the object goes."""

    native: _native.PackedW4Ax
    inputs: int
    outputs: int

    @property
    def bytes(self) -> int:
        return self.native.bytes


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """Rows [T, in], prepared and quantised for one packed linear, as `quantise_rows` leaves them: for
    `CpuKernels.linear` in place of the rows themselves. dtype: theirs."""

    data: torch.Tensor
    rows: int
    packed: W4AxLinear
    dtype: torch.dtype


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
    given = check_weights(values, scales, bias, permutation, outlier_blocks, hadamard, zeros, exact_a4)
    form = given.form
    native = _native.PackedW4Ax(
        backend,
        given.values.data_ptr(),
        given.scales.data_ptr(),
        _address(given.zeros),
        _address(given.bias),
        _address(form.permutation),
        given.outputs,
        form.channels,
        outlier_blocks,
        given.wide,
        hadamard,
        exact_a4,
        given.zeros is not None or compact_scales(given.scales) is given.scales,
    )
    return W4AxLinear(native, form.channels, given.outputs)


def linear_into(backend: _native.Backend, x: torch.Tensor, packed: W4AxLinear, y: torch.Tensor) -> torch.Tensor:
    """x [T, in] float32 or bfloat16 -> y [T, out] of x's type or float32, which is returned."""
    return multiply_into(backend, PreparedRows(quantise_rows(backend, x, packed), x.shape[0], packed, x.dtype), y)


def multiply_into(backend: _native.Backend, x: PreparedRows, y: torch.Tensor) -> torch.Tensor:
    """The same of rows that are quantised already."""
    packed, rows = x.packed, x.rows
    if y.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"x is {x.dtype} and y {y.dtype}; y must be that or float32")
    if y.shape != (rows, packed.outputs) or not y.is_contiguous():
        raise ValueError(f"y is {list(y.shape)} {y.stride()}; it must be contiguous {[rows, packed.outputs]}")
    backend.multiply_w4ax(packed.native, x.data.data_ptr(), rows, y.data_ptr(), TYPES[y.dtype])
    return y


def quantise_rows(backend: _native.Backend, x: torch.Tensor, packed: W4AxLinear) -> torch.Tensor:
    """x [T, in], prepared and quantised for `packed`, as the product wants it; `unpack_rows` splits it."""
    kind = TYPES.get(x.dtype)
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


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
