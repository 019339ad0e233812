"""The benchmark of ranks on one host: its steps are those of a rank as served, and its figures follow from them."""

from __future__ import annotations

import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.kernels import LEVELS, available

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"vocab_size": 256}
pytestmark = pytest.mark.skipif(not set(LEVELS) & set(available()), reason="the C++ extension is not built")


@pytest.fixture
def weave_shm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("weave_shm")


def test_a_choice_is_compared_with_fused_and_with_the_best(weave_shm: Any) -> None:
    seconds = {"fused": [4.0, 4.0, 6.0], "woven": [3.0, 3.2, 3.0], "auto": [5.0, 3.2, 3.0]}
    row = weave_shm._step_row("bf16", 512, seconds, "woven 2")
    assert row["auto_vs_fused"].median == 4.0 / 3.2
    assert row["regret"] == 0.0, "the median of the rounds"
    assert (row["auto"].median, row["chosen"]) == (3200.0, "woven 2")
    worse = weave_shm._step_row("bf16", 512, seconds | {"auto": [4.0, 4.0, 6.0]}, "fused 1")
    assert worse["regret"] == pytest.approx(4 / 3 - 1) and worse["auto_vs_fused"].median == 1.0
    assert len(weave_shm._step_cells(row)) == 8


def test_its_ranks_take_steps_as_they_are_served(weave_shm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads here. A choice by costs is among what is timed."""
    from weft.ipc.ranks import new_name
    from weft.kernels.cpu import CpuKernels
    from weft.weave.shm import ShmCollective

    monkeypatch.setattr(weave_shm, "SHAPE", weave_shm.SHAPE | TINY)
    monkeypatch.setattr(weave_shm, "MOST", 96)
    steps = weave_shm.Steps((("bf16", 16), ("w4a8", 96)), 2, True)
    core, name = min(os.sched_getaffinity(0)), new_name()

    def take(rank: int) -> Any:
        torch.set_num_threads(1)
        kernels = CpuKernels(available()[0], (core,))
        shared = ShmCollective(f"{name}-shared", rank, 2, kernels, timeout=60.0, spin=False)
        try:
            return weave_shm._take_steps(rank, core, name, kernels, shared, steps, 2)
        finally:
            shared.close()
            kernels.close()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(take, range(2))
    assert first == second and first.keys() == set(steps.cases), "the slower rank's seconds"
    for seconds, chosen in first.values():
        assert seconds.keys() == {"fused", "woven", "auto"} and all(len(own) == 2 for own in seconds.values())
        assert all(one > 0 for own in seconds.values() for one in own)
        assert chosen in ("fused 1", "woven 2", "woven 3")


def test_its_contestants_join_the_same_rows(weave_shm: Any, tmp_path: Path) -> None:
    """Ranks are threads here; they compare what they get themselves."""
    import torch.distributed as dist

    from weft.ipc.ranks import new_name
    from weft.kernels.cpu import CpuKernels
    from weft.kernels.wire import FusedRows
    from weft.weave.distributed import DistributedCollective, connect
    from weft.weave.shm import ShmCollective

    core, name = min(os.sched_getaffinity(0)), new_name()

    def take(rank: int) -> Any:
        torch.set_num_threads(1)
        kernels = CpuKernels(available()[0], (core,))
        shared = ShmCollective(name, rank, 2, kernels, timeout=60.0, spin=False)
        messages = connect(dist.FileStore(str(tmp_path / "store"), 2), rank, 2, timeout=60.0)
        fused = DistributedCollective(messages, FusedRows(kernels), capacity=30 * 256 * 2)
        try:
            weave_shm._compare(30, 256, rank, kernels, shared, fused, messages)
            seams = weave_shm._seams(30, 256, rank, kernels, shared, fused, messages)
            return {contestant: seam() is not None for contestant, seam in seams.items()}
        finally:
            for collective in (fused, shared):
                collective.close()
            kernels.close()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(take, range(2))
    assert first == second == dict.fromkeys(weave_shm.CONTESTANTS, True)
