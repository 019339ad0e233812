"""Ranks that Ray places and starts: `weft serve` with --distributed-executor-backend ray, on a node of a Ray cluster.

The engine asks for a placement group with a bundle for each rank, and starts an actor in each (ray_actor.py). From
there on an actor is to the engine what another host of --nnodes is (nodes.py), with one rank:

    engine ── Ray: serve rank 1 for 10.0.0.1:40001 ─▶ actor
           ◀────────────────── TCP ────────────────▶ actor ──▶ rank process

No plan goes through Ray. The cluster must run already. When the engine ends, in whatever way, Ray ends the actors and
removes the group.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from weft.config import EngineConfig, parse_address, parse_ray_address
from weft.devices.cores import collective_of
from weft.errors import ConfigError, DeviceError
from weft.ipc.channel import make_folder
from weft.ipc.ranks import FromNode, Heard, Meeting, ToRank, Welcome, new_name
from weft.ipc.stream import Stream
from weft.loop.nodes import Nodes, agreement, listen, meet
from weft.loop.rank_processes import END_SECONDS, Ranks
from weft.loop.ray_actor import ActorOrders
from weft.loop.ray_actors import START_SECONDS, Actors
from weft.loop.ray_places import Place, RayNode, bundle_in_words, cpus_of_rank, in_words, place_ranks

# Seconds in which Ray must have found room for the ranks.
PLACE_SECONDS = 60.0
REACH_SECONDS = 5.0  # to find out whether anybody listens at the cluster's address
KILL_SECONDS = 2.0  # for the actors to kill ranks that have not ended by themselves
START_LINE = "ray start --head --node-ip-address ADDRESS --disable-usage-stats --include-dashboard=false"


class RayRanks:
    """All ranks, each an actor's."""

    def __init__(self, nodes: Nodes, actors: Actors, release: Callable[[], None]) -> None:
        """release: what was taken of Ray."""
        self._nodes = nodes
        self._actors = actors
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
            self._actors.wait(seconds)
            self._nodes.close(0.0)  # actors that are left end now, and kill their ranks
            self._actors.wait(KILL_SECONDS)
        finally:
            self._release()


def open_ray(config: EngineConfig, model: Path, say: Callable[[str], None]) -> RayRanks:
    """Place and start all ranks. Raises ConfigError, CheckpointError or DeviceError."""
    ray = _import_ray()
    with ExitStack() as stack:
        say("connect to Ray")
        _connect(ray, config.ray_address)
        stack.callback(ray.shutdown)
        nodes = _nodes_of(ray)
        bundle = _bundle_of(config, nodes)
        say("wait for room in the Ray cluster")
        group = ray.util.placement_group([bundle] * config.tensor_parallel_size, strategy="PACK")
        stack.callback(ray.util.remove_placement_group, group)
        places = _wait_for_places(ray, group, bundle, config.tensor_parallel_size, nodes)
        say("start the actors")
        actors = Actors(ray, group, bundle, places)
        meeting = _meet_at(config, places, actors.find())
        with _listen(config, _address_here(ray)) as listener:
            others = _gather(listener, config, model, places, bundle["CPU"], actors)
        stack.callback(_close, others.values())
        for node in others.values():
            node.send(Welcome(meeting))
        local = Ranks((), make_folder())  # the engine itself has none
        hosts = [place.node.address for place in places]
        all_ranks = Nodes(hosts, local, {node: range(rank, rank + 1) for rank, node in others.items()})
        return RayRanks(all_ranks, actors, stack.pop_all().close)


def _import_ray() -> Any:
    """The module. Raises ConfigError."""
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
    """Join the cluster as one of its drivers. Raises ConfigError or DeviceError."""
    address, source = given or "auto", "--ray-address"
    if address == "auto" and os.environ.get("RAY_ADDRESS"):  # as Ray does, but for `local` and ray://
        address, source = os.environ["RAY_ADDRESS"], "RAY_ADDRESS"
    try:
        parse_ray_address(address)
    except ValueError as error:
        raise ConfigError(f"{source} is {address!r}; {error}") from error
    try:
        if address != "auto":  # else Ray would go on trying for minutes
            socket.create_connection(parse_address(address), REACH_SECONDS).close()
        with _same_handler():
            ray.init(address=address, configure_logging=False)
    except Exception as error:  # Ray has no class for what can happen here
        raise DeviceError(
            f"no Ray cluster at {source} {address}: {str(error).strip().splitlines()[0]}\nThis host must be a node of "
            f"one. What would work: `{START_LINE}` on the first host, and `ray start --address ADDRESS:6379` on others"
        ) from error


@contextmanager
def _same_handler() -> Iterator[None]:
    """Ray puts a handler of its own for SIGTERM; but the front end decides when an engine process ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _nodes_of(ray: Any) -> list[RayNode]:
    """The nodes that are alive."""
    alive = [(node, node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return [
        RayNode(node["NodeID"], node["NodeManagerAddress"], int(has.get("CPU", 0)), int(has.get("GPU", 0)))
        for node, has in alive
    ]


def _address_here(ray: Any) -> str:
    """This node's, as the others know it."""
    here = ray.get_runtime_context().get_node_id()
    return next(node.address for node in _nodes_of(ray) if node.id == here)


def _bundle_of(config: EngineConfig, nodes: Sequence[RayNode]) -> dict[str, int]:
    """What a rank asks Ray for; one on a GPU has little use for more than one CPU. Raises DeviceError."""
    if config.device == "cuda":
        return {"CPU": config.ray_cpus or 1, "GPU": 1}
    return {"CPU": config.ray_cpus or cpus_of_rank(nodes, config.tensor_parallel_size)}


def _wait_for_places(
    ray: Any, group: Any, bundle: Mapping[str, int], ranks: int, nodes: Sequence[RayNode]
) -> list[Place]:
    """Of the ranks, in order. Raises DeviceError when there is no room for too long."""
    if not group.wait(PLACE_SECONDS):
        free = ray.available_resources()
        unused = {what: int(free.get(what, 0)) for what in bundle}
        raise DeviceError(
            f"no room within {PLACE_SECONDS:g} s for {ranks} ranks of {bundle_in_words(bundle)} each: "
            f"{in_words(nodes)}, and {bundle_in_words(unused)} of all these are free. What would work: fewer ranks, "
            "fewer --ray-cpus, or more nodes (`ray start --address ADDRESS:6379`)"
        )
    bundles = ray.util.placement_group_table(group)["bundles_to_node_id"]
    return place_ranks(bundles, _nodes_of(ray), _address_here(ray))


def _meet_at(config: EngineConfig, places: Sequence[Place], port: int) -> Meeting:
    """Where the ranks find one another. port: on rank 0's node. Raises DeviceError."""
    name, nodes = new_name(), {place.node.id for place in places}
    if len(nodes) > 1 and config.collective == "shm":
        raise DeviceError(
            f"--collective is shm, and Ray has put the ranks on {len(nodes)} nodes, which share none; gloo would work"
        )
    shared = len(nodes) == 1 and collective_of(config) == "shm"
    return Meeting(name, places[0].node.address, None if shared else port)


def _listen(config: EngineConfig, here: str) -> socket.socket:
    """Where the actors reach the engine: --dist-init-addr, or any port of this node's address. Raises DeviceError."""
    host, port = parse_address(config.dist_init_addr) if config.dist_init_addr else (here, 0)
    try:
        return listen(host, port)
    except OSError as error:
        raise DeviceError(f"the engine cannot listen at {host}:{port} for its ranks: {error}") from error


def _gather(
    listener: socket.socket, config: EngineConfig, model: Path, places: Sequence[Place], cpus: int, actors: Actors
) -> dict[int, Stream[FromNode]]:
    """Tell the actors to serve; their connections, by rank. Raises ConfigError, CheckpointError or DeviceError."""
    host, port = listener.getsockname()[:2]
    config, agreed = replace(config, model=_model(config, model)), agreement(config, model)
    level = logging.getLevelName(logging.getLogger("weft").getEffectiveLevel()).lower()
    actors.serve(
        [
            ActorOrders(config, rank, place.before, place.neighbours, cpus, host, port, level)
            for rank, place in enumerate(places)
        ]
    )
    others: dict[int, Stream[FromNode]] = {}
    try:
        ranks, timeout = range(len(places)), config.rank_timeout
        missing = meet(listener, ranks, agreed, others, seconds=START_SECONDS, timeout=timeout, check=actors.check)
        if missing:
            raise DeviceError(
                f"{actors.name(missing[0])} did not reach the engine at {host}:{port} within {START_SECONDS:g} s; "
                "--dist-init-addr chooses where the engine listens"
            )
    except BaseException:
        _close(others.values())
        raise
    return others


def _model(config: EngineConfig, folder: Path) -> str:
    """What each node shall look for: a folder by its whole path, anything else by the same name."""
    return str(folder.absolute()) if folder == Path(config.model).expanduser() else config.model


def _close(nodes: Collection[Stream[FromNode]]) -> None:
    for node in nodes:
        node.close()
