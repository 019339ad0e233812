"""Virtual time: the laws of conservation, and that nothing is kept."""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.bench.stats import Record
from weft.bench.traces import Row, Size
from weft.core.plan import Lane, Partition, Plan, Result
from weft.core.request import RequestEnd
from weft.devices.virtual import VirtualDevice
from weft.errors import DeviceError
from weft.sim import traffic
from weft.sim.part import Part
from weft.sim.router import LeastLoaded, PrefixAware, RoundRobin
from weft.sim.run import Simulation


class Watch:
    """Looks over the shoulder of one replica: plans, results and ends, and the pool after each of them."""

    def __init__(self, part: Part, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replica = part.replicas[index]
        self.spans: dict[Lane, list[tuple[float, float]]] = {}
        self.slices: dict[int, list[tuple[int, int]]] = {}
        self.names: dict[int, str] = {}
        self.ends: dict[str, RequestEnd] = {}
        self.tokens = 0
        self._plans: dict[int, tuple[Plan, float]] = {}
        self._now = 0.0
        device, scheduler = self.replica.device, self.replica.scheduler
        submit, complete = device.submit, scheduler.complete

        def watched_submit(plan: Plan) -> Any:
            self._plans[plan.step] = (plan, device.clock())
            for one in self.replica.under_way():
                self.names[one.id] = one.live.request.id
            return submit(plan)

        def watched_complete(result: Result, now: float) -> Any:
            plan, began = self._plans.pop(result.ticket.step)
            self.spans.setdefault(plan.lane, []).append((began, now))
            if plan.last:
                self.tokens += plan.tokens * result.repeats
                for again in range(result.repeats):
                    for piece in plan.slices:
                        self.slices.setdefault(piece.sequence, []).append((piece.start + again, piece.end + again))
            events = complete(result, now)
            for event in events:
                if isinstance(event, RequestEnd):
                    assert event.request not in self.ends, "a request ends once"
                    self.ends[event.request] = event
            self.check(now)
            return events

        monkeypatch.setattr(device, "submit", watched_submit)
        monkeypatch.setattr(scheduler, "complete", watched_complete)

    def check(self, now: float) -> None:
        pool = self.replica.scheduler.pool
        pool.check()
        assert 0 <= pool.held + pool.pinned <= pool.total
        assert now >= self._now, "time goes forward"
        self._now = now

    def lanes_never_overlap_themselves(self) -> None:
        for spans in self.spans.values():
            for (_, ended), (began, _) in pairwise(spans):
                assert began >= ended

    def work_is_conserved(self) -> None:
        """Tokens of all steps = prompts + answers but for their last tokens - cached + computed again."""
        answers = sum(end.prompt_tokens + end.generated_tokens - 1 for end in self.ends.values())
        cached = sum(end.cached_tokens for end in self.ends.values())
        again = 0
        for sequence, slices in self.slices.items():
            at = self.ends[self.names[sequence]].cached_tokens
            for start, end in slices:
                assert start <= at, "no token is left out"
                again += at - start
                at = end
            end_of = self.ends[self.names[sequence]]
            assert at == end_of.prompt_tokens + end_of.generated_tokens - 1
        assert self.tokens == answers - cached + again
        assert again == 0 or self.replica.scheduler.running.preemptions


sizes = st.builds(
    lambda read, written, names: Size(read, written, tuple(names), 16),
    st.integers(1, 150),
    st.integers(1, 60),
    st.lists(st.integers(0, 2), max_size=6),
)
loads = st.lists(st.tuples(st.floats(0.0, 0.2), sizes), min_size=1, max_size=25)
partitions = st.sampled_from(["off", "1:1", "3:1", "100%:100%", "turns:1:2", "auto", "paper"])


def rows_of(gaps: list[tuple[float, Size]]) -> list[Row]:
    return list(zip(np.cumsum([gap for gap, _ in gaps]).tolist(), [size for _, size in gaps], strict=True))


@settings(max_examples=60, deadline=None)
@given(load=loads, partition=partitions, blocks=st.integers(14, 64), caching=st.booleans(), count=st.integers(1, 3))
def test_the_laws_of_conservation(
    setup: Any, load: list[tuple[float, Size]], partition: str, blocks: int, caching: bool, count: int
) -> None:
    records: list[Record] = []
    made = setup(blocks=blocks, partition=partition, enable_prefix_caching=caching, max_model_len=blocks * 16)
    with pytest.MonkeyPatch.context() as monkeypatch:
        part = Part(dict.fromkeys(range(count), made))
        simulation = Simulation(part, LeastLoaded(range(count)), records.append)
        watches = [Watch(part, index, monkeypatch) for index in range(count)]
        rows = rows_of(load)
        simulation.run(iter(rows))
    # Nothing is lost: each request ended once, with all its tokens.
    assert Counter((one.input_tokens, one.output_tokens, one.error) for one in records) == Counter(
        (size.input, size.output, None) for _, size in rows
    )
    for one in records:
        assert one.first is not None and one.sent < one.first <= one.ended
    for watch in watches:
        pool = watch.replica.scheduler.pool
        assert (pool.held, pool.pinned) == (0, 0) and watch.replica.engine.idle
        watch.lanes_never_overlap_themselves()
        watch.work_is_conserved()


def test_a_lone_request_takes_the_seconds_of_its_steps(setup: Any) -> None:
    records: list[Record] = []
    Simulation(Part({0: setup()}), RoundRobin([0]), records.append).run([(2.0, Size(100, 3))])
    (one,) = records
    chunks = [(64, 64), (36, 100), (1, 101), (1, 102)]
    seconds = [1e-3 + 1e-4 * tokens + 1e-7 * context + 4e-3 for tokens, context in chunks]
    assert one.ttft == pytest.approx(sum(seconds[:2]))
    assert one.tpot == pytest.approx(sum(seconds[2:]) / 2)
    assert (one.sent, one.ended) == (2.0, pytest.approx(2.0 + sum(seconds)))


@pytest.mark.parametrize("partition", ["off", "1:1", "auto"])
def test_the_same_seed_gives_the_same_run(setup: Any, partition: str) -> None:
    def once(seed: int) -> list[Record]:
        found: list[Record] = []
        rng = np.random.default_rng(seed)
        load = traffic.renewal(20.0, 0.5, traffic.uniform(100, 20, 0.8, rng), rng)
        part = Part(dict.fromkeys(range(2), setup(partition=partition)))
        simulation = Simulation(part, LeastLoaded(range(2)), found.append)
        simulation.run(traffic.until(load, 5.0))
        return found

    assert once(3) == once(3) != once(4)


def test_what_is_refused_and_what_fails_is_told_with_its_code(setup: Any) -> None:
    records: list[Record] = []
    part = Part({0: setup(max_num_queued_reqs=1, max_num_seqs=1)})
    simulation = Simulation(part, RoundRobin([0]), records.append)
    simulation.run([(0.0, Size(600, 1)), (0.0, Size(10, 2)), (0.0, Size(11, 2)), (0.0, Size(12, 2))])
    assert {one.input_tokens: one.error for one in records} == {
        600: "context_length_exceeded",
        10: None,
        11: None,
        12: "queue_full",
    }


def test_a_request_that_can_never_end_is_an_error(setup: Any) -> None:
    part = Part({0: setup()})
    simulation = Simulation(part, RoundRobin([0]), lambda _: None)
    part.replicas[0].scheduler.planner.retire(Lane.MIXED)
    with pytest.raises(DeviceError, match="1 requests are under way"):
        simulation.run([(0.0, Size(5, 5))])


def test_nothing_is_kept_of_requests_that_have_ended(setup: Any) -> None:
    def kept(count: int) -> int:
        def load() -> Iterator[Row]:
            return ((number * 0.05, Size(40, 4)) for number in range(count))

        part = Part({0: setup(enable_prefix_caching=False)})
        simulation = Simulation(part, RoundRobin([0]), lambda _: None)
        simulation.run(load())
        (replica,) = part.replicas.values()
        objects = (simulation, part, replica, replica.scheduler, replica.device)
        return sum(len(value) for one in objects for value in vars(one).values() if hasattr(value, "__len__"))

    assert kept(400) == kept(40)


def test_memory_is_flat_once_the_prefix_caches_are_full(setup: Any) -> None:
    """Every prompt is another one, so that a pool of 64 blocks is full of cached ones after some tens of requests."""
    traced: list[int] = []

    def look(_: float) -> None:
        gc.collect()
        traced.append(tracemalloc.get_traced_memory()[0])

    def load() -> Iterator[Row]:
        return ((number * 0.05, Size(48, 4, (3 * number, 3 * number + 1, 3 * number + 2), 16)) for number in range(900))

    part = Part({0: setup(), 1: setup()})
    simulation = Simulation(part, PrefixAware((0, 1), 64 * 16), lambda _: None)
    for at in (10.0, 15.0, 30.0, 44.0):  # 200, 300, 600 and 880 requests
        simulation.at(at, look)
    tracemalloc.start()
    try:
        simulation.run(load())
    finally:
        tracemalloc.stop()
    pools = [replica.scheduler.pool for replica in part.replicas.values()]
    assert all(pool.cached > 0.9 * pool.total for pool in pools)
    # 16 bytes for each request that had ended would be seen; Python's own free lists come and go.
    assert traced[3] - traced[1] < 16 * 580, traced


def test_time_does_not_pass_beyond_an_arrival(setup: Any) -> None:
    """A device that is asked where it stands is not ahead of the fleet."""
    device = VirtualDevice(setup().capacity, None, lengths=True)
    assert device.next_end == math.inf
    device.pass_until(1.5)
    assert device.clock() == 1.5


def test_a_step_whose_pace_does_not_change_ends_to_the_bit(setup: Any) -> None:
    """However often the other lane begins and ends steps meanwhile: a replay depends on it."""

    class Constant:
        def seconds(self, plan: Plan, share: float = 1.0, rival: float = 0.0) -> float:
            return 1.9317 if plan.lane is Lane.PREFILL else 0.0137

    device = VirtualDevice(setup(repeats=1).capacity, Partition(2, 2), cost=Constant(), lengths=True)  # type: ignore[arg-type]
    device.submit(Plan(1, Lane.PREFILL, ()))
    for step in range(2, 50):
        device.submit(Plan(step, Lane.DECODE, ()))
        (result,) = device.poll(None)
        assert result.ticket.step == step
        device.pass_until(device.clock() + 0.0003)
    (result,) = device.poll(None)
    assert (result.seconds, device.clock()) == (1.9317, 1.9317)
