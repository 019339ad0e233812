"""Sampling in Triton against the CPU's sampler: the same token for the same seed, the same scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core.plan import Sampling
from weft.core.sampling import SamplingParams
from weft.models import sampler

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from weft.kernels import triton_sample, triton_tiles
from weft.kernels.sample_parameters import parameters_of
from weft.kernels.triton_sample import sample, score

# The interpreter computes with numpy, which warns of integers that wrap and of powers of e that are nothing.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 1000

few = settings(max_examples=10, deadline=None)
tokens = st.integers(0, VOCABULARY - 1)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7, 1e-38, 1e-300]),
    top_k=st.sampled_from([0, -1, 1, 2, 40, 999, 5000]),
    top_p=st.sampled_from([1.0, 0.001, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.25, 1.1]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, 3.0, 0.1]), max_size=3).map(lambda d: tuple(d.items())),
    logprobs=st.sampled_from([None, 0, 5]),
)


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    chosen = draw(params)
    seen = {}
    if chosen.penalised:
        seen = {name: tuple(draw(st.lists(tokens, max_size=6))) for name in ("prompt", "output")}
    forbidden = tuple(draw(st.lists(st.integers(0, VOCABULARY + 5), max_size=2)))
    seed = draw(st.integers(-(2**63), 2**64 - 1))
    return Sampling(chosen, seed, draw(st.integers(0, 2**31)), forbidden=forbidden, **seen)


def rows_of(seed: int, count: int, *, levels: int | None) -> torch.Tensor:
    """Logits; few levels make many equals."""
    logits = torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    return logits if levels is None else (logits * levels).round() / levels


@few
@given(
    given=st.lists(samplings(), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([None, 1, 2]),
    chunk=st.sampled_from([(256, 5), (1024, 2), (1024, 5)]),
    part=st.sampled_from([128, 512, 4096]),
)
def test_a_seed_gives_the_token_that_the_cpu_draws(
    given: list[Sampling], seed: int, levels: int | None, chunk: tuple[int, int], part: int
) -> None:
    logits = rows_of(seed, len(given), levels=levels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(triton_tiles.SAMPLE, 0, (*chunk, 1))
        patch.setitem(triton_tiles.SAMPLE_PARTS, 0, (part, 1))
        found = sample(logits.to(DEVICE), parameters_of(given, VOCABULARY).to(DEVICE))
    expected = sampler.sample(logits, given)
    for row, outcome in enumerate(expected):
        assert not isinstance(outcome, str)
        token, scored = outcome
        assert int(found.tokens[row]) == token, given[row]
        if scored is None:
            continue
        assert found.scores is not None
        assert math.isclose(float(found.scores.logprobs[row]), scored.logprob, rel_tol=1e-6, abs_tol=2e-6)
        assert int(found.scores.ranks[row]) == scored.rank
        assert found.scores.top_tokens[row, : len(scored.top)].tolist() == [other for other, _ in scored.top]


@few
@given(
    level=st.integers(1, 6),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_among_equal_weights_the_filters_keep_the_lowest_ids(
    level: int, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    """Twelve tokens of two levels: each filter's edge falls among equals. All that is kept is drawn sooner or later."""
    logits = torch.full((1, 12), -1.0)
    logits[0, torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:level]] = 0.0
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    given = [Sampling(params, seed, position) for position in range(12)]
    expected = sampler.sample(logits.expand(12, 12).contiguous(), given)
    found = sample(logits.expand(12, 12).contiguous().to(DEVICE), parameters_of(given, 12).to(DEVICE))
    assert found.tokens.tolist() == [outcome[0] for outcome in expected if not isinstance(outcome, str)]


@triton.jit
def exponentials_kernel(out, low, high, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, triton_sample._exponentials(at, tl.load(low).to(tl.uint32), tl.load(high).to(tl.uint32)))


def test_the_random_numbers_are_the_cpus_to_a_few_last_bits() -> None:
    count = 2**17
    for seed, position in ((0, 0), (2**64 - 1, 7), (-5, 10**9)):
        low, high = (torch.tensor([key], device=DEVICE) for key in sampler.random_keys(seed, position))
        out = torch.empty(count, device=DEVICE)
        exponentials_kernel[(1,)](out, low, high, COUNT=count)
        expected = sampler.exponentials(seed, position, np.arange(count))
        np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=4e-7)


def test_a_draw_depends_on_its_own_row_only() -> None:
    logits = rows_of(1, 5, levels=None)
    given = [Sampling(SamplingParams(top_p=0.9, top_k=50 * i), 9, i) for i in range(5)]
    together = sample(logits.to(DEVICE), parameters_of(given, VOCABULARY).to(DEVICE)).tokens.tolist()
    for row, one in enumerate(given):
        alone = sample(logits[row : row + 1].to(DEVICE), parameters_of([one], VOCABULARY).to(DEVICE))
        assert alone.tokens.tolist() == [together[row]]


def test_among_equal_logits_the_lowest_id_is_taken_in_whatever_part_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(triton_tiles.SAMPLE_PARTS, 0, (64, 1))
    logits = torch.full((4, VOCABULARY), -2.0)
    logits[0, [130, 64, 999]], logits[1, [3, 700]], logits[2, 999] = 1.0, 1.0, 1.0
    given = [Sampling(SamplingParams(temperature=0.0), 1, 1)] * 4
    found = sample(logits.to(DEVICE), parameters_of(given, VOCABULARY).to(DEVICE))
    assert found.tokens.tolist() == [64, 3, 999, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_cannot_be_drawn_from_says_so_and_leaves_the_others(temperature: float) -> None:
    logits = rows_of(2, 5, levels=None)
    logits[0, 3], logits[1, 4], logits[2] = torch.nan, torch.inf, -torch.inf
    params = SamplingParams(temperature=temperature, logprobs=2)
    given = [Sampling(params, 1, 1) for _ in range(5)]
    given[3] = given[3]._replace(forbidden=tuple(range(VOCABULARY)))
    found = sample(logits.to(DEVICE), parameters_of(given, VOCABULARY).to(DEVICE))
    assert found.left is not None and found.scores is not None
    assert found.peaks.isfinite().tolist() == [False] * 3 + [True] * 2
    assert found.left.isfinite().tolist() == [False] * 4 + [True]
    peaks = found.peaks.tolist()
    assert math.isnan(peaks[0]) and peaks[1:4] == [math.inf, -math.inf, float(logits[3].max())]
    expected = sampler.sample(logits[4:], given[4:])[0]
    assert found.tokens[4] == expected[0]
    assert all(0 <= token < VOCABULARY for token in found.tokens.tolist())
    assert found.scores.logprobs.isnan().tolist()[:3] == [True] * 3


def test_the_logits_stay_as_they_were() -> None:
    logits = rows_of(3, 1, levels=None).to(DEVICE)
    before = logits.clone()
    given = [Sampling(SamplingParams(logit_bias=((3, 50.0),)), 1, 1)]
    assert sample(logits, parameters_of(given, VOCABULARY).to(DEVICE)).tokens.tolist() == [3]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("k", [0, 1, 20])
def test_prompt_tokens_are_scored_as_the_cpu_scores_them(k: int) -> None:
    logits = rows_of(4, 6, levels=2)
    logits[5] = torch.nan
    targets = [0, 999, 5, 17, 17, 3]
    expected = sampler.score_prompt(logits, targets, k)
    logprobs, ranks, top_tokens, top_logprobs = (
        part.cpu() for part in score(logits.to(DEVICE), torch.tensor(targets).to(DEVICE), k)
    )
    assert logprobs[5].isnan()
    for row, one in enumerate(expected[:5]):
        assert math.isclose(float(logprobs[row]), one.logprob, rel_tol=1e-6, abs_tol=2e-6) and ranks[row] == one.rank
        assert top_tokens[row].tolist() == [token for token, _ in one.top]
        assert top_logprobs[row].tolist() == pytest.approx([value for _, value in one.top], rel=1e-6, abs=2e-6)


def test_wrong_arguments_are_refused() -> None:
    given: Any = parameters_of([Sampling(SamplingParams(), 1, 1)], 8)
    with pytest.raises(TypeError, match="float16"):
        sample(torch.zeros(1, 8).half(), given)
    with pytest.raises(ValueError, match="contiguous"):
        sample(torch.zeros(8, 2).T, given)
    with pytest.raises(ValueError, match="k = 9"):
        score(torch.zeros(1, 8), torch.zeros(1).long(), 9)
