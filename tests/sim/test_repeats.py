"""A plan that stands for many steps is as these steps are: the same times, to the bit, and the same state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.test_processes import loads, rows_of

from weft.bench.stats import Record, Slo
from weft.bench.traces import Size
from weft.core.plan import Lane, Partition, Plan, Result, Sampled, Sampling, Slice, Ticket
from weft.core.request import Event, Finish, Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices.cost import CostModel
from weft.devices.virtual import VirtualDevice
from weft.errors import DeviceError
from weft.sim.estimate import cost_of
from weft.sim.hardware import find_gpu
from weft.sim.models import find_model, model_names
from weft.sim.part import Part, Placed
from weft.sim.precision import find_precision
from weft.sim.replica import Replica, Setup
from weft.sim.run import Transfer
from weft.sim.step import StepCost
from weft.sim.study import Failure, Fleet, Outcome, study

Make = Callable[..., Setup]


def one_by_one(setup: Setup) -> Setup:
    return replace(setup, capacity=replace(setup.capacity, repeats=1))


def served(fleet: Fleet, load: list[tuple[float, Size]]) -> tuple[Outcome, list[Record]]:
    records: list[Record] = []
    outcome = study(fleet, rows_of(load), Slo(1.0, 0.1), seconds=1.0, looks=7, on_end=records.append)
    return outcome, records


@settings(max_examples=100, deadline=None)
@given(
    load=loads,
    router=st.sampled_from(["round-robin", "least-loaded", "prefix-aware"]),
    caching=st.booleans(),
    blocks=st.integers(40, 64),
    block_size=st.sampled_from([4, 16]),
    seats=st.integers(1, 8),
    count=st.integers(1, 3),
    fails=st.none() | st.floats(0.0, 0.5),
    apart=st.booleans(),
)
def test_a_run_is_the_same_to_the_bit(
    setup: Make,
    load: list[tuple[float, Size]],
    router: str,
    caching: bool,
    blocks: int,
    block_size: int,
    seats: int,
    count: int,
    fails: float | None,
    apart: bool,
) -> None:
    """With pools that are too small for all, so that some are preempted, and replicas that fail in the middle."""
    made = setup(
        blocks=blocks * 16 // block_size, block_size=block_size, enable_prefix_caching=caching, max_num_seqs=seats,
        max_num_queued_reqs=6, max_model_len=640,
    )  # fmt: skip
    if apart and count > 1:
        fleet = Fleet(made, count, router, prefill=1, transfer=Transfer(1e3, 1e8))
    else:
        fleet = Fleet(made, count, router, () if fails is None or count == 1 else (Failure(fails, 1, 0.2),))
    ours, records = served(fleet, load)
    theirs, expected = served(replace(fleet, setup=one_by_one(made)), load)
    assert records == expected and len(records) == len(load)
    for name in ("steps", "step_tokens", "preemptions", "cached", "retried"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("at", "kv", "cached", "running", "waiting"):
        assert getattr(ours.timeline, name) == getattr(theirs.timeline, name), name
    assert ours.timeline.busy[Lane.MIXED] == pytest.approx(theirs.timeline.busy[Lane.MIXED])


def test_most_steps_are_not_planned(setup: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    schedule = Scheduler.schedule

    def counted(self: Scheduler, lane: Lane, now: float) -> Plan | None:
        plan = schedule(self, lane, now)
        plans.extend([] if plan is None else [plan])
        return plan

    monkeypatch.setattr(Scheduler, "schedule", counted)
    outcome, _ = served(Fleet(setup(block_size=64, blocks=32)), [(0.0, Size(60, 100)), (0.1, Size(60, 200))])
    # Two prompts, what the second one cuts, both ends, seven looks, and what 64 times are not enough for.
    assert outcome.steps > 200 and len(plans) < 20


def test_steps_that_are_not_planned_count_by_their_tokens_like_the_others(setup: Make) -> None:
    replica = Replica(setup(block_size=64, blocks=32))
    replica.submit("one", (2,) * 60, 100, 0.0)
    while not replica.engine.idle:
        replica.step()
    assert replica.engine.stats().step_sizes == (99, 0, 0, 0, 1, *[0] * 9), "99 of one token, one of up to 64"


@pytest.mark.parametrize("name", model_names())
@pytest.mark.parametrize(("ranks", "weave"), [(1, False), (2, True)])
def test_each_time_costs_what_a_step_does(name: str, ranks: int, weave: bool) -> None:
    cost = cost_of(find_model(name), find_gpu("h100"), ranks, "bf16", weave=weave)
    repeated = plan_of([5, 4090, 900], repeats=30)
    assert cost.repeated(repeated) == [cost.seconds(plan_of([5 + n, 4090 + n, 900 + n])) for n in range(30)]


def test_each_time_costs_what_a_step_does_in_a_window() -> None:
    model = replace(find_model("llama-3-8b"), window=1000)
    cost = StepCost(model, find_gpu("h100"), find_precision("bf16"))
    repeated = plan_of([5, 990, 3000], repeats=20)
    assert cost.repeated(repeated) == [cost.seconds(plan_of([5 + n, 990 + n, 3000 + n])) for n in range(20)]


def test_the_plain_cost_is_asked_for_each_time() -> None:
    cost = CostModel(fixed=1e-3, per_token=1e-4, per_context=1e-6)
    assert cost.repeated(plan_of([7, 9], repeats=3)) == [cost.seconds(plan_of([7 + n, 9 + n])) for n in range(3)]


def plan_of(starts: list[int], repeats: int = 1) -> Plan:
    draw = Sampling(SamplingParams(), 0, 0)
    slices = tuple(Slice(number, start, (1,), (), draw) for number, start in enumerate(starts))
    return Plan(1, Lane.MIXED, slices, repeats=repeats)


# -- the device ------------------------------------------------------------------------------------------------------


def device_of(setup: Make) -> VirtualDevice:
    """Each step takes a second."""
    return VirtualDevice(setup().capacity, cost=CostModel(fixed=1.0), lengths=True)


@pytest.mark.parametrize(
    ("at", "under_way", "times"), [(2.5, True, 3), (2.5, False, 2), (2.0, True, 3), (2.0, False, 2), (0.5, True, 1)]
)
def test_what_has_not_begun_is_cut_off(setup: Make, at: float, under_way: bool, times: int) -> None:
    device = device_of(setup)
    device.submit(plan_of([5, 6], repeats=9))
    job = device.job(Lane.MIXED)
    assert job is not None and (job.last_begins, device.next_end) == (8.0, 9.0)
    device.cut(at, under_way)
    assert (job.last_begins, device.next_end) == (times - 1, times)
    (result,) = device.poll(None)
    assert (result.repeats, result.seconds, device.clock()) == (times, times, times)
    assert len(result.sampled) == 2 and result.before == (() if times == 1 else ((0,) * (times - 1),) * 2)


@pytest.mark.parametrize(("at", "under_way"), [(0.5, False), (8.0, True), (8.5, True)])
def test_nothing_is_cut_where_nothing_has_ended_or_all_has_begun(setup: Make, at: float, under_way: bool) -> None:
    device = device_of(setup)
    device.submit(plan_of([5], repeats=9))
    device.cut(at, under_way)
    assert device.next_end == 9.0


def test_only_a_device_that_can_do_so_repeats(setup: Make) -> None:
    capacity = setup().capacity
    with pytest.raises(DeviceError, match="only a device that has one lane and computes no tokens"):
        VirtualDevice(capacity)
    with pytest.raises(DeviceError, match="only a device that has one lane and computes no tokens"):
        VirtualDevice(capacity, Partition(2, 2), lengths=True)


# -- the scheduler ---------------------------------------------------------------------------------------------------


class Steps:
    """A scheduler whose plans are answered by hand."""

    def __init__(self, setup: Make, caching: bool = False, **given: Any) -> None:
        self.capacity = setup(**{"blocks": 16, "block_size": 4, "max_model_len": 60, **given}).capacity
        settings = SchedulerSettings(max_num_seqs=4, enable_prefix_caching=caching)
        self.scheduler = Scheduler(self.capacity, (Lane.MIXED,), settings, key=b"k")
        self.drawn = 100

    def submit(self, name: str, prompt: int, most: int, *, told: bool = True, **params: Any) -> None:
        chosen = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": most, **params})
        self.scheduler.submit(Request(name, tuple(range(prompt)), chosen, told=told), 0.0)

    def plan(self) -> Plan:
        plan = self.scheduler.schedule(Lane.MIXED, 0.0)
        assert plan is not None
        return plan

    def plan_and_answer(self) -> int:
        plan = self.plan()
        self.answer(plan)
        return plan.repeats

    def answer(self, plan: Plan, times: int = 1, error: str | None = None) -> list[Event]:
        """Every token that is drawn is one more than the one before it."""
        found = []
        for _ in plan.slices:
            found.append(tuple(range(self.drawn, self.drawn + times)))
            self.drawn += times
        pairs = list(zip(plan.slices, found, strict=True))
        sampled = tuple(Sampled(one.sequence, tokens[-1]) for one, tokens in pairs if one.sample is not None)
        before = tuple(tokens[:-1] for _, tokens in pairs) if times > 1 else ()
        ticket = Ticket(plan.step, plan.lane)
        return self.scheduler.complete(Result(ticket, sampled, error=error, repeats=times, before=before), 1.0)


def test_all_tokens_are_told_in_order_and_the_last_time_ends(setup: Make) -> None:
    steps = Steps(setup)
    steps.submit("long", 6, 12)
    steps.submit("short", 3, 5)
    steps.answer(steps.plan())
    plan = steps.plan()
    assert plan.repeats == 4  # of block_size + 1 = 5 at most, and the short one has four tokens to go
    events = steps.answer(plan, 4)
    told = [one for one in events if isinstance(one, TokenOutput)]
    assert [one.token for one in told if one.request == "long"] == [102, 103, 104, 105]
    assert [(one.token, one.finish) for one in told if one.request == "short"] == [
        (106, None), (107, None), (108, None), (109, Finish.LENGTH),
    ]  # fmt: skip
    (end,) = [one for one in events if isinstance(one, RequestEnd)]
    assert (end.request, end.reason, end.generated_tokens) == ("short", Finish.LENGTH, 5)
    assert steps.scheduler.generation_tokens == 10
    after = steps.plan()
    (piece,) = after.slices
    assert (piece.start, piece.tokens, len(piece.blocks)) == (10, (105,), 3)
    steps.scheduler.pool.check()


@pytest.mark.parametrize("times", [1, 3])
def test_where_nobody_wants_the_tokens_only_the_first_one_is_told(setup: Make, times: int) -> None:
    """The others are told as always."""
    steps = Steps(setup)
    steps.submit("a", 4, 4, told=False)
    steps.submit("b", 4, 4)
    events = steps.answer(steps.plan())
    while steps.scheduler.live:
        events += steps.answer(steps.plan(), times)
    told = [one.request for one in events if isinstance(one, TokenOutput)]
    assert told == ["a", "b", "b", "b", "b"]
    assert [one.generated_tokens for one in events if isinstance(one, RequestEnd)] == [4, 4]


def test_an_aborted_request_that_nobody_is_told_of_only_ends(setup: Make) -> None:
    steps = Steps(setup)
    steps.submit("a", 4, 4, told=False)
    (end,) = steps.scheduler.abort("a", 1.0)
    assert isinstance(end, RequestEnd) and end.reason is Finish.ABORT


def test_where_blocks_run_out_it_is_planned_anew(setup: Make) -> None:
    """15 of 16 blocks go to prompts of 59 and 1 tokens, one to whoever needs it first."""
    steps = Steps(setup, max_model_len=64, max_num_batched_tokens=64)
    steps.submit("a", 50, 12)
    steps.submit("b", 2, 12)
    steps.answer(steps.plan())
    # 51 of 52 slots and 3 of 4 have tokens; 14 blocks are held.
    plan = steps.plan()
    assert steps.scheduler.pool.free == 2 and plan.repeats == 5
    steps.answer(plan, 5)  # 56 and 8 tokens: one block each
    plan = steps.plan()
    assert steps.scheduler.pool.free == 0 and plan.repeats == 1  # the next step needs blocks that are not there


@pytest.mark.parametrize("params", [{"logprobs": 1}, {"presence_penalty": 0.5}, {"stop_token_ids": (3,)}])
def test_what_may_end_at_any_time_is_planned_each_time(setup: Make, params: dict[str, Any]) -> None:
    steps = Steps(setup)
    steps.submit("a", 4, **{"most": 9, **params})
    steps.answer(steps.plan())
    assert steps.plan().repeats == 1


@pytest.mark.parametrize(("caching", "repeats"), [(False, 3), (True, 1)])
def test_somebody_who_waits_may_find_what_is_written_meanwhile(setup: Make, caching: bool, repeats: int) -> None:
    steps = Steps(setup, caching, max_model_len=60)
    steps.submit("a", 20, 40)
    steps.submit("b", 20, 4)
    steps.answer(steps.plan())
    steps.submit("c", 30, 4)
    plan = steps.plan()
    assert steps.scheduler.waiting == 1 and plan.repeats == repeats


def test_beside_a_prompt_there_is_one_step_at_a_time(setup: Make) -> None:
    steps = Steps(setup, max_num_batched_tokens=16)
    steps.submit("a", 4, 20)
    steps.answer(steps.plan())
    steps.submit("b", 40, 4)
    assert [steps.plan_and_answer() for _ in range(4)] == [1, 1, 1, 3]


def test_an_error_ends_all_that_were_in_it(setup: Make) -> None:
    steps = Steps(setup)
    steps.submit("a", 4, 9)
    steps.answer(steps.plan())
    events = steps.answer(steps.plan(), 3, error="broken")
    assert [one.reason for one in events if isinstance(one, RequestEnd)] == [Finish.ERROR]
    assert steps.scheduler.live == 0 and steps.scheduler.pool.held == 0


# -- processes -------------------------------------------------------------------------------------------------------


def test_what_ends_is_foretold_when_the_last_time_begins(setup: Make) -> None:
    part = Part({0: setup(cost=CostModel(fixed=1.0))})
    part.place(Placed(0, 0.0, 5, Size(20, 4), 4))
    assert part.advance(1.0) == [] and part.next_end == 4.0
    assert part.foretell(1.0) == part.foretell(2.999) == [] and part.next_begin == 3.0
    (ended,) = part.foretell(3.0)
    assert (ended.number, ended.at, part.next_begin) == (5, 4.0, math.inf)
    assert part.advance(9.0) == []


def test_who_looks_sees_all_that_has_ended(setup: Make) -> None:
    part = Part({0: setup(cost=CostModel(fixed=1.0))})
    part.place(Placed(0, 0.0, 5, Size(20, 9), 9))
    part.advance(1.0)
    (before,) = part.states(1.0)
    part.advance(4.5)
    (after,) = part.states(4.5)
    assert (before.tokens, before.lanes[0].steps) == (20, 1) and (after.tokens, after.lanes[0].steps) == (23, 4)
    (lost,) = part.fail([0], 6.0)
    assert (lost.number, lost.tokens, lost.first) == (5, 6, 1.0)


def test_who_came_after_a_step_had_begun_is_not_in_it_though_somebody_looks(setup: Make) -> None:
    part = Part({0: setup(cost=CostModel(fixed=1.0))})
    part.place(Placed(0, 0.0, 5, Size(20, 9), 9))
    part.advance(3.5)
    part.place(Placed(0, 3.5, 6, Size(20, 1), 1))
    (seen,) = part.states(3.7)
    assert (seen.running, seen.waiting, seen.tokens) == (1, 1, 22)
    assert part.next_end == 4.0
    (ended,) = part.advance(9.0)
    assert (ended.number, ended.at) == (6, 5.0)
