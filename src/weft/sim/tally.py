"""Figures of a simulated run, kept as it goes: memory does not grow with the number of requests.

The definitions are those of bench/stats.py. A percentile comes from a histogram with buckets that grow by one percent,
so it is off by half a percent at most (the idea of DDSketch, Masson et al., VLDB 2019).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from weft.bench.stats import PERCENTILES, Record, Slo, Spread
from weft.core.plan import Lane
from weft.sim.replica import State

GROWTH = 1.01
# Values below this many seconds are one bucket.
LEAST = 1e-7


class Sketch:
    """How non-negative values are distributed."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.least, self.most = math.inf, 0.0
        self._buckets: Counter[int] = Counter()
        self._scale = 1.0 / math.log(GROWTH)

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.least, self.most = min(self.least, value), max(self.most, value)
        self._buckets[math.floor(math.log(max(value, LEAST)) * self._scale)] += 1

    def quantile(self, part: float) -> float:
        """The least value that at least this part of the values does not exceed; NaN when there are none."""
        if not self.count:
            return math.nan
        rank, seen = part * self.count, 0
        for bucket, count in sorted(self._buckets.items()):
            seen += count
            if seen >= rank:
                return min(max(self._middle(bucket), self.least), self.most)
        return self.most

    def curve(self) -> tuple[list[float], list[float]]:
        """The distribution for a picture: values, and the parts that do not exceed them."""
        values, parts, seen = [], [], 0
        for bucket, count in sorted(self._buckets.items()):
            seen += count
            values.append(self._middle(bucket))
            parts.append(seen / self.count)
        return values, parts

    def spread(self) -> Spread:
        if not self.count:
            return Spread(0, *[math.nan] * 5)
        p50, p90, p99 = (self.quantile(one / 100) for one in PERCENTILES)
        return Spread(self.count, self.total / self.count, p50, p90, p99, self.most)

    @staticmethod
    def _middle(bucket: int) -> float:
        return math.pow(GROWTH, bucket + 0.5)


@dataclass(frozen=True, slots=True)
class Totals:
    """What a run comes to. Seconds of virtual time; throughputs and goodput per second of it.

    attainment: the part of all requests, refused ones too, that met the targets. errors: (code, how often).
    """

    completed: int
    failed: int
    seconds: float
    input_tokens: int
    output_tokens: int
    goodput: float
    attainment: float
    ttft: Spread
    tpot: Spread
    e2e: Spread
    errors: tuple[tuple[str, int], ...]

    @property
    def request_rate(self) -> float:
        return self.completed / max(self.seconds, 1e-9)

    @property
    def output_rate(self) -> float:
        return self.output_tokens / max(self.seconds, 1e-9)


class Tally:
    """Told of each request as it ends. warm_up: those that came before so many seconds are left out."""

    def __init__(self, slo: Slo, warm_up: float = 0.0) -> None:
        self.ttft, self.tpot, self.e2e = Sketch(), Sketch(), Sketch()
        self._slo = slo
        self._warm_up = warm_up
        self._completed = self._met = self._input = self._output = 0
        self._errors: Counter[str] = Counter()
        self._first, self._last = math.inf, 0.0

    def __call__(self, record: Record) -> None:
        if record.sent < self._warm_up:
            return
        self._first, self._last = min(self._first, record.sent), max(self._last, record.ended)
        if record.error is not None:
            self._errors[record.error] += 1
            return
        self._completed += 1
        self._input += record.input_tokens
        self._output += record.output_tokens
        self._met += self._slo.met_by(record)
        self.e2e.add(record.e2e)
        for sketch, value in ((self.ttft, record.ttft), (self.tpot, record.tpot)):
            if value is not None:
                sketch.add(value)

    def totals(self) -> Totals:
        failed = self._errors.total()
        seconds = max(0.0, self._last - self._first) if self._completed + failed else 0.0
        return Totals(
            completed=self._completed,
            failed=failed,
            seconds=seconds,
            input_tokens=self._input,
            output_tokens=self._output,
            goodput=self._met / max(seconds, 1e-9),
            attainment=self._met / max(self._completed + failed, 1),
            ttft=self.ttft.spread(),
            tpot=self.tpot.spread(),
            e2e=self.e2e.spread(),
            errors=tuple(self._errors.most_common()),
        )


class Timeline:
    """What the replicas looked like, some hundred times in a run: means over all of them.

    share: of the device that each lane has. busy: the part of the time since the last look in which it computed.
    kv, cached: the parts of the KV pool that requests hold, and that only the prefix cache knows. running, waiting:
    sequences in all.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.at = array("d")
        self.share = {lane: array("d") for lane in lanes}
        self.busy = {lane: array("d") for lane in lanes}
        self.kv, self.cached = array("d"), array("d")
        self.running, self.waiting = array("d"), array("d")
        self._before: dict[Lane, float] = {}

    def look(self, states: Sequence[State], shares: int, now: float) -> None:
        """states: of every replica. shares: that the lanes of each divide."""
        passed = now - (self.at[-1] if self.at else 0.0)
        self.at.append(now)
        for lane in self.share:
            own = [(one.share / shares, one.busy) for found in states for one in found.lanes if one.lane == lane.value]
            busy = sum(seconds for _, seconds in own)
            since = max(0.0, busy - self._before.get(lane, 0.0))  # less where a replica was lost
            self.share[lane].append(sum(share for share, _ in own) / max(len(own), 1))
            self.busy[lane].append(since / (passed * len(own)) if passed > 0 and own else 0.0)
            self._spread(self.busy[lane])
            self._before[lane] = busy
        used = sum(one.used for one in states)
        totals = used + sum(one.free + one.cached for one in states)
        self.kv.append(used / totals)
        self.cached.append(sum(one.cached for one in states) / totals)
        self.running.append(sum(one.running for one in states))
        self.waiting.append(sum(one.waiting for one in states))

    def _spread(self, busy: array[float]) -> None:
        """A step counts when it ends. What is more than there was time for since the look before was done before it."""
        for index in range(len(busy) - 1, 0, -1):
            if busy[index] <= 1.0:
                return
            own = self.at[index] - self.at[index - 1]
            before = self.at[index - 1] - (self.at[index - 2] if index > 1 else 0.0)
            busy[index - 1] += (busy[index] - 1.0) * own / before
            busy[index] = 1.0
