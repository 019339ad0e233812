"""Attention by FlashInfer (--attention-backend flashinfer), over keys and values that Triton's kernels write.

Written for flashinfer-python 0.7.2, by its documentation and its sources: nothing here has met a GPU. Keys and values
lie as FlashInfer's layout HND has them, [pages, kv_heads, page_size, head_dim], and are rotated before. What is left
are its two wrappers over paged KV: one for steps with prompts, and one for decode, which is told to run the same
kernels, for the others know few numbers of queries for a head of keys and values.

Both have to be told of a step on the host before it is launched (`plan`), which is `Planner` in attention.py. Decode in
a graph has a wrapper for each number of rows, that keeps what was planned in buffers of its own; planning again writes
there, and the graph that was recorded reads it.

How FlashInfer splits a sequence depends on the batch. So a row's bits are not its own here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from weft.errors import ConfigError
from weft.kernels.attention import FLASHINFER, Shape
from weft.kernels.base import Batch
from weft.kernels.triton_backend import TritonAttention
from weft.kernels.triton_tiles import processors

LAYOUT = "HND"
HEAD_DIMS = (64, 128, 256)  # others it compiles too, and then reads outside of its memory, or gives wrong results
LEAST_WORKSPACE = 128 * 2**20  # what its documentation recommends
INTEGERS = 8 * 2**20  # that each wrapper takes on the device by itself
TILES = (16, 64, 128)  # packed queries of a program
Send = Callable[[torch.Tensor], torch.Tensor]


class FlashInferAttention:
    """See attention.py. library: the package, or what stands in for it."""

    name = FLASHINFER
    capturable = True

    def __init__(self, device: torch.device, library: Any) -> None:
        self._device = device
        self._library = library
        self._triton = TritonAttention(device)
        # Its rotation and KV write, of heads in 16 bits.
        self.rotary_write = self._triton.rotary_write

    def make_kv(
        self, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str = "auto"
    ) -> Any:
        _check(head_dim, dtype, cache)
        return self._triton.make_kv(blocks, block_size, kv_heads, head_dim, dtype, cache)

    def token_bytes(self, kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str) -> int:
        """As attention.py has it. Raises ConfigError that names the flag for what FlashInfer cannot do."""
        _check(head_dim, dtype, cache)
        return self._triton.token_bytes(kv_heads, head_dim, dtype, cache)

    def planner(self, shape: Shape, max_slices: int, width: int, send: Send) -> FlashInferPlanner:
        return FlashInferPlanner(self._library, self._device, shape, max_slices, width, send)

    def attention(
        self, q: torch.Tensor, kv: Any, batch: Batch, heads: int, kv_heads: int, scale: float, window: int | None = None
    ) -> torch.Tensor:
        plan = batch.plan
        if not isinstance(plan, Planned) or window not in plan.wrappers:
            raise ValueError(f"this step was not planned for {window = }; FlashInfer has to know of it before")
        if (heads, kv_heads, scale) != (plan.shape.heads, plan.shape.kv_heads, plan.shape.scale):
            raise ValueError(f"{heads = }, {kv_heads = } and {scale = } are not those that were planned: {plan.shape}")
        out = torch.empty_like(q)
        by_head = (len(q), heads, plan.shape.head_dim)
        plan.wrappers[window].run(q.view(by_head), (kv.keys.codes, kv.values.codes), out=out.view(by_head))
        return out


@dataclass(frozen=True, slots=True)
class Planned:
    """Wrappers that know of a step, by window. Good until the next one is planned."""

    shape: Shape
    wrappers: dict[int | None, Any]


@dataclass(frozen=True, slots=True)
class Pages:
    """The pages of a step's sequences one after another, int32 on the host: those of sequence i are indices[starts[i] :
    starts[i + 1]], and the last of them holds last[i] tokens."""

    starts: torch.Tensor
    indices: torch.Tensor
    last: torch.Tensor


def pages_of(batch: Batch) -> Pages:
    """Of a batch on the host. A row of padding, whose context is 0, reads one token of the first block of its table:
    nobody reads what comes of it, and no kernel meets an empty sequence."""
    contexts, size = batch.contexts.clamp(min=1), batch.block_size
    counts = (contexts + size - 1) // size
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    named = torch.arange(batch.tables.shape[1]) < counts[:, None]
    return Pages(starts, batch.tables[named], contexts - (counts - 1) * size)


class FlashInferPlanner:
    """See `Planner` in attention.py. All wrappers share a workspace: one runs after the other, on one stream."""

    def __init__(
        self, library: Any, device: torch.device, shape: Shape, max_slices: int, width: int, send: Send
    ) -> None:
        self._library = library
        self._device = device
        self._shape = shape
        self._width = width
        self._send = send
        size = workspace_bytes(shape, max_slices, processors(device))
        self._workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        self._prefill = Planned(shape, {window: self._prefill_wrapper() for window in shape.windows})
        self._decode = Planned(shape, {window: self._decode_wrapper() for window in shape.windows})
        self._captured: dict[int, Planned] = {}  # by the number of rows

    def bytes(self, graphs: int) -> int:
        return len(self._workspace) + (2 + graphs) * len(self._shape.windows) * INTEGERS

    def plan(self, batch: Batch, *, captured: bool = False) -> Planned:
        shape, slices = self._shape, len(batch.contexts)
        pages = pages_of(batch)
        # FlashInfer copies what it is given; of the indices on the host the copy would wait for the stream.
        paged = pages.starts, self._send(pages.indices), pages.last
        sizes = shape.heads, shape.kv_heads, shape.head_dim, shape.block_size
        rows = () if len(batch.tokens) == slices else (batch.starts,)
        planned = self._prefill if rows else self._captured_of(slices) if captured else self._decode
        for window, wrapper in planned.wrappers.items():
            wrapper.plan(
                *rows,
                *paged,
                *sizes,
                **({"causal": True} if rows else {}),
                window_left=-1 if window is None else window - 1,  # beside the token itself
                sm_scale=shape.scale,
                q_data_type=shape.dtype,
                kv_data_type=shape.dtype,
            )
        return planned

    def _captured_of(self, slices: int) -> Planned:
        if slices not in self._captured:
            wrappers = {window: self._decode_wrapper(slices) for window in self._shape.windows}
            self._captured[slices] = Planned(self._shape, wrappers)
        return self._captured[slices]

    def _prefill_wrapper(self) -> Any:
        return self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, LAYOUT)

    def _decode_wrapper(self, captured: int = 0) -> Any:
        """captured: of a graph of so many rows."""

        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self._device)

        buffers = {
            "use_cuda_graph": True,
            "paged_kv_indptr_buffer": buffer(captured + 1),
            "paged_kv_indices_buffer": buffer(captured * self._width),
            "paged_kv_last_page_len_buffer": buffer(captured),
        }
        return self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, LAYOUT, use_tensor_cores=True, **(buffers if captured else {})
        )


def workspace_bytes(shape: Shape, max_slices: int, processors: int) -> int:
    """What FlashInfer's schedule asks for at most: float32 sums of values and of weights for each tile of queries and
    each split. Splits are made for two programs on each processor; a graph has a tile for each row at least."""
    group = shape.heads // shape.kv_heads
    split = 2 * processors // shape.kv_heads * TILES[-1]
    height = next((tile for tile in TILES if group <= tile), TILES[-1])
    tiles = -(-max_slices * group // height) + max_slices - 1
    queries = max(split, max(2 * processors // shape.kv_heads, tiles) * height)
    return max(LEAST_WORKSPACE, 4 * shape.heads * queries * (shape.head_dim + 1))


def open_flashinfer(device: torch.device) -> FlashInferAttention:
    """Raises ConfigError where it is not installed, or has no GPU."""
    flag = f"--attention-backend is {FLASHINFER}"
    if device.type != "cuda":
        raise ConfigError(
            f"{flag}, whose kernels run on a GPU only, and here kernels are interpreted; what would work: triton, torch"
        )
    try:
        library = importlib.import_module("flashinfer")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{flag}, and the package is not installed: {error}; what would work: pip install 'weft[flashinfer]', or "
            "--attention-backend triton"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:  # it loads libraries, and looks for CUDA
        raise ConfigError(
            f"{flag}, and the package cannot be loaded: {type(error).__name__}: {error}; what would work: "
            "--attention-backend triton"
        ) from error
    return FlashInferAttention(device, library)


def _check(head_dim: int, dtype: torch.dtype, cache: str) -> None:
    flag = f"--attention-backend is {FLASHINFER}"
    if cache not in ("auto", "bf16"):
        raise ConfigError(
            f"{flag}, which reads keys and values in 16 bits, and --kv-cache-dtype is {cache}; what would work: "
            "--kv-cache-dtype auto, or --attention-backend triton"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"{flag}, which computes in 16 bits, and activations are in {str(dtype).removeprefix('torch.')}; what "
            "would work: --dtype bfloat16, or --attention-backend triton"
        )
    if head_dim not in HEAD_DIMS:
        raise ConfigError(
            f"{flag}, which has kernels for heads of {', '.join(map(str, HEAD_DIMS))} channels, and this model's have "
            f"{head_dim}; what would work: --attention-backend triton"
        )
