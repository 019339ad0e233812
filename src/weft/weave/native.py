"""Ranks that are joined by the C++ extension: through shared memory (weave/shm.py) or sockets (weave/sockets.py).

Sum, residual, norm and quantisation are one pass over the owner's rows, and a seam is two calls from Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from weft import _native
from weft.errors import RankLost
from weft.kernels.cpu import CpuKernels
from weft.kernels.wire import w4ax_format
from weft.weave.collective import Join, Joined, check, fingerprint, plan_of

_TYPES = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True, slots=True)
class _Pending:
    """A seam in flight; holds what C++ points to."""

    join: Join
    residual: torch.Tensor
    hidden: Any


class NativeCollective:
    """One rank. The calling thread and the threads of `kernels` do the work."""

    def __init__(self, group: _native.Seams, kernels: CpuKernels) -> None:
        self.group = group
        self.rank, self.ranks = group.rank, group.ranks
        self._kernels = kernels

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return bounds[self.rank], bounds[self.rank + 1]

    def start(self, join: Join) -> _Pending:
        first, end = self.owned(join.bounds)
        check(join, self.rank, self.ranks, (first, end))
        partial, weight, form = join.partial, join.weight, w4ax_format(join.quantise)
        rows, size = partial.shape
        if weight.dtype not in _TYPES or not weight.is_contiguous():
            raise TypeError(f"weight is {weight.dtype}; the C++ kernels take contiguous float32 and bfloat16")
        residual = weight.new_empty((end - first, size)) if join.residual is None else join.residual
        if form is None:
            hidden: Any = weight.new_empty((rows, size))
            out = hidden.data_ptr()
        else:
            hidden = form.room(rows, weight.dtype)
            out = hidden.data.data_ptr()
        try:
            self.group.start(
                self._kernels.native,
                fingerprint((self._kernels.name, plan_of(join))),
                _TYPES[weight.dtype],
                _TYPES[partial.dtype],
                partial.data_ptr(),
                join.replicated,
                list(join.bounds),
                residual.data_ptr(),
                join.residual is None,
                weight.data_ptr(),
                join.eps,
                size,
                out,
                None if form is None else form.packed.native,
            )
        except RuntimeError as error:
            raise RankLost(str(error)) from error
        return _Pending(join, residual, hidden)

    def finish(self, pending: _Pending) -> Joined:
        try:
            self.group.finish(self._kernels.native)
        except RuntimeError as error:
            raise RankLost(str(error)) from error
        return Joined(pending.hidden, pending.residual)

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        rows = rows.contiguous()
        out = rows.new_empty((self.ranks, *rows.shape))
        plan = fingerprint(("gather", tuple(rows.shape), str(rows.dtype)))
        try:
            self.group.gather(self._kernels.native, plan, len(rows), rows.data_ptr(), rows.nbytes, out.data_ptr())
        except RuntimeError as error:
            raise RankLost(str(error)) from error
        return list(out)

    def close(self) -> None:
        self.group.leave()
