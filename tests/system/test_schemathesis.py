"""A running server keeps to its own OpenAPI description, whatever it is sent."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

Served = Callable[..., AbstractContextManager[str]]


@pytest.mark.slow
def test_the_server_keeps_to_its_description(served: Served, tmp_path: Path) -> None:
    """No 5xx, no answer that is not described, nothing taken that the description forbids.

    What the description allows may still be refused, for it knows neither the vocabulary nor the context of a model,
    nor which fields exclude each other: schemathesis may warn of that, and of nothing else.
    """
    command = [sys.executable, "-m", "schemathesis.cli", "run", "--no-color", "--generation-deterministic"]
    flags = ["--max-examples", "10", "--exclude-checks", "positive_data_acceptance", "--request-timeout", "60"]
    # A short context makes short answers.
    with served("--device", "simulated", "--max-model-len", "24", "--log-level", "error") as url:
        run = subprocess.run(
            [*command, *flags, f"{url}/openapi.json"], capture_output=True, text=True, timeout=280, cwd=tmp_path
        )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr
    assert "11 selected / 11 total" in run.stdout
    assert re.search(r"(\d+) generated, \1 passed", run.stdout)
    warned = re.search(r" (\d+) warnings? in ", run.stdout)
    assert warned is None or (warned[1] == "1" and "Schema validation mismatch" in run.stdout), run.stdout[-5000:]
