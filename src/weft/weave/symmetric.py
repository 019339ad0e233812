"""Ranks on the GPUs of one host, joined through memory that the kernels of all of them reach (kernels/triton_seam.py).

Each rank has one region, and all regions are alike:

    signals | partial sums [most, H] | hidden rows [most, H], OUTS times | what is gathered, int32 [ranks, room]

A seam's partial sums are copied into the region, which costs a read and a write of them. Hidden rows stay where the
other ranks have written them, until their strand has read them. A rank takes part in a strand's next seam only after
its stream has done what was launched before; so there are as many of them as strands take turns, at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from weft.errors import DeviceError
from weft.kernels.triton_seam import BLOCKS, SPINS, Reach, gather_rows, join_rows, signals_of
from weft.weave.collective import Join, Joined, check

ROOM = 4 << 20  # int32 that each rank gives in one part of a gather
OUTS = 3
ALIGNMENT = 256
SPINS_A_SECOND = SPINS // 10
INTERPRETED_SPINS = 20_000  # a second: what an interpreted wait can do
_FOLDER = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Region:
    """own: uint8, this rank's part, zeros at first. addresses: of the parts of all ranks, as this rank's kernels reach
    them. multicast: of all parts at once; None without a switch that can. holds: what must live as long."""

    own: torch.Tensor
    addresses: tuple[int, ...]
    multicast: int | None = None
    holds: Any = None


def gpu_region(store: Any, name: str, rank: int, ranks: int, size: int, device: torch.device) -> Region:
    """torch's symmetric memory. All ranks call this together, in the same order. name: of a group that torch does not
    know yet. Raises DeviceError."""
    from torch._C import _distributed_c10d as c10d
    from torch.distributed.distributed_c10d import PrefixStore

    memory: Any = c10d._SymmetricMemory
    group: Any = c10d.ProcessGroup(PrefixStore(name, store), rank, ranks)
    try:
        # torch looks a group up by its name: the older way, and the one since 2.9.
        memory.set_group_info(name, rank, ranks, PrefixStore(f"{name}-info", store))
        group._set_group_name(name)
        c10d._register_process_group(name, group)  # type: ignore[arg-type]
        own: torch.Tensor = memory.empty_strided_p2p((size,), (1,), torch.uint8, device, name)
        own.zero_()
        torch.cuda.synchronize(device)  # before anybody else can reach it
        handle = memory.rendezvous(own, name)
    except RuntimeError as error:
        raise DeviceError(
            f"rank {rank} cannot share memory with the GPUs of the other ranks: {error}; --collective nccl does not "
            "need that"
        ) from error
    return Region(own, tuple(handle.buffer_ptrs), handle.multicast_ptr or None, (group, handle))


def host_region(store: Any, name: str, rank: int, ranks: int, size: int, *, timeout: float) -> Region:
    """The same for interpreted kernels: memory of the host that all ranks' processes share. Raises DeviceError."""
    path, keys = _FOLDER / name, [f"{name} {other}" for other in range(ranks)]
    whole = torch.from_file(str(path), shared=True, size=size * ranks, dtype=torch.uint8)
    try:
        store.set(keys[rank], "")
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError as error:
        raise DeviceError(f"rank {rank} waits for others to share memory: {error}") from error
    finally:
        path.unlink(missing_ok=True)
    parts = whole.view(ranks, size)
    return Region(parts[rank], tuple(part.data_ptr() for part in parts), None, whole)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where in a region things lie. most: rows that a seam may have; size: channels of a row."""

    ranks: int
    most: int
    size: int
    dtype: torch.dtype
    room: int = ROOM

    @property
    def rows(self) -> int:
        """Bytes of `most` rows."""
        return _aligned(self.most * self.size * self.dtype.itemsize)

    @property
    def partial(self) -> int:
        return _aligned(signals_of(self.ranks) * 4)

    def out(self, which: int) -> int:
        """Of the hidden rows `which`, from 0."""
        return self.partial + (1 + which) * self.rows

    @property
    def gathered(self) -> int:
        return self.out(OUTS)

    @property
    def bytes(self) -> int:
        return self.gathered + _aligned(4 * self.ranks * self.room)


class SymmetricCollective:
    """One rank. All it does is launched on the current stream. `failed`: int32 [1] on the device: a rank that did not
    come, plus 1; what comes after that is worth nothing."""

    def __init__(self, region: Region, rank: int, layout: Layout, *, timeout: float) -> None:
        """timeout: seconds that a kernel waits for another rank's, roughly; it counts looks."""
        own, device = region.own, region.own.device
        if own.nbytes < layout.bytes:
            raise ValueError(f"the region has {own.nbytes} bytes; it needs {layout.bytes}")
        self.rank, self.ranks = rank, layout.ranks
        self.failed = torch.zeros(1, dtype=torch.int32, device=device)
        self._region = region
        self._layout = layout
        self._spins = min(2**31 - 1, int(timeout * (SPINS_A_SECOND if device.type == "cuda" else INTERPRETED_SPINS)))
        self._partial = self._rows(layout.partial)
        self._outs = [self._rows(layout.out(which)) for which in range(OUTS)]
        self._gathered = own[layout.gathered : layout.bytes].view(torch.int32)[: layout.ranks * layout.room]
        self._places = self._table(layout.gathered)
        epochs = torch.zeros(BLOCKS, dtype=torch.int32, device=device)
        self._reach = [
            Reach(
                rank,
                self._table(layout.partial),
                self._table(layout.out(which)),
                self._table(0),
                epochs,
                self.failed,
                self._multicast(which),
            )
            for which in range(OUTS)
        ]
        self._next = 0

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return bounds[self.rank], bounds[self.rank + 1]

    def start(self, join: Join) -> Joined:
        first, end = self.owned(join.bounds)
        check(join, self.rank, self.ranks, (first, end))
        partial, most, size = join.partial, self._layout.most, self._layout.size
        tokens = len(partial)
        if join.quantise is not None:
            raise ValueError("rows cannot travel quantised between devices")
        if partial.dtype is not self._layout.dtype or partial.shape[1] != size or tokens > most:
            raise ValueError(
                f"partial is {partial.dtype} {list(partial.shape)}; there is room for {self._layout.dtype} "
                f"[{most}, {size}]"
            )
        self._partial[:tokens].copy_(partial)
        which, self._next = self._next, (self._next + 1) % OUTS
        join_rows(self._reach[which], join.residual, join.weight, join.eps, (first, end), spins=self._spins)
        return Joined(self._outs[which][:tokens], join.residual)

    def finish(self, pending: Joined) -> Joined:
        return pending

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Of a type whose rows are whole int32 words."""
        given = rows.contiguous().flatten().view(torch.int32)
        out = given.new_empty((self.ranks, len(given)))
        room = self._layout.room
        for first in range(0, len(given), room):
            part = given[first : first + room]
            gather_rows(self._reach[0], self._places, part, room, spins=self._spins)
            out[:, first : first + len(part)].copy_(self._gathered.view(self.ranks, room)[:, : len(part)])
        return [one.view(rows.dtype).view(rows.shape) for one in out]

    def close(self) -> None:
        """The memory goes with its last user. Others that wait for this rank do so until their time is over."""

    def _rows(self, at: int) -> torch.Tensor:
        layout = self._layout
        used = layout.most * layout.size * layout.dtype.itemsize
        return self._region.own[at : at + used].view(layout.dtype).view(layout.most, layout.size)

    def _table(self, offset: int) -> torch.Tensor:
        """int64 [ranks]: the addresses of what lies at this offset of each region."""
        found = [address + offset for address in self._region.addresses]
        return torch.tensor(found, dtype=torch.int64, device=self._region.own.device)

    def _multicast(self, which: int) -> torch.Tensor | None:
        base, layout = self._region.multicast, self._layout
        if base is None:
            return None
        found = [base + layout.partial, base + layout.out(which)]
        return torch.tensor(found, dtype=torch.int64, device=self._region.own.device)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
