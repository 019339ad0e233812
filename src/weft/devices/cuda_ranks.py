"""What makes a GPU one rank of several: the collectives of its lane, and a step that is computed with the others.

The lane launches seams like all else and waits for nothing. A decode step is one graph with its seams in it; a prompt
is launched call by call, in one strand or in two, whose seams have a stream of their own. Who waits for a step to end
is who finds out that a rank does not come.

All ranks must launch the same seams in the same order. So they have one lane, and compute ahead always or never, not as
it happens (cuda.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from weft.config import EngineConfig
from weft.core.plan import Slice
from weft.devices.cores import collective_of
from weft.devices.cuda_inputs import fetch, layout_of, send
from weft.devices.cuda_streams import Event, Gpu
from weft.devices.group import STRANDS, Chooser, Group, check_weave, measured_sizes
from weft.errors import ConfigError
from weft.kernels.base import Batch
from weft.kernels.triton_seam import BLOCKS, join_parts
from weft.models.decoder import Decoder
from weft.models.families import ModelConfig
from weft.models.measure import Place, measure
from weft.models.ranked import Choice
from weft.weave.choice import COLLECTIVES, Mode
from weft.weave.collective import Collective
from weft.weave.device import DeviceCollective, open_group
from weft.weave.handshake import compare
from weft.weave.late import Late
from weft.weave.split import Waves
from weft.weave.streams import SideStream
from weft.weave.symmetric import Layout, SymmetricCollective, gpu_region, host_region
from weft.weave.weaver import Weaver

TILE = 128, 128  # rows and columns of the largest tile of a product, of our kernels and of cuBLAS mostly
# Waves that parts may take more than the whole, as a part of these: products of four widths are seldom full ones all at
# once, and what there is to hide is a fifth of a step (tokenweave.md §2).
SLACK = 0.2
MEET_SECONDS = 600.0  # that ranks may be apart when they have read their weights
NO_GPU = "ranks are joined by gloo in NCCL's place: nothing is on a GPU here"


@dataclass(frozen=True, slots=True)
class Ranks:
    """The other ranks, as the lane of this one sees them.

    collectives: the group, by mode. choose: of a step's slices, the mode and the tokens of each strand. failed:
    int32 [1] on the device, which kernels set when they miss a rank; None where there is none. note: for the start-up
    table.
    """

    collectives: Mapping[Mode, Collective]
    choose: Choice
    late: Late
    failed: torch.Tensor | None
    note: str | None = None

    def choose_one(self, tokens: int) -> Mode:
        """The mode of a step of so many tokens that is not cut, whatever it is."""
        return self.choose([Slice(0, 0, (0,) * tokens, ())])[0]

    def hidden(
        self, decoder: Decoder, mode: Mode, batches: Sequence[Batch], kept: Sequence[Sequence[int]], kv: list[Any]
    ) -> torch.Tensor:
        """The rows after the final norm that the batches keep: [R, hidden], in memory of their own. kept: which they
        are, of each batch."""
        strands = [decoder.strand(batch, kv) for batch in batches]
        return torch.cat(Weaver(self.collectives[mode], decoder.join).weave(strands, kept))

    def logits(self, decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [R, vocabulary] of all ranks' parts, the same on each of them."""
        vocabulary = decoder.config.vocabulary
        if not len(hidden):
            return torch.empty((0, vocabulary), device=hidden.device)
        parts = self.collectives[next(iter(self.collectives))].gather(decoder.logits(hidden))
        # The last ranks' parts are filled up with rows of zeros, which come last.
        return torch.cat(parts, dim=1)[:, :vocabulary].contiguous()

    def look(self, gpu: Gpu) -> Callable[[Event], None]:
        """To be called after a launch; what it returns waits for it. Raises RankLost."""
        seen = None if self.failed is None else fetch(gpu, self.failed)
        return lambda done: self.late.wait(done, lambda: 0 if seen is None else int(seen))

    def measured(self, config: EngineConfig, gpu: Gpu, decoder: Decoder, kv: list[Any], blocks: int) -> Ranks:
        """With what costs least, where --weave is auto; all ranks call it together. blocks: of the KV."""
        if config.weave != "auto":
            return self
        most = min(config.max_num_batched_tokens, decoder.max_model_len, blocks * config.block_size)
        costs = measure(decoder, kv, config.block_size, self.collectives, measured_sizes(most), _place(gpu))
        return replace(self, choose=Chooser("auto", costs, waves_of(products_of(decoder.config), gpu.sms)))

    def close(self) -> None:
        for collective in self.collectives.values():
            collective.close()


def products_of(model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """(outputs, inputs) of a layer's products. model: a rank's part."""
    hidden, heads, keys = model.hidden_size, model.heads * model.head_dim, model.kv_heads * model.head_dim
    return (
        (heads + 2 * keys, hidden),
        (hidden, heads),
        (2 * model.intermediate_size, hidden),
        (hidden, model.intermediate_size),
    )


def waves_of(products: Sequence[tuple[int, int]], sms: int) -> Waves:
    """On a GPU of so many SMs. products: as of `products_of`."""
    rows, columns = TILE
    return Waves(rows, sms, tuple((-(-outputs // columns), inputs) for outputs, inputs in products), SLACK)


def rank_gpu(group: Group, count: int) -> int:
    """Which of the host's `count` GPUs that this process sees is the rank's own. Raises ConfigError."""
    if count < group.neighbours:
        raise ConfigError(
            f"--tensor-parallel-size is {group.ranks}, {group.neighbours} of them on this host, and weft sees {count} "
            f"GPU{'' if count == 1 else 's'} here: each rank needs one of its own (CUDA_VISIBLE_DEVICES, if it is set, "
            "names those that may be used)"
        )
    return group.rank % group.neighbours


def join_ranks(config: EngineConfig, group: Group, gpu: Gpu, model: ModelConfig, dtype: torch.dtype) -> Ranks:
    """Meet the other ranks. model: this rank's part; dtype: of its activations. Raises ConfigError or DeviceError."""
    check_weave(config, model)
    store = group.meet(MEET_SECONDS)
    waves = waves_of(products_of(model), gpu.sms)
    compare(store, group.rank, group.ranks, _common(config, model, dtype, waves), timeout=MEET_SECONDS)
    late = Late(store, group.rank, group.ranks, group.timeout)
    modes = _modes(config)
    failed = None
    if collective_of(config) == "symmetric":
        plain = _symmetric(config, group, store, gpu, model, dtype)
        failed = plain.failed
        collectives: dict[Mode, Collective] = dict.fromkeys(modes, plain)
    else:
        joined = open_group(store, group.rank, group.ranks, device=gpu.device, bind=group.bind, timeout=group.timeout)
        collectives = {
            mode: DeviceCollective(
                joined,
                group.rank,
                group.ranks,
                join_parts,
                Mode.FUSED if mode is Mode.WOVEN else mode,
                explain=late.explain,
            )
            for mode in modes
        }
    if Mode.WOVEN in collectives:
        collectives[Mode.WOVEN] = SideStream(collectives[Mode.WOVEN], gpu.device)
    first = modes[0] if config.weave == "auto" else Mode(config.weave)
    note = NO_GPU if gpu.device.type == "cpu" and failed is None else None
    return Ranks(collectives, Chooser(first.value, None, waves), late, failed, note)


def _symmetric(
    config: EngineConfig, group: Group, store: Any, gpu: Gpu, model: ModelConfig, dtype: torch.dtype
) -> SymmetricCollective:
    layout = Layout(group.ranks, config.max_num_batched_tokens, model.hidden_size, dtype)
    if gpu.device.type == "cpu":
        region = host_region(store, group.name, group.rank, group.ranks, layout.bytes, timeout=MEET_SECONDS)
    else:
        region = gpu_region(store, group.name, group.rank, group.ranks, layout.bytes, gpu.device)
    return SymmetricCollective(region, group.rank, layout, timeout=group.timeout)


def _common(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, waves: Waves) -> tuple[Any, ...]:
    """What the seams that a rank launches follow from, beside the plans and the costs that all have agreed upon."""
    modes = [mode.value for mode in _modes(config)]
    shape = (model.layers, model.hidden_size, config.max_num_batched_tokens, str(dtype))
    return (collective_of(config), config.weave, modes, STRANDS, waves, BLOCKS, shape)


def _modes(config: EngineConfig) -> list[Mode]:
    """Those that steps may be carried out in, the simplest first."""
    if config.weave != "auto":
        return [Mode(config.weave)]
    return [Mode.FUSED, Mode.WOVEN] if collective_of(config) == "symmetric" else list(COLLECTIVES)


def _place(gpu: Gpu) -> Place:
    def move(batch: Batch) -> Batch:
        return layout_of(batch).inputs(send(gpu, batch, None), batch.block_size, whole=batch.kept is None).batch

    def clock() -> float:
        gpu.settle()
        return time.perf_counter()

    return Place(gpu.device, move, clock)
