"""The process of one tensor-parallel rank: `python -m weft.loop.rank`, started by loop/ranks.py.

Its main thread hands plans to its device, and tells the engine process what has become of them.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import signal
import sys
import threading
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import msgspec

from weft import log as logs
from weft.core.plan import Result
from weft.devices.base import Device
from weft.devices.cores import kernels_of
from weft.errors import DeviceError, WeftError
from weft.ipc.channel import LINGER_SECONDS, Sender
from weft.ipc.ranks import (
    FROM_RANKS,
    Begun,
    Blocks,
    Carry,
    Done,
    End,
    Fits,
    FromRank,
    Lost,
    Opened,
    RankOrders,
    Share,
    ToRank,
    to_rank,
)
from weft.loop.rank_processes import unlink_shared
from weft.loop.worker import Inbox, died

# (orders; is told the phases of the start-up; takes how many KV blocks fit here, and gives how many fit everywhere)
OpenDevice = Callable[[RankOrders, Callable[[str], None], Callable[[int], int]], Device]
PR_SET_PDEATHSIG = 1  # of Linux
log = logging.getLogger(__name__)


def main(open_device: OpenDevice | None = None) -> int:
    """Read the orders, open the device and carry out plans until told to end. open_device: `open_rank`, by default.

    Returns the exit code: 1 after a Lost.
    """
    # The engine process decides when to end, also when a terminal or a service manager signals the whole group.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _go_on_without_parent()
    faulthandler.enable()
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=RankOrders)
    logs.set_up(orders.log_level)
    folder = Path(orders.folder)
    inbox: Inbox[ToRank] = Inbox(folder, sys.stdin.buffer, to_rank(orders.rank), ToRank)
    inbox.tidy = lambda: unlink_shared(orders.meeting.name)
    sender: Sender[FromRank] = Sender(folder, FROM_RANKS)
    device: Device | None = None
    try:
        device = (open_device or open_rank)(
            orders,
            lambda phase: sender.send(Begun(orders.rank, phase)),
            lambda blocks: _agree(Fits(orders.rank, blocks, kernels_of(orders.config)), inbox, sender),
        )
        inbox.wake = device.wake
        sender.send(_opened(orders.rank, device))
        carry(orders.rank, device, inbox, sender)
        return 0
    except Exception as error:  # the one place where a rank dies
        level = logging.DEBUG if isinstance(error, WeftError) else logging.ERROR
        log.log(level, "rank %d died", orders.rank, exc_info=True)
        words = died(error)
        sender.send(Lost(orders.rank, words.error, words.code))
        return 1
    finally:
        sender.close(LINGER_SECONDS)  # first of all: a lane may have to wait for ranks that are gone
        if device is not None:
            device.close()
        inbox.close()


def _go_on_without_parent() -> None:
    """When the parent has ended, a rank that was stopped goes on, so as to see that its orders have ended as well."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)


def carry(rank: int, device: Device, inbox: Inbox[ToRank], sender: Sender[FromRank]) -> None:
    """Until an End comes. Raises what the device died of."""
    parts: dict[tuple[int, str], int] = {}
    while True:
        for message in inbox.take():
            match message:
                case Carry(plan):
                    parts[plan.step, plan.lane.value] = plan.part
                    device.submit(plan)
                case Share(partition):
                    device.set_partition(partition)
                case Blocks():
                    raise DeviceError("the number of blocks was settled before")
                case End():
                    return
        for result in device.poll(None):
            ticket = result.ticket
            part = parts.pop((ticket.step, ticket.lane.value))
            told = result if rank == 0 or result.error is not None else None
            sender.send(Done(rank, ticket.step, part, digest(result), told))


def digest(result: Result) -> int:
    """63 bits of what must be the same on all ranks."""
    drawn = tuple((sampled.sequence, sampled.token) for sampled in result.sampled)
    failed = tuple(sequence for sequence, _ in result.failed)
    same = repr((result.error is None, drawn, failed)).encode()
    return int.from_bytes(blake2b(same, digest_size=8).digest(), "little") >> 1


def open_rank(orders: RankOrders, say: Callable[[str], None], agree: Callable[[int], int]) -> Device:
    """A rank on its part of the CPU, or on a GPU of its own. Raises ConfigError, CheckpointError or DeviceError."""
    say("import torch")
    from weft.devices import rank_opener
    from weft.devices.group import Group

    group = Group(
        rank=orders.rank,
        ranks=orders.ranks,
        neighbours=orders.neighbours,
        name=orders.meeting.name,
        host=orders.meeting.host,
        port=orders.meeting.port,
        bind=orders.bind,
        timeout=orders.config.rank_timeout,
        crowded=orders.crowded,
        agree=agree,
    )
    return rank_opener(orders.config)(orders.config, Path(orders.model), say, group)


def _agree(fits: Fits, inbox: Inbox[ToRank], sender: Sender[FromRank]) -> int:
    """What all ranks have room for, once the engine process has heard of all."""
    sender.send(fits)
    arrived = threading.Event()
    inbox.wake = arrived.set
    while True:
        for message in inbox.take():
            if isinstance(message, Blocks):
                return message.count
            raise DeviceError("the engine does not start")
        arrived.wait()
        arrived.clear()


def _opened(rank: int, device: Device) -> Opened:
    description = device.describe()
    return Opened(
        rank,
        device.capacity(),
        device.lanes(),
        device.partition(),
        device.memory(),
        description.device,
        description.dtype,
        description.kernels,
        description.notes,
    )


if __name__ == "__main__":
    sys.exit(main())
