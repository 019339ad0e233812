"""One replica of a simulated fleet: the engine, scheduler and controller that serve, on a device in virtual time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from weft.config import EngineConfig, parse_partition
from weft.core.plan import Capacity, Lane, Partition, Plan, Slice
from weft.core.request import Event, Request
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler
from weft.core.sequence import Sequence
from weft.devices.virtual import Cost, VirtualDevice
from weft.loop.build import controller, settings
from weft.loop.engine import Engine

# Nobody can make prompts collide on purpose here, and runs have to be the same each time.
KEY = b"simulated"
# A cost may be off by so much where numbers are rounded.
ROUNDED = 1.0 - 1e-6


@dataclass(frozen=True, slots=True)
class Setup:
    """How a replica is made. config: the settings that scheduler and controller read, as `weft serve` has them.
    capacity: of all its ranks as one device. cost: seconds of a step on all of them."""

    config: EngineConfig
    capacity: Capacity
    cost: Cost

    @property
    def least(self) -> float:
        """Seconds that any step takes at least, where it is certain which requests a step ends as soon as it begins:
        on one mixed lane, which nobody takes a step away from. 0.0 where nothing is certain."""
        capacity, slots = self.capacity, self.capacity.blocks * self.capacity.block_size
        if parse_partition(self.config.partition) is not None or capacity.max_model_len > slots:
            return 0.0
        return ROUNDED * self.cost.seconds(Plan(0, Lane.MIXED, (Slice(0, 0, (0,), (0,)),)))

    def takes(self, tokens: int, room: int) -> bool:
        """Whether a replica with `room` for requests in its queue takes a prompt of so many tokens for certain."""
        capacity = self.capacity
        fits = tokens < min(capacity.max_model_len, capacity.blocks * capacity.block_size)
        return fits and room > 0 and self.config.max_num_queued_tokens is None


@dataclass(frozen=True, slots=True)
class LaneState:
    """share: units of the device. busy: seconds of device time since the start. steps: since then."""

    lane: str
    share: int
    busy: float
    steps: int


@dataclass(frozen=True, slots=True)
class State:
    """What a replica looks like: what a study reads of Engine.stats. used: blocks that are held or pinned. tokens:
    computed by all lanes since the start. switches: of the partition."""

    running: int
    waiting: int
    used: int
    free: int
    cached: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    tokens: int
    switches: int
    lanes: tuple[LaneState, ...]


class Replica:
    """began: the virtual time at which it starts."""

    def __init__(self, setup: Setup, began: float = 0.0) -> None:
        config, capacity = setup.config, setup.capacity
        shares = parse_partition(config.partition)
        partition = None if shares is None else Partition(*shares.of(capacity.shares))
        self.device = VirtualDevice(capacity, partition, cost=setup.cost, lengths=True)
        self.device.pass_until(began)
        self.scheduler = Scheduler(capacity, self.device.lanes(), settings(config), key=KEY)
        self.engine = Engine(
            self.device, self.scheduler, self.device.clock, step_timeout=None, controller=controller(config, capacity)
        )

    def submit(self, name: str, prompt: tuple[int, ...], output: int, now: float) -> list[Event]:
        """Take a request at a time that is no later than the device's `next_end`. Raises as Engine.submit."""
        self.device.cut(now, under_way=True)
        self.device.pass_until(now)
        params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        self.engine.submit(Request(name, prompt, params, told=False))
        return self.engine.step(0.0)

    def step(self) -> list[Event]:
        """Let time pass until the next end."""
        return self.engine.step(None)

    def settle(self, now: float) -> None:
        """What has ended by `now` has been taken in from now on, also of a plan that is repeated. `now` is no later
        than the device's `next_end`."""
        self.device.cut(now, under_way=False)
        began = self.device.next_end
        if began > now:
            return
        # Who came after the step under way had begun is not in it, and ends what it stands for.
        waiting = self.scheduler.running.waiting
        late = [one for one in waiting if one.live.arrived >= began]
        for one in late:
            waiting.remove(one)
        self.engine.step(None)
        for one in late:
            waiting.add(one)
        if late:
            self.device.cut(now, under_way=True)

    @property
    def last_begins(self) -> float:
        """When the last step begins of those that the plan under way stands for."""
        job = self.device.job(Lane.MIXED)
        return math.inf if job is None else job.last_begins

    def ending(self) -> Iterator[Sequence]:
        """Whom the plans under way end, in their order, if nobody takes a step away; see `Setup.least`."""
        job = self.device.job(Lane.MIXED)
        steps = len(job.times) if job is not None and job.times else 1
        for flight in self.scheduler.inflight:
            for piece, sequence in flight.wanted:
                if piece.sample is not None and len(sequence.tokens) + steps >= sequence.max_len:
                    yield sequence

    @property
    def room(self) -> int:
        """Requests that the queue takes yet."""
        return self.scheduler.settings.max_num_queued_reqs - self.scheduler.admission.queued

    def state(self) -> State:
        stats = self.engine.stats()
        return State(
            running=stats.running,
            waiting=stats.waiting,
            used=stats.blocks_held + stats.blocks_pinned,
            free=stats.blocks_free,
            cached=stats.blocks_cached,
            preemptions=stats.preemptions,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            tokens=stats.iteration_tokens,
            switches=stats.partition_switches,
            lanes=tuple(LaneState(one.lane, one.share, one.busy, one.steps) for one in stats.lanes),
        )

    def under_way(self) -> Iterator[Sequence]:
        """What would be lost if it failed now."""
        running = self.scheduler.running
        for line in (running.waiting, running.prefilling, running.decoding):
            yield from line
