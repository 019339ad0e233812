"""Phases with pools of their own, as PD disaggregation has them: the hand-over, and who waits for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from weft.core.plan import Capacity, Lane, Partition, Regime, Sharing
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices.simulated import continuation

VOCABULARY = 50
SPLIT = (Lane.PREFILL, Lane.DECODE)
BORDER = 8  # of 16 blocks with 4 slots


def right(prompt: Any, count: int) -> list[int]:
    return list(continuation(tuple(prompt), count, VOCABULARY))


def apart(drive: Any, **given: Any) -> Any:
    return drive(SPLIT, **({"blocks": 16, "decode_blocks": 16 - BORDER, "max_model_len": 32} | given))


def prefilled(driver: Any, name: str, prompt: Any, count: int) -> None:
    driver.submit(name, prompt, max_tokens=count)
    driver.plan(Lane.PREFILL)
    driver.land(Lane.PREFILL)
    assert len(driver.tokens[name, 0]) == 1


def test_the_first_decode_step_copies_what_prefill_has_written_and_the_blocks_go_back_when_it_has(drive: Any) -> None:
    driver = apart(drive, enable_prefix_caching=False)
    prefilled(driver, "a", range(9), 4)
    plan = driver.plan(Lane.DECODE)
    (piece,) = plan.slices
    assert len(piece.source) == 3 and all(block < BORDER for block in piece.source)
    assert len(piece.blocks) == 3 and all(block >= BORDER for block in piece.blocks)
    assert (driver.pool.held, driver.pool.pinned) == (3, 3), "the source is this step's alone"
    driver.land(Lane.DECODE)
    assert (driver.pool.held, driver.pool.pinned) == (3, 0)
    assert driver.plan(Lane.DECODE).slices[0].source == (), "once"
    driver.land(Lane.DECODE)
    driver.drain()
    assert driver.tokens["a", 0] == right(range(9), 4)


def test_a_hand_over_waits_for_room_in_the_decode_pool_and_nobody_passes_it(drive: Any) -> None:
    driver = apart(drive, enable_prefix_caching=False)
    prefilled(driver, "first", range(20), 10)  # 6 of the 8 blocks
    driver.plan(Lane.DECODE)
    driver.land(Lane.DECODE)
    prefilled(driver, "large", range(10, 20), 3)
    prefilled(driver, "small", [1], 3)
    held = driver.pool.held
    for _ in range(8):
        assert [len(piece.tokens) for piece in driver.plan(Lane.DECODE).slices] == [1], "the first one, alone"
        driver.land(Lane.DECODE)
    assert "first" in driver.ends and held == 6 + 3 + 1, "their prompts stay where they are meanwhile"
    assert [bool(piece.source) for piece in driver.plan(Lane.DECODE).slices] == [True, True]
    driver.land(Lane.DECODE)
    driver.drain()
    assert driver.tokens["large", 0] == right(range(10, 20), 3) and driver.tokens["small", 0] == right([1], 3)


def test_prompts_are_computed_while_decode_has_no_room(drive: Any) -> None:
    """Decode's growth needs no blocks of the prefill pool, so no prompt waits for it."""
    driver = apart(drive, enable_prefix_caching=False)
    prefilled(driver, "first", range(26), 5)  # 7 of the 8
    driver.plan(Lane.DECODE)
    driver.land(Lane.DECODE)
    for number in range(4):
        prefilled(driver, f"r{number}", [number] * 8, 2)
    assert driver.pool.available == 0, "all of the prefill pool"
    driver.drain()
    assert driver.tokens["r3", 0] == right([3] * 8, 2)


@pytest.mark.parametrize("how", ["abort", "preempt", "fail"])
def test_what_a_step_copies_stays_until_it_has_landed_whatever_becomes_of_the_sequence(drive: Any, how: str) -> None:
    driver = apart(drive, enable_prefix_caching=False)
    prefilled(driver, "a", range(9), 4)
    source = driver.plan(Lane.DECODE).slices[0].source
    if how == "abort":
        driver.abort("a")
    elif how == "preempt":
        driver.scheduler.preempt("a")
    taken = driver.pool.take(driver.pool.available)
    assert not set(source) & set(taken)
    driver.pool.release(taken)
    if how == "fail":
        driver.fail(Lane.DECODE)
    else:
        driver.land(Lane.DECODE)
    driver.drain()
    assert driver.pool.free == 16
    if how == "preempt":
        assert driver.tokens["a", 0] == right(range(9), 4)


def test_decode_takes_blocks_from_those_that_decode_and_they_start_again_in_the_prefill_pool(drive: Any) -> None:
    driver = apart(drive, blocks=17, decode_blocks=8)
    for name in ("a", "b"):
        prefilled(driver, name, [ord(name) % 50] * 10, 14)
    driver.drain()
    assert driver.scheduler.running.preemptions >= 1
    again = [plan for plan in driver.plans if plan.lane is Lane.PREFILL][2:]
    assert again and all(block < 9 for plan in again for piece in plan.slices for block in piece.blocks)
    assert all(piece.start >= 8 for plan in again for piece in plan.slices), "the prefix cache has kept the prompt"
    for name in ("a", "b"):
        assert driver.tokens[name, 0] == right([ord(name) % 50] * 10, 14)


def test_the_prefix_cache_is_the_prefill_pools(drive: Any) -> None:
    driver = apart(drive)
    prefilled(driver, "a", range(9), 12)
    for _ in range(11):
        driver.plan(Lane.DECODE)
        driver.land(Lane.DECODE)
    assert (driver.pool.cached, driver.pool.decode_available) == (2, 8), "nothing of the answer"
    prefilled(driver, "b", range(9), 3)
    assert driver.plans[-1].slices[0].start == 8
    driver.drain()
    assert driver.tokens["b", 0] == right(range(9), 3)


@pytest.mark.parametrize("regime", list(Regime))
def test_tokens_are_those_of_one_mixed_lane_whatever_the_regime(drive: Any, regime: Regime) -> None:
    found = []
    for driver in (drive(), apart(drive)):
        if driver.lanes == SPLIT:
            driver.scheduler.share(Sharing(regime, Partition(1, 1), chunk=4))
        for number in range(7):
            driver.submit(f"r{number}", range(number, number + 3 * number + 1), max_tokens=4 + number, n=1 + number % 2)
            driver.round()
        driver.drain()
        found.append(driver.tokens)
    assert found[0] == found[1]


def test_pools_that_cannot_hold_the_longest_sequence_are_refused() -> None:
    capacity = Capacity(16, 4, 64, 16, 2, 32, VOCABULARY, decode_blocks=8)
    Scheduler(capacity, SPLIT, SchedulerSettings(8, 32))
    for decode in (7, 9):
        with pytest.raises(ValueError, match="hold 32 tokens"):
            Scheduler(replace(capacity, decode_blocks=decode), SPLIT, SchedulerSettings(8, 32))
