"""Which tokens may win a draw: against the race itself, computed in float64 for all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weft.core.plan import Sampling
from weft.core.sampling import SamplingParams
from weft.kernels import LEVELS, available, race
from weft.models import sampler

HERE = [name for name in available() if name in LEVELS]
pytestmark = pytest.mark.skipif(not HERE, reason="the C++ extension is not built")


def logits(size: int, spread: float, kind: str, seed: int) -> race.Row:
    generator = np.random.default_rng(seed)
    row = (generator.standard_normal(size) * spread).astype(np.float32)
    if kind == "equal":
        row[:] = spread
    elif kind == "forbidden":
        row[generator.random(size) < 0.9] = -np.inf
        row[size // 2] = 1.0
    elif kind == "one":
        row[size - 1] = 50.0 * spread + 100.0
    return row


rows = st.builds(
    logits,
    size=st.one_of(st.integers(race.WORTHWHILE, 2100), st.sampled_from([16384, 50257])),
    spread=st.sampled_from([0.01, 1.0, 10.0, 80.0]),
    kind=st.sampled_from(["normal", "equal", "forbidden", "one"]),
    seed=st.integers(0, 2**32),
)
temperatures = st.sampled_from([1e-30, 0.05, 0.7, 1.0, 3.0, 100.0])


@pytest.mark.parametrize("level", HERE)
@settings(max_examples=60)
@given(row=rows, temperature=temperatures, seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**20))
@example(row=logits(2048, 1.0, "equal", 0), temperature=1.0, seed=0, position=0)
def test_the_winner_is_one_of_a_few(level: str, row: race.Row, temperature: float, seed: int, position: int) -> None:
    ids = race.contenders(row, float(row.max()), temperature, sampler.random_keys(seed, position), level)
    with np.errstate(under="ignore", over="ignore"):
        weights = np.exp((row.astype(np.float64) - row.max()) / temperature)
    tokens = np.arange(len(row))
    winner = int((weights / sampler.exponentials(seed, position, tokens).astype(np.float64)).argmax())
    assert ids is not None
    assert winner in ids
    assert np.array_equal(ids, np.unique(ids))


@settings(max_examples=100)
@given(row=rows, temperature=temperatures, seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**20))
def test_the_same_token_is_drawn_without_the_extension(
    row: race.Row, temperature: float, seed: int, position: int
) -> None:
    sampling = Sampling(SamplingParams(temperature=temperature), seed, position)
    with pytest.MonkeyPatch.context() as patch:
        found = sampler._draw(row, sampling)
        patch.setattr(race, "_native", None)
        assert sampler._draw(row, sampling) == found


def test_few_contend_in_a_large_vocabulary() -> None:
    """What makes it quick: of 128,256 tokens of a model's typical spread hardly any are left."""
    counts = []
    for seed in range(50):
        row = logits(128256, 3.0, "normal", seed)
        ids = race.contenders(row, float(row.max()), 1.0, sampler.random_keys(seed, 7))
        assert ids is not None
        counts.append(len(ids))
    assert np.median(counts) <= 8


def test_short_rows_and_unknown_levels() -> None:
    keys = (1, 2)
    assert race.contenders(np.zeros(race.WORTHWHILE - 1, np.float32), 0.0, 1.0, keys) is None
    with pytest.raises(ValueError, match="cannot run the kernels of level sse"):
        race.contenders(np.zeros(race.WORTHWHILE, np.float32), 0.0, 1.0, keys, "sse")
