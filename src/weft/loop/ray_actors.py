"""The actors of the ranks, as the engine sees them: started in the bundles of a placement group, told to serve, watched
until the engine has a connection to each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

import weft
from weft.errors import DeviceError, by_code
from weft.loop.ray_actor import ActorOrders, Ended, Found, RankActor
from weft.loop.ray_places import Place

# Seconds in which Ray must have started them, and in which they must have reached the engine.
START_SECONDS = 60.0


class Actors:
    """One for each rank, in order."""

    def __init__(self, ray: Any, group: Any, bundle: Mapping[str, int], places: Sequence[Place]) -> None:
        """ray: the module. bundle: what each of the group's has, and an actor takes."""
        self._ray = ray
        self._places = places
        self._calls: list[Any] = []
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        kind, cpus, gpus = ray.remote(RankActor), bundle["CPU"], bundle.get("GPU", 0)
        within = [strategy(group, placement_group_bundle_index=place.bundle) for place in places]
        self._actors = [kind.options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=one).remote() for one in within]

    def find(self) -> int:
        """Wait until all run; a port on rank 0's node that nobody listens at. Raises DeviceError."""
        end = time.monotonic() + START_SECONDS
        calls = [actor.find.remote(place.node.address) for actor, place in zip(self._actors, self._places, strict=True)]
        found = [self._found(rank, call, end) for rank, call in enumerate(calls)]
        return found[0].port

    def serve(self, orders: Sequence[ActorOrders]) -> None:
        """Each rank's; returns at once."""
        self._calls = [
            actor.serve.remote(msgspec.json.encode(order)) for actor, order in zip(self._actors, orders, strict=True)
        ]

    def check(self) -> None:
        """Raise what an actor has ended of, if one has."""
        done, _ = self._ray.wait(self._calls, num_returns=len(self._calls), timeout=0)
        for call in done:
            who = self.name(self._calls.index(call))
            try:
                ended = msgspec.json.decode(self._ray.get(call), type=Ended)
            except self._ray.exceptions.RayError as error:
                raise DeviceError(f"{who}: its actor died: {_last_line(error)}") from error
            raise by_code(ended.code)(f"{who}: {ended.error or 'its actor has ended'}")

    def wait(self, seconds: float) -> None:
        """For all to be done, up to so many seconds."""
        if self._calls:
            self._ray.wait(self._calls, num_returns=len(self._calls), timeout=seconds)

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self._places[rank].node.address}"

    def _found(self, rank: int, call: Any, end: float) -> Found:
        errors = self._ray.exceptions
        try:
            found = msgspec.json.decode(self._ray.get(call, timeout=max(0.0, end - time.monotonic())), type=Found)
        except errors.GetTimeoutError as error:
            raise DeviceError(f"{self.name(rank)}: its actor did not start within {START_SECONDS:g} s") from error
        except errors.RayError as error:
            raise DeviceError(
                f"{self.name(rank)}: its actor did not start: {_last_line(error)}\nweft {weft.__version__} must be "
                "installed on every node, for the Python that `ray start` was run with"
            ) from error
        if found.version != weft.__version__:
            raise DeviceError(
                f"{self.name(rank)}: weft {found.version} is installed there, and this is {weft.__version__}"
            )
        return found


def _last_line(error: Exception) -> str:
    """Of a remote traceback, that is the error itself."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
