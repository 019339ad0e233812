"""A rank's process around a simulated device: `python stub_rank.py`. Rank 1 has the faults that the model's name and
the first token of a plan ask for."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from weft.core.plan import Capacity, Partition, Plan, Result, Ticket
from weft.devices.base import Device
from weft.devices.simulated import SimulatedDevice
from weft.errors import CheckpointError, RankLost
from weft.ipc.ranks import RankOrders
from weft.loop import rank
from weft.loop.rank import main

KILLED, HANGS, FAILS, ALL_FAIL, OTHER_TOKENS, RAISES, SHARES = range(1, 8)


class StubDevice(SimulatedDevice):
    """Faults by the first token of the first slice. SHARES: it samples the number of its prefill lane's shares."""

    def __init__(self, rank: int, capacity: Capacity, partition: Partition | None) -> None:
        super().__init__(capacity, partition)
        self.rank = rank
        self.kinds: dict[int, int] = {}

    def submit(self, plan: Plan) -> Ticket:
        kind = self.kinds[plan.step] = plan.slices[0].tokens[0]
        if self.rank == 1 and kind == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.rank == 1 and kind == HANGS:
            time.sleep(60)
        return super().submit(plan)

    def poll(self, timeout: float | None) -> list[Result]:
        return [self._spoilt(result) for result in super().poll(timeout)]

    def _spoilt(self, result: Result) -> Result:
        kind = self.kinds[result.ticket.step]
        if kind == ALL_FAIL or (kind == FAILS and self.rank == 1):
            return Result(result.ticket, error=f"rank {self.rank} stumbled")
        if kind == RAISES and self.rank == 0:
            raise RankLost("seam 9: rank 1 did not come within 1 s")
        if kind == OTHER_TOKENS and self.rank == 1:
            return replace(result, sampled=tuple(one._replace(token=one.token ^ 1) for one in result.sampled))
        if kind == SHARES:
            shares = self.partition()
            token = 0 if shares is None else shares.prefill
            return replace(result, sampled=tuple(one._replace(token=token) for one in result.sampled))
        return result


def open_stub(orders: RankOrders, say: Callable[[str], None], agree: Callable[[int], int]) -> Device:
    say(f"phase of rank {orders.rank}")
    if orders.rank == 1 and orders.model == "broken":
        raise CheckpointError("model.safetensors is cut short")
    if orders.rank == 1 and orders.model == "gone":
        os._exit(7)
    if orders.model in ("meets", "waits"):
        meet(orders)
    if orders.rank == 1 and orders.model == "slow":
        time.sleep(1)
    if orders.rank == 1 and orders.model == "stuck":
        time.sleep(60)
    if orders.rank == 1 and orders.model == "other kernels":
        rank.kernels_of = lambda _config: "portable"
    blocks = agree(40 + 10 * orders.rank)
    shares = Partition(1, 3) if orders.model == "two lanes" else None
    return StubDevice(orders.rank, Capacity(blocks, 16, 64, 4, 4 if shares else 1, 128, 4096), shares)


def meet(orders: RankOrders) -> None:
    """Rank 0 has made what the ranks are to share, and waits there; rank 1 ends, or never comes."""
    shared = Path("/dev/shm", f"{orders.meeting.name}-stub")
    if orders.rank == 0:
        shared.touch()
    if orders.rank == 0 or orders.model == "waits":
        time.sleep(60)
    while not shared.exists():
        time.sleep(0.01)
    os._exit(7)


if __name__ == "__main__":
    sys.exit(main(open_stub))
