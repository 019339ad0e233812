"""benchmarks/union.py: the search for the highest rate, what is made of its rates, and the script on a small trace."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def union() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module("union")


@pytest.fixture(scope="module")
def tables(union: ModuleType) -> ModuleType:
    return sys.modules["union_tables"]


@given(limit=st.floats(0.1, 300), start=st.floats(0.5, 5))
def test_the_highest_rate_is_the_last_that_passes(union: ModuleType, limit: float, start: float) -> None:
    tried: list[float] = []

    def passes(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    found = union.highest(passes, start)
    assert found <= limit <= found * union.CLOSE
    assert found in tried, "what is shown of a rate was run"


def test_the_search_ends_where_nothing_passes_and_where_everything_does(union: ModuleType) -> None:
    assert union.highest(lambda rate: False, 1.0) == 0.0
    assert union.FURTHEST / union.STEP <= union.highest(lambda rate: True, 1.0) <= union.FURTHEST


def test_a_combination_has_the_best_of_its_step_sizes(union: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = dict(zip(union.CHUNKS, (1.0, 3.0, 2.0, 0.5), strict=True))
    one, trace = union.COMBINATIONS[0], union.Trace("t", ((0.0, None), (0.5, None)), union.Slo(1.0, 1.0), False)
    monkeypatch.setattr(union.Combination, "setup", lambda self, gpu, trace, tokens: tokens)
    monkeypatch.setattr(union, "serve", lambda setup, trace, factor: "totals" if factor <= limits[setup] else None)
    cell = union.goodput("h100", trace, one, 1.0)
    assert cell.tokens == union.CHUNKS[1] and 3.0 / union.CLOSE <= cell.factor <= 3.0
    assert cell.rate == 2.0 * cell.factor, "two requests a second, so many times as fast"


def test_all_eight_combinations_and_what_each_begins_with(union: ModuleType) -> None:
    names = [one.name for one in union.COMBINATIONS]
    assert len(set(names)) == 8 and names[0] == "none" and names[-1] == "phases + weave + comet"
    for at, one in enumerate(union.COMBINATIONS):
        for other in union.COMBINATIONS[at + 1 :]:
            assert not union._within(other, one), "what it adds to comes before it"


def cells(tables: ModuleType, rates: dict[str, float]) -> list[Any]:
    return [tables.Cell("h100", "conv", name, rate, rate, 512, None, 1) for name, rate in rates.items()]


def test_gains_pairs_and_sentences(tables: ModuleType) -> None:
    """Phases double everything, comet triples it but for what weave gives, weave gives a tenth alone."""
    rates = {"none": 1.0, "phases": 2.0, "weave": 1.1, "comet": 3.0, "phases + weave": 2.2, "phases + comet": 6.0}
    rates |= {"weave + comet": 3.0, "phases + weave + comet": 6.0}
    found = cells(tables, rates)
    (group,) = tables.grouped(found).values()
    assert (
        tables.gain(group, "phases")
        == pytest.approx(2.0)
        == tables.gain(group, "phases", frozenset({"weave", "comet"}))
    )
    assert tables.together(group, "phases", "comet") == pytest.approx(1.0)
    assert tables.together(group, "weave", "comet") == pytest.approx(1 / 1.1)
    words = list(tables.findings(found, 1.03))
    assert words == [
        "h100, conv: weave adds nothing on top of the others (x1.00; alone x1.10)",
        "h100, conv: weave and comet take from each other (x0.91 of what each gives alone)",
    ]
    claims = tables.claims(found)
    assert claims["union_h100_conv_over_none"] == pytest.approx(6.0)
    assert claims["union_h100_conv_over_best_one"] == pytest.approx(2.0)
    assert claims["union_h100_conv_over_best_two"] == pytest.approx(1.0)
    assert "x0.91" in tables.show(found)


def test_where_a_combination_serves_nothing_there_is_no_ratio(tables: ModuleType) -> None:
    names = ["none", "phases", "weave", "comet", "phases + weave", "phases + comet", "weave + comet"]
    found = cells(tables, {**dict.fromkeys(names, 0.0), "phases + weave + comet": 1.0})
    assert all(math.isnan(value) for value in tables.claims(found).values())
    assert list(tables.findings(found, 1.03)) == [] and "nan" in tables.show(found)


def test_the_script_says_the_same_each_time(
    union: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "made_up_trace.csv"
    rows = "".join(f"{n / 5},{7000 + 200 * (n % 9)},{2 + n % 5}\n" for n in range(30))
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    flags = ["--gpus", "h100", "--requests", "30", "--json", str(out), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["union.py", str(trace), *flags])
    union.main()
    printed = capsys.readouterr().out
    assert "SIMULATED" in printed and "phases + weave + comet" in printed
    found = json.loads(out.read_text())["rows"]
    assert [row["combination"] for row in found] == [one.name for one in union.COMBINATIONS]
    assert all(row["attainment"] >= union.PART for row in found)
    assert picture.stat().st_size > 5000 and str(tmp_path) not in json.dumps(found)
    again = [cell.row() for _, cell in zip(range(3), union.cells(["h100"], [union.read(trace, 30)]), strict=False)]
    assert again == found[:3], "nothing is drawn"
