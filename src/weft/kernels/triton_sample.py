"""Triton: from rows of logits to tokens, as models/sampler.py draws them: the same filters and the same random numbers.

Weights are compared by their bits (they are not negative, so bits order them), and summed as integers of 2**-40, whose
sum depends on no order. A filter leaves the weights above a threshold and so many of those that equal it, lowest ids
first; thresholds are searched some bits at a time, with one pass over the row each. Two devices differ only where the
last bits of exp or log1p, or 2**-40 of the weights' sum, decide between two tokens. Nothing waits for the device.

The most probable token, and the draw of a row without top-k and top-p, are found by part of the vocabulary, so that a
single row keeps a whole GPU busy; a filter's passes depend on one another, and are one program's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from weft.kernels.sample_parameters import Parameters
from weft.kernels.triton_numbers import helper
from weft.kernels.triton_tiles import SAMPLE, SAMPLE_PARTS, architecture

_UNIT = tl.constexpr(2.0**40)
_ALL = tl.constexpr(0x7FFFFFFF)
_WEYL = tl.constexpr(0x9E3779B97F4A7C15)


@helper
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@helper
def _exponentials(token, low, high):
    """E of models/sampler.py for token ids int32 [N] and the two uint32 keys of a draw."""
    x = token.to(tl.uint32) * 0x9E3779B9 + low
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = (x ^ (x >> 11)) + high
    x = x * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    x = x ^ (x >> 14)
    v = tl.minimum(tl.maximum(x.to(tl.float32) * 2.0**-32, 2.0**-33), 1.0 - 2.0**-24)
    # -log1p(-v): 1 - v = m / 2**k, m from 0.5 to 1, and -log(m) = 2 atanh((1 - m) / (1 + m)) by its series.
    bits = (1.0 - v).to(tl.int32, bitcast=True)
    large = v > 0.5
    power = tl.where(large, 126 - (bits >> 23), 0).to(tl.float32)
    rest = 1.0 - ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    rest = tl.where(large, rest, v)
    s = tl.div_rn(rest, 2.0 - rest)
    square = s * s
    series = square * (1.0 / 17) + 1.0 / 15
    series = series * square + 1.0 / 13
    series = series * square + 1.0 / 11
    series = series * square + 1.0 / 9
    series = series * square + 1.0 / 7
    series = series * square + 1.0 / 5
    series = series * square + 1.0 / 3
    return power * 0.6931471805599453 + 2.0 * (s + s * square * series)


@helper
def _weights(source, at, vocabulary, peak, temperature):
    """exp((logit - peak) / temperature); 0 beyond the vocabulary."""
    shifted = tl.load(source + at, mask=at < vocabulary, other=float("-inf")) - peak
    return tl.exp(tl.div_rn(shifted, tl.zeros(shifted.shape, tl.float32) + temperature))


@helper
def _counted(source, vocabulary, peak, temperature, bits, MASS: tl.constexpr, CHUNK: tl.constexpr):
    """Of the weights whose bits are `bits` or more: how many, or their sum in units of 2**-40. int64."""
    found = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, vocabulary, CHUNK):
        at = start + tl.arange(0, CHUNK)
        weights = _weights(source, at, vocabulary, peak, temperature)
        inside = (weights.to(tl.int32, bitcast=True) >= bits) & (at < vocabulary)
        found += tl.where(inside, (weights * _UNIT).to(tl.int64), 0) if MASS else inside.to(tl.int64)
    return tl.sum(found, axis=0)


@helper
def _threshold(
    source, vocabulary, peak, temperature, target, MASS: tl.constexpr, CHUNK: tl.constexpr, DIGITS: tl.constexpr
):  # fmt: skip
    """The largest bits such that the weights from there on are `target` or more, in number or in mass: DIGITS of the 30
    bits that weights up to 1 have, time after time."""
    bits = target.to(tl.int32) * 0
    for turn in range(30 // DIGITS):
        step = 1 << (30 - DIGITS * (turn + 1))
        bounds = bits + step * tl.arange(0, 2**DIGITS)
        found = tl.zeros((CHUNK, 2**DIGITS), tl.int64)
        for start in range(0, vocabulary, CHUNK):
            at = start + tl.arange(0, CHUNK)
            weights = _weights(source, at, vocabulary, peak, temperature)
            worth = (weights * _UNIT).to(tl.int64) if MASS else (at < vocabulary).to(tl.int64)
            above = weights.to(tl.int32, bitcast=True)[:, None] >= bounds[None, :]
            found += tl.where(above, worth[:, None], 0)
        # The sums fall from bound to bound; the first of them was found to reach the target before.
        bits += step * (tl.sum((tl.sum(found, axis=0) >= target).to(tl.int32), axis=0) - 1)
    return bits


@helper
def _filtered(
    source, vocabulary, peak, temperature, min_p, top_k, top_p, CHUNK: tl.constexpr, DIGITS: tl.constexpr
):  # fmt: skip
    """(bits, count): the filters leave weights above `bits`, and of those that equal it the first `count`."""
    bits, equals = min_p.to(tl.int32, bitcast=True), (top_k * 0 + _ALL).to(tl.int64)
    if top_k > 0:  # noqa: SIM102  (numbers of the device know no `and`)
        if _counted(source, vocabulary, peak, temperature, bits, False, CHUNK) > top_k:
            bits = _threshold(source, vocabulary, peak, temperature, top_k.to(tl.int64), False, CHUNK, DIGITS)
            equals = top_k - _counted(source, vocabulary, peak, temperature, bits + 1, False, CHUNK)
    if top_p < 1.0:
        above = _counted(source, vocabulary, peak, temperature, bits + 1, True, CHUNK)
        level = _counted(source, vocabulary, peak, temperature, bits, False, CHUNK)
        level -= _counted(source, vocabulary, peak, temperature, bits + 1, False, CHUNK)
        equals = tl.minimum(equals, level)
        each = (bits.to(tl.float32, bitcast=True) * _UNIT).to(tl.int64)
        target = tl.ceil((above + equals * each).to(tl.float64) * top_p).to(tl.int64)
        if above >= target:
            bits = tl.maximum(bits, _threshold(source, vocabulary, peak, temperature, target, True, CHUNK, DIGITS))
            above = _counted(source, vocabulary, peak, temperature, bits + 1, True, CHUNK)
            each = (bits.to(tl.float32, bitcast=True) * _UNIT).to(tl.int64)
            equals = equals * 0 + _ALL
        equals = tl.minimum(equals, tl.maximum((target - above + each - 1) // tl.maximum(each, 1), 1))
    return bits, equals


@helper
def _race(source, vocabulary, peak, temperature, bits, equals, low, high, CHUNK: tl.constexpr):
    """The token with the largest weight / E among those that the filters leave."""
    fastest, winner = tl.full((CHUNK,), -1.0, tl.float32), tl.zeros((CHUNK,), tl.int32)
    before = equals * 0
    for start in range(0, vocabulary, CHUNK):
        at = start + tl.arange(0, CHUNK)
        weights = _weights(source, at, vocabulary, peak, temperature)
        ordered = weights.to(tl.int32, bitcast=True)
        level = ((ordered == bits) & (at < vocabulary)).to(tl.int64)
        kept = (ordered > bits) | ((level == 1) & (before + tl.cumsum(level, axis=0) <= equals))
        before += tl.sum(level, axis=0)
        speed = tl.where(kept, tl.div_rn(weights, _exponentials(at, low, high)), -1.0)
        faster = speed > fastest
        fastest, winner = tl.where(faster, speed, fastest), tl.where(faster, at, winner)
    return tl.min(tl.where(fastest == tl.max(fastest, axis=0), winner, _ALL), axis=0)


@helper
def _most_probable(source, vocabulary, CHUNK: tl.constexpr):
    """(token, logit) of the largest, the lowest id among equals; the logit is NaN where there is one."""
    highest, best = tl.full((CHUNK,), float("-inf"), tl.float32), tl.zeros((CHUNK,), tl.int32) + _ALL
    broken = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, vocabulary, CHUNK):
        at = start + tl.arange(0, CHUNK)
        logits = tl.load(source + at, mask=at < vocabulary, other=float("-inf"))
        higher = logits > highest
        highest, best = tl.where(higher, logits, highest), tl.where(higher, at, best)
        broken |= (logits != logits).to(tl.int32)
    peak = tl.max(highest, axis=0)
    token = tl.minimum(tl.min(tl.where(highest == peak, best, _ALL), axis=0), vocabulary - 1)
    return token, tl.where(tl.max(broken, axis=0) > 0, float("nan"), peak)


@triton.jit
def edit_kernel(logits, starts, ids, biases, counts, repetition, frequency, presence, vocabulary, EDITS: tl.constexpr):
    """One row's logits [V], in place: ids [E] are distinct; counts: -1 not seen yet, else how often in the output."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocabulary
    repeat = tl.load(repetition + row)
    often, once = tl.load(frequency + row), tl.load(presence + row)
    end = tl.load(starts + row + 1)
    for start in range(tl.load(starts + row), end, EDITS):
        at = start + tl.arange(0, EDITS)
        mask = at < end
        token = tl.load(ids + at, mask=mask, other=0)
        count = tl.load(counts + at, mask=mask, other=-1)
        logit = tl.load(logits + token, mask=mask, other=0.0) + tl.load(biases + at, mask=mask, other=0.0)
        penalised = tl.where(logit > 0, tl.div_rn(logit, tl.zeros((EDITS,), tl.float32) + repeat), logit * repeat)
        logit = tl.where(count >= 0, penalised, logit)
        logit -= often * tl.maximum(count, 0).to(tl.float32)
        logit -= tl.where(count > 0, once, 0.0)
        tl.store(logits + token, logit, mask=mask)


@triton.jit
def peak_kernel(logits, part_peaks, part_tokens, vocabulary, PART: tl.constexpr):
    """Of a part of a row: the largest logit, NaN where there is one, and its token, the lowest id among equals."""
    row, part = tl.program_id(0), tl.program_id(1)
    at = part * PART + tl.arange(0, PART)
    found = tl.load(logits + row.to(tl.int64) * vocabulary + at, mask=at < vocabulary, other=float("-inf"))
    some = found > float("-inf")
    peak = tl.max(tl.where(some, found, float("-inf")), axis=0)
    token = tl.min(tl.where(some & (found == peak), at, _ALL), axis=0)
    broken = tl.max((found != found).to(tl.int32), axis=0) > 0
    place = row * tl.num_programs(1) + part
    tl.store(part_peaks + place, tl.where(broken, float("nan"), peak))
    tl.store(part_tokens + place, token)


@helper
def _joined(part_peaks, part_tokens, row, vocabulary, PART: tl.constexpr, PARTS: tl.constexpr):
    """(token, logit) of a row's largest, as `_most_probable`, from its parts."""
    count = (vocabulary + PART - 1) // PART
    part = tl.arange(0, PARTS)
    found = tl.load(part_peaks + row * count + part, mask=part < count, other=float("-inf"))
    peaks = tl.where(found > float("-inf"), found, float("-inf"))
    peak = tl.max(peaks, axis=0)
    best = tl.load(part_tokens + row * count + part, mask=part < count, other=_ALL)
    token = tl.minimum(tl.min(tl.where(peaks == peak, best, _ALL), axis=0), vocabulary - 1)
    return token, tl.where(tl.max((found != found).to(tl.int32), axis=0) > 0, float("nan"), peak)


@helper
def _keys(seeds, positions, row):
    """The two uint32 keys of a row's draw."""
    seed = tl.load(seeds + row).to(tl.uint64, bitcast=True)
    position = tl.load(positions + row).to(tl.uint64, bitcast=True)
    key = _mix64(_mix64(seed + _WEYL) + position * _WEYL)
    return (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def race_kernel(
    logits, seeds, positions, temperatures, top_ks, top_ps, min_ps,  # as draw_kernel
    part_peaks, part_tokens,  # of peak_kernel
    part_speeds,  # float32 [R, parts]
    part_winners,  # int32 [R, parts]
    vocabulary,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Of a part of a row that is drawn from without top-k and top-p: the largest weight / E, and its token, the lowest
    id among equals."""
    row, part = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    filtered = (tl.load(top_ks + row) > 0) | (tl.load(top_ps + row) < 1.0)
    _, peak = _joined(part_peaks, part_tokens, row, vocabulary, PART, PARTS)
    if (temperature > 0.0) & (tl.abs(peak) < float("inf")) & (not filtered):
        low, high = _keys(seeds, positions, row)
        at = part * PART + tl.arange(0, PART)
        weights = _weights(logits + row.to(tl.int64) * vocabulary, at, vocabulary, peak, temperature)
        kept = (weights >= tl.load(min_ps + row)) & (at < vocabulary)
        speed = tl.where(kept, tl.div_rn(weights, _exponentials(at, low, high)), -1.0)
        fastest = tl.max(speed, axis=0)
        place = row * tl.num_programs(1) + part
        tl.store(part_speeds + place, fastest)
        tl.store(part_winners + place, tl.min(tl.where(speed == fastest, at, _ALL), axis=0))


@triton.jit
def draw_kernel(
    logits,  # float32 [R, V], after bias and penalties
    seeds, positions,  # int64 [R]
    temperatures, top_ks, top_ps, min_ps,  # float32, int32, float64, float32 [R]; None: all rows are greedy
    part_peaks, part_tokens,  # of peak_kernel
    part_speeds, part_winners,  # of race_kernel; None: all rows are greedy
    tokens,  # int64 [R]
    peaks,  # float32 [R]
    vocabulary,
    PART: tl.constexpr,
    PARTS: tl.constexpr,  # of a row, or more
    CHUNK: tl.constexpr,
    DIGITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocabulary
    token, peak = _joined(part_peaks, part_tokens, row, vocabulary, PART, PARTS)
    tl.store(peaks + row, peak)
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
        if (temperature > 0.0) & (tl.abs(peak) < float("inf")):
            top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
            if (top_k > 0) | (top_p < 1.0):
                bits, equals = _filtered(
                    logits, vocabulary, peak, temperature, tl.load(min_ps + row), top_k, top_p, CHUNK, DIGITS
                )
                low, high = _keys(seeds, positions, row)
                token = _race(logits, vocabulary, peak, temperature, bits, equals, low, high, CHUNK)
            else:
                count = (vocabulary + PART - 1) // PART
                part = tl.arange(0, PARTS)
                speeds = tl.load(part_speeds + row * count + part, mask=part < count, other=-1.0)
                winners = tl.load(part_winners + row * count + part, mask=part < count, other=_ALL)
                token = tl.min(tl.where(speeds == tl.max(speeds, axis=0), winners, _ALL), axis=0)
    tl.store(tokens + row, token.to(tl.int64))


@triton.jit(do_not_specialize=["k"])
def score_kernel(logits, tokens, logprobs, ranks, top_tokens, top_logprobs, vocabulary, k, CHUNK: tl.constexpr):
    """Log-probability and rank of a row's token, and the k most probable tokens."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocabulary
    _, peak = _most_probable(logits, vocabulary, CHUNK)
    token = tl.load(tokens + row)
    value = tl.load(logits + token) - peak
    total, ahead = tl.zeros((CHUNK,), tl.int64), tl.zeros((CHUNK,), tl.int32)
    for start in range(0, vocabulary, CHUNK):
        at = start + tl.arange(0, CHUNK)
        shifted = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")) - peak
        total += (tl.exp(shifted) * _UNIT).to(tl.int64)
        ahead += ((shifted > value) | ((shifted == value) & (at < token))).to(tl.int32)
    norm = tl.log((tl.sum(total, axis=0).to(tl.float64) / _UNIT).to(tl.float32))
    norm = tl.where(tl.abs(peak) < float("inf"), norm, float("nan"))
    tl.store(logprobs + row, value - norm)
    tl.store(ranks + row, 1 + tl.sum(ahead, axis=0))
    last, last_id = value * 0.0 + float("inf"), -1
    for place in range(k):
        highest, best = tl.full((CHUNK,), float("-inf"), tl.float32), tl.zeros((CHUNK,), tl.int32) + _ALL
        for start in range(0, vocabulary, CHUNK):
            at = start + tl.arange(0, CHUNK)
            shifted = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")) - peak
            fresh = (shifted < last) | ((shifted == last) & (at > last_id))
            better = fresh & (at < vocabulary) & ((shifted > highest) | (best == _ALL))
            highest, best = tl.where(better, shifted, highest), tl.where(better, at, best)
        last = tl.max(highest, axis=0)
        last_id = tl.min(tl.where(highest == last, best, _ALL), axis=0)
        tl.store(top_tokens + row * k + place, last_id)
        tl.store(top_logprobs + row * k + place, last - norm)


class Scores(NamedTuple):
    """Of the raw logits. logprobs float32 [R] and ranks int32 [R] of the rows' tokens; the k most probable tokens int32
    and their log-probabilities float32 [R, k]. A row without a finite maximum scores NaN."""

    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_tokens: torch.Tensor
    top_logprobs: torch.Tensor


class Drawn(NamedTuple):
    """tokens int64 [R]. peaks float32 [R]: the largest raw logit, NaN where there is one. left float32 [R]: the largest
    logit after bias, penalties and forbidden ids; None where no row has any. A row for which either is not finite has
    no token, whatever `tokens` says (some id of the vocabulary). scores: where a row asks for any."""

    tokens: torch.Tensor
    peaks: torch.Tensor
    left: torch.Tensor | None
    scores: Scores | None


def sample(logits: torch.Tensor, parameters: Parameters) -> Drawn:
    """Draw one token for each row of float32 logits [R, V]; the logits are not changed. Raises TypeError,
    ValueError."""
    _check(logits)
    rows, vocabulary = logits.shape
    edits = parameters.edits
    chunk, digits, warps = SAMPLE[architecture(logits.device)]
    chunk = min(chunk, triton.next_power_of_2(vocabulary))
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    peaks = torch.empty(rows, dtype=torch.float32, device=logits.device)
    source = logits
    if rows and edits is not None:
        source = logits.clone()
        edit_kernel[(rows,)](source, *edits.tensors, vocabulary, EDITS=256, num_warps=4, enable_fp_fusion=False)
    if rows:
        filters = (parameters.top_ks, parameters.top_ps, parameters.min_ps)
        drawing = (parameters.seeds, parameters.positions, parameters.temperatures, *filters)
        size, part_warps = SAMPLE_PARTS[architecture(logits.device)]
        size = min(size, triton.next_power_of_2(vocabulary))
        parts = triton.cdiv(vocabulary, size)
        shape = {"PART": size, "enable_fp_fusion": False}
        tops = _partial(rows, parts, logits.device)
        peak_kernel[(rows, parts)](source, *tops, vocabulary, num_warps=part_warps, **shape)
        shape |= {"PARTS": triton.next_power_of_2(parts)}
        race: tuple[torch.Tensor | None, ...] = (None, None)
        if parameters.temperatures is not None:
            race = _partial(rows, parts, logits.device)
            race_kernel[(rows, parts)](source, *drawing, *tops, *race, vocabulary, num_warps=part_warps, **shape)
        draw_kernel[(rows,)](
            source, *drawing, *tops, *race, tokens, peaks, vocabulary, CHUNK=chunk, DIGITS=digits, num_warps=warps,
            **shape,
        )  # fmt: skip
    scores = None if parameters.scores is None else score(logits, tokens, parameters.scores)
    return Drawn(tokens, peaks, None, scores) if edits is None else Drawn(tokens, logits.amax(-1), peaks, scores)


def _partial(rows: int, parts: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For a number and a token of each part of each row."""
    shape = (rows, parts)
    return torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int32, device=device)


def score(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> Scores:
    """Score tokens int64 [R] by rows of float32 logits [R, V]. Raises TypeError, ValueError."""
    _check(logits)
    rows, vocabulary = logits.shape
    if not 0 <= k <= vocabulary:
        raise ValueError(f"{k = } most probable tokens were asked for, of {vocabulary}")
    chunk, _, warps = SAMPLE[architecture(logits.device)]
    chunk = min(chunk, triton.next_power_of_2(vocabulary))
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(rows, dtype=torch.int32, device=logits.device)
    top_tokens = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    top_logprobs = torch.empty(rows, k, dtype=torch.float32, device=logits.device)
    if rows:
        score_kernel[(rows,)](
            logits, tokens, logprobs, ranks, top_tokens, top_logprobs, vocabulary, k, CHUNK=chunk, num_warps=warps
        )
    return Scores(logprobs, ranks, top_tokens, top_logprobs)


def _check(logits: torch.Tensor) -> None:
    if logits.dtype is not torch.float32:
        raise TypeError(f"logits are {logits.dtype}; they must be float32")
    if logits.dim() != 2 or not logits.is_contiguous() or not logits.shape[1]:
        raise ValueError(f"logits are {list(logits.shape)} {logits.stride()}; they must be contiguous [R, V]")
