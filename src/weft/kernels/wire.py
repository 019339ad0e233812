"""Rows between ranks, by the kernels of the C++ extension: quantised rows on their way, and an owner's work at a seam.

What travels of a row of a quantised linear's input (W4AxWeights::wire_bytes): its integers, block after block, 128
bytes or 64 where they have 4 bits, and then a float32 scale for each block. The sums of the integers are counted anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft.kernels.cpu import CpuKernels
from weft.kernels.quantised import ROW_BYTES, TYPES, PreparedRows, W4AxLinear
from weft.kernels.w4ax_weights import BLOCK


@dataclass(frozen=True, slots=True)
class W4AxInput:
    """The input format of a packed linear: `weave.collective.Quantise`."""

    kernels: CpuKernels
    packed: W4AxLinear

    @property
    def row_bytes(self) -> int:
        return self.packed.native.wire_bytes

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        count = self._rows(rows, self.packed.inputs, (torch.float32, torch.bfloat16))
        wire = torch.empty((count, self.row_bytes), dtype=torch.uint8)
        self.kernels.native.encode_rows(self.packed.native, rows.data_ptr(), count, TYPES[rows.dtype], wire.data_ptr())
        return wire

    def decode(self, wire: torch.Tensor, dtype: torch.dtype) -> PreparedRows:
        count = self._rows(wire, self.row_bytes, (torch.uint8,))
        prepared = self.room(count, dtype)
        self.kernels.native.decode_rows(self.packed.native, wire.data_ptr(), count, prepared.data.data_ptr())
        return prepared

    def room(self, rows: int, dtype: torch.dtype) -> PreparedRows:
        """Memory for so many rows."""
        data = torch.empty(rows * self.packed.inputs // BLOCK * ROW_BYTES, dtype=torch.uint8)
        return PreparedRows(data, rows, self.packed, dtype)

    def _rows(self, tensor: torch.Tensor, columns: int, dtypes: tuple[torch.dtype, ...]) -> int:
        rows = len(tensor)
        if tensor.dtype not in dtypes or tensor.shape != (rows, columns) or not tensor.is_contiguous():
            raise ValueError(
                f"rows are {tensor.dtype} {list(tensor.shape)} {tensor.stride()}; they must be contiguous "
                f"[n, {columns}], {' or '.join(map(str, dtypes))}"
            )
        return rows


def input_format(kernels: Any, packed: Any) -> W4AxInput | None:
    """How the input of `packed` travels where these kernels can take it quantised; None where they cannot."""
    if isinstance(kernels, CpuKernels) and isinstance(packed, W4AxLinear):
        return W4AxInput(kernels, packed)
    return None


@dataclass(frozen=True, slots=True)
class FusedRows:
    """`weave.rows.JoinRows` in one pass over the rows, with the bits of these kernels' `add_rms_norm`."""

    kernels: CpuKernels

    def __call__(
        self,
        parts: Sequence[torch.Tensor],
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        quantise: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, size = parts[0].shape
        for part in parts:
            if part.shape != (rows, size) or part.dtype is not parts[0].dtype or not part.is_contiguous():
                raise ValueError(f"a part is {part.dtype} {list(part.shape)}; all must be contiguous {[rows, size]}")
        hidden = weight.new_empty((rows, size))
        form = w4ax_format(quantise)
        wire = None if form is None else torch.empty((rows, form.row_bytes), dtype=torch.uint8)
        self.kernels.native.join_rows(
            TYPES[weight.dtype],
            TYPES[parts[0].dtype],
            [part.data_ptr() for part in parts],
            residual.data_ptr(),
            weight.data_ptr(),
            eps,
            rows,
            size,
            hidden.data_ptr(),
            0 if wire is None else wire.data_ptr(),
            None if form is None else form.packed.native,
        )
        return hidden if wire is None else wire, residual


def w4ax_format(quantise: Any) -> W4AxInput | None:
    """Raises TypeError for a format that is not of these kernels."""
    if quantise is not None and not isinstance(quantise, W4AxInput):
        raise TypeError(f"quantise is {type(quantise).__name__}; the C++ kernels take W4AxInput or None")
    return quantise
