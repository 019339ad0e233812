"""What the engine tells a controller, and what it does with its decisions.

A lane takes on a share when it begins a step, never in the middle of one, so nothing waits for the other lane and a
change costs no step.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass

from weft.core.plan import Lane, Partition, Plan, Regime, Result, Sharing
from weft.core.request import Event, Finish, Request, RequestEnd, TokenOutput
from weft.core.scheduler import Scheduler
from weft.core.sequence import Sequence, State
from weft.devices.base import Device
from weft.errors import DeviceError, QueueFull
from weft.phases.controller import Controller
from weft.phases.observations import Arrived, Decision, Finished, FirstToken, Queue, Stepped

logger = logging.getLogger("weft.partition")

# Waiting requests that a policy is shown, the most urgent ones.
SHOWN = 64


@dataclass(slots=True)
class Flying:
    """A lane's tickets in flight: seconds of the ended ones; since when, with which share, and beside how much of the
    other lane's seconds the present one flies. ready: since when the lane could have had another; begun: when the
    present one could have been under way. parts: seconds of the parts of the step under way."""

    seconds: float = 0.0
    parts: float = 0.0
    ready: float | None = None
    begun: float = 0.0
    since: float | None = None
    share: float = 1.0
    beside: float = 0.0

    def until(self, now: float) -> float:
        return self.seconds + (0.0 if self.since is None else now - self.since)


class Control:
    """decisions: that were made; switches: those which changed how the device is shared. switch_seconds: what the
    device took to be told of shares. decide_seconds: what the policy took. decision: the one in force. put_back:
    requests that could not make the TTFT target any more. refused: when they came."""

    def __init__(self, controller: Controller, device: Device, scheduler: Scheduler, now: float) -> None:
        self.decisions = 0
        self.switches = 0
        self.switch_seconds = 0.0
        self.decide_seconds = 0.0
        self.put_back = 0
        self.refused = 0
        self._controller = controller
        self._device = device
        self._scheduler = scheduler
        self._shares = device.capacity().shares
        self._flying = {lane: Flying() for lane in device.lanes()}
        self._first: dict[str, float] = {}  # when those arrived who have no first token yet
        self.decision = controller.first(now)
        logger.info("partition: %s", self.decision.reason)
        self._adopt(self.decision)

    # -- what happens ----------------------------------------------------------------------------------------------

    def admit(self, request: Request, now: float) -> float:
        """Seconds by which a request goes behind others, since its prompt alone takes too long; 0 for any other.

        Raises QueueFull for one that would get its first token too late, where the policy says so.
        """
        decision = self.decision
        if decision.hold is None:
            return 0.0
        own, ahead = self._new * len(request.prompt), 0.0
        if decision.shed:
            place, running = self._scheduler.place(request, now), self._scheduler.running
            ahead = sum(self._left(one) for one in running.prefilling)
            ahead += sum(self._left(one) for one in running.waiting if one.rank[0] <= place)
        if ahead + own <= decision.hold:
            return 0.0
        if not decision.shed:
            self.put_back += 1
            return decision.back
        self.refused += 1
        raise QueueFull(
            f"{ahead:.0f} prompt tokens go first, and the device computes {decision.hold} within the target of "
            "--slo-ttft",
            retry_after=self._scheduler.admission.retry_after(now),
        )

    def _pass(self, now: float) -> None:
        """Those first in the queue that are too late by now let others pass: they would make these late, too."""
        decision, line = self.decision, self._scheduler.running.waiting
        while decision.hold is not None and (head := line.first) is not None:
            live = head.live
            if live.back or live.first_token is not None:
                return
            left = decision.within * (1.0 - self._left(head) / decision.hold)
            if now - live.arrived <= left:
                return
            self.put_back += 1
            self._scheduler.put_back(head, decision.back)

    @property
    def _new(self) -> float:
        """The part of a prompt that the prefix cache is not likely to have."""
        running = self._scheduler.running
        return 1.0 - running.prefix_hits / running.prefix_queries if running.prefix_queries else 1.0

    def _left(self, sequence: Sequence) -> float:
        """Tokens of a sequence that are likely to be computed before it has its next one."""
        left = len(sequence.tokens) - sequence.computed
        return left if sequence.state is State.PREFILL else self._new * left

    def offered(self, request: Request, now: float) -> None:
        """A request that was accepted or found no place: both are what the device is asked to do."""
        self._controller.tell(Arrived(now, max(1, round(self._new * len(request.prompt)))))

    def arrived(self, request: Request, now: float) -> None:
        """A request that was accepted."""
        self._first[request.id] = now
        self.offered(request, now)

    def noted(self, events: list[Event], now: float) -> None:
        for event in events:
            if isinstance(event, TokenOutput):
                arrived = self._first.pop(event.request, None)
                if arrived is not None and event.token is not None:
                    self._controller.tell(FirstToken(now, arrived))
            elif isinstance(event, RequestEnd):
                self._first.pop(event.request, None)
                self._ended(event, now)

    def _ended(self, end: RequestEnd, now: float) -> None:
        times = end.timing
        if end.reason not in (Finish.STOP, Finish.LENGTH) or times.first_token is None or times.scheduled is None:
            return
        output = end.generated_tokens // end.sequences
        tpot = (now - times.first_token) / (output - 1) if output > 1 else None
        ttft, waited = times.first_token - times.arrived, times.scheduled - times.arrived
        self._controller.tell(Finished(now, times.arrived, ttft, waited, tpot, output))

    def launched(self, plan: Plan, now: float) -> None:
        """Just before a plan is submitted: the lane's share is what the device is told now."""
        lane, other = plan.lane, self._other(plan.lane)
        lone = self._controller.lone and self.decision.sharing.regime is Regime.SPLIT and self._idle(other)
        self._tell_device(self._target(lane if lone else None))
        flying, beside = self._flying[lane], self._flying.get(other)
        flying.since, flying.share = now, self._share(lane)
        # What comes between two steps is a part of what a step takes, but for another lane's turn.
        turns = self.decision.sharing.regime is Regime.TURNS
        flying.begun = now if turns or flying.ready is None else flying.ready
        flying.parts = flying.parts if plan.part else 0.0
        flying.beside = 0.0 if beside is None else beside.until(now)

    def landed(self, plan: Plan, result: Result, now: float) -> None:
        lane = plan.lane
        flying, beside = self._flying[lane], self._flying.get(self._other(lane))
        if flying.since is None:
            return
        seconds = max(now - flying.since, 1e-9)
        rival = 0.0 if beside is None else min(1.0, max(0.0, (beside.until(now) - flying.beside) / seconds))
        flying.seconds, flying.since = flying.seconds + seconds, None
        flying.parts += now - flying.begun
        flying.ready = None if self._idle(lane) else now
        self._pass(now)
        if result.error is None and plan.last:
            output = sum(1 for piece in plan.slices if len(piece.tokens) == 1 and piece.sample is not None)
            context = sum(piece.end for piece in plan.slices)
            prompt = plan.tokens - output
            read, pairs = _attended(plan)
            about = (flying.share, rival, plan.parts, read, pairs)
            self._controller.tell(Stepped(now, lane, flying.parts, prompt, output, context, *about))

    # -- what follows ----------------------------------------------------------------------------------------------

    def consider(self, now: float) -> None:
        """Ask the policy if it is time to; one comparison otherwise."""
        if not self._controller.due(now):
            return
        began = time.perf_counter()
        decision = self._controller.ask(self._queue(now), now)
        self.decide_seconds += time.perf_counter() - began
        if decision is not None:
            changed = decision.sharing != self.decision.sharing
            self.decisions += 1
            self.switches += changed
            self.decision = decision
            logger.log(logging.INFO if changed else logging.DEBUG, "partition: %s", decision.reason)
            self._adopt(decision)

    def _adopt(self, decision: Decision) -> None:
        self._scheduler.share(decision.sharing, decision.cost)
        self._tell_device(self._target(None))

    def _target(self, lone: Lane | None) -> Partition:
        """What the device shall be told. lone: the lane whose rival has nothing to do."""
        sharing: Sharing = self.decision.sharing
        if sharing.regime is not Regime.SPLIT:
            return Partition(self._shares, self._shares)
        prefill = self._shares if lone is Lane.PREFILL else sharing.partition.prefill
        decode = self._shares if lone is Lane.DECODE else sharing.partition.decode
        return Partition(prefill, decode)

    def _tell_device(self, partition: Partition) -> None:
        if partition == self._device.partition():
            return
        began = time.perf_counter()
        try:
            self._device.set_partition(partition)
        except DeviceError as error:  # the shares in force go on
            logger.error("partition %d:%d was refused: %s", partition.prefill, partition.decode, error.message)
        self.switch_seconds += time.perf_counter() - began

    def _queue(self, now: float) -> Queue:
        decoding = self._scheduler.running.decoding
        answers = [
            (now - one.live.first_token, len(one.tokens) - one.prompt_len - 1)
            for one in itertools.islice(decoding, SHOWN)
            if one.live.first_token is not None
        ]
        context = sum(len(one.tokens) for one in decoding)
        return Queue(tuple(self._waiting()), len(decoding), context, tuple(answers))

    def _waiting(self) -> list[tuple[float, int]]:
        """(arrival, tokens to compute) of the sequences without a first token."""
        running = self._scheduler.running
        found: list[tuple[float, int]] = []
        for line in (running.prefilling, running.waiting):
            for one in line:
                if one.live.first_token is None:
                    found.append((one.live.arrived, round(self._left(one))))
                if len(found) >= SHOWN:
                    return found
        return found

    def _share(self, lane: Lane) -> float:
        partition = self._device.partition()
        if partition is None:
            return 1.0
        return (partition.prefill if lane is Lane.PREFILL else partition.decode) / self._shares

    def _idle(self, lane: Lane) -> bool:
        return not self._scheduler.inflight.busy(lane) and not self._scheduler.owned(lane)

    @staticmethod
    def _other(lane: Lane) -> Lane:
        return Lane.DECODE if lane is Lane.PREFILL else Lane.PREFILL


def _attended(plan: Plan) -> tuple[int, int]:
    """(slots that prompts read, pairs of a token of a prompt and a slot that it attends to)."""
    prompts = [piece for piece in plan.slices if len(piece.tokens) > 1 or piece.sample is None]
    pairs = sum(len(piece.tokens) * (2 * piece.start + len(piece.tokens) + 1) // 2 for piece in prompts)
    return sum(piece.end for piece in prompts), pairs
