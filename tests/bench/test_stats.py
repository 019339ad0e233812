"""The figures against closed forms, numpy and a brute-force count."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.bench.stats import Record, Slo, peak_concurrency, spread, summarise

TIMES = st.floats(0, 100, allow_nan=False)


def record(
    sent: float = 0.0,
    first: float = 1.0,
    gaps: tuple[float, ...] = (),
    error: str | None = None,
    tokens: int | None = None,
) -> Record:
    last = first + sum(gaps)
    return Record(sent, sent, first, last, last + 0.5, 10, len(gaps) + 1 if tokens is None else tokens, gaps, error)


@st.composite
def records(draw: st.DrawFn) -> Record:
    sent = draw(TIMES)
    first = sent + draw(st.floats(0, 10))
    gaps = tuple(draw(st.lists(st.floats(0, 5), max_size=6)))
    return record(sent, first, gaps, draw(st.sampled_from([None, None, "broken", "late"])))


def test_latencies_of_one_request() -> None:
    one = Record(due=1.0, sent=2.0, first=2.5, last=4.5, ended=5.0, input_tokens=7, output_tokens=5, gaps=(1.0, 1.0))
    assert (one.ttft, one.tpot, one.e2e) == (0.5, 0.5, 3.0)  # 5 tokens in 3 chunks: TPOT counts tokens


def test_a_single_token_has_no_tpot_and_meets_any_target_for_it() -> None:
    assert record(gaps=()).tpot is None
    assert Slo(tpot=1e-9).met_by(record(gaps=()))
    assert not Slo(tpot=1e-9).met_by(record(gaps=(1.0,)))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
@settings(max_examples=60, deadline=None)
def test_percentiles_are_between_ranks_and_monotonic(values: list[float]) -> None:
    found = spread(values)
    ordered = sorted(values)

    def quantile(q: float) -> float:  # linear interpolation between the two nearest ranks
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    for got, q in ((found.p50, 0.5), (found.p90, 0.9), (found.p99, 0.99), (found.max, 1.0)):
        assert got == pytest.approx(quantile(q), rel=1e-9, abs=1e-9)
    assert found.mean == pytest.approx(float(np.mean(values)))


def test_no_values_have_no_figures() -> None:
    assert spread([]).count == 0 and math.isnan(spread([]).p99)


@given(st.lists(records(), min_size=1, max_size=25))
@settings(max_examples=80, deadline=None)
def test_every_request_counts_once(rows: list[Record]) -> None:
    summary = summarise(rows, Slo(ttft=2.0, tpot=1.0))
    good = [row for row in rows if row.error is None]
    assert summary.completed == len(good)
    assert summary.completed + summary.failed == len(rows)
    assert sum(count for _, count in summary.errors) == summary.failed
    assert summary.output_tokens == sum(row.output_tokens for row in good)
    assert summary.output_throughput * summary.duration == pytest.approx(summary.output_tokens)
    assert summary.ttft.count == len(good)
    assert summary.itl.count == sum(len(row.gaps) for row in good)
    met = [
        row
        for row in good
        if row.first - row.sent <= 2.0  # type: ignore[operator]
        and (not row.gaps or (row.last - row.first) / len(row.gaps) <= 1.0)  # type: ignore[operator]
    ]
    assert summary.attainment == pytest.approx(len(met) / len(rows))
    assert summary.goodput is not None and summary.goodput * summary.duration == pytest.approx(len(met))
    assert summary.goodput <= summary.request_throughput + 1e-9


@given(st.lists(records(), min_size=1, max_size=20))
@settings(max_examples=80, deadline=None)
def test_peak_concurrency_against_a_count_at_every_sending(rows: list[Record]) -> None:
    counted = max(sum(other.sent <= row.sent < other.ended for other in rows) for row in rows)
    assert peak_concurrency(rows) == counted


def test_no_targets_no_goodput() -> None:
    assert summarise([record()]).goodput is None
