"""Published times beside simulated ones: the data, one point of each kind computed by hand, and what is reported."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from weft.sim.hardware import find_gpu, find_link
from weft.sim.models import find_model
from weft.sim.precision import find_precision
from weft.sim.step import StepCost

FOLDER = Path(__file__).parents[2] / "benchmarks"
UNITS = {"decode": {"tok/s", "tok/s decoding", "s", "ms"}, "first": {"s", "ms"}, "run": {"tok/s", "tok/s/GPU", "s"}}
UNITS |= {"run_ttft": {"ms"}, "run_tpot": {"ms"}}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("simulator_published")


@pytest.fixture
def raw() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "published.json").read_text())
    return found


def find(script: ModuleType, raw: dict[str, Any], source: str, kind: str, **wanted: Any) -> Any:
    points = (one for one in script.read_points(raw) if (one.source, one.kind) == (source, kind))
    return next(one for one in points if all(getattr(one.load, key) == value for key, value in wanted.items()))


def test_every_point_has_a_source_that_can_be_looked_up(raw: dict[str, Any]) -> None:
    assert {one["source"] for one in raw["points"]} == raw["sources"].keys()
    for one in raw["sources"].values():
        assert one["url"].startswith("https://")
        assert one["version"]
        assert one["note"]
        assert one["generation"] in (2023, 2025)
    assert all(one["why"] for one in raw["left_out"])


def test_every_point_is_whole_and_there_once(script: ModuleType, raw: dict[str, Any]) -> None:
    for one in raw["points"]:
        assert ("batch" in one) != ("requests" in one)
        for figure in one["measured"]:
            assert figure["value"] > 0
            assert figure["unit"] in UNITS[figure["kind"]]
    points = list(script.read_points(raw))
    assert {one.kind for one in points} == script.KINDS.keys()
    assert len({(one.source, one.engine, one.kind, one.load) for one in points}) == len(points)
    assert all(one.seconds > 0 for one in points)


def test_the_batches_of_lmdeploy_fit_in_memory(script: ModuleType, raw: dict[str, Any]) -> None:
    loads = {one.load for one in script.read_points(raw) if one.source == "lmdeploy"}
    for load in loads:
        cost = script.cost_at(load)
        kv = load.batch * (load.input + load.output) * cost.kv_bytes_per_token
        assert cost.weight_bytes + kv <= 80e9 * load.tp


def test_published_figures_become_seconds(script: ModuleType, raw: dict[str, Any]) -> None:
    alone = {"model": "llama-2-7b", "batch": 1, "input": 128, "output": 128}
    assert find(script, raw, "lmdeploy", "first", **alone).seconds == 0.022
    assert find(script, raw, "lmdeploy", "decode", **alone).seconds == pytest.approx((128 / 102.21 - 0.022) / 127)
    assert find(script, raw, "musgrave", "decode").seconds == pytest.approx(1 / 75)
    two = find(script, raw, "trtllm-0.6.1", "run", gpu="h100", tp=2, batch=96)
    assert two.seconds == pytest.approx(96 * 128 / (2 * 306))
    many = find(script, raw, "trtllm-1.0", "run", gpu="h200", model="llama-3-70b", input=2048)
    assert many.seconds == pytest.approx(3000 * 128 / 442)


def test_single_steps_are_those_of_the_cost_model(script: ModuleType, raw: dict[str, Any]) -> None:
    cost = StepCost(
        find_model("llama-2-70b"), find_gpu("a100-80"), find_precision("fp16"), ranks=4, link=find_link("nvlink3")
    )
    same = {"model": "llama-2-70b", "input": 2048, "output": 128}
    decode = find(script, raw, "lmdeploy", "decode", batch=16, **same)
    assert script.simulated(decode) == pytest.approx(cost.whole([1] * 16, [2112] * 16, 16))
    first = find(script, raw, "lmdeploy", "first", batch=1, **same)
    assert script.simulated(first) == pytest.approx(cost.whole([2048], [0], 1))
    beside = find(script, raw, "gpustack-8b", "first", batch=4)
    one = script.cost_at(beside.load)
    assert script.simulated(beside) == pytest.approx(one.whole([233, 1, 1, 1], [0, 343, 343, 343], 4))


def test_a_batch_that_begins_together_is_a_prefill_and_its_steps(script: ModuleType, raw: dict[str, Any]) -> None:
    point = find(script, raw, "trtllm-0.6.1", "run", gpu="a100-80", batch=52)
    point = replace(point, load=replace(point.load, batch=3, input=100, output=5))
    cost = script.cost_at(point.load)
    steps = sum(cost.whole([1] * 3, [100 + n] * 3, 3) for n in range(4))
    assert script.simulated(point) == pytest.approx(cost.whole([100] * 3, [0] * 3, 3) + steps, rel=1e-6)


def test_other_runs_go_through_the_scheduler(script: ModuleType, raw: dict[str, Any]) -> None:
    point = find(script, raw, "gpustack-a100", "run_tpot", input=1996)
    point = replace(point, load=replace(point.load, requests=1, input=100, output=5))
    cost = script.cost_at(point.load)
    steps = [cost.whole([1], [100 + n], 1) for n in range(4)]
    assert script.simulated(point) == pytest.approx(sum(steps) / 4)
    first = cost.whole([100], [0], 1)
    assert script.simulated(replace(point, kind="run_ttft")) == pytest.approx(first)
    assert script.simulated(replace(point, kind="run")) == pytest.approx(first + sum(steps))


def test_where_a_request_reserves_its_full_length_fewer_run_at_a_time(script: ModuleType, raw: dict[str, Any]) -> None:
    load = find(script, raw, "trtllm-1.0", "run", gpu="h100", model="llama-3-70b", input=1000).load
    load = replace(load, requests=100, input=8000, output=200)
    wide, narrow = script.serve(replace(load, reserves=False)), script.serve(load)
    assert wide.completed == narrow.completed == 100
    assert narrow.tpot.mean < wide.tpot.mean


def test_what_is_reported(
    script: ModuleType, raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [one for one in script.read_points(raw) if one.kind in ("decode", "first")]
    monkeypatch.setattr(script, "read_points", lambda raw: iter(points))
    out, doc, picture = tmp_path / "out.json", tmp_path / "doc.md", tmp_path / "out.png"
    doc.write_text("before\n<!-- published -->\n<!-- end -->\nafter\n")
    arguments = ["simulator_published.py", "--json", str(out), "--doc", str(doc), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    content = json.loads(out.read_text())
    assert len(content["rows"]) == len(points)
    kinds = {f"{kind}_{year}_median_percent" for kind in ("decode", "first") for year in (2023, 2025)}
    assert content["claims"].keys() == kinds
    row = content["rows"][0]
    assert row["error_percent"] == pytest.approx(100 * (row["simulated_ms"] / row["measured_ms"] - 1))
    assert "SIMULATED" in content["notes"][0]
    assert doc.read_text().count("\n|") > 10
    assert picture.stat().st_size > 1000


def test_claims_tell_marked_sources_apart(script: ModuleType) -> None:
    rows = [
        {"kind": "run", "generation": 2025, "marked": marked, "error_percent": error}
        for marked, error in ((False, -10.0), (False, 20.0), (True, -60.0))
    ]
    assert script.claims(rows) == {"run_2025_median_percent": 20.0, "run_2025_unmarked_median_percent": 15.0}
