"""Plans on their way to the lanes of a device, and results on their way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue

from weft.core.plan import Lane, Plan, Result, Ticket
from weft.errors import DeviceError

CLOSED = "the device is closed"


class Queues:
    """The engine's thread calls submit, poll and close; each lane has a thread that calls `serve` or `next`; `post` and
    `wake` may come from any thread."""

    def __init__(self, lanes: Iterable[Lane]) -> None:
        self._plans: dict[Lane, SimpleQueue[Plan | None]] = {lane: SimpleQueue() for lane in lanes}
        self._results: SimpleQueue[Result | None] = SimpleQueue()  # None: somebody called wake()
        self._ended: dict[Lane, str] = {}  # lanes whose threads have ended before their time, and why
        self.closing = False

    def submit(self, plan: Plan) -> Ticket:
        """Raises DeviceError for a lane that is not there, and after `close`."""
        if plan.lane not in self._plans:
            raise DeviceError(f"a plan for lane {plan.lane.value}; this device has {', '.join(self._plans)}")
        if self.closing:
            raise DeviceError(CLOSED)
        self._plans[plan.lane].put(plan)
        if plan.lane in self._ended:  # nobody else is going to
            self._refuse(plan.lane)
        return Ticket(plan.step, plan.lane)

    def serve(self, lane: Lane, run: Callable[[Plan], Result]) -> None:
        """A lane's thread: carries out its plans in order until `close`.

        `run` answers for what can go wrong in a step. What it raises ends the thread, but no plan without a result: the
        one under way, those in line and those that are still to come fail, and say that the lane is gone.
        """
        while (plan := self.next(lane)) is not None:
            try:
                result = run(plan)
            except BaseException as error:
                self._ended[lane] = f"the thread of lane {lane.value} has ended: {type(error).__name__}: {error}"
                self.post(self._refusal(plan))
                self._refuse(lane)
                raise
            self.post(result)

    def _refuse(self, lane: Lane) -> None:
        """All that is in line. Both the lane's thread and the engine's may be here: each plan goes to one of them."""
        try:
            while (plan := self._plans[lane].get_nowait()) is not None:
                self.post(self._refusal(plan))
        except Empty:
            return

    def _refusal(self, plan: Plan) -> Result:
        return Result(Ticket(plan.step, plan.lane), error=self._ended[plan.lane], gone=True)

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
        try:
            found = [self._results.get(timeout=timeout)]
        except Empty:
            return []
        while not self._results.empty():  # no other thread takes any
            found.append(self._results.get_nowait())
        return [result for result in found if result is not None]

    def wake(self) -> None:
        self._results.put(None)

    def close(self) -> None:
        """What was submitted stays in line; after it, each lane is told to end."""
        self.closing = True
        for plans in self._plans.values():
            plans.put(None)
