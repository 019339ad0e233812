"""Virtual time: replicas behind a router, one heap of what happens next.

Every replica is an engine of its own with a clock of its own, which is never ahead of the fleet's; what happens next
anywhere is done next. Nothing is kept of a request that has ended but what is told to `on_end`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from weft.bench.stats import Record
from weft.bench.traces import Row, Size
from weft.core.request import Event, Finish, RequestEnd
from weft.errors import DeviceError, InvalidRequest, QueueFull
from weft.sim.replica import Replica, Setup
from weft.sim.router import Router
from weft.sim.traffic import prompt


@dataclass(slots=True)
class Job:
    """A request under way. number: in order of arrival. index: the replica that has it. done: tokens that the client
    got from replicas that failed, or from the one that prefilled; first: when it got the first of them."""

    number: int
    arrived: float
    size: Size
    index: int = -1
    done: int = 0
    first: float | None = None
    prefill_only: bool = False


@dataclass(frozen=True, slots=True)
class Transfer:
    """KV on its way from a prefill to a decode replica. Each prefill replica sends one after the other.

    bytes_per_token: of keys and values. bandwidth: bytes/s. latency: seconds of each.
    """

    bytes_per_token: float
    bandwidth: float
    latency: float = 0.0

    def seconds(self, tokens: int) -> float:
        return self.latency + tokens * self.bytes_per_token / self.bandwidth


class Simulation:
    """setups: one for each replica. on_end: told of each request when it ends, well or not.

    Prefill and decode on replicas of their own (PD disaggregation) where `decode` is given: a router over the setups
    that decode, which get the KV by `transfer`; `router` is then one over those that prefill.
    """

    def __init__(
        self,
        setups: list[Setup],
        router: Router,
        on_end: Callable[[Record], None],
        *,
        decode: Router | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        self.now = 0.0
        self.replicas = [Replica(setup) for setup in setups]
        self.retried = 0
        self.lost: list[Replica] = []  # those that failed
        self._setups = setups
        self._router = router
        self._decode = decode
        self._transfer = transfer
        self._on_end = on_end
        self._numbers = itertools.count()
        self._jobs: dict[str, Job] = {}
        self._links = [0.0] * len(setups)  # when each replica's link is free
        self._due = [math.inf] * len(setups)
        self._ends: list[tuple[float, int]] = []
        self._timers: list[tuple[float, int, Callable[[float], None]]] = []
        self._timer_numbers = itertools.count()

    def at(self, when: float, action: Callable[[float], None]) -> None:
        """Do something at a time, which it is told; dropped if everything has ended by then."""
        heapq.heappush(self._timers, (when, next(self._timer_numbers), action))

    def run(self, traffic: Iterable[Row]) -> None:
        """Until every request has ended. Raises DeviceError when some never can."""
        arrivals = iter(traffic)
        upcoming = next(arrivals, None)
        while upcoming is not None or self._jobs:
            arrival = math.inf if upcoming is None else upcoming[0]
            timer = self._timers[0][0] if self._timers else math.inf
            end = self._next_end()
            if end <= arrival and end <= timer and end < math.inf:
                self.now = end
                self._step(heapq.heappop(self._ends)[1])
            elif timer <= arrival and timer < math.inf:
                self.now, _, action = heapq.heappop(self._timers)
                action(self.now)
            elif upcoming is not None:
                self.now = max(self.now, arrival)
                self._place(Job(next(self._numbers), self.now, upcoming[1]))
                upcoming = next(arrivals, None)
            else:
                raise DeviceError(f"{len(self._jobs)} requests are under way, and no step that could end them")

    def fail(self, indices: Iterable[int], repair: float) -> None:
        """Replicas are gone at once, with their KV, for `repair` seconds. What they had goes on elsewhere: each prompt
        is computed again, with the tokens that the client has got."""
        lost: list[Job] = []
        for index in indices:
            router = self._router_of(index)
            for one in self.replicas[index].under_way():
                job = self._jobs.pop(one.live.request.id)
                router.ended(index, job.number)
                job.first = one.live.first_token if job.first is None else job.first
                job.done += one.live.generated
                lost.append(job)
            self.lost.append(self.replicas[index])
            self.replicas[index] = Replica(self._setups[index], self.now)
            self._due[index] = math.inf
            router.down(index)
            self.at(self.now + repair, lambda _, router=router, index=index: router.up(index))  # type: ignore[misc]
        self.retried += len(lost)
        for job in lost:
            self._place(job)

    # -- requests --------------------------------------------------------------------------------------------------

    def _place(self, job: Job) -> None:
        """Give a request to a replica, which may refuse it."""
        router = self._router
        job.prefill_only = self._decode is not None and job.done == 0
        if self._decode is not None and not job.prefill_only:
            router = self._decode
        job.index = router.choose(job.number, job.size)
        left = 1 if job.prefill_only else max(1, job.size.output - job.done)
        tokens = prompt(job.size, job.number) + (0,) * job.done
        name = str(job.number)
        self._jobs[name] = job
        try:
            events = self.replicas[job.index].submit(name, tokens, left, self.now)
        except (InvalidRequest, QueueFull) as error:
            del self._jobs[name]
            router.ended(job.index, job.number)
            self._tell(job, None, error.code)
            return
        self._hear(job.index, events)
        self._touch(job.index)

    def _step(self, index: int) -> None:
        replica = self.replicas[index]
        self._hear(index, replica.step())
        end = self._due[index] = replica.device.next_end
        if end < math.inf:
            heapq.heappush(self._ends, (end, index))

    def _hear(self, index: int, events: list[Event]) -> None:
        for event in events:
            if type(event) is RequestEnd:
                self._ended(index, event)

    def _ended(self, index: int, end: RequestEnd) -> None:
        job = self._jobs.pop(end.request)
        self._router_of(index).ended(index, job.number)
        if job.first is None:
            job.first = end.timing.first_token
        job.done += end.generated_tokens
        if end.reason is not Finish.LENGTH:
            self._tell(job, job.first, end.code)
        elif job.prefill_only and job.size.output > 1:
            self._send(job)
        else:
            self._tell(job, job.first, None)

    def _send(self, job: Job) -> None:
        """From prefill to decode: the request counts as under way meanwhile."""
        if self._transfer is None:
            raise DeviceError("prefill and decode are on replicas of their own, and no link joins them")
        begins = max(self.now, self._links[job.index])
        ends = self._links[job.index] = begins + self._transfer.seconds(job.size.input)
        self._jobs[str(job.number)] = job
        self.at(ends, lambda _: self._place(job))

    def _tell(self, job: Job, first: float | None, error: str | None) -> None:
        got = first is not None
        self._on_end(
            Record(
                due=job.arrived,
                sent=job.arrived,
                first=first,
                last=self.now if got else None,
                ended=self.now,
                input_tokens=job.size.input,
                output_tokens=job.done,
                error=error,
            )
        )

    def _router_of(self, index: int) -> Router:
        return self._router if self._decode is None or self._router.has(index) else self._decode

    # -- what happens next -----------------------------------------------------------------------------------------

    def _touch(self, index: int) -> None:
        """A replica's next end may have moved. An entry of the heap that is not what is due is no longer true."""
        end = self.replicas[index].device.next_end
        if end != self._due[index]:
            self._due[index] = end
            if end < math.inf:
                heapq.heappush(self._ends, (end, index))

    def _next_end(self) -> float:
        while self._ends and self._due[self._ends[0][1]] != self._ends[0][0]:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else math.inf
