"""The processes of the ranks on this host, and the sockets to and from them."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import zmq

from weft.config import EngineConfig
from weft.devices.cores import cores_of_rank, usable_cores
from weft.errors import DeviceError
from weft.ipc.channel import Receiver, Sender, make_folder
from weft.ipc.ranks import FROM_RANKS, FromRank, Gone, Heard, Lost, Meeting, RankOrders, ToRank, to_rank
from weft.loop.launch import ending

RANK = (sys.executable, "-m", "weft.loop.rank")
# Seconds that ranks get to end by themselves: fewer than their parent gets to end them (loop/client.py).
END_SECONDS = 3.0
# Where ranks of one host make what they share (weave/shm.py); names begin with that of their meeting.
SHARED = Path("/dev/shm")
LAST_WORDS = 200  # milliseconds


def start_ranks(
    config: EngineConfig,
    model: Path,
    ranks: range,
    meeting: Meeting,
    bind: str,
    command: Sequence[str] = RANK,
    *,
    before: int = 0,
    neighbours: int | None = None,
) -> Ranks:
    """Start these ranks on this host; all `neighbours` share its cores (of GPUs each has one), of which so many come
    before these ranks, and somebody else starts the others. Raises ConfigError or DeviceError."""
    cores, folder = usable_cores(config.cores), make_folder()
    count = len(ranks) if neighbours is None else neighbours
    on_cores = config.device != "cuda"
    orders = [
        RankOrders(
            config=replace(config, cores=",".join(map(str, cores_of_rank(cores, before + index, count))))
            if on_cores
            else config,
            rank=rank,
            ranks=config.tensor_parallel_size,
            neighbours=count,
            model=os.fspath(model),
            folder=os.fspath(folder),
            meeting=meeting,
            bind=bind,
            crowded=len(cores) < count,
            log_level=logging.getLevelName(logging.getLogger("weft").getEffectiveLevel()).lower(),
        )
        for index, rank in enumerate(ranks)
    ]
    return Ranks(orders, folder, command)


def unlink_shared(meeting: str) -> None:
    """What ranks have left in shared memory that ended while they waited for others there."""
    for left in SHARED.glob(f"{meeting}-*"):
        left.unlink(missing_ok=True)


class Ranks:
    """The processes, and the sockets to and from them."""

    where = ""  # all are here

    def __init__(self, orders: Sequence[RankOrders], folder: Path, command: Sequence[str] = RANK) -> None:
        self._folder = folder
        self._meetings = {order.meeting.name for order in orders}
        self._receiver: Receiver[FromRank] = Receiver(folder, FROM_RANKS, FromRank)
        self._senders: list[Sender[ToRank]] = []
        self._processes: dict[int, subprocess.Popen[bytes]] = {}  # by rank
        self._pidfds: dict[int, int] = {}  # descriptor -> rank
        self._poller = zmq.Poller()
        self._poller.register(self._receiver.socket, zmq.POLLIN)
        try:
            for order in orders:
                self._start(order, command)
        except BaseException:
            self.close(0.0)
            raise

    def _start(self, order: RankOrders, command: Sequence[str]) -> None:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, bufsize=0)
        except OSError as error:
            raise DeviceError(f"the process of rank {order.rank} cannot be started: {error}") from error
        self._processes[order.rank] = process
        descriptor = os.pidfd_open(process.pid)
        self._pidfds[descriptor] = order.rank
        self._poller.register(descriptor, zmq.POLLIN)
        self._senders.append(Sender(self._folder, to_rank(order.rank)))
        with contextlib.suppress(BrokenPipeError):  # it has ended already, which `listen` will say
            if process.stdin is not None:
                process.stdin.write(msgspec.json.encode(order) + b"\n")

    def __len__(self) -> int:
        return len(self._processes)

    def send(self, message: ToRank) -> None:
        """To all of them."""
        for sender in self._senders:
            sender.send(message)

    def listen(self, timeout: float | None = None, also: Collection[int] = ()) -> list[Heard]:
        """What has come; waits for it, up to `timeout` seconds, or until one of the descriptors `also` is readable.

        What a rank has said is told before its end.
        """
        for descriptor in also:
            self._poller.register(descriptor, zmq.POLLIN)
        ready = dict(self._poller.poll(None if timeout is None else max(0, round(1000 * timeout))))
        found: list[Heard] = [*self._arrived()]
        for descriptor in ready.keys() & self._pidfds.keys():
            rank = self._pidfds[descriptor]
            self._poller.unregister(descriptor)
            words = ending(self._processes[rank].wait())
            # The last words of a process that has ended may still be on their way.
            if not any(
                isinstance(message, Lost) and message.rank == rank for message in found
            ) and self._receiver.socket.poll(LAST_WORDS):
                found += self._arrived()
            found.append(Gone(rank, words))
        for descriptor in also:
            self._poller.unregister(descriptor)
        return found

    def _arrived(self) -> Iterator[FromRank]:
        while (message := self._receiver.take()) is not None:
            yield message

    def close(self, seconds: float = END_SECONDS) -> None:
        """End the processes: they get so many seconds to do it by themselves, having been told."""
        end = time.monotonic() + seconds
        for process in self._processes.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()  # also one that was stopped
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        for descriptor in self._pidfds:
            os.close(descriptor)
        self._pidfds.clear()
        for sender in self._senders:
            sender.close()
        self._receiver.close()
        for name in self._meetings:
            unlink_shared(name)
        shutil.rmtree(self._folder, ignore_errors=True)
