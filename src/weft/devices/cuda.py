"""A GPU as a device: each lane is a stream with two threads, one that launches and one that waits for what it launched.

    engine ── submit ─▶ a lane's plans ─▶ its first thread: launches ─▶ its second: waits, results ── poll ─▶ engine

Lanes share weights and KV. Each lane's stream has the SMs of its share (cuda_green.py), and moves to another share at
its own next step. Where the driver cannot divide the SMs, each lane may use all of them: the start-up table says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

import torch

from weft.config import EngineConfig, disaggregated
from weft.core.plan import Capacity, Lane, Partition, Plan, Result, Ticket
from weft.devices.base import Description
from weft.devices.cpu import check_exact_a4, kv_words, share_out
from weft.devices.cuda_forward import CudaForward, planner_of
from weft.devices.cuda_lane import CudaLane, Pending
from weft.devices.cuda_memory import check_weights, gib, out_of_memory, size_gpu_pool, usage_of
from weft.devices.cuda_ranks import Ranks, join_ranks, rank_gpu
from weft.devices.cuda_streams import Gpu, open_gpu
from weft.devices.cuda_trial import peaks_of
from weft.devices.group import Group
from weft.devices.queues import CLOSED, Queues
from weft.errors import ConfigError, DeviceError, RankLost
from weft.kernels.triton import TritonKernels
from weft.models.decoder import Decoder
from weft.models.families import ModelConfig, read_config
from weft.models.loader import compute_dtype, load_weights, move, stored_dtype, weight_bytes
from weft.models.shard import WHOLE, shard_config

# What a lane's first thread hands to the second: plans, and in the end None, or what has ended it before its time.
Launched: TypeAlias = Pending | BaseException | None

SHARED = "the lanes' shares are not enforced, each lane may use the whole GPU: "


def open_cuda(config: EngineConfig, folder: Path, say: Callable[[str], None], group: Group | None = None) -> CudaDevice:
    """The model of `folder` on this machine's GPU. Raises ConfigError, CheckpointError or DeviceError.

    say: told the name of each phase of the start-up when it begins. group: this is one rank of it, with its part of the
    model and a GPU of its own; all ranks open their devices at the same time.
    """
    _check(config)
    say("open the GPU")
    gpu = open_gpu() if group is None else open_gpu(partial(rank_gpu, group))
    if group is not None:
        gpu.adopt()  # this thread works for it, too
    partition = share_out(config.partition, gpu.shares)
    model = read_config(folder)
    _check_experts(config, model)
    check_exact_a4(config, model)
    dummy = config.load_format == "dummy"
    dtype, dtype_note = compute_dtype(config.dtype, model.dtype or (None if dummy else stored_dtype(folder)))
    _check_w4a16(config, model, dtype)
    _check_batch_invariant(config, dtype)
    backend = "triton" if config.attention_backend == "auto" else config.attention_backend
    kernels = TritonKernels(
        gpu.device, backend, exact_a4=config.exact_a4, sixteen=config.w4a16, invariant=config.batch_invariant
    )
    part = WHOLE if group is None else group.part
    whole, model = model, shard_config(model, part)
    kept = _token_bytes(config, model, dtype, kernels)
    free, total = gpu.memory()
    if model.quantization is None:
        check_weights(weight_bytes(model, dtype), free, total)
    seed = config.seed if dummy else None
    with out_of_memory(
        f"the weights do not fit in {gib(free)}, which are free of the device's {gib(total)}; a checkpoint of "
        "`weft quantize` or other processes that end would help"
    ):
        weights = move(
            load_weights(folder, whole, kernels, dtype, dummy_seed=seed, say=say, room=free, part=part), gpu.device
        )
    lanes = (Lane.MIXED,) if partition is None else (Lane.PREFILL, Lane.DECODE)
    ranks = None
    if group is not None:
        say("meet the other ranks")
        ranks = join_ranks(config, group, gpu, model, dtype)
    say("kernels")
    peaks = peaks_of(gpu, config, model, kernels, weights, ranks)
    say("KV pool")
    usage = usage_of(gpu, weights.size, peaks, len(lanes))
    pool = size_gpu_pool(config, model.context, kept, usage)
    if group is not None:
        config = replace(config, num_blocks=group.agree(pool.blocks))
        pool = size_gpu_pool(config, model.context, kept, usage)
    decoder = Decoder(model, weights, kernels, pool.max_model_len)
    with out_of_memory(
        f"the KV pool of {pool.blocks} blocks, {gib(pool.blocks * config.block_size * kept)}, does not fit any more; "
        f"--num-blocks {pool.blocks * 9 // 10} leaves a tenth of it free"
    ):
        kv = decoder.make_kv(pool.blocks, config.block_size, config.kv_cache_dtype)
    if ranks is not None:
        ranks = ranks.measured(config, gpu, decoder, kv, pool.blocks)
    capacity = Capacity(
        blocks=pool.blocks,
        block_size=config.block_size,
        max_tokens=config.max_num_batched_tokens,
        max_slices=config.max_num_seqs,
        shares=gpu.shares,
        max_model_len=pool.max_model_len,
        vocabulary=model.vocabulary,
        ahead=1,
    )
    opened = {lane: _open_lane(gpu, lane, partition, decoder, kv, capacity, kernels, ranks) for lane in lanes}
    gpu.settle()
    shared = None if partition is None or gpu.undivided is None else SHARED + gpu.undivided
    notes = (dtype_note, *weights.notes, *pool.notes, shared, None if ranks is None else ranks.note)
    return CudaDevice(
        capacity,
        gpu,
        opened,
        description=Description(
            device=f"cuda, {gpu.name}",
            dtype=str(dtype).removeprefix("torch.") + kv_words(config),
            kernels=f"{kernels.name}, attention {kernels.attend.name}"
            + (", W4A16" if config.w4a16 else "")
            + (", batch-invariant" if config.batch_invariant else ""),
            notes=tuple(note for note in notes if note),
        ),
        memory=usage.rows(pool.blocks * config.block_size * kept),
        partition=partition,
        ranks=ranks,
    )


def _check(config: EngineConfig) -> None:
    """Raises ConfigError for the flags that are the CPU's."""
    if disaggregated(config.partition):
        raise ConfigError(f"--partition {config.partition} is for --device cpu and simulated; P:D is what cuda has")
    for flag, value, unset in (("--cores", config.cores, None), ("--kernels", config.kernels, "auto")):
        if value != unset:
            raise ConfigError(f"{flag} is {value}, and it is for --device cpu; leave it out")


def _check_experts(config: EngineConfig, model: ModelConfig) -> None:
    """Raises ConfigError for a mixture of experts, which the host would have to route at every layer of a step."""
    if model.experts is not None:
        raise ConfigError(
            f"--device is cuda, and {config.model} is a {model.family} with {model.experts.count} experts in each "
            "layer, which weft serves with --device cpu only"
        )


def _check_w4a16(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> None:
    """Raises ConfigError for --w4a16 where it has nothing to do, or no kernels."""
    if config.w4a16 and model.quantization is None:
        raise ConfigError(
            f"--w4a16 is for 4-bit weights, and those of {config.model} are not quantised; leave it out: their "
            "activations keep their precision anyway"
        )
    if config.w4a16 and dtype is not torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(f"--w4a16 needs activations in bfloat16, and they are in {name}; --dtype bfloat16 works")


def _check_batch_invariant(config: EngineConfig, dtype: torch.dtype) -> None:
    """Raises ConfigError for --batch-invariant where its products are none for the tensor cores."""
    if config.batch_invariant and dtype is not torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(f"--batch-invariant needs bfloat16, and the weights are in {name}; --dtype bfloat16 works")


def _token_bytes(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, kernels: TritonKernels) -> int:
    cache = config.kv_cache_dtype
    try:
        return model.layers * kernels.attend.token_bytes(model.kv_heads, model.head_dim, dtype, cache)
    except ValueError as error:
        raise ConfigError(f"--kv-cache-dtype is {cache}: {error}") from error


def _open_lane(
    gpu: Gpu,
    lane: Lane,
    partition: Partition | None,
    decoder: Decoder,
    kv: list[Any],
    capacity: Capacity,
    kernels: TritonKernels,
    ranks: Ranks | None,
) -> CudaLane:
    share = _share(partition, lane)
    stream = gpu.stream() if share is None else gpu.lane_stream(lane, share)
    forward = CudaForward(
        gpu,
        stream,
        decoder,
        kv,
        capacity.block_size,
        max_slices=capacity.max_slices,
        graphs=gpu.captures and kernels.attend.capturable,
        planner=planner_of(gpu, kernels.attend, decoder, capacity.block_size, capacity.max_slices),
        ranks=ranks,
    )
    return CudaLane(gpu, stream, decoder, forward, capacity.block_size)


def _share(partition: Partition | None, lane: Lane) -> int | None:
    """The lane's units; None for one mixed lane."""
    if partition is None:
        return None
    return partition.prefill if lane is Lane.PREFILL else partition.decode


class CudaDevice:
    """A Device (see base.py): threads and queues around the lanes. ranks: the others, which this one then keeps in step
    with: it goes ahead after each decode step, and not where there is time."""

    def __init__(
        self,
        capacity: Capacity,
        gpu: Gpu,
        lanes: dict[Lane, CudaLane],
        *,
        description: Description,
        memory: tuple[tuple[str, int], ...],
        partition: Partition | None,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks
        self._lost: RankLost | None = None
        self._capacity = capacity
        self._gpu = gpu
        self._lanes = lanes
        self._description = description
        self._memory = memory
        self._partition = partition
        self._dead: str | None = None
        self._queues = Queues(lanes)
        self._threads = []
        for name in lanes:
            launched: SimpleQueue[Launched] = SimpleQueue()
            for work in (self._launch, self._collect):
                title = f"weft-{name.value}-{work.__name__.strip('_')}"
                self._threads.append(threading.Thread(target=work, args=(name, launched), name=title, daemon=True))
        for thread in self._threads:
            thread.start()

    def capacity(self) -> Capacity:
        return self._capacity

    def describe(self) -> Description:
        return self._description

    def lanes(self) -> tuple[Lane, ...]:
        return tuple(self._lanes)

    def submit(self, plan: Plan) -> Ticket:
        if self._lost is not None:
            raise self._lost
        if self._dead is not None:
            raise DeviceError(self._dead)
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
        if min(partition.prefill, partition.decode) < 1 or max(partition.prefill, partition.decode) > self._gpu.shares:
            raise DeviceError(
                f"partition {partition.prefill}:{partition.decode}; each lane needs a share, "
                f"and there are {self._gpu.shares}"
            )
        self._partition = partition

    def memory(self) -> tuple[tuple[str, int], ...]:
        return self._memory

    def close(self) -> None:
        if self._queues.closing:
            return
        self._queues.close()
        for thread in self._threads:
            thread.join()
        if self._ranks is not None:
            self._ranks.close()

    def _launch(self, name: Lane, launched: SimpleQueue[Launched]) -> None:
        """A lane's first thread: its plans in order, until close(). How it ends is the last that the second is told."""
        try:
            self._gpu.adopt()
            lane = self._lanes[name]
            others = [other for other in self._lanes.values() if other is not lane]
            while (plan := self._queues.next(name)) is not None:
                if self._queues.closing:
                    launched.put(Pending(plan, error=CLOSED))
                else:
                    ahead, share = self._ahead(name), _share(self._partition, name)
                    launched.put(lane.start(plan, others, ahead=ahead, share=share))
        except BaseException as error:
            launched.put(error)
            raise
        launched.put(None)

    def _ahead(self, name: Lane) -> bool:
        """Whether a lane guesses what comes next; of ranks all must do alike."""
        return self._ranks is not None or not self._queues.waiting(name)

    def _collect(self, name: Lane, launched: SimpleQueue[Launched]) -> None:
        """A lane's second thread. If either ends before its time, the lane does."""
        try:
            self._gpu.adopt()
            while isinstance(pending := launched.get(), Pending):
                self._queues.post(self._finish(self._lanes[name], pending))
        except BaseException as error:
            self._queues.stop(name)
            while isinstance(launched.get(), Pending):
                pass  # the first thread launches no more once it has put something else here
            self._end(name, error)
            raise
        if pending is not None:
            self._end(name, pending)

    def _end(self, name: Lane, error: BaseException) -> None:
        """Say that the lane is gone, once the device has done what it launched."""
        try:
            self._lanes[name].check()
        except DeviceError as failed:
            self._dead = failed.message
        finally:
            self._queues.end(name, error)

    def _finish(self, lane: CudaLane, pending: Pending) -> Result:
        ticket = Ticket(pending.plan.step, pending.plan.lane)
        try:
            if pending.error is not None:
                lane.check()
            return pending.finish()
        except RankLost as error:  # `poll` says so
            self._lost = error
            return Result(ticket, error=error.message)
        except DeviceError as error:
            self._dead = error.message
            return Result(ticket, error=error.message)
        except Exception as error:
            return Result(ticket, error=f"{type(error).__name__}: {error}")
