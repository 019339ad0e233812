"""The sampler against a slow reference in plain Python, transformers' logits processors, and the laws of chance."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from weft.core.plan import Sampling, TokenScore
from weft.core.sampling import SamplingParams
from weft.models import sampler

INF = float("inf")


# ---------------------------------------------------------------- a slow reference, from the module's text


def reference_word(seed: int, position: int, token: int) -> int:
    def mix(x: int) -> int:
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) % 2**64
        return x ^ x >> 31

    g = 0x9E3779B97F4A7C15
    key = mix((mix((seed + g) % 2**64) + position * g) % 2**64)
    x = (token * 0x9E3779B9 + key % 2**32) % 2**32
    x = (x ^ x >> 17) * 0xED5AD4BB % 2**32
    x = ((x ^ x >> 11) + (key >> 32)) % 2**32
    x = x * 0xAC4C1B51 % 2**32
    x = (x ^ x >> 15) * 0x31848BAB % 2**32
    return x ^ x >> 14


def float32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def reference_exponential(seed: int, position: int, token: int) -> float:
    v = float32(reference_word(seed, position, token) / 2**32)
    return -math.log1p(-min(max(v, 2**-33), 1 - 2**-24))


def reference_weights(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """What is left to draw from, in float64: {token: weight}."""
    params, row = sampling.params, dict(enumerate(logits))
    for token in sampling.forbidden:
        row[token] = -INF
    for token, bias in params.logit_bias:
        row[token] += bias
    for token in {*sampling.prompt, *sampling.output}:
        row[token] = (
            row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
        )
    for token, count in Counter(sampling.output).items():
        row[token] -= params.frequency_penalty * count + params.presence_penalty
    best = sorted(row, key=lambda token: (-row[token], token))
    if params.temperature == 0:
        return {best[0]: 1.0}
    weights = {token: math.exp((row[token] - row[best[0]]) / params.temperature) for token in best}
    kept = [token for token in best if weights[token] >= params.min_p]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    total, mass, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if params.top_p < 1.0 and mass >= params.top_p * total:
            break
        nucleus.append(token)
        mass += weights[token]
    return {token: weights[token] for token in nucleus}


def reference_draw(logits: list[float], sampling: Sampling) -> int:
    weights = reference_weights(logits, sampling)
    race = {
        token: weight / reference_exponential(sampling.seed, sampling.position, token)
        for token, weight in weights.items()
    }
    return min(race, key=lambda token: (-race[token], token))


def one(logits: Any, sampling: Sampling) -> tuple[int, TokenScore | None] | str:
    return sampler.sample(torch.as_tensor(logits, dtype=torch.float32)[None], [sampling])[0]


def token_of(outcome: tuple[int, TokenScore | None] | str) -> int:
    assert not isinstance(outcome, str), outcome
    return outcome[0]


def greedy(**changes: Any) -> Sampling:
    return Sampling(SamplingParams(temperature=0.0, **changes), seed=0, position=5)


def random_sampling(rng: np.random.Generator, vocabulary: int) -> Sampling:
    """Everything switched on or off at random."""

    def maybe(value: Any, otherwise: Any) -> Any:
        return value if rng.random() < 0.5 else otherwise

    ids = rng.permutation(vocabulary).tolist()
    params = SamplingParams(
        temperature=maybe(float(rng.uniform(0.2, 2.0)), maybe(0.0, 1.0)),
        top_k=maybe(int(rng.integers(1, 2 * vocabulary)), 0),
        top_p=maybe(float(rng.uniform(0.05, 1.0)), 1.0),
        min_p=maybe(float(rng.uniform(0.0, 0.3)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2.0)), 1.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        logit_bias=maybe(tuple((token, float(rng.uniform(-5, 5))) for token in ids[:3]), ()),
        logprobs=maybe(int(rng.integers(0, 8)), None),
    )
    draws = rng.integers(0, vocabulary, size=12).tolist()
    return Sampling(
        params,
        seed=int(rng.integers(0, 2**63)),
        position=int(rng.integers(0, 2**31)),
        prompt=tuple(draws[:8]) if params.penalised else (),
        output=tuple(draws[8:]) if params.penalised else (),
        forbidden=maybe(tuple(ids[3:5]), ()),
    )


# ---------------------------------------------------------------- random numbers


@given(
    st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**31), st.lists(st.integers(0, 2**20), min_size=1, max_size=20)
)
@settings(max_examples=50, deadline=None)
def test_exponentials_are_those_of_the_written_procedure(seed: int, position: int, tokens: list[int]) -> None:
    ours = sampler.exponentials(seed, position, np.array(tokens))
    theirs = [reference_exponential(seed, position, token) for token in tokens]
    np.testing.assert_allclose(ours, theirs, rtol=3e-7)


def test_exponentials_do_not_change_between_versions() -> None:
    """A seed is a promise: these numbers are recorded, and a device with kernels of its own must give them too."""
    words = [reference_word(1234, 7, token) for token in (0, 1, 4095)]
    assert words == RECORDED_WORDS
    ours = sampler.exponentials(1234, 7, np.array([0, 1, 4095]))
    np.testing.assert_allclose(ours, RECORDED_EXPONENTIALS, rtol=3e-7)


RECORDED_WORDS = [2724332408, 3881702359, 2161395798]
RECORDED_EXPONENTIALS = [1.0059639396907456, 2.3411104379254715, 0.6996465655100692]


def chi_square(counts: Any, expected: Any) -> float:
    """Standard deviations that chi-square lies above its mean (for many degrees of freedom)."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    freedom = counts.size - 1
    return float(((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("axis", ["tokens", "positions", "seeds"])
def test_exponentials_are_exponential_along_every_axis(axis: str) -> None:
    n, bins = 2**16, 256
    if axis == "tokens":
        drawn = sampler.exponentials(3, 11, np.arange(n))
    elif axis == "positions":
        drawn = np.array([sampler.exponentials(3, i, np.array([17]))[0] for i in range(n)])
    else:
        drawn = np.array([sampler.exponentials(i, 11, np.array([17]))[0] for i in range(n)])
    uniform = np.exp(-drawn.astype(np.float64))
    counts = np.bincount((uniform * bins).astype(int).clip(0, bins - 1), minlength=bins)
    assert abs(chi_square(counts, np.full(bins, n / bins))) < 5
    # Neighbours are independent: pairs fill the unit square evenly.
    pairs = (uniform[:-1] * 16).astype(int).clip(0, 15) * 16 + (uniform[1:] * 16).astype(int).clip(0, 15)
    assert abs(chi_square(np.bincount(pairs, minlength=256), np.full(256, (n - 1) / 256))) < 6


def test_streams_of_neighbouring_seeds_and_positions_are_not_related() -> None:
    tokens = np.arange(4096)
    streams = np.stack([sampler.exponentials(seed, position, tokens) for seed in range(8) for position in range(8)])
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlation).max() < 5.5 / math.sqrt(len(tokens))


def test_the_smallest_exponentials_keep_their_precision() -> None:
    """Rare tokens win by tiny E: the lowest values must not be a few steps."""
    low = np.sort(sampler.exponentials(0, 0, np.arange(2**22)))[:64]
    assert len(np.unique(low)) >= 63
    assert 0 < low[0] < 2**-20


def token_of_word(word: int, seed: int, position: int) -> int:
    """The token id (below 2**32) whose word is the given one: the procedure backwards."""

    def unshift(x: int, by: int) -> int:
        y = x
        for _ in range(32 // by):
            y = x ^ y >> by
        return y

    low, high = sampler.random_keys(seed, position)
    x = unshift(word, 14) * pow(0x31848BAB, -1, 2**32) % 2**32
    x = unshift(x, 15) * pow(0xAC4C1B51, -1, 2**32) % 2**32
    x = unshift((x - high) % 2**32, 11) * pow(0xED5AD4BB, -1, 2**32) % 2**32
    return (unshift(x, 17) - low) * pow(0x9E3779B9, -1, 2**32) % 2**32


@pytest.mark.parametrize("word, bound", [(0, 2**-33), (1, 2**-32), (2**32 - 1, 24 * math.log(2)), (2**31, math.log(2))])
def test_the_ends_of_the_range_are_finite_and_positive(word: int, bound: float) -> None:
    token = token_of_word(word, 77, 5)
    assert reference_word(77, 5, token) == word
    assert sampler.exponentials(77, 5, np.array([token]))[0] == pytest.approx(bound, rel=1e-6)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 12},
        {"top_p": 0.8},
        {"min_p": 0.1, "top_p": 0.9, "temperature": 1.3},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.4, "presence_penalty": 0.3, "top_k": 25},
    ],
)
def test_draws_follow_the_distribution(changes: dict[str, Any]) -> None:
    logits = torch.tensor(np.random.default_rng(5).normal(0, 2, 40), dtype=torch.float32)
    params = SamplingParams(**changes)
    known = {"prompt": (1, 2, 3), "output": (3, 4, 4)} if params.penalised else {}
    n = 8192
    samplings = [Sampling(params, seed=99, position=i, **known) for i in range(n)]
    counts = Counter(token_of(outcome) for outcome in sampler.sample(logits.expand(n, -1), samplings))
    weights = reference_weights(logits.tolist(), samplings[0])
    total = sum(weights.values())
    assert set(counts) <= set(weights)
    common = [token for token, weight in weights.items() if n * weight / total >= 5]
    expected = [n * weights[token] / total for token in common]
    found = [counts[token] for token in common]
    if (rest := n - sum(expected)) >= 1e-6:
        expected.append(rest)
        found.append(n - sum(found))
    assert chi_square(found, expected) < 4.5


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_draws_are_those_of_the_slow_reference(random: int) -> None:
    rng = np.random.default_rng(random)
    vocabulary = int(rng.integers(6, 50))
    logits = rng.normal(0, 3, vocabulary).astype(np.float32)
    if rng.random() < 0.3:  # ties, as BF16 logits have them
        logits = np.round(logits)
    sampling = random_sampling(rng, vocabulary)
    params = dataclasses.replace(sampling.params, top_p=_away_from_edges(logits, sampling))
    sampling = sampling._replace(params=params)
    assert token_of(one(logits, sampling)) == reference_draw(logits.tolist(), sampling)


def _away_from_edges(logits: Any, sampling: Sampling) -> float:
    """top_p, moved off the points where the float32 of the sampler and the float64 of the reference may part."""
    whole = sampling._replace(params=dataclasses.replace(sampling.params, top_p=1.0))
    weights = list(reference_weights(logits.tolist(), whole).values())
    steps = np.cumsum(weights) / np.sum(weights)
    top_p = sampling.params.top_p
    return top_p + 1e-4 if top_p < 1.0 and np.abs(steps - top_p).min() < 1e-5 and top_p < 0.99 else top_p


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_a_row_does_not_depend_on_its_batch(random: int) -> None:
    rng = np.random.default_rng(random)
    vocabulary, count = int(rng.integers(6, 9000)), int(rng.integers(2, 9))
    logits = torch.tensor(rng.normal(0, 3, (count, vocabulary)), dtype=torch.float32)
    samplings = [random_sampling(rng, vocabulary) for _ in range(count)]
    together = sampler.sample(logits, samplings)
    order = rng.permutation(count).tolist()
    shuffled = sampler.sample(logits[order], [samplings[i] for i in order])
    assert [together[i] for i in order] == shuffled
    for i in range(count):
        assert sampler.sample(logits[i : i + 1].clone(), samplings[i : i + 1]) == [
            together[i]
        ]  # scores too, bit for bit
    assert sampler.score_prompt(logits, [3] * count, 4) == [
        sampler.score_prompt(logits[i : i + 1].clone(), [3], 4)[0] for i in range(count)
    ]


def test_the_logits_are_left_as_they_were() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    params = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.3, logit_bias=((3, 5.0),), logprobs=2)
    sampler.sample(logits, [Sampling(params, 1, 2, (1, 2), (3,), (4,))] * 4)
    assert torch.equal(logits, before)


def test_a_draw_survives_filters_that_keep_it() -> None:
    """The race is between tokens, so a filter that keeps the winner does not change it."""
    logits = torch.randn(200, generator=torch.Generator().manual_seed(1))
    for position in range(50):
        winner = token_of(one(logits, Sampling(SamplingParams(), 5, position)))
        rank = int((logits > logits[winner]).sum()) + 1
        assert token_of(one(logits, Sampling(SamplingParams(top_k=rank), 5, position))) == winner


# ---------------------------------------------------------------- transformers as oracle


def _kept(processor: LogitsProcessor, logits: torch.Tensor) -> set[int]:
    return set(torch.isfinite(processor(torch.zeros(1, 0, dtype=torch.long), logits[None])[0]).nonzero()[:, 0].tolist())


def _drawn(logits: torch.Tensor, params: SamplingParams, n: int = 3000) -> set[int]:
    samplings = [Sampling(params, seed=1, position=i) for i in range(n)]
    return {token_of(outcome) for outcome in sampler.sample(logits.expand(n, -1), samplings)}


@pytest.mark.parametrize(
    "params, processor",
    [
        (SamplingParams(top_k=7), TopKLogitsWarper(7)),
        (SamplingParams(top_p=0.83), TopPLogitsWarper(0.83)),
        (SamplingParams(min_p=0.2), MinPLogitsWarper(0.2)),
    ],
)
def test_filters_keep_what_transformers_keeps(params: SamplingParams, processor: LogitsProcessor) -> None:
    logits = torch.randn(24, generator=torch.Generator().manual_seed(3)) * 1.2
    assert _drawn(logits, params) == _kept(processor, logits)


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(4)) * 3
    prompt, output = (5, 9, 9, 30), (31, 5)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits.clone())
    ours = logits[0].numpy().copy()
    params = SamplingParams(repetition_penalty=1.7)
    sampler._adjust(ours, Sampling(params, 0, 6, prompt, output))
    np.testing.assert_array_equal(ours, theirs[0].numpy())


def test_temperature_is_that_of_transformers() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(6)) * 2
    theirs = torch.softmax(TemperatureLogitsWarper(0.6)(torch.zeros(1, 0), logits), -1)[0].numpy()
    n = 8192
    samplings = [Sampling(SamplingParams(temperature=0.6), 7, i) for i in range(n)]
    counts = Counter(token_of(outcome) for outcome in sampler.sample(logits.expand(n, -1), samplings))
    common = [token for token in range(50) if theirs[token] * n > 5]
    assert chi_square([counts[token] for token in common], theirs[common] * n) < 4.5


def test_presence_and_frequency_count_the_output_only() -> None:
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence."""
    row = np.zeros(8, np.float32)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    sampler._adjust(row, Sampling(params, 0, 9, prompt=(1, 2), output=(2, 3, 3, 3)))
    np.testing.assert_allclose(row, [0, 0, -0.75, -1.25, 0, 0, 0, 0])


# ---------------------------------------------------------------- scores


@given(st.integers(0, 2**32 - 1), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_scores_are_those_of_the_raw_distribution(random: int, k: int) -> None:
    rng = np.random.default_rng(random)
    logits = torch.tensor(rng.normal(0, 4, int(rng.integers(2, 60))), dtype=torch.float32)
    if rng.random() < 0.3:
        logits = logits.round()
    params = SamplingParams(temperature=0.3, top_k=2, repetition_penalty=2.0, logprobs=k)
    outcome = one(logits, Sampling(params, 1, 2, (0,), (1,)))
    assert not isinstance(outcome, str)
    token, score = outcome
    truth = torch.log_softmax(logits.double(), -1).tolist()
    order = sorted(range(len(truth)), key=lambda other: (-logits[other].item(), other))
    assert score is not None and score.token == token
    assert score.logprob == pytest.approx(truth[token], abs=1e-5)
    assert score.rank == order.index(token) + 1
    assert [other for other, _ in score.top] == order[:k]
    assert [value for _, value in score.top] == pytest.approx([truth[other] for other in order[:k]], abs=1e-5)


def test_prompt_scores_name_the_given_tokens() -> None:
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(8))
    scores = sampler.score_prompt(logits, [0, 32, 7, 7, 1], 3)
    truth = torch.log_softmax(logits.double(), -1)
    for row, (score, token) in enumerate(zip(scores, [0, 32, 7, 7, 1], strict=True)):
        assert score.token == token
        assert score.logprob == pytest.approx(truth[row, token].item(), abs=1e-5)
        assert score.rank == int((logits[row] > logits[row, token]).sum()) + 1
        assert len(score.top) == 3


def test_a_score_is_given_only_where_asked() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(9))
    without, with_score = sampler.sample(logits, [greedy(), greedy(logprobs=0)])
    assert not isinstance(without, str) and without[1] is None
    assert not isinstance(with_score, str) and with_score[1] is not None and with_score[1].top == ()


# ---------------------------------------------------------------- rows that fail alone, and the edges


@pytest.mark.parametrize(
    "value, reason",
    [(math.nan, "NaN"), (INF, "infinite"), (-INF, "-inf for every")],
)
def test_a_spoilt_row_fails_alone(value: float, reason: str) -> None:
    logits = torch.zeros(3, 8)
    logits[:, 2] = 1.0
    if value == -INF:
        logits[1] = value
    else:
        logits[1, 5] = value
    for params in (SamplingParams(temperature=0.0), SamplingParams(top_k=1), SamplingParams(top_k=1, logprobs=2)):
        first, spoilt, last = sampler.sample(logits, [Sampling(params, 0, 0)] * 3)
        assert isinstance(spoilt, str) and reason in spoilt
        assert token_of(first) == token_of(last) == 2


def test_a_spoilt_prompt_row_scores_nan_alone() -> None:
    logits = torch.zeros(2, 4)
    logits[0, 1] = math.nan
    spoilt, fine = sampler.score_prompt(logits, [1, 1], 2)
    assert math.isnan(spoilt.logprob) and spoilt.rank == 0 and spoilt.top == ()
    assert fine.logprob == pytest.approx(math.log(0.25))


def test_forbidden_ids_are_never_drawn() -> None:
    logits = torch.tensor([9.0, 8.0, 1.0, 0.0])
    for i in range(100):
        sampling = Sampling(SamplingParams(temperature=2.0, logit_bias=((0, 100.0),)), 3, i, forbidden=(0, 1, 7))
        assert token_of(one(logits, sampling)) in (2, 3)
    assert token_of(one(logits, Sampling(SamplingParams(temperature=0.0), 0, 0, forbidden=(0,)))) == 1
    nothing = one(logits, Sampling(SamplingParams(), 0, 0, forbidden=(0, 1, 2, 3)))
    assert isinstance(nothing, str) and "forbidden" in nothing


def test_a_bias_of_a_hundred_decides() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2))
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, logit_bias=((17, 100.0), (int(logits.argmax()), -100.0)))
        assert token_of(one(logits, Sampling(params, 0, 0))) == 17


def test_a_bias_for_a_token_that_is_not_there_fails_alone() -> None:
    odd = Sampling(SamplingParams(logit_bias=((70, 1.0),)), 0, 0)
    outcome, fine = sampler.sample(torch.zeros(2, 60), [odd, greedy()])
    assert isinstance(outcome, str) and "token 70" in outcome and "0 to 59" in outcome
    assert token_of(fine) == 0


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-6, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(5)) * 100
    outcomes = sampler.sample(logits, [Sampling(SamplingParams(temperature=temperature), 1, i) for i in range(3)])
    assert [token_of(outcome) for outcome in outcomes] == logits.argmax(1).tolist()


@pytest.mark.parametrize("vocabulary", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 2**31 - 1},
        {"top_k": -1},
        {"top_p": 1e-9},
        {"top_p": 1.0 - 1e-12},
        {"min_p": 1.0},
        {"temperature": 100.0, "top_k": 1, "top_p": 0.5, "min_p": 0.5},
    ],
)
def test_extreme_filters_leave_a_token(vocabulary: int, changes: dict[str, Any]) -> None:
    for i in range(20):
        token = token_of(one(torch.zeros(vocabulary), Sampling(SamplingParams(logprobs=20, **changes), 0, i)))
        assert 0 <= token < vocabulary


def test_among_equals_the_lower_id_comes_first() -> None:
    logits = torch.zeros(300)
    assert token_of(one(logits, greedy())) == 0
    for i in range(20):
        assert token_of(one(logits, Sampling(SamplingParams(top_k=1), 0, i))) == 0
        assert token_of(one(logits, Sampling(SamplingParams(top_p=1e-6), 0, i))) == 0
        assert token_of(one(logits, Sampling(SamplingParams(top_k=3), 0, i))) in (0, 1, 2)
    (score,) = sampler.score_prompt(logits[None], [4], 6)
    assert score.rank == 5 and [token for token, _ in score.top] == [0, 1, 2, 3, 4, 5]


def test_nothing_to_do_is_done() -> None:
    assert sampler.sample(torch.empty(0, 5), []) == []
    assert sampler.score_prompt(torch.empty(0, 5), [], 3) == []
