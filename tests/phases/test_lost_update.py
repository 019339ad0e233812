"""The lost update of semi-PD's Fig. 7, step by step: two phases that query, take and update a pool on their own.

100 blocks, 50 in use; one phase takes 21, the other 10. Of the paper's allocator only the order of events matters, so
the interleaving is played by hand, with generators in place of processes. weft has one owner of all blocks, and its
lanes only ever see plans, so the same moves in the same order cannot lose anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from weft.core.blocks import BlockPool
from weft.core.plan import Capacity, Lane
from weft.core.request import Request
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices.simulated import ManualDevice, continuation

VOCABULARY = 50


class WrongPool:
    """What two asynchronous workers share in the paper's example: a list of free blocks and a counter, no owner."""

    def __init__(self, total: int, used: int) -> None:
        self.total = total
        self.used = used
        self.free = list(range(used, total))

    def grab(self, count: int) -> Iterator[tuple[int, ...]]:
        """Query, take, update, with a stop after each, where the other worker may come in between."""
        used = self.used
        free = list(self.free)
        yield ()
        taken, rest = free[:count], free[count:]
        yield ()
        self.used = used + count
        self.free = rest
        yield tuple(taken)


def play(pool: WrongPool, order: str) -> dict[str, tuple[int, ...]]:
    """p and d grab 21 and 10 blocks, one step at a time, in the given order."""
    workers = {"p": pool.grab(21), "d": pool.grab(10)}
    return {name: got for name in order for got in [next(workers[name])] if got}


def test_the_wrong_pool_is_right_when_nobody_comes_in_between() -> None:
    pool = WrongPool(100, 50)
    got = play(pool, "pppddd")
    assert pool.used == 81 and len(pool.free) == 19 and not set(got["p"]) & set(got["d"])


@pytest.mark.parametrize(("order", "counted"), [("pdpdpd", 60), ("dpdpdp", 71), ("pdddpp", 71), ("dpppdd", 60)])
def test_the_wrong_pool_loses_an_update_and_gives_a_block_to_both(order: str, counted: int) -> None:
    pool = WrongPool(100, 50)
    got = play(pool, order)
    assert pool.used == counted, "the paper's 60 or 71 instead of 81"
    assert set(got["p"]) & set(got["d"]), "two sequences now write to the same KV slots"


@pytest.mark.parametrize("order", ["".join(one) for one in product("pd", repeat=6) if one.count("p") == 3])
def test_one_owner_loses_nothing_in_any_order(order: str) -> None:
    """The same three moves of each phase: to ask what there is, to take, to look again."""
    pool = BlockPool(100, lambda block: None)
    pool.take(50)
    taken: dict[str, tuple[int, ...]] = {}
    moves = {"p": 0, "d": 0}
    for name in order:
        if moves[name] == 1:
            taken[name] = pool.take(21 if name == "p" else 10)
        assert pool.available == 50 - sum(map(len, taken.values()))
        moves[name] += 1
    assert pool.held == 81 and not set(taken["p"]) & set(taken["d"])
    pool.check()


@pytest.mark.parametrize("order", ["pdPD", "pdDP", "dpPD", "dpDP"])
def test_two_lanes_that_plan_and_land_in_any_order_share_no_block(order: str) -> None:
    """Lower case: a lane gets its plan, and takes blocks for it. Upper case: its result lands."""
    capacity = Capacity(100, 4, 512, 16, 2, 300, VOCABULARY)
    lanes = (Lane.PREFILL, Lane.DECODE)
    scheduler = Scheduler(capacity, lanes, SchedulerSettings(16, 512, enable_prefix_caching=False), key=b"k" * 16)
    device = ManualDevice(capacity, lanes)
    told: dict[str, list[int]] = {"old": [], "new": []}

    def move(letter: str) -> None:
        lane = Lane.PREFILL if letter in "pP" else Lane.DECODE
        if letter.islower():
            plan = scheduler.schedule(lane, 0.0)
            if plan is not None:
                device.submit(plan)
        elif device.run(lane):
            (result,) = device.poll(0.0)
            hear(scheduler.complete(result, 0.0))

    def hear(events: list[Any]) -> None:
        for event in events:
            if getattr(event, "token", None) is not None:
                told[event.request].append(event.token)

    prompts = {"old": tuple(range(40)), "new": tuple(range(5, 45)) + tuple(range(43))}
    scheduler.submit(Request("old", prompts["old"], SamplingParams(max_tokens=60)), 0.0)
    move("p")
    move("P")
    scheduler.submit(Request("new", prompts["new"], SamplingParams(max_tokens=60)), 0.0)
    for _ in range(200):
        for letter in order:
            move(letter)
            scheduler.pool.check()
            # The counter is what the tables say: no block twice, none forgotten.
            running = scheduler.running
            tables = [one.table for line in (running.prefilling, running.decoding) for one in line]
            blocks = [block for table in tables for block in table]
            assert scheduler.pool.held == len(blocks) == len(set(blocks))
    for name, prompt in prompts.items():
        assert tuple(told[name]) == continuation(prompt, 60, VOCABULARY)
    assert scheduler.pool.free == 100
