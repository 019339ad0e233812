"""A simulated device in virtual time: hours of serving in seconds, and the same every time.

`poll` moves the clock to the next result instead of waiting for it. Where two lanes overlap for part of a step, each
goes at the pace that the cost model gives it beside the other for just that part. The engine has to be given `clock`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from weft.core.plan import Capacity, Lane, Partition, Plan, Result, Ticket
from weft.devices.cost import FREE, CostModel
from weft.devices.modelless import Modelless
from weft.devices.oracle import Faults
from weft.errors import DeviceError


@dataclass(slots=True)
class Job:
    """A step under way. left: the part of it that is still to be done. share: the lane's when it began."""

    plan: Plan
    began: float
    share: float
    left: float = 1.0


class VirtualDevice(Modelless):
    """partition: the shares of each lane; None for one mixed lane. Faults other than failed and nan are not for it."""

    def __init__(
        self,
        capacity: Capacity,
        partition: Partition | None = None,
        *,
        cost: CostModel = FREE,
        faults: Faults | None = None,
    ) -> None:
        super().__init__(capacity, partition, faults)
        self._cost = cost
        self._plans: dict[Lane, deque[Plan]] = {lane: deque() for lane in self._lanes}
        self._jobs: dict[Lane, Job] = {}
        self._results: list[Result] = []
        self._woken = False
        self._now = 0.0

    def clock(self) -> float:
        return self._now

    def submit(self, plan: Plan) -> Ticket:
        self._plans[plan.lane].append(plan)
        self._start(plan.lane)
        return Ticket(plan.step, plan.lane)

    def poll(self, timeout: float | None) -> list[Result]:
        """Lets time pass until a result comes, or `timeout` seconds. Raises DeviceError when none can ever come."""
        end = math.inf if timeout is None else self._now + timeout
        while not self._results and not self._woken and self._now < end:
            if not self._jobs and math.isinf(end):
                raise DeviceError("nothing is under way, so no time can pass")
            self._advance(end)
        found, self._results, self._woken = self._results, [], False
        return found

    def wake(self) -> None:
        self._woken = True

    def close(self) -> None:
        """Nothing to free."""

    def _start(self, lane: Lane) -> None:
        if lane in self._jobs or not self._plans[lane]:
            return
        self._jobs[lane] = Job(self._plans[lane].popleft(), self._now, self._share(lane))

    def _advance(self, end: float) -> None:
        """To the next end of a step, or to `end`: nothing else changes how fast the lanes go."""
        seconds = {lane: self._seconds(lane, job) for lane, job in self._jobs.items()}
        ends = {lane: self._now + job.left * seconds[lane] for lane, job in self._jobs.items()}
        before, then = self._now, min([end, *ends.values()])
        self._now = then
        for lane, job in list(self._jobs.items()):
            if ends[lane] <= then:
                del self._jobs[lane]
                self._results.append(self._executor.run(job.plan, then - job.began))
                self._start(lane)
            else:
                job.left -= (then - before) / seconds[lane]

    def _seconds(self, lane: Lane, job: Job) -> float:
        """Of the whole step, at the pace of this moment."""
        # Phases with pools of their own have devices of their own.
        alone = self.capacity().decode_blocks > 0
        rival = 0.0 if alone else sum(other.share for name, other in self._jobs.items() if name is not lane)
        return self._cost.seconds(job.plan, job.share, rival)
