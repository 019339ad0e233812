"""A step as one call: recorded operations (kernels/record.py), arranged in memory, and replayed by csrc/program.h.

Values share an arena: a place is free again after the last operation that uses its value. Places are bytes per row, so
that one program serves every number of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from weft import _native
from weft.core.plan import Slice
from weft.kernels.cpu import CpuKernels
from weft.kernels.record import (
    BestOfRows,
    Domain,
    MakeAndQuantise,
    Norm,
    Operation,
    Quantise,
    RotaryWrite,
    SiluMul,
    Value,
)

Logits = npt.NDArray[np.float32]
LINE = 64  # bytes of a cache line


class Program:
    """The step of one lane. Only the lane's thread may run it: the results of a run lie in its arenas until the next.

    logits: float32 [sampled rows, ...].
    timed: whether runs add to `seconds`; off at first.
    """

    def __init__(
        self,
        kernels: CpuKernels,
        operations: Sequence[Operation],
        logits: Value,
        *,
        max_tokens: int,
        max_slices: int,
    ) -> None:
        operations = [*fuse(operations), BestOfRows(logits)]
        places, widths = arrange(operations, kept=(logits,))
        self._kernels = kernels
        self._operations = tuple(operations)  # the C++ side points to what they hold
        self._arenas = [
            np.empty(rows * width + LINE, np.uint8)
            for rows, width in ((max_tokens, widths[Domain.TOKENS]), (max_slices, widths[Domain.SAMPLED]))
        ]
        starts = [-arena.ctypes.data % LINE for arena in self._arenas]
        self._arenas = [arena[start:] for arena, start in zip(self._arenas, starts, strict=True)]
        tokens, sampled = (arena.ctypes.data for arena in self._arenas)
        self._tables = _native.Tables()
        self._native = _native.Program(tokens, max_tokens, sampled, max_slices)
        for operation in operations:
            operation.emit(self._native, places.__getitem__)
        self._logits = logits
        self._places = places
        self._block_size = next(one.kv.block_size for one in operations if isinstance(one, RotaryWrite))
        self._sampled = 0
        self.timed = False

    def run(
        self, slices: Sequence[Slice], rows: Sequence[int], part: int = 0, parts: int = 1
    ) -> list[tuple[int, float]]:
        """Compute a step: the most probable token after each of these rows of it, and its logit.

        part, parts: just this part of the operations. All parts of a step need the same slices and rows, and no other
        run between them: what one leaves in the arenas the next one reads.

        Raises ValueError, before memory is touched, for a step that reaches outside of KV, tables or arenas.
        """
        run = self._native.run_timed if self.timed else self._native.run
        self._sampled = len(rows)
        count = len(self._operations)
        first, last = count * part // parts, count * (part + 1) // parts
        return run(self._kernels.native, slices, self._tables, self._block_size, rows, first, last)

    def logits(self) -> Logits:
        """Of the last run, after the rows that it was asked for, float32 [R, V]: valid until the next run."""
        value, rows = self._logits, self._sampled
        start = self._places[value] * rows
        logits = self._arenas[value.domain][start : start + value.row_bytes * rows]
        return logits.view(np.float32).reshape(rows, value.columns)

    def timings(self) -> list[tuple[Operation, float]]:
        """The operations in their order, and the seconds within each so far; timed runs only."""
        return list(zip(self._operations, self._native.seconds, strict=True))

    def seconds(self) -> dict[str, float]:
        """Seconds within the kernels so far, by kind of operation; timed runs only."""
        found: dict[str, float] = {}
        for operation, seconds in self.timings():
            kind = type(operation).__name__
            found[kind] = found.get(kind, 0.0) + seconds
        return found


def fuse(operations: Sequence[Operation]) -> list[Operation]:
    """The same with each norm or gated activation joined to the quantisation that follows it at once, if nothing else
    reads it: what is between them is not kept."""
    uses = Counter(value for operation in operations for value in operation.uses())
    joined: list[Operation] = []
    for operation in operations:
        before = joined[-1] if joined else None
        if (
            isinstance(operation, Quantise)
            and isinstance(before, Norm | SiluMul)
            and operation.x is before.out
            and uses[before.out] == 2
        ):
            joined[-1] = MakeAndQuantise(before, operation)
        else:
            joined.append(operation)
    return joined


def arrange(operations: Sequence[Operation], kept: Sequence[Value]) -> tuple[dict[Value, int], dict[Domain, int]]:
    """A place for each value, in bytes per row, and the width of each arena. Values that are in use at the same time do
    not overlap; those of `kept` are in use until the end."""
    last = {value: number for number, operation in enumerate(operations) for value in operation.uses()}
    last |= dict.fromkeys(kept, len(operations))
    places: dict[Value, int] = {}
    widths = dict.fromkeys(Domain, 0)
    for number, operation in enumerate(operations):
        for value in operation.uses():
            if value not in places:
                taken = [other for other in places if other.domain is value.domain and last[other] >= number]
                places[value] = _gap(sorted((places[other], _width(other)) for other in taken), _width(value))
                widths[value.domain] = max(widths[value.domain], places[value] + _width(value))
    return places, widths


def _gap(taken: Sequence[tuple[int, int]], width: int) -> int:
    """The first place where `width` fits between (place, width) pairs in order."""
    end = 0
    for place, size in taken:
        if place - end >= width:
            break
        end = max(end, place + size)
    return end


def _width(value: Value) -> int:
    return -(-value.row_bytes // LINE) * LINE
