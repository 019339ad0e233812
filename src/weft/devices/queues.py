"""Plans on their way to the lanes of a device, and results on their way back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue

from weft.core.plan import Lane, Plan, Result, Ticket
from weft.errors import DeviceError

CLOSED = "the device is closed"


class Queues:
    """The engine's thread calls submit, poll and close; each lane has a thread that calls `serve` or `next`; `post`,
    `end` and `wake` may come from any thread.

    Invariant: a plan has one result. The plans of a lane that has ended are answered: what is posted of one is dropped.
    """

    def __init__(self, lanes: Iterable[Lane]) -> None:
        self._plans: dict[Lane, SimpleQueue[Plan | None]] = {lane: SimpleQueue() for lane in lanes}
        self._results: SimpleQueue[Result | None] = SimpleQueue()  # None: somebody called wake()
        self._lock = threading.Lock()  # held for the next two
        self._unanswered: dict[Lane, list[Ticket]] = {lane: [] for lane in self._plans}
        self._ended: dict[Lane, str] = {}  # lanes that have ended before their time, and why
        self.closing = False

    def submit(self, plan: Plan) -> Ticket:
        """Raises DeviceError for a lane that is not there, and after `close`."""
        if plan.lane not in self._plans:
            raise DeviceError(f"a plan for lane {plan.lane.value}; this device has {', '.join(self._plans)}")
        if self.closing:
            raise DeviceError(CLOSED)
        ticket = Ticket(plan.step, plan.lane)
        with self._lock:
            if plan.lane in self._ended:  # nobody else is going to answer
                self._results.put(self._refusal(ticket))
            else:
                self._unanswered[plan.lane].append(ticket)
                self._plans[plan.lane].put(plan)
        return ticket

    def serve(self, lane: Lane, run: Callable[[Plan], Result]) -> None:
        """A lane's thread: carries out its plans in order until `close`.

        `run` answers for what can go wrong in a step. What it raises ends the thread, and with it the lane.
        """
        while (plan := self.next(lane)) is not None:
            try:
                result = run(plan)
            except BaseException as error:
                self.end(lane, error)
                raise
            self.post(result)

    def end(self, lane: Lane, error: BaseException) -> None:
        """A lane ends before its time, and nothing of it is under way any more: plans without a result, and those that
        are still to come, fail and say that the lane is gone."""
        with self._lock:
            self._ended[lane] = f"the thread of lane {lane.value} has ended: {type(error).__name__}: {error}"
            for ticket in self._unanswered[lane]:
                self._results.put(self._refusal(ticket))
            self._unanswered[lane].clear()

    def _refusal(self, ticket: Ticket) -> Result:
        return Result(ticket, error=self._ended[ticket.lane], gone=True)

    def next(self, lane: Lane) -> Plan | None:
        """The lane's next plan, when there is one; None when the lane should end."""
        return self._plans[lane].get()

    def waiting(self, lane: Lane) -> bool:
        """Whether `next` would not wait."""
        return not self._plans[lane].empty()

    def post(self, result: Result) -> None:
        with self._lock:
            unanswered = self._unanswered[result.ticket.lane]
            if result.ticket in unanswered:
                unanswered.remove(result.ticket)
                self._results.put(result)

    def poll(self, timeout: float | None) -> list[Result]:
        """As Device.poll."""
        if self.closing:
            timeout = 0.0  # the lanes have ended, so what is there is all
        try:
            found = [self._results.get(timeout=timeout)]
        except Empty:
            return []
        while not self._results.empty():  # no other thread takes any
            found.append(self._results.get_nowait())
        return [result for result in found if result is not None]

    def wake(self) -> None:
        self._results.put(None)

    def stop(self, lane: Lane) -> None:
        """What was submitted stays in line; after it, the lane is told to end."""
        self._plans[lane].put(None)

    def close(self) -> None:
        """Stops all lanes, and takes no more plans."""
        self.closing = True
        for lane in self._plans:
            self.stop(lane)
