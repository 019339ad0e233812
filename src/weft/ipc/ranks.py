"""Everything that crosses between the engine process, other nodes and ranks: closed unions of msgspec structs."""

from __future__ import annotations

import secrets

import msgspec

from weft.config import EngineConfig
from weft.core.plan import Capacity, Lane, Partition, Plan, Result
from weft.errors import ConfigError, DeviceError, WeftError, by_code


def new_name() -> str:
    """Of a meeting: one that nobody can guess."""
    return f"weft-{secrets.token_hex(8)}"


class Meeting(msgspec.Struct, frozen=True):
    """Where the ranks of a group find one another. name: in shared memory. host, port: where rank 0 listens; port None
    where they share memory."""

    name: str
    host: str
    port: int | None


class RankOrders(msgspec.Struct, frozen=True):
    """The first line of a rank's standard input, as JSON. The rest stays open: it ends when its parent does.

    config: with the cores of this rank. neighbours: ranks on its host, itself among them. model: the folder. folder: of
    the sockets. bind: the address at which other ranks reach this one. crowded: whether ranks share cores.
    """

    config: EngineConfig
    rank: int
    ranks: int
    neighbours: int
    model: str
    folder: str
    meeting: Meeting
    bind: str
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
    """This rank has loaded its part. blocks: of KV that it has room for. kernels: those that --kernels has come to."""

    rank: int
    blocks: int
    kernels: str


class Opened(msgspec.Struct, frozen=True, tag=True):
    """A rank takes plans now: what its device says of itself (see devices/base.py)."""

    rank: int
    capacity: Capacity
    lanes: tuple[Lane, ...]
    partition: Partition | None
    memory: tuple[tuple[str, int], ...]
    device: str
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


class Gone(msgspec.Struct, frozen=True, tag=True):
    """The process of a rank has ended: said by who has started it."""

    rank: int
    words: str


class Agreement(msgspec.Struct, frozen=True):
    """What must be the same on all nodes. version: of weft. settings: but for those of a host. shape: a digest of the
    model's config.json."""

    version: str
    settings: EngineConfig
    shape: str


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first word of another node."""

    node: int
    agreement: Agreement


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The answer: start your ranks."""

    meeting: Meeting


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """The other answer."""

    error: str


FROM_RANKS = "from-ranks"
ToRank = Carry | Share | Blocks | End
FromRank = Begun | Fits | Opened | Done | Lost
Heard = Begun | Fits | Opened | Done | Lost | Gone
ToNode = Welcome | Refusal | Carry | Share | Blocks | End
FromNode = Hello | Begun | Fits | Opened | Done | Lost | Gone


def loss(message: Lost | Gone, where: str = "") -> WeftError:
    """What a rank was lost for. where: the ranks are, for the end of an error that is not about a setting."""
    if isinstance(message, Gone):
        return DeviceError(f"rank {message.rank} {message.words}{where}")
    kind = by_code(message.code)
    return kind(message.error if issubclass(kind, ConfigError) else f"rank {message.rank}: {message.error}{where}")


def to_rank(rank: int) -> str:
    """The name of the socket to a rank."""
    return f"to-rank-{rank}"
