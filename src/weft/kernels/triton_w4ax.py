"""Linear layers with 4-bit weights for GPUs of compute capability 8.0 and up, in Triton.

W4A8: the input is prepared and quantised in one kernel (triton_rows.py), which also computes the norm or the gated
activation before it where only this layer reads them, and multiplied on the INT8 units by another (triton_matmul.py).
weft/comet/reference.py says what is computed; from the input's values on the results are the same bits. W4A16, where it
is asked for: the input keeps its 16 bits, the weight is made 16-bit in registers.

Importing this module needs triton; nothing imports it before it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from weft.kernels.triton_matmul import w4a8_kernel, w4a16_kernel
from weft.kernels.triton_numbers import product_kind
from weft.kernels.triton_rows import Norm, Rows, prepare_rows, quantise_rows
from weft.kernels.triton_tiles import W4A8, W4A16, ProductTile, architecture
from weft.kernels.w4ax_weights import BLOCK, Form, Weights, check_weights, compact_scales

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
INVARIANT = 64  # rows, whose tile then serves any number of them


@dataclass(frozen=True, slots=True)
class TritonW4Ax:
    """A packed quantised weight, block after block of 128 channels.

    wide: int8 [wide blocks, N, 128] or None. weight: int8 [the other blocks, N, 64], two values a byte.
    scales: float32 or bfloat16 [K / 128, N]. zeros: int8 [K / 128, N] or None. bias: float32 [N] or None.
    """

    form: Form
    wide: torch.Tensor | None
    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def inputs(self) -> int:
        return self.form.channels

    @property
    def outputs(self) -> int:
        return self.scales.shape[1]

    @property
    def wide_blocks(self) -> int:
        return 0 if self.wide is None else len(self.wide)

    @property
    def bytes(self) -> int:
        parts = (self.wide, self.weight, self.scales, self.zeros, self.bias)
        return sum(part.nbytes for part in parts if part is not None)


def pack_w4ax(
    values: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    permutation: torch.Tensor | None = None,
    outlier_blocks: int = 0,
    hadamard: bool = False,
    zeros: torch.Tensor | None = None,
    exact_a4: bool = False,
    device: torch.device | str | None = None,
) -> TritonW4Ax:
    """Repack values int8 [N, K], -8 to 7, and scales [N, K / 128], on `device` (by default where the values are).

    The first `outlier_blocks` blocks may hold values from -128 to 127; they then keep 8 bits. A weight is
    (value - zero) * scale, with zeros int8 [N, K / 128], -8 to 7. The input is prepared first: place i takes channel
    permutation[i], and with `hadamard` the other blocks are transformed. Its blocks are quantised to 8 bits; with
    `exact_a4` those that are no outlier blocks to 4. Raises ValueError, TypeError.
    """
    checked = check_weights(values, scales, bias, permutation, outlier_blocks, hadamard, zeros, exact_a4)
    device = values.device if device is None else torch.device(device)
    wide, weight = _blockwise(checked)
    return TritonW4Ax(
        checked.form.to(device),
        None if wide is None else wide.to(device),
        weight.to(device),
        compact_scales(checked.scales.T.contiguous()).to(device),
        None if checked.zeros is None else checked.zeros.T.contiguous().to(device),
        None if checked.bias is None else checked.bias.to(device),
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows as the product with `packed` takes them: quantised, or permuted and transformed in 16 bits. dtype: of the
    activations that they stand for."""

    rows: Rows | torch.Tensor
    packed: TritonW4Ax
    dtype: torch.dtype


def prepare(
    x: torch.Tensor, packed: TritonW4Ax, norm: Norm | None = None, *, gated: bool = False, sixteen: bool = False
) -> Prepared:
    """x [T, K], prepared in one kernel with the norm before it, if one is given. gated: x is [T, 2 K], and silu(first
    half) * second half is prepared. sixteen: for W4A16. Raises TypeError, ValueError."""
    if sixteen:
        _check_sixteen(x)
        return Prepared(prepare_rows(x, packed.form, norm, gated=gated), packed, x.dtype)
    return Prepared(quantise_rows(x, packed.form, norm, gated=gated), packed, x.dtype)


def multiply_prepared(x: Prepared, dtype: torch.dtype | None = None, *, invariant: bool = False) -> torch.Tensor:
    """[T, N] in the type of the activations or `dtype`. invariant: as `linear_a16` has it."""
    dtype = dtype or x.dtype
    if isinstance(x.rows, Rows):
        return multiply(x.rows, x.packed, dtype)
    return _multiply_a16(x.rows, x.packed, dtype, invariant, None)


def linear(x: torch.Tensor, packed: TritonW4Ax, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x [T, K] -> [T, N] in x's type or `dtype`."""
    return multiply(quantise_rows(x, packed.form), packed, dtype or x.dtype)


def multiply(rows: Rows, packed: TritonW4Ax, dtype: torch.dtype, *, tile: ProductTile | None = None) -> torch.Tensor:
    """Rows quantised in `packed.form` -> [T, N] in `dtype`. tile: other than that of this GPU."""
    return _multiply(rows, packed, dtype, None, tile)


def accumulators(rows: Rows, packed: TritonW4Ax) -> torch.Tensor:
    """int32 [T, N, K / 128]: the exact sums of each block, by the kernel that `multiply` runs. For tests."""
    count = len(rows.values)
    sums = torch.empty(packed.form.blocks, count, packed.outputs, dtype=torch.int32, device=rows.values.device)
    _multiply(rows, packed, torch.float32, sums)
    return sums.permute(1, 2, 0)


def linear_a16(
    x: torch.Tensor,
    packed: TritonW4Ax,
    dtype: torch.dtype | None = None,
    *,
    invariant: bool = False,
    tile: ProductTile | None = None,
) -> torch.Tensor:
    """As `linear`, but the prepared input keeps its 16 bits: x bfloat16 or float16. invariant: in one tile for any
    number of rows, for the tile decides over the instruction, and with it over the order of sums. tile: other than
    that of this GPU."""
    _check_sixteen(x)
    return _multiply_a16(prepare_rows(x, packed.form), packed, dtype or x.dtype, invariant, tile)


def _multiply_a16(
    prepared: torch.Tensor, packed: TritonW4Ax, dtype: torch.dtype, invariant: bool, tile: ProductTile | None
) -> torch.Tensor:
    y = _output(prepared, packed, dtype)
    if len(y):
        table = W4A16[architecture(y.device)]
        chosen = tile or tile_of(table, INVARIANT if invariant else len(y), packed.outputs)
        m, n = chosen.size
        w4a16_kernel[(triton.cdiv(len(y), m), triton.cdiv(packed.outputs, n))](
            prepared,
            packed.wide,
            packed.weight,
            packed.scales,
            packed.zeros,
            packed.bias,
            y,
            len(y),
            packed.outputs,
            packed.form.blocks,
            packed.wide_blocks,
            M=m,
            N=n,
            KIND=product_kind(prepared.dtype),
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
    return y


def _multiply(
    rows: Rows, packed: TritonW4Ax, dtype: torch.dtype, sums: torch.Tensor | None, tile: ProductTile | None = None
) -> torch.Tensor:
    if rows.values.dtype is not torch.int8 or rows.values.shape[1] != packed.inputs:
        raise ValueError(
            f"rows are {rows.values.dtype} {list(rows.values.shape)}; this weight takes int8 [T, {packed.inputs}]"
        )
    y = _output(rows.values, packed, dtype)
    if len(y):
        chosen = tile or tile_of(W4A8[architecture(y.device)], len(y), packed.outputs)
        m, n = chosen.size
        w4a8_kernel[(triton.cdiv(len(y), m), triton.cdiv(packed.outputs, n))](
            rows.values,
            rows.scales,
            rows.totals,
            packed.wide,
            packed.weight,
            packed.scales,
            packed.zeros,
            packed.bias,
            y,
            sums,
            len(y),
            packed.outputs,
            packed.form.blocks,
            packed.wide_blocks,
            M=m,
            N=n,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=False,
        )
    return y


def _check_sixteen(x: torch.Tensor) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"x is {x.dtype}; a product with 16-bit rows takes bfloat16 and float16")


def _output(rows: torch.Tensor, packed: TritonW4Ax, dtype: torch.dtype) -> torch.Tensor:
    if rows.device != packed.weight.device:
        raise ValueError(f"the rows are on {rows.device} and the weight on {packed.weight.device}")
    if dtype not in OUTPUTS:
        raise TypeError(f"outputs in {dtype} were asked for; the Triton kernels write float32, bfloat16 and float16")
    return torch.empty(len(rows), packed.outputs, dtype=dtype, device=rows.device)


def tile_of(table: tuple[ProductTile, ...], rows: int, outputs: int) -> ProductTile:
    """The tile for a product of so many rows and outputs."""
    return next(one for one in table if rows <= one.most[0] and outputs <= one.most[1])


def _blockwise(weights: Weights) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(wide blocks [wide, N, 128] or None, the others [rest, N, 64] with channels j and 64 + j in byte j)."""
    blocks = weights.values.view(weights.outputs, -1, BLOCK).transpose(0, 1)
    wide, narrow = blocks[: weights.wide], blocks[weights.wide :]
    low, high = narrow[..., : BLOCK // 2], narrow[..., BLOCK // 2 :]
    return wide.contiguous() if weights.wide else None, ((low & 15) | (high << 4)).contiguous()
