"""Coefficients from measured times: few, positive, and fitted on the relative error, so that no size outweighs others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from weft.sim.attention import Heads, Work, attention_seconds
from weft.sim.collectives import all_reduce_seconds
from weft.sim.gemm import BF16, Operands, gemm_seconds
from weft.sim.hardware import AttentionFit, CollectiveFit, GemmFit, Link, MoeFit, Part, PointwiseFit
from weft.sim.moe import moe_seconds
from weft.sim.profiles import Gemms, Moes, Reduces

Floats = NDArray[np.float64]
NUDGE = 0.02  # of a logarithm, for the slopes
SOFT = 0.02  # errors below this part weigh as squares, greater ones in proportion
FURTHEST = 0.7  # of a logarithm, in one round
EXPONENTS = (1.0, 8.0)


def fit_positive(
    predict: Callable[[Floats], Floats],
    measured: Floats,
    start: Sequence[float],
    most: Sequence[float] | None = None,
    rounds: int = 30,
) -> Floats:
    """Positive coefficients, at most `most`, that bring the logarithms of predict(coefficients) near those of `measured`.

    Minimises the mean absolute error, rounded at zero, by Levenberg-Marquardt steps with weights that are renewed in each
    round. Deterministic. `start` has to be of the right order of magnitude.
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


GEMM_START = (2.5e-6, 1.0, 1e-7, 1e-6, 0.85, 3.0, 2e-6, 0.1)
GEMM_MOST = (1e-4, 1.1, 1e-5, 1e-4, 1.0, EXPONENTS[1], 1e-4, 1.0)


def fit_gemm(
    part: Part, times: Gemms, tiles: Sequence[tuple[int, int]], operands: Operands = BF16, most: int = 4000
) -> GemmFit:
    """part: the whole GPU, with the arithmetic that the times were taken with."""
    rows = thinned(len(times.m), most)
    chosen = times.where(np.isin(np.arange(len(times.m)), rows))

    def made(found: Floats) -> GemmFit:
        return GemmFit(*map(float, found), tiles=tuple(tiles))

    def predict(found: Floats) -> Floats:
        return gemm_seconds(made(found), part, chosen.m, chosen.n, chosen.k, operands)

    return made(fit_positive(predict, chosen.seconds, GEMM_START, GEMM_MOST))


# Start and limit of each coefficient.
ATTENTION = {
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
    names = [name for name in ATTENTION if name not in known]

    def made(found: Floats) -> AttentionFit:
        return AttentionFit(**dict(zip(names, map(float, found), strict=True)), **known, packed=packed)

    def predict(found: Floats) -> Floats:
        return np.asarray(attention_seconds(made(found), part, heads, work))

    start, most = zip(*(ATTENTION[name] for name in names), strict=True)
    return made(fit_positive(predict, seconds, start, most))


def fit_moe(part: Part, times: Moes) -> MoeFit:
    def made(found: Floats) -> MoeFit:
        return MoeFit(*map(float, found))

    def predict(found: Floats) -> Floats:
        return np.asarray(_moe(made(found), part, times))

    return made(fit_positive(predict, times.seconds, (2e-5, 5e-8, 0.7, 0.85), (1e-3, 1e-5, 1, 1)))


def _moe(fit: MoeFit, part: Part, times: Moes) -> Floats:
    shape = times.hidden, times.intermediate, times.experts, times.top_k
    return np.asarray(moe_seconds(fit, part, times.tokens, *shape, BF16))  # type: ignore[arg-type]


def moe_predictions(fit: MoeFit, part: Part, times: Moes) -> Floats:
    return _moe(fit, part, times)


def fit_pointwise(part: Part, moved: Floats, seconds: Floats) -> PointwiseFit:
    """moved: bytes."""

    def predict(found: Floats) -> Floats:
        return np.asarray(found[0] + moved / (found[1] * part.bandwidth))

    return PointwiseFit(*map(float, fit_positive(predict, seconds, (3e-6, 0.7), (1e-4, 1.0))))


def fit_collective(link: Link, times: Reduces, multicast: bool) -> CollectiveFit:
    """multicast: whether the switch of this link can add up."""

    def made(found: Floats) -> CollectiveFit:
        return CollectiveFit(*map(float, found), *(() if multicast else (0.0,)))

    def predict(found: Floats) -> Floats:
        return reduce_predictions(replace(link, collective=made(found)), times)

    start = (4e-6, 2e-7, 3e-6, 0.7, 0.65) if multicast else (4e-6, 2e-7, 3e-6, 0.7)
    return made(fit_positive(predict, times.seconds, start, (1e-3, 1e-4, 1e-3, 1.0, 1.0)[: len(start)]))


def reduce_predictions(link: Link, times: Reduces) -> Floats:
    found = np.empty(len(times.size))
    for ranks in np.unique(times.ranks):
        rows = times.ranks == ranks
        found[rows] = all_reduce_seconds(link, int(ranks), times.size[rows])
    return found
