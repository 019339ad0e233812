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


def test_rows_and_tables_of_one_rate(scripts: Any) -> None:
    semi_pd = scripts("paper_semi_pd")
    case = replace(semi_pd.CASES[2], lengths=semi_pd.Lengths((60, 1.0, 300), (6, 0.5, 20)))
    theirs = [{"policy": "paper", "system": "semi-PD", "tpot_p90": 170, "attainment": 0.91}]
    slo = semi_pd.alone(case)
    rows = [row for one in case.everywhere() for row in semi_pd.points(one, 20.0, slo, 20, theirs)]
    assert [one.gpu for one in case.everywhere()] == ["a100-80", "h100"]
    assert sum(row["best"] for row in rows) == 4
    head, *lines = read_table(semi_pd.show(rows))
    line = next(line for line in lines if line[0] == "paper")
    assert line[1] == "semi-PD"
    assert line[head.index("TPOT P90: theirs")] == "170"
    assert line[head.index("TTFT P90 ms: theirs")] == "-"
    both = [row for row in rows if row["policy"] == "paper"]
    assert line[-1] == " / ".join(f"{row['e2e_mean']:.2f}" for row in both)
    assert line[-2] == " / ".join(f"{row['attainment']:.2f}" for row in both)
    head, known = read_table(semi_pd.show_figures(rows))
    assert known[:4] == [case.name, "20", "semi-PD", "paper"]
    assert known[head.index("TPOT P90: theirs") + 1] == " / ".join(f"{row['tpot_p90']:.0f}" for row in both)
    assert known[head.index("TTFT P90 ms: theirs") + 1] == "-", "only what the paper has"
    assert semi_pd.show_points(rows, {case.name: "words"}).count("<details>") == 1
    json.dumps(rows)


def test_what_does_not_fit_is_left_out(scripts: Any) -> None:
    semi_pd = scripts("paper_semi_pd")
    found = {case.name: [one.gpu for one in case.everywhere()] for case in semi_pd.CASES}
    assert found["V3 MATH-500"] == ["h200"], "680 GB of weights"
    assert found["405B ShareGPT"] == ["a100-40", "h100"], "on 32 of them"


def test_a_pipeline_bears_more_and_is_no_quicker(scripts: Any) -> None:
    semi_pd = scripts("paper_semi_pd")
    case = replace(semi_pd.CASES[4], lengths=semi_pd.Lengths((60, 1.0, 300), (6, 0.5, 20)))
    deep = replace(case, stages=4)
    room = [semi_pd.MEMORY * one.stages * case.cost.capacity_bytes - case.cost.weight_bytes for one in (case, deep)]
    assert deep.blocks / case.blocks == pytest.approx(room[1] / room[0] / 4, rel=0.01), (
        "each stage has a part of the KV"
    )
    for rate, quicker in ((0.01, False), (100.0, True)):
        one, four = (semi_pd.run(way, semi_pd.WHOLE, rate, semi_pd.Slo(), 40).totals for way in (case, deep))
        assert one.completed == four.completed == 40
        assert (four.e2e.mean < 0.8 * one.e2e.mean) == quicker
        assert quicker or four.e2e.mean == pytest.approx(one.e2e.mean)


def test_gains_in_end_to_end_latency_are_by_rate(scripts: Any) -> None:
    semi_pd, paper = scripts("paper_semi_pd"), scripts("paper_common").figures("semi_pd")
    taken = {"whole prompts": (2.0, 4.0), "80%:100%": (1.0, 1.6), "100%:100%": (1, 1), "paper": (1, 1), "auto": (1, 1)}
    rows = [
        {"setup": "V2-Lite ShareGPT", "rate": rate, "gpu": gpu, "policy": name, "e2e_mean": e2e[at] / speed,
         "system": "SGLang" if name == "whole prompts" and rate == 6 else None}
        for gpu, speed in (("a100-80", 1.0), ("h100", 2.0))
        for at, rate in enumerate((6, 10))
        for name, e2e in taken.items()
    ]  # fmt: skip
    made = semi_pd.e2e_claims(rows)
    assert made == {"e2e_v2_lite_least": 2.0, "e2e_v2_lite_most": 2.5, "h100_e2e_v2_lite_least": 2.0,
                    "h100_e2e_v2_lite_most": 2.5}  # fmt: skip
    assert read_table(semi_pd.show_e2e(rows))[2][-1] == "2.50 / 2.50"
    lines = read_table(semi_pd.show_headline(paper, made | {"paper_vs_chunk_1024": 0.62}))
    assert lines[1][1:] == ["1.27–2.40", "2.00–2.50", "2.00–2.50"]
    assert lines[2][1:] == ["1.49–2.58", "-", "-"], "not simulated"
    assert lines[3][1:] == ["1.55", "0.62", "-"]


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
        {"setup": name, "gpu": "a100-80", "kind": kind, "policy": kind, "capacity": rate, "target_ttft_ms": 1.0,
         "target_tpot_ms": 1.0}
        for name, rates in (("a", (2.0, 4.0, 0.0)), ("b", (6.0, 4.0, 1.0)))
        for kind, rate in zip(("paper", "chunk 1024", "PD 1:1"), rates, strict=True)
    ]  # fmt: skip
    assert semi_pd.claims(found) == {"paper_vs_chunk_1024": 1.0, "paper_vs_pd_1_1": 6.0}
    other = [one | {"gpu": "h100", "capacity": 2 * one["capacity"]} for one in found if one["setup"] == "a"]
    assert semi_pd.claims(found + other)["h100_paper_vs_chunk_1024"] == 0.5
    assert semi_pd.claims(found + other)["paper_vs_chunk_1024"] == 1.0
    head, first, second = read_table(semi_pd.show_capacities(found))
    assert head[1:] == ["paper", "chunk 1024", "PD 1:1"]
    assert [float(cell) for cell in first[1:]] == [2.0, 4.0, 0.0]
    assert second[0].startswith("b, A100 ")


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
        "semi_pd": ("headline", "single", "figures", "e2e", "points", "capacity", "claims"),
        "tokenweave": ("prefill", "share", "seam", "whole", "gain", "layer", "throughput", "claims"),
        "comet": ("kernels", "throughput", "engine", "pays", "claims"),
    }[name]
    assert all(f"<!-- {each} -->\n" in text for each in wanted)
    assert "simulated" in text
    assert f"python benchmarks/paper_{name}.py" in text


def test_what_an_earlier_run_wrote_makes_the_same_tables(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    semi_pd = scripts("paper_semi_pd")
    told, pages, picture = tmp_path / "told.json", [tmp_path / "one.md", tmp_path / "two.md"], tmp_path / "picture.png"
    for page in pages:
        places = ("headline", "single", "figures", "e2e", "capacity", "points", "claims")
        page.write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in places))
    made = ["--only", "70B LongBench", "--requests", "12", "--json", str(told), "--doc", str(pages[0])]
    for flags in (made, ["--again", str(told), "--doc", str(pages[1]), "--plot", str(picture)]):
        monkeypatch.setattr("sys.argv", ["paper_semi_pd.py", *flags])
        semi_pd.main()
    assert pages[0].read_text() == pages[1].read_text()
    assert "| 70B LongBench | 1.8 | vLLM-S | chunk 1024 |" in pages[1].read_text()
    assert picture.exists()
    monkeypatch.setattr("sys.argv", ["paper_semi_pd.py", "--again", "a", "--json", "b"])
    with pytest.raises(SystemExit):
        semi_pd.main()
    assert "simulates nothing" in capsys.readouterr().err
