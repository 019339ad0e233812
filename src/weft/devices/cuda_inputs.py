"""What a step reads, from the host to the GPU: one run of pinned memory, one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.devices.cuda_streams import Gpu
from weft.kernels.base import Batch

ALIGNMENT = 16  # of each tensor: what kernels are compiled for must not depend on the lengths before it


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

    def fields(self) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
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
        return sum(_size(dtype, shape) for dtype, shape in self.fields())

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in uint8 memory of `size` or more."""
        found, at = [], 0
        for dtype, shape in self.fields():
            used = math.prod(shape) * dtype.itemsize
            found.append(memory[at : at + used].view(dtype).view(shape))
            at += _size(dtype, shape)
        return found

    def inputs(self, memory: torch.Tensor, block_size: int, *, whole: bool) -> Inputs:
        """whole: every row is wanted after the last layer."""
        tokens, slots, positions, feeds, starts, contexts, kept, tables = self.views(memory)
        batch = Batch(tokens, positions, slots, starts, contexts, tables, block_size, None if whole else kept)
        return Inputs(batch, feeds)


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def layout_of(batch: Batch) -> Layout:
    slices, width = batch.tables.shape
    return Layout(len(batch.tokens), slices, width, 0 if batch.kept is None else len(batch.kept))


def send(gpu: Gpu, batch: Batch, feeds: Sequence[int] | None) -> torch.Tensor:
    """A batch of the host's, in uint8 memory of the device in its layout. The copy is under way on this stream."""
    layout = layout_of(batch)
    memory = gpu.staging(layout.size)
    given = torch.tensor(feeds, dtype=torch.int32) if feeds is not None else torch.tensor(-1, dtype=torch.int32)
    kept = torch.empty(0) if batch.kept is None else batch.kept
    parts = (batch.tokens, batch.slots, batch.positions, given, batch.starts, batch.contexts, kept, batch.tables)
    for place, part in zip(layout.views(memory), parts, strict=True):
        place.copy_(part)
    # Pinned memory is not given to anybody else before its copies are done: torch sees to that.
    return memory.to(gpu.device, non_blocking=True)
