"""Ranks that Ray places and starts: `weft serve` with --distributed-executor-backend ray, on one node of a Ray cluster.

The engine asks for a placement group with a bundle for each rank, and starts an actor in each bundle (ray_actor.py).
From there on an actor is to the engine what another host of --nnodes is (nodes.py), with one rank:

    engine ── Ray: "serve rank 1 for 10.0.0.1:40001" ─▶ actor
           ◀───────────────── TCP ─────────────────▶ actor ──▶ rank process

No plan goes through Ray. The cluster must run already. When the engine ends, in whatever way, Ray ends the actors and
removes the group.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

import weft
from weft.config import EngineConfig, parse_address, parse_ray_address
from weft.devices.cores import collective_of
from weft.errors import ConfigError, DeviceError, by_code
from weft.ipc.ranks import FromNode, Heard, Meeting, ToRank, Welcome
from weft.ipc.stream import Stream
from weft.loop.nodes import Nodes, agreement, meet
from weft.loop.rank_processes import END_SECONDS, start_ranks
from weft.loop.ray_actor import ActorOrders, Ended, Found, RankActor
from weft.loop.ray_places import Place, RayNode, bundle_in_words, cpus_of_rank, in_words, places

# Seconds in which Ray must have found room for the ranks, and in which their actors must have started.
PLACE_SECONDS = 60.0
START_SECONDS = 60.0
REACH_SECONDS = 5.0  # to find out whether anybody listens at the cluster's address
KILL_SECONDS = 2.0  # for the actors to kill ranks that have not ended by themselves

log = logging.getLogger(__name__)


class RayRanks:
    """All ranks, each an actor's."""

    def __init__(self, nodes: Nodes, wait: Callable[[float], None], release: Callable[[], None]) -> None:
        """wait: for the actors to be done, up to so many seconds. release: what was taken of Ray."""
        self._nodes = nodes
        self._wait = wait
        self._release = release

    @property
    def where(self) -> str:
        return self._nodes.where

    def __len__(self) -> int:
        return len(self._nodes)

    def send(self, message: ToRank) -> None:
        self._nodes.send(message)

    def listen(self, timeout: float | None = None, also: Collection[int] = ()) -> list[Heard]:
        return self._nodes.listen(timeout, also)

    def close(self, seconds: float = END_SECONDS) -> None:
        try:
            self._wait(seconds)
            self._nodes.close(0.0)  # which ends the actors that are left, and they kill their ranks
            self._wait(KILL_SECONDS)
        finally:
            self._release()


def open_ray(config: EngineConfig, model: Path, say: Callable[[str], None]) -> RayRanks:
    """Place and start all ranks. Raises ConfigError, CheckpointError or DeviceError."""
    ray = _import_ray()
    with ExitStack() as stack:
        say("connect to Ray")
        _connect(ray, config.ray_address)
        stack.callback(ray.shutdown)
        nodes = _nodes(ray)
        bundle = _bundle(config, nodes)
        say("wait for room in the Ray cluster")
        group, seats = _place(ray, bundle, config.tensor_parallel_size, nodes, stack)
        say("start the actors")
        actors = [_actor(ray, group, bundle, seat) for seat in seats]
        port = _find(ray, actors, seats)
        calls: list[Any] = []
        members = _gather(ray, config, model, bundle["CPU"], actors, seats, port, calls)

        def wait(seconds: float) -> None:
            ray.wait(calls, num_returns=len(calls), timeout=seconds)

        return RayRanks(members, wait, stack.pop_all().close)


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--distributed-executor-backend is ray, and the package {error.name} is not installed; what would work: "
            "pip install 'weft[ray]' on every node, or mp"
        ) from error
    return ray


def _connect(ray: Any, given: str | None) -> None:
    """Join the cluster as a driver. Raises ConfigError or DeviceError."""
    address, flag = given or "auto", "--ray-address"
    if address == "auto" and os.environ.get("RAY_ADDRESS"):  # Ray itself reads it, also where it says `local`
        address, flag = os.environ["RAY_ADDRESS"], "RAY_ADDRESS"
        try:
            parse_ray_address(address)
        except ValueError as error:
            raise ConfigError(f"{flag} is {address!r}; {error}") from error
    try:
        if address != "auto":  # else Ray would go on trying for minutes
            socket.create_connection(parse_address(address), REACH_SECONDS).close()
        ray.init(address=address, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:  # Ray's ConnectionError is an OSError
        first = str(error).strip().splitlines()[0]
        raise DeviceError(
            f"no Ray cluster at {flag} {address}: {first}\n"
            "This host must be a node of one: start it with `ray start --head --node-ip-address ADDRESS "
            "--disable-usage-stats --include-dashboard=false`, or, where another host is the head already, with "
            "`ray start --address HEAD:6379`"
        ) from error
    finally:
        # Ray has put a handler of its own there; the front end decides when this process ends.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _nodes(ray: Any) -> list[RayNode]:
    """Those that are alive."""
    return [
        RayNode(
            node["NodeID"],
            node["NodeManagerAddress"],
            int(node["Resources"].get("CPU", 0)),
            int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _bundle(config: EngineConfig, nodes: Sequence[RayNode]) -> dict[str, int]:
    """What a rank asks Ray for: one on a GPU has little use for more than one CPU."""
    if config.device == "cuda":
        return {"CPU": config.ray_cpus or 1, "GPU": 1}
    return {"CPU": config.ray_cpus or cpus_of_rank(nodes, config.tensor_parallel_size)}


def _place(
    ray: Any, bundle: Mapping[str, int], ranks: int, nodes: Sequence[RayNode], stack: ExitStack
) -> tuple[Any, list[Place]]:
    """The placement group, which `stack` removes, and the ranks' places. Raises DeviceError where there is no room."""
    group = ray.util.placement_group([dict(bundle)] * ranks, strategy="PACK")
    stack.callback(ray.util.remove_placement_group, group)
    if not group.wait(PLACE_SECONDS):
        free = ray.available_resources()
        unused = {name: int(free.get(name, 0)) for name in bundle}
        raise DeviceError(
            f"no room within {PLACE_SECONDS:g} s for {ranks} ranks of {bundle_in_words(bundle)} each, every one on one "
            f"node: {in_words(nodes)}; {bundle_in_words(unused)} of all that are free now. What would work: fewer "
            "--ray-cpus, fewer ranks, or more nodes (`ray start --address HEAD:6379`)"
        )
    bundles = ray.util.placement_group_table(group)["bundles_to_node_id"]
    here = ray.get_runtime_context().get_node_id()
    return group, places(bundles, _nodes(ray), here)


def _actor(ray: Any, group: Any, bundle: Mapping[str, int], place: Place) -> Any:
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
        group, placement_group_bundle_index=place.bundle
    )
    return (
        ray.remote(RankActor)
        .options(num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), scheduling_strategy=strategy)
        .remote()
    )


def _find(ray: Any, actors: Sequence[Any], seats: Sequence[Place]) -> int:
    """Wait until all actors run; a port on rank 0's node for the meeting of the ranks. Raises DeviceError."""
    end = time.monotonic() + START_SECONDS
    calls = [actor.find.remote(seat.node.address) for actor, seat in zip(actors, seats, strict=True)]
    ports = []
    for rank, (call, seat) in enumerate(zip(calls, seats, strict=True)):
        who = f"the actor of rank {rank} on {seat.node.address}"
        try:
            found = msgspec.json.decode(ray.get(call, timeout=max(0.0, end - time.monotonic())), type=Found)
        except ray.exceptions.GetTimeoutError as error:
            raise DeviceError(f"{who} did not start within {START_SECONDS:g} s") from error
        except ray.exceptions.RayError as error:
            raise DeviceError(
                f"{who} did not start: {str(error).strip().splitlines()[-1]}\nweft {weft.__version__} must be "
                "installed on every node, for the Python that `ray start` was run with"
            ) from error
        if found.version != weft.__version__:
            raise DeviceError(f"{who} has weft {found.version}, and this is {weft.__version__}")
        ports.append(found.port)
    return ports[0]


def _gather(
    ray: Any,
    config: EngineConfig,
    model: Path,
    cpus: int,
    actors: Sequence[Any],
    seats: Sequence[Place],
    port: int,
    calls: list[Any],
) -> Nodes:
    """Have the actors start the ranks. port: on rank 0's node. calls: filled with what ends when an actor is done.

    Raises ConfigError, CheckpointError or DeviceError.
    """
    meeting = Meeting(f"weft-{secrets.token_hex(8)}", seats[0].node.address, _port(config, seats, port))
    shared = replace(config, model=_model(config, model))
    others: dict[int, Stream[FromNode]] = {}
    with _listen(ray, config) as listener:
        host, at = listener.getsockname()[:2]
        for rank, (actor, seat) in enumerate(zip(actors, seats, strict=True)):
            orders = ActorOrders(shared, rank, seat.before, seat.neighbours, cpus, host, at, _log_level())
            calls.append(actor.serve.remote(msgspec.json.encode(orders)))
        try:
            missing = meet(
                listener,
                range(len(seats)),
                agreement(config, model),
                others,
                seconds=START_SECONDS,
                timeout=config.rank_timeout,
                check=lambda: _check(ray, calls, seats),
            )
            if missing:
                raise DeviceError(
                    f"rank {missing[0]} on {seats[missing[0]].node.address} did not reach the engine at {host}:{at} "
                    f"within {START_SECONDS:g} s; --dist-init-addr chooses where the engine listens"
                )
            for node in others.values():
                node.send(Welcome(meeting))
            local = start_ranks(config, model, range(0), meeting, host)  # the engine itself has none
        except BaseException:
            for node in others.values():
                node.close()
            raise
    hosts = [seat.node.address for seat in seats]
    return Nodes(hosts, local, {node: range(rank, rank + 1) for rank, node in others.items()})


def _listen(ray: Any, config: EngineConfig) -> socket.socket:
    """Where the actors reach the engine: --dist-init-addr, or a port of this node's address in Ray."""
    here = ray.get_runtime_context().get_node_id()
    own = next(node.address for node in _nodes(ray) if node.id == here)
    host, port = parse_address(config.dist_init_addr) if config.dist_init_addr else (own, 0)
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise DeviceError(f"the engine cannot listen at {host}:{port} for its ranks: {error}") from error


def _port(config: EngineConfig, seats: Sequence[Place], port: int) -> int | None:
    """None where the ranks share memory, which they do not know of nodes that look like one host only."""
    nodes = {seat.node.id for seat in seats}
    if len(nodes) == 1:
        return None if collective_of(config) == "shm" else port
    if config.collective == "shm":
        raise DeviceError(
            f"--collective is shm, and Ray has put the ranks on {len(nodes)} nodes, which share none; gloo would work"
        )
    return port


def _check(ray: Any, calls: Sequence[Any], seats: Sequence[Place]) -> None:
    """Raise what an actor has ended of, if one has before the engine knows its rank."""
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
    for call in done:
        rank = calls.index(call)
        who = f"rank {rank} on {seats[rank].node.address}"
        try:
            ended = msgspec.json.decode(ray.get(call), type=Ended)
        except ray.exceptions.RayError as error:
            raise DeviceError(f"{who}: its actor died: {str(error).strip().splitlines()[0]}") from error
        raise by_code(ended.code)(f"{who}: {ended.error or 'its actor ended'}")


def _model(config: EngineConfig, folder: Path) -> str:
    """What each node shall look for: a folder by its whole path, all else by the same name."""
    return str(folder.absolute()) if folder == Path(config.model).expanduser() else config.model


def _log_level() -> str:
    return logging.getLevelName(logging.getLogger("weft").getEffectiveLevel()).lower()
