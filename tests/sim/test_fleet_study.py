"""benchmarks/fleet_study.py: the day's shape, its hours, and the script on a small trace."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def fleet_study() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module("fleet_study")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Conversations of four turns, each of which begins with what was said before."""
    path = tmp_path / "talk_conversation.jsonl"
    rows = [
        {
            "timestamp": 150 * n, "input_length": 512 * (1 + n // 20 % 4) + 40, "output_length": 2 + n % 3,
            "hash_ids": [1000 * (n % 20 + n // 80 * 20) + turn for turn in range(n // 20 % 4 + 1)],
        }
        for n in range(240)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_day_has_its_mean_and_its_peak_when_the_node_fails(fleet_study: ModuleType) -> None:
    assert sum(fleet_study.DAY) / fleet_study.HOURS == pytest.approx(1.0)
    assert min(fleet_study.DAY) == fleet_study.DAY[fleet_study.NIGHT] == pytest.approx(1 - fleet_study.SWING)
    assert fleet_study.DAY[fleet_study.FAILS] > 1.5


def test_the_script_counts_every_request_in_its_hour(
    fleet_study: ModuleType, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    flags = ["fleet_study.py", str(trace), "--gpus", "24", "--day-part", "1", "--load", "4"]
    monkeypatch.setattr(sys, "argv", [*flags, "--json", str(out), "--plot", str(picture)])
    fleet_study.main()
    printed = capsys.readouterr().out
    assert "SIMULATED" in printed and "prefix-aware: in target" in printed
    rows = json.loads(out.read_text())["rows"]
    assert [row["router"] for row in rows] == ["least-loaded", "prefix-aware"]
    for row in rows:
        assert row["requests"] == sum(hour["requests"] for hour in row["hours"]) and row["replicas"] == 3
        assert row["hours"][16]["requests"] > 2 * row["hours"][4]["requests"]
        assert row["memory"][-1]["ended"] <= row["requests"] and row["failed"] == 0
    without, with_ = rows
    assert with_["cached"] > without["cached"] > 0, "the router that knows prefixes sends turns where they began"
    assert picture.stat().st_size > 5000
