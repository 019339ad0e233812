"""The CPU as a device: each lane is a thread that drives kernels on cores of its own; lanes share weights and KV.

    engine thread ── submit ─▶ queue of a lane ─▶ lane thread: decoder, sampler ─▶ one queue of results ── poll ─▶

A lane's kernels spread a step over its cores and count the lane's thread as the first of them. torch itself gets one
thread in a lane (its OpenMP threads would spin and take the cores from the kernels), except where torch is the kernels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from weft.comet.checkpoint import METHOD
from weft.comet.linear import QuantisedReferenceKernels
from weft.config import EngineConfig, disaggregated, parse_partition
from weft.core.plan import Capacity, Lane, Partition, Plan, Result, Slice, Ticket
from weft.devices.base import Description
from weft.devices.cores import Cores, share_cores, usable_cores
from weft.devices.group import Group, open_ranked
from weft.devices.memory import decode_blocks, free_memory, size_pool
from weft.devices.pinning import pin
from weft.devices.queues import CLOSED, Queues
from weft.devices.shares import Shares
from weft.devices.step import compute
from weft.errors import ConfigError, DeviceError, RankLost
from weft.kernels import REFERENCE, check_heads, open_kernels, resolve
from weft.kernels.base import Kernels
from weft.kernels.kv import BITS, token_bytes
from weft.models.decoder import Decoder
from weft.models.families import ModelConfig, read_config
from weft.models.forward import Forward, open_forward
from weft.models.loader import compute_dtype, load_weights, stored_dtype
from weft.models.ranked import LanePlace, Ranked
from weft.models.shard import WHOLE, shard_config


def open_cpu(config: EngineConfig, folder: Path, say: Callable[[str], None], group: Group | None = None) -> CpuDevice:
    """The model of `folder` on this machine's CPU. Raises ConfigError, CheckpointError or DeviceError.

    say: told the name of each phase of the start-up when it begins. group: this is one rank of it, with its part of the
    model; all ranks open their devices at the same time.
    """
    cores = usable_cores(config.cores)
    partition = share_out(config.partition, len(cores), config.tensor_parallel_size)
    model = read_config(folder)
    check_exact_a4(config, model)
    dummy = config.load_format == "dummy"
    dtype, dtype_note = compute_dtype(config.dtype, model.dtype or (None if dummy else stored_dtype(folder)))
    part = WHOLE if group is None else group.part
    own_model = shard_config(model, part)
    kept = kv_bytes(config, own_model, dtype)
    name, kernels_note = resolve(config.kernels)
    check_heads(name, model.head_dim)
    shares = {Lane.MIXED: cores} if partition is None else _cores_of(partition, cores)
    kernels = {lane: _open_kernels(name, own, config.exact_a4) for lane, own in shares.items()}
    try:
        first = next(iter(kernels.values()))
        seed = config.seed if dummy else None
        weights = load_weights(folder, model, first, dtype, dummy_seed=seed, say=say, part=part)
        apart, second = disaggregated(config.partition), weights
        if apart:  # loaded twice: what disaggregation takes elsewhere, it takes here
            second = load_weights(folder, model, kernels[Lane.DECODE], dtype, dummy_seed=seed, say=say, part=part)
        free = free_memory() // (1 if group is None else group.neighbours)
        pool = size_pool(config, model.context, kept, free)
        if group is not None:
            pool = size_pool(replace(config, num_blocks=group.agree(pool.blocks)), model.context, kept, free)
        decode = decode_blocks(config, pool.blocks, pool.max_model_len)
        divided = f"disaggregated: weights twice, {pool.blocks - decode} + {decode} KV blocks" if apart else None
        say("KV pool")
        store = None if group is None else group.meet()
        decoders = {
            lane: Decoder(own_model, second if lane is Lane.DECODE else weights, own, pool.max_model_len)
            for lane, own in kernels.items()
        }
        kv = next(iter(decoders.values())).make_kv(pool.blocks, config.block_size, config.kv_cache_dtype)
        forwards: dict[Lane, Forward] = {
            lane: open_ranked(
                config, group, store, lane.value, decoder, kernels[lane], _places(shares)[lane], kv, pool.blocks
            )
            if group is not None
            else open_forward(
                decoder,
                kernels[lane],
                kv,
                config.block_size,
                max_tokens=config.max_num_batched_tokens,
                max_slices=config.max_num_seqs,
            )
            for lane, decoder in decoders.items()
        }
    except BaseException:
        for own in kernels.values():
            own.close()
        raise
    copied = kv if apart else ()
    capacity = Capacity(
        blocks=pool.blocks,
        block_size=config.block_size,
        max_tokens=config.max_num_batched_tokens,
        max_slices=config.max_num_seqs,
        shares=len(cores),
        max_model_len=pool.max_model_len,
        vocabulary=model.vocabulary,
        layers=model.layers if group is None else 1,
        decode_blocks=decode,
    )
    return CpuDevice(
        capacity,
        {lane: CpuLane(kernels[lane], decoders[lane], forwards[lane], shares[lane], copied) for lane in shares},
        description=Description(
            device=f"cpu, {len(cores)} core{'s' if len(cores) > 1 else ''}",
            dtype=str(dtype).removeprefix("torch.") + kv_words(config),
            kernels=name,
            notes=tuple(note for note in (dtype_note, kernels_note, *weights.notes, *pool.notes, divided) if note),
        ),
        memory=memory_rows(capacity, own_model, weights.size + (second.size if apart else 0), kept, dtype),
        cores=cores,
        partition=partition,
    )


def check_exact_a4(config: EngineConfig, model: ModelConfig) -> None:
    """Raises ConfigError for --exact-a4 with weights that know nothing of it."""
    method = None if model.quantization is None else model.quantization.get("quant_method")
    if config.exact_a4 and method != METHOD:
        stored = "are not quantised" if method is None else f"are {method}"
        raise ConfigError(
            f"--exact-a4 is for {METHOD} checkpoints, whose outlier blocks were chosen for it; the weights of "
            f"{config.model} {stored}: leave the flag out, or serve what `weft quantize` makes of the original"
        )


def _open_kernels(name: str, cores: Cores, exact_a4: bool) -> Kernels:
    if name == REFERENCE:  # those that know quantised linears, too
        return QuantisedReferenceKernels(cores, exact_a4=exact_a4)
    return open_kernels(name, cores, exact_a4=exact_a4)


class CpuLane:
    """What one lane computes with. `cores`: the kernels'; the lane's thread is put there when it begins. kv: keys and
    values of each layer, the forward's, where blocks are copied from one pool to another."""

    def __init__(
        self, kernels: Kernels, decoder: Decoder, forward: Forward, cores: Cores, kv: Sequence[Any] = ()
    ) -> None:
        self.kernels = kernels
        self.head = forward.head if isinstance(forward, Ranked) else decoder
        self.forward = forward
        self.cores = cores
        self.kv = kv
        self._shares: Shares[LanePlace] = Shares()

    def adopt(self, lane: Lane, place: LanePlace) -> float:
        """Compute there from now on or, where that cannot be, on the cores as before (see Shares). Only the lane's
        thread may call it: it is pinned. The seconds that other cores took; 0 without."""
        return self._shares.adopt(lane, place, self._move) or 0.0

    def _move(self, place: LanePlace) -> float:
        begun, before = time.perf_counter(), self.cores
        try:
            self._go(place, others=place.cores != before)
        except Exception:  # some threads may have moved; and these cores may have been given to another lane
            self._go(LanePlace(before, shared=True), others=True)
            raise
        return time.perf_counter() - begun if place.cores != before else 0.0

    def _go(self, place: LanePlace, others: bool) -> None:
        if others:
            self.kernels.set_cores(place.cores)
            self.cores = place.cores
        if isinstance(self.forward, Ranked):
            self.forward.move(place)
        self.pin()

    def pin(self) -> None:
        """Put the calling thread, which is the lane's, where the kernels expect it."""
        pin(self.kernels.name, self.cores)

    def run(self, plan: Plan) -> Result:
        """Carry out a plan. An exception fails the step, not the lane."""
        ticket, begun = Ticket(plan.step, plan.lane), time.perf_counter()
        try:
            if self.kv:
                self._copy(plan.slices)
            done = compute(plan, self.head, self.forward)
        except RankLost:  # that is more than this step
            raise
        except Exception as error:
            return Result(ticket, error=_words(error), seconds=time.perf_counter() - begun)
        return Result(ticket, done.sampled, done.prompt_scores, done.failed, seconds=time.perf_counter() - begun)

    def _copy(self, slices: Sequence[Slice]) -> None:
        for piece in slices:
            if piece.source:
                for layer in self.kv:
                    layer.copy(piece.source, piece.blocks[: len(piece.source)])

    def close(self) -> None:
        if isinstance(self.forward, Ranked):
            self.forward.close()
        self.kernels.close()


class CpuDevice:
    """A Device (see base.py): threads and queues around the lanes."""

    def __init__(
        self,
        capacity: Capacity,
        lanes: dict[Lane, CpuLane],
        *,
        description: Description,
        memory: tuple[tuple[str, int], ...],
        cores: Cores,
        partition: Partition | None,
    ) -> None:
        self._capacity = capacity
        self._description = description
        self._memory = memory
        self._cores = cores
        self._partition = partition
        self._names = tuple(lanes)
        self._places = _places({name: lane.cores for name, lane in lanes.items()})
        self._queues = Queues(lanes)
        self._lost: RankLost | None = None
        self._threads = [
            threading.Thread(target=self._work, args=(name, lane), name=f"weft-{name.value}", daemon=True)
            for name, lane in lanes.items()
        ]
        for thread in self._threads:
            thread.start()

    def capacity(self) -> Capacity:
        return self._capacity

    def describe(self) -> Description:
        return self._description

    def lanes(self) -> tuple[Lane, ...]:
        return self._names

    def submit(self, plan: Plan) -> Ticket:
        return self._queues.submit(plan)

    def poll(self, timeout: float | None) -> list[Result]:
        found = self._queues.poll(timeout)
        if self._lost is not None and not self._queues.closing:
            raise self._lost
        return found

    def wake(self) -> None:
        self._queues.wake()

    def partition(self) -> Partition | None:
        return self._partition

    def set_partition(self, partition: Partition) -> None:
        if self._partition is None:
            raise DeviceError("this device has one mixed lane; open it with --partition P:D to have shares")
        if min(partition.prefill, partition.decode) < 1 or max(partition.prefill, partition.decode) > len(self._cores):
            raise DeviceError(
                f"partition {partition.prefill}:{partition.decode}; each lane needs a core, "
                f"and there are {len(self._cores)}"
            )
        self._places = _places(_cores_of(partition, self._cores))
        self._partition = partition

    def memory(self) -> tuple[tuple[str, int], ...]:
        return self._memory

    def close(self) -> None:
        if self._queues.closing:
            return
        self._queues.close()
        for thread in self._threads:
            thread.join()

    def _work(self, name: Lane, lane: CpuLane) -> None:
        """A lane's thread: its plans in order, until close(). Everything it uses goes with it."""
        try:
            self._queues.serve(name, partial(self._step, name, lane))
        finally:
            lane.close()

    def _step(self, name: Lane, lane: CpuLane, plan: Plan) -> Result:
        if self._queues.closing:
            return Result(Ticket(plan.step, plan.lane), error=CLOSED)
        moved = lane.adopt(name, self._places[name])
        try:
            result = lane.run(plan)
        except RankLost as error:  # the device has failed, and `poll` says so
            self._lost = error
            return Result(Ticket(plan.step, plan.lane), error=error.message)
        return replace(result, moved=moved) if moved else result


def share_out(partition: str, cores: int, ranks: int = 1) -> Partition | None:
    """The cores that each lane begins with, for --partition `partition`; at least one each. ranks: those that have as
    many cores each."""
    shares = parse_partition(partition)
    if shares is None:
        return None
    try:
        return Partition(*shares.of(cores))
    except ValueError:
        raise ConfigError(
            f"--partition is {partition}: two lanes need two cores, and "
            + (f"each of {ranks} ranks has 1" if ranks > 1 else "there is 1")
            + "; --partition off needs one"
        ) from None


def memory_rows(
    capacity: Capacity, model: ModelConfig, weights: int, token_bytes: int, dtype: torch.dtype
) -> tuple[tuple[str, int], ...]:
    """(what, bytes) for the start-up table."""
    tokens = capacity.blocks * capacity.block_size
    attention = (2 * model.heads + 2 * model.kv_heads) * model.head_dim
    inner = max(model.intermediate_size, 0 if model.experts is None else model.experts.shared)
    widest = max(attention, 3 * inner) + 3 * model.hidden_size
    activations = capacity.max_tokens * (widest * dtype.itemsize + _mixture_bytes(model, dtype))
    logits = capacity.max_slices * model.vocabulary * torch.float32.itemsize
    return (
        ("weights", weights),
        ("KV pool", tokens * token_bytes),
        ("activations, at most about", activations + logits),
    )


def _mixture_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """What a token has beside in a layer with experts, where all tokens take the same one: its hidden row again, two
    float32 sums, and what it gives each expert."""
    if model.experts is None:
        return 0
    return model.hidden_size * dtype.itemsize + 2 * (model.hidden_size + model.experts.count) * torch.float32.itemsize


def kv_bytes(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of KV for one token in all layers. Raises ConfigError for a cache that these activations cannot have."""
    try:
        return model.layers * token_bytes(model.kv_heads, model.head_dim, dtype, config.kv_cache_dtype)
    except ValueError as error:
        raise ConfigError(f"--kv-cache-dtype is {config.kv_cache_dtype}: {error}") from error


def kv_words(config: EngineConfig) -> str:
    """What the start-up table says of keys and values in few bits."""
    return f", KV {config.kv_cache_dtype}" if config.kv_cache_dtype in BITS else ""


def _cores_of(partition: Partition, cores: Cores) -> dict[Lane, Cores]:
    """The prefill lane's cores from the front, the decode lane's from the back; they overlap where they have to."""
    return {Lane.PREFILL: cores[: partition.prefill], Lane.DECODE: cores[len(cores) - partition.decode :]}


def _places(shares: Mapping[Lane, Cores]) -> dict[Lane, LanePlace]:
    """Once for each partition, not for each step."""
    return {
        lane: LanePlace(own, share_cores(own, (cores for other, cores in shares.items() if other is not lane)))
        for lane, own in shares.items()
    }


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
