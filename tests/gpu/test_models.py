"""The checkpoints of conftest.py, on any machine: a GPU's few minutes are not for finding out that they do not load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from weft.config import EngineConfig
from weft.core.plan import Lane, Plan, Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices import open_device


@pytest.mark.parametrize("model", ["tiny_model", "quantised_model"])
def test_a_checkpoint_loads_and_computes(model: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    device = open_device(EngineConfig(device="cpu", num_blocks=8, max_model_len=64), folder, lambda phase: None)
    try:
        piece = Slice(0, 0, (5, 6, 7), (0,), Sampling(SamplingParams(temperature=0.0), 0, 3))
        device.submit(Plan(1, Lane.MIXED, (piece,)))
        (result,) = device.poll(60.0)
    finally:
        device.close()
    assert result.error is None and not result.failed
    assert 0 <= result.sampled[0].token < 4096


def test_no_other_packages_tests_are_in_the_way(tmp_path: Path) -> None:
    """Some are installed as a package of that name, and one with an __init__.py would come before one without."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}"}
    program = "from tests import row_products"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
