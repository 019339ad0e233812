"""Coefficients from measured times: few, positive, and fitted on the relative error, so that no size outweighs
others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from weft.errors import ConfigError
from weft.sim.attention import Heads, Work, attention_seconds
from weft.sim.collectives import all_reduce_seconds
from weft.sim.gemm import BF16, Operands, gemm_seconds
from weft.sim.hardware import AttentionFit, CollectiveFit, GemmFit, Gpu, Link, MoeFit, Part, PointwiseFit
from weft.sim.moe import moe_seconds
from weft.sim.phase_times import PhaseTimes
from weft.sim.profiles import Gemms, Moes, Reduces

Floats = NDArray[np.float64]
SATURATIONS = tuple(point / 100 for point in range(2, 101))
CONTENTIONS = tuple(point / 100 for point in range(301))
LEAST_SHARES, LEAST_RIVALS = 4, 3  # different ones that a fit takes: one more than what it has to find, and to spare
MOST_FIXED = 0.2  # of the shortest time
NOISE = 0.1  # of a time: what is further off than that is no noise
NUDGE = 0.02  # of a logarithm, for the slopes
SOFT = 0.02  # errors below this part weigh as squares, greater ones in proportion
FURTHEST = 0.7  # of a logarithm, in one round


def fit_positive(
    predict: Callable[[Floats], Floats],
    measured: Floats,
    start: Sequence[float],
    most: Sequence[float] | None = None,
    rounds: int = 30,
) -> Floats:
    """Positive coefficients, at most `most`, that bring the logarithms of predict(coefficients) near those of
    `measured`.

    Minimises the mean absolute error, rounded at zero, by Levenberg-Marquardt steps with weights that are renewed in
    each round. Deterministic. `start` has to be of the right order of magnitude.
    """
    target = np.log(measured)
    limit = np.log(np.asarray(most)) if most is not None else np.full(len(start), np.inf)
    now = np.minimum(np.log(np.asarray(start, dtype=np.float64)), limit)

    def errors(point: Floats) -> Floats:
        return np.asarray(np.log(predict(np.exp(point))) - target)

    def loss(found: Floats) -> float:
        return float(np.mean(np.sqrt(found**2 + SOFT**2)))

    error = errors(now)
    best, damping = loss(error), 1e-2
    for _ in range(rounds):
        slopes = np.empty((len(error), len(now)))
        for index in range(len(now)):
            nudged = now.copy()
            nudged[index] -= NUDGE
            slopes[:, index] = (error - errors(nudged)) / NUDGE
        weights = 1 / np.sqrt(error**2 + SOFT**2)
        curvature, slope = slopes.T @ (slopes * weights[:, None]), slopes.T @ (weights * error)
        before = best
        for _ in range(6):
            damped = curvature + damping * np.diag(np.diag(curvature)) + 1e-9 * np.eye(len(now))
            step = np.clip(np.linalg.solve(damped, -slope), -FURTHEST, FURTHEST)
            there = np.minimum(now + step, limit)
            tried = errors(there)
            if loss(tried) < best:
                now, error, best, damping = there, tried, loss(tried), max(damping / 4, 1e-6)
                break
            damping *= 4
        if before - best < 1e-5:
            break
    return np.asarray(np.exp(now))


def thinned(count: int, most: int) -> NDArray[np.int64]:
    """Indices of about `most` of `count` rows, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


# Start and limit of each coefficient.
Ranges = Mapping[str, tuple[float, float]]
GEMM: Ranges = {
    "launch": (2.5e-6, 1e-4), "math": (1.0, 1.1), "step": (1e-7, 1e-5), "tile": (1e-6, 1e-4), "dram": (0.85, 1.0),
    "overlap": (3.0, 8.0), "split": (2e-6, 1e-4),
}  # fmt: skip
MOE: Ranges = {"launch": (2e-5, 1e-3), "expert": (5e-8, 1e-5), "math": (0.7, 1.0), "dram": (0.85, 1.0)}
COLLECTIVE: Ranges = {
    "launch": (4e-6, 1e-3), "rank": (2e-7, 1e-4), "second": (3e-6, 1e-3), "bandwidth": (0.7, 1.0),
    "multicast": (0.65, 1.0),
}  # fmt: skip


def named(found: Floats, ranges: Ranges) -> dict[str, Any]:
    return dict(zip(ranges, map(float, found), strict=True))


def fit_named(predict: Callable[[Floats], Floats], measured: Floats, ranges: Ranges) -> Floats:
    start, most = zip(*ranges.values(), strict=True)
    return fit_positive(predict, measured, start, most)


def fit_gemm(
    part: Part, times: Gemms, tiles: Sequence[tuple[int, int]], operands: Operands = BF16, most: int = 4000
) -> GemmFit:
    """part: the whole GPU, with the arithmetic that the times were taken with."""
    rows = thinned(len(times.m), most)
    chosen = times.where(np.isin(np.arange(len(times.m)), rows))

    def made(found: Floats) -> GemmFit:
        return GemmFit(**named(found, GEMM), tiles=tuple(tiles))

    def predict(found: Floats) -> Floats:
        return gemm_seconds(made(found), part, chosen.m, chosen.n, chosen.k, operands)

    return made(fit_named(predict, chosen.seconds, GEMM))


def fit_saturation(gpu: Gpu, times: Mapping[float, Gemms], arithmetic: str, operands: Operands = BF16) -> float:
    """The part of the SMs that draws all of the memory's bandwidth, from products on parts of them; what it was where
    these cannot tell, as when arithmetic bounds them all.

    gpu: with its coefficients of products on the whole device. times: by part of the SMs.
    """

    def error(point: float) -> float:
        tried, off = replace(gpu, saturation=point), []
        for share, one in times.items():
            part = tried.part(share, arithmetic=arithmetic)
            off.append(gemm_seconds(gpu.gemm, part, one.m, one.n, one.k, operands) / one.seconds)
        return float(np.abs(np.log(np.concatenate(off))).mean())

    return min(SATURATIONS, key=lambda point: (round(error(point), 4), abs(point - gpu.saturation)))


def fit_shares(times: PhaseTimes, gpu: Gpu) -> Gpu:
    """The GPU with its saturation and its contention fitted on work that memory bounds, by the law of `Gpu.part`: on
    `own` of the device it takes fixed + moved * (1 + contention * rival) / min(1, own / saturation).

    Of points that fit alike, the ones nearest to what the GPU had are taken: no part that was measured may lie below
    its saturation. Raises ConfigError where the times cannot tell.
    """
    _check_curve(times.alone)
    rivals = {one.rival for one in times.beside}
    if len(rivals) < LEAST_RIVALS:
        raise ConfigError(
            f"times beside lanes on {len(rivals)} different parts of the device; contention is fitted on at least "
            f"{LEAST_RIVALS}"
        )
    quick = [one for one in times.beside if one.times < 1.0 - NOISE]
    if quick:
        raise ConfigError(
            f"on {quick[0].share:.3g} of the device it takes {quick[0].times:.3g} times as long beside another lane as "
            "alone, which cannot be less than once: measure again, on a GPU that has nothing else to do"
        )
    shares, seconds = np.array(list(times.alone)), np.array(list(times.alone.values()))
    curves = {point: _curve(shares, seconds, point) for point in SATURATIONS}
    point = min(SATURATIONS, key=lambda one: (round(curves[one].error, 4), abs(one - gpu.saturation)))
    fixed, moved = curves[point].fixed, curves[point].moved
    share, rival, slower = np.array(times.beside).T

    def error(contention: float) -> float:
        own = share / np.maximum(1.0, share + rival)
        beside = fixed + moved * (1.0 + contention * rival) / np.minimum(1.0, own / point)
        alone = fixed + moved / np.minimum(1.0, share / point)
        return float(np.abs(np.log(beside / alone / slower)).mean())

    contention = min(CONTENTIONS, key=lambda one: (round(error(one), 4), abs(one - gpu.contention)))
    return replace(gpu, saturation=point, contention=contention)


class Curve(NamedTuple):
    """Seconds that take the same on every part, and those that memory takes at its full bandwidth. error: mean absolute
    logarithm of predicted to measured."""

    fixed: float
    moved: float
    error: float


def _curve(shares: Floats, seconds: Floats, saturation: float) -> Curve:
    """The line through the times that has the least squares of relative errors."""
    slower = 1.0 / np.minimum(1.0, shares / saturation)
    ones, steps = 1.0 / seconds, slower / seconds
    (fixed, _), *_ = np.linalg.lstsq(np.stack([ones, steps], axis=1), np.ones(len(seconds)), rcond=None)
    # Without a limit, a flat curve could be all fixed, and any point would do.
    fixed = min(max(0.0, float(fixed)), MOST_FIXED * float(seconds.min()))
    moved = float((steps * (1.0 - fixed * ones)).sum() / (steps**2).sum())
    error = float(np.abs(np.log((fixed + moved * slower) / seconds)).mean())
    return Curve(fixed, moved, error)


def _check_curve(alone: Mapping[float, float]) -> None:
    if len(alone) < LEAST_SHARES:
        raise ConfigError(
            f"times on {len(alone)} different parts of the device; saturation is fitted on at least {LEAST_SHARES}"
        )
    ordered = sorted(alone.items())
    for (less, slow), (more, quick) in pairwise(ordered):
        if quick > slow * (1.0 + NOISE):
            raise ConfigError(
                f"{quick:.3g} s on {more:.3g} of the device, and {slow:.3g} s on {less:.3g} of it: more SMs cannot "
                "take longer; measure again, on a GPU that has nothing else to do"
            )


ATTENTION: Ranges = {
    "launch": (1e-5, 1e-4), "math": (0.6, 1.0), "chain": (0.5, 1.0), "overlap": (2.0, 8.0), "tile": (3e-6, 1e-4),
    "block": (4e-6, 1e-4), "dram": (0.85, 1.0), "position": (5e-10, 1e-7), "alone": (5e-9, 1e-6),
    "combine": (2e-6, 1e-4), "regroup": (1e-6, 1e-4), "decode_overlap": (2.0, 8.0), "beside": (1.5, 8.0),
    "empty": (1e-6, 1e-4),
}  # fmt: skip


def fit_attention(
    part: Part, heads: Heads, work: Work, seconds: Floats, packed: bool, known: Mapping[str, float]
) -> AttentionFit:
    """heads, work: arrays, as profiles.heads_of and profiles.works make them, the latter with the same `packed`.
    known: coefficients that these times cannot tell."""
    ranges = {name: ATTENTION[name] for name in ATTENTION if name not in known}

    def made(found: Floats) -> AttentionFit:
        return AttentionFit(**named(found, ranges), **known, packed=packed)

    def predict(found: Floats) -> Floats:
        return np.asarray(attention_seconds(made(found), part, heads, work))

    return made(fit_named(predict, seconds, ranges))


def fit_moe(part: Part, times: Moes) -> MoeFit:
    def made(found: Floats) -> MoeFit:
        return MoeFit(**named(found, MOE))

    def predict(found: Floats) -> Floats:
        return moe_predictions(made(found), part, times)

    return made(fit_named(predict, times.seconds, MOE))


def moe_predictions(fit: MoeFit, part: Part, times: Moes) -> Floats:
    shape = times.hidden, times.intermediate, times.experts, times.top_k
    return np.asarray(moe_seconds(fit, part, times.tokens, *shape, BF16))


def fit_pointwise(part: Part, moved: Floats, seconds: Floats) -> PointwiseFit:
    """moved: bytes."""

    def predict(found: Floats) -> Floats:
        return np.asarray(found[0] + moved / (found[1] * part.bandwidth))

    return PointwiseFit(*map(float, fit_positive(predict, seconds, (3e-6, 0.7), (1e-4, 1.0))))


def fit_collective(link: Link, times: Reduces, multicast: bool, limits: Sequence[float] = (0.0,)) -> CollectiveFit:
    """multicast: whether the switch of this link can add up. limits: sizes beyond which the library may leave it to
    NCCL, whose coefficients are link.large; the one that fits best is taken."""
    ranges = {name: COLLECTIVE[name] for name in COLLECTIVE if multicast or name != "multicast"}

    def made(found: Floats, limit: float) -> CollectiveFit:
        return CollectiveFit(**{"multicast": 0.0} | named(found, ranges), limit=limit)

    def predict(found: Floats, limit: float) -> Floats:
        return reduce_predictions(replace(link, collective=made(found, limit)), times)

    def error(fit: CollectiveFit) -> float:
        return float(np.abs(reduce_predictions(replace(link, collective=fit), times) / times.seconds - 1).mean())

    fits = [made(fit_named(partial(predict, limit=limit), times.seconds, ranges), limit) for limit in limits]
    return min(fits, key=error)


def reduce_predictions(link: Link, times: Reduces) -> Floats:
    found = np.empty(len(times.size))
    for ranks in np.unique(times.ranks):
        rows = times.ranks == ranks
        found[rows] = all_reduce_seconds(link, int(ranks), times.size[rows])
    return found
