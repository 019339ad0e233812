"""Everything that crosses between the engine process and its tensor-parallel ranks: closed unions of structs."""

from __future__ import annotations

import msgspec

from weft.config import EngineConfig
from weft.core.plan import Capacity, Lane, Partition, Plan, Result


class RankOrders(msgspec.Struct, frozen=True):
    """The first line of a rank's standard input, as JSON. The rest stays open: it ends when the engine process does.

    config: with the cores of this rank. model: the folder. folder: of the sockets. group: a name by which the ranks
    find one another. port: on the loopback interface, where rank 0 listens; None where they share memory. crowded:
    whether ranks share cores.
    """

    config: EngineConfig
    rank: int
    ranks: int
    model: str
    folder: str
    group: str
    port: int | None
    crowded: bool
    log_level: str


class Carry(msgspec.Struct, frozen=True, tag=True):
    """Carry out a plan: every rank is sent the same ones, in the same order."""

    plan: Plan


class Share(msgspec.Struct, frozen=True, tag=True):
    """Change the shares of the lanes."""

    partition: Partition


class Blocks(msgspec.Struct, frozen=True, tag=True):
    """How many KV blocks every rank has: as many as fit on each of them."""

    count: int


class End(msgspec.Struct, frozen=True, tag=True):
    """Close the device and end the process."""


class Begun(msgspec.Struct, frozen=True, tag=True):
    """A phase of the start-up of a rank has begun."""

    rank: int
    phase: str


class Fits(msgspec.Struct, frozen=True, tag=True):
    """How many KV blocks this rank has room for."""

    rank: int
    blocks: int


class Opened(msgspec.Struct, frozen=True, tag=True):
    """A rank takes plans now: what its device says of itself (see devices/base.py)."""

    rank: int
    capacity: Capacity
    lanes: tuple[Lane, ...]
    partition: Partition | None
    memory: tuple[tuple[str, int], ...]
    dtype: str
    kernels: str
    notes: tuple[str, ...]


class Done(msgspec.Struct, frozen=True, tag=True):
    """A plan has ended. digest: of what was sampled, which must be the same on all ranks. result: rank 0's; of the
    others, only one with an error."""

    rank: int
    step: int
    part: int
    digest: int
    result: Result | None


class Lost(msgspec.Struct, frozen=True, tag=True):
    """A rank ends because of this."""

    rank: int
    error: str
    code: str | None


FROM_RANKS = "from-ranks"


def to_rank(rank: int) -> str:
    """The name of the socket to a rank."""
    return f"to-rank-{rank}"


ToRank = Carry | Share | Blocks | End
FromRank = Begun | Fits | Opened | Done | Lost
