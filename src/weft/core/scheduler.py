"""The scheduler: turns requests into plans, and results into events. Pure policy: no clock, no device, no thread.

What goes into a plan is said by planner.py; here are the lives of requests.
"""

from __future__ import annotations

import itertools
import os

from weft.core.admission import Admission, SchedulerSettings, outgrown, request_seed, sequence_seed
from weft.core.plan import Capacity, Lane, Plan, Result, Sampled, Sharing, Slice, StepLaw, Ticket, TokenScore
from weft.core.planner import Planner
from weft.core.request import Event, Finish, PromptScores, Request, RequestEnd, Timing, TokenOutput
from weft.core.running import Running
from weft.core.sequence import Live, Sequence, State, urgency
from weft.core.slices import made, shortfall
from weft.errors import InvalidRequest, NeverFits, StepFailed

__all__ = ["Scheduler", "SchedulerSettings"]

STEP_FAILED = StepFailed.code or ""
# Looked up for every token, and a member of an enum takes several times as long to find as a name.
PREFILL, ENDED = State.PREFILL, State.ENDED
# One for all, since it is looked into for every token, too.
NO_IDS: frozenset[int] = frozenset()


class Scheduler:
    """One thread calls it. `now` is seconds on any monotonic clock. key: secret of the prefix cache; default: random.

    Counters that grow from the start: prompt_tokens (of prompts that were prefilled), generation_tokens, and those of
    `running` (preemptions, prefix_queries and prefix_hits in tokens).
    """

    def __init__(
        self, capacity: Capacity, lanes: tuple[Lane, ...], settings: SchedulerSettings, *, key: bytes | None = None
    ) -> None:
        self.capacity = capacity
        self.settings = settings
        budget = min(settings.max_num_batched_tokens, capacity.max_tokens)
        # Everybody who runs must fit into one plan, so that a decoding sequence advances with every step.
        most = min(settings.max_num_seqs, capacity.max_slices, budget)
        secret = os.urandom(32) if key is None else key
        caching, ahead = settings.enable_prefix_caching, capacity.ahead
        apart = capacity.decode_blocks
        if apart and min(apart, capacity.blocks - apart) * capacity.block_size < capacity.max_model_len:
            raise ValueError(f"a pool of each phase has to hold {capacity.max_model_len} tokens: {capacity}")
        self.running = Running(capacity.blocks, capacity.block_size, most, caching, secret, ahead, apart)
        self.pool = self.running.pool
        self.inflight = self.running.inflight
        self.admission = Admission(capacity, settings)
        self.planner = Planner(lanes, self.running, budget, capacity.layers, capacity.repeats, self._started)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self._slots = capacity.blocks * capacity.block_size
        self._live: dict[str, Live] = {}
        self._numbers = itertools.count()
        self._sequence_ids = itertools.count()

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: Request, now: float, back: float = 0.0) -> None:
        """Accept a request; from now on it ends in exactly one RequestEnd.

        back: seconds by which its place in the queue is later than its arrival.
        Raises InvalidRequest (also for an id that is live), ContextTooLong, NeverFits or QueueFull.
        """
        if request.id in self._live:
            raise InvalidRequest(f"a request with id {request.id!r} is under way; ids must be unique", param="id")
        self.admission.check(request, now)
        params, number = request.params, next(self._numbers)
        limit = self.capacity.max_model_len
        ends = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *request.eos)
        stop_ids = frozenset(token for token in ends if 0 <= token < self.capacity.vocabulary) or NO_IDS
        live = Live(
            request=request,
            number=number,
            arrived=now,
            seed=request_seed(params.seed, self.settings.seed, number),
            max_len=limit if params.max_tokens is None else min(limit, len(request.prompt) + params.max_tokens),
            stop_ids=stop_ids,
            forbidden=tuple(sorted(stop_ids)),
            open=set(range(params.n)),
            parked=params.n > 1,
            scores_due=params.prompt_logprobs is not None,
            back=back,
        )
        self._live[request.id] = live
        self.admission.enter(len(request.prompt))
        self._add_sequence(live, 0)

    def abort(self, request_id: str, now: float) -> list[Event]:
        """End a request at once, in flight or not. Its terminal events; none when the id is not live."""
        events: list[Event] = []
        live = self._live.get(request_id)
        if live is not None:
            self._end_request(live, Finish.ABORT, now, events)
        return events

    def stop(self, request_id: str, index: int, now: float) -> list[Event]:
        """End one sequence of a request at once, in flight or not, as a stop id would: whoever reads its text has found
        a stop string there. What ends by that; nothing where the sequence is not open, or has no text yet."""
        events: list[Event] = []
        live = self._live.get(request_id)
        for sequence in () if live is None else live.sequences:
            if sequence.index == index and sequence.state is not ENDED and sequence.generated:
                if sequence.told:
                    events.append(TokenOutput(request_id, index, None, finish=Finish.STOP))
                self._end_sequence(sequence, Finish.STOP, now, events)
                break
        return events

    def put_back(self, sequence: Sequence, seconds: float) -> None:
        """One that has not begun goes behind those that arrive within so many seconds. Its place changes once at most,
        so that it gets its turn."""
        line, live = self.running.waiting, sequence.live
        line.remove(sequence)
        live.back = seconds
        place, number, index = sequence.rank
        sequence.rank = (place + seconds, number, index)
        line.add(sequence)

    def preempt(self, request_id: str) -> int:
        """Send the running sequences of a request back to waiting, in flight or not. How many there were."""
        live = self._live.get(request_id)
        found = [] if live is None else [one for one in live.sequences if one.state in (State.PREFILL, State.DECODE)]
        for sequence in found:
            self.running.preempt(sequence)
        return len(found)

    def lose(self, step: int, message: str, now: float) -> list[Event]:
        """A step does not end: end the requests in it with an error. Its ticket stays in flight, so its blocks are not
        reused and its lane gets no other plan until a late result comes."""
        events: list[Event] = []
        flight = next((one for one in self.inflight if one.plan.step == step and not one.paused), None)
        if flight is not None:
            flight.lost = True
            for sequence in flight.members:
                if sequence.flight is flight:
                    self._end_request(sequence.live, Finish.ERROR, now, events, message, STEP_FAILED)
        return events

    def fail_all(self, message: str, code: str, now: float) -> list[Event]:
        """End every request with an error: the device died."""
        events: list[Event] = []
        for live in list(self._live.values()):
            self._end_request(live, Finish.ERROR, now, events, message, code)
        return events

    def recover(self, message: str, now: float, landed: Ticket | None = None) -> list[Event]:
        """After an internal error: nothing that runs can be trusted, so every request ends with an error and the pool
        starts anew, without what tickets in flight name. New requests are served.

        landed: the ticket whose result brought the error out, which is in flight no more.
        """
        self.running.reset(landed)
        return self.fail_all(message, STEP_FAILED, now)

    # -- plans ---------------------------------------------------------------------------------------------------

    def share(self, sharing: Sharing, cost: StepLaw | None = None) -> None:
        """How two lanes share the device, from their next plans on. What is in flight goes on as it is. cost: of a
        step, as far as it is known."""
        self.planner.share(sharing, cost)

    def retire(self, lane: Lane) -> bool:
        """A lane answers no more: the other one computes both phases, until a late result shows that the lane lives.

        False when no lane is left.
        """
        return self.planner.retire(lane)

    def order(self) -> tuple[Lane, ...]:
        """The lanes, in the order in which they should be asked for their next plan."""
        return self.planner.order()

    def schedule(self, lane: Lane, now: float) -> Plan | None:
        """The next plan of a lane; None when it has a ticket in flight, nothing to do, or another lane has its turn."""
        return self.planner.plan(lane, now)

    def _started(self, sequence: Sequence, now: float) -> None:
        """A sequence has got its blocks, and its prompt is computed from now on."""
        live = sequence.live
        if live.scheduled is None:
            live.scheduled = now
            live.cached_tokens = sequence.computed
            self.admission.leave(sequence.prompt_len, now)
        shared = self.running.caching and sequence.prompt_len > self.capacity.block_size
        if not shared and not sequence.scores_due:
            self._unpark(live)  # the siblings wait for no block to share, nor for scores, which come before any token

    # -- results -------------------------------------------------------------------------------------------------

    def complete(self, result: Result, now: float) -> list[Event]:
        """Take in what a finished ticket produced. Raises UnknownTicket, with nothing changed, for any other result."""
        events: list[Event] = []
        flight = self.inflight.flight(result.ticket)
        self.planner.landed(flight, result.seconds)
        failed = dict(result.failed)
        if result.error is None and not flight.plan.last:
            for piece, sequence in flight.wanted:
                if piece.sequence in failed and sequence.flight is flight:
                    self._end_request(sequence.live, Finish.ERROR, now, events, failed[piece.sequence], STEP_FAILED)
            if self.inflight.pause(flight):
                return events
        wanted = self.inflight.land(result.ticket)
        drawn = {sampled.sequence: sampled for sampled in result.sampled}
        scores = dict(result.prompt_scores)
        error, vocabulary = result.error, self.capacity.vocabulary
        again = result.repeats - 1
        if again and error is None:
            self._repeated(wanted, result, events)
        for piece, sequence in wanted:
            if sequence.state is ENDED:  # with its request, a slice ago
                continue
            one = drawn.get(piece.sequence)
            its_scores = scores.get(piece.sequence, ()) if scores else ()
            problem = failed.get(piece.sequence) if failed and error is None else error
            if problem is None:
                problem = shortfall(piece, one, its_scores, vocabulary)
            if problem is None:
                self._advance(piece, piece.start + len(piece.tokens) + again, sequence, one, its_scores, now, events)
            else:
                self._end_request(sequence.live, Finish.ERROR, now, events, problem, STEP_FAILED)
        return events

    def _repeated(self, wanted: list[tuple[Slice, Sequence]], result: Result, events: list[Event]) -> None:
        """All the times but the last that a plan was carried out: nothing ended in them."""
        drawn = {one.sequence: tokens for one, tokens in zip(result.sampled, result.before, strict=True)}
        sequences = []
        for piece, sequence in wanted:
            before = drawn.get(piece.sequence)
            if before is not None:
                sequences.append(sequence)
                sequence.tokens += before
                self.generation_tokens += len(before)
                if sequence.told:
                    name, index = sequence.name, sequence.index
                    events += [made(TokenOutput, (name, index, token, None, None, None)) for token in before]
        self.running.written(sequences)

    def _advance(
        self,
        piece: Slice,
        computed: int,
        sequence: Sequence,
        drawn: Sampled | None,
        scores: tuple[TokenScore, ...],
        now: float,
        events: list[Event],
    ) -> None:
        sequence.computed = computed
        if self.running.caching:
            self.running.publish(sequence)
        if piece.prompt_logprobs is not None:
            sequence.live.scores.extend(scores)
        if piece.sample is None or drawn is None:
            return
        if sequence.state is PREFILL:
            self.running.decode(sequence)
            self._prefilled(sequence, now, events)
        token, tokens = drawn.token, sequence.tokens
        tokens.append(token)
        self.generation_tokens += 1
        length = len(tokens)
        finish = stop_token = None
        if token in sequence.stop_ids and sequence.generated > sequence.live.request.params.min_tokens:
            finish, stop_token = Finish.STOP, token
        elif length >= sequence.max_len:
            finish = Finish.LENGTH
        if sequence.told or length == sequence.prompt_len + 1:
            events.append(made(TokenOutput, (sequence.name, sequence.index, token, drawn.score, finish, stop_token)))
        if finish is not None:
            self._end_sequence(sequence, finish, now, events)
        elif length > self._slots:
            message = outgrown(length, self.capacity)
            self._end_request(sequence.live, Finish.ERROR, now, events, message, NeverFits.code)

    def _prefilled(self, sequence: Sequence, now: float, events: list[Event]) -> None:
        """Its prompt is computed, and its first token, or the next one where it was preempted, was drawn."""
        live = sequence.live
        if live.first_token is None:
            live.first_token = now
        if sequence.scores_due:
            events.append(PromptScores(live.request.id, tuple(live.scores)))
            live.scores_due = False
            live.scores.clear()
        if not live.prefilled:
            live.prefilled = True
            self.prompt_tokens += sequence.prompt_len
        self._unpark(live)

    # -- ends ----------------------------------------------------------------------------------------------------

    def _end_sequence(self, sequence: Sequence, finish: Finish, now: float, events: list[Event]) -> None:
        live = sequence.live
        self.running.end(sequence)
        live.generated += sequence.generated
        live.open.discard(sequence.index)
        if sequence.index == 0:
            live.reason = finish
        if not live.open:
            self._end_request(live, live.reason, now, events)

    def _end_request(
        self,
        live: Live,
        reason: Finish,
        now: float,
        events: list[Event],
        error: str | None = None,
        code: str | None = None,
    ) -> None:
        """The one place where a request ends: its open sequences first, then its terminal event."""
        for sequence in live.sequences:
            if sequence.index in live.open:
                live.generated += sequence.generated
            if sequence.state is not State.ENDED:
                self.running.end(sequence)
        live.sequences.clear()  # no cycle: its memory is freed now, not when the garbage collector comes by
        if live.scheduled is None:
            self.admission.leave(len(live.request.prompt), None)
        del self._live[live.request.id]
        if live.request.told:
            events.extend(TokenOutput(live.request.id, index, None, finish=reason) for index in sorted(live.open))
        timing = Timing(live.arrived, live.scheduled, live.first_token, now)
        prompt_tokens = len(live.request.prompt)
        events.append(
            RequestEnd(
                request=live.request.id,
                reason=reason,
                prompt_tokens=prompt_tokens,
                cached_tokens=live.cached_tokens,
                generated_tokens=live.generated,
                timing=timing,
                error=error,
                code=code,
                preemptions=live.preemptions,
                sequences=live.request.params.n,
            )
        )

    # -- sequences and counts --------------------------------------------------------------------------------------

    def _add_sequence(self, live: Live, index: int) -> None:
        request = live.request
        sequence = Sequence(
            id=next(self._sequence_ids),
            live=live,
            index=index,
            seed=sequence_seed(live.seed, index),
            tokens=list(request.prompt),
            prompt_len=len(request.prompt),
            rank=(self.place(request, live.arrived) + live.back, live.number, index),
            name=request.id,
            max_len=live.max_len,
            stop_ids=live.stop_ids,
            told=request.told,
            plain=None
            if request.params.penalised or (live.forbidden and request.params.min_tokens)
            else request.params,
        )
        live.sequences.append(sequence)
        self.running.add(sequence)

    def place(self, request: Request, arrived: float) -> float:
        """Where a request stands in the queue that is not put back: smaller is served first."""
        return urgency(request.priority, arrived) + self.planner.size_rank(request)

    def _unpark(self, live: Live) -> None:
        """Make the siblings of the first sequence, which find the prompt's full blocks in the prefix cache."""
        if live.parked:
            live.parked = False
            for index in range(1, live.request.params.n):
                self._add_sequence(live, index)

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """Sequences that hold no blocks: new, preempted, or not made yet."""
        parked = sum(live.request.params.n - 1 for live in self._live.values() if live.parked)
        return len(self.running.waiting) + parked

    def owned(self, lane: Lane) -> int:
        """Sequences that a lane computes now."""
        prefilling = 0 if lane is Lane.DECODE else len(self.running.prefilling)
        return prefilling + (0 if lane is Lane.PREFILL else len(self.running.decoding))
