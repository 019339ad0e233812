"""The cheapest fleet that meets latency targets: a search over configurations, each tried in the simulator.

For every configuration (GPU, ranks, precision, partition) the fewest replicas that meet the targets are looked for.
What cannot be the answer is not simulated, or not to its end:

* weights and one sequence of full length must fit;
* one request alone must meet the targets, or no number of replicas does; but for TTFT where prompts share beginnings;
* a fleet must have the device time that prompts and answers take at the least: a bound on replicas, and so on the
  price. What is known to cost the least goes on first, and the rest is left out once that is certain;
* a run stops when it has missed a target too often for its percentile to be met.

In the search a replica gets every n-th request, as from a router that goes round; so one engine stands for a fleet.
What is cheapest by that is then confirmed on the whole fleet, behind the router, which may raise or lower its price;
until what is cheapest is confirmed. Where the router goes by prefixes, every n-th request tells nothing of it, and
whole fleets are tried at once.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from weft.bench.stats import Record, Slo
from weft.bench.traces import Row, Size
from weft.core.plan import Lane, Plan, Slice
from weft.errors import ConfigError, ContextTooLong
from weft.sim.replica import Setup
from weft.sim.study import Fleet, study
from weft.sim.tally import GROWTH, Totals
from weft.sim.traffic import every

# Requests of which one alone is tried.
ALONE = 20
# What is said of a configuration that one replica is enough of.
ONE = "takes 1 replica at the least"


@dataclass(frozen=True, slots=True)
class Targets:
    """percentile: the part of the requests, in percent, that must meet each target (seconds; None: no target)."""

    ttft: float | None
    tpot: float | None
    percentile: int = 90

    @property
    def allowed(self) -> float:
        """The part of the requests that may fail; and as much of what is left may miss each target."""
        return 1.0 - self.percentile / 100.0

    def missed(self, totals: Totals) -> str | None:
        """The target that a run missed, in words; None when it met both and no request failed in more than its part."""
        requests = totals.completed + totals.failed
        if totals.failed > self.allowed * requests:
            return f"{totals.failed} of {requests} requests failed ({_why(totals.errors)})"
        for name, limit, found in (("TTFT", self.ttft, totals.ttft), ("TPOT", self.tpot, totals.tpot)):
            value = {50: found.p50, 90: found.p90, 99: found.p99}[self.percentile]
            if limit is not None and value > limit:
                return f"{name} P{self.percentile} is {value:.3g} s (target {limit:g} s)"
        return None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration. gpus: of a replica. price: of it for an hour. make: a replica of it, or ConfigError."""

    name: str
    gpus: int
    price: float
    make: Callable[[], Setup]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a configuration. replicas: the fewest that meet the targets, None when none was found. reason:
    why it is not the answer, or what one replica fewer would miss. totals: of a replica of such a fleet; of all of it
    where confirmed, as the answer is. bound: replicas that it takes at the least."""

    candidate: Candidate
    reason: str
    bound: int = 1
    replicas: int | None = None
    totals: Totals | None = None
    confirmed: bool = False

    @property
    def price(self) -> float:
        return math.inf if self.replicas is None else self.replicas * self.candidate.price


@dataclass(frozen=True, slots=True)
class Traffic:
    """stream: the same requests each time. inputs, outputs: tokens of each. shared: whether prompts name blocks, so
    that nobody knows how much of them will be computed. span: seconds between the first request and the last. sizes:
    of some of them, from the shortest prompt to the longest."""

    stream: Callable[[], Iterator[Row]]
    inputs: NDArray[np.int64]
    outputs: NDArray[np.int64]
    shared: bool
    span: float
    sizes: tuple[Size, ...]

    @property
    def requests(self) -> int:
        return len(self.inputs)

    @property
    def rate(self) -> float:
        """Requests/s."""
        return (self.requests - 1) / self.span


def traffic_of(stream: Callable[[], Iterator[Row]]) -> Traffic:
    """Raises ConfigError when there are too few requests to tell a rate."""
    inputs, outputs, shared = array("q"), array("q"), False
    first = last = 0.0
    for at, size in stream():
        first, last = at if not inputs else first, at
        inputs.append(size.input)
        outputs.append(size.output)
        shared = shared or bool(size.hashes)
    if len(inputs) < 2 or last <= first:
        raise ConfigError(f"the traffic has {len(inputs)} requests; a plan needs some that come one after the other")
    read = np.array(inputs, dtype=np.int64)
    chosen = set(np.argsort(read, kind="stable")[:: max(1, len(read) // ALONE)].tolist())
    sizes = [size for number, (_, size) in enumerate(stream()) if number in chosen]
    return Traffic(
        stream=stream,
        inputs=read,
        outputs=np.array(outputs, dtype=np.int64),
        shared=shared,
        span=last - first,
        sizes=tuple(sorted(sizes, key=lambda size: size.input)),
    )


@dataclass(frozen=True, slots=True)
class Tried:
    """missed: the target that a run missed, in words, or None. totals: None where it was stopped."""

    missed: str | None
    totals: Totals | None


@dataclass(frozen=True, slots=True)
class Option:
    """A configuration that may be the answer yet. least: the fewest replicas that are not known to miss a target.
    missed: the most that did so as a whole fleet."""

    verdict: Verdict
    setup: Setup
    least: int
    missed: int = 0

    @property
    def promise(self) -> tuple[float, bool, bool, int]:
        """What it costs as far as is known; of equals, first what is known best, then what has the fewest GPUs."""
        one = self.verdict
        count = one.replicas or self.least
        return count * one.candidate.price, not one.confirmed, one.replicas is None, count * one.candidate.gpus


def search(
    candidates: Sequence[Candidate],
    traffic: Traffic,
    targets: Targets,
    router: str,
    most_gpus: int,
    show: Callable[[int, str], None],
) -> list[Verdict]:
    """Every configuration with its verdict, the cheapest that meets the targets first; that one is confirmed on its
    whole fleet behind the router.

    show: told how many have been looked at, and which one is tried.
    """
    closed: list[Verdict] = []
    options: list[Option] = []
    for candidate in candidates:
        found = _possible(candidate, traffic, targets)
        if isinstance(found, Verdict):
            closed.append(found)
        else:
            bound = _bound(found, traffic, targets)
            options.append(Option(Verdict(candidate, "", bound), found, bound))
    while options:
        options.sort(key=lambda one: one.promise)
        first, verdict = options[0], options[0].verdict
        if verdict.confirmed:
            break
        looked = len(closed) + sum(bool(one.verdict.reason) for one in options)
        most = most_gpus // verdict.candidate.gpus
        if (verdict.replicas or first.least) > most:
            closed.append(_too_many(verdict, most_gpus, most))
            del options[0]
        elif verdict.replicas is None:
            show(looked, verdict.candidate.name)
            best = min((one.verdict.price for one in options[1:]), default=math.inf)
            options[0] = _searched(first, traffic, targets, router, most, best)
        else:
            show(looked, f"confirming {replicas(verdict.replicas)} of {verdict.candidate.name} on the whole fleet")
            options[0] = _confirmed(first, traffic, targets, router)
    show(len(candidates), "")
    verdicts = [*map(_told, options), *closed]
    return sorted(verdicts, key=lambda one: (one.price, not one.confirmed, one.candidate.gpus * (one.replicas or 0)))


def replicas(count: int | None) -> str:
    """So many, in words."""
    return f"{count} replica{'' if count == 1 else 's'}"


# -- what needs no search ----------------------------------------------------------------------------------------------


def _possible(candidate: Candidate, traffic: Traffic, targets: Targets) -> Setup | Verdict:
    """The setup, if weights fit and a request alone meets the targets. A prompt whose beginning is there already is
    computed sooner than alone; so where they may share it, TTFT tells nothing."""
    try:
        setup = candidate.make()
    except ConfigError as error:
        return Verdict(candidate, f"does not fit: {error.message}")
    if _shares(setup, traffic):
        targets = replace(targets, ttft=None)
    gap = 10.0 * (max(size.input for size in traffic.sizes) + max(size.output for size in traffic.sizes))
    alone = [(number * gap, size) for number, size in enumerate(traffic.sizes)]
    totals = study(Fleet(setup), alone, Slo(targets.ttft, targets.tpot)).totals
    missed = targets.missed(totals)
    if missed is None:
        return setup
    return Verdict(candidate, f"even one request at a time misses: {missed}", totals=totals)


def _shares(setup: Setup, traffic: Traffic) -> bool:
    """Whether a prompt may find its beginning computed."""
    return traffic.shared and setup.config.enable_prefix_caching


def _bound(setup: Setup, traffic: Traffic, targets: Targets) -> int:
    """Replicas that the traffic takes at the least: the device time of what has to be done, over the time for that.

    What has to be done are the prompts of those requests that have to meet the TTFT; and prompts and answers of those
    that have to meet the TPOT, too. They are taken to be the shortest ones, each token as cheap as any can be, and
    nothing of a prompt that may be found but its last token. The time for that is from the first arrival to when the
    last request is due. Without a TTFT they may wait for as long as they like, and nothing is certain.
    """
    if targets.ttft is None:
        return 1
    part = 1.0 - targets.allowed
    read = np.minimum(traffic.inputs, 1) if _shares(setup, traffic) else traffic.inputs
    # A percentile is off by as much as a bucket of its histogram is wide.
    time = traffic.span + GROWTH * targets.ttft
    least = _shortest(read, part * part) / time
    if targets.tpot is not None:
        written = np.maximum(traffic.outputs - 1, 0)
        time += GROWTH * targets.tpot * int(written.max())
        least = max(least, _shortest(read + written, part * (2 * part - 1.0)) / time)
    return max(1, math.ceil(least * _cheapest(setup) - 1e-9))


def _shortest(tokens: NDArray[np.int64], part: float) -> float:
    """Tokens of so great a part of the requests, of which the shortest are taken."""
    count = math.floor(max(0.0, part) * len(tokens))
    return float(np.partition(tokens, count - 1)[:count].sum()) if count else 0.0


def _cheapest(setup: Setup) -> float:
    """Seconds that a replica takes for a token at the least: with steps of any size, of slices of any length that come
    after nothing. Two lanes compute side by side, each on what the other leaves."""
    if setup.config.partition == "off":
        return _token(setup, 1.0)
    shares = setup.capacity.shares
    alone = [1.0 / _token(setup, share / shares) for share in range(1, shares + 1)]
    beside = [one + other for one, other in zip(alone[:-1], reversed(alone[:-1]), strict=True)]
    return 1.0 / max([alone[-1], *beside])


def _token(setup: Setup, share: float) -> float:
    capacity = setup.capacity
    found = math.inf
    for tokens in {*_powers(capacity.max_tokens), capacity.max_tokens}:
        for length in _powers(tokens):
            if tokens <= length * capacity.max_slices:
                pieces = [min(length, tokens - at) for at in range(0, tokens, length)]
                slices = tuple(Slice(n, 0, (0,) * piece, ()) for n, piece in enumerate(pieces))
                found = min(found, setup.cost.seconds(Plan(1, Lane.MIXED, slices), share, 0.0) / tokens)
    return found


def _powers(most: int) -> list[int]:
    """Of two."""
    return [2**power for power in range(most.bit_length())]


# -- what does ---------------------------------------------------------------------------------------------------------


def _searched(option: Option, traffic: Traffic, targets: Targets, router: str, most: int, best: float) -> Option:
    """With the fewest replicas that meet the targets, at less than the best price so far; else with what is known not
    to be enough."""
    verdict, setup = option.verdict, option.setup
    price = verdict.candidate.price
    limit = most if math.isinf(best) else max(option.least, min(most, math.ceil(best / price) - 1))
    whole = router == "prefix-aware" and _shares(setup, traffic)
    run = partial(_try, setup, traffic, targets, router if whole else None)
    # Where a price is known, one run mostly tells that this one does not beat it: that of the most that still would.
    first = option.least if math.isinf(best) else limit
    below = option.least - 1 if verdict.reason else 0
    count, reason, totals = _fewest(run, below, option.least, first, limit, verdict.reason)
    found = replace(verdict, replicas=count, reason=reason, totals=totals, confirmed=whole and count is not None)
    return replace(option, verdict=found, least=limit + 1 if count is None else count)


def _confirmed(option: Option, traffic: Traffic, targets: Targets, router: str) -> Option:
    """As a whole fleet behind the router: with one replica more where that misses a target, else with as few as do."""
    verdict, count = option.verdict, option.verdict.replicas or option.least
    run = partial(_try, option.setup, traffic, targets, router)
    tried = run(count)
    if tried.missed is not None:
        reason = _misses(count, f"behind --router {router} {tried.missed}")
        return replace(option, verdict=replace(verdict, replicas=count + 1, reason=reason), missed=count)
    found, reason, totals = _down(run, option.missed, count, count - 1, tried.totals)
    verdict = replace(verdict, replicas=found, reason=reason or verdict.reason, totals=totals, confirmed=True)
    return replace(option, verdict=verdict)


def _too_many(verdict: Verdict, most_gpus: int, most: int) -> Verdict:
    if verdict.reason:
        reason = f"{verdict.reason}; --max-gpus {most_gpus} allows no more"
    else:
        reason = f"takes {replicas(verdict.bound)} at the least; --max-gpus {most_gpus} allows {most}"
    return replace(verdict, replicas=None, reason=reason)


def _told(option: Option) -> Verdict:
    """At the end, when all that is left costs at least as much as the best."""
    verdict = option.verdict
    if verdict.confirmed or (verdict.replicas is not None and not option.missed):
        return verdict
    if verdict.reason:
        return replace(verdict, replicas=None, reason=f"{verdict.reason}, and with more is no cheaper than the best")
    reason = f"takes {replicas(verdict.bound)} at the least, and so is no cheaper than the best"
    return replace(verdict, reason=reason)


def _fewest(
    run: Callable[[int], Tried], below: int, least: int, count: int, limit: int, reason: str = ""
) -> tuple[int | None, str, Totals | None]:
    """(the fewest replicas up to the limit that meet the targets or None, what one fewer misses, totals): up from
    `count` in growing steps, then halving. More replicas are taken to be no worse. below, reason: so many are known to
    miss a target, and which one. least: a bound.

    A bound comes from the cheapest of some steps, not of all, so where it is enough one fewer is tried, too.
    """
    while (tried := run(count)).missed is not None:
        below, reason = count, _misses(count, tried.missed)
        if count >= limit:
            return None, reason, tried.totals
        count = min(limit, max(count + 1, count * 3 // 2))
    found, known, totals = _down(run, below, count, max(least - 1, (below + count) // 2), tried.totals)
    return found, known or reason, totals


def _down(
    run: Callable[[int], Tried], below: int, count: int, middle: int, totals: Totals | None
) -> tuple[int, str, Totals | None]:
    """The fewest above `below`, which is not enough, and up to `count`, which is: `middle` first, then halving."""
    reason = ""
    while below < middle < count:
        tried = run(middle)
        if tried.missed is None:
            count, totals = middle, tried.totals
        else:
            below, reason = middle, _misses(middle, tried.missed)
        middle = (below + count) // 2
    return count, reason or (ONE if count == 1 else ""), totals


def _misses(count: int, missed: str) -> str:
    return f"with {replicas(count)} {missed}"


class _Hopeless(Exception):
    """A run that cannot meet its percentile any more."""


def _try(setup: Setup, traffic: Traffic, targets: Targets, router: str | None, count: int) -> Tried:
    """What a whole fleet misses behind the router; without one, what one of `count` replicas does that gets every
    count-th request."""
    whole = router is not None
    requests = traffic.requests if whole else math.ceil(traffic.requests / count)
    rows = traffic.stream() if whole else every(traffic.stream(), count)
    fleet = Fleet(setup, count, router) if router is not None else Fleet(setup)
    slos = {"TTFT": _loose(Slo(ttft=targets.ttft)), "TPOT": _loose(Slo(tpot=targets.tpot))}
    misses: Counter[str] = Counter()
    errors: Counter[str] = Counter()

    def ended(record: Record) -> None:
        if record.error is not None:
            errors[record.error] += 1
        for name, slo in slos.items():
            misses[name] += record.error is None and not slo.met_by(record)
        if max(errors.total(), *misses.values()) > targets.allowed * requests + 1:
            raise _Hopeless

    try:
        totals = study(fleet, rows, Slo(targets.ttft, targets.tpot), on_end=ended).totals
    except _Hopeless:
        name, often = misses.most_common(1)[0]
        part = f"more than {100 - targets.percentile} %"
        if errors.total() > often:
            return Tried(f"{part} fail ({_why(errors.most_common())})", None)
        return Tried(f"{part} miss the {name} target", None)
    return Tried(targets.missed(totals), totals)


def _loose(slo: Slo) -> Slo:
    """What misses this is above the target in the histogram of a run, too."""
    return Slo(*(None if limit is None else limit * GROWTH for limit in (slo.ttft, slo.tpot)))


def _why(errors: Sequence[tuple[str, int]]) -> str:
    """Of failed requests, the most frequent reason first."""
    words = ", ".join(f"{often} {code}" for code, often in errors)
    too_long = any(code == ContextTooLong.code for code, _ in errors)
    return f"{words}: --max-model-len would cut them to the model's context" if too_long else words
