"""Ranks that are joined by the C++ extension: through shared memory (weave/shm.py) or sockets (weave/sockets.py).

Sum, residual, norm and quantisation are one pass over the owner's rows, and a seam is two calls from Python.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from weft import _native
from weft.errors import DeviceError, RankLost
from weft.kernels.cpu import CpuKernels
from weft.kernels.quantised import TYPES
from weft.kernels.wire import w4ax_format
from weft.weave.background import Queue
from weft.weave.collective import Join, Joined, check, fingerprint, plan_of


@dataclass(frozen=True, slots=True)
class _Pending:
    """A seam in flight; holds what C++ points to."""

    join: Join
    hidden: Any


class NativeCollective:
    """One rank. The calling thread and the threads of `kernels` do the work."""

    def __init__(self, group: _native.Seams, kernels: CpuKernels) -> None:
        self.group = group
        self.rank, self.ranks = group.rank, group.ranks
        self.kernels = kernels

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return bounds[self.rank], bounds[self.rank + 1]

    def start(self, join: Join) -> _Pending:
        check(join, self.rank, self.ranks, self.owned(join.bounds))
        partial, weight, form = join.partial, join.weight, w4ax_format(join.quantise)
        rows, size = partial.shape
        if weight.dtype not in TYPES or not weight.is_contiguous():
            raise TypeError(f"weight is {weight.dtype}; the C++ kernels take contiguous float32 and bfloat16")
        if form is None:
            hidden: Any = weight.new_empty((rows, size))
            out = hidden.data_ptr()
        else:
            hidden = form.room(rows, weight.dtype)
            out = hidden.data.data_ptr()
        try:
            self.group.start(
                self.kernels.native,
                fingerprint((self.kernels.name, plan_of(join))),
                TYPES[weight.dtype],
                TYPES[partial.dtype],
                partial.data_ptr(),
                list(join.bounds),
                join.residual.data_ptr(),
                weight.data_ptr(),
                join.eps,
                size,
                out,
                None if form is None else form.packed.native,
            )
        except RuntimeError as error:
            raise RankLost(str(error)) from error
        return _Pending(join, hidden)

    def finish(self, pending: _Pending) -> Joined:
        try:
            self.group.finish(self.kernels.native)
        except RuntimeError as error:
            raise RankLost(str(error)) from error
        return Joined(pending.hidden, pending.join.residual)

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return self._gather(("gather", tuple(rows.shape), str(rows.dtype)), rows.contiguous())

    def compare(self, plan: tuple[Any, ...]) -> None:
        """Once, what the seams of a program have in common, which hash no more than its rows. Raises RankLost where
        that of another rank differs. No seam may be in flight."""
        self._gather((self.kernels.name, plan), torch.empty(0))

    def close(self) -> None:
        self.group.leave()

    def _gather(self, plan: tuple[Any, ...], rows: torch.Tensor) -> list[torch.Tensor]:
        out = rows.new_empty((self.ranks, *rows.shape))
        hashed, backend = fingerprint(plan), self.kernels.native
        try:
            self.group.gather(backend, hashed, len(rows), rows.data_ptr(), rows.nbytes, out.data_ptr())
        except RuntimeError as error:
            raise RankLost(str(error)) from error
        return list(out)


class NativeBackground(NativeCollective, Queue):
    """What weave/background.py is for any collective, without Python in the thread."""

    def __init__(self, collective: NativeCollective, cores: tuple[int, ...] | None = None) -> None:
        """collective: used by nobody else from now on; with kernels of its own. cores: where the thread runs (None:
        where its maker may)."""
        self._thread = _native.SeamThread(collective.group, cores or ())
        super().__init__(self._thread, collective.kernels)
        self._begun: deque[_Pending] = deque()  # what the thread reads and writes stays, whatever becomes of the caller

    def move(self, cores: tuple[int, ...]) -> None:
        try:
            self._thread.set_cores(cores)
        except ValueError as error:
            raise DeviceError(f"the seams cannot be moved to cores {cores}: {error}") from error

    def start(self, join: Join) -> _Pending:
        pending = super().start(join)
        self._begun.append(pending)
        return pending

    def finish(self, pending: _Pending) -> Joined:
        """Of the first that was started and is not finished yet."""
        if not self._begun or pending is not self._begun[0]:
            raise ValueError("seams are finished in the order in which they were started")
        try:
            return super().finish(pending)
        finally:
            self._begun.popleft()
