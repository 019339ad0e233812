"""Ranks whose rows lie on devices, joined by the collectives of torch.distributed: NCCL between GPUs, and gloo in its
place where kernels are interpreted on CPUs. The calls are the same.

Nothing here waits for a GPU: a call is launched on the current stream, and what follows on this stream waits for it. So
no plans are compared on the way. That all ranks make the same calls follows from the plans that they are sent, and from
what they compare when they meet (weave/handshake.py); that one does not come is noticed by who waits for the device in
the end (weave/late.py). NCCL's calls can be captured in a graph: each is asked for once before, since the first one
makes the connections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed

from weft.errors import DeviceError, RankLost
from weft.weave.choice import Mode
from weft.weave.collective import Join, Joined, check
from weft.weave.messages import open_gloo

_dist: Any = torch.distributed  # its types lack much of what it has
# Seconds that NCCL waits beyond the ranks' own time-out: its watchdog ends the process without a word of who is late.
NCCL_GRACE = 60.0
WORDS = 120  # characters of what a library says


class JoinParts(Protocol):
    """What an owner does: (parts [W, n, H], residual [n, H], weight, eps) -> (hidden, residual)."""

    def __call__(
        self, parts: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, /
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def open_group(
    store: Any, rank: int, ranks: int, *, device: torch.device, bind: str = "127.0.0.1", timeout: float
) -> Any:
    """A process group of its own, which no global state of torch knows: of NCCL for a GPU, of gloo for a CPU.

    bind: this rank's address, for gloo. Raises DeviceError.
    """
    try:
        if device.type == "cpu":
            return open_gloo(store, rank, ranks, bind=bind, timeout=timeout)
        if not _dist.is_nccl_available():
            raise DeviceError("this torch was built without NCCL; --collective symmetric does not need it")
        nccl = _dist.ProcessGroupNCCL.Options()
        nccl._timeout = timedelta(seconds=timeout + NCCL_GRACE)
        group = _dist.ProcessGroupNCCL(store, rank, ranks, nccl)
        group.allreduce([torch.zeros(1, device=device)]).wait()  # the connections are made, and have their memory
        return group
    except RuntimeError as error:
        raise DeviceError(f"rank {rank} cannot join the {ranks} ranks: {error}") from error


@dataclass(frozen=True, slots=True)
class _Pending:
    """A seam in flight. parts: [W, own, H], or [1, T, H] where a sum was asked for. work: what brings them."""

    join: Join
    parts: torch.Tensor
    work: Any


class DeviceCollective:
    """One rank. mode: plain, one-shot or fused (weave/choice.py), all of them without weaving.

    The bits of one-shot and fused are the same: an all-to-all brings the parts to the owner, who sums them in float32
    and in the ranks' order. Those of plain are NCCL's, rounded to the type of the partial sums.
    """

    def __init__(
        self, group: Any, rank: int, ranks: int, join_parts: JoinParts, mode: Mode, *, explain: Callable[[], str]
    ) -> None:
        """group: of `open_group`, for one or several of these that take turns. explain: says in words which rank has
        not come, when one has not (weave/late.py)."""
        if mode is Mode.WOVEN:
            raise ValueError("woven is fused on a stream of its own (weave/streams.py)")
        self.rank, self.ranks = rank, ranks
        self._group = group
        self._join_parts = join_parts
        self._mode = mode
        self._explain = explain

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return (bounds[self.rank], bounds[self.rank + 1]) if self._mode is Mode.FUSED else (0, bounds[-1])

    def start(self, join: Join) -> _Pending:
        first, end = self.owned(join.bounds)
        check(join, self.rank, self.ranks, (first, end))
        if join.quantise is not None:
            raise ValueError("rows cannot travel quantised between devices")
        partial = join.partial
        with self._failing():
            if self._mode is Mode.PLAIN:
                total = partial.clone()
                return _Pending(join, total[None], self._group.allreduce([total]))
            parts = partial.new_empty((self.ranks, end - first, partial.shape[1]))
            if self._mode is Mode.ONE_SHOT:
                return _Pending(join, parts, self._group._allgather_base(parts.flatten(0, 1), partial))
            arriving = [end - first] * self.ranks
            work = self._group.alltoall_base(parts.flatten(0, 1), partial, arriving, _counts(join.bounds))
            return _Pending(join, parts, work)

    def finish(self, pending: _Pending) -> Joined:
        join = pending.join
        with self._failing():
            pending.work.wait()
        rows, residual = self._join_parts(pending.parts, join.residual, join.weight, join.eps)
        if self._mode is not Mode.FUSED:
            return Joined(rows, residual)
        hidden, counts = rows.new_empty(join.partial.shape), _counts(join.bounds)
        with self._failing():
            if min(counts) == max(counts):
                work = self._group._allgather_base(hidden, rows)
            else:
                work = self._group.alltoall_base(hidden, rows.repeat(self.ranks, 1), counts, [len(rows)] * self.ranks)
            work.wait()
        return Joined(hidden, residual)

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        rows = rows.contiguous()
        out = rows.new_empty((self.ranks, *rows.shape))
        with self._failing():
            self._group._allgather_base(out.flatten(0, 1), rows).wait()
        return list(out)

    def close(self) -> None:
        self._group = None

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """gloo says here that a rank has ended or is late; NCCL launches, and says nothing."""
        if self._group is None:
            raise RankLost(f"rank {self.rank} has left its group")
        try:
            yield
        except RuntimeError as error:
            self._lose(error)

    def _lose(self, error: Exception) -> NoReturn:
        self.close()
        raise RankLost(f"{self._explain()} ({str(error).splitlines()[0][:WORDS]})") from error


def _counts(bounds: tuple[int, ...]) -> list[int]:
    return [end - first for first, end in pairwise(bounds)]
