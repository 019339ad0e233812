"""The engine on simulated devices: in real time with threads, and by hand where the moment matters."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from weft.core.plan import Capacity, Lane, Partition, Plan, Result, Ticket
from weft.core.request import Event, Finish, PromptScores, Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices.simulated import Faults, ManualDevice, SimulatedDevice, continuation
from weft.errors import InvalidRequest, NeverFits, QueueFull, Unavailable
from weft.loop.engine import Engine, LaneMeter

VOCABULARY = 60
CAPACITY = Capacity(
    blocks=16, block_size=4, max_tokens=32, max_slices=8, shares=2, max_model_len=64, vocabulary=VOCABULARY
)
LANES = pytest.mark.parametrize("partition", [None, Partition(1, 1)], ids=["mixed", "split"])


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True)
class Heard:
    """What came out of an engine."""

    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    ends: dict[str, RequestEnd] = field(default_factory=dict)
    scores: dict[str, PromptScores] = field(default_factory=dict)

    def take(self, events: list[Event]) -> None:
        for event in events:
            assert event.request not in self.ends, "an event after the terminal one"
            if isinstance(event, RequestEnd):
                self.ends[event.request] = event
            elif isinstance(event, PromptScores):
                self.scores[event.request] = event
            elif event.token is not None:
                self.tokens.setdefault((event.request, event.index), []).append(event.token)

    def drain(self, engine: Engine) -> None:
        while not engine.idle:
            events = engine.step(20.0)
            self.take(events)


@pytest.fixture
def engines() -> Iterator[Any]:
    made: list[Engine] = []

    def make(
        device: Any = None, *, partition: Partition | None = None, faults: Faults | None = None, **given: Any
    ) -> Any:
        device = device or SimulatedDevice(CAPACITY, partition, faults=faults)
        names = {"clock", "step_timeout"}
        settings = {"max_num_seqs": 8, "max_num_batched_tokens": 32}
        settings |= {name: value for name, value in given.items() if name not in names}
        scheduler = Scheduler(device.capacity(), device.lanes(), SchedulerSettings(**settings))
        made.append(Engine(device, scheduler, **{name: given[name] for name in names & set(given)}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def ask(id: str, prompt: Any, **params: Any) -> Request:
    return Request(id, tuple(prompt), SamplingParams(**params))


def right(prompt: Any, count: int) -> list[int]:
    return list(continuation(tuple(prompt), count, VOCABULARY))


# -- serving ---------------------------------------------------------------------------------------------------------


@LANES
@pytest.mark.parametrize("caching", [True, False])
def test_every_answer_is_the_oracles_in_a_preemption_storm(engines: Any, partition: Any, caching: bool) -> None:
    engine = engines(partition=partition, enable_prefix_caching=caching)
    rng, wanted, aborted = random.Random(7), {}, set()
    heard = Heard()
    for number in range(60):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20))]
        prompt = [*range(rng.choice([0, 8, 12])), *prompt]
        n, count = rng.choice([1, 1, 3]), rng.randint(1, 25)
        engine.submit(ask(f"r{number}", prompt, n=n, max_tokens=count))
        wanted.update({(f"r{number}", index): right(prompt, count) for index in range(n)})
        if rng.random() < 0.2:
            aborted.add(f"r{number}")
    for number in range(60):
        heard.take(engine.step(20.0))
        if f"r{number}" in aborted:
            engine.abort(f"r{number}")
        engine._scheduler.pool.check()
    heard.drain(engine)
    assert len(heard.ends) == 60 and engine.stats().preemptions > 0
    for key, tokens in wanted.items():
        whole = heard.ends[key[0]].reason is Finish.LENGTH
        assert whole or key[0] in aborted
        got = heard.tokens.get(key, [])
        assert got == (tokens if whole else tokens[: len(got)])
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_held, stats.blocks_pinned) == (0, 0, 0, 0)
    assert stats.blocks_free + stats.blocks_cached == CAPACITY.blocks


@LANES
def test_stats_tell_what_the_lanes_did(engines: Any, partition: Any) -> None:
    engine, heard = engines(partition=partition), Heard()
    assert engine.idle and engine.stats().uptime >= 0
    for _ in range(2):
        engine.submit(ask("r", range(9), max_tokens=4))
        assert not engine.idle and engine.stats().waiting == 1
        heard.drain(engine)
        heard.ends.clear()
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.preemptions) == (18, 8, 0)
    assert (stats.prefix_queries, stats.prefix_hits) == (18, 8)
    lanes = {lane.lane: lane for lane in stats.lanes}
    assert set(lanes) == ({"mixed"} if partition is None else {"prefill", "decode"})
    assert sum(lane.steps for lane in stats.lanes) == 8 and sum(lane.tokens for lane in stats.lanes) == 9 + 1 + 6
    assert sum(lane.share for lane in stats.lanes) == 2 and all(lane.running == 0 for lane in stats.lanes)
    assert stats.step_sizes == (7, 0, 1, *[0] * 11), "seven of one token, and one of nine, which are at most 16"


@pytest.mark.parametrize(("tokens", "place"), [(1, 0), (2, 1), (8, 1), (9, 2), (16384, 12), (16385, 13)])
def test_a_step_counts_where_the_bound_is_the_least_that_it_does_not_exceed(tokens: int, place: int) -> None:
    meter = LaneMeter()
    meter.count(tokens, 3)
    assert meter.tokens == 3 * tokens and [index for index, steps in enumerate(meter.sizes) if steps == 3] == [place]


def test_requests_that_cannot_be_served_are_refused_and_the_engine_goes_on(engines: Any) -> None:
    engine, heard = engines(max_num_queued_reqs=1), Heard()
    for error, prompt in ((InvalidRequest, ()), (InvalidRequest, (VOCABULARY,)), (NeverFits, [1] * 63)):
        if error is NeverFits:
            prompt = [1] * 63
            engine = engines(SimulatedDevice(Capacity(4, 4, 32, 8, 1, 64, VOCABULARY)), max_num_queued_reqs=1)
        with pytest.raises(error):
            engine.submit(ask("r", prompt))
    engine.submit(ask("a", [1], max_tokens=2))
    with pytest.raises(QueueFull):
        engine.submit(ask("b", [1]))
    heard.drain(engine)
    assert heard.tokens["a", 0] == right([1], 2)


def test_a_prompts_scores_come_with_its_first_token(engines: Any) -> None:
    engine, heard = engines(), Heard()
    engine.submit(ask("r", range(40), max_tokens=1, prompt_logprobs=1))
    heard.drain(engine)
    assert [score.token for score in heard.scores["r"].scores] == list(range(1, 40))


def test_an_abort_is_told_by_the_next_step_even_when_nothing_else_happens(engines: Any) -> None:
    engine = engines(faults=Faults(lost=frozenset({1})))
    engine.submit(ask("r", [1], max_tokens=9))
    assert engine.step(0.0) == []
    engine.abort("r")
    engine.abort("nobody")
    assert not engine.idle
    output, end = engine.step(None)
    assert isinstance(output, TokenOutput) and isinstance(end, RequestEnd) and end.reason is Finish.ABORT
    assert engine.stats().blocks_pinned == 1, "the step is still in flight"


def test_a_wake_from_another_thread_ends_a_step_that_waits(engines: Any) -> None:
    engine = engines()
    timer = threading.Timer(0.05, engine.wake)
    timer.start()
    assert engine.step(None) == []
    timer.join()
    engine.wake()
    assert engine.step(None) == []
    assert engine.step(0.01) == []


def test_the_device_works_while_the_caller_deals_with_events(engines: Any) -> None:
    device = ManualDevice(CAPACITY)
    engine = engines(device)
    engine.submit(ask("r", [1], max_tokens=3))
    assert engine.step(0.0) == [] and device.run(Lane.MIXED)
    assert len(engine.step(None)) == 1
    assert len(device.submitted[Lane.MIXED]) == 1, "the next plan is there before the events are"


def test_what_a_stop_string_ends_is_computed_no_further(engines: Any) -> None:
    engine, heard = engines(), Heard()
    engine.submit(ask("r", [1], n=3, max_tokens=40))
    while len(heard.tokens.get(("r", 1), [])) < 5:
        heard.take(engine.step(20.0))
    engine.stop("r", 1)
    engine.stop("nobody", 0)
    heard.drain(engine)
    counts = [len(heard.tokens["r", index]) for index in range(3)]
    assert counts[0] == counts[2] == 40 and 5 <= counts[1] < 8
    assert engine.stats().generation_tokens in (sum(counts), sum(counts) + 1)  # one that was under way


def test_every_end_is_one_line_in_the_log(engines: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine, heard = engines(faults=Faults(failed=frozenset({3}))), Heard()
    with caplog.at_level(logging.INFO, "weft.engine"):
        for name in ("done", "aborted", "failed"):
            engine.submit(ask(name, range(6), max_tokens=2))
            if name == "aborted":
                engine.abort(name)
            heard.drain(engine)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert [line.split(" ended: ")[0] for line in lines] == ["request done", "request aborted", "request failed"]
    assert "length, prompt 6 tokens (0 cached), generated 2, " in lines[0] and "0 preemptions" in lines[0]
    assert "abort, " in lines[1] and "error, prompt 6 tokens (4 cached)" in lines[2] and "step_failed" in lines[2]


def test_close_is_idempotent_and_final(engines: Any) -> None:
    engine = engines()
    engine.close()
    engine.close()
    with pytest.raises(Unavailable, match="closed"):
        engine.submit(ask("r", [1]))
    assert engine.step(None) == []


# -- faults ----------------------------------------------------------------------------------------------------------


@LANES
def test_a_failed_step_ends_its_requests_and_the_next_ones_are_served(engines: Any, partition: Any) -> None:
    engine, heard = engines(partition=partition, faults=Faults(failed=frozenset({1}))), Heard()
    engine.submit(ask("bad", range(9), max_tokens=3))
    engine.step(20.0)
    engine.submit(ask("good", range(9), max_tokens=3))
    heard.drain(engine)
    assert heard.tokens["good", 0] == right(range(9), 3)


def test_nan_in_one_slice_ends_one_request(engines: Any) -> None:
    engine, heard = engines(faults=Faults(nan=frozenset({(2, 0)}))), Heard()
    engine.submit(ask("bad", [1], max_tokens=3))
    engine.submit(ask("good", [2], max_tokens=3))
    heard.drain(engine)
    assert heard.ends["bad"].code == "step_failed" and "NaN" in (heard.ends["bad"].error or "")
    assert heard.tokens["good", 0] == right([2], 3)


@LANES
def test_a_dead_device_ends_everything_and_later_requests_are_refused(engines: Any, partition: Any) -> None:
    engine, heard = engines(partition=partition, faults=Faults(dead=3), max_num_seqs=2), Heard()
    for number in range(5):
        engine.submit(ask(f"r{number}", [number], max_tokens=9))
    heard.drain(engine)
    assert set(heard.ends) == {f"r{number}" for number in range(5)}
    assert {end.reason for end in heard.ends.values()} == {Finish.ERROR}
    assert {end.code for end in heard.ends.values()} <= {"step_failed", "unavailable"}
    assert engine.dead is not None and "died at step 3" in engine.dead
    with pytest.raises(Unavailable, match="died at step 3"):
        engine.submit(ask("late", [1]))
    assert engine.idle and engine.step(None) == []


def test_a_lost_step_gets_its_requests_an_error_and_a_late_result_frees_the_lane(
    engines: Any, caplog: pytest.LogCaptureFixture
) -> None:
    clock, device = Clock(), ManualDevice(CAPACITY)
    engine, heard = engines(device, clock=clock, step_timeout=5.0), Heard()
    engine.submit(ask("lost", range(9), max_tokens=3))
    heard.take(engine.step(0.0))
    clock.now += 4.9
    engine.submit(ask("next", [1], max_tokens=2))
    heard.take(engine.step(None))
    assert not heard.ends
    clock.now += 0.2
    heard.take(engine.step(None))
    assert heard.ends["lost"].code == "step_failed"
    assert heard.ends["lost"].error == "step 1 of lane mixed did not end within 5 s"
    assert "test_engine.py" in caplog.text, "the log says where the threads are"
    clock.now += 4.0
    device.run(Lane.MIXED)
    for _ in range(2):
        heard.take(engine.step(0.0))
        device.run(Lane.MIXED)
    heard.take(engine.step(0.0))
    assert heard.tokens["next", 0] == right([1], 2) and engine.dead is None and engine.idle


def test_a_step_that_never_ends_kills_the_device_not_the_caller(engines: Any) -> None:
    engine, heard = engines(faults=Faults(lost=frozenset({2})), step_timeout=0.05), Heard()
    engine.submit(ask("lost", [1], max_tokens=3))
    while "lost" not in heard.ends:
        heard.take(engine.step(20.0))
    assert heard.ends["lost"].code == "step_failed"
    engine.submit(ask("behind it", [1], max_tokens=3))
    heard.drain(engine)
    assert heard.ends["behind it"].code == "unavailable"
    assert engine.dead == "step 2 of lane mixed did not end within 0.05 s, nor within as much again"


def test_a_result_that_comes_twice_is_refused_and_logged(engines: Any, caplog: pytest.LogCaptureFixture) -> None:
    device = ManualDevice(CAPACITY)
    engine, heard = engines(device), Heard()
    engine.submit(ask("r", [1], max_tokens=2))
    engine.step(0.0)
    for _ in range(2):
        device.run(Lane.MIXED)
        device.finished *= 2
        device.finished.append(Result(Ticket(99, Lane.DECODE)))
        heard.take(engine.step(0.0))
    assert heard.tokens["r", 0] == right([1], 2) and engine.idle
    assert caplog.text.count("a result was refused") == 4
    assert engine.stats().lanes[0].steps == 2


def test_a_plan_that_the_device_cannot_take_ends_its_requests_not_the_engine(engines: Any) -> None:
    class Picky(ManualDevice):
        def submit(self, plan: Plan) -> Ticket:
            if plan.step == 1:
                raise ValueError("no such thing")
            return super().submit(plan)

    device = Picky(CAPACITY)
    engine, heard = engines(device), Heard()
    engine.submit(ask("bad", [1], max_tokens=1))
    heard.take(engine.step(0.0))
    assert heard.ends["bad"].code == "step_failed" and "no such thing" in (heard.ends["bad"].error or "")
    engine.submit(ask("good", [1], max_tokens=1))
    engine.step(0.0)
    device.run(Lane.MIXED)
    heard.take(engine.step(0.0))
    assert heard.tokens["good", 0] == right([1], 1)


@pytest.mark.parametrize("where", ["schedule", "complete", "count"])
def test_an_error_of_ours_costs_the_live_requests_and_the_engine_goes_on(
    engines: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, heard = engines(), Heard()
    scheduler = engine._scheduler
    engine.submit(ask("unlucky", range(9), max_tokens=30))
    heard.take(engine.step(20.0))
    if where == "count":
        scheduler.pool._free.pop()
    else:
        original = scheduler.complete if where == "complete" else scheduler.schedule

        def broken(*given: Any) -> Any:
            monkeypatch.setattr(scheduler, where, original)
            raise KeyError("a bug")

        monkeypatch.setattr(scheduler, where, broken)
    heard.drain(engine)
    assert heard.ends["unlucky"].code == "step_failed" and "internal error" in (heard.ends["unlucky"].error or "")
    scheduler.pool.check()
    for number in range(3):
        engine.submit(ask(f"r{number}", range(9), max_tokens=5))
    heard.drain(engine)
    assert [heard.tokens[f"r{number}", 0] for number in range(3)] == [right(range(9), 5)] * 3
    assert engine.dead is None and engine.stats().blocks_free + engine.stats().blocks_cached == CAPACITY.blocks
