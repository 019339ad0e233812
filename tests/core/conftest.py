"""A scheduler on a device that runs when told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from weft.core.plan import Capacity, Lane, Plan, Result
from weft.core.request import Event, PromptScores, Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices.simulated import ManualDevice

VOCABULARY = 50


class Driver:
    """Submits, plans and lands, and keeps what the client was told: tokens by (request, index), ends by request."""

    def __init__(self, lanes: tuple[Lane, ...] = (Lane.MIXED,), **given: Any) -> None:
        capacity = {
            "blocks": 16,
            "block_size": 4,
            "max_tokens": 64,
            "max_slices": 16,
            "max_model_len": 200,
            "layers": 1,
            "decode_blocks": 0,
        }
        settings = {"max_num_seqs": 8, "max_num_batched_tokens": 32}
        for name, value in given.items():
            (capacity if name in capacity else settings)[name] = value
        self.capacity = Capacity(**capacity, shares=2, vocabulary=VOCABULARY)
        self.scheduler = Scheduler(self.capacity, lanes, SchedulerSettings(**settings), key=b"k" * 32)
        self.device = ManualDevice(self.capacity, lanes)
        self.lanes = lanes
        self.now = 0.0
        self.plans: list[Plan] = []
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.outputs: list[TokenOutput] = []
        self.scores: dict[str, PromptScores] = {}
        self.ends: dict[str, RequestEnd] = {}

    @property
    def pool(self) -> Any:
        return self.scheduler.pool

    def submit(
        self, id: str, prompt: tuple[int, ...] | range, *, priority: int = 0, salt: str = "", **params: Any
    ) -> None:
        eos = params.pop("eos", ())
        self.scheduler.submit(
            Request(id, tuple(prompt), SamplingParams(**params), eos=eos, priority=priority, cache_salt=salt), self.now
        )

    def plan(self, lane: Lane = Lane.MIXED) -> Plan | None:
        plan = self.scheduler.schedule(lane, self.now)
        if plan is not None:
            self.plans.append(plan)
            self.device.submit(plan)
        self.pool.check()
        return plan

    def land(self, lane: Lane = Lane.MIXED, change: Callable[[Result], Result] = lambda result: result) -> list[Event]:
        assert self.device.run(lane), "nothing is in flight"
        (result,) = self.device.poll(0.0)
        return self.hear(self.scheduler.complete(change(result), self.now))

    def fail(self, lane: Lane = Lane.MIXED, message: str = "broken") -> list[Event]:
        return self.land(lane, lambda result: replace(result, error=message))

    def abort(self, id: str) -> list[Event]:
        return self.hear(self.scheduler.abort(id, self.now))

    def stop(self, id: str, index: int = 0) -> list[Event]:
        return self.hear(self.scheduler.stop(id, index, self.now))

    def hear(self, events: list[Event]) -> list[Event]:
        for event in events:
            if isinstance(event, TokenOutput):
                self.outputs.append(event)
                if event.token is not None:
                    self.tokens.setdefault((event.request, event.index), []).append(event.token)
            elif isinstance(event, PromptScores):
                assert event.request not in self.scores
                self.scores[event.request] = event
            else:
                assert event.request not in self.ends
                self.ends[event.request] = event
        self.pool.check()
        return events

    def round(self) -> bool:
        """Every lane once; whether there was anything to do."""
        found = [self.plan(lane) for lane in reversed(self.lanes)]
        for lane in self.lanes:
            if self.scheduler.inflight.busy(lane):
                self.land(lane)
        self.now += 1.0
        return any(found)

    def drain(self) -> None:
        for _ in range(2000):
            if not self.scheduler.live:
                break
            assert self.round(), "requests are live, and nothing is scheduled"
        assert not self.scheduler.live
        assert (self.pool.held, self.pool.pinned) == (0, 0)


@pytest.fixture
def drive() -> type[Driver]:
    return Driver
