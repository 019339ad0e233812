"""What makes a device one rank of several: its part of the model and how it chooses; a CPU's collectives for each lane
(those of a GPU are in cuda_ranks.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from weft.config import EngineConfig
from weft.core.plan import Slice
from weft.devices.cores import Cores
from weft.devices.pinning import pinned
from weft.errors import ConfigError
from weft.kernels import LEVELS, open_kernels
from weft.kernels.base import Kernels
from weft.models.decoder import Decoder
from weft.models.families import ModelConfig
from weft.models.measure import measure
from weft.models.ranked import LanePlace, Ranked
from weft.models.ranked_program import RankedProgram, record_ranked
from weft.models.shard import Part
from weft.weave.background import Background, Queue
from weft.weave.choice import COLLECTIVES, Costs, Mode, choose_mode
from weft.weave.collective import Collective, Quantise, Spinning
from weft.weave.rows import JoinRows, plain
from weft.weave.split import Waves, choose_strands

# The C++ kernels compute 6 or 4 rows at a time: a multiple of both leaves no rest.
WAVES = Waves(12)
STRANDS = (2, 3)  # that a step may be cut into
SIZES = (1, 16, 64, 256)  # see `measured_sizes`


@dataclass(frozen=True, slots=True)
class Group:
    """The group that a rank belongs to.

    neighbours: how many of its ranks share this host's memory. name: by which its ranks find one another in shared
    memory. host, port: where rank 0 listens; port None where they use shared memory. bind: this rank's address.
    timeout: seconds that they wait for one another. crowded: whether ranks share cores. agree: takes how many KV blocks
    this rank has room for, and gives how many all have.
    """

    rank: int
    ranks: int
    neighbours: int
    name: str
    host: str
    port: int | None
    bind: str
    timeout: float
    crowded: bool
    agree: Callable[[int], int]

    @property
    def part(self) -> Part:
        return Part(self.rank, self.ranks)

    def meet(self, patience: float | None = None) -> Any:
        """A store of torch.distributed, where its ranks find one another; None where they use shared memory. patience:
        seconds that they wait here, if not the time-out."""
        if self.port is None:
            return None
        from weft.weave.distributed import meet

        return meet(self.host, self.port, self.rank, self.ranks, timeout=patience or self.timeout)


class Chooser:
    """How to carry out a step: the mode of --weave, or the one that costs least. costs: None where it is given. waves:
    what parts of a step take."""

    def __init__(self, weave: str, costs: Costs | None, waves: Waves = WAVES) -> None:
        self._weave = weave
        self._costs = costs
        self._waves = waves

    def __call__(self, slices: Sequence[Slice]) -> tuple[Mode, tuple[int, ...]]:
        """The mode, and the tokens of each strand. Depends on nothing but what is the same on all ranks."""
        lengths = [len(piece.tokens) for piece in slices]
        tokens = sum(lengths)
        costs = self._costs
        if costs is None and Mode(self._weave).seams is not Mode.WOVEN:
            return Mode(self._weave), (tokens,)
        cuts = [choose_strands(lengths, self._waves, count) for count in STRANDS]
        return (Mode(self._weave), cuts[-1]) if costs is None else choose_mode(costs, tokens, cuts)


def measured_sizes(most: int) -> list[int]:
    """The tokens of the steps that are measured at start-up, where a step may have so many."""
    return [*(size for size in SIZES if size < most), most]


def open_ranked(
    config: EngineConfig,
    group: Group,
    store: Any,
    lane: str,
    decoder: Decoder,
    kernels: Kernels,
    place: LanePlace,
    kv: list[Any],
    blocks: int,
) -> Ranked:
    """The forward pass of a lane with so many KV blocks; store: of `meet`. All ranks open lanes in the same order.

    Raises ConfigError for kernels that these collectives cannot use or a --weave that the model has no use for,
    DeviceError or RankLost.
    """
    check_weave(config, decoder.config)
    with ExitStack() as stack:
        collectives: dict[Mode, Collective] = {}
        for mode in _modes(config, store):
            own, beside = kernels, _beside(place.cores)
            if mode is Mode.WOVEN:  # its seams run in a thread, which is all that its own kernels have
                own = open_kernels(kernels.name, beside, exact_a4=config.exact_a4)
                stack.callback(own.close)
            spins = may_spin(mode, crowded=group.crowded, shared=place.shared)
            collective = _connect(config, group, store, f"{lane}-{mode.value}", mode, own, decoder, spins)
            collectives[mode] = _in_background(collective, own, beside) if mode is Mode.WOVEN else collective
            stack.callback(collectives[mode].close)
        formats, program = _formats(kernels), _program(config, decoder, kernels, collectives, kv)
        costs = None
        if config.weave == "auto":
            sizes = measured_sizes(
                min(config.max_num_batched_tokens, decoder.max_model_len, blocks * config.block_size)
            )
            with pinned(kernels.name, place.cores):  # as the lane's thread will be: beside the thread of the seams
                costs = measure(decoder, kv, config.block_size, collectives, sizes, formats=formats, program=program)
        return Ranked(
            decoder,
            kv,
            config.block_size,
            collectives,
            Chooser(config.weave, costs),
            formats,
            program,
            move=partial(_move, collectives, group.crowded),
            close=stack.pop_all().close,
        )


def check_weave(config: EngineConfig, model: ModelConfig) -> None:
    """Raises ConfigError for a --weave that this model has no use for."""
    if config.weave == Mode.REJOINED.value and model.experts is None:
        raise ConfigError(
            "--weave is rejoined, and the model has no experts at which the strands of a step could rejoin; woven works"
        )


def may_spin(mode: Mode, *, crowded: bool, shared: bool) -> bool:
    """Whether who waits for another rank may keep a core busy. Not where others compute there: other ranks (crowded),
    another lane (shared), or the lane itself while its woven seams are on their way.

    Woven steps of 48 to 192 tokens through four layers took 1 to 5 % more CPU where the thread of the seams looked for
    100 us before it slept than where it slept at once, and 0.98 to 1.31 times as long (AVX2, two ranks of one core, in
    turns): a sleep costs less than what looking takes from the computation.
    """
    return not (crowded or shared or mode.seams is Mode.WOVEN)


def _beside(cores: Cores) -> Cores:
    """Of a lane's cores, the one that the thread of its seams shares: not the first, if there are more, which has the
    lane's own thread."""
    return cores[-1:]


def _move(collectives: Mapping[Mode, Collective], crowded: bool, place: LanePlace) -> None:
    """Put what joins the ranks where the lane computes from now on."""
    for mode, collective in collectives.items():
        if isinstance(collective, Queue):
            collective.move(_beside(place.cores))
        elif isinstance(collective, Spinning):
            collective.let_spin(may_spin(mode, crowded=crowded, shared=place.shared))


def _program(
    config: EngineConfig, decoder: Decoder, kernels: Kernels, collectives: Mapping[Mode, Collective], kv: list[Any]
) -> RankedProgram | None:
    """Fused steps of few tokens in C++, where the seams are."""
    if kernels.name not in LEVELS or decoder.padded or decoder.config.experts is not None:
        return None
    from weft.kernels.cpu import CpuKernels
    from weft.weave.native import NativeCollective

    fused = collectives.get(Mode.FUSED)
    if not isinstance(kernels, CpuKernels) or not isinstance(fused, NativeCollective):
        return None
    return record_ranked(decoder, kernels, fused, kv, config.block_size, config.max_num_batched_tokens)


def _modes(config: EngineConfig, store: Any) -> list[Mode]:
    """Those whose seams steps may have."""
    if config.weave != "auto":
        return [Mode(config.weave).seams]
    return list(COLLECTIVES) if store is not None else [Mode.FUSED, Mode.WOVEN]


def _connect(
    config: EngineConfig,
    group: Group,
    store: Any,
    name: str,
    mode: Mode,
    kernels: Kernels,
    decoder: Decoder,
    spins: bool,
) -> Collective:
    rank, ranks = group.rank, group.ranks
    if store is None:
        from weft.kernels.cpu import CpuKernels
        from weft.weave.shm import ShmCollective

        if not isinstance(kernels, CpuKernels):
            raise ConfigError(
                f"--collective shm needs the C++ kernels, and --kernels is {kernels.name}; --collective gloo does not"
            )
        return ShmCollective(f"{group.name}-{name}", rank, ranks, kernels, timeout=group.timeout, spin=spins)
    from torch.distributed.distributed_c10d import PrefixStore

    from weft.weave.distributed import AllReduceCollective, DistributedCollective, connect

    own_store = PrefixStore(name, store)
    if kernels.name in LEVELS and mode in (Mode.FUSED, Mode.WOVEN):
        from weft.kernels.cpu import CpuKernels
        from weft.weave.sockets import open_sockets

        if isinstance(kernels, CpuKernels):
            return open_sockets(own_store, rank, ranks, kernels, bind=group.bind, timeout=group.timeout)
    messages = connect(own_store, rank, ranks, bind=group.bind, timeout=group.timeout)
    if mode is Mode.PLAIN:
        return AllReduceCollective(messages, _join_rows(kernels))
    capacity = config.max_num_batched_tokens * decoder.config.hidden_size * torch.float32.itemsize
    one_round = mode is Mode.ONE_SHOT
    return DistributedCollective(messages, _join_rows(kernels), capacity=capacity, one_round=one_round)


def _in_background(collective: Collective, kernels: Kernels, cores: tuple[int, ...]) -> Collective:
    """With a communication thread on these cores."""
    if kernels.name in LEVELS:
        from weft.weave.native import NativeBackground, NativeCollective

        if isinstance(collective, NativeCollective):
            return NativeBackground(collective, cores)
    return Background(collective, cores)


def _join_rows(kernels: Kernels) -> JoinRows:
    if kernels.name not in LEVELS:
        return plain(kernels.rms_norm)
    from weft.kernels.cpu import CpuKernels
    from weft.kernels.wire import FusedRows

    if not isinstance(kernels, CpuKernels):
        raise TypeError(f"kernels of {kernels.name} that are {type(kernels).__name__}")
    return FusedRows(kernels)


def _formats(kernels: Kernels) -> Callable[[Any], Quantise | None]:
    """Rows of a quantised linear travel as it wants them, where these kernels can do that."""
    if kernels.name not in LEVELS:
        return lambda _packed: None
    from weft.kernels.wire import input_format

    return lambda packed: input_format(kernels, packed)
