"""Devices without a model: each token is a hash of those before it, see oracle.py.

A plan is executed (slots written and read) when its step is run, not when it is submitted; the plans of one lane run
in order. `SimulatedDevice` runs them on a thread per lane that sleeps as long as the cost model says;
`ManualDevice` runs them when a test says so, and hands out results when a test says so, in any order between lanes.
"""

from __future__ import annotations

import json
import queue
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
        self._closed = threading.Event()
        # The shares of the lanes that compute now.
        self._computing: dict[Lane, float] = {}
        self._dead: str | None = None
        # A result, or None for "wake up".
        self._results: queue.SimpleQueue[Result | None] = queue.SimpleQueue()
        self._plans: dict[Lane, queue.SimpleQueue[Plan | None]] = {lane: queue.SimpleQueue() for lane in self._lanes}
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"simulated-{lane.value}", daemon=True)
            for lane in self._lanes
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, plan: Plan) -> Ticket:
        if self._dead is not None:
            raise DeviceError(self._dead)
        if self._closed.is_set():
            raise DeviceError("the simulated device is closed")
        self._plans[plan.lane].put(plan)
        return Ticket(plan.step, plan.lane)

    def poll(self, timeout: float | None) -> list[Result]:
        if self._dead is not None and self._results.empty():
            raise DeviceError(self._dead)
        found: list[Result] = []
        try:
            one = self._results.get(block=timeout is None or timeout > 0, timeout=timeout)
            while one is not None:
                found.append(one)
                one = self._results.get_nowait()
        except queue.Empty:
            return found  # all there is
        return found

    def wake(self) -> None:
        self._results.put(None)

    def close(self) -> None:
        self._closed.set()
        for plans in self._plans.values():
            plans.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, lane: Lane) -> None:
        while (plan := self._plans[lane].get()) is not None and not self._closed.is_set():
            if plan.step == self._executor.faults.dead:
                self._dead = f"the simulated device died at step {plan.step}: simulated fault"
            if self._dead is not None:
                self._results.put(Result(Ticket(plan.step, lane), error=self._dead))
                continue
            if plan.step in self._executor.faults.gone:
                return
            seconds = self._begin(plan) + self._executor.faults.slow.get(plan.step, 0.0)
            # A lost step is one that only `close` ends.
            lost = plan.step in self._executor.faults.lost
            if (lost or seconds > 0) and self._closed.wait(None if lost else seconds):
                return
            with self._lock:
                self._computing.pop(lane, None)
                result = self._executor.run(plan, seconds)
            self._results.put(result)

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
