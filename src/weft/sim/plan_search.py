"""The cheapest fleet that meets latency targets: a search over configurations, each tried in the simulator.

For every configuration (GPU, ranks, precision, partition) the fewest replicas that meet the targets are looked for.
What cannot be the answer is not simulated, or not to its end:

* weights and one sequence of full length must fit;
* one request alone must meet the targets, or no number of replicas does;
* a fleet must have the device time that prompts and answers take at the least: a bound on replicas, and so on the
  price. Configurations are tried in the order of that bound, and left out when it is no cheaper than the best found;
* a run stops when it has missed a target too often for its percentile to be met.

In the search a replica gets every n-th request, as from a router that goes round; so one engine stands for a fleet. The
answer is then confirmed on the whole fleet, behind the router.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from weft.bench.stats import Record, Slo
from weft.bench.traces import Row, Size
from weft.core.plan import Lane, Plan, Slice
from weft.errors import ConfigError
from weft.sim.replica import Setup
from weft.sim.study import Fleet, study
from weft.sim.tally import Totals
from weft.sim.traffic import every

# Requests that are looked at to know the mean sizes, and of which one alone is tried.
LOOKED_AT, ALONE = 20_000, 20


@dataclass(frozen=True, slots=True)
class Targets:
    """percentile: the part of the requests, in percent, that must meet each target (seconds; None: no target)."""

    ttft: float | None
    tpot: float | None
    percentile: int = 90

    def missed(self, totals: Totals) -> str | None:
        """The target that a run missed, in words; None when it met both and no request failed in more than its part."""
        allowed = 1.0 - self.percentile / 100.0
        requests = totals.completed + totals.failed
        if totals.failed > allowed * requests:
            return f"{totals.failed} of {requests} requests failed"
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
    why it is not the answer, or what one replica fewer would miss. totals: of a replica of such a fleet.
    bound: replicas that it takes at the least."""

    candidate: Candidate
    reason: str
    bound: int = 1
    replicas: int | None = None
    totals: Totals | None = None

    @property
    def price(self) -> float:
        return math.inf if self.replicas is None else self.replicas * self.candidate.price


@dataclass(frozen=True, slots=True)
class Traffic:
    """stream: the same requests each time. rate: requests/s; input, output: mean tokens. shared: whether prompts name
    blocks, so that nobody knows how much of them will be computed. seconds: for which they come."""

    stream: Callable[[], Iterator[Row]]
    rate: float
    input: float
    output: float
    shared: bool
    seconds: float
    sizes: tuple[Size, ...]


def traffic_of(stream: Callable[[], Iterator[Row]]) -> Traffic:
    """Raises ConfigError when there are too few requests to tell a rate."""
    rows = list(itertools.islice(stream(), LOOKED_AT))
    if len(rows) < 2 or rows[-1][0] <= rows[0][0]:
        raise ConfigError(f"the traffic has {len(rows)} requests; a plan needs some that come one after the other")
    sizes = [size for _, size in rows]
    last = rows[-1][0]
    for at, _ in itertools.islice(stream(), LOOKED_AT, None):
        last = at
    span = rows[-1][0] - rows[0][0]
    step = max(1, len(sizes) // ALONE)
    return Traffic(
        stream=stream,
        rate=(len(rows) - 1) / span,
        input=sum(size.input for size in sizes) / len(sizes),
        output=sum(size.output for size in sizes) / len(sizes),
        shared=any(size.hashes for size in sizes),
        seconds=last,
        sizes=tuple(sorted(sizes, key=lambda size: size.input)[::step]),
    )


def search(
    candidates: Sequence[Candidate],
    traffic: Traffic,
    targets: Targets,
    most_gpus: int,
    show: Callable[[int, str], None],
) -> list[Verdict]:
    """Every configuration with its verdict, the cheapest that meets the targets first.

    show: told how many are done, and which one is tried.
    """
    verdicts: list[Verdict] = []
    possible: list[tuple[Verdict, Setup]] = []
    for candidate in candidates:
        found = _possible(candidate, traffic, targets)
        if isinstance(found, Verdict):
            verdicts.append(found)
        else:
            possible.append((Verdict(candidate, "", _bound(found, traffic)), found))
    possible.sort(key=lambda pair: (pair[0].bound * pair[0].candidate.price, pair[0].candidate.gpus))
    best = math.inf
    for verdict, setup in possible:
        show(len(verdicts), verdict.candidate.name)
        most = most_gpus // verdict.candidate.gpus
        if verdict.bound * verdict.candidate.price >= best:
            reason = f"takes {replicas(verdict.bound)} at the least, and so is no cheaper than the best"
            verdicts.append(replace(verdict, reason=reason))
        elif verdict.bound > most:
            reason = f"takes {replicas(verdict.bound)} at the least; --max-gpus {most_gpus} allows {most}"
            verdicts.append(replace(verdict, reason=reason))
        else:
            verdicts.append(_fewest(verdict, setup, traffic, targets, most, best))
            best = min(best, verdicts[-1].price)
    show(len(verdicts), "")
    return sorted(verdicts, key=lambda one: (one.price, one.candidate.gpus * (one.replicas or 0)))


def confirmed(verdict: Verdict, traffic: Traffic, targets: Targets, router: str, most_gpus: int) -> Verdict:
    """The answer on its whole fleet, behind the router; with one replica more for as long as that misses a target.

    Raises ConfigError when --max-gpus does not allow for it.
    """
    count = verdict.replicas or 1
    while count * verdict.candidate.gpus <= most_gpus:
        fleet = Fleet(verdict.candidate.make(), count, router)
        totals = study(fleet, traffic.stream(), Slo(targets.ttft, targets.tpot)).totals
        if targets.missed(totals) is None:
            return replace(verdict, replicas=count, totals=totals)
        count += 1
    raise ConfigError(
        f"{verdict.candidate.name} misses a target behind --router {router} with all that --max-gpus {most_gpus} allows"
    )


def replicas(count: int | None) -> str:
    """So many, in words."""
    return f"{count} replica{'' if count == 1 else 's'}"


def _possible(candidate: Candidate, traffic: Traffic, targets: Targets) -> Setup | Verdict:
    """The setup, if weights fit and a request alone meets the targets."""
    try:
        setup = candidate.make()
    except ConfigError as error:
        return Verdict(candidate, f"does not fit: {error.message}")
    gap = 10.0 * (max(size.input for size in traffic.sizes) + max(size.output for size in traffic.sizes))
    alone = [(number * gap, size) for number, size in enumerate(traffic.sizes)]
    totals = study(Fleet(setup), alone, Slo(targets.ttft, targets.tpot)).totals
    missed = targets.missed(totals)
    if missed is None:
        return setup
    return Verdict(candidate, f"even one request at a time misses: {missed}", totals=totals)


def _bound(setup: Setup, traffic: Traffic) -> int:
    """Replicas that the traffic takes at the least: its device time, with every step as full as can be."""
    tokens, seats = setup.capacity.max_tokens, setup.capacity.max_slices
    prompt = setup.cost.seconds(Plan(1, Lane.MIXED, (Slice(0, 0, (0,) * tokens, ()),))) / tokens
    decode = setup.cost.seconds(Plan(1, Lane.MIXED, tuple(Slice(n, 0, (0,), ()) for n in range(seats)))) / seats
    read = 0.0 if traffic.shared else traffic.input
    # A token of an answer that goes along with a full step costs no more than one of a prompt.
    written = min(prompt, decode) * max(0.0, traffic.output - 1)
    return max(1, math.ceil(traffic.rate * (read * prompt + written) - 1e-9))


def _fewest(verdict: Verdict, setup: Setup, traffic: Traffic, targets: Targets, most: int, best: float) -> Verdict:
    """The fewest replicas that meet the targets, at less than the best price so far: up in growing steps, then halving.
    More replicas are taken to be no worse."""
    price = verdict.candidate.price
    limit = most if math.isinf(best) else min(most, math.ceil(best / price) - 1)
    below, reason, totals = verdict.bound - 1, f"takes {replicas(verdict.bound)} at the least", None
    count = verdict.bound
    while count <= limit:
        missed, found = _try(setup, traffic, targets, count)
        if missed is None:
            break
        below, reason, totals = count, f"with {replicas(count)} {missed}", found
        if count == limit:
            break
        count = min(limit, max(count + 1, count * 3 // 2))
    if below >= limit or count > limit:
        cheap = "" if math.isinf(best) else f", at {limit * price:g} an hour"
        return replace(verdict, reason=f"{reason}{cheap}", totals=totals)
    totals = found
    while count - below > 1:
        middle = (below + count) // 2
        missed, found = _try(setup, traffic, targets, middle)
        if missed is None:
            count, totals = middle, found
        else:
            below, reason = middle, f"with {replicas(middle)} {missed}"
    return replace(verdict, replicas=count, reason=reason, totals=totals)


class _Hopeless(Exception):
    """A run that cannot meet its percentile any more."""


def _try(setup: Setup, traffic: Traffic, targets: Targets, count: int) -> tuple[str | None, Totals | None]:
    """(what one of `count` replicas misses, its totals); no totals where the run was stopped."""
    rows = list(every(traffic.stream(), count))
    allowed = (1.0 - targets.percentile / 100.0) * len(rows) + 1
    misses = {"TTFT": 0, "TPOT": 0}

    def ended(record: Record) -> None:
        misses["TTFT"] += not Slo(ttft=targets.ttft).met_by(record)
        misses["TPOT"] += not Slo(tpot=targets.tpot).met_by(record)
        if max(misses.values()) > allowed:
            raise _Hopeless

    try:
        totals = study(Fleet(setup), rows, Slo(targets.ttft, targets.tpot), on_end=ended).totals
    except _Hopeless:
        name = max(misses, key=lambda one: misses[one])
        return f"more than {100 - targets.percentile} % miss the {name} target", None
    return targets.missed(totals), totals
