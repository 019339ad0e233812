"""A simulated device in virtual time: hours of serving in seconds, and the same every time.

`poll` moves the clock to the next result instead of waiting for it. Where two lanes overlap for part of a step, each
goes at the pace that the cost model gives it beside the other for just that part. The engine has to be given `clock`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from weft.core.plan import Capacity, Lane, Partition, Plan, Result, Ticket
from weft.devices.cost import FREE
from weft.devices.modelless import Modelless
from weft.devices.oracle import Faults, Lengths
from weft.errors import DeviceError


class Cost(Protocol):
    """How long a step takes: a pure function, so that a step whose surroundings have not changed is not asked about
    again."""

    def seconds(self, plan: Plan, share: float = 1.0, rival: float = 0.0) -> float:
        """Of the whole step. share: the lane's part of the device, in (0, 1]. rival: that of a lane which computes
        beside it, or 0."""
        ...

    def repeated(self, plan: Plan) -> list[float]:
        """Of each of the times that a plan is carried out, on the whole device and alone."""
        ...


@dataclass(slots=True)
class Job:
    """A step under way. share: the lane's when it began. At the pace of `since` it takes `seconds` in all, of which the
    part `left` was still to be done then, so that it ends at `ends`. rival: what that pace was made for. times: when
    each time ends that the plan is carried out, where it is repeated."""

    plan: Plan
    began: float
    share: float
    since: float
    rival: float = -1.0
    seconds: float = 0.0
    left: float = 1.0
    ends: float = math.inf
    times: list[float] = field(default_factory=list)

    @property
    def last_begins(self) -> float:
        """When the last time begins that the plan is carried out."""
        return self.times[-2] if len(self.times) > 1 else self.began


class VirtualDevice(Modelless):
    """partition: the shares of each lane; None for one mixed lane. Faults other than failed and nan are not for it.
    lengths: computes no tokens, so that only their number means something (see oracle.Lengths); takes no faults. Only
    then, and with one lane, can a plan be repeated."""

    def __init__(
        self,
        capacity: Capacity,
        partition: Partition | None = None,
        *,
        cost: Cost = FREE,
        faults: Faults | None = None,
        lengths: bool = False,
    ) -> None:
        self._lengths = Lengths(capacity) if lengths else None
        super().__init__(capacity, partition, faults, self._lengths)
        if capacity.repeats > 1 and (self._lengths is None or partition is not None):
            raise DeviceError("only a device that has one lane and computes no tokens can carry out a plan repeatedly")
        self._cost = cost
        self._plans: dict[Lane, deque[Plan]] = {lane: deque() for lane in self._lanes}
        self._jobs: dict[Lane, Job] = {}
        self._paced = True
        self._end = math.inf  # the earliest of the jobs', at their present paces
        self._results: list[Result] = []
        self._woken = False
        self._now = 0.0

    def clock(self) -> float:
        return self._now

    @property
    def next_end(self) -> float:
        """When the next result comes if nothing is submitted until then; infinite when nothing is under way."""
        if self._results:
            return self._now
        self._pace()
        return self._end

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

    def pass_until(self, end: float) -> None:
        """Lets time pass up to `end`, for something that comes from outside then. Results wait for the next poll."""
        while self._now < end:
            self._advance(end)

    def job(self, lane: Lane) -> Job | None:
        """What is under way."""
        self._pace()
        return self._jobs.get(lane)

    def cut(self, end: float, under_way: bool) -> None:
        """A plan that is repeated ends with the last time that has ended by `end`; under_way: with the one after it.
        One that has not been carried out by then goes on as it is."""
        self._pace()
        for job in self._jobs.values():
            count = bisect_right(job.times, end) + under_way
            if 0 < count < len(job.times):
                del job.times[count:]
                job.ends = job.times[-1]
                self._paced = False

    def wake(self) -> None:
        self._woken = True

    def close(self) -> None:
        """Nothing to free."""

    def _start(self, lane: Lane) -> None:
        if lane in self._jobs or not self._plans[lane]:
            return
        self._jobs[lane] = Job(self._plans[lane].popleft(), self._now, self._share(lane), self._now)
        self._paced = False

    def _advance(self, end: float) -> None:
        """To the next end of a step, or to `end`: nothing else changes how fast the lanes go."""
        self._pace()
        if end < self._end:
            self._now = end
            return
        self._now = now = self._end
        for lane in [lane for lane, job in self._jobs.items() if job.ends <= now]:
            job = self._jobs.pop(lane)
            self._paced = False
            self._results.append(self._run(job, now - job.began))
            self._start(lane)

    def _run(self, job: Job, seconds: float) -> Result:
        if self._lengths is not None and job.times:
            return self._lengths.run(job.plan, seconds, len(job.times))
        return self._executor.run(job.plan, seconds)

    def _pace(self) -> None:
        """How fast each lane goes from now on. A step whose rival is what it was goes on undisturbed."""
        if self._paced:
            return
        self._paced = True
        self._end = math.inf
        # Phases with pools of their own have devices of their own.
        beside = len(self._jobs) > 1 and not self.capacity().decode_blocks
        for lane, job in self._jobs.items():
            rival = sum([other.share for name, other in self._jobs.items() if name is not lane]) if beside else 0.0
            if job.plan.repeats > 1:
                if not job.times:
                    job.times = list(accumulate(self._cost.repeated(job.plan), initial=job.began))[1:]
                    job.ends = job.times[-1]
            elif rival != job.rival:
                job.rival = rival
                self._change(job, self._cost.seconds(job.plan, job.share, rival))
            self._end = min(self._end, job.ends)

    def _change(self, job: Job, seconds: float) -> None:
        """From now on the whole step would take so long."""
        if seconds == job.seconds and job.ends < math.inf:
            return  # exactly as it was, without a rounding
        if job.seconds > 0:
            job.left -= (self._now - job.since) / job.seconds
        job.since, job.seconds = self._now, seconds
        job.ends = self._now + job.left * seconds
