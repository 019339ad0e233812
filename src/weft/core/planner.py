"""The planner: what each lane computes next. Part of the scheduler.

Continuous batching: a plan has one token of every decoding sequence, and parts of prompts in what is left of the token
budget. The mixed lane gets both; with two lanes the decode lane gets the one, the prefill lane the other, unless the
regime (see `Sharing`) has them take turns, or has one lane do both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from weft.core.inflight import Flight
from weft.core.pace import Pace
from weft.core.plan import Lane, Plan, Regime, Sharing, Slice, StepLaw
from weft.core.repeats import often
from weft.core.request import Request
from weft.core.running import Running
from weft.core.sequence import Sequence, State
from weft.core.slices import decode_slice, prefill_slice
from weft.core.turns import Turns

# See scheduler.py.
DECODE = State.DECODE
# The part of a mixed step's chunk that prompts get however many decode.
PROMPTS_LEAST = 0.25
# The part of what answers have saved that a step may take: it can turn out to be longer than its cost was said to be.
SPEND = 0.9
# An answer that is so many tokens behind, since it was preempted, say, does not catch up at the cost of all prompts.
LOST = 10


class Planner:
    """budget: tokens of a plan at most. layers: parts of a step at most. repeats: times that a step is carried out at
    most. started: told of each sequence that has begun to be computed, and when."""

    def __init__(
        self,
        lanes: tuple[Lane, ...],
        running: Running,
        budget: int,
        layers: int,
        repeats: int,
        started: Callable[[Sequence, float], None],
    ) -> None:
        self.lanes = lanes
        self.budget = budget
        self.layers = layers
        self.repeats = repeats if lanes == (Lane.MIXED,) else 1
        self.pace = Pace()
        self._running = running
        self._inflight = running.inflight
        self._started = started
        self._steps = itertools.count(1)
        # How two lanes share the device; None: side by side, whatever their shares are.
        self._sharing: Sharing | None = None
        self._cost: StepLaw | None = None
        self._turns: Turns | None = None
        # The lane that computes both phases; None: each its own.
        self._both = Lane.MIXED if Lane.MIXED in lanes else None
        self._lost: set[Lane] = set()
        self._decode_first = tuple(sorted(lanes, key=lambda lane: lane is Lane.PREFILL))

    # -- who computes what -----------------------------------------------------------------------------------------

    def share(self, sharing: Sharing, cost: StepLaw | None = None) -> None:
        """How two lanes share the device, from their next plans on. What is in flight goes on as it is."""
        turns = sharing.regime is Regime.TURNS
        if turns and (self._turns is None or self._sharing is None or self._sharing.partition != sharing.partition):
            self._turns = Turns(sharing.partition)
        elif not turns:
            self._turns = None
        self._sharing, self._cost = sharing, cost
        self._choose()

    def retire(self, lane: Lane) -> bool:
        """The lane gets no plans until it has `landed`. False when no lane is left."""
        self._lost.add(lane)
        self._choose()
        return len(self._lost) < len(self.lanes)

    def landed(self, flight: Flight, seconds: float) -> None:
        """A step, or a part of one, took so long."""
        plan = flight.plan
        if plan.lane in self._lost:
            self._lost.discard(plan.lane)
            self._choose()
        flight.seconds += seconds
        if plan.last:
            self.pace.note(plan, flight.seconds)
        if self._turns is not None:
            self._turns.used(plan.lane, seconds)

    def order(self) -> tuple[Lane, ...]:
        """Decode comes first where the lanes do not take turns: what runs gets its blocks before a new prefill takes
        them."""
        if self._turns is not None and not self._lost:
            return self._turns.order()
        return self._decode_first

    def size_rank(self, request: Request) -> float:
        """Seconds that a request is put back for its size."""
        return 0.0 if self._sharing is None else self._sharing.size_weight * len(request.prompt)

    def _choose(self) -> None:
        left = [lane for lane in self.lanes if lane not in self._lost]
        if len(left) < 2:
            self._both = left[0] if left else None
        else:
            mixed = self._sharing is not None and self._sharing.regime is Regime.MIXED
            self._both = Lane.DECODE if mixed else None

    # -- plans -----------------------------------------------------------------------------------------------------

    def plan(self, lane: Lane, now: float) -> Plan | None:
        """The next plan of a lane; None when it has a ticket in flight, nothing to do, or another lane has its turn."""
        if self._inflight.busy(lane) or lane in self._lost:
            return None
        if self._turns is not None and any(not (flight.lost or flight.paused) for flight in self._inflight):
            return None
        if self._inflight.paused(lane):  # a step that has begun goes on, whatever the regime is by now
            return self._inflight.resume(lane, next(self._steps))
        if self._both is not None and self._both is not lane:
            return None
        pieces: list[Slice] = []
        members: list[Sequence] = []
        copied: list[tuple[int, ...]] = []
        if lane is not Lane.PREFILL or self._both is lane:
            copied = self._plan_decode(pieces, members)
        if lane is not Lane.DECODE or self._both is lane:
            self._plan_prefill(pieces, members, now)
        if not pieces:
            return None
        repeats = often(self._running, members, self.repeats) if self.repeats > 1 else 1
        plan = Plan(next(self._steps), lane, tuple(pieces), parts=self._parts(lane, pieces), repeats=repeats)
        self._inflight.launch(plan, tuple(members), copied)
        return plan

    def _plan_decode(self, pieces: list[Slice], members: list[Sequence]) -> list[tuple[int, ...]]:
        """The tables that the step copies to the decode phase's pool, where there is one."""
        copied: list[tuple[int, ...]] = []
        running, room = self._running, True
        apart, grow = running.apart, running.grow
        size, ahead = running.block_size, running.ahead
        for sequence in list(running.decoding):
            # It may be in the other lane's ticket, of the time when that one decoded; and a more urgent one may have
            # taken its blocks a moment ago.
            if sequence.flight is not None or sequence.state is not DECODE:
                continue
            source: tuple[int, ...] = ()
            if apart and not running.pool.in_decode(sequence.table):
                handed = running.hand_over(sequence) if room else None
                room = handed is not None  # nobody passes the one that waits for blocks
                if handed is None:
                    continue
                source = handed
                copied.append(source)
            elif len(sequence.tokens) + ahead > len(sequence.table) * size and not grow(sequence):
                continue
            pieces.append(decode_slice(sequence, source))
            members.append(sequence)
        return copied

    def _plan_prefill(self, pieces: list[Slice], members: list[Sequence], now: float) -> None:
        started = [one for one in self._running.prefilling if one.flight is None]
        if not started and self._running.waiting.first is None:
            return
        budget = self._prompt_budget(members, started[0].computed if started else 0, now)
        # A prompt's first token comes when the step ends, and so would wait for all prompts behind it.
        enough = math.inf if self._cost is None else self._cost.worthwhile
        at = tokens = 0
        while budget > 0:
            head = self._running.waiting.first
            ahead = head is not None and (at == len(started) or head.rank < started[at].rank)
            if head is not None and ahead and self._start(head, now):
                sequence = head
            elif at < len(started):
                sequence = started[at]
                at += 1
            else:
                return
            piece = prefill_slice(sequence, budget)
            budget -= len(piece.tokens)
            tokens += len(piece.tokens)
            pieces.append(piece)
            members.append(sequence)
            if tokens >= enough and piece.sample is not None:
                return

    def _prompt_budget(self, decoding: list[Sequence], read: int, now: float) -> int:
        """Tokens of prompts for a plan beside these: cut where decoding sequences would wait for them. read: slots that
        the first prompt has filled already."""
        budget, sharing = self.budget - len(decoding), self._sharing
        if sharing is None or sharing.chunk is None:
            return budget
        # Those in this plan, or those that the decode lane has its next turn for.
        waiting = len(decoding) if self._turns is None else len(self._running.decoding)
        if not waiting:
            return budget
        if self._both is None:
            return min(budget, max(1, sharing.chunk) * self.layers)
        # As decode grows, prompts get less of a step, but never next to nothing.
        least = max(1, int(sharing.chunk * PROMPTS_LEAST))
        if sharing.tpot is None or self._cost is None:
            return min(budget, max(least, sharing.chunk - len(decoding)))
        return min(budget, max(least, _affordable(decoding, read, sharing.tpot, self._cost, now)))

    def _parts(self, lane: Lane, pieces: list[Slice]) -> int:
        """Turns that a step of prompts takes while somebody decodes, each with the work of one chunk."""
        sharing = self._sharing
        if lane is not Lane.PREFILL or self._turns is None or self._both is not None:
            return 1
        if sharing is None or sharing.chunk is None or not self._running.decoding:
            return 1
        tokens = sum(len(piece.tokens) for piece in pieces)
        return min(self.layers, -(-tokens // max(1, sharing.chunk)))

    def _start(self, sequence: Sequence, now: float) -> bool:
        # One lane for both phases never starves one of them while it computes the other.
        steps = 1 if self._both is not None else self.pace.decode_steps(len(sequence.tokens))
        if not self._running.start(sequence, steps):
            return False
        self._started(sequence, now)
        return True


def _affordable(decoding: list[Sequence], read: int, tpot: float, cost: StepLaw, now: float) -> int:
    """Tokens of prompts that a step can have beside these sequences, so that the answer that has saved least still has
    its tokens `tpot` seconds apart in the mean when the step ends. An answer that was faster so far has saved time; one
    that was slower catches up, since less than a token's time is left to it, or keeps the pace from now on."""
    left, slots = math.inf, read
    for one in decoding:
        began = one.live.first_token
        slots += len(one.tokens)
        if began is not None:
            own = tpot * (len(one.tokens) - one.prompt_len) - (now - began)
            left = min(left, own if own > -LOST * tpot else tpot)
    seconds = SPEND * left - cost.fixed - cost.token * len(decoding) - cost.slot * slots - cost.read * read
    each = cost.token + cost.slot + cost.read + cost.pair * read
    if seconds <= 0 or each <= 0:
        return 0
    # n tokens take each * n + pair * n^2 / 2 seconds: a token attends to those of its own step, too.
    return int(min(2.0 * seconds / (each + math.sqrt(each * each + 2.0 * cost.pair * seconds)), 2**31))
