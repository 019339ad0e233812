"""What was planned on a real device is planned again in the simulator, where steps end as they did there."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from weft.bench.traces import Row, Size
from weft.config import EngineConfig
from weft.core.plan import Plan, Result, Ticket
from weft.core.request import Request
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler
from weft.devices import open_device
from weft.devices.base import Device
from weft.loop.build import controller, settings
from weft.loop.engine import Engine
from weft.sim.part import Part
from weft.sim.replica import KEY, Setup
from weft.sim.router import RoundRobin
from weft.sim.run import Simulation
from weft.sim.traffic import prompt
from weft.text.hub import resolve_model

TICK = 2.0**-20  # of the clock, so that sums and differences of times are exact


class Recorder:
    """A device, and the clock of an engine on it that moves only when something comes from outside: a request, or
    results. Those that come together are put in the order of their steps."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.plans: list[Plan] = []
        self.seconds: dict[int, float] = {}
        self._began: dict[int, float] = {}
        self._start = time.monotonic()
        self._now = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)

    def clock(self) -> float:
        return self._now

    def tick(self) -> float:
        """The time now, later than the one before."""
        self._now = max(self._now + TICK, round((time.monotonic() - self._start) / TICK) * TICK)
        return self._now

    def submit(self, plan: Plan) -> Ticket:
        self.plans.append(plan)
        self._began[plan.step] = self._now
        return self.device.submit(plan)

    def poll(self, timeout: float | None) -> list[Result]:
        found = [] if timeout == 0.0 else self.device.poll(timeout)
        if found:
            self.tick()
        found.sort(key=lambda result: result.ticket.step)
        for result in found:
            self.seconds[result.ticket.step] = self._now - self._began[result.ticket.step]
        return [replace(result, seconds=self.seconds[result.ticket.step]) for result in found]


@dataclass
class Recorded:
    """As a cost: each step takes as long as it took."""

    took: dict[int, float] = field(default_factory=dict)

    def seconds(self, plan: Plan, share: float = 1.0, rival: float = 0.0) -> float:
        return self.took[plan.step]


def record(engine: Engine, recorder: Recorder, load: list[Row]) -> list[Row]:
    """Serve in real time. What arrived when, by the recorder's clock."""
    arrived: list[Row] = []
    start = time.monotonic()
    while len(arrived) < len(load) or not engine.idle:
        left = load[len(arrived)][0] + start - time.monotonic() if len(arrived) < len(load) else None
        if left is not None and left <= 0:
            size, number = load[len(arrived)][1], len(arrived)
            arrived.append((recorder.tick(), size))
            params = SamplingParams(max_tokens=size.output, temperature=0.0, ignore_eos=True)
            engine.submit(Request(str(number), prompt(size, number), params))
            left = 0.0
        engine.step(left)
    return arrived


def without_tokens(plans: list[Plan]) -> list[Plan]:
    """Only how many there are: the simulator draws none."""
    return [
        replace(plan, slices=tuple(one._replace(tokens=(0,) * len(one.tokens)) for one in plan.slices))
        for plan in plans
    ]


@pytest.mark.parametrize("partition", ["off", "1:1", "turns:1:2", "auto"])
def test_the_simulated_run_plans_what_the_real_one_planned(partition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(device="cpu", partition=partition, num_blocks=24, max_num_seqs=6, max_num_batched_tokens=48)
    load = [(0.01 * n, Size(10 + 17 * n % 80, 1 + 7 * n % 30, (n % 3, 3 + n % 2), 16)) for n in range(20)]
    device = open_device(config, resolve_model("builtin", None), lambda _: None)
    recorder = Recorder(device)
    try:
        capacity = device.capacity()
        scheduler = Scheduler(capacity, device.lanes(), settings(config), key=KEY)
        engine = Engine(recorder, scheduler, recorder.clock, step_timeout=None, controller=controller(config, capacity))
        arrived = record(engine, recorder, load)
    finally:
        device.close()
    assert scheduler.running.prefix_hits, "the load exercises the prefix cache"

    ends: list[Any] = []
    part = Part({0: Setup(config, capacity, Recorded(recorder.seconds))})
    simulation = Simulation(part, RoundRobin([0]), ends.append)
    plans: list[Plan] = []
    virtual = part.replicas[0].device
    submit = virtual.submit

    def watched(plan: Plan) -> Ticket:
        plans.append(plan)
        return submit(plan)

    monkeypatch.setattr(virtual, "submit", watched)
    simulation.run(arrived)
    assert without_tokens(plans) == without_tokens(recorder.plans)
    assert len(ends) == len(load) and virtual.clock() == recorder.clock()
    again = part.replicas[0].scheduler.running
    assert (again.preemptions, again.prefix_hits) == (scheduler.running.preemptions, scheduler.running.prefix_hits)
