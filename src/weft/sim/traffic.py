"""What arrives at a simulated fleet: recorded traces, drawn loads, and mixes of clients, as streams of (time, size).

A stream is an iterator in order of arrival, from 0 on, made as it is read: a day of traffic takes no memory. Everything
random is drawn from one numpy generator, so that a seed fixes the whole run.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from weft.bench.traces import Row, Size, stretched

# Token ids of simulated prompts: only whether two are equal means anything, so there may be very many.
VOCABULARY = 2**40
# Gaps and sizes that are drawn at a time.
DRAWN = 1024


def prompt(size: Size, number: int) -> tuple[int, ...]:
    """Token ids for the prompt of request `number`: blocks that it names alike are alike, and nothing else is.

    Zero stays free: it is what the simulated device draws.
    """
    if not size.hashes:
        return (2 * number + 2,) * size.input
    named = size.hashes[: -(-size.input // size.block)]
    tokens = tuple(itertools.chain.from_iterable((2 * name + 1,) * size.block for name in named))
    return (tokens + (2 * number + 2,) * (size.input - len(tokens)))[: size.input]


# -- traces ----------------------------------------------------------------------------------------------------------


def period(rows: Sequence[Row]) -> float:
    """Seconds after which a trace begins anew when it is repeated: its span, and one mean gap."""
    span = rows[-1][0] - rows[0][0]
    return span * len(rows) / (len(rows) - 1) if span > 0 else 1.0


def repeated(rows: Sequence[Row], start: float = 0.0) -> Iterator[Row]:
    """A trace again and again, without end, from `start` seconds into it (round and round)."""
    first, length = rows[0][0], period(rows)
    start %= length
    for turn in itertools.count():
        for arrival, size in rows:
            at = turn * length + arrival - first - start
            if at >= 0:
                yield at, size


def copies(rows: Sequence[Row], count: int, rng: np.random.Generator) -> Iterator[Row]:
    """A trace `count` times at once, each copy from a place of its own: the load of as many such services. Bursts of
    single copies level out, as those of independent services do; and prompts share blocks within a copy only."""
    starts = rng.uniform(0.0, period(rows), count).tolist()
    each = [_renamed(repeated(rows, start), number, count) for number, start in enumerate(starts)]
    return heapq.merge(*each, key=lambda row: row[0])


def _renamed(traffic: Iterable[Row], number: int, count: int) -> Iterator[Row]:
    """Copy `number` of `count`, whose prompts name blocks of their own."""
    for at, size in traffic:
        if size.hashes:
            size = replace(size, hashes=tuple([name * count + number for name in size.hashes]))
        yield at, size


def faster(traffic: Iterable[Row], factor: float) -> Iterator[Row]:
    """The same requests, `factor` times as fast."""
    return ((at / factor, size) for at, size in traffic)


def resized(traffic: Iterable[Row], input_scale: float, output_scale: float) -> Iterator[Row]:
    """Lengths times a factor, at least 1."""
    return ((at, stretched(size, input_scale, output_scale)) for at, size in traffic)


def clipped(traffic: Iterable[Row], longest: int) -> Iterator[Row]:
    """Prompts and answers that fit a context of so many tokens: the answer is cut first, down to one token."""
    for at, size in traffic:
        read = min(size.input, longest - 1)
        yield at, replace(size, input=read, output=min(size.output, longest - read))


def until(traffic: Iterable[Row], seconds: float) -> Iterator[Row]:
    """What arrives before `seconds`."""
    return itertools.takewhile(lambda row: row[0] < seconds, traffic)


def every(traffic: Iterable[Row], count: int) -> Iterator[Row]:
    """Every count-th request: what one of `count` replicas gets from a router that goes round."""
    return itertools.islice(traffic, 0, None, count)


def shaped(traffic: Iterable[Row], factors: Sequence[float], length: float) -> Iterator[Row]:
    """A rate that changes with the time of day: times factors[0] for `length` seconds, then factors[1], and round.

    Time is stretched, so requests are neither lost nor added, and bursts stay bursts.
    """
    left, at, seen = length * factors[0], 0.0, 0.0
    parts = itertools.cycle(factors)
    factor = next(parts)
    for when, size in traffic:
        step = when - seen  # seconds of the stream as it was
        seen = when
        while step >= left:
            step -= left
            at += left / factor if factor else length
            factor = next(parts)
            left = length * factor
        left -= step
        at += step / factor
        yield at, size


# -- drawn -----------------------------------------------------------------------------------------------------------


def renewal(rate: float, burstiness: float, sizes: Iterable[Size], rng: np.random.Generator) -> Iterator[Row]:
    """Gamma-distributed gaps of mean 1 / rate. burstiness: see bench.traffic.arrivals; 1 is a Poisson process."""
    at = 0.0
    for group in _batched(sizes):
        for gap, size in zip(rng.gamma(burstiness, 1.0 / (rate * burstiness), len(group)).tolist(), group, strict=True):
            at += gap
            yield at, size


def drawn(sizes: Sequence[Size], rng: np.random.Generator) -> Iterator[Size]:
    """Sizes of a trace in random order, without end: its lengths without its times."""
    while True:
        for index in rng.integers(0, len(sizes), DRAWN).tolist():
            yield sizes[index]


def uniform(input_len: int, output_len: int, ratio: float, rng: np.random.Generator) -> Iterator[Size]:
    """Lengths drawn evenly from [length * (1 - ratio), length * (1 + ratio)], at least 1 each, without end."""

    def draw(length: int) -> list[int]:
        low = max(1, math.floor(length * (1 - ratio)))
        numbers: list[int] = rng.integers(low, max(low, math.ceil(length * (1 + ratio))), DRAWN, endpoint=True).tolist()
        return numbers

    while True:
        yield from map(Size, draw(input_len), draw(output_len))


def clients(each: Sequence[Sequence[Row]], rate: float, rng: np.random.Generator) -> Iterator[Row]:
    """A mix of clients, in the manner of ServeGen: each has its own part of the rate, its own burstiness, and its own
    lengths, which are drawn from what it sent.

    each: the rows of every client. rate: requests/s of all together.
    """
    total = sum(len(rows) for rows in each)
    parts = [
        renewal(rate * len(rows) / total, burstiness(rows), drawn([size for _, size in rows], generator), generator)
        for rows, generator in zip(each, rng.spawn(len(each)), strict=True)
    ]
    return heapq.merge(*parts, key=lambda row: row[0])


def burstiness(rows: Sequence[Row]) -> float:
    """Shape of the gamma distribution whose gaps vary as those of the rows do, within [0.01, 100]; 1 where there are
    too few to tell."""
    gaps = np.diff([at for at, _ in rows])
    if len(gaps) < 8 or not gaps.mean() > 0:
        return 1.0
    return float(min(100.0, max(0.01, (gaps.mean() / max(gaps.std(), 1e-12)) ** 2)))


def _batched(sizes: Iterable[Size]) -> Iterator[tuple[Size, ...]]:
    source = iter(sizes)
    while group := tuple(itertools.islice(source, DRAWN)):
        yield group
