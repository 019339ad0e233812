"""The parts of benchmarks/phases.py that measure nothing: loads, claims, and the contest in virtual time."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/ by its name."""
    for folder in (FOLDER, FOLDER / "peers"):
        monkeypatch.syspath_prepend(str(folder))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A request a second, with lengths that tell the second."""
    path = tmp_path / "made_up_trace.csv"
    rows = "".join(f"{second},{second + 100},{second % 7}\n" for second in range(2000))
    path.write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    return path


def test_parts_of_a_trace_are_apart_and_scaled(scripts: Any, trace: Path) -> None:
    loads = scripts("phases_loads")
    load = loads.recorded(trace, loads.Scale(0.5, 2.0, (700, 8), 2.0))
    assert load.name == "made_up" and not load.caching
    tune, report = (load.make(part, 1.0, 60.0, 512) for part in ("tune", "report"))
    assert len(tune) == len(report) == 120, "two requests a second"
    assert [one.due for one in tune[:3]] == [0.0, 0.5, 1.0]
    assert [one.input_tokens for one in tune[:3]] == [200, 200, 201] and report[0].input_tokens == 650
    assert all(1 <= one.output_tokens <= 8 and one.input_tokens <= 700 for one in (*tune, *report))
    assert load.make("tune", 1.0, 60.0, 512) == tune
    with pytest.raises(SystemExit, match="too short for 500 s at 2 times its rate"):
        load.make("report", 1.0, 500.0, 512)


def test_the_changing_load_is_heavy_in_prompts_then_in_answers_then_in_prompts(scripts: Any) -> None:
    loads, simulated = scripts("phases_loads"), scripts("phases_simulated")
    shots = loads.changing(simulated.MIXES).make("report", 1.0, 90.0, 512)
    thirds = [[one for one in shots if 30 * k <= one.due < 30 * k + 30] for k in range(3)]
    means = [sum(one.input_tokens / one.output_tokens for one in third) / len(third) for third in thirds]
    assert means[0] > 20 > 2 > means[1] and means[2] > 20
    assert [one.due for one in shots] == sorted(one.due for one in shots)


def rows_of(attained: dict[tuple[str, float, str, str], float]) -> list[dict[str, Any]]:
    names = ("trace", "rate", "policy", "kind")
    return [
        {**dict(zip(names, key, strict=True)), "attainment": value, "requests": 100} for key, value in attained.items()
    ]


def test_claims_are_the_least_ratio_to_the_best_in_hindsight(scripts: Any) -> None:
    tables = scripts("phases_tables")
    attained = {("conv", 1.0, "chunk 64", "chunk"): 0.5, ("conv", 1.0, "split 1:1", "split"): 0.8}
    attained |= {("conv", 1.0, "split 1:1 lone", "lone"): 0.9, ("conv", 1.0, "auto", "auto"): 0.72}
    attained |= {("conv", 2.0, "chunk 64", "chunk"): 0.0, ("conv", 2.0, "auto", "auto"): 0.01}
    attained |= {("changing", 1.0, "chunk 64", "chunk"): 0.4, ("changing", 1.0, "auto", "auto"): 0.6}
    attained |= {("changing", 1.0, "paper", "paper"): 0.3}
    found = tables.claims(rows_of(attained), "x_")
    assert found["x_auto_vs_best_fixed"] == pytest.approx(0.72 / 0.8)
    assert found["x_auto_vs_best_ordered"] == pytest.approx(0.72 / 0.9)
    assert found["x_auto_vs_best_chunk"] == pytest.approx(0.72 / 0.5)
    assert found["x_auto_vs_every_fixed_changing"] == pytest.approx(1.5)
    assert found["x_auto_vs_paper_changing"] == pytest.approx(2.0) and "x_auto_vs_paper" not in found
    before = {("conv", 1.0, "chunk 64", "chunk"): 0.9, ("conv", 1.0, "split 1:1", "split"): 0.1}
    chosen = tables.chosen_elsewhere(rows_of(before), rows_of(attained))
    assert chosen == {"auto_vs_chosen_before": pytest.approx(0.72 / 0.5)}


def test_a_fixed_policy_that_leaves_no_room_is_named(scripts: Any) -> None:
    tables = scripts("phases_tables")
    attained = {("changing", 0.4, "chunk 64", "chunk"): 0.9, ("changing", 0.4, "split 8:4", "split"): 0.92}
    attained |= {("changing", 1.0, "chunk 64", "chunk"): 0.9, ("changing", 1.0, "pd 1:1", "pd"): 0.99}
    attained |= {("conv", 1.0, "chunk 64", "chunk"): 1.0}
    (note,) = tables.no_room(rows_of(attained))
    assert note == "changing at 0.4: split 8:4 has 92.0% in target, so that nothing could be 1.1 times better"


def test_disaggregation_has_two_devices_and_twice_the_requests(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    phases, simulated = scripts("phases"), scripts("phases_simulated")
    flags = ["phases.py", "--loads", "changing", "--rates", "1", "--seconds", "1.5", "--only", "pd", "chunk 256"]
    monkeypatch.setattr(sys, "argv", flags)
    rows = {one["kind"]: one for one in phases.run(phases._arguments(), "tune")}
    assert rows["pd"]["requests"] == pytest.approx(2 * rows["chunk"]["requests"], abs=2)
    assert rows["pd"]["goodput"] == pytest.approx(rows["pd"]["attainment"] * rows["pd"]["offered"] / 2)
    assert rows["chunk"]["goodput"] == pytest.approx(rows["chunk"]["attainment"] * rows["chunk"]["offered"])
    assert {one.devices for one in simulated.contestants() if one.kind != "pd"} == {1}


def test_every_policy_serves_every_request_the_same_way_each_time(scripts: Any) -> None:
    loads, simulated = scripts("phases_loads"), scripts("phases_simulated")
    shots = loads.changing(simulated.MIXES).make("tune", 1.0, 3.0, simulated.CAPACITY.vocabulary)
    shots = [replace(one, output_tokens=min(one.output_tokens, 20)) for one in shots]
    for one in simulated.contestants():
        records, switches = simulated.serve(one, shots, False)
        assert [record.error for record in records] == [None] * len(shots)
        assert [record.output_tokens for record in records] == [shot.output_tokens for shot in shots]
        assert switches == 0 or one.kind in ("auto", "paper")
        if one.kind == "auto":
            assert simulated.serve(one, shots, False) == (records, switches)


def test_the_script_writes_claims_rows_and_a_picture(
    scripts: Any, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = scripts("phases")
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    few = phases.simulated.contestants()[2:7]
    monkeypatch.setattr(phases.simulated, "contestants", lambda: few)
    flags = ["--seconds", "2", "--rates", "1", "--json", str(out), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["phases.py", str(trace), *flags])
    phases.main()
    content = json.loads(out.read_text())
    assert {row["trace"] for row in content["rows"]} == {"made_up", "changing"}
    assert any("SIMULATED" in note for note in content["notes"]) and "made_up (report)" in capsys.readouterr().out
    assert picture.stat().st_size > 5000 and str(tmp_path) not in json.dumps(content["rows"])
