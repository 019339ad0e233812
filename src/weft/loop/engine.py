"""The engine: joins the scheduler and the device, and sees to it that every request ends."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from weft.core.inflight import UnknownTicket
from weft.core.plan import Lane, Plan, Result, Ticket
from weft.core.request import Event, Request, RequestEnd
from weft.core.scheduler import Scheduler
from weft.devices.base import Device
from weft.errors import DeviceError, QueueFull, Unavailable
from weft.ipc.messages import STEP_BUCKETS, LaneStats, Stats
from weft.loop.control import Control
from weft.phases.controller import Controller

logger = logging.getLogger("weft.engine")

STEP_TIMEOUT = 300.0


@dataclass(slots=True)
class LaneMeter:
    """What a lane has done since the start, and since when its ticket is in flight. sizes: see Stats.step_sizes. moves,
    moved: steps that began on another share than the one before, and the seconds that this took. warned: its step was
    given up. retired: the lane was, too."""

    busy: float = 0.0
    steps: int = 0
    tokens: int = 0
    sizes: list[int] = field(default_factory=lambda: [0] * (len(STEP_BUCKETS) + 1))
    moves: int = 0
    moved: float = 0.0
    plan: Plan | None = None
    since: float = 0.0
    warned: bool = False
    retired: bool = False

    def count(self, tokens: int, steps: int) -> None:
        """So many steps have ended that computed so many tokens each."""
        self.tokens += tokens * steps
        self.sizes[bisect_left(STEP_BUCKETS, tokens)] += steps


class Engine:
    """One thread owns it; only `wake` may be called from another.

    step_timeout: seconds after which the requests in a step that does not end get an error; after as much again its
    lane counts as gone, and the other lane, if there is one, does the work of both; without any the device is dead. A
    lane that says itself that it is gone counts so at once.
    None: never. controller: says how two lanes share the device; None: as the device has it.
    dead: why the engine takes no requests any more, or None.
    """

    def __init__(
        self,
        device: Device,
        scheduler: Scheduler,
        clock: Callable[[], float] = time.monotonic,
        *,
        step_timeout: float | None = STEP_TIMEOUT,
        controller: Controller | None = None,
    ) -> None:
        self.dead: str | None = None
        self._device = device
        self._scheduler = scheduler
        self._clock = clock
        self._step_timeout = step_timeout
        self._started = clock()
        self._events: list[Event] = []
        self._meters = {lane: LaneMeter() for lane in scheduler.order()}
        self._control = None if controller is None else Control(controller, device, scheduler, self._started)
        self._closed = False

    def submit(self, request: Request) -> None:
        """Take a request. Raises InvalidRequest, ContextTooLong, NeverFits, QueueFull, or Unavailable when dead."""
        if self.dead is not None:
            raise Unavailable(f"the engine is dead: {self.dead}")
        if self._closed:
            raise Unavailable("the engine is closed")
        now, control = self._clock(), self._control
        try:
            back = 0.0 if control is None else control.admit(request, now)
            self._scheduler.submit(request, now, back)
        except QueueFull:
            if control is not None:
                control.offered(request, now)
            raise
        if control is not None:
            control.arrived(request, now)

    def abort(self, request_id: str) -> None:
        """End a request; its events come out of the next `step`. An id that is not live is ignored: it just ended."""
        self._note(self._scheduler.abort(request_id, self._clock()))

    def stop(self, request_id: str, index: int) -> None:
        """End one sequence of a request: its text holds a stop string. Ignored where it has just ended."""
        self._note(self._scheduler.stop(request_id, index, self._clock()))

    def step(self, timeout: float | None) -> list[Event]:
        """Give every idle lane a plan, wait for results, and take them in: the events since the last call.

        Waits up to `timeout` seconds (None: for ever) for a result. An empty list on time-out, after `wake`, or when
        what ended has nothing to tell, such as a part of a prompt.
        """
        if self.dead is None and not self._closed:
            self._launch()
            for result in self._poll(timeout):
                self._complete(result)
            self._watch()
            if self._control is not None:
                self._control.consider(self._clock())
            # Before the caller deals with the events, so that the device works in the meantime.
            self._launch()
        events, self._events = self._events, []
        return events

    def wake(self) -> None:
        """Make a `step` that waits, or else the next one, return soon. From any thread."""
        self._device.wake()

    @property
    def idle(self) -> bool:
        """Nothing is waiting, running, in flight (but on a lane that is gone), or still to be told."""
        return not (self._scheduler.live or self._events or (self._watched() and self.dead is None))

    def stats(self) -> Stats:
        scheduler, pool, control = self._scheduler, self._scheduler.pool, self._control
        sharing = None if control is None else control.decision.sharing
        return Stats(
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            blocks_free=pool.free,
            blocks_cached=pool.cached,
            blocks_held=pool.held,
            blocks_pinned=pool.pinned,
            preemptions=scheduler.running.preemptions,
            prefix_queries=scheduler.running.prefix_queries,
            prefix_hits=scheduler.running.prefix_hits,
            prompt_tokens=scheduler.prompt_tokens,
            generation_tokens=scheduler.generation_tokens,
            uptime=self._clock() - self._started,
            lanes=tuple(self._lane_stats(lane, meter) for lane, meter in self._meters.items()),
            iteration_tokens=sum(meter.tokens for meter in self._meters.values()),
            step_sizes=tuple(map(sum, zip(*(meter.sizes for meter in self._meters.values()), strict=True))),
            partition_regime="" if sharing is None else sharing.regime.value,
            partition_chunk=0 if sharing is None else sharing.chunk or 0,
            partition_switches=0 if control is None else control.switches,
            partition_switch_seconds=0.0 if control is None else control.switch_seconds,
            partition_decide_seconds=0.0 if control is None else control.decide_seconds,
            partition_put_back=0 if control is None else control.put_back,
            partition_refused=0 if control is None else control.refused,
            partition_decisions=0 if control is None else control.decisions,
            partition_ttft=None if control is None else control.decision.ttft,
            partition_tpot=None if control is None else control.decision.tpot,
        )

    def close(self) -> None:
        """Close the device; idempotent. Requests that are still live get no more events: abort them before."""
        if not self._closed:
            self._closed = True
            self._device.close()

    # -- one step --------------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        for lane in self._scheduler.order():
            if self.dead is not None:
                return
            if self._meters[lane].plan is not None:  # its ticket is in flight
                continue
            plan = self._schedule(lane)
            if plan is not None:
                self._send(plan)

    def _schedule(self, lane: Lane) -> Plan | None:
        try:
            return self._scheduler.schedule(lane, self._clock())
        except Exception as error:  # the loop must live on, whatever the policy stumbles over
            self._recover(error)
            return None

    def _send(self, plan: Plan) -> None:
        meter = self._meters[plan.lane]
        meter.plan, meter.since, meter.warned = plan, self._clock(), False
        if self._control is not None:
            self._control.launched(plan, meter.since)
        try:
            self._device.submit(plan)
        except DeviceError as error:
            self._die(error.message)
        except Exception as error:  # a plan that the device cannot take ends its requests, not the loop
            logger.exception("step %d could not be submitted", plan.step)
            self._complete(Result(Ticket(plan.step, plan.lane), error=f"the step could not be submitted: {error}"))

    def _poll(self, timeout: float | None) -> list[Result]:
        if self._events or self.dead is not None:
            timeout = 0.0
        limit = self._deadline()
        if timeout is None or (limit is not None and limit < timeout):
            timeout = limit
        try:
            return self._device.poll(timeout)
        except DeviceError as error:
            self._die(error.message)
            return []

    def _complete(self, result: Result) -> None:
        lane = result.ticket.lane
        try:
            self._note(self._scheduler.complete(result, self._clock()))
        except UnknownTicket as error:
            logger.error("a result was refused: %s", error)
            return
        except Exception as error:  # see _schedule
            self._recover(error, result.ticket)
        meter = self._meters[lane]
        if meter.plan is not None:
            if meter.plan.last:
                meter.count(meter.plan.tokens, result.repeats)
            if self._control is not None:
                self._control.landed(meter.plan, result, self._clock())
        if meter.retired:
            meter.retired = False
            logger.warning("lane %s answers again", lane.value)
        meter.busy += result.seconds
        meter.steps += result.repeats
        meter.moves += result.moved > 0
        meter.moved += result.moved
        meter.plan = None
        if result.error is not None:
            logger.error("step %d of lane %s failed: %s", result.ticket.step, lane.value, result.error)
        if result.gone:
            self._retire(meter, lane, result.error or f"lane {lane.value} is gone")
        if not self._scheduler.pool.conserved:
            self._recover(RuntimeError("the block pool does not add up"))

    def _note(self, events: list[Event]) -> None:
        self._events.extend(events)
        if self._control is not None:
            self._control.noted(events, self._clock())
        for event in events:
            if isinstance(event, RequestEnd):
                _log_end(event)

    def _recover(self, error: Exception, landed: Ticket | None = None) -> None:
        """An error of ours: it costs the requests that are live, and the engine goes on with an empty pool."""
        logger.error("internal error; all live requests end", exc_info=error)
        message = f"internal error of the scheduler: {type(error).__name__}: {error}"
        self._note(self._scheduler.recover(message, self._clock(), landed))

    def _die(self, reason: str) -> None:
        self.dead = reason
        logger.error("the device died: %s", reason)
        self._note(self._scheduler.fail_all(f"the device died: {reason}", Unavailable.code, self._clock()))

    # -- steps that do not end -------------------------------------------------------------------------------------

    def _deadline(self) -> float | None:
        """Seconds to the moment at which `_watch` has something to do."""
        if self._step_timeout is None:
            return None
        now = self._clock()
        ends = [self._limit(meter) - now for meter in self._watched()]
        return max(0.0, min(ends)) if ends else None

    def _limit(self, meter: LaneMeter) -> float:
        return meter.since + (self._step_timeout or 0.0) * (2 if meter.warned else 1)

    def _watched(self) -> list[LaneMeter]:
        return [meter for meter in self._meters.values() if meter.plan is not None and not meter.retired]

    def _watch(self) -> None:
        if self._step_timeout is None:
            return
        for meter in self._watched():
            if meter.plan is None or self.dead is not None or self._clock() < self._limit(meter):
                continue
            lane = meter.plan.lane
            message = f"step {meter.plan.step} of lane {lane.value} did not end within {self._step_timeout:g} s"
            if meter.warned:
                self._retire(meter, lane, message + ", nor within as much again")
                continue
            meter.warned = True
            logger.error("%s; its requests end. The threads are at:\n%s", message, _stacks())
            self._note(self._scheduler.lose(meter.plan.step, message, self._clock()))

    def _retire(self, meter: LaneMeter, lane: Lane, message: str) -> None:
        meter.retired = self._scheduler.retire(lane)
        if meter.retired:
            logger.error("%s; the other lane does its work", message)
        else:
            self._die(message)

    def _lane_stats(self, lane: Lane, meter: LaneMeter) -> LaneStats:
        partition = self._device.partition()
        if partition is None:
            share = self._device.capacity().shares
        else:
            share = partition.prefill if lane is Lane.PREFILL else partition.decode
        owned = self._scheduler.owned(lane)
        return LaneStats(lane.value, share, meter.busy, meter.steps, meter.tokens, owned, meter.moves, meter.moved)


def _log_end(end: RequestEnd) -> None:
    seconds = (end.timing.ended or end.timing.arrived) - end.timing.arrived
    logger.info(
        "request %s ended: %s, prompt %d tokens (%d cached), generated %d, %.3f s, %d preemptions%s",
        end.request,
        end.reason.value,
        end.prompt_tokens,
        end.cached_tokens,
        end.generated_tokens,
        seconds,
        end.preemptions,
        f", {end.code}: {end.error}" if end.error is not None else "",
    )


def _stacks() -> str:
    """Where every thread of this process is, for the log of a hang."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    # The only way to see the stacks of other threads.
    frames = sys._current_frames()
    return "\n".join(
        f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames.items()
    )
