"""Figures kept as a run goes, against those made of all its records."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from weft.bench.stats import Record, Slo, summarise
from weft.bench.traces import Size
from weft.core.plan import Lane
from weft.devices.cost import CostModel
from weft.errors import ConfigError
from weft.sim.report import Run, as_json, plot, print_runs
from weft.sim.study import Fleet, Outcome, study
from weft.sim.tally import GROWTH, Sketch, Tally

VALUES = st.lists(st.floats(1e-6, 1e5), min_size=1, max_size=200)


@given(VALUES, st.floats(0.0, 1.0))
def test_a_percentile_is_off_by_half_a_bucket_at_most(values: list[float], part: float) -> None:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    exact = float(np.quantile(values, part, method="inverted_cdf"))
    assert sketch.quantile(part) == pytest.approx(exact, rel=GROWTH - 1)
    assert sketch.spread().mean == pytest.approx(np.mean(values)) and sketch.most == max(values)
    curve, parts = sketch.curve()
    assert curve == sorted(curve) and parts == sorted(parts) and parts[-1] == 1.0


def test_memory_is_that_of_the_buckets() -> None:
    sketch = Sketch()
    for value in np.random.default_rng(1).lognormal(-3.0, 1.0, 20_000).tolist():
        sketch.add(value)
    assert len(sketch._buckets) < 1000


def test_totals_are_those_of_the_records(setup: Any) -> None:
    records: list[Record] = []
    slo = Slo(0.05, 0.01)
    load = [(number * 0.03, Size(20 + 7 * number % 90, 1 + number % 9)) for number in range(200)] + [
        (7.0, Size(999, 1))
    ]
    outcome = study(Fleet(setup()), load, slo, on_end=records.append)
    exact, totals = summarise(records, slo), outcome.totals
    assert (totals.completed, totals.failed) == (exact.completed, exact.failed) == (200, 1)
    assert (totals.input_tokens, totals.output_tokens) == (exact.input_tokens, exact.output_tokens)
    assert totals.goodput == pytest.approx(exact.goodput) and totals.attainment == pytest.approx(exact.attainment)
    assert totals.request_rate == pytest.approx(exact.request_throughput)
    for found, true in ((totals.ttft, exact.ttft), (totals.tpot, exact.tpot), (totals.e2e, exact.e2e)):
        assert found.count == true.count and found.mean == pytest.approx(true.mean)
        assert found.p99 == pytest.approx(true.p99, rel=0.1) and found.max == true.max
    assert totals.errors == (("context_length_exceeded", 1),)


def test_what_comes_in_the_warm_up_does_not_count() -> None:
    tally = Tally(Slo(), warm_up=5.0)
    for sent in (4.0, 6.0):
        tally(Record(sent, sent, sent + 1, sent + 2, sent + 2, 10, 3))
    assert tally.totals().completed == 1 and tally.totals().ttft.p50 == pytest.approx(1.0, rel=0.01)


@pytest.fixture(scope="module")
def outcome(setup: Any) -> Outcome:
    load = [(number * 0.01, Size(100, 20)) for number in range(200)]
    return study(Fleet(setup(partition="3:1")), load, Slo(1.0, 0.1), seconds=2.0, looks=20)


def test_the_timeline_tells_shares_and_occupancy(outcome: Outcome) -> None:
    line = outcome.timeline
    assert len(line.at) >= 20 and list(line.at) == sorted(line.at)
    shares = {lane.value: set(values) for lane, values in line.share.items()}
    assert shares["prefill"] <= {0.75, 1.0} and shares["decode"] <= {0.25, 1.0}
    assert all(0 <= value <= 1 for value in line.kv) and max(line.kv) > 0.5
    assert max(line.busy[next(iter(line.busy))]) > 0.5 and max(line.running) <= 8 and max(line.waiting) > 0


def test_a_step_was_under_way_before_the_look_that_tells_of_its_end(setup: Any) -> None:
    """Nine looks in each step, of which the last one before the end of the run is not over."""
    cost = CostModel(fixed=1.0, per_token=0.0, per_context=0.0)
    outcome = study(Fleet(setup(cost=cost)), [(0.5, Size(20, 4))], Slo(), seconds=5.0, looks=45)
    at, busy = np.array(outcome.timeline.at), np.array(outcome.timeline.busy[Lane.MIXED])
    assert busy[(at > 0.7) & (at < 3.5)] == pytest.approx(1.0) and busy.max() == pytest.approx(1.0)
    assert (np.diff(at, prepend=0.0) * busy).sum() == pytest.approx(3.0)


def test_every_output_says_that_it_is_simulated(outcome: Outcome, tmp_path: Path) -> None:
    runs = [Run(1.0, "one", outcome), Run(2.0, "two", outcome)]
    text = StringIO()
    print_runs(runs, Slo(1.0, 0.1), Console(file=text, width=80))
    assert "simulated" in text.getvalue() and "TTFT 1 s, TPOT 0.1 s" in text.getvalue()
    assert max(map(len, text.getvalue().splitlines())) <= 80 and "…" not in text.getvalue()
    content = json.loads(json.dumps(as_json({"gpu": "h100"}, runs), allow_nan=False))
    assert content["simulated"] is True and content["runs"][1]["rate"] == 2.0
    assert len(content["runs"][0]["timeline"]["kv"]) == len(outcome.timeline.at)
    plot(runs, "a fleet", tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 20_000
    with pytest.raises(ConfigError, match="--plot"):
        plot(runs, "a fleet", tmp_path / "absent" / "out.png")
