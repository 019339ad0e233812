"""Linear layers with 4-bit weights for GPUs with INT4 tensor cores (sm_80, 86, 89): packing, and the call into CUDA.

csrc/cuda/call.h has the layouts, csrc/cuda/w4ax.cu the kernels. They are built where a CUDA toolkit is (CMake option
WEFT_CUDA) into a library of their own, which `Library` calls; nothing here needs it to be there. Rows come from
triton_rows.quantise_rows(nibbles=True), or from `pack_rows`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from weft.kernels.w4ax_weights import BLOCK, Form, Weights, check_weights

COLUMNS = 128  # outputs of a tile
MOST_SEGMENTS = 16
_LEAST_PIECES = 8  # of a segment: fewer do not fill the pipeline of copies


@dataclass(frozen=True, slots=True)
class CudaW4Ax:
    """A packed quantised weight; N' is N, padded to a multiple of 128.

    weights: uint8 [N' / 128, K / 128 + wide, 128 * 64]. scales: float32 [K / 128, N'].
    zeros: int8 [K / 128, N'] or None. bias: float32 [N] or None.
    cuts: where the segments of blocks begin, and the number of blocks.
    """

    form: Form
    weights: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    outputs: int
    wide: int
    cuts: tuple[int, ...]

    @property
    def segments(self) -> int:
        return len(self.cuts) - 1


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
    segments: int = 1,
    device: torch.device | str | None = None,
) -> CudaW4Ax:
    """Repack values int8 [N, K], -8 to 7 (in the outlier blocks -128 to 127), and scales [N, K / 128].

    The arguments are those of triton_w4ax.pack_w4ax. segments: in how many runs the blocks are summed; see
    `segments_for`. It changes the bits of the results, by the order of float additions, and so belongs to the weight.
    Raises ValueError, TypeError.
    """
    weights = check_weights(values, scales, bias, permutation, outlier_blocks, hadamard, zeros, exact_a4)
    form = weights.form
    most = min(MOST_SEGMENTS, form.blocks)
    if not 1 <= segments <= most:
        raise ValueError(f"{segments = }; {form.blocks} blocks can be summed in 1 to {most} runs")
    device = values.device if device is None else torch.device(device)
    padding = -weights.outputs % COLUMNS
    return CudaW4Ax(
        form.to(device),
        _weight_chunks(weights, padding).to(device),
        _columns(weights.scales, padding).to(device),
        None if weights.zeros is None else _columns(weights.zeros, padding).to(device),
        None if weights.bias is None else weights.bias.to(device),
        weights.outputs,
        weights.wide,
        cuts(form.blocks, weights.wide, form.eight, segments),
    )


def pieces_before(block: int, wide: int, eight: int) -> int:
    """What the blocks before `block` cost, in products of nibbles: 1 each, 2 with 8-bit rows, 4 with 8-bit weights."""
    return block + min(block, eight) + 2 * min(block, wide)


def cuts(blocks: int, wide: int, eight: int, segments: int) -> tuple[int, ...]:
    """Where `segments` runs of blocks begin that cost as nearly the same as whole blocks can, and the end."""
    whole = pieces_before(blocks, wide, eight)
    found = [0]
    for segment in range(1, segments):
        wanted = whole * segment / segments
        first, last = found[-1] + 1, blocks - (segments - segment)  # every segment has a block
        found.append(min(range(first, last + 1), key=lambda at: abs(pieces_before(at, wide, eight) - wanted)))
    return (*found, blocks)


def segments_for(outputs: int, blocks: int, wide: int, eight: int, multiprocessors: int) -> int:
    """How many segments give every multiprocessor a tile where there are few rows."""
    tiles = -(-outputs // COLUMNS)
    pieces = pieces_before(blocks, wide, eight)
    return max(1, min(-(-multiprocessors // tiles), pieces // _LEAST_PIECES, blocks, MOST_SEGMENTS))


def pack_rows(values: torch.Tensor, eight: int) -> torch.Tensor:
    """int8 [T, K], 8 bits in the leading `eight` blocks and 4 in the others -> uint8 [T, (eight + K / 128) * 64]."""
    return _bytes(_chunks(values, eight)).flatten(1)


def _chunks(values: torch.Tensor, eight: int) -> torch.Tensor:
    """int8 [R, K] -> nibbles uint8 [R, chunks, 128]; a block of 8 bits is two, the upper first."""
    blocks = values.view(len(values), values.shape[1] // BLOCK, BLOCK)
    slices = torch.stack((blocks[:, :eight] >> 4, blocks[:, :eight]), dim=2).flatten(1, 2)
    return (torch.cat((slices, blocks[:, eight:]), dim=1) & 15).to(torch.uint8)


def _bytes(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 [..., k] -> [..., k / 2], the first of two in the low half."""
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def _weight_chunks(weights: Weights, padding: int) -> torch.Tensor:
    """In the order in which lanes read (`weight_place` in call.h)."""
    chunks = torch.nn.functional.pad(_bytes(_chunks(weights.values, weights.wide)), (0, 0, 0, 0, 0, padding))
    # [tile of 128 columns, 8 columns, column, chunk, word, lane % 4, 4 bytes], where lane = 4 column + lane % 4
    parts = chunks.view(-1, COLUMNS // 8, 8, chunks.shape[1], 4, 4, 4)
    return parts.permute(0, 3, 1, 2, 5, 4, 6).reshape(len(parts), chunks.shape[1], COLUMNS * BLOCK // 2).contiguous()


def _columns(of_blocks: torch.Tensor, padding: int) -> torch.Tensor:
    """[N, K / 128] -> [K / 128, N + padding]."""
    return torch.nn.functional.pad(of_blocks.T, (0, padding)).contiguous()


class _Call(ctypes.Structure):
    """W4AxCall of csrc/cuda/call.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("rows", "row_scales", "row_totals", "weights", "scales", "zeros", "bias")
        ),
        *((name, ctypes.c_void_p) for name in ("y", "partial", "sums")),
        *((name, ctypes.c_int32) for name in ("m", "n", "padded_n", "blocks", "wide", "eight", "segments")),
        ("cuts", ctypes.c_int32 * (MOST_SEGMENTS + 1)),
        *((name, ctypes.c_int32) for name in ("spread", "bf16")),
    )


class Library:
    """The kernels, built from csrc/cuda/w4ax.cu."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.weft_w4ax.argtypes = (ctypes.POINTER(_Call), ctypes.c_void_p)
        found = self._library.weft_w4ax_call_bytes()
        if found != ctypes.sizeof(_Call):
            raise ValueError(
                f"{path} was built from other sources: its call has {found} bytes, not {ctypes.sizeof(_Call)}"
            )

    def multiply(
        self,
        rows: torch.Tensor,
        row_scales: torch.Tensor,
        row_totals: torch.Tensor,
        packed: CudaW4Ax,
        dtype: torch.dtype = torch.float32,
        *,
        spread: bool = False,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Packed rows uint8 [T, (eight + K / 128) * 64] with scales and totals [T, K / 128] -> y [T, N] in `dtype`.

        On the current stream of the current device. spread: run the segments side by side; the same bits, faster where
        there are few rows. sums: int32 [K / 128, T, N], to which the accumulators are written. Raises ValueError,
        TypeError, RuntimeError.
        """
        m, form = len(rows), packed.form
        _check_rows(rows, row_scales, row_totals, packed, sums)
        if dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"outputs in {dtype} were asked for; the CUDA kernels write float32 and bfloat16")
        y = torch.empty(m, packed.outputs, dtype=dtype, device=rows.device)
        if not m:
            return y
        spread = spread and packed.segments > 1
        runs = packed.segments if spread else int(packed.segments > 1)
        partial = torch.empty(runs, m, packed.outputs, dtype=torch.float32, device=rows.device)
        tensors = (
            rows,
            row_scales,
            row_totals,
            packed.weights,
            packed.scales,
            packed.zeros,
            packed.bias,
            y,
            partial,
            sums,
        )
        call = _Call(
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
            *(m, packed.outputs, packed.scales.shape[1], form.blocks, packed.wide, form.eight, packed.segments),
            (ctypes.c_int32 * (MOST_SEGMENTS + 1))(*packed.cuts),
            *(spread, dtype is torch.bfloat16),
        )
        stream = torch.cuda.current_stream().cuda_stream if rows.is_cuda else None
        error = self._library.weft_w4ax(ctypes.byref(call), stream)
        if error:
            raise RuntimeError(f"the W4Ax kernel did not start: CUDA error {error}")
        return y


def _check_rows(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    row_totals: torch.Tensor,
    packed: CudaW4Ax,
    sums: torch.Tensor | None,
) -> None:
    m, blocks = len(rows), packed.form.blocks
    wanted = [
        ("rows", rows, torch.uint8, [m, (packed.form.eight + blocks) * BLOCK // 2]),
        ("row_scales", row_scales, torch.float32, [m, blocks]),
        ("row_totals", row_totals, torch.int32, [m, blocks]),
    ]
    if sums is not None:
        wanted.append(("sums", sums, torch.int32, [blocks, m, packed.outputs]))
    for name, tensor, dtype, shape in wanted:
        if tensor.dtype is not dtype or list(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} are {tensor.dtype} {list(tensor.shape)}; they must be contiguous {dtype} {shape}")
        if tensor.device != packed.weights.device:
            raise ValueError(f"{name} are on {tensor.device} and the weight on {packed.weights.device}")
