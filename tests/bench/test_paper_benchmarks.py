"""The tables of the papers beside simulated ones: small set-ups, laws that they must keep, and what they print."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def read_table(text: str) -> list[list[str]]:
    """The cells of a markdown table, its head first."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert len({len(line) for line in lines}) == 1
    assert all(cell.strip("-:") == "" for cell in lines[1])
    return [lines[0], *lines[2:]]


def test_the_papers_figures_name_what_is_simulated(scripts: Any) -> None:
    semi_pd, paper = scripts("paper_semi_pd"), scripts("paper_common").figures("semi_pd")
    cases = {case.name: case for case in semi_pd.CASES}
    for one in paper["figures"]:
        ways = semi_pd.CLUSTER if cases[one["setup"]].gpus > 1 else semi_pd.POLICIES
        assert one["policy"] in {way.name for way in ways}
        assert one.keys() & set(semi_pd.FIELDS)
    assert paper["targets"].keys() <= cases.keys()


def test_lengths_have_the_mean_that_was_asked_for(scripts: Any) -> None:
    drawn = np.random.default_rng(3).standard_normal(2000).tolist()
    for mean, spread, longest in ((251.0, 1.5, 1024), (91.0, 0.8, 1024), (5.0, 0.1, 8)):
        found = scripts("paper_common").lengths(mean, spread, longest, drawn)
        assert np.mean(found) == pytest.approx(mean, rel=0.01)
        assert min(found) >= 1
        assert max(found) <= longest


def test_every_way_serves_every_request(scripts: Any) -> None:
    semi_pd = scripts("paper_semi_pd")
    short = semi_pd.Lengths((60, 1.0, 300), (6, 0.5, 20))
    case = replace(semi_pd.CASES[2], lengths=short)
    slo = semi_pd.alone(case)
    for policy in (semi_pd.WHOLE, semi_pd.CHUNK, semi_pd.PD, semi_pd.OVERLAP, semi_pd.SPLITS[1], semi_pd.PAPER):
        totals = semi_pd.run(case, policy, 20.0, slo, 40).totals
        assert totals.completed == 40
        assert totals.failed == 0
        assert totals.output_tokens == sum(size.output for size in semi_pd.requests(short, 40)[1])
        assert totals.ttft.p90 >= case.cost.whole([1], [0], 1)


def test_rows_and_table_of_one_rate(scripts: Any) -> None:
    semi_pd = scripts("paper_semi_pd")
    case = replace(semi_pd.CASES[2], lengths=semi_pd.Lengths((60, 1.0, 300), (6, 0.5, 20)))
    theirs = [{"policy": "paper", "system": "semi-PD", "tpot_p90": 170, "attainment": 0.91}]
    rows = list(semi_pd.points(case, 20.0, semi_pd.alone(case), 20, theirs))
    assert sum(row["best"] for row in rows) == 2
    head, *lines = read_table(semi_pd.show(rows))
    line = next(line for line in lines if line[0] == "paper")
    assert line[1] == "semi-PD"
    assert line[head.index("TPOT P90: theirs")] == "170"
    assert line[head.index("TTFT P90 ms: theirs")] == "-"
    assert float(line[-1]) == pytest.approx(
        next(row["attainment"] for row in rows if row["policy"] == "paper"), abs=5e-3
    )
    json.dumps(rows)


@given(st.floats(0.02, 500.0), st.floats(0.1, 50.0))
def test_the_highest_rate_is_found_from_anywhere(limit: float, start: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        semi_pd = importlib.import_module("paper_semi_pd")
    found = semi_pd.highest(lambda rate: rate <= limit, start)
    assert found <= limit < found * semi_pd.STEP * (1 + 1e-9)


def test_a_rate_that_is_never_borne_is_zero(scripts: Any) -> None:
    assert scripts("paper_semi_pd").highest(lambda rate: False, 3.0) == 0.0


def test_claims_are_ratios_of_rates(scripts: Any) -> None:
    semi_pd = scripts("paper_semi_pd")
    found = [
        {"setup": name, "kind": kind, "policy": kind, "capacity": rate, "target_ttft_ms": 1.0, "target_tpot_ms": 1.0}
        for name, rates in (("a", (2.0, 4.0, 0.0)), ("b", (6.0, 4.0, 1.0)))
        for kind, rate in zip(("paper", "chunk 1024", "PD 1:1"), rates, strict=True)
    ]
    assert semi_pd.claims(found) == {"paper_vs_chunk_1024": 1.0, "paper_vs_pd_1_1": 6.0}
    head, first, second = read_table(semi_pd.show_capacities(found))
    assert head[1:] == ["paper", "chunk 1024", "PD 1:1"]
    assert [float(cell) for cell in first[1:]] == [2.0, 4.0, 0.0]
    assert second[0].startswith("b ")


def test_the_choice_never_loses_to_plain_ranks(scripts: Any) -> None:
    weave = scripts("paper_tokenweave")
    found = list(weave.prefills(scripts("paper_common").figures("tokenweave")))
    made = weave.claims(found)
    assert made["worst_case_vs_plain"] >= 1.0
    assert made["mixtral_1k_woven"] < 1.0
    head, *lines = read_table(weave.markdown(weave.PREFILL_HEAD, [weave.prefill_cells(one) for one in found]))
    choices = {line[0]: line[head.index("choice")] for line in lines}
    assert choices["mixtral-8x22b, 8, 1024"] == choices["mixtral-8x22b, 8, 2048"] == "fused"
    assert choices["llama-3-70b, 8, 4096"] == "woven"


def test_the_choice_avoids_mixtral_on_the_papers_own_times(scripts: Any) -> None:
    weave = scripts("paper_tokenweave")
    found = {one["name"]: one["values"] for one in weave.layers(scripts("paper_common").figures("tokenweave"))}
    for name, (plain, woven, predicted, _, choice) in found.items():
        assert choice == ("fused" if name.startswith("mixtral") else "woven")
        assert (choice == "woven") == (woven < plain)
        assert predicted == pytest.approx(woven, rel=0.12)


def test_the_closed_form_is_what_the_engine_does(scripts: Any) -> None:
    comet = scripts("paper_comet")
    made = comet.setup(comet.cost("llama-3-8b", comet.COMET), seats=16, tokens=2048, longest=160)
    traffic = comet.at_once([comet.Size(128, 32)] * 16)
    totals = comet.study(comet.Fleet(made), traffic, comet.Slo()).totals
    assert totals.completed == 16
    assert totals.output_rate == pytest.approx(comet.rate(comet.cost("llama-3-8b", comet.COMET), 16, 128, 32), rel=0.05)


def test_fewer_bits_of_kv_hold_larger_batches(scripts: Any) -> None:
    comet = scripts("paper_comet")
    assert comet.best("llama-2-70b", comet.TRT[0], "128/128") == comet.Best(0.0, 0)  # 138 GB do not fit
    small, large = (comet.best("llama-2-13b", way, "1024/512") for way in (comet.W4AX, comet.COMET))
    assert large.batch > 3 * small.batch
    assert large.tokens > small.tokens
    for row in comet.pays():
        assert all(math.isfinite(value) for value in row["values"])
        if row["name"].startswith("h100"):
            assert row["values"][4] == pytest.approx(1.0, abs=0.01)  # no 4-bit arithmetic


def test_tables_go_to_their_places_in_a_document(scripts: Any, tmp_path: Path) -> None:
    common = scripts("paper_common")
    document = tmp_path / "page.md"
    document.write_text("one\n<!-- a -->\nold\n<!-- end -->\ntwo\n<!-- b -->\n<!-- end -->\n")
    for _ in range(2):
        common.into_document(document, {"b": "| B |", "a": "| A |"})
        text = "one\n<!-- a -->\n| A |\n<!-- end -->\ntwo\n<!-- b -->\n| B |\n<!-- end -->\n"
        assert document.read_text() == text
    with pytest.raises(SystemExit, match="'c'"):
        common.into_document(document, {"a": "", "b": "", "c": ""})
    with pytest.raises(SystemExit, match="places for b"):
        common.into_document(document, {"a": ""})


@pytest.mark.parametrize("name", ["semi_pd", "tokenweave", "comet"])
def test_documents_have_a_place_for_each_table(name: str) -> None:
    text = (FOLDER.parent / "docs" / f"paper_{name}.md").read_text()
    wanted = {
        "semi_pd": ("single", "points", "capacity", "claims"),
        "tokenweave": ("prefill", "share", "seam", "whole", "gain", "layer", "throughput", "claims"),
        "comet": ("kernels", "throughput", "engine", "pays", "claims"),
    }[name]
    assert all(f"<!-- {each} -->\n" in text for each in wanted)
    assert "simulated" in text
    assert f"python benchmarks/paper_{name}.py" in text
