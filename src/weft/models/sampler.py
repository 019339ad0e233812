"""From a row of logits to a token, with the names and the order of vLLM.

1. Ids that must not be drawn yet (`Sampling.forbidden`) get -inf, then `logit_bias` is added.
2. Penalties: repetition over prompt and output (a positive logit is divided, a negative one multiplied), then
   frequency (times the count) and presence, both over the output only.
3. Greedy: the most probable token, the lowest id among equals. Otherwise, with l the logits after 1 and 2 and peak
   their largest, weight = exp((l - peak) / temperature) in float32, and in this order
   min_p keeps weight >= min_p; top_k keeps the k largest weights, lower ids first among equals; top_p keeps the
   shortest run of the largest weights that reaches top_p of the weight left by then.
4. The draw is an exponential race: the token with the largest weight / E(seed, position, token) wins, the lowest id
   among equals.

Scores are log-probabilities of the raw logits, before 1 to 4 (vLLM's default `raw_logprobs`); rank 1 is the most
probable, and among equals the lower id comes first.

The random numbers
------------------
E is an exponential variate that depends on nothing but seed, position and token id: so a draw does not depend on the
batch, the row, the thread or the filters of other rows, and any device can repeat it. All integers are unsigned.

    key = mix64(mix64(seed + G) + position * G)     modulo 2**64; G = 0x9E3779B97F4A7C15, mix64: SplitMix64's output mix
    x   = token * 0x9E3779B9 + low32(key)           modulo 2**32 from here on
    x   = (x ^ x >> 17) * 0xED5AD4BB
    x   = (x ^ x >> 11) + high32(key)
    x   = x * 0xAC4C1B51
    x   = (x ^ x >> 15) * 0x31848BAB
    x   = x ^ x >> 14
    v   = min(max(float32(x) * 2**-32, 2**-33), 1 - 2**-24)    float32, rounded to nearest
    E   = -log1p(-v)                                           float32

Small E, which decides races, has full relative precision down to 2**-33. Two devices differ only where the last bit of
exp or log1p decides between two tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from weft.core.plan import Sampling, TokenScore
from weft.core.sampling import SamplingParams
from weft.kernels.race import contenders
from weft.kernels.sample_parameters import COLDEST

Row = np.ndarray[Any, np.dtype[np.float32]]
Ids = np.ndarray[Any, np.dtype[np.int64]]

WEYL = 0x9E3779B97F4A7C15
MASK64 = 2**64 - 1
# The procedure's numbers as numpy scalars, made once: a draw takes a few microseconds.
STRIDE, FACTOR_1, FACTOR_2, FACTOR_3 = map(np.uint32, (0x9E3779B9, 0xED5AD4BB, 0xAC4C1B51, 0x31848BAB))
SHIFT_1, SHIFT_2, SHIFT_3, SHIFT_4 = map(np.uint32, (17, 11, 15, 14))
UNIT, LOWEST, HIGHEST = map(np.float32, (2**-32, 2**-33, 1 - 2**-24))
FORBIDDEN = "every token is forbidden"


def sample(logits: torch.Tensor, samplings: Sequence[Sampling]) -> list[tuple[int, TokenScore | None] | str]:
    """Draw one token for each row of float32 logits [R, V]; the logits are not changed.

    A row that cannot be drawn from gives the reason instead of a token; the other rows are good.
    """
    rows = _rows(logits)
    return draw(best_of_rows(rows), lambda: rows, samplings)


def draw(
    best: Sequence[tuple[int, float]], logits: Callable[[], Row], samplings: Sequence[Sampling]
) -> list[tuple[int, TokenScore | None] | str]:
    """The same from the most probable token of each row and its logit. logits: asked only where these do not do."""
    drawn: list[tuple[int, TokenScore | None] | str] = []
    for number, ((token, peak), sampling) in enumerate(zip(best, samplings, strict=True)):
        k = sampling.params.logprobs
        if not math.isfinite(peak):
            drawn.append(flaw(peak))
        elif plain(sampling):
            drawn.append((token, None if k is None else _score(logits()[number], token, k)))
        else:
            row = logits()[number]
            outcome = _choose(row, sampling)
            if isinstance(outcome, str):
                drawn.append(outcome)
            else:
                drawn.append((outcome, None if k is None else _score(row, outcome, k)))
    return drawn


def best_of_rows(rows: Row) -> list[tuple[int, float]]:
    """(token, logit) of the largest logit of each row, the lowest id among equals; the first NaN where there is one."""
    best = rows.argmax(axis=1)
    peaks = rows[np.arange(len(rows)), best]
    return list(zip(best.tolist(), peaks.tolist(), strict=True))


def score_prompt(logits: torch.Tensor, tokens: Sequence[int], k: int) -> list[TokenScore]:
    """Score tokens[i] by row i of float32 logits [R, V], with the k most probable tokens of the row.

    A row without a finite maximum scores NaN, rank 0 and nothing else.
    """
    scores = []
    for row, token in zip(_rows(logits), tokens, strict=True):
        fine = math.isfinite(row.max())
        scores.append(_score(row, token, k) if fine else TokenScore(token, math.nan, 0))
    return scores


def random_keys(seed: int, position: int) -> tuple[int, int]:
    """The two 32-bit keys (low, high) of one draw."""
    key = _mix64((_mix64((seed + WEYL) & MASK64) + position * WEYL) & MASK64)
    return key & 0xFFFFFFFF, key >> 32


def exponentials(seed: int, position: int, tokens: Ids) -> Row:
    """E(seed, position, token) for each of `tokens`, float32, as the module's text defines it."""
    low, high = random_keys(seed, position)
    x = tokens.astype(np.uint32)
    x *= STRIDE
    x += np.uint32(low)
    x ^= x >> SHIFT_1
    x *= FACTOR_1
    x ^= x >> SHIFT_2
    x += np.uint32(high)
    x *= FACTOR_2
    x ^= x >> SHIFT_3
    x *= FACTOR_3
    x ^= x >> SHIFT_4
    v = x.astype(np.float32)
    v *= UNIT
    np.maximum(v, LOWEST, out=v)
    np.minimum(v, HIGHEST, out=v)
    np.negative(v, out=v)
    np.log1p(v, out=v)
    return np.negative(v, out=v)


def _mix64(x: int) -> int:
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK64
    return x ^ x >> 31


def _rows(logits: torch.Tensor) -> Row:
    rows: Row = logits.detach().to("cpu", torch.float32).contiguous().numpy()
    return rows


def flaw(peak: float) -> str:
    """What is wrong with a row whose largest logit is this, and not finite."""
    if math.isnan(peak):
        return "the model computed NaN logits"
    return "the model computed infinite logits" if peak > 0 else "the model computed -inf for every logit"


def plain(sampling: Sampling) -> bool:
    """Whether the most probable token of the raw logits is the answer."""
    params = sampling.params
    # Asked for every token: not `params.greedy`, which is a call more.
    return params.temperature == 0.0 and not (sampling.forbidden or params.logit_bias or params.penalised)


def _choose(row: Row, sampling: Sampling) -> int | str:
    params = sampling.params
    if params.penalised or params.logit_bias or sampling.forbidden:
        row = row.copy()
        flaw = _adjust(row, sampling)
        if flaw is not None:
            return flaw
    if params.greedy:
        return int(row.argmax())
    return _draw(row, sampling)


def _adjust(row: Row, sampling: Sampling) -> str | None:
    """Steps 1 and 2 of the module's text, in place; returns the reason why nothing can be drawn, if so."""
    params = sampling.params
    if sampling.forbidden:
        # An end-of-text id of the tokenizer may lie beyond the logits; it cannot be drawn anyway.
        row[[token for token in sampling.forbidden if token < len(row)]] = -np.inf
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        if max(ids) >= len(row):
            return f"logit_bias names token {max(ids)}; the model has ids 0 to {len(row) - 1}"
        row[list(ids)] += np.array(biases, np.float32)
    if params.penalised:
        _penalise(row, sampling)
    return None if math.isfinite(row.max()) else FORBIDDEN


def _penalise(row: Row, sampling: Sampling) -> None:
    params = sampling.params
    output = np.array(sampling.output, np.int64)
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.concatenate([np.array(sampling.prompt, np.int64), output]))
        logits, penalty = row[seen], np.float32(params.repetition_penalty)
        row[seen] = np.where(logits > 0, logits / penalty, logits * penalty)
    if len(output):
        ids, counts = np.unique(output, return_counts=True)
        row[ids] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
        row[ids] -= np.float32(params.presence_penalty)


def _draw(row: Row, sampling: Sampling) -> int:
    """Steps 3 and 4 of the module's text for a row with a finite maximum."""
    params, peak = sampling.params, row.max()
    temperature = np.float32(max(params.temperature, COLDEST))
    ids = None
    if params.min_p <= 0.0 and params.top_k <= 0 and params.top_p >= 1.0:
        keys = random_keys(sampling.seed, sampling.position)
        ids = contenders(row, float(peak), float(temperature), keys)
    with np.errstate(over="ignore", under="ignore"):  # a small temperature sends the other tokens to weight 0
        weights = (row if ids is None else row[ids]) - peak
        if params.temperature != 1.0:
            weights /= temperature
        np.exp(weights, out=weights)
        if ids is None:
            ids, weights = _survivors(weights, params)
        return int(ids[(weights / exponentials(sampling.seed, sampling.position, ids)).argmax()])


def _survivors(weights: Row, params: SamplingParams) -> tuple[Ids, Row]:
    """The ids that the filters leave, ascending, and their weights; the largest weight is 1."""
    ids: Ids = np.arange(len(weights))
    if params.min_p > 0.0:
        ids = np.flatnonzero(weights >= np.float32(params.min_p))
        weights = weights[ids]
    if 0 < params.top_k < len(ids):
        ids, weights = _top_k(ids, weights, params.top_k)
    if params.top_p < 1.0:
        ids, weights = _top_p(ids, weights, params.top_p)
    return ids, weights


def _top_k(ids: Ids, weights: Row, k: int) -> tuple[Ids, Row]:
    kept = _largest(weights, k)
    kept.sort()
    return ids[kept], weights[kept]


def _top_p(ids: Ids, weights: Row, p: float) -> tuple[Ids, Row]:
    total = float(weights.sum(dtype=np.float64))
    # Weights below (1 - p) * total / n add up to less than (1 - p) * total, so the nucleus has none of them: sort the
    # rest only. The factor leaves room for rounding.
    likely = np.flatnonzero(weights >= 0.99 * (1.0 - p) * total / len(weights))
    order = likely[np.argsort(-weights[likely], kind="stable")]
    mass = np.cumsum(weights[order], dtype=np.float64)
    kept = np.sort(order[: int(np.searchsorted(mass, p * total)) + 1])
    return ids[kept], weights[kept]


def _largest(values: Row, k: int) -> Ids:
    """Indices of the k largest values, largest first, the lower index first among equals."""
    bound = torch.from_numpy(values).topk(k, sorted=False).values.min().item()
    close = np.flatnonzero(values >= np.float32(bound))
    order: Ids = close[np.argsort(-values[close], kind="stable")[:k]]
    return order


def _score(row: Row, token: int, k: int) -> TokenScore:
    """Log-probability and rank of `token`, and the k most probable tokens, of a row with a finite maximum."""
    with np.errstate(under="ignore"):
        shifted = row - row.max()
        # Row by row on purpose: the order of summation must not depend on the batch.
        norm = math.log(float(np.exp(shifted).sum(dtype=np.float64)))
    value = shifted[token]
    rank = 1 + np.count_nonzero(shifted > value) + np.count_nonzero(shifted[:token] == value)
    best = _largest(shifted, min(k, len(row))) if k else ()
    return TokenScore(
        token, float(value) - norm, int(rank), tuple((int(other), float(shifted[other]) - norm) for other in best)
    )
