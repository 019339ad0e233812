"""Tensor-parallel ranks as one device: every plan goes to all of them, and comes back once all have carried it out.

    engine ── submit ─▶ one socket to each rank ─▶ rank processes (loop/rank.py) ─▶ one socket ─▶ listener ── poll ─▶

Nothing waits for ever. A rank whose process ends is noticed at once; one that hangs is missed by the others in a seam,
or by the listener when it does not end a step that another has ended. Either way the device is dead then, in words that
name the rank: what the ranks keep of a sequence exists only once.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from weft.config import EngineConfig
from weft.core.plan import Capacity, Lane, Partition, Plan, Result, Ticket
from weft.devices.base import Description
from weft.devices.cores import collective_of, least_kernels
from weft.errors import ConfigError, DeviceError, RankLost
from weft.ipc.ranks import (
    Begun,
    Blocks,
    Carry,
    Done,
    End,
    Fits,
    Gone,
    Heard,
    Lost,
    Meeting,
    Opened,
    Share,
    ToRank,
    loss,
    new_name,
)
from weft.loop.nodes import LOOPBACK, free_port, open_nodes
from weft.loop.rank_processes import END_SECONDS, LAST_WORDS, RANK, start_ranks

CLOSED = "the device is closed"
# Seconds that the other ranks get to fail like one that has failed, before it counts as alone.
FAIL_SECONDS = 1.0
# Seconds that the listener gives a rank beyond --rank-timeout, so that a rank that waits for it in a seam speaks first.
GRACE_SECONDS = 1.0
# Between two looks at whether this process was paused, while ranks are waited for.
LOOK = 1.0

log = logging.getLogger(__name__)


class Members(Protocol):
    """All ranks, wherever they are: the processes of this host, or nodes. where: which are where, for the end of an
    error; nothing when all are here."""

    @property
    def where(self) -> str: ...
    def __len__(self) -> int: ...
    def send(self, message: ToRank) -> None: ...
    def listen(self, timeout: float | None = None, also: Collection[int] = ()) -> list[Heard]: ...
    def close(self, seconds: float = END_SECONDS) -> None: ...


def open_ranks(
    config: EngineConfig, model: Path, say: Callable[[str], None], command: Sequence[str] = RANK
) -> RankedDevice:
    """The model of the folder `model` on --tensor-parallel-size ranks, of this host, of --nnodes or of a Ray cluster.

    say: told the phases of rank 0's start-up. Raises ConfigError, CheckpointError or DeviceError: whatever the first
    rank that could not start has died of.
    """
    members = _gather(config, model, say, command)
    try:
        opened = _start_up(members, say, config)
    except BaseException:
        members.close(0.0)
        raise
    return RankedDevice(members, opened, config.rank_timeout)


def _gather(config: EngineConfig, model: Path, say: Callable[[str], None], command: Sequence[str]) -> Members:
    if config.distributed_executor_backend == "ray":
        from weft.loop.ray_cluster import open_ray

        return open_ray(config, model, say)
    if config.nnodes > 1:
        return open_nodes(config, model, say, command)
    port = free_port(LOOPBACK) if collective_of(config) != "shm" else None
    meeting = Meeting(new_name(), LOOPBACK, port)
    return start_ranks(config, model, range(config.tensor_parallel_size), meeting, LOOPBACK, command)


def _start_up(ranks: Members, say: Callable[[str], None], config: EngineConfig) -> list[Opened]:
    """Until all ranks take plans. Those that others wait for are named, each time that nothing is heard for
    --rank-timeout; --rank-load-timeout after the first has loaded its part, they count as lost."""
    fits: dict[int, Fits] = {}
    opened: dict[int, Opened] = {}
    end = math.inf  # of the wait for who still loads
    while len(opened) < len(ranks):
        heard = ranks.listen(max(0.0, min(config.rank_timeout, end - time.monotonic())))
        for message in heard:
            match message:
                case Begun(0, phase):
                    say(phase)
                case Fits(rank):
                    fits[rank] = message
                    end = min(end, time.monotonic() + config.rank_load_timeout)
                    if len(fits) == len(ranks):
                        end = math.inf
                        ranks.send(_agreed(fits))
                case Opened(rank):
                    opened[rank] = message
                case Lost():
                    raise loss(message, ranks.where)
                case Gone():
                    raise loss(message, f" before it served{ranks.where}")
        late = " and ".join(str(rank) for rank in range(len(ranks)) if rank not in fits)
        if time.monotonic() >= end:
            raise RankLost(
                f"rank {late} did not load its part of the model within {config.rank_load_timeout:g} s of another "
                f"rank; --rank-load-timeout allows for more{ranks.where}"
            )
        if fits and late and not heard:
            log.warning("rank %s still loads its part of the model; the others have theirs", late)
    return [opened[rank] for rank in range(len(ranks))]


def _agreed(fits: Mapping[int, Fits]) -> Blocks:
    """What all ranks have room for. Raises ConfigError for kernels that cannot compute together: their rounding is not
    the same."""
    if len({one.kernels for one in fits.values()}) > 1:
        each = ", ".join(f"{fits[rank].kernels} on rank {rank}" for rank in sorted(fits))
        common = least_kernels([one.kernels for one in fits.values()])
        raise ConfigError(f"--kernels auto comes to {each}, and all ranks need the same; --kernels {common} would work")
    return Blocks(min(one.blocks for one in fits.values()))


class RankedDevice:
    """A Device (see devices/base.py). timeout: seconds that ranks may be apart."""

    def __init__(self, ranks: Members, opened: Sequence[Opened], timeout: float) -> None:
        self._ranks = ranks
        self._first = opened[0]
        self._memory = tuple((what, sum(dict(one.memory)[what] for one in opened)) for what, _ in self._first.memory)
        self._cores = sum(one.capacity.shares for one in opened)
        self._partition = self._first.partition
        self._timeout = timeout
        self._votes = Votes(len(ranks), timeout)
        self._results: SimpleQueue[Result | None] = (
            SimpleQueue()
        )  # None: look up, somebody called wake() or all is over
        self._dead: RankLost | None = None
        self._closed = False
        self._stop, self._stopper = os.pipe()
        self._thread = threading.Thread(target=self._listen, name="ranks", daemon=True)
        self._thread.start()

    def capacity(self) -> Capacity:
        return self._first.capacity

    def describe(self) -> Description:
        first, count = self._first, len(self._ranks)
        if first.device.startswith("cpu"):
            device = f"cpu, {count} ranks on {self._cores} core{'s' if self._cores > 1 else ''}"
        else:
            device = f"{first.device}, {count} ranks"
        return Description(device, first.dtype, first.kernels, first.notes)

    def lanes(self) -> tuple[Lane, ...]:
        return self._first.lanes

    def submit(self, plan: Plan) -> Ticket:
        if plan.lane not in self._first.lanes:
            raise DeviceError(f"a plan for lane {plan.lane.value}; this device has {', '.join(self._first.lanes)}")
        self._check()
        self._ranks.send(Carry(plan))
        return Ticket(plan.step, plan.lane)

    def poll(self, timeout: float | None) -> list[Result]:
        if not self._closed:
            self._check()
        found: list[Result] = []
        try:
            result = self._results.get(timeout=0.0 if self._closed else timeout)
            while True:
                if result is not None:
                    found.append(result)
                result = self._results.get_nowait()
        except Empty:
            pass
        if not (found or self._closed):
            self._check()
        return found

    def wake(self) -> None:
        self._results.put(None)

    def partition(self) -> Partition | None:
        return self._partition

    def set_partition(self, partition: Partition) -> None:
        if self._partition is None:
            raise DeviceError("this device has one mixed lane; open it with --partition P:D to have shares")
        shares = self._first.capacity.shares
        if min(partition.prefill, partition.decode) < 1 or max(partition.prefill, partition.decode) > shares:
            raise DeviceError(
                f"partition {partition.prefill}:{partition.decode}; each lane needs a core, and a rank has {shares}"
            )
        self._check()
        self._ranks.send(Share(partition))
        self._partition = partition

    def memory(self) -> tuple[tuple[str, int], ...]:
        return self._memory

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        os.close(self._stopper)
        self._thread.join()
        os.close(self._stop)
        if self._dead is None:
            self._ranks.send(End())
        self._ranks.close(END_SECONDS if self._dead is None else 0.0)

    def _check(self) -> None:
        if self._closed:
            raise DeviceError(CLOSED)
        if self._dead is not None:
            raise self._dead

    def _listen(self) -> None:
        """The listener's thread, until `close` or the first loss."""
        try:
            while True:
                looked = time.monotonic()
                patience = self._votes.patience(looked)
                heard = self._ranks.listen(None if patience is None else min(patience, LOOK), (self._stop,))
                if patience is not None and (paused := time.monotonic() - looked - LOOK) > 0:
                    self._votes.forgive(paused)
                for message in heard:
                    if isinstance(message, Done) and (result := self._votes.add(message, time.monotonic())) is not None:
                        self._results.put(result)
                if losses := [message for message in heard if isinstance(message, Lost | Gone)]:
                    raise RankLost(self._explain(losses))
                self._votes.check(time.monotonic())
                if self._closed:
                    return
        except RankLost as error:
            self._dead = RankLost(error.message + self._ranks.where)
        except Exception as error:  # without this thread nothing ends any more
            log.exception("the listener to the ranks died")
            self._dead = RankLost(f"the listener to the ranks died: {type(error).__name__}: {error}")
        self.wake()

    def _explain(self, losses: list[Lost | Gone]) -> str:
        """Why ranks are lost: that the process of one has ended unasked, rather than that others miss it."""
        end = time.monotonic() + LAST_WORDS / 1000
        while True:
            said = {loss.rank: loss.error for loss in losses if isinstance(loss, Lost)}
            ended = [loss for loss in losses if isinstance(loss, Gone) and loss.rank not in said]
            if ended:
                return f"rank {ended[0].rank} {ended[0].words}"
            if (left := end - time.monotonic()) <= 0:
                return self._votes.cause() or "; ".join(f"rank {rank}: {error}" for rank, error in said.items())
            losses = losses + [loss for loss in self._ranks.listen(left) if isinstance(loss, Lost | Gone)]


class Votes:
    """What the ranks have said of the steps that not all of them have ended. Raises RankLost where they differ."""

    def __init__(self, ranks: int, timeout: float) -> None:
        self._ranks = ranks
        self._timeout = timeout
        self._open: dict[tuple[int, int], dict[int, Done]] = {}
        self._since: dict[tuple[int, int], float] = {}

    def add(self, done: Done, now: float) -> Result | None:
        """Rank 0's result, once all ranks have said the same."""
        key = done.step, done.part
        said = self._open.setdefault(key, {})
        self._since.setdefault(key, now)
        said[done.rank] = done
        if len(said) < self._ranks:
            return None
        if (cause := self._alone(said)) is not None:
            raise RankLost(cause)
        del self._open[key], self._since[key]
        for other in said.values():
            if other.digest != said[0].digest:
                raise RankLost(f"rank {other.rank} sampled other tokens in step {done.step} than rank 0")
        return said[0].result

    def patience(self, now: float) -> float | None:
        """Seconds until `check` has something to say."""
        limits = [self._limit(key) - now for key in self._open]
        return max(0.0, min(limits)) if limits else None

    def check(self, now: float) -> None:
        for key, said in self._open.items():
            if now < self._limit(key):
                continue
            late = " and ".join(str(rank) for rank in range(self._ranks) if rank not in said)
            raise RankLost(
                self._alone(said) or f"rank {late} did not end step {key[0]} within {self._timeout:g} s of the others"
            )

    def forgive(self, seconds: float) -> None:
        """Time in which this process did not run, and the ranks likely neither (a frozen container, a stopped job)."""
        self._since = {key: since + seconds for key, since in self._since.items()}

    def cause(self) -> str | None:
        """Why a rank does not come, where it has said so itself."""
        return next((cause for said in self._open.values() if (cause := self._alone(said))), None)

    def _limit(self, key: tuple[int, int]) -> float:
        failed = self._alone(self._open[key]) is not None
        return self._since[key] + (FAIL_SECONDS if failed else self._timeout + GRACE_SECONDS)

    def _alone(self, said: dict[int, Done]) -> str | None:
        """In words, that a rank has failed in a step and not all have."""
        failed = [done for done in said.values() if done.result is not None and done.result.error is not None]
        if not failed or len(failed) == self._ranks:
            return None
        done = failed[0]
        return f"rank {done.rank} failed in step {done.step}: {done.result.error if done.result else ''}"
