"""One simulated run from end to end: a fleet, its traffic, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass

from weft.bench.stats import Record, Slo
from weft.bench.traces import Row
from weft.core.plan import Lane
from weft.errors import ConfigError
from weft.sim.part import Part, Replicas
from weft.sim.processes import Processes
from weft.sim.replica import Setup
from weft.sim.router import LeastLoaded, PrefixAware, RoundRobin, Router
from weft.sim.run import Simulation, Transfer
from weft.sim.tally import Tally, Timeline, Totals
from weft.sim.transferred import received

ROUTERS = ("round-robin", "least-loaded", "prefix-aware")
# One of ROUTERS, or what makes one over some replicas of a setup.
Routing = str | Callable[[Iterable[int], Setup], Router]


@dataclass(frozen=True, slots=True)
class Failure:
    """At a time, the first `count` replicas are gone for `repair` seconds, as those of one node."""

    at: float
    count: int
    repair: float


@dataclass(frozen=True, slots=True)
class Fleet:
    """count: replicas of one setup. prefill: so many of them prefill only and the others decode only, joined by
    `transfer`; 0: each does both."""

    setup: Setup
    count: int = 1
    router: Routing = "round-robin"
    failures: tuple[Failure, ...] = ()
    prefill: int = 0
    transfer: Transfer | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to. steps: of all replicas. cached: the part of the prompts' tokens that the prefix cache had.
    wall: real seconds that it took to simulate."""

    totals: Totals
    tally: Tally
    timeline: Timeline
    steps: int
    step_tokens: int
    preemptions: int
    cached: float
    switches: int
    retried: int
    wall: float


def study(
    fleet: Fleet,
    traffic: Iterable[Row],
    slo: Slo,
    *,
    seconds: float | None = None,
    warm_up: float = 0.0,
    looks: int = 0,
    processes: int = 1,
    on_end: Callable[[Record], None] | None = None,
    on_time: Callable[[float], None] | None = None,
) -> Outcome:
    """Serve the traffic to its end.

    looks: how often within `seconds` the timeline is taken, and `on_time` told of the virtual time. processes: that
    compute the replicas; the result is the same. on_end: told of each request, too. Raises ConfigError for a fleet that
    cannot be, DeviceError when a request can never end.
    """
    began = time.perf_counter()
    tally = Tally(slo, warm_up)

    def ended(record: Record) -> None:
        tally(record)
        if on_end is not None:
            on_end(record)

    with closing(_replicas(fleet, processes)) as replicas:
        simulation = _simulation(fleet, replicas, ended)
        timeline = Timeline([Lane(one.lane) for one in replicas.states(0.0)[0].lanes])
        if looks and seconds:
            _look_every(simulation, timeline, seconds, looks, fleet, on_time)
        for failure in fleet.failures:
            _fail_at(simulation, failure, fleet)
        simulation.run(traffic)
        states = replicas.states(simulation.now)
    queries = sum(one.prefix_queries for one in states)
    return Outcome(
        totals=tally.totals(),
        tally=tally,
        timeline=timeline,
        steps=sum(lane.steps for one in states for lane in one.lanes),
        step_tokens=sum(one.tokens for one in states),
        preemptions=sum(one.preemptions for one in states),
        cached=sum(one.prefix_hits for one in states) / queries if queries else 0.0,
        switches=sum(one.switches for one in states),
        retried=simulation.retried,
        wall=time.perf_counter() - began,
    )


def make_router(name: Routing, indices: Iterable[int], setup: Setup) -> Router:
    """Raises ConfigError for a name that is none of ROUTERS."""
    if not isinstance(name, str):
        return name(indices, setup)
    if name == "round-robin":
        return RoundRobin(indices)
    if name == "least-loaded":
        return LeastLoaded(indices)
    if name == "prefix-aware":
        return PrefixAware(indices, setup.capacity.blocks * setup.capacity.block_size)
    raise ConfigError(f"--router is {name!r}; it must be one of {', '.join(ROUTERS)}")


def _replicas(fleet: Fleet, processes: int) -> Replicas:
    if fleet.prefill and not 0 < fleet.prefill < fleet.count:
        raise ConfigError(
            f"--prefill-replicas is {fleet.prefill} of --replicas {fleet.count}; each phase needs at least one"
        )
    if fleet.prefill and processes > 1:
        raise ConfigError("--prefill-replicas does not go with --processes: what ends on one replica begins on another")
    setups = [fleet.setup] * fleet.count
    if fleet.prefill:
        setups[fleet.prefill :] = [received(fleet.setup)] * (fleet.count - fleet.prefill)
    processes = min(processes, fleet.count)
    return Part(dict(enumerate(setups))) if processes == 1 else Processes(setups, processes)


def _simulation(fleet: Fleet, replicas: Replicas, ended: Callable[[Record], None]) -> Simulation:
    everybody = range(fleet.count)
    if not fleet.prefill:
        return Simulation(replicas, make_router(fleet.router, everybody, fleet.setup), ended)
    first = make_router(fleet.router, everybody[: fleet.prefill], fleet.setup)
    second = make_router("least-loaded", everybody[fleet.prefill :], fleet.setup)
    return Simulation(replicas, first, ended, decode=second, transfer=fleet.transfer)


def _look_every(
    simulation: Simulation,
    timeline: Timeline,
    seconds: float,
    looks: int,
    fleet: Fleet,
    on_time: Callable[[float], None] | None,
) -> None:
    """Behind `seconds`, ever more seldom: requests may come in a moment and take hours."""

    def look(now: float) -> None:
        timeline.look(simulation.replicas.states(now)[: fleet.count], fleet.setup.capacity.shares, now)
        if on_time is not None:
            on_time(now)
        simulation.at(now + max(seconds, now) / looks, look)

    simulation.at(seconds / looks, look)


def _fail_at(simulation: Simulation, failure: Failure, fleet: Fleet) -> None:
    if fleet.prefill:
        raise ConfigError(
            "a fleet with --prefill-replicas does not go with --fail: what it lost would have to be sent again"
        )
    if not 0 < failure.count < fleet.count:
        raise ConfigError(f"{failure.count} of {fleet.count} replicas fail; it must be at least one, and not all")

    def fail(_: float) -> None:
        simulation.fail(range(failure.count), failure.repair)

    simulation.at(failure.at, fail)
