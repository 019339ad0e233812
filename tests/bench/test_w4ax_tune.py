"""The measurement of tiles, interpreted on a tiny shape: it shows that the script works, and what it makes of times."""

from __future__ import annotations

import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, and the interpreter is off"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of the interpreter
]


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("w4ax_tune")


def test_every_candidate_is_measured_and_the_best_is_named(
    tune: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By times that are given: a tile of 64 columns is twice as fast as others; one that cannot be is left out."""
    columns: list[int] = []
    multiply, linear_a16 = tune.triton_w4ax.multiply, tune.triton_w4ax.linear_a16

    def watched(work: Any) -> Any:
        def run(*given: Any, tile: Any, **more: Any) -> torch.Tensor:
            if (tile.size[1], tile.stages) == (256, 5):
                raise RuntimeError("out of resource: shared memory")
            columns.append(tile.size[1])
            return work(*given, tile=tile, **more)

        return run

    def seconds(gpu: Any, work: Any, rounds: int) -> float:
        work[0]()
        return 1.0 if columns[-1] == 64 else 2.0

    monkeypatch.setattr(tune.triton_w4ax, "multiply", watched(multiply))
    monkeypatch.setattr(tune.triton_w4ax, "linear_a16", watched(linear_a16))
    monkeypatch.setattr(tune, "seconds", seconds)
    monkeypatch.setattr(tune, "TINY", tune.Sizes(((96, 128),), (1, 70), 0, 1))
    out = tmp_path / "tiles.json"
    monkeypatch.setattr("sys.argv", ["w4ax_tune.py", "--json", str(out)])
    tune.main()
    content = json.loads(out.read_text())
    assert [(row["form"], row["rows"]) for row in content["rows"]] == [(f, r) for f in tune.FORMS for r in (1, 70)]
    for row in content["rows"]:
        assert row["best"][1] == 64 and row["seconds"] == 1.0
        assert row["refused"] == (4 if row["rows"] == 70 else 0)  # two heights, 4 and 8 warps
        assert len(row["all"]) >= 18 and row["used"] in [one["tile"] for one in row["all"]]
    # In use are 32 columns for few rows; for 70 rows 128 of W4A8, and 64 of W4A16.
    assert content["claims"] == {"w4a8_tile_of_best": 0.5, "w4a16_tile_of_best": 0.5}
    assert "w4a8_tile_of_best = 0.500" in capsys.readouterr().out


def test_a_time_is_that_of_one_product(tune: Any) -> None:
    gpu, done = tune.open_gpu(), []
    assert 0 < tune.seconds(gpu, (lambda: done.append(1), 4), 3) < 1.0
    assert len(done) == 4  # once before any counts


def test_some_shapes_and_rows(tune: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tune, "measured", lambda gpu, sizes, form, shape, count: {"row": (form, shape, count)})
    monkeypatch.setattr(tune, "claims", lambda rows: {})
    monkeypatch.setattr(tune, "cells", lambda row: [""] * 7)
    out = tmp_path / "tiles.json"
    given = ["--quick", "--json", str(out), "--shapes", "96x128", "64x256", "--rows", "3"]
    monkeypatch.setattr("sys.argv", ["w4ax_tune.py", *given])
    tune.main()
    shapes = [[96, 128], [64, 256]]
    rows = json.loads(out.read_text())["rows"]
    assert [row["row"] for row in rows] == [[form, shape, 3] for form in tune.FORMS for shape in shapes]
    monkeypatch.setattr("sys.argv", ["w4ax_tune.py", "--shapes", "96x100"])
    with pytest.raises(SystemExit):
        tune.main()
