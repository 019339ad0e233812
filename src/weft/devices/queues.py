"""Plans on their way to the lanes of a device, and results on their way back."""

from __future__ import annotations

from collections.abc import Iterable
from queue import Empty, SimpleQueue

from weft.core.plan import Lane, Plan, Result, Ticket
from weft.errors import DeviceError

CLOSED = "the device is closed"


class Queues:
    """The engine's thread calls submit, poll and close; each lane has a thread that calls `next`; `post` and `wake` may
    come from any thread."""

    def __init__(self, lanes: Iterable[Lane]) -> None:
        self._plans: dict[Lane, SimpleQueue[Plan | None]] = {lane: SimpleQueue() for lane in lanes}
        self._results: SimpleQueue[Result | None] = SimpleQueue()  # None: somebody called wake()
        self.closing = False

    def submit(self, plan: Plan) -> Ticket:
        """Raises DeviceError for a lane that is not there, and after `close`."""
        if plan.lane not in self._plans:
            raise DeviceError(f"a plan for lane {plan.lane.value}; this device has {', '.join(self._plans)}")
        if self.closing:
            raise DeviceError(CLOSED)
        self._plans[plan.lane].put(plan)
        return Ticket(plan.step, plan.lane)

    def next(self, lane: Lane) -> Plan | None:
        """The lane's next plan, when there is one; None when the lane should end."""
        return self._plans[lane].get()

    def waiting(self, lane: Lane) -> bool:
        """Whether `next` would not wait."""
        return not self._plans[lane].empty()

    def post(self, result: Result) -> None:
        self._results.put(result)

    def poll(self, timeout: float | None) -> list[Result]:
        """As Device.poll."""
        if self.closing:
            timeout = 0.0  # the lanes have ended, so what is there is all
        found: list[Result] = []
        try:
            result = self._results.get(timeout=timeout)
            while True:
                if result is not None:
                    found.append(result)
                result = self._results.get_nowait()
        except Empty:
            return found

    def wake(self) -> None:
        self._results.put(None)

    def close(self) -> None:
        """What was submitted stays in line; after it, each lane is told to end."""
        self.closing = True
        for plans in self._plans.values():
            plans.put(None)
