"""The benchmark of a step's overhead: what it measures adds up, and both of its devices compute the same."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from weft.kernels import LEVELS, available

FOLDER = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not set(LEVELS) & set(available()), reason="the C++ extension is not built")


@pytest.fixture
def step_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("step_cpu")
    tiny = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}
    monkeypatch.setattr(script, "SMALL", {**script.SMALL, **tiny})
    monkeypatch.setattr(script, "SEQUENCES", (1, 3))
    monkeypatch.setattr(script, "STEPS", 2)
    return script


def test_a_steps_time_is_that_of_its_kernels_and_the_overhead(step_cpu: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(step_cpu.SMALL))
    program, device = step_cpu.open_device(tmp_path, available()[0], plain=False)
    none, plain = step_cpu.open_device(tmp_path, available()[0], plain=True)
    try:
        assert none is None
        plan = step_cpu.decode_plan(3)
        found = []
        for one in (device, plain):
            one.submit(plan)
            found.append(one.poll(None)[0].sampled)
        assert len(found[0]) == 3 and found[0] == found[1]
        before = program.seconds()
        round_ = step_cpu._round(program, device, plain, 3)
        assert 0 < round_.kernels < round_.whole and round_.plain > 0
        assert round_.overhead == pytest.approx(round_.whole - round_.kernels)
        after = program.seconds()
        assert set(after) == {
            "Embed",
            "Norm",
            "Multiply",
            "RotaryWrite",
            "Attention",
            "SiluMul",
            "Take",
            "BestOfRows",
        }
        assert all(after[kind] > before[kind] for kind in after)
    finally:
        device.close()
        plain.close()


def test_it_prints_its_table_and_writes_its_claim(
    step_cpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["step_cpu.py", "--quick", "--json", str(out)])
    step_cpu.main()
    content = json.loads(out.read_text())
    assert content["claims"] == {"step_overhead_us": content["rows"][0]["overhead"]["median"]}
    assert [row["sequences"] for row in content["rows"]] == [1, 3]
    assert "call by call" in capsys.readouterr().out
