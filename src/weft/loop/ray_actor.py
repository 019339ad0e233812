"""What Ray starts, on whichever node: an actor for each rank. It starts the rank's process, as a host of --nnodes does,
and passes messages between it and the engine over TCP. Ray carries the orders below, as text, and nothing else."""

from __future__ import annotations

import logging
from dataclasses import replace

import msgspec

import weft
from weft import log as logs
from weft.config import EngineConfig
from weft.devices.cores import usable_cores
from weft.errors import WeftError
from weft.ipc.ranks import Hello, Meeting
from weft.loop.nodes import agreement, free_port, serve_ranks
from weft.loop.rank_processes import Ranks, start_ranks
from weft.loop.worker import died
from weft.text.hub import resolve_model

log = logging.getLogger(__name__)


class Found(msgspec.Struct, frozen=True):
    """What an actor finds on its node. port: one that nobody listens at."""

    version: str
    port: int


class ActorOrders(msgspec.Struct, frozen=True):
    """config: with a model that every node finds. before, neighbours: see ray_places.Place. cpus: that the rank may
    use. host, port: where the engine listens."""

    config: EngineConfig
    rank: int
    before: int
    neighbours: int
    cpus: int
    host: str
    port: int
    log_level: str


class Ended(msgspec.Struct, frozen=True):
    """How an actor ended. error: None when it was told to."""

    error: str | None = None
    code: str | None = None


class RankActor:
    """One rank. Its methods take and give JSON, so that Ray has no objects of ours to serialise."""

    def find(self, address: str) -> bytes:
        """address: this node's."""
        return msgspec.json.encode(Found(weft.__version__, free_port(address)))

    def serve(self, orders: bytes) -> bytes:
        """Until the engine is done with the rank."""
        try:
            serve_rank(msgspec.json.decode(orders, type=ActorOrders))
        except Exception as error:  # the engine shall hear of it in words
            level = logging.DEBUG if isinstance(error, WeftError) else logging.ERROR
            log.log(level, "the actor ends", exc_info=True)
            words = died(error)
            return msgspec.json.encode(Ended(words.error, words.code))
        return msgspec.json.encode(Ended())


def serve_rank(orders: ActorOrders) -> None:
    """Raises ConfigError, CheckpointError or DeviceError."""
    logs.set_up(orders.log_level)
    model = resolve_model(orders.config.model, orders.config.revision)
    config, before, neighbours = _share(orders)

    def start(meeting: Meeting, bind: str) -> Ranks:
        own = range(orders.rank, orders.rank + 1)
        return start_ranks(config, model, own, meeting, bind, before=before, neighbours=neighbours)

    hello = Hello(orders.rank, agreement(config, model))
    serve_ranks((orders.host, orders.port), hello, config.rank_timeout, start)


def _share(orders: ActorOrders) -> tuple[EngineConfig, int, int]:
    """(config, before, neighbours) for `start_ranks`: of this host, no more than what its ranks have asked Ray for."""
    config = orders.config
    if config.device == "cuda":  # Ray shows an actor no GPU but its own
        return config, 0, 1
    cores = usable_cores(config.cores)[: orders.cpus * orders.neighbours]
    return replace(config, cores=",".join(map(str, cores))), orders.before, orders.neighbours
