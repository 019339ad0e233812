"""The scheduler on a simulated device, driven at random by hypothesis: every rule of the design, after every move.

What is right is told by an auditor that sees only plans, results and events, and by the device's oracle. The second
half of the file breaks the scheduler on purpose, and the machine has to notice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from weft.core.inflight import UnknownTicket
from weft.core.plan import Capacity, Lane, Partition, Plan, Regime, Result, Sharing, Slice, TokenScore
from weft.core.request import Event, Finish, PromptScores, Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.core.sequence import State
from weft.devices.simulated import ManualDevice, oracle
from weft.errors import ContextTooLong, NeverFits, QueueFull

VOCABULARY = 11
QUEUE = 6
LONGEST = 40
SHARED = ((1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 9, 9, 9, 9), ())
MIXED, SPLIT = (Lane.MIXED,), (Lane.PREFILL, Lane.DECODE)


FAULTS = st.sampled_from([None] * 16 + ["step", "slice", "empty"])


def asked(
    shared: tuple[int, ...], own: list[int], most: int | None, least: int, n: int, stops: list[int], **other: Any
) -> tuple[tuple[int, ...], SamplingParams]:
    """A prompt and its parameters; a few prompts are asked for again and again."""
    least = least if most is None else min(least, most)
    params = SamplingParams(max_tokens=most, min_tokens=least, n=n, stop_token_ids=tuple(stops), **other)
    return (*shared, *own) or (0,), params


SHARINGS = st.builds(
    Sharing,
    st.sampled_from(Regime),
    st.builds(Partition, st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([None, 1, 3, 8]),
    st.sampled_from([0.0, 0.5]),
)

# prompt, parameters, priority, salt
ASKED = st.tuples(
    st.builds(
        asked,
        st.sampled_from(SHARED),
        st.lists(st.integers(0, VOCABULARY - 1), max_size=8) | st.sampled_from([[], [1], [7, 7, 7, 7, 7]]),
        st.none() | st.integers(1, 30),
        st.integers(0, 3),
        st.sampled_from([1, 1, 1, 2, 3]),
        st.lists(st.integers(0, VOCABULARY - 1), max_size=1),
        ignore_eos=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, None, 2]),
    ),
    st.integers(-1, 1),
    st.sampled_from(["", "", "other"]),
).map(lambda drawn: (*drawn[0], *drawn[1:]))


@dataclass(slots=True)
class Claim:
    """What an in-flight plan names and writes, slice by slice."""

    plan: Plan
    named: list[set[int]] = field(default_factory=list)


class Auditor:
    """Watches the blocks from outside: it knows plans and which of them completed, and nothing of the scheduler."""

    def __init__(self, capacity: Capacity, settings: SchedulerSettings) -> None:
        self.capacity = capacity
        self.settings = settings
        self.claims: dict[Lane, Claim] = {}
        self.paused: dict[Lane, Claim] = {}  # between two parts of a step
        self.writer: dict[tuple[int, int], int] = {}
        self.good: set[int] = set()
        self.steps: set[int] = set()
        self.strict = True  # the decode lane decodes, and nothing else
        self.dropped: set[int] = set()  # sequences whose result in flight nobody wants any more

    def submitted(self, plan: Plan) -> None:
        assert plan.lane not in self.claims, "two tickets of one lane in flight"
        before = self.paused.pop(plan.lane, None)
        if plan.part:
            assert before is not None and plan == replace(before.plan, step=plan.step, part=before.plan.part + 1)
            self._untouched(before.plan)
        assert plan.parts <= self.capacity.layers and (plan.parts == 1 or plan.lane is Lane.PREFILL)
        assert plan.step not in self.steps and plan.step > max(self.steps, default=0), "step numbers must grow"
        assert plan.tokens <= self.settings.max_num_batched_tokens
        assert len(plan.slices) <= min(self.settings.max_num_seqs, self.capacity.max_slices)
        assert len({piece.sequence for piece in plan.slices}) == len(plan.slices), "a sequence is twice in a plan"
        for other in self.claims.values():
            shared = {piece.sequence for piece in plan.slices} & {piece.sequence for piece in other.plan.slices}
            assert not shared - self.dropped, "a sequence is computed by two lanes at once"
        self.steps.add(plan.step)
        size = self.capacity.block_size
        claim = Claim(plan, [{*piece.blocks, *piece.source} for piece in plan.slices])
        for index, piece in enumerate(plan.slices):
            assert piece.tokens, "an empty slice"
            table = (*piece.blocks, *piece.source)
            assert len(claim.named[index]) == len(table), "a block is twice in a table"
            assert all(0 <= block < self.capacity.blocks for block in table)
            assert piece.end <= len(piece.blocks) * size, "the block table is too short"
            if plan.lane is Lane.DECODE and self.strict:
                assert len(piece.tokens) == 1 and piece.sample is not None
            if piece.sample is not None:
                assert piece.sample.position == piece.end
            written = {piece.blocks[position // size] for position in range(piece.start, piece.end)}
            self._copied(plan, piece)
            others = [named for i, named in enumerate(claim.named) if i != index]
            others += [named for other in self.claims.values() for named in other.named]
            for named in others:
                assert not written & named, "a block is written that another slice in flight names"
            for position in range(piece.start):
                slot = ((piece.source or piece.blocks)[position // size], position % size)
                assert self.writer.get(slot) in self.good, "a slot is read whose writing ticket is not complete"
        for piece in plan.slices:
            for position in range(0 if piece.source else piece.start, piece.end):
                self.writer[piece.blocks[position // size], position % size] = plan.step
        self.claims[plan.lane] = claim

    def _copied(self, plan: Plan, piece: Slice) -> None:
        """Where each phase has a pool: prompts are computed in the one, decode in the other, and a slice that begins to
        decode copies what is there from the one to the other."""
        border = self.capacity.blocks - self.capacity.decode_blocks
        decoding = len(piece.tokens) == 1 and self.capacity.decode_blocks > 0 and piece.blocks[0] >= border
        assert len({block < border for block in piece.blocks}) == 1, "a table is in both pools"
        if self.capacity.decode_blocks and plan.lane is Lane.PREFILL and self.strict:
            assert not decoding
        if self.capacity.decode_blocks and plan.lane is Lane.DECODE and self.strict:
            assert decoding
        if piece.source:
            assert decoding and all(block < border for block in piece.source)
            assert len(piece.source) == -(-piece.start // self.capacity.block_size)

    def _untouched(self, plan: Plan) -> None:
        """Nobody has written to the blocks of a step between two of its parts."""
        size = self.capacity.block_size
        for piece in plan.slices:
            for position in range(piece.start, piece.end):
                assert self.writer[piece.blocks[position // size], position % size] == plan.step

    def completed(self, result: Result) -> None:
        claim = self.claims.pop(result.ticket.lane)
        if result.error is None and claim.plan.last:
            self.good.add(result.ticket.step)
        elif result.error is None:
            self.paused[result.ticket.lane] = claim


@dataclass(slots=True)
class Story:
    """What a client has been told of its request."""

    request: Request
    tokens: dict[int, list[int]]
    finish: dict[int, Finish] = field(default_factory=dict)
    scores: tuple[TokenScore, ...] | None = None
    end: RequestEnd | None = None
    aborted: bool = False
    stopped: set[int] = field(default_factory=set)  # sequences whose text was said to hold a stop string
    harmed: bool = False  # by a fault that the test made

    @property
    def speaking(self) -> list[int]:
        """Sequences that have text and have not ended."""
        return [index for index in self.tokens if index not in self.finish]


def expected(request: Request, blocks: int, block_size: int) -> tuple[list[int], Finish]:
    """A sequence's tokens and how it ends, by the rules alone: no blocks, no batches, no schedule."""
    params, tokens, out = request.params, list(request.prompt), []
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(request.eos))
    while True:
        token = oracle(tokens, VOCABULARY, stops if len(out) < params.min_tokens else ())
        tokens.append(token)
        out.append(token)
        if token in stops:
            return out, Finish.STOP
        if len(out) == params.max_tokens or len(tokens) == LONGEST:
            return out, Finish.LENGTH
        if len(tokens) > blocks * block_size:
            return out, Finish.ERROR


class SchedulerMachine(RuleBasedStateMachine):
    break_it: Callable[[Scheduler], None] | None = None
    # What every run of a broken scheduler begins with, for those that are rarely noticed otherwise.
    handed = False

    @initialize(
        lanes=st.sampled_from([MIXED, SPLIT]),
        caching=st.sampled_from([True, True, False]),
        blocks=st.integers(3, 24),
        block_size=st.sampled_from([2, 4]),
        seats=st.integers(1, 6),
        budget=st.integers(6, 24),
        slow=st.integers(1, 4),
        layers=st.sampled_from([1, 2, 5]),
        turns=st.booleans(),
        apart=st.booleans(),
    )
    def open(
        self,
        lanes: Any,
        caching: bool,
        blocks: int,
        block_size: int,
        seats: int,
        budget: int,
        slow: int,
        layers: int,
        turns: bool,
        apart: bool,
    ) -> None:
        if self.handed:
            lanes, apart = SPLIT, True
        decode = 0
        if apart and lanes == SPLIT and (self.handed or self.break_it is None):
            least = -(-LONGEST // block_size)
            decode = least + blocks % 5
            blocks = decode + least + blocks // 5
        capacity = Capacity(blocks, block_size, 64, 64, 2, LONGEST, VOCABULARY, layers, decode_blocks=decode)
        self.lanes, self.blocks, self.block_size, self.slow = lanes, blocks, block_size, slow
        self.rounds = 0
        given = SchedulerSettings(seats, budget, max_num_queued_reqs=QUEUE, enable_prefix_caching=caching)
        self.scheduler = Scheduler(capacity, lanes, given, key=b"k" * 16)
        if self.break_it is not None:
            type(self).break_it(self.scheduler)
        self.device = ManualDevice(capacity, lanes)
        self.auditor = Auditor(capacity, given)
        self.ready: dict[Lane, Result] = {}
        self.stories: dict[str, Story] = {}
        self.now = 0.0
        self.number = 0
        self.sharing: Sharing | None = None
        self.retired: set[Lane] = set()
        self.last: Result | None = None
        if turns and lanes == SPLIT:
            self.share(Sharing(Regime.TURNS, Partition(1, 1), chunk=2))

    # -- moves ---------------------------------------------------------------------------------------------------

    @rule(asked=st.lists(ASKED, min_size=1, max_size=4))
    def submit(self, asked: list[tuple[Any, ...]]) -> None:
        for prompt, params, priority, salt in asked:
            self.number += 1
            request = Request(f"r{self.number}", prompt, params, (10,), priority, salt)
            waiting = sum(story.end is None and not story.tokens for story in self.stories.values())
            try:
                self.scheduler.submit(request, self.now)
            except NeverFits:
                assert len(prompt) + 1 > self.blocks * self.block_size
            except ContextTooLong:
                assert len(prompt) + 1 > LONGEST
            except QueueFull as error:
                assert waiting >= QUEUE and error.retry_after >= 1
            else:
                assert len(prompt) + 1 <= self.blocks * self.block_size
                self.stories[request.id] = Story(request, {})

    @rule(data=st.data())
    def schedule(self, data: st.DataObject) -> None:
        lane = data.draw(st.sampled_from(self.lanes))
        self._schedule(lane)

    @rule(data=st.data())
    def execute(self, data: st.DataObject) -> None:
        self._execute(data.draw(st.sampled_from(self.lanes)))

    @rule(data=st.data(), fault=FAULTS)
    @precondition(lambda self: bool(self.ready))
    def deliver(self, data: st.DataObject, fault: str | None) -> None:
        lane = data.draw(st.sampled_from(sorted(self.ready)))
        self._deliver(lane, fault)

    @rule(rounds=st.lists(FAULTS, min_size=1, max_size=6))
    def go_on(self, rounds: list[str | None]) -> None:
        for fault in rounds:
            self._round(fault)

    @rule(data=st.data())
    def go_on_raggedly(self, data: st.DataObject) -> None:
        """Lanes that start, run and land at different times."""
        for _ in range(6):
            lane = data.draw(st.sampled_from(self.lanes))
            if lane in self.ready:
                self._deliver(lane, None)
            elif self.device.submitted[lane]:
                self._execute(lane)
            else:
                self._schedule(lane)

    @rule(data=st.data())
    @precondition(lambda self: any(story.end is None for story in self.stories.values()))
    def abort(self, data: st.DataObject) -> None:
        story = data.draw(st.sampled_from([story for story in self.stories.values() if story.end is None]))
        story.aborted = True
        self._hear(self.scheduler.abort(story.request.id, self.now))
        assert story.end is not None and story.end.reason is Finish.ABORT, "an abort ends a request at once"
        assert self.scheduler.abort(story.request.id, self.now) == []

    @rule(data=st.data())
    @precondition(lambda self: any(story.speaking for story in self.stories.values()))
    def stop(self, data: st.DataObject) -> None:
        """A stop string in the text of one sequence: it ends at once, and the others of its request go on."""
        story = data.draw(st.sampled_from([story for story in self.stories.values() if story.speaking]))
        index = data.draw(st.sampled_from(story.speaking))
        story.stopped.add(index)
        before = set(story.finish)
        self._hear(self.scheduler.stop(story.request.id, index, self.now))
        assert set(story.finish) == before | {index} and story.finish[index] is Finish.STOP
        assert (story.end is not None) == (len(story.finish) == story.request.params.n)
        assert self.scheduler.stop(story.request.id, index, self.now) == []

    @rule(data=st.data())
    @precondition(lambda self: any(story.end is None for story in self.stories.values()))
    def preempt(self, data: st.DataObject) -> None:
        story = data.draw(st.sampled_from([story for story in self.stories.values() if story.end is None]))
        self.scheduler.preempt(story.request.id)

    @rule(data=st.data(), abort=st.booleans())
    @precondition(lambda self: any(flight.paused for flight in self.scheduler.inflight))
    def interrupt(self, data: st.DataObject, abort: bool) -> None:
        """Somebody leaves a step between two of its parts."""
        (flight,) = [flight for flight in self.scheduler.inflight if flight.paused]
        _, sequence = data.draw(st.sampled_from(flight.wanted))
        story = self.stories[sequence.live.request.id]
        if abort:
            story.aborted = True
            self._hear(self.scheduler.abort(story.request.id, self.now))
        else:
            assert self.scheduler.preempt(story.request.id)

    @rule(data=st.data())
    @precondition(lambda self: bool(self.auditor.claims))
    def lose(self, data: st.DataObject) -> None:
        """The engine gives up on a step; its result comes later all the same."""
        lane = data.draw(st.sampled_from(sorted(self.auditor.claims)))
        for sequence in self._members(lane):
            self.stories[sequence.live.request.id].harmed = True
        self._hear(self.scheduler.lose(self.auditor.claims[lane].plan.step, "it hangs", self.now))
        assert not self._members(lane), "nobody waits for a lost step"

    @rule(sharing=SHARINGS)
    @precondition(lambda self: self.lanes == SPLIT)
    def share(self, sharing: Sharing) -> None:
        """Another regime, whatever is in flight: in the middle of prompts, and of decode steps."""
        self.scheduler.share(sharing)
        self.sharing = sharing

    @rule(data=st.data())
    @precondition(lambda self: self.lanes == SPLIT and bool(self.auditor.claims) and not self.retired)
    def retire(self, data: st.DataObject) -> None:
        """A lane answers no more, until its result comes all the same: the other one does the work of both."""
        lane = data.draw(st.sampled_from(sorted(self.auditor.claims)))
        for sequence in self._members(lane):
            self.stories[sequence.live.request.id].harmed = True
        self._hear(self.scheduler.lose(self.auditor.claims[lane].plan.step, "it hangs", self.now))
        assert self.scheduler.retire(lane)
        self.retired.add(lane)

    @rule(data=st.data())
    @precondition(lambda self: self.lanes == SPLIT and bool(self.auditor.claims) and not self.retired)
    def end_lane(self, data: st.DataObject) -> None:
        """A lane's thread ends: its step fails, and it gets no other one for good."""
        lane = data.draw(st.sampled_from(sorted(self.auditor.claims)))
        if lane not in self.ready:
            self._execute(lane)
        self._deliver(lane, "step")
        assert self.scheduler.retire(lane)
        self.retired.add(lane)

    @rule(seconds=st.floats(0.0, 30.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    @precondition(lambda self: self.last is not None)
    def deliver_twice(self) -> None:
        assert self.last is not None
        with pytest.raises(UnknownTicket):
            self.scheduler.complete(self.last, self.now)

    # -- laws ----------------------------------------------------------------------------------------------------

    @invariant()
    def blocks_are_conserved(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        pool, running = self.scheduler.pool, self.scheduler.running
        pool.check()
        tables = [one.table for line in (running.waiting, running.prefilling, running.decoding) for one in line]
        held = {block for table in tables for block in table}
        assert pool.held == len(held), "held blocks are those of the live sequences"
        assert not any(one.table for one in running.waiting)
        left = {block for flight in running.inflight for table in flight.orphans for block in table}
        assert pool.pinned == len(left - held), "pinned blocks are those left to tickets"

    def teardown(self) -> None:
        """Everything that was accepted ends, and every block comes back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.scheduler.live and not self.scheduler.inflight:
                break
            moved = self._round()
            assert moved or not self.scheduler.live, "requests are live, nothing is in flight, nothing is scheduled"
        assert all(story.end is not None for story in self.stories.values()), "a request never ends"
        pool = self.scheduler.pool
        pool.check()
        assert (pool.held, pool.pinned, pool.available + pool.decode_available) == (0, 0, self.blocks)
        assert self.scheduler.waiting == 0 and self.scheduler.admission.queued == 0
        assert self.scheduler.admission.queued_tokens == 0

    # -- how the moves are made ----------------------------------------------------------------------------------

    def _round(self, fault: str | None = None) -> bool:
        """What the engine does: decode first, results as they come. Whether anything was in flight."""
        for lane in self.scheduler.order():
            self._schedule(lane)
        moved = len(self.scheduler.inflight) > 0
        self.rounds += 1
        for lane in self.lanes:
            # The steps of the prefill lane take several of the decode lane's.
            if lane is Lane.PREFILL and self.rounds % self.slow:
                continue
            self._execute(lane)
            if lane in self.ready:
                self._deliver(lane, fault)
        self.now += 0.01
        return moved

    def _schedule(self, lane: Lane) -> None:
        self.auditor.dropped = self._dropped()
        plan = self.scheduler.schedule(lane, self.now)
        if plan is not None:
            assert plan.lane is lane and lane not in self.retired
            regime = None if self.sharing is None else self.sharing.regime
            if not self.retired:
                assert regime is not Regime.MIXED or lane is Lane.DECODE or plan.part
                busy = [claim for other, claim in self.auditor.claims.items() if other is not lane]
                assert regime is not Regime.TURNS or not busy or self.loose, "two lanes at once, and they take turns"
            self.auditor.strict = regime is not Regime.MIXED and not self.retired
            self.auditor.submitted(plan)
            self.device.submit(plan)

    def _execute(self, lane: Lane) -> None:
        if self.device.run(lane):
            (result,) = self.device.poll(0.0)
            self.ready[lane] = result

    def _deliver(self, lane: Lane, fault: str | None) -> None:
        result = self.ready.pop(lane)
        plan = self.auditor.claims[lane].plan
        harmed = [piece.sequence for piece in plan.slices] if fault == "step" else [plan.slices[0].sequence]
        if fault == "step":
            result = replace(result, error="the step failed")
        elif fault == "slice":
            result = replace(result, failed=((harmed[0], "NaN"),))
        elif fault == "empty" and plan.slices[0].sample is not None and plan.last:
            result = replace(result, sampled=result.sampled[1:])
        else:
            harmed = []
        for sequence in self._members(lane):
            if sequence.id in harmed:
                self.stories[sequence.live.request.id].harmed = True
        self.auditor.completed(result)
        self.retired.discard(lane)
        result = replace(result, seconds=(0.0, 0.001, 0.3)[plan.step % 3] * (1 + 9 * (lane is Lane.PREFILL)))
        self.last = result
        self._hear(self.scheduler.complete(result, self.now))

    @property
    def loose(self) -> bool:
        """Whether a ticket in flight was given up, so that nobody waits for its turn to end."""
        return any(flight.lost for flight in self.scheduler.inflight)

    def _dropped(self) -> set[int]:
        members = [(flight, one) for flight in self.scheduler.inflight for one in flight.members]
        return {one.id for flight, one in members if one.flight is not flight}

    def _members(self, lane: Lane) -> list[Any]:
        """The sequences that still want the lane's result: others were preempted, or have ended."""
        (flight,) = [flight for flight in self.scheduler.inflight if flight.plan.lane is lane]
        return [one for one in flight.members if one.flight is flight]

    # -- what the client hears ------------------------------------------------------------------------------------

    def _hear(self, events: list[Event]) -> None:
        for event in events:
            story = self.stories[event.request]
            assert story.end is None, "an event after the terminal one"
            if isinstance(event, TokenOutput):
                self._hear_token(story, event)
            elif isinstance(event, PromptScores):
                assert story.scores is None and not story.tokens
                story.scores = event.scores
            else:
                story.end = event
                self._check_end(story, event)

    def _hear_token(self, story: Story, event: TokenOutput) -> None:
        assert event.index not in story.finish, "a token after the sequence's finish"
        assert 0 <= event.index < story.request.params.n
        if event.token is not None:
            story.tokens.setdefault(event.index, []).append(event.token)
        if event.finish is not None:
            story.finish[event.index] = event.finish
        by_token = event.finish is Finish.STOP and event.index not in story.stopped
        assert (event.stop_token is not None) == by_token

    def _check_end(self, story: Story, end: RequestEnd) -> None:
        request = story.request
        assert set(story.finish) == set(range(request.params.n)), "not every sequence has finished"
        assert end.generated_tokens == sum(map(len, story.tokens.values()))
        assert end.prompt_tokens == len(request.prompt)
        tokens, finish = expected(request, self.blocks, self.block_size)
        for index in range(request.params.n):
            got = story.tokens.get(index, [])
            if story.finish[index] in (Finish.STOP, Finish.LENGTH) and index not in story.stopped:
                assert (got, story.finish[index]) == (tokens, finish)
            else:
                assert got == tokens[: len(got)]
        if end.reason is Finish.ERROR:
            assert end.error
            assert story.harmed if end.code == "step_failed" else finish is Finish.ERROR
            assert end.code in ("step_failed", "request_too_large")
        elif end.reason is Finish.ABORT:
            assert story.aborted
        else:
            assert (end.reason, end.error) == (Finish.STOP if 0 in story.stopped else finish, None)
            assert not story.harmed
            self._check_scores(story)

    def _check_scores(self, story: Story) -> None:
        prompt = story.request.prompt
        if story.request.params.prompt_logprobs is None:
            assert story.scores is None
            return
        assert story.scores is not None
        assert [score.token for score in story.scores] == list(prompt[1:])
        ranks = [(prompt[i] - oracle(prompt[:i], VOCABULARY)) % VOCABULARY + 1 for i in range(1, len(prompt))]
        assert [score.rank for score in story.scores] == ranks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


# -- schedulers that are wrong -------------------------------------------------------------------------------------


def frees_at_once(scheduler: Scheduler) -> None:
    """Rule 2 broken: a block goes back to the pool while a ticket names it."""

    def leave(sequence: Any) -> None:
        sequence.flight = None

    scheduler.inflight.leave = leave  # type: ignore[method-assign]


def publishes_at_the_start(scheduler: Scheduler) -> None:
    """Rule 1 broken: the prefix cache offers blocks that nothing has been written to."""
    running = scheduler.running
    start = running.start

    def early(sequence: Any, *steps: Any) -> bool:
        started = start(sequence, *steps)
        if started:
            computed, sequence.computed = sequence.computed, len(sequence.tokens)
            running.publish(sequence)
            sequence.computed = computed
        return started

    running.start = early  # type: ignore[method-assign]


def forgets_nothing(scheduler: Scheduler) -> None:
    """An evicted block can still be found."""
    scheduler.running.prefix.forget = lambda block: None  # type: ignore[method-assign]
    scheduler.pool._forget = lambda block: None


def believes_stale_results(scheduler: Scheduler) -> None:
    """A result counts although its sequence was preempted in the meantime."""
    inflight = scheduler.inflight
    land = inflight.land

    def all_members(ticket: Any) -> Any:
        flight = next((one for one in inflight if one.plan.step == ticket.step), None)
        land(ticket)
        assert flight is not None
        every = zip(flight.plan.slices, flight.members, strict=True)
        return [(piece, one) for piece, one in every if one.state is not State.ENDED]

    def careful(ticket: Any) -> Any:
        return all_members(ticket) if any(one.plan.step == ticket.step for one in inflight) else land(ticket)

    inflight.land = careful  # type: ignore[method-assign]


def hits_the_last_token(scheduler: Scheduler) -> None:
    """A hit covers the whole sequence, so that nothing is left to compute."""
    prefix = scheduler.running.prefix
    match = prefix.match
    prefix.match = lambda digests, tokens: match(digests, [*tokens, 0])  # type: ignore[method-assign]


def hands_over_and_forgets(scheduler: Scheduler) -> None:
    """Rule 2 broken: the blocks that a step copies from are nobody's before it has copied them."""
    inflight = scheduler.inflight
    launch = inflight.launch

    def careless(plan: Plan, members: Any, left: Any = None) -> None:
        for table in left or ():
            scheduler.pool.unpin(table)
        launch(plan, members)

    inflight.launch = careless  # type: ignore[method-assign]


def hands_over_what_is_not_there(scheduler: Scheduler) -> None:
    """A step reads from the decode phase's pool what nobody has copied there."""
    hand_over = scheduler.running.hand_over

    def silent(sequence: Any) -> Any:
        old = hand_over(sequence)
        if old is None:
            return None
        scheduler.pool.unpin(old)
        return ()

    scheduler.running.hand_over = silent  # type: ignore[method-assign]


def leaks_on_abort(scheduler: Scheduler) -> None:
    """What is left to a ticket never comes back."""
    scheduler.pool.unpin = lambda blocks: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "wrong",
    [
        frees_at_once,
        publishes_at_the_start,
        forgets_nothing,
        believes_stale_results,
        hits_the_last_token,
        hands_over_and_forgets,
        hands_over_what_is_not_there,
        leaks_on_abort,
    ],
)
def test_the_machine_notices_a_scheduler_that(wrong: Callable[[Scheduler], None]) -> None:
    handed = wrong in (hands_over_and_forgets, hands_over_what_is_not_there)
    given = {"break_it": staticmethod(wrong), "handed": handed}
    machine = type("Broken", (SchedulerMachine,), given)
    quick = settings(
        max_examples=5000,  # it stops at the first failure; each of these shows in one of some tens of runs
        stateful_step_count=40,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(AssertionError) as seen:
        run_state_machine_as_test(machine, settings=quick)
    # What the machine does at the end may fail after what it stumbled over, which has to be a law, not a broken test.
    first: BaseException = seen.value
    while first.__context__ is not None:
        first = first.__context__
    assert isinstance(first, AssertionError)
