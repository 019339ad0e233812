"""Devices without a model: each token is a hash of those before it, see oracle.py.

A plan is executed (slots written and read) when its step is run, not when it is submitted; the plans of one lane run
in order. `SimulatedDevice` runs them on a thread per lane that sleeps as long as the cost model says;
`ManualDevice` runs them when a test says so, and hands out results when a test says so, in any order between lanes.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from weft.config import EngineConfig, parse_partition
from weft.core.plan import Capacity, Lane, Partition, Plan, Result, Ticket
from weft.devices.cost import FREE, SMALL, CostModel
from weft.devices.memory import decode_blocks
from weft.devices.modelless import Modelless
from weft.devices.oracle import SLOT_BYTES, Faults, continuation, oracle
from weft.devices.queues import CLOSED, Queues
from weft.errors import CheckpointError, ConfigError, DeviceError
from weft.text.tokenizer import Tokenizer

__all__ = ["Faults", "ManualDevice", "SimulatedDevice", "continuation", "open_simulated", "oracle"]

DEFAULT_MAX_MODEL_LEN = 4096


class ManualDevice(Modelless):
    """For tests: nothing happens by itself. `run` executes the oldest plan of a lane, `poll` hands out its result."""

    def __init__(
        self, capacity: Capacity, lanes: tuple[Lane, ...] = (Lane.MIXED,), *, faults: Faults | None = None
    ) -> None:
        super().__init__(capacity, None, faults)
        self._lanes = lanes
        self.submitted: dict[Lane, deque[Plan]] = {lane: deque() for lane in lanes}
        self.finished: list[Result] = []

    def run(self, lane: Lane) -> bool:
        """Execute the oldest plan of the lane that was not executed; False when there is none."""
        if not self.submitted[lane]:
            return False
        self.finished.append(self._executor.run(self.submitted[lane].popleft(), 0.0))
        return True

    def submit(self, plan: Plan) -> Ticket:
        self.submitted[plan.lane].append(plan)
        return Ticket(plan.step, plan.lane)

    def poll(self, timeout: float | None) -> list[Result]:
        """Never waits. Raises DeviceError where it would wait for ever."""
        found, self.finished = self.finished, []
        if not found and timeout is None:
            raise DeviceError("nothing was run, and nobody could run it during this poll")
        return found

    def wake(self) -> None:
        """Nobody waits."""

    def set_partition(self, partition: Partition) -> None:
        raise DeviceError(f"partition {partition} is impossible: a test, not time, says when a lane advances")

    def close(self) -> None:
        """Nothing to free."""


class SimulatedDevice(Modelless):
    """In real time, a thread per lane. partition: the shares of each lane; None for one mixed lane.

    A lane takes on its share when it begins a step, and how long that takes is settled then: by the lane's share, and
    by that of the other lane if it computes at that moment. VirtualDevice (virtual.py) is exact about what overlaps.
    """

    def __init__(
        self,
        capacity: Capacity,
        partition: Partition | None = None,
        *,
        cost: CostModel = FREE,
        faults: Faults | None = None,
    ) -> None:
        super().__init__(capacity, partition, faults)
        self._cost = cost
        self._lock = threading.Lock()
        self._closed = threading.Event()  # ends the steps that are under way
        # The shares of the lanes that compute now.
        self._computing: dict[Lane, float] = {}
        self._dead: str | None = None
        self._queues = Queues(self._lanes)
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"simulated-{lane.value}", daemon=True)
            for lane in self._lanes
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, plan: Plan) -> Ticket:
        if self._dead is not None:
            raise DeviceError(self._dead)
        return self._queues.submit(plan)

    def poll(self, timeout: float | None) -> list[Result]:
        dead = self._dead
        found = self._queues.poll(timeout if dead is None else 0.0)
        if dead is not None and not found:
            raise DeviceError(dead)
        return found

    def wake(self) -> None:
        self._queues.wake()

    def close(self) -> None:
        if self._queues.closing:
            return
        self._queues.close()
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _work(self, lane: Lane) -> None:
        while (plan := self._queues.next(lane)) is not None:
            if plan.step in self._executor.faults.gone:
                self._queues.end(lane, RuntimeError("simulated fault"))
                return
            self._queues.post(self._run(plan))

    def _run(self, plan: Plan) -> Result:
        ticket, faults = Ticket(plan.step, plan.lane), self._executor.faults
        if plan.step == faults.dead:
            self._dead = f"the simulated device died at step {plan.step}: simulated fault"
        if self._dead is not None:
            return Result(ticket, error=self._dead)
        seconds = self._begin(plan) + faults.slow.get(plan.step, 0.0)
        # A lost step is one that only `close` ends.
        if self._closed.wait(None if plan.step in faults.lost else seconds):
            return Result(ticket, error=CLOSED)
        with self._lock:
            self._computing.pop(plan.lane, None)
            return self._executor.run(plan, seconds)

    def _begin(self, plan: Plan) -> float:
        """How long the step takes."""
        with self._lock:
            share = self._share(plan.lane)
            # Phases with pools of their own have devices of their own.
            rival = 0.0 if self.capacity().decode_blocks else sum(self._computing.values())
            self._computing[plan.lane] = share
        return self._cost.seconds(plan, share, rival)


def open_simulated(config: EngineConfig, folder: Path, say: Callable[[str], None]) -> SimulatedDevice:
    """A device with the vocabulary and the context of the model in `folder`, without its weights.

    Raises CheckpointError when the folder does not tell them, ConfigError when the KV pool would have no block.
    """
    if config.kv_cache_dtype != "auto":
        raise ConfigError(
            f"--kv-cache-dtype is {config.kv_cache_dtype}; the simulated device keeps neither keys nor values, so only "
            "auto would work"
        )
    say("reading the model's shape")
    capacity = _capacity(config, folder)
    say("making the KV pool")
    shares = parse_partition(config.partition)
    return SimulatedDevice(capacity, None if shares is None else Partition(*shares.of(shares.whole)), cost=SMALL)


def _capacity(config: EngineConfig, folder: Path) -> Capacity:
    path = folder / "config.json"
    try:
        shape = json.loads(path.read_text())
        vocabulary = int(shape["vocab_size"])
        longest = int(shape.get("max_position_embeddings", DEFAULT_MAX_MODEL_LEN))
        layers = int(shape.get("num_hidden_layers", 1))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not tell the model's shape: {error!r}") from error
    if (folder / "tokenizer.json").exists():
        # A padded vocabulary has ids without a token; a client could not read them.
        vocabulary = min(vocabulary, Tokenizer.from_folder(folder).vocabulary)
    max_model_len = config.max_model_len or longest
    shares = parse_partition(config.partition)
    blocks = config.num_blocks
    if blocks is None and config.kv_cache_memory_bytes is not None:
        blocks = config.kv_cache_memory_bytes // (SLOT_BYTES * config.block_size)
        if blocks < 1:
            raise ConfigError(
                f"--kv-cache-memory-bytes is {config.kv_cache_memory_bytes}; one block of {config.block_size} slots "
                f"takes {SLOT_BYTES * config.block_size}"
            )
    if blocks is None:
        blocks = -(-max_model_len // config.block_size) * config.max_num_seqs
    return Capacity(
        blocks=blocks,
        block_size=config.block_size,
        max_tokens=config.max_num_batched_tokens,
        max_slices=config.max_num_seqs,
        shares=1 if shares is None else shares.whole,
        max_model_len=max_model_len,
        vocabulary=vocabulary,
        layers=layers,
        decode_blocks=decode_blocks(config, blocks, max_model_len),
    )
