"""Latency models, fitted online from what was observed. Pure functions; standard library and numpy.

    TTFT = a / (x - load) + b                                               semi-PD, equations 1 to 3
    step = (b * parts + (token * T + read * R + pair * P) / share + (a + slot * C) / min(share, saturation))
           * (1 + contention * rival)

The first is the paper's: x is the prefill lane's share, load the work that arrives (seconds of the whole device for
each second). The second contains the paper's TPOT = a / y + b as the case of one batch and no rival, and adds what the
paper leaves out: memory is read no faster from the saturation point on (decode fills its bandwidth with part of the
cores), and a lane that computes beside another takes longer, whatever its share. It holds for a step of any lane: T
tokens of prompts or of output, C slots of context, so that steps of every regime teach the same law. Attention of
prompts is a cost of its own: P pairs of a token and a slot that it attends to, and R slots that are read for however
few tokens; without it, steps of a long prompt's last parts would look as if the device had become slower. What a step
costs whatever is in it is paid by each of the parts that it is cut into.

A fit never extrapolates from one share: that would be the model's word, not the data's. So with contention. Where steps
had a rival at some shares and none at others, any contention explains them, together with a curve over shares that is
so much flatter or steeper; the law's own curve would choose one, and be wrong as far as the device's is another. It is
told where steps of one size were seen at one share both alone and beside a rival: they differ by 1 + contention * rival
whatever the curve is. Otherwise it stays unknown, and only what no share explains (on a share nothing takes more than
1 / share times as long) is put down to the rival, so that predictions of what was seen are right.

Newer samples count more (`half_life`), so that the fit follows a device or a load that drifts, and samples of a share
that was left long ago stop counting as knowledge of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from weft.phases.observations import Stepped

Array = NDArray[np.float64]
Which = NDArray[np.bool_]

HALF_LIFE = 60.0
# A share counts as seen when its samples weigh as much as so many new ones.
SEEN = 2.0
# Steps that tell how fast the device is just now.
LEVEL_SAMPLES = 8
# Shares closer than this are the same.
SAME_SHARE = 0.015
# A step was alone, or beside a rival, that had one for less, or for more, than this part of its time.
ALONE, BESIDE = 0.2, 0.5
# Never predict for a queue that is closer to instability than this: x > load * (1 + MARGIN).
MARGIN = 0.02
# Tukey's constant: 95 % efficient on normal errors; what is off by more than so many deviations counts nothing.
TUKEY = 4.685
# What is off by less than this (relative) is never taken for an outlier beside many that are exactly alike.
SPREAD_LEAST = 0.02
SATURATIONS = tuple(round(0.1 * i, 2) for i in range(1, 11))
# Turns of reweighting, and between contention and the rest; more of them change nothing that matters.
TURNS, CONTENTION_TURNS = 8, 2
# What chooses between saturation points that explain the samples equally well, relative to the error.
TIE = 0.002
# What prompts attend to is told from their other costs by so many steps, and where it makes the error so much smaller:
# otherwise it would be noise that is explained.
ATTENTION_SAMPLES, ATTENTION_GAIN = 16, 0.9
# A column that varies less than this (relative) cannot be told from the constant.
VARIES = 0.05


@dataclass(frozen=True, slots=True)
class TtftSample:
    """One request's time to its first token, at share x and load lambda (both fractions of the device)."""

    at: float
    share: float
    load: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Unfit:
    """Why there is no model, in a sentence."""

    reason: str


@dataclass(frozen=True, slots=True)
class TtftModel:
    """TTFT = a / (x - load) + b. error: median of |observed - predicted| / observed. shares: those it rests on."""

    a: float
    b: float
    samples: int = 0
    shares: tuple[float, ...] = ()
    error: float = 0.0

    def predict(self, share: float, load: float) -> float:
        """Seconds; infinite where the queue has no end (x <= load)."""
        if share <= load * (1 + MARGIN) or share <= 0:
            return math.inf
        return self.a / (share - load) + self.b


@dataclass(frozen=True, slots=True)
class StepModel:
    """Seconds of a step of T tokens that reads C slots, on a share, beside a rival (part of the time, 0 to 1). Of the
    slots prompts read R, and attend to them in P pairs.

    saturation, contention: None where the samples do not tell; predictions then take 1, and `excess`: how much longer
    steps beside a rival took than any share explains.
    """

    fixed: float
    base: float
    token: float
    slot: float
    saturation: float | None = None
    contention: float | None = None
    samples: int = 0
    shares: tuple[float, ...] = ()
    error: float = 0.0
    read: float = 0.0
    pair: float = 0.0
    excess: float = 0.0

    def predict(
        self,
        tokens: float,
        context: float,
        share: float = 1.0,
        rival: float = 0.0,
        parts: float = 1.0,
        read: float = 0.0,
        pairs: float = 0.0,
    ) -> float:
        memory = (self.base + self.slot * context) / min(share, self.saturation or 1.0)
        work = self.token * tokens + self.read * read + self.pair * pairs
        longer = self.excess if self.contention is None else self.contention
        return (self.fixed * parts + work / share + memory) * (1.0 + longer * rival)

    def of_step(self, step: Stepped) -> float:
        """What a step like this one takes."""
        tokens = step.prompt + step.output
        return self.predict(tokens, step.context, step.share, step.rival, step.parts, step.read, step.pairs)

    def scaled(self, factor: float) -> StepModel:
        """The law of a device on which everything takes `factor` times as long."""
        return replace(
            self,
            fixed=factor * self.fixed,
            base=factor * self.base,
            token=factor * self.token,
            slot=factor * self.slot,
            read=factor * self.read,
            pair=factor * self.pair,
        )


def fit_ttft(samples: Sequence[TtftSample], now: float, *, half_life: float = HALF_LIFE) -> TtftModel | Unfit:
    """The hyperbola through the samples; those of an unstable queue (x <= load) tell nothing of it."""
    good = [one for one in samples if one.share > one.load * (1 + MARGIN) and one.seconds > 0]
    weights = _ages([one.at for one in good], now, half_life)
    shares = seen_shares([one.share for one in good], weights)
    if len(shares) < 2:
        return Unfit(_one_share("TTFT", shares))
    x = np.array([1.0 / (one.share - one.load) for one in good])
    y = np.array([one.seconds for one in good])
    names, found = _non_negative({"a": x, "b": np.ones_like(x)}, y, weights)
    a, b = (found[names.index(name)] if name in names else 0.0 for name in ("a", "b"))
    return TtftModel(a, b, len(good), shares, _error(y, a * x + b, weights))


def fit_steps(samples: Sequence[Stepped], now: float, *, half_life: float = HALF_LIFE) -> StepModel | Unfit:
    """The step law of a device. Two shares give its slope; the saturation point takes three."""
    good = [one for one in samples if one.seconds > 0 and one.share > 0]
    weights = _ages([one.at for one in good], now, half_life)
    shares = seen_shares([one.share for one in good], weights)
    if len(shares) < 2:
        return Unfit(_one_share("step time", shares))
    return _fit(good, weights, shares)


def fit_one_share(samples: Sequence[Stepped], now: float, *, half_life: float = HALF_LIFE) -> StepModel | Unfit:
    """What one share tells: the cost of tokens and slots there, all of it taken to scale with 1 / share.

    For a start, before there is anything better; `shares` of the model names the one.
    """
    good = [one for one in samples if one.seconds > 0 and one.share > 0]
    if len(good) < 3:
        return Unfit(f"{len(good)} steps were seen; three are needed")
    weights = _ages([one.at for one in good], now, half_life)
    return _fit(good, weights, seen_shares([one.share for one in good], weights), fixed=False)


def drift(model: StepModel, samples: Sequence[Stepped]) -> float:
    """How many times as long as by the law these steps took: a device shared with others is now faster, now slower, in
    everything alike, long before a fit can follow. The median by time; 1 where there are too few to tell."""
    if len(samples) < LEVEL_SAMPLES:
        return 1.0
    predicted = np.array([model.of_step(one) for one in samples])
    return _median(np.array([one.seconds for one in samples]) / np.maximum(predicted, 1e-12), predicted)


def _fit(good: list[Stepped], weights: Array, shares: tuple[float, ...], fixed: bool = True) -> StepModel:
    y = np.array([one.seconds for one in good])
    rival = np.array([one.rival for one in good])
    share = np.array([one.share for one in good])
    tokens = np.array([float(one.prompt + one.output) for one in good])
    context = np.array([float(one.context) for one in good])
    parts = np.array([float(one.parts) for one in good])
    # Fewer than three shares cannot tell a saturation point from a slope.
    points = [one for one in SATURATIONS if one > shares[0] * 1.01] if len(shares) > 2 else [1.0]
    both = seen_both_ways(share, tokens, rival, weights)

    def best_of(work: Mapping[str, Array]) -> tuple[float, StepModel]:
        def at(point: float) -> tuple[float, StepModel]:
            return _fit_at(point, y, share, work, context, rival, both, weights, parts if fixed else None)

        best = min(map(at, points), key=lambda one: one[0])
        if len(points) > 1:
            point = best[1].saturation or 1.0
            between = [one for one in (point - 0.05, point + 0.05) if shares[0] * 1.01 < one <= 1.0]
            best = min([best, *map(at, between)], key=lambda one: one[0])
        return best

    best = best_of({"token": tokens})
    if len(good) >= ATTENTION_SAMPLES:
        other = best_of({"token": tokens, "read": _column(good, "read"), "pair": _column(good, "pairs")})
        if other[0] < ATTENTION_GAIN * best[0]:
            best = other
    model = best[1]
    # A point at or beyond the greatest share seen is not a point: nothing was seen to saturate.
    told = len(shares) > 2 and model.saturation is not None and model.saturation < shares[-1] * 0.999
    predicted = np.array([model.of_step(one) for one in good])
    return replace(
        model,
        saturation=model.saturation if told else (1.0 if len(shares) > 2 else None),
        samples=len(good),
        shares=shares,
        error=_error(y, predicted, weights),
    )


def _column(steps: Sequence[Stepped], name: str) -> Array:
    return np.array([float(getattr(one, name)) for one in steps])


def _fit_at(
    point: float,
    y: Array,
    share: Array,
    work: Mapping[str, Array],
    context: Array,
    rival: Array,
    both: Sequence[Which],
    weights: Array,
    parts: Array | None,
) -> tuple[float, StepModel]:
    """(loss, model) for one saturation point. Contention multiplies, so it and the rest take turns to be fitted.

    both: see `seen_both_ways`; where there are none, the excess is found in all samples alike, from 0 upwards.
    parts: None where no cost is to be found that does not depend on the share.
    """
    inverse = 1.0 / np.minimum(share, point)
    columns = {"base": inverse}
    if parts is not None:
        columns = {"fixed": parts, **columns}
    scaled = {name: (values, 1.0 / share) for name, values in work.items()} | {"slot": (context, inverse)}
    for name, (values, scale) in scaled.items():
        if np.ptp(values) > VARIES * max(float(np.max(values)), 1e-12):
            columns[name] = values * scale

    def costs(value: float) -> tuple[list[str], Array, Array]:
        names, found = _non_negative(columns, y / (1.0 + value * rival), weights)
        return names, found, np.maximum(np.column_stack([columns[name] for name in names]) @ found, 1e-12)

    value = 0.0
    for _ in range(CONTENTION_TURNS):
        value = _contention(y / costs(value)[2], rival, both or [np.ones(len(y), dtype=bool)], weights)
    names, found, predicted = costs(value)
    got = {name: float(number) for name, number in zip(names, found, strict=True)}
    whole = predicted * (1.0 + value * rival)
    # Mean absolute error relative to the value: an outlier counts, but does not rule. Of two points that explain the
    # samples equally well, the one with less of a cost that no share changes, and with less put down to the rival.
    loss = float(np.average(np.minimum(np.abs(y / whole - 1.0), 1.0), weights=weights))
    loss += TIE * got.get("fixed", 0.0) / float(np.median(y)) + (0.0 if both else TIE * value)
    overhead, base, token, slot, read, pair = (
        got.get(name, 0.0) for name in ("fixed", "base", "token", "slot", "read", "pair")
    )
    contention, excess = (value, 0.0) if both else (None, value)
    return loss, StepModel(overhead, base, token, slot, point, contention, read=read, pair=pair, excess=excess)


def seen_both_ways(share: Array, tokens: Array, rival: Array, weights: Array) -> list[Which]:
    """For each share and size (to a factor of two) that was seen both alone and beside a rival: which samples are of
    it. All arrays: one value per sample."""
    size = np.frexp(tokens)[1]
    near = [np.abs(share - one) < SAME_SHARE for one in seen_shares(share.tolist(), weights)]
    kinds = [at & (size == one) for at in near for one in np.unique(size[at])]
    ways = (rival < ALONE, rival > BESIDE)
    return [at for at in kinds if all(weights[at & way].sum() >= SEEN for way in ways)]


def _contention(ratio: Array, rival: Array, kinds: Sequence[Which], weights: Array) -> float:
    """How much longer steps of these kinds take beside a rival all of the time: the median, and not below 0.

    ratio: seconds of each sample to what the law says of such a step alone. It is compared with that of steps of its
    kind that were alone, so that what the law gets wrong about a share does not count.
    """
    excess, trust = [], []
    for kind in kinds:
        alone, beside = kind & (rival < ALONE), kind & (rival >= ALONE)
        if alone.any() and beside.any():
            excess.append((ratio[beside] / _median(ratio[alone], weights[alone]) - 1.0) / rival[beside])
            trust.append(weights[beside] * rival[beside])
    return max(0.0, _median(np.concatenate(excess), np.concatenate(trust))) if excess else 0.0


def seen_shares(shares: Sequence[float], weights: Array) -> tuple[float, ...]:
    """The different shares, in order, that have samples of enough weight."""
    groups: list[list[float]] = []  # share, weight
    for share, weight in sorted(zip(shares, weights.tolist(), strict=True)):
        if groups and share - groups[-1][0] < SAME_SHARE:
            groups[-1][1] += weight
        else:
            groups.append([share, weight])
    return tuple(share for share, weight in groups if weight >= SEEN)


def _one_share(what: str, shares: tuple[float, ...]) -> str:
    if not shares:
        return f"the {what} has too few fresh samples to fit"
    return f"the {what} was seen at one share alone ({shares[0]:.0%}), which does not tell how it depends on the share"


def _ages(times: Sequence[float], now: float, half_life: float) -> Array:
    return np.asarray(np.exp2(-np.maximum(now - np.asarray(times, dtype=float), 0.0) / half_life))


def _error(y: Array, predicted: Array, weights: Array) -> float:
    return _median(np.abs(y - predicted) / y, weights)


def _median(values: Array, weights: Array) -> float:
    """Weighted median; 0 of nothing."""
    if not values.size or weights.sum() <= 0:
        return 0.0
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def _non_negative(columns: dict[str, Array], y: Array, weights: Array) -> tuple[list[str], Array]:
    """Robust coefficients, none below zero: a cost that comes out negative is left out, and the rest fitted again."""
    names = list(columns)
    while True:
        found = robust(np.column_stack([columns[name] for name in names]), y, weights)
        if len(names) == 1 or found.min() >= 0:
            return names, np.maximum(found, 0.0)
        names.pop(int(np.argmin(found * [float(np.mean(columns[name])) for name in names])))


def robust(columns: Array, y: Array, weights: Array) -> Array:
    """Coefficients of y ~ columns that bad samples do not move: least absolute deviations, then Tukey's biweight.

    Residuals count relative to the fitted value, because noise on a latency grows with it.
    """
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    scaled = columns / scale
    floor = 1e-3 * float(np.median(np.abs(y))) + 1e-12
    size = np.maximum(np.abs(y), floor)
    trust = np.ones_like(y)
    found = np.zeros(columns.shape[1])
    # Where two columns are one, any split between them does: this keeps the equations solvable.
    ridge = 1e-9 * np.eye(columns.shape[1])
    for turn in range(TURNS):
        row = scaled.T * (weights * trust / np.square(size))
        equations = row @ scaled
        found = np.linalg.solve(equations + ridge * float(np.trace(equations)), row @ y)
        predicted = scaled @ found
        size = np.maximum(np.abs(predicted), floor)
        off = np.abs(y - predicted) / size
        spread = max(1.4826 * float(np.median(off)), SPREAD_LEAST)
        if turn < TURNS // 2:
            trust = spread / np.maximum(off, 0.05 * spread)
        else:
            trust = np.square(np.maximum(1.0 - np.square(off / (TUKEY * spread)), 1e-6))
    return np.asarray(found / scale)
