"""The contract of a seam with several ranks: who sums what, who keeps what, and who gets what.

    residual[own] := round(residual[own] + sum over ranks r = 0, 1, ... of partial_r[own])     float32, in this order
    hidden        := RMSNorm(residual) * weight, rows of all ranks

Every row has one owner, who alone keeps its residual, sums it and normalises it (reduce-scatter by tokens, residual,
norm, all-gather: tokenweave.md §4). So all ranks get the same bits, and a row's bits depend neither on the other rows,
nor on where the rows are cut, nor on timing. One rank gives what `Kernels.add_rms_norm` gives.

The first norm of a step is no seam of several ranks: the embedding is the same on all of them (weave/weaver.py).

Backends: weave/shm.py (processes of one host), weave/sockets.py (of any hosts), weave/distributed.py
(torch.distributed), weave/device.py and weave/symmetric.py (GPUs). weave/background.py and weave/native.py give them a
communication thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Protocol, runtime_checkable

import torch


class Quantise(Protocol):
    """The input format of the linear that follows: how its rows travel, and what it is handed.

    A quantised row is fewer bytes than the row itself, and the linear would quantise it anyway: the same numbers.
    """

    @property
    def row_bytes(self) -> int:
        """Of one row on its way."""
        ...

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Hidden rows [n, H] -> uint8 [n, row_bytes]."""
        ...

    def decode(self, wire: torch.Tensor, dtype: torch.dtype) -> Any:
        """uint8 [T, row_bytes] -> what `Kernels.linear` takes for hidden rows [T, H] of this dtype."""
        ...


@dataclass(frozen=True, slots=True)
class Join:
    """One rank's part in one seam. All ranks give the same T, H, bounds, eps and format.

    partial: [T, H] this rank's partial sums, contiguous, of the model's dtype or float32. It is read until `finish`
        has returned, and never changed.
    residual: [own, H] the rows that this rank keeps (`Collective.owned`), of the model's dtype, updated in place.
    weight: [H] of the RMSNorm that follows, of the model's dtype; eps: its epsilon.
    bounds: ranks + 1 numbers, ascending from 0 to T: rank r owns rows bounds[r] to bounds[r + 1], which may be none.
        (Uneven bounds keep the rows that will be sampled with the owner of their residual.)
    quantise: the next linear's input format; None for hidden rows in the model's dtype.
    """

    partial: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    eps: float
    bounds: tuple[int, ...]
    quantise: Quantise | None = None


@dataclass(frozen=True, slots=True)
class Joined:
    """hidden: [T, H] on every rank, or what `Quantise.decode` makes of it. residual: [own, H]."""

    hidden: Any
    residual: torch.Tensor


class Collective(Protocol):
    """One rank's end of its group. Not thread-safe: one thread calls, or one after the other.

    Every rank makes the same calls in the same order. A call that fails leaves the group unusable, on all ranks: what
    comes after it raises RankLost, too. Errors: RankLost for a rank that did not come in time, has ended, or came with
    another plan (its message names the rank and the number of the seam); ValueError or TypeError for a Join that
    cannot be, before anything was sent. Between devices nothing waits for the host, so that plans are not compared at
    seams, and who waits for a device names the rank (weave/late.py).
    """

    rank: int
    ranks: int

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        """First and end of the rows whose residual this rank keeps: bounds[rank] and bounds[rank + 1], but all rows
        where every rank normalises for itself (the plain baseline)."""
        ...

    def start(self, join: Join) -> Any:
        """Begin a seam and return at once what `finish` takes. At most one is in flight."""
        ...

    def finish(self, pending: Any) -> Joined:
        """Wait for the seam that was started."""
        ...

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, in their order (logits of each part of the vocabulary: [R, V / ranks]). They have
        the same shape and dtype. No seam may be in flight."""
        ...

    def close(self) -> None:
        """Leave the group; idempotent. Others that still wait for this rank get RankLost."""
        ...


@runtime_checkable
class Spinning(Protocol):
    """A collective in which a rank that waits for others keeps its core busy for a while before it sleeps."""

    def let_spin(self, may: bool) -> None:
        """From the next seam on; False: it sleeps at once, since others want its core."""
        ...


def check(join: Join, rank: int, ranks: int, owned: tuple[int, int]) -> None:
    """Raises ValueError or TypeError for a Join that this rank of so many cannot take part in."""
    partial, residual, bounds, dtype = join.partial, join.residual, join.bounds, join.weight.dtype
    if partial.dim() != 2 or not partial.is_contiguous():
        raise ValueError(f"partial must be contiguous [T, H], not {list(partial.shape)} {partial.stride()}")
    if partial.dtype not in (dtype, torch.float32):
        raise TypeError(f"partial is {partial.dtype}; it must be of the norm's {dtype}, or float32")
    tokens, size = partial.shape
    if join.weight.shape != (size,):
        raise ValueError(f"weight is {list(join.weight.shape)}; partial needs [{size}]")
    if len(bounds) != ranks + 1 or bounds[0] != 0 or bounds[-1] != tokens or list(bounds) != sorted(bounds):
        raise ValueError(f"bounds are {bounds}; {ranks} ranks need {ranks + 1} numbers, ascending from 0 to {tokens}")
    if residual.dtype is not dtype:
        raise TypeError(f"residual is {residual.dtype}; it must be of the norm's {dtype}")
    own = owned[1] - owned[0]
    if residual.shape != (own, size) or not residual.is_contiguous():
        raise ValueError(
            f"residual is {list(residual.shape)} {residual.stride()}; rank {rank} keeps rows {owned[0]} to {owned[1]}: "
            f"contiguous {[own, size]}"
        )


def plan_of(join: Join) -> tuple[Any, ...]:
    """What must be the same on all ranks."""
    partial, quantise = join.partial, join.quantise
    return (
        "join",
        tuple(partial.shape),
        str(partial.dtype),
        str(join.weight.dtype),
        join.bounds,
        join.eps,
        None if quantise is None else quantise.row_bytes,
    )


@lru_cache(maxsize=1024)  # a model has few seams, but one of them is every few microseconds
def fingerprint(plan: tuple[Any, ...]) -> int:
    """63 bits of a plan: what ranks compare before they exchange anything."""
    return int.from_bytes(blake2b(repr(plan).encode(), digest_size=8).digest(), "little") >> 1
