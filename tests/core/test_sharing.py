"""How two lanes share a device: side by side, by turns, one for both; and the blocks that prefill leaves to decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from weft.core.plan import Lane, Partition, Plan, Regime, Result, Sharing
from weft.core.turns import Turns
from weft.devices.simulated import continuation

VOCABULARY = 50
SPLIT = (Lane.PREFILL, Lane.DECODE)
EVEN = Partition(1, 1)


def right(prompt: Any, count: int) -> list[int]:
    return list(continuation(tuple(prompt), count, VOCABULARY))


def shape(plan: Plan | None) -> list[int]:
    assert plan is not None
    return [len(piece.tokens) for piece in plan.slices]


# -- regimes ---------------------------------------------------------------------------------------------------------


def test_mixed_means_that_the_decode_lane_takes_chunks_of_prompts_along(drive: Any) -> None:
    driver = drive(SPLIT, blocks=64)
    driver.scheduler.share(Sharing(Regime.MIXED, EVEN, chunk=5))
    driver.submit("a", [1, 2, 3], max_tokens=9)
    assert driver.plan(Lane.PREFILL) is None
    assert shape(driver.plan(Lane.DECODE)) == [3]
    driver.land(Lane.DECODE)
    driver.submit("b", range(12), max_tokens=3)
    for wanted in ([1, 4], [1, 4], [1, 4], [1, 1]):  # no more than five in all
        assert shape(driver.plan(Lane.DECODE)) == wanted and driver.plan(Lane.PREFILL) is None
        driver.land(Lane.DECODE)
    driver.drain()
    assert driver.tokens["a", 0] == right([1, 2, 3], 9) and driver.tokens["b", 0] == right(range(12), 3)


def test_a_prompt_with_nobody_to_wait_for_it_is_not_cut_to_the_chunk(drive: Any) -> None:
    driver = drive(SPLIT, blocks=64)
    driver.scheduler.share(Sharing(Regime.MIXED, EVEN, chunk=5))
    driver.submit("a", range(30), max_tokens=2)
    assert shape(driver.plan(Lane.DECODE)) == [30]


def test_a_regime_changes_in_the_middle_of_a_prompt_and_nothing_is_computed_twice(drive: Any) -> None:
    driver = drive(SPLIT, blocks=64, max_num_batched_tokens=8)
    driver.submit("a", range(20), max_tokens=4)
    assert shape(driver.plan(Lane.PREFILL)) == [8]
    driver.scheduler.share(Sharing(Regime.MIXED, EVEN))
    assert driver.plan(Lane.DECODE) is None, "the prompt is in the prefill lane's ticket"
    driver.land(Lane.PREFILL)
    assert driver.plan(Lane.PREFILL) is None and shape(driver.plan(Lane.DECODE)) == [8]
    driver.scheduler.share(Sharing(Regime.SPLIT, EVEN))
    assert driver.plan(Lane.PREFILL) is None
    driver.land(Lane.DECODE)
    assert shape(driver.plan(Lane.PREFILL)) == [4]
    driver.land(Lane.PREFILL)
    driver.drain()
    assert driver.tokens["a", 0] == right(range(20), 4)


def test_turns_let_one_lane_compute_at_a_time_in_proportion_to_the_parts(drive: Any) -> None:
    driver = drive(SPLIT, blocks=500, max_num_batched_tokens=4, max_model_len=900)
    driver.scheduler.share(Sharing(Regime.TURNS, Partition(3, 1)))
    driver.submit("a", [1], max_tokens=400)
    driver.submit("b", range(45), max_tokens=1)
    taken = {Lane.PREFILL: 0.0, Lane.DECODE: 0.0}
    for _ in range(60):
        lanes = [lane for lane in driver.scheduler.order() if driver.plan(lane) is not None]
        assert len(lanes) == 1
        seconds = 0.3 if lanes[0] is Lane.PREFILL else 0.1
        if driver.scheduler.running.prefilling and driver.scheduler.running.decoding:
            taken[lanes[0]] += seconds
        driver.land(lanes[0], lambda result, seconds=seconds: replace(result, seconds=seconds))
    assert taken[Lane.PREFILL] / taken[Lane.DECODE] == pytest.approx(3.0, rel=0.35)
    assert driver.tokens["b", 0] == right(range(45), 1)


# -- steps that are cut at layers ------------------------------------------------------------------------------------


def cut(drive: Any, prompt: Any = range(20), *, layers: int = 4, chunk: int = 5, **given: Any) -> Any:
    """A request that decodes, and a prompt that waits for its first turn."""
    driver = drive(SPLIT, **({"blocks": 64, "layers": layers} | given))
    driver.scheduler.share(Sharing(Regime.TURNS, EVEN, chunk=chunk))
    driver.submit("old", [1, 2], max_tokens=30)
    driver.round()
    driver.submit("new", prompt, max_tokens=3)
    return driver


def a_second(result: Result) -> Result:
    return replace(result, seconds=1.0)


def turn(driver: Any) -> Plan:
    """One turn of whoever has it."""
    for lane in driver.scheduler.order():
        plan = driver.plan(lane)
        if plan is not None:
            assert all(driver.plan(other) is None for other in SPLIT), "one lane at a time"
            driver.land(lane, a_second)
            return plan
    raise AssertionError("nobody has a turn")


def test_a_step_of_prompts_is_cut_at_layers_so_that_decode_gets_its_turns(drive: Any) -> None:
    driver = cut(drive)
    plans = [turn(driver) for _ in range(8)]
    assert [plan.lane for plan in plans] == [Lane.DECODE, Lane.PREFILL] * 4
    parts = [plan for plan in plans if plan.lane is Lane.PREFILL]
    assert [(plan.part, plan.parts, plan.tokens) for plan in parts] == [(part, 4, 20) for part in range(4)]
    assert "new" in {event.request for event in driver.outputs}, "the last part has drawn a token"
    driver.drain()
    assert driver.tokens == {("old", 0): right([1, 2], 30), ("new", 0): right(range(20), 3)}


@pytest.mark.parametrize(
    ("layers", "chunk", "tokens", "shapes"),
    [
        (4, 5, 20, [(20, 4)]),
        (4, 8, 20, [(20, 3)]),  # the work of 6.7 tokens a turn
        (4, 20, 20, [(20, 1)]),
        (2, 5, 20, [(10, 2), (10, 2)]),  # no more parts than layers, so fewer tokens
        (1, 5, 12, [(5, 1), (5, 1), (2, 1)]),  # a device that cannot cut steps
    ],
)
def test_a_turn_has_the_work_of_a_chunk(
    drive: Any, layers: int, chunk: int, tokens: int, shapes: list[tuple[int, int]]
) -> None:
    driver = cut(drive, range(tokens), layers=layers, chunk=chunk)
    while driver.scheduler.running.prefilling or driver.scheduler.running.waiting:
        turn(driver)
    found = [(plan.tokens, plan.parts) for plan in driver.plans if plan.lane is Lane.PREFILL and plan.last]
    assert found[1:] == shapes


def test_a_step_that_nobody_waits_for_is_not_cut(drive: Any) -> None:
    driver = drive(SPLIT, blocks=64, layers=4)
    driver.scheduler.share(Sharing(Regime.TURNS, EVEN, chunk=5))
    driver.submit("new", range(20), max_tokens=3)
    plan = turn(driver)
    assert (plan.tokens, plan.parts) == (20, 1)


@pytest.mark.parametrize("regime", [Regime.SPLIT, Regime.MIXED])
def test_a_step_that_has_begun_goes_on_when_the_regime_changes(drive: Any, regime: Regime) -> None:
    driver = cut(drive)
    while turn(driver).lane is Lane.DECODE:
        pass
    driver.scheduler.share(Sharing(regime, EVEN))
    driver.submit("later", [5, 6], max_tokens=2)
    decode, plan = driver.plan(Lane.DECODE), driver.plan(Lane.PREFILL)
    assert plan is not None and (plan.part, plan.parts) == (1, 4)
    assert shape(decode) == ([1] if regime is Regime.SPLIT else [1, 2]), "beside it, the decode lane does what is its"
    for lane in SPLIT:
        driver.land(lane)
    driver.drain()
    assert driver.tokens["new", 0] == right(range(20), 3) and driver.tokens["later", 0] == right([5, 6], 2)
    assert [plan.part for plan in driver.plans if plan.parts == 4] == [0, 1, 2, 3], "nothing is computed twice"


@pytest.mark.parametrize("how", ["abort", "preempt"])
def test_a_step_that_nobody_wants_any_more_ends_between_its_parts(drive: Any, how: str) -> None:
    driver = cut(drive, enable_prefix_caching=False)
    while turn(driver).lane is Lane.DECODE:
        pass
    held = driver.pool.held
    if how == "abort":
        driver.abort("new")
    else:
        driver.scheduler.preempt("new")
    assert (driver.pool.held, driver.pool.pinned) == (held - 5, 0), "nothing is in flight, so nothing is pinned"
    driver.drain()
    assert driver.tokens["old", 0] == right([1, 2], 30)
    if how == "preempt":
        assert driver.tokens["new", 0] == right(range(20), 3)


def test_a_step_goes_on_for_those_who_still_want_it_and_keeps_the_blocks_of_the_others(drive: Any) -> None:
    driver = cut(drive, range(10), enable_prefix_caching=False)
    driver.submit("gone", range(40, 50), max_tokens=2)
    while turn(driver).lane is Lane.DECODE:
        pass
    driver.abort("gone")
    assert driver.pool.pinned == 3
    driver.drain()
    assert driver.tokens["new", 0] == right(range(10), 3) and driver.pool.free == 64


def test_a_lost_step_of_one_lane_ends_a_request_whose_other_half_waits_between_two_parts(drive: Any) -> None:
    driver = drive(SPLIT, blocks=64, layers=4)
    driver.scheduler.share(Sharing(Regime.TURNS, EVEN, chunk=1))
    driver.submit("twins", range(20), max_tokens=20, n=2)
    # The second finds 16 tokens in the cache; the rest is cut.
    while not driver.scheduler.inflight.paused(Lane.PREFILL):
        turn(driver)
    plan = driver.plan(Lane.DECODE)
    driver.hear(driver.scheduler.lose(plan.step, "it hangs", driver.now))
    assert driver.ends["twins"].error == "it hangs" and not driver.scheduler.inflight.paused(Lane.PREFILL)
    driver.land(Lane.DECODE)
    assert (driver.pool.held, driver.pool.pinned) == (0, 0)


@pytest.mark.parametrize("fault", ["failed", "one failed", "lost"])
def test_a_part_that_fails_ends_its_requests_and_the_other_lane_goes_on(drive: Any, fault: str) -> None:
    driver = cut(drive, range(10))
    driver.submit("beside", range(40, 50), max_tokens=2)
    while driver.plan(Lane.PREFILL) is None:
        driver.plan(Lane.DECODE)
        driver.land(Lane.DECODE, a_second)
    plan = driver.plans[-1]
    assert (plan.part, plan.parts) == (0, 4)
    if fault == "lost":
        driver.hear(driver.scheduler.lose(plan.step, "it hangs", driver.now))
        assert driver.scheduler.retire(Lane.PREFILL) and shape(driver.plan(Lane.DECODE)) == [1]
        driver.land(Lane.DECODE)
        driver.land(Lane.PREFILL)  # late; nobody waits for the other parts
        assert not driver.scheduler.inflight
    elif fault == "failed":
        driver.fail(Lane.PREFILL)
    else:
        driver.land(Lane.PREFILL, lambda result: replace(result, failed=((plan.slices[0].sequence, "NaN"),)))
    driver.drain()
    assert driver.ends["new"].code == "step_failed" and driver.tokens["old", 0] == right([1, 2], 30)
    if fault == "one failed":
        assert driver.tokens["beside", 0] == right(range(40, 50), 2)
    else:
        assert driver.ends["beside"].code == "step_failed"


def test_the_pace_of_prompts_counts_all_parts(drive: Any) -> None:
    driver = cut(drive)
    for _ in range(8):
        turn(driver)
    assert driver.scheduler.planner.pace.decode_steps(20) == 4, "20 tokens took 4 seconds, a decode step takes one"


def test_an_internal_error_between_two_parts_leaves_nothing_in_flight(drive: Any) -> None:
    driver = cut(drive)
    while turn(driver).lane is Lane.DECODE:
        pass
    driver.hear(driver.scheduler.recover("a bug", driver.now))
    assert not driver.scheduler.inflight and driver.pool.free == 64
    driver.submit("next", range(9), max_tokens=2)
    driver.drain()
    assert driver.tokens["next", 0] == right(range(9), 2)


# -- turns and lanes that are gone -----------------------------------------------------------------------------------


def test_a_lane_that_had_nothing_to_do_gets_no_credit_for_it() -> None:
    turns = Turns(EVEN)
    for _ in range(100):
        turns.used(Lane.DECODE, 1.0)
    turns.used(Lane.PREFILL, 1.0)
    assert turns.order()[0] is Lane.DECODE, "one turn each from here on, not a hundred"


def test_a_lost_step_keeps_no_turn(drive: Any) -> None:
    driver = drive(SPLIT, blocks=64)
    driver.scheduler.share(Sharing(Regime.TURNS, EVEN))
    driver.submit("a", [1], max_tokens=5)
    driver.round()
    driver.submit("b", range(9), max_tokens=1)
    plan = driver.plan(Lane.PREFILL)
    assert plan is not None and driver.plan(Lane.DECODE) is None
    driver.hear(driver.scheduler.lose(plan.step, "it hangs", driver.now))
    assert driver.ends["b"].code == "step_failed" and driver.plan(Lane.DECODE) is not None


@pytest.mark.parametrize("dead", SPLIT)
def test_one_lane_does_the_work_of_both_when_the_other_is_gone_and_until_it_is_back(drive: Any, dead: Lane) -> None:
    driver = drive(SPLIT, blocks=64)
    left = SPLIT[1 - SPLIT.index(dead)]
    driver.submit("lost", range(9), max_tokens=9)
    if dead is Lane.DECODE:
        driver.round()
    plan = driver.plan(dead)
    assert plan is not None
    driver.hear(driver.scheduler.lose(plan.step, "it hangs", driver.now))
    assert driver.scheduler.retire(dead)
    driver.submit("a", [1, 2], max_tokens=4)
    for _ in range(2):
        assert driver.plan(left) is not None and driver.plan(dead) is None
        driver.land(left)
    # In flight on the lane that is left, when the other one comes back after all.
    assert shape(driver.plan(left)) == [1]
    driver.land(dead)
    assert driver.plan(dead) is None, "its sequence is in the other lane's ticket"
    driver.land(left)
    assert driver.plan(Lane.PREFILL) is None and shape(driver.plan(Lane.DECODE)) == [1]
    driver.land(Lane.DECODE)
    driver.drain()
    assert driver.tokens["a", 0] == right([1, 2], 4)


def test_nothing_is_left_when_both_lanes_are_gone(drive: Any) -> None:
    driver = drive(SPLIT)
    assert driver.scheduler.retire(Lane.PREFILL) and not driver.scheduler.retire(Lane.DECODE)
    driver.submit("a", [1], max_tokens=4)
    assert driver.plan(Lane.PREFILL) is None and driver.plan(Lane.DECODE) is None


def test_shortest_first_lets_waiting_make_up_for_size(drive: Any) -> None:
    driver = drive(SPLIT, blocks=200, max_num_batched_tokens=8, max_num_seqs=1)
    driver.scheduler.share(Sharing(Regime.SPLIT, EVEN, size_weight=0.1))
    driver.submit("running", [1], max_tokens=1)
    driver.plan(Lane.PREFILL)
    driver.submit("long", range(40), max_tokens=1)  # put back by 4 seconds
    driver.now = 3.0
    driver.submit("short", [7, 8], max_tokens=1)  # 3.2
    driver.now = 5.0
    driver.submit("late", [9], max_tokens=1)  # 5.1: the long one has waited enough
    driver.land(Lane.PREFILL)
    driver.drain()
    assert list(driver.ends) == ["running", "short", "long", "late"]


# -- blocks that prefill leaves to decode ----------------------------------------------------------------------------


def decode_steps_during_a_prefill(driver: Any, prompt: int = 28) -> int:
    """How many of 14 decode steps have all three sequences, while a long prompt is computed in one prefill step."""
    for index in range(3):
        driver.submit(f"old{index}", [index, 1], max_tokens=36)
    driver.plan(Lane.PREFILL)
    driver.land(Lane.PREFILL, lambda result: replace(result, seconds=0.6))
    # The pace is known: 0.1 seconds for a token of a prompt, 0.2 seconds for a decode step.
    driver.plan(Lane.DECODE)
    driver.land(Lane.DECODE, lambda result: replace(result, seconds=0.2))
    if prompt:
        driver.submit("new", range(prompt), max_tokens=4)
    started = driver.plan(Lane.PREFILL)  # 2.8 seconds, 14 decode steps; None when it has to wait
    taken = 0
    for _ in range(14):
        plan = driver.plan(Lane.DECODE)
        if plan is not None:
            driver.land(Lane.DECODE, lambda result: replace(result, seconds=0.2))
        taken += plan is not None and len(plan.slices) == 3
    if started is not None:
        driver.land(Lane.PREFILL, lambda result: replace(result, seconds=2.8))
    driver.drain()
    assert not prompt or driver.tokens["new", 0] == right(range(prompt), 4)
    assert all(driver.tokens[f"old{index}", 0] == right([index, 1], 36) for index in range(3))
    return taken


@pytest.mark.parametrize("blocks", [40, 30, 24, 20])
def test_a_prompt_costs_decode_no_step_in_a_tight_pool(drive: Any, blocks: int) -> None:
    pool = {"blocks": blocks, "block_size": 2, "enable_prefix_caching": False}
    with_prompt, without = drive(SPLIT, **pool), drive(SPLIT, **pool)
    assert decode_steps_during_a_prefill(with_prompt) == decode_steps_during_a_prefill(without, prompt=0) > 8


def test_without_the_lease_decode_stands_still(drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = drive(SPLIT, blocks=30, block_size=2, enable_prefix_caching=False)
    monkeypatch.setattr(driver.scheduler.planner.pace, "decode_steps", lambda tokens: 1)
    assert decode_steps_during_a_prefill(driver) < 14


def test_decode_does_not_wait_for_blocks_that_a_lost_step_keeps(drive: Any) -> None:
    """What a step in flight names comes back soon, and decode waits for it; what a lost one names may never come."""
    driver = drive(SPLIT, blocks=10, enable_prefix_caching=False)
    for name in ("a", "b"):
        driver.submit(name, [ord(name) % 50] * 6, max_tokens=12)
    driver.round()
    driver.submit("hangs", range(8), max_tokens=2)
    plan = driver.plan(Lane.PREFILL)
    assert plan is not None and driver.pool.held == 6
    driver.hear(driver.scheduler.lose(plan.step, "it hangs", driver.now))
    driver.scheduler.retire(Lane.PREFILL)
    assert driver.pool.pinned == 2
    for _ in range(40):
        if driver.scheduler.live:
            assert driver.plan(Lane.DECODE) is not None, "the pool is full, and somebody can be preempted"
            driver.land(Lane.DECODE)
    assert driver.tokens["a", 0] == right([ord("a") % 50] * 6, 12) and driver.tokens["b", 0] == right(
        [ord("b") % 50] * 6, 12
    )
    assert driver.scheduler.running.preemptions >= 1
