"""A rank's choice of how to carry out a step: the same on all ranks, by what they have measured together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.weave.local import ThreadCollective, Threads

from weft.config import EngineConfig
from weft.core.plan import Slice
from weft.devices.group import WAVES, Chooser, Group
from weft.errors import DeviceError
from weft.kernels.reference import ReferenceKernels
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.loader import load_weights
from weft.models.measure import measure
from weft.models.shard import Part, shard_config
from weft.weave.background import Background
from weft.weave.choice import Costs, Curve, Mode
from weft.weave.collective import Collective
from weft.weave.rows import plain

BUILTIN = Path(__file__).resolve().parents[2] / "src" / "weft" / "assets" / "builtin"


def slices(*lengths: int) -> list[Slice]:
    return [Slice(number, 0, (0,) * length, (number,)) for number, length in enumerate(lengths)]


def test_a_step_is_cut_only_where_it_is_woven() -> None:
    assert Chooser("fused", None)(slices(40, 40)) == (Mode.FUSED, (80,))
    assert Chooser("plain", None)(slices(40, 40)) == (Mode.PLAIN, (80,))
    assert Chooser("woven", None)(slices(48, 48, 48)) == (Mode.WOVEN, (48, 48, 48))
    assert Chooser("rejoined", None)(slices(48, 48, 48)) == (Mode.REJOINED, (48, 48, 48))
    assert Chooser("woven", None)(slices(WAVES.rows - 1)) == (Mode.WOVEN, (WAVES.rows - 1,))  # one wave: one strand
    stage, seam = Curve(((1, 0.0), (1000, 1.0))), Curve(((1, 0.0), (1000, 0.5)))
    costs = Costs(8, stage, stage, {Mode.FUSED: seam}, 0.0)
    assert Chooser("auto", costs)(slices(48, 48)) == (Mode.WOVEN, (48, 48))
    assert Chooser("auto", replace(costs, drag=1.0))(slices(48, 48)) == (Mode.FUSED, (96,))
    short = replace(costs, attend=Curve(((1, 0.0), (1000, 0.3))))
    assert Chooser("auto", short)(slices(48, 48)) == (Mode.WOVEN, (36, 24, 36))  # two stages beside each seam


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_ranks_measure_together_and_go_by_the_same_numbers() -> None:
    config, kernels = read_config(BUILTIN), ReferenceKernels((0,))
    groups = [Threads(2, plain(kernels.rms_norm)).collectives() for _ in range(2)]

    def one(pair: tuple[ThreadCollective, ThreadCollective]) -> Costs:
        torch.set_num_threads(1)
        fused, woven = pair
        part = Part(fused.rank, 2)
        weights = load_weights(BUILTIN, config, kernels, torch.float32, part=part)
        decoder = Decoder(shard_config(config, part), weights, kernels, 128)
        collectives: dict[Mode, Collective] = {Mode.FUSED: fused, Mode.WOVEN: Background(woven)}
        try:
            return measure(decoder, decoder.make_kv(4, 16), 16, collectives, [1, 16, 50])
        finally:
            collectives[Mode.WOVEN].close()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one, zip(*groups, strict=True))
    assert first == second
    assert first.layers == config.layers and [*first.seams] == [Mode.FUSED]
    assert first.drag is not None
    for curve in (first.attend, first.feed, first.seams[Mode.FUSED]):
        assert [tokens for tokens, _ in curve.points] == [1, 16, 50]
        assert all(seconds > 0 for _, seconds in curve.points)


def test_ranks_that_would_launch_other_work_do_not_start() -> None:
    pytest.importorskip("triton")
    from weft.devices.cuda_ranks import join_ranks
    from weft.loop.nodes import free_port

    host, port, model = "127.0.0.1", free_port("127.0.0.1"), read_config(BUILTIN)
    gpu: Any = SimpleNamespace(device=torch.device("cpu"), sms=1)
    held = []  # with what was raised, rank 0's store, which rank 1 may still read

    def one(rank: int) -> str:
        weave = "fused" if rank == 0 else "one-shot"
        config = EngineConfig(device="cuda", tensor_parallel_size=2, collective="nccl", weave=weave)
        group = Group(rank, 2, 2, "weft-test", host, port, host, 5.0, False, lambda blocks: blocks)
        with pytest.raises(DeviceError) as raised:
            join_ranks(config, group, gpu, model, torch.bfloat16)
        held.append(raised)
        return str(raised.value)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one, range(2))
    assert first.startswith("rank 1 would launch other work than rank 0: ('nccl', 'one-shot', ")
    assert second.startswith("rank 0 would launch other work than rank 1: ('nccl', 'fused', ")
