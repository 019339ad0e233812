"""From a configuration to an engine that serves."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from weft.config import EngineConfig, parse_partition
from weft.core.plan import Capacity, Partition, Regime, Sharing
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices import open_device
from weft.devices.base import Device
from weft.ipc.messages import Phase, Ready
from weft.loop.engine import Engine
from weft.loop.ranks import open_ranks
from weft.phases.auto import AutoPolicy
from weft.phases.controller import Controller, FixedPolicy
from weft.phases.forecast import TURNS_A_STEP, Limits
from weft.phases.observations import Targets
from weft.phases.paper import PaperPolicy
from weft.phases.recording import Recorder
from weft.text.hub import resolve_model

# Those of the paper's code.
DEFAULT_TARGETS = Targets(ttft=0.5, tpot=0.1)


def open_engine(config: EngineConfig, say: Callable[[str], None]) -> tuple[Engine, Ready]:
    """Open the device with the model, and an engine on it. The caller closes the engine.

    say: told the name of each phase of the start-up when it begins; `Ready` has their seconds.
    Raises ConfigError (naming every bad setting at once), CheckpointError or DeviceError.
    """
    config.validate()
    phases = Phases(say)
    phases.begin("find the model")
    folder = resolve_model(config.model, config.revision)
    return _open(config, folder, phases)


def _open(config: EngineConfig, folder: Path, phases: Phases) -> tuple[Engine, Ready]:
    if config.tensor_parallel_size > 1:
        device: Device = open_ranks(config, folder, phases.begin)
    else:
        device = open_device(config, folder, phases.begin)
    try:
        scheduler = Scheduler(device.capacity(), device.lanes(), settings(config))
        engine = Engine(device, scheduler, controller=controller(config, device.capacity()))
        return engine, _ready(config, device, phases.end())
    except BaseException:
        device.close()
        raise


def controller(config: EngineConfig, capacity: Capacity) -> Controller | None:
    """What two lanes go by; None for one mixed lane. A lane alone has the whole device, but with `paper`, whose caps
    hold always, and with `pd`."""
    shares = parse_partition(config.partition)
    targets = Targets(config.slo_ttft or DEFAULT_TARGETS.ttft, config.slo_tpot or DEFAULT_TARGETS.tpot)
    if shares is None:
        return None
    if shares.policy == "fixed":
        split = Sharing(Regime.SPLIT, Partition(*shares.of(capacity.shares)))
        return Controller(FixedPolicy(split), lone=True)
    if shares.policy == "pd":  # two devices: neither has anything of the other's
        return Controller(FixedPolicy(Sharing(Regime.SPLIT, Partition(*shares.of(capacity.shares)))))
    if shares.policy == "turns":
        turn = max(1, min(config.max_num_batched_tokens, capacity.max_tokens) // TURNS_A_STEP)
        return Controller(FixedPolicy(Sharing(Regime.TURNS, Partition(shares.prefill, shares.decode), turn)))
    chunk = min(config.max_num_batched_tokens, capacity.max_tokens)
    seats = min(config.max_num_seqs, capacity.max_slices)
    device = Limits(capacity.shares, chunk, seats, capacity.layers)
    if shares.policy == "paper":
        paper = PaperPolicy(targets, capacity.shares)
        return Controller(paper, record=_recorder(config, paper, device))
    # Only who has named a target has asked for requests to be refused in its name.
    policy = AutoPolicy(targets, device, shed=config.slo_ttft is not None)
    return Controller(policy, lone=True, record=_recorder(config, policy, device))


def _recorder(config: EngineConfig, policy: AutoPolicy | PaperPolicy, device: Limits) -> Recorder | None:
    return None if config.partition_record is None else Recorder(Path(config.partition_record), policy, device)


def settings(config: EngineConfig) -> SchedulerSettings:
    return SchedulerSettings(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_queued_reqs=config.max_num_queued_reqs,
        max_num_queued_tokens=config.max_num_queued_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        seed=config.seed,
    )


def _ready(config: EngineConfig, device: Device, phases: tuple[Phase, ...]) -> Ready:
    capacity, description = device.capacity(), device.describe()
    return Ready(
        model=config.model,
        device=description.device,
        dtype=description.dtype,
        kernels=description.kernels,
        max_model_len=capacity.max_model_len,
        vocabulary=capacity.vocabulary,
        blocks=capacity.blocks,
        block_size=capacity.block_size,
        max_num_seqs=config.max_num_seqs,
        phases=phases,
        memory=device.memory(),
        notes=description.notes,
    )


class Phases:
    """Times what happens between one `begin` and the next."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._done: list[Phase] = []
        self._open: tuple[str, float] | None = None

    def begin(self, name: str) -> None:
        self._close()
        self._say(name)
        self._open = (name, self._clock())

    def end(self) -> tuple[Phase, ...]:
        """Close the last phase; all of them in order."""
        self._close()
        return tuple(self._done)

    def _close(self) -> None:
        if self._open is not None:
            name, begun = self._open
            self._done.append(Phase(name, self._clock() - begun))
            self._open = None
