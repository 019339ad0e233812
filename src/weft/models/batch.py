"""From the slices of a plan to the `Batch` that every layer's kernels read: once per step, on the host.

A decode step of a small model takes a millisecond or two, so this must take tens of microseconds: a fixed number of
numpy calls, and no Python loop over tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from weft.core.plan import Slice
from weft.kernels.base import Batch

Int32 = npt.NDArray[np.int32]
MISSING = b"\xff\xff\xff\xff"  # -1, the padding of a block table


def make_batch(slices: Sequence[Slice], block_size: int, kept: Sequence[int] | None = None) -> Batch:
    """The layout of one step. kept: the rows that are wanted after the last layer; None for all.

    Raises ValueError for a slice without tokens or with too few blocks for them.
    """
    count = len(slices)
    lengths = np.fromiter([len(piece.tokens) for piece in slices], np.int64, count)
    begins = np.fromiter([piece.start for piece in slices], np.int64, count)
    if not count or not lengths.all():
        raise ValueError("a step needs slices, and each of them tokens")
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    total = int(starts[-1])
    contexts = begins + lengths
    tables = block_tables([piece.blocks for piece in slices])

    if total == count:  # decode: one row for each slice
        rows, positions = np.arange(count), begins
    else:
        rows = np.repeat(np.arange(count), lengths)
        positions = np.arange(total) + (begins - starts[:-1])[rows]
    blocks = positions // block_size
    if int(blocks.max()) >= tables.shape[1] or int((named := tables[rows, blocks]).min()) < 0:
        raise ValueError("the block table of a slice is too short for its tokens")
    slots = named.astype(np.int64) * block_size + positions % block_size
    tokens = np.fromiter(chain.from_iterable([piece.tokens for piece in slices]), np.int64, total)
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=_int32(positions),
        slots=torch.from_numpy(slots),
        starts=_int32(starts),
        contexts=_int32(contexts),
        tables=torch.from_numpy(tables),
        block_size=block_size,
        kept=None if kept is None or list(kept) == list(range(total)) else torch.tensor(kept, dtype=torch.int64),
    )


def block_tables(tables: Sequence[tuple[int, ...]]) -> Int32:
    """int32 [S, W], W the longest table, padded with -1. struct packs a tuple of ints four times faster than numpy."""
    width = max(map(len, tables))
    rows = bytearray().join([struct.pack(f"{len(row)}i", *row) + MISSING * (width - len(row)) for row in tables])
    return np.frombuffer(rows, np.int32).reshape(len(tables), width)


def _int32(values: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32))
