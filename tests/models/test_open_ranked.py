"""What a rank opens with: steps are carried out as they were measured. A group of one rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.config import EngineConfig
from weft.core.plan import Slice
from weft.devices import group
from weft.devices.group import Group, check_weave, measured_sizes, open_ranked
from weft.errors import ConfigError
from weft.kernels import LEVELS, available, open_kernels
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.loader import load_weights
from weft.models.ranked import LanePlace
from weft.weave.choice import Costs, Mode

BEST = available()[0]
BLOCK, BLOCKS, MOST = 16, 8, 100
pytestmark = pytest.mark.skipif(BEST not in LEVELS, reason="the C++ extension is not built")


def test_what_is_measured_follows_from_the_most_that_a_step_may_have() -> None:
    assert measured_sizes(2048) == [1, 16, 64, 256, 2048]
    assert measured_sizes(64) == [1, 16, 64]
    assert measured_sizes(1) == [1]


def test_strands_rejoin_only_where_a_model_has_experts(small: Callable[..., Path]) -> None:
    config, dense = EngineConfig(weave="rejoined"), read_config(small())
    with pytest.raises(ConfigError, match=r"--weave is rejoined, and the model has no experts .* woven works"):
        check_weave(config, dense)
    check_weave(EngineConfig(weave="woven"), dense)
    mixture = small(
        architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=4, num_experts_per_tok=2
    )
    check_weave(config, read_config(mixture))


def test_rows_travel_quantised_when_measured_and_when_served(
    tmp_path: Path, write_fmpq: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And small fused steps are programs, also for the costs; measured is where the lane's thread will be."""
    from weft.ipc.ranks import new_name
    from weft.weave.native import NativeCollective

    write_fmpq(tmp_path, 8)
    seams: list[tuple[bool, set[int]]] = []
    known: list[Costs] = []
    start = NativeCollective.start

    def watched(self: Any, join: Any) -> Any:
        seams.append((join.quantise is not None, os.sched_getaffinity(0)))
        return start(self, join)

    class Chooser(group.Chooser):
        def __init__(self, weave: str, costs: Costs | None) -> None:
            assert costs is not None
            known.append(costs)
            super().__init__(weave, costs)

    monkeypatch.setattr(NativeCollective, "start", watched)
    monkeypatch.setattr(group, "Chooser", Chooser)
    allowed = os.sched_getaffinity(0)
    core = max(allowed)
    config = EngineConfig(weave="auto", collective="shm", block_size=BLOCK, max_num_batched_tokens=MOST)
    kernels = open_kernels(BEST, (core,))
    weights = load_weights(tmp_path, read_config(tmp_path), kernels, torch.bfloat16)
    decoder = Decoder(read_config(tmp_path), weights, kernels, 128)
    kv = decoder.make_kv(BLOCKS, BLOCK)
    alone = Group(0, 1, 1, new_name(), "", None, "", 5.0, False, lambda blocks: blocks)
    ranked = open_ranked(config, alone, None, "mixed", decoder, kernels, LanePlace((core,)), kv, BLOCKS)
    try:
        assert seams and all(quantised and cores == {core} for quantised, cores in seams)
        assert os.sched_getaffinity(0) == allowed
        (costs,) = known
        assert costs.program is not None and [tokens for tokens, _ in costs.program.points] == [1, 16, 64]
        assert [tokens for tokens, _ in costs.seams[Mode.FUSED].points] == [1, 16, 64, MOST]
        seams.clear()
        ranked.run([Slice(1, 0, tuple(range(MOST)), tuple(range(7)))], [MOST - 1])
        # Two for each layer; strands before the last have none in the last layer, of which no row is wanted.
        assert len(seams) in (4, 6, 8)
        assert [quantised for quantised, _ in seams[:-1]] == [True] * (len(seams) - 1)
        assert not seams[-1][0], "which the output layer reads"
    finally:
        ranked.close()
        kernels.close()
