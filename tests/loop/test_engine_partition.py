"""The engine with a controller: switches at every step, lanes that are alone or fail, requests that are shed."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.config import EngineConfig
from weft.core.plan import Capacity, Lane, Partition, Plan, Regime, Result, Sharing, Ticket
from weft.core.request import Event, Finish, Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices.cost import CostModel
from weft.devices.simulated import Faults, ManualDevice, SimulatedDevice, continuation
from weft.devices.virtual import VirtualDevice
from weft.errors import DeviceError, QueueFull
from weft.loop.build import controller
from weft.loop.engine import Engine
from weft.phases.auto import AutoPolicy
from weft.phases.controller import Controller, FixedPolicy
from weft.phases.forecast import Limits
from weft.phases.observations import Arrived, Decision, Finished, FirstToken, Observation, Queue, Stepped
from weft.phases.paper import PaperPolicy

VOCABULARY = 60
SHARES = 8
CAPACITY = Capacity(
    blocks=40,
    block_size=4,
    max_tokens=32,
    max_slices=8,
    shares=SHARES,
    max_model_len=80,
    vocabulary=VOCABULARY,
    layers=4,
)
COST = CostModel(fixed=1e-3, per_token=1e-3, per_context=1e-6, weights=2e-3, saturation=0.5, contention=0.3)
WHOLE = Partition(SHARES, SHARES)


@dataclass(frozen=True, slots=True)
class Restless:
    """Another way of sharing whenever it is asked."""

    regimes: tuple[Regime, ...] = tuple(Regime)

    def start(self) -> int:
        return 0

    def first(self, now: float) -> Decision:
        return Decision(now, Sharing(Regime.SPLIT, Partition(4, 4)), "to begin with")

    def decide(
        self, state: int, seen: tuple[Observation, ...], queue: Queue, now: float
    ) -> tuple[int, Decision | None]:
        rng = random.Random(state)
        partition = Partition(rng.randint(1, SHARES), rng.randint(1, SHARES))
        sharing = Sharing(rng.choice(self.regimes), partition, rng.choice([None, 2, 8]), rng.choice([0.0, 0.01]))
        return state + 1, Decision(now, sharing, "restless")


@dataclass(frozen=True, slots=True)
class Watching(FixedPolicy):
    """Remembers what it was told."""

    seen: list[Observation] = field(default_factory=list)
    queues: list[Queue] = field(default_factory=list)
    hold: int | None = None
    within: float = 0.0
    shed: bool = True

    def first(self, now: float) -> Decision:
        return Decision(now, self.sharing, "fixed", self.hold, self.within, back=5.0, shed=self.shed)

    def decide(self, state: Any, seen: tuple[Observation, ...], queue: Queue, now: float) -> tuple[Any, None]:
        self.seen.extend(seen)
        self.queues.append(queue)
        return state, None


def right(prompt: Any, count: int) -> list[int]:
    return list(continuation(tuple(prompt), count, VOCABULARY))


def ask(id: str, prompt: Any, count: int, **params: Any) -> Request:
    return Request(id, tuple(prompt), SamplingParams(max_tokens=count, **params))


@dataclass(slots=True)
class Heard:
    """Tokens, the moments at which they came, and ends, by request."""

    clock: Callable[[], float]
    tokens: dict[str, list[int]] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    ends: dict[str, RequestEnd] = field(default_factory=dict)

    def take(self, events: list[Event]) -> None:
        for event in events:
            assert event.request not in self.ends, "an event after the terminal one"
            if isinstance(event, RequestEnd):
                self.ends[event.request] = event
            elif isinstance(event, TokenOutput) and event.token is not None:
                self.tokens.setdefault(event.request, []).append(event.token)
                self.times.setdefault(event.request, []).append(self.clock())

    def drain(self, engine: Engine) -> None:
        for _ in range(20000):
            if engine.idle:
                return
            self.take(engine.step(20.0))
            engine._scheduler.pool.check()
        raise AssertionError("it does not end")


def virtual(policy: Any, *, lone: bool = False, interval: float = 0.0, **given: Any) -> tuple[Engine, VirtualDevice]:
    device = VirtualDevice(CAPACITY, Partition(4, 4), cost=given.pop("cost", COST), faults=given.pop("faults", None))
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "enable_prefix_caching": False} | given
    scheduler = Scheduler(CAPACITY, device.lanes(), SchedulerSettings(**settings))
    made = Controller(policy, interval=interval, lone=lone)
    return Engine(device, scheduler, device.clock, step_timeout=None, controller=made), device


# -- switches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regimes", [(Regime.SPLIT,), (Regime.TURNS,), (Regime.MIXED,), tuple(Regime)])
@pytest.mark.parametrize("caching", [True, False])
def test_a_switch_at_every_step_costs_no_token(regimes: tuple[Regime, ...], caching: bool) -> None:
    engine, device = virtual(Restless(regimes), enable_prefix_caching=caching)
    rng, heard, wanted = random.Random(3), Heard(device.clock), {}
    for number in range(25):
        prompt = [*range(8), *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30)))]
        wanted[f"r{number}"] = right(prompt, 20)
        engine.submit(ask(f"r{number}", prompt, 20))
        heard.take(engine.step(0.01))
    heard.drain(engine)
    assert heard.tokens == wanted
    stats = engine.stats()
    assert stats.partition_switches > 100 and sum(lane.steps for lane in stats.lanes) > 100
    assert (stats.blocks_held, stats.blocks_pinned) == (0, 0)


def test_a_switch_at_every_step_costs_no_time_beyond_a_step_of_the_own_lane() -> None:
    """Nothing waits for the other lane: what decodes gets a token with every decode step."""
    engine, device = virtual(Restless((Regime.SPLIT,)), cost=CostModel(1e-3, per_token=5e-3, contention=0.0))
    heard = Heard(device.clock)
    for number in range(3):
        engine.submit(ask(f"old{number}", [number, 1], 40))
    for _ in range(12):
        heard.take(engine.step(1.0))
    for number in range(4):
        engine.submit(ask(f"new{number}", range(number, number + 30), 2))
    heard.drain(engine)
    # Three to seven sequences on the least share, an eighth, or less where shares overlap: 9/8 of it.
    longest = 1e-3 + 7 * 5e-3 * SHARES * 9 / 8
    for number in range(3):
        times = heard.times[f"old{number}"]
        assert max(b - a for a, b in itertools.pairwise(times)) <= longest
    assert engine.stats().partition_switches > 40


def test_each_lane_takes_on_a_share_at_its_own_next_step() -> None:
    engine, device = virtual(FixedPolicy(Sharing(Regime.SPLIT, Partition(6, 2))))
    engine.submit(ask("a", range(16), 3))
    engine.step(0.0)
    assert device._jobs[Lane.PREFILL].share == 6 / 8
    device.set_partition(Partition(1, 7))
    assert device._jobs[Lane.PREFILL].share == 6 / 8, "a step that began keeps its share"


def test_a_regime_that_the_device_refuses_is_logged_and_the_shares_stay(caplog: pytest.LogCaptureFixture) -> None:
    engine, device = virtual(FixedPolicy(Sharing(Regime.SPLIT, Partition(SHARES + 1, 1))))
    assert "partition 9:1 was refused" in caplog.text and device.partition() == Partition(4, 4)
    heard = Heard(device.clock)
    engine.submit(ask("a", [1, 2], 3))
    heard.drain(engine)
    assert heard.tokens["a"] == right([1, 2], 3)


def test_every_change_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "weft.partition"):
        engine, device = virtual(Restless())
        engine.submit(ask("a", [1, 2], 3))
        Heard(device.clock).drain(engine)
    lines = [record.getMessage() for record in caplog.records if record.name == "weft.partition"]
    assert lines[0] == "partition: to begin with" and set(lines[1:]) == {"partition: restless"}
    assert len(lines) - 1 == engine.stats().partition_switches > 0


# -- a lane that is alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lone", [True, False])
def test_a_lane_alone_gets_the_whole_device_if_the_controller_says_so(lone: bool) -> None:
    policy = Watching(Sharing(Regime.SPLIT, Partition(5, 3)))
    engine, device = virtual(policy, lone=lone)
    heard = Heard(device.clock)
    engine.submit(ask("a", range(10), 4))
    heard.drain(engine)
    for number in range(2):  # now both lanes have work
        engine.submit(ask(f"b{number}", range(number, number + 30), 12))
    heard.drain(engine)
    engine.submit(ask("end", [1], 1))
    heard.drain(engine)
    steps = [one for one in policy.seen if isinstance(one, Stepped)]
    first = [one.share for one in steps[:4]]
    assert first == ([1.0] * 4 if lone else [5 / 8, 3 / 8, 3 / 8, 3 / 8])
    both = [(one.lane, one.share) for one in steps if one.rival > 0.9]
    assert (Lane.DECODE, 3 / 8) in both


@pytest.mark.parametrize("layers", [1, 4])
def test_turns_keep_decode_waiting_for_no_more_than_a_part_of_a_prompts_step(layers: int) -> None:
    cost = CostModel(1e-3, per_token=1e-3)
    sharing = Sharing(Regime.TURNS, Partition(4, 4), chunk=4 if layers > 1 else None)
    engine, device = virtual(Watching(sharing), cost=cost)
    heard = Heard(device.clock)
    engine.submit(ask("old", [1, 2], 60))
    heard.take(engine.step(1.0))
    for number in range(4):
        engine.submit(ask(f"new{number}", range(number, number + 32), 2))
    heard.drain(engine)
    gaps = [after - before for before, after in itertools.pairwise(heard.times["old"])]
    longest = 1e-3 + 16e-3 / layers  # a prefill step, or a quarter of one
    assert max(gaps) == pytest.approx(longest + 1e-3 + 5e-3, abs=5e-3)
    assert heard.tokens["old"] == right([1, 2], 60)


def test_the_parts_of_a_step_are_one_observation() -> None:
    policy = Watching(Sharing(Regime.TURNS, Partition(4, 4), chunk=4))
    engine, device = virtual(policy, cost=CostModel(0.0, per_token=1e-3))
    heard = Heard(device.clock)
    engine.submit(ask("old", [1, 2], 40))
    heard.take(engine.step(1.0))
    engine.submit(ask("new", range(16), 2))
    heard.drain(engine)
    engine.submit(ask("end", [1], 1))
    heard.drain(engine)
    steps = [one for one in policy.seen if isinstance(one, Stepped) and one.lane is Lane.PREFILL]
    assert [(one.prompt + one.output, one.seconds) for one in steps[:2]] == [
        (2, pytest.approx(2e-3)),
        (16, pytest.approx(16e-3)),
    ]
    assert engine.stats().iteration_tokens == 2 + 39 + 16 + 1 + 1


# -- what the controller is told -------------------------------------------------------------------------------------


def test_the_controller_is_told_what_happened_and_where_the_engine_stands() -> None:
    policy = Watching(Sharing(Regime.SPLIT, Partition(4, 4)))
    engine, device = virtual(policy)
    heard = Heard(device.clock)
    engine.submit(ask("a", range(20), 5))
    engine.submit(ask("wide", range(3), 5, n=2))
    heard.take(engine.step(1.0))
    assert policy.queues[0].waiting and policy.queues[0].decoding == 0
    heard.drain(engine)
    engine.submit(ask("b", [1], 1))
    heard.drain(engine)
    assert [one.tokens for one in policy.seen if isinstance(one, Arrived)] == [20, 3, 1]
    firsts = [one for one in policy.seen if isinstance(one, FirstToken)]
    assert len(firsts) == 3 and all(one.ttft > 0 for one in firsts)
    ended = [one for one in policy.seen if isinstance(one, Finished)]
    assert sorted(one.output for one in ended[:2]) == [5, 5], "of one sequence"
    times = heard.times["a"]
    a = next(one for one in ended if one.tpot == pytest.approx((times[-1] - times[0]) / 4))
    assert a.ttft == pytest.approx(times[0]) and a.waited == 0.0
    steps = [one for one in policy.seen if isinstance(one, Stepped)]
    assert sum(one.prompt for one in steps if one.lane is Lane.PREFILL) >= 23
    assert all(0 <= one.rival <= 1 and one.seconds > 0 for one in steps)


def test_what_comes_between_the_steps_of_a_lane_that_has_work_is_a_part_of_them() -> None:
    """So the steps add up to the time that it took: an engine that is slow itself is not taken for a fast device."""
    policy = Watching(Sharing(Regime.MIXED, WHOLE))
    device = VirtualDevice(CAPACITY, WHOLE, cost=COST)
    late = itertools.count()

    def clock() -> float:  # every look at it takes 0.1 ms
        return device.clock() + 1e-4 * next(late)

    scheduler = Scheduler(CAPACITY, device.lanes(), SchedulerSettings(8, 16, enable_prefix_caching=False))
    engine = Engine(device, scheduler, clock, step_timeout=None, controller=Controller(policy, interval=0.0))
    engine.submit(ask("a", range(30), 40))
    heard = Heard(clock)
    began = clock()
    heard.drain(engine)
    engine.submit(ask("end", [1], 1))
    heard.drain(engine)
    steps = [one for one in policy.seen if isinstance(one, Stepped)][:41]
    assert [one.output for one in steps] == [0, 0] + [1] * 39
    computed = sum(COST.fixed + COST.weights for _ in steps)
    assert computed + 0.01 < sum(one.seconds for one in steps) == pytest.approx(steps[-1].at - began, abs=2e-3)


def test_a_failed_step_and_an_aborted_request_teach_nothing() -> None:
    policy = Watching(Sharing(Regime.SPLIT, Partition(4, 4)))
    engine, device = virtual(policy, faults=Faults(failed=frozenset({1})))
    heard = Heard(device.clock)
    engine.submit(ask("failed", range(20), 5))
    heard.drain(engine)
    engine.submit(ask("aborted", range(9), 30))
    heard.take(engine.step(1.0))
    engine.abort("aborted")
    heard.drain(engine)
    assert not [one for one in policy.seen if isinstance(one, Finished | FirstToken)] or heard.tokens["aborted"]
    assert not [one for one in policy.seen if isinstance(one, Finished)]
    assert len([one for one in policy.seen if isinstance(one, Stepped)]) <= engine.stats().iteration_tokens


# -- requests that are shed ------------------------------------------------------------------------------------------


def test_a_request_that_would_wait_for_too_many_tokens_is_refused_and_a_short_one_is_not() -> None:
    sharing = Sharing(Regime.SPLIT, Partition(4, 4), size_weight=0.001)
    engine, device = virtual(Watching(sharing, hold=40))
    heard = Heard(device.clock)
    engine.submit(ask("a", range(30), 2))
    with pytest.raises(QueueFull, match="30 prompt tokens go first, and the device computes 40 within the target"):
        engine.submit(ask("b", range(32), 2))
    engine.submit(ask("c", range(8), 2))
    heard.drain(engine)
    assert set(heard.ends) == {"a", "c"} and engine.stats().partition_refused == 1


@pytest.mark.parametrize(
    ("within", "order"),
    [
        (1.0, ["a", "late", "b", "c"]),
        # 40 tokens in so long: one of 32 may begin within 0.032 s, and the first step takes longer.
        (0.16, ["a", "b", "c", "late"]),
    ],
)
def test_a_request_whose_time_is_up_before_its_turn_lets_others_pass_and_is_served(
    within: float, order: list[str]
) -> None:
    sharing = Sharing(Regime.SPLIT, Partition(4, 4))
    engine, device = virtual(Watching(sharing, hold=40, within=within, shed=False))
    heard = Heard(device.clock)
    for name, tokens in (("a", 30), ("late", 32), ("b", 8), ("c", 2)):
        engine.submit(ask(name, range(tokens), 2))
    heard.drain(engine)
    firsts = {name: times[0] for name, times in heard.times.items()}
    assert sorted(firsts, key=lambda name: firsts[name]) == order
    assert engine.stats().partition_put_back == (order[-1] == "late")


@pytest.mark.parametrize("tokens", [2, 5, 16, 17, 40])
@pytest.mark.parametrize("companions", [0, 3])
def test_however_a_prompt_is_cut_its_tokens_attend_to_all_before_them_once(tokens: int, companions: int) -> None:
    policy = Watching(Sharing(Regime.MIXED, WHOLE, 8))
    engine, device = virtual(policy)
    heard = Heard(device.clock)
    for number in range(companions):
        engine.submit(ask(str(number), [number], 30))
    engine.submit(ask("a", range(tokens), 3))
    heard.drain(engine)
    steps = [one for one in policy.seen if isinstance(one, Stepped)]
    whole = tokens * (tokens + 1) // 2
    # A last part of one token is a decode step in all but name.
    assert sum(one.pairs for one in steps) in (whole, whole - tokens)
    assert all(one.read <= one.context and (one.read > 0) == (one.pairs > 0) for one in steps)


def test_a_prompt_that_alone_takes_too_long_lets_others_pass_from_the_start() -> None:
    engine, device = virtual(Watching(Sharing(Regime.SPLIT, Partition(4, 4)), hold=20, within=9.0, shed=False))
    heard = Heard(device.clock)
    for name, tokens in (("long", 32), ("b", 8), ("c", 2)):
        engine.submit(ask(name, range(tokens), 2))
    heard.drain(engine)
    firsts = {name: times[0] for name, times in heard.times.items()}
    assert sorted(firsts, key=lambda name: firsts[name]) == ["b", "c", "long"]
    assert engine.stats().partition_put_back == 1


@given(
    tokens=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    hold=st.integers(1, 60),
    within=st.floats(0.0, 0.5),
)
@settings(max_examples=40, deadline=None)
def test_whoever_is_put_back_is_so_once_and_is_served(tokens: list[int], hold: int, within: float) -> None:
    engine, device = virtual(Watching(Sharing(Regime.SPLIT, Partition(4, 4)), hold=hold, within=within, shed=False))
    heard = Heard(device.clock)
    for number, count in enumerate(tokens):
        engine.submit(ask(str(number), range(count), 2))
    heard.drain(engine)
    assert {end.reason for end in heard.ends.values()} == {Finish.LENGTH} and len(heard.ends) == len(tokens)
    assert engine.stats().partition_put_back <= len(tokens)


# -- lanes that fail -------------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Iterator[Any]:
    made: list[Engine] = []

    def make(faults: Faults, policy: Any = None, step_timeout: float = 0.15) -> Engine:
        device = SimulatedDevice(CAPACITY, Partition(4, 4), cost=CostModel(fixed=1e-3), faults=faults)
        scheduler = Scheduler(CAPACITY, device.lanes(), SchedulerSettings(8, 16, enable_prefix_caching=False))
        given = None if policy is None else Controller(policy, interval=0.0)
        made.append(Engine(device, scheduler, step_timeout=step_timeout, controller=given))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def begin(engine: Engine, heard: Heard) -> None:
    """One request that decodes, for a long time; the next prefill step is number 10 at the least."""
    engine.submit(ask("decodes", [1, 2], 60))
    while len(heard.tokens.get("decodes", ())) < 5:
        heard.take(engine.step(5.0))
        assert "decodes" not in heard.ends


class Trap(SimulatedDevice):
    """Makes a fault of the next step of a lane, whatever its number."""

    def __init__(self, kind: str, lane: Lane) -> None:
        super().__init__(CAPACITY, Partition(4, 4), cost=CostModel(fixed=2e-3), faults=Faults())
        self.kind, self.lane, self.set, self.sprung = kind, lane, False, 0

    def submit(self, plan: Plan) -> Ticket:
        if self.set and plan.lane is self.lane and not self.sprung:
            self.sprung = plan.step
            self._executor.faults = Faults(**{self.kind: frozenset({plan.step})})  # type: ignore[arg-type]
        return super().submit(plan)


@pytest.mark.parametrize("kind", ["failed", "lost", "gone"])
@pytest.mark.parametrize("lane", [Lane.PREFILL, Lane.DECODE])
@pytest.mark.parametrize("regime", [Regime.SPLIT, Regime.TURNS])
def test_a_lane_that_fails_hangs_or_dies_ends_its_requests_and_the_other_goes_on(
    kind: str, lane: Lane, regime: Regime
) -> None:
    device = Trap(kind, lane)
    scheduler = Scheduler(CAPACITY, device.lanes(), SchedulerSettings(8, 16, enable_prefix_caching=False))
    policy = FixedPolicy(Sharing(regime, Partition(4, 4)))
    # Long enough for a step on a busy machine; only who hangs needs a time-out.
    engine = Engine(device, scheduler, step_timeout=0.4 if kind == "lost" else 30.0, controller=Controller(policy))
    try:
        heard = Heard(lambda: 0.0)
        begin(engine, heard)
        device.set = True
        engine.submit(ask("prefills", range(9), 5))
        heard.drain(engine)
        assert device.sprung
        harmed, spared = ("prefills", "decodes") if lane is Lane.PREFILL else ("decodes", "prefills")
        assert heard.ends[harmed].code == "step_failed"
        prompt, count = ([1, 2], 60) if spared == "decodes" else (range(9), 5)
        # Where decode is what fails, it may have had the other request in the same step by then.
        if heard.ends[spared].reason is Finish.LENGTH or lane is Lane.PREFILL:
            assert heard.tokens[spared] == right(prompt, count)
        # Whatever happened to the lane, later requests are served: by the other one, if need be.
        for number in range(3):
            engine.submit(ask(f"later{number}", range(number, number + 20), 6))
        heard.drain(engine)
        assert [heard.tokens[f"later{number}"] for number in range(3)] == [
            right(range(number, number + 20), 6) for number in range(3)
        ]
        assert engine.dead is None
        stats = engine.stats()
        # What a ticket that never landed names stays out of reach; everything else is back.
        assert stats.blocks_held == 0 and stats.blocks_free + stats.blocks_pinned == CAPACITY.blocks
        assert (stats.blocks_pinned > 0) == (kind == "lost")
    finally:
        engine.close()


def test_a_lane_that_answers_late_gets_its_work_back(caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    device = ManualDevice(CAPACITY, (Lane.PREFILL, Lane.DECODE))
    scheduler = Scheduler(CAPACITY, device.lanes(), SchedulerSettings(8, 16, enable_prefix_caching=False))
    engine, heard = Engine(device, scheduler, lambda: clock[0], step_timeout=5.0), Heard(lambda: clock[0])
    engine.submit(ask("lost", range(9), 3))
    for _ in range(2):
        heard.take(engine.step(0.0))
        clock[0] += 5.1
    heard.take(engine.step(0.0))
    assert heard.ends["lost"].code == "step_failed" and "the other lane does its work" in caplog.text
    engine.submit(ask("next", [1], 3))
    heard.take(engine.step(0.0))
    assert device.run(Lane.DECODE)
    heard.take(engine.step(0.0))
    assert heard.tokens["next"] == right([1], 1)
    assert device.run(Lane.PREFILL)
    heard.take(engine.step(0.0))
    assert "lane prefill answers again" in caplog.text
    for _ in range(3):
        device.run(Lane.DECODE)
        heard.take(engine.step(0.0))
    engine.submit(ask("after", [2], 1))
    heard.take(engine.step(0.0))
    assert device.run(Lane.PREFILL), "prefill is the prefill lane's again"
    heard.drain(engine)
    assert heard.tokens["after"] == right([2], 1) and engine.stats().blocks_pinned == 0


def test_both_lanes_gone_is_a_dead_device(real: Any) -> None:
    engine, heard = real(Faults(gone=frozenset(range(3, 99))), step_timeout=0.05), Heard(lambda: 0.0)
    for number in range(3):
        engine.submit(ask(f"r{number}", range(20), 9))
        heard.take(engine.step(0.02))
    heard.drain(engine)
    assert engine.dead is not None and len(heard.ends) == 3


# -- flags -----------------------------------------------------------------------------------------------------------


def test_the_flags_choose_the_policy() -> None:
    assert controller(EngineConfig(partition="off"), CAPACITY) is None
    for partition, shares in (("1:1", (4, 4)), ("80%:100%", (6, 8))):
        made = controller(EngineConfig(partition=partition), CAPACITY)
        assert made is not None and made.lone, "a lane alone is not held to its share"
        assert made.first(0.0).sharing == Sharing(Regime.SPLIT, Partition(*shares))
    made = controller(EngineConfig(partition="pd:3:1"), CAPACITY)
    assert made is not None and not made.lone, "two devices: a lane alone has no more than its own"
    assert made.first(0.0).sharing == Sharing(Regime.SPLIT, Partition(6, 2))
    made = controller(EngineConfig(partition="turns:3:1", max_num_batched_tokens=16), CAPACITY)
    assert made is not None and made.first(0.0).sharing == Sharing(Regime.TURNS, Partition(3, 1), 2)
    made = controller(EngineConfig(partition="auto", slo_ttft=2.0), CAPACITY)
    assert made is not None and made.lone
    policy: Any = made._policy
    assert isinstance(policy, AutoPolicy) and (policy.targets.ttft, policy.targets.tpot) == (2.0, 0.1) and policy.shed
    assert policy.device == Limits(shares=8, chunk=32, seats=8, layers=4)
    made = controller(EngineConfig(partition="auto"), CAPACITY)
    assert made is not None and not made._policy.shed  # type: ignore[attr-defined]
    made = controller(EngineConfig(partition="paper", slo_tpot=0.2), CAPACITY)
    assert made is not None and not made.lone
    assert isinstance(made._policy, PaperPolicy) and made._policy.targets.tpot == 0.2


def test_results_of_no_partition_are_still_served() -> None:
    """A device with one mixed lane has no shares to change."""
    device = VirtualDevice(CAPACITY, None, cost=COST)
    with pytest.raises(DeviceError, match="one mixed lane"):
        device.set_partition(WHOLE)
    engine = Engine(
        device, Scheduler(CAPACITY, device.lanes(), SchedulerSettings(8, 16)), device.clock, step_timeout=None
    )
    heard = Heard(device.clock)
    engine.submit(ask("a", range(20), 5))
    heard.drain(engine)
    assert heard.tokens["a"] == right(range(20), 5) and engine.stats().partition_regime == ""
    assert isinstance(Result(Ticket(1, Lane.MIXED)), Result)
