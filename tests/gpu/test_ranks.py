"""Ranks on a real GPU: several of them on one, over peer pointers, each on streams of its own, who have to meet; the
two streams of a woven step in a graph; and, where there are two GPUs, two ranks of the device against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from weft.core.plan import Slice
from weft.devices.cuda_inputs import layout_of, send
from weft.devices.cuda_streams import open_gpu
from weft.kernels.triton import TritonKernels
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.loader import load_weights, move
from weft.models.ranked import cut_step
from weft.models.shard import Part, shard_config
from weft.weave.collective import Collective, Join
from weft.weave.streams import SideStream
from weft.weave.symmetric import Layout, Region, SymmetricCollective
from weft.weave.weaver import Weaver

DEVICE = torch.device("cuda", 0)
EPS, SIZE, MOST = 1e-5, 2048, 256
TOKENS, CUT = 150, 64
NO_TIME = 1e-4  # seconds that ranks wait for one another where kernels are only to be loaded
SCRIPT = Path(__file__).with_name("rank_memory.py")


def collectives(layout: Layout, timeout: float = 5.0) -> list[SymmetricCollective]:
    """Ranks in one process, whose regions are plain memory of one GPU.

    CUDA may load a kernel only when nothing runs; a seam that waits for another rank, whose kernels are not there yet,
    would wait in vain. So everything runs once before with NO_TIME.
    """
    memory = [torch.zeros(layout.bytes, dtype=torch.uint8, device=DEVICE) for _ in range(layout.ranks)]
    addresses = tuple(one.data_ptr() for one in memory)
    torch.cuda.synchronize()
    return [
        SymmetricCollective(Region(own, addresses), rank, layout, timeout=timeout) for rank, own in enumerate(memory)
    ]


@dataclass
class Turn:
    """One seam and one gather of all ranks: what they gave, and what each got."""

    partials: list[torch.Tensor]
    logits: list[torch.Tensor]
    hidden: dict[int, torch.Tensor]
    gathered: dict[int, list[torch.Tensor]]


def take_turn(
    group: Sequence[SymmetricCollective],
    streams: Sequence[torch.cuda.Stream],
    kept: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bounds: tuple[int, ...],
    number: int,
) -> Turn:
    """Each rank is late in its own way: before the seam and between seam and gather."""
    ranks, new = len(group), {"device": DEVICE, "dtype": weight.dtype}
    turn = Turn(
        [torch.randn(bounds[-1], SIZE, **new) for _ in range(ranks)],
        [torch.randn(3, 777, device=DEVICE) for _ in range(ranks)],
        {},
        {},
    )
    torch.cuda.synchronize()
    for rank in [(number + at) % ranks for at in range(ranks)]:
        own = group[rank]
        with torch.cuda.stream(streams[rank]):
            torch.cuda._sleep(200_000 * ((rank * 7 + number * 3) % 5))
            joined = own.finish(own.start(Join(turn.partials[rank], kept[rank], weight, EPS, bounds)))
            torch.cuda._sleep(200_000 * ((rank * 5 + number) % 3))
            turn.hidden[rank] = joined.hidden.clone()
            turn.gathered[rank] = own.gather(turn.logits[rank])
    torch.cuda.synchronize()
    return turn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bounds", [(0, 128, 256), (0, 1, 1, 65), (0, 16, 32, 48, 64)], ids=str)
def test_seams_under_delays_and_what_is_gathered(bounds: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(len(bounds))
    ranks, tokens = len(bounds) - 1, bounds[-1]
    layout = Layout(ranks, MOST, SIZE, dtype, room=1000)  # of less than the logits
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    weight, whole = (torch.randn(n, SIZE, device=DEVICE).to(dtype) for n in (1, tokens))
    kept = [whole[first:end].clone() for first, end in pairwise(bounds)]
    take_turn(collectives(layout, NO_TIME), streams, [one.clone() for one in kept], weight[0], bounds, 0)
    group = collectives(layout)
    for number in range(12):
        turn = take_turn(group, streams, kept, weight[0], bounds, number)
        total = torch.zeros(tokens, SIZE, device=DEVICE)
        for given in turn.partials:
            total += given.float()
        whole = (total + whole.float()).to(dtype)
        wide = whole.float()
        expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()
        assert [int(one.failed) for one in group] == [0] * ranks
        assert torch.equal(torch.cat(kept), whole), "each owner's residual is the sum in float32, rounded once"
        for hidden in turn.hidden.values():
            assert torch.equal(hidden, turn.hidden[0]), "all ranks have the same bits"
            torch.testing.assert_close(hidden.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        for gathered in turn.gathered.values():
            assert all(torch.equal(one, other) for one, other in zip(gathered, turn.logits, strict=True))


@dataclass
class Rank:
    """A rank's decoder, keys and values, and stream."""

    decoder: Decoder
    kv: list[Any]
    stream: torch.cuda.Stream


Step = Callable[[Collective], torch.Tensor]


def open_rank(folder: Path, rank: int, ranks: int) -> Rank:
    config, kernels, part = read_config(folder), TritonKernels(DEVICE), Part(rank, ranks)
    weights = move(load_weights(folder, config, kernels, torch.bfloat16, room=2**40, part=part), DEVICE)
    decoder = Decoder(shard_config(config, part), weights, kernels, 512)
    return Rank(decoder, decoder.make_kv(16, 16), torch.cuda.Stream())


def prepared(rank: Rank, seed: int, *lengths: int) -> Step:
    """A prompt in strands of these lengths: two of its rows after the last layer."""
    gpu, batches, kept = open_gpu(), [], []
    prompt = tuple((11 * place + seed) % 4096 for place in range(TOKENS))
    for own, wanted in cut_step([Slice(0, 0, prompt, tuple(range(10)))], [20, TOKENS - 1], lengths):
        batch = make_batch(own, 16, wanted)
        batches.append(layout_of(batch).inputs(send(gpu, batch, None), 16, whole=batch.kept is None).batch)
        kept.append(wanted)

    @torch.inference_mode()
    def run(collective: Collective) -> torch.Tensor:
        weaver = Weaver(collective, rank.decoder.join)
        return torch.cat(weaver.weave([rank.decoder.strand(one, rank.kv) for one in batches], kept))

    return run


@pytest.mark.parametrize("count", [1, 2])
def test_a_woven_step_is_recorded_on_two_streams(quantised_model: Path, count: int) -> None:
    """Launched, or replayed from a graph after another prompt was in the same blocks, a step of two strands has the
    bits of one strand."""
    layout = Layout(count, 256, read_config(quantised_model).hidden_size, torch.bfloat16, room=4096)
    ranks = [open_rank(quantised_model, rank, count) for rank in range(count)]
    fused, woven, other = (
        [prepared(rank, seed, *lengths) for rank in ranks]
        for seed, lengths in ((5, (TOKENS,)), (5, (CUT, TOKENS - CUT)), (6, (TOKENS,)))
    )

    def everywhere(works: Sequence[Callable[[], Any]]) -> list[Any]:
        torch.cuda.synchronize()
        found = []
        for rank, work in zip(ranks, works, strict=True):
            with torch.cuda.stream(rank.stream):
                found.append(work())
        torch.cuda.synchronize()
        return found

    def step(steps: Sequence[Step], group: Sequence[Collective]) -> list[torch.Tensor]:
        return everywhere([partial(one, collective) for one, collective in zip(steps, group, strict=True)])

    for steps in (fused, woven):
        step(steps, [SideStream(one, DEVICE) for one in collectives(layout, NO_TIME)])
    group = collectives(layout)
    side = [SideStream(one, DEVICE) for one in group]
    expected = step(fused, side)[0]
    assert expected.isfinite().all() and len(expected.unique()) > 100
    assert all(torch.equal(one, expected) for one in step(woven, side))
    graphs, outs = [], []
    for rank, one, collective in zip(ranks, woven, side, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=rank.stream, capture_error_mode="thread_local"):
            outs.append(one(collective))
        graphs.append(graph)
    for _ in range(3):
        assert not torch.equal(step(other, side)[0], expected)
        everywhere([graph.replay for graph in graphs])
        assert all(torch.equal(out, expected) for out in outs)
    assert [int(one.failed) for one in group] == [0] * count


def test_two_processes_share_memory_of_one_gpu() -> None:
    """torch's symmetric memory as ranks meet in it. They take turns on the GPU, so that meeting takes time slices."""
    environment = {**os.environ, "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=55)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"failed": [0, 0], "same": True, "right": True}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("collective", ["nccl", "symmetric"])
def test_two_gpus_answer_like_one(tiny_model: Path, collective: str) -> None:
    for library in ("msgspec", "zmq"):
        pytest.importorskip(library, reason="ranks are started through it")
    from weft.config import EngineConfig
    from weft.core.plan import Lane, Plan, Sampling
    from weft.core.sampling import SamplingParams
    from weft.devices import open_device
    from weft.loop.ranks import open_ranks

    prompt = tuple((11 * at + 5) % 4096 for at in range(300))
    sampling = Sampling(SamplingParams(temperature=0.0), 0, 300)
    found = []
    for ranks in (1, 2):
        given = {} if ranks == 1 else {"tensor_parallel_size": 2, "collective": collective}
        config = EngineConfig(device="cuda", model=str(tiny_model), num_blocks=64, **given)
        config.validate()
        opener = open_device if ranks == 1 else open_ranks
        device = opener(config, tiny_model, lambda _: None)
        try:
            device.submit(Plan(1, Lane.MIXED, (Slice(0, 0, prompt, tuple(range(20)), sampling),)))
            while not (results := device.poll(120.0)):
                pass
            found.append([one.token for one in results[0].sampled])
        finally:
            device.close()
    assert found[0] == found[1]
