"""Virtual time: replicas behind a router, and what happens next.

Nothing is kept of a request that has ended but what is told to `on_end`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from weft.bench.stats import Record
from weft.bench.traces import Row, Size
from weft.errors import DeviceError
from weft.sim.part import Ended, Placed, Replicas
from weft.sim.router import Router


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
    """on_end: told of each request when it ends, well or not. The replicas are the caller's to close.

    Prefill and decode on replicas of their own (PD disaggregation) where `decode` is given: a router over those
    that decode, which get the KV by `transfer`; `router` is then one over those that prefill.
    """

    def __init__(
        self,
        replicas: Replicas,
        router: Router,
        on_end: Callable[[Record], None],
        *,
        decode: Router | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        self.now = 0.0
        self.replicas = replicas
        self.retried = 0
        self._router = router
        self._decode = decode
        self._transfer = transfer
        self._on_end = on_end
        self._numbers = itertools.count()
        self._jobs: dict[int, Job] = {}
        self._links: dict[int, float] = {}  # when each replica's link is free
        self._down: dict[int, float] = {}  # until when each replica is gone that has failed
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
            ended = self.replicas.advance(min(arrival, timer))
            if ended:
                for one in ended:
                    self.now = one.at
                    self._ended(one)
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
        is computed again, with the tokens that the client has got. One that is gone already is back when both repairs
        are done."""
        indices = list(indices)
        lost: list[Job] = []
        for one in self.replicas.fail(indices, self.now):
            job = self._jobs.pop(one.number)
            self._router_of(job.index).ended(job.index, job.number)
            job.first = one.first if job.first is None else job.first
            job.done += one.tokens
            lost.append(job)
        for index in indices:
            self._router_of(index).down(index)
            back = self.now + repair
            self._down[index] = max(back, self._down.get(index, back))
            self.at(back, partial(self._up, index))
        self.retried += len(lost)
        for job in lost:
            self._place(job)

    def _up(self, index: int, now: float) -> None:
        if now >= self._down[index]:
            self._router_of(index).up(index)

    # -- requests --------------------------------------------------------------------------------------------------

    def _place(self, job: Job) -> None:
        """Give a request to a replica, which may refuse it."""
        router = self._router
        job.prefill_only = self._decode is not None and job.done == 0
        if self._decode is not None and not job.prefill_only:
            router = self._decode
        job.index = router.choose(job.number, job.size)
        left = 1 if job.prefill_only else max(1, job.size.output - job.done)
        self._jobs[job.number] = job
        self.replicas.place(Placed(job.index, self.now, job.number, job.size, left, job.done))

    def _ended(self, ended: Ended) -> None:
        job = self._jobs.pop(ended.number)
        self._router_of(ended.replica).ended(ended.replica, job.number)
        if job.first is None:
            job.first = ended.first
        job.done += ended.tokens
        if ended.error is None and job.prefill_only and job.size.output > 1:
            self._send(job)
        else:
            self._tell(job, ended.error)

    def _send(self, job: Job) -> None:
        """From prefill to decode: the request counts as under way meanwhile."""
        if self._transfer is None:
            raise DeviceError("prefill and decode are on replicas of their own, and no link joins them")
        begins = max(self.now, self._links.get(job.index, 0.0))
        ends = self._links[job.index] = begins + self._transfer.seconds(job.size.input)
        self._jobs[job.number] = job
        self.at(ends, lambda _: self._place(job))

    def _tell(self, job: Job, error: str | None) -> None:
        got = job.first is not None
        self._on_end(
            Record(
                due=job.arrived,
                sent=job.arrived,
                first=job.first,
                last=self.now if got else None,
                ended=self.now,
                input_tokens=job.size.input,
                output_tokens=job.done,
                error=error,
            )
        )

    def _router_of(self, index: int) -> Router:
        return self._router if self._decode is None or self._router.has(index) else self._decode
