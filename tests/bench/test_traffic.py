"""Arrivals, lengths and prompts against closed forms and conservation laws."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.bench import traffic
from weft.bench.traffic import FIRST_TOKEN_ID, Size
from weft.errors import ConfigError


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_variation_of_the_gamma_distribution(burstiness: float) -> None:
    gaps = np.diff(traffic.arrivals(40_001, 5.0, burstiness, np.random.default_rng(1)))
    assert gaps.mean() == pytest.approx(1 / 5.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_poisson_counts_have_variance_equal_to_their_mean() -> None:
    times = np.asarray(traffic.arrivals(40_000, 10.0, 1.0, np.random.default_rng(2)))
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, rel=0.1)


@given(st.integers(0, 50), st.floats(0.01, 1e4), st.floats(0.05, 20), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_arrivals_start_at_zero_never_go_back_and_follow_the_seed(
    count: int, rate: float, burstiness: float, seed: int
) -> None:
    first, second = (traffic.arrivals(count, rate, burstiness, np.random.default_rng(seed)) for _ in range(2))
    assert first == second
    assert len(first) == count and first == sorted(first)
    assert not first or first[0] == 0.0


def test_an_infinite_rate_sends_everything_at_once() -> None:
    assert traffic.arrivals(3, math.inf, 1.0, np.random.default_rng(0)) == [0.0, 0.0, 0.0]


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_random_sizes_stay_in_their_range(input_len: int, output_len: int, ratio: float, seed: int) -> None:
    for size in traffic.random_sizes(20, input_len, output_len, ratio, np.random.default_rng(seed)):
        for drawn, mean in ((size.input, input_len), (size.output, output_len)):
            assert max(1, math.floor(mean * (1 - ratio))) <= drawn <= math.ceil(mean * (1 + ratio))


@given(st.integers(1, 80), st.integers(0, 100), st.integers(FIRST_TOKEN_ID + 1, 500), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_prompts_have_their_length_their_vocabulary_and_a_common_prefix(
    length: int, prefix: int, vocabulary: int, seed: int
) -> None:
    sizes = [Size(length, 1), Size(length + 3, 1)]
    made = traffic.shots([0.0, 1.0], sizes, vocabulary, prefix, np.random.default_rng(seed))
    texts = traffic.shots([0.0, 1.0], sizes, None, prefix, np.random.default_rng(seed))
    common = min(prefix, length)
    for size, ids, words in zip(sizes, made, texts, strict=True):
        assert isinstance(ids.prompt, tuple) and isinstance(words.prompt, str)
        assert len(ids.prompt) == len(words.prompt.split()) == size.input
        assert all(FIRST_TOKEN_ID <= token < vocabulary for token in ids.prompt)
    assert made[0].prompt[:common] == made[1].prompt[:common]
    assert texts[0].prompt.split()[:common] == texts[1].prompt.split()[:common]  # type: ignore[union-attr]


def test_prompts_without_a_prefix_differ() -> None:
    made = traffic.shots([0.0] * 20, [Size(32, 1)] * 20, 1000, 0, np.random.default_rng(0))
    assert len({shot.prompt[0:16] for shot in made}) == 20


def test_custom_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        json.dumps({"prompt": "a b c"}) + "\n\n" + json.dumps({"prompt": [5, 6], "output_tokens": 3}) + "\n"
    )
    made = traffic.at_times(traffic.read_prompts(path, 8), [0.0, 1.0, 2.0])
    assert [(shot.due, shot.prompt, shot.input_tokens, shot.output_tokens) for shot in made] == [
        (0.0, "a b c", 3, 8),
        (1.0, (5, 6), 2, 3),
        (2.0, "a b c", 3, 8),
    ]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"prompt": ""}', '{"prompt": [true]}', '{"prompt": "x", "output_tokens": 0}']
)
def test_broken_custom_prompts_are_refused_with_their_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x"}\n' + line)
    with pytest.raises(ConfigError, match="line 2"):
        traffic.read_prompts(path, 8)
