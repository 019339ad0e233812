"""What came of a load run: one record for each request, and the figures made of them. Pure functions.

All times are seconds. The definitions are the field's usual ones:

* TTFT: from sending a request to the first chunk of its stream that carries text.
* TPOT: (last - first chunk with text) / (output tokens - 1), one value for each request of two tokens or more.
* ITL: the gaps between consecutive chunks with text, of all requests together. A server that sends several tokens in
  one chunk has fewer and longer gaps; its TPOT is right all the same.
* E2E: from sending a request to the end of its stream.
* Throughput: what completed requests read and wrote, over the time from the first sending to the last end.
* Goodput: completed requests that met every target, over the same time.

Output tokens are those of the server's usage, or the chunks with text where it sends none. Failed requests count in no
figure but their own number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Times are seconds after the start of the run.

    due: when it was meant to be sent. first, last: first and last chunk with text; None when none came.
    gaps: between consecutive chunks with text. error: why it failed, None when it completed.
    """

    due: float
    sent: float
    first: float | None
    last: float | None
    ended: float
    input_tokens: int
    output_tokens: int
    gaps: tuple[float, ...] = ()
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.sent

    @property
    def tpot(self) -> float | None:
        if self.first is None or self.last is None or self.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        return self.ended - self.sent


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles (linear between ranks) of `count` values; all NaN when there are none."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets in seconds; None: no target. A request without a TPOT (one token) meets that target."""

    ttft: float | None = None
    tpot: float | None = None

    def met_by(self, record: Record) -> bool:
        return (
            record.error is None
            and (self.ttft is None or (record.ttft is not None and record.ttft <= self.ttft))
            and (self.tpot is None or record.tpot is None or record.tpot <= self.tpot)
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a run; see the module's definitions. lag: how much later than due requests were sent.

    errors: (reason, how often), most frequent first. goodput: requests/s; attainment: the share of all requests that
    met the targets; both None when no target was given.
    """

    completed: int
    failed: int
    duration: float
    input_tokens: int
    output_tokens: int
    request_throughput: float
    input_throughput: float
    output_throughput: float
    peak_concurrency: int
    ttft: Spread
    tpot: Spread
    itl: Spread
    e2e: Spread
    lag: Spread
    errors: tuple[tuple[str, int], ...]
    goodput: float | None = None
    attainment: float | None = None


def spread(values: Iterable[float]) -> Spread:
    drawn = np.fromiter(values, dtype=np.float64)
    if not drawn.size:
        return Spread(0, *[math.nan] * 5)
    p50, p90, p99 = np.percentile(drawn, PERCENTILES).tolist()
    return Spread(int(drawn.size), float(drawn.mean()), p50, p90, p99, float(drawn.max()))


def summarise(records: Sequence[Record], slo: Slo | None = None) -> Summary:
    """The figures of at least one record."""
    good = [record for record in records if record.error is None]
    duration = max(record.ended for record in records) - min(record.sent for record in records)
    length = max(duration, 1e-9)
    read, written = sum(record.input_tokens for record in good), sum(record.output_tokens for record in good)
    met = None if slo is None else sum(slo.met_by(record) for record in records)
    return Summary(
        completed=len(good),
        failed=len(records) - len(good),
        duration=duration,
        input_tokens=read,
        output_tokens=written,
        request_throughput=len(good) / length,
        input_throughput=read / length,
        output_throughput=written / length,
        peak_concurrency=peak_concurrency(records),
        ttft=spread(record.ttft for record in good if record.ttft is not None),
        tpot=spread(record.tpot for record in good if record.tpot is not None),
        itl=spread(gap for record in good for gap in record.gaps),
        e2e=spread(record.e2e for record in good),
        lag=spread(record.sent - record.due for record in records),
        errors=tuple(Counter(record.error for record in records if record.error is not None).most_common()),
        goodput=None if met is None else met / length,
        attainment=None if met is None else met / len(records),
    )


def peak_concurrency(records: Sequence[Record]) -> int:
    """Most requests that were under way at one moment; one that ends as another is sent is not under way with it."""
    changes = sorted([(record.sent, 1) for record in records] + [(record.ended, -1) for record in records])
    peak = under_way = 0
    for _, change in changes:
        under_way += change
        peak = max(peak, under_way)
    return peak
