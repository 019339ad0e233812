"""What a step reads, from the host to the GPU: one run of pinned memory, one copy. And what it found, back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft.devices.cuda_streams import Gpu
from weft.kernels.base import Batch

ALIGNMENT = 16  # of each tensor: what kernels are compiled for must not depend on the lengths before it
Field = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Inputs:
    """batch: see kernels/base.py. feeds: int32 [T]: where a token stands for one that was drawn by the launch before
    and never left the device, the place of it among those; -1 where the batch has the token itself."""

    batch: Batch
    feeds: torch.Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of a step lie that has so many rows and slices, and block tables so wide. kept: rows that are
    wanted after the last layer; 0 where all are. The tables, whose width varies, come last."""

    rows: int
    slices: int
    width: int
    kept: int = 0

    def fields(self) -> tuple[Field, ...]:
        return (
            (torch.int64, (self.rows,)),  # tokens
            (torch.int64, (self.rows,)),  # slots
            (torch.int32, (self.rows,)),  # positions
            (torch.int32, (self.rows,)),  # feeds
            (torch.int32, (self.slices + 1,)),  # starts
            (torch.int32, (self.slices,)),  # contexts
            (torch.int64, (self.kept,)),
            (torch.int32, (self.slices, self.width)),  # tables
        )

    @property
    def size(self) -> int:
        return _size(self.fields())

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in uint8 memory of `size` or more."""
        return _views(memory, self.fields())

    def inputs(self, memory: torch.Tensor, block_size: int, *, whole: bool, plan: Any = None) -> Inputs:
        """whole: every row is wanted after the last layer. plan: see Batch."""
        tokens, slots, positions, feeds, starts, contexts, kept, tables = self.views(memory)
        batch = Batch(tokens, positions, slots, starts, contexts, tables, block_size, None if whole else kept, plan)
        return Inputs(batch, feeds)


def layout_of(batch: Batch) -> Layout:
    slices, width = batch.tables.shape
    return Layout(len(batch.tokens), slices, width, 0 if batch.kept is None else len(batch.kept))


def send(gpu: Gpu, batch: Batch, feeds: Sequence[int] | None) -> torch.Tensor:
    """A batch of the host's, in uint8 memory of the device in its layout. The copy is under way on this stream."""
    given = torch.tensor(feeds, dtype=torch.int32) if feeds is not None else torch.tensor(-1, dtype=torch.int32)
    kept = torch.empty(0) if batch.kept is None else batch.kept
    parts = (batch.tokens, batch.slots, batch.positions, given, batch.starts, batch.contexts, kept, batch.tables)
    return _sent(gpu, layout_of(batch).fields(), parts)


def send_tensors(gpu: Gpu, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The host's tensors on the device; the copy, which is one, is under way on this stream."""
    fields = [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
    return _views(_sent(gpu, fields, tensors), fields)


def fetch(gpu: Gpu, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the device's tensor in host memory, good when the stream has got there."""
    memory = gpu.staging(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return memory.copy_(tensor, non_blocking=True)


def _sent(gpu: Gpu, fields: Sequence[Field], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Each tensor in the place that its field has."""
    memory = gpu.staging(_size(fields))
    for place, tensor in zip(_views(memory, fields), tensors, strict=True):
        place.copy_(tensor)
    # Pinned memory is not given to anybody else before its copies are done: torch sees to that.
    return memory.to(gpu.device, non_blocking=True)


def _views(memory: torch.Tensor, fields: Sequence[Field]) -> list[torch.Tensor]:
    found, at = [], 0
    for dtype, shape in fields:
        used = math.prod(shape) * dtype.itemsize
        found.append(memory[at : at + used].view(dtype).view(shape))
        at += -(-used // ALIGNMENT) * ALIGNMENT
    return found


def _size(fields: Sequence[Field]) -> int:
    return sum(-(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT for dtype, shape in fields)
