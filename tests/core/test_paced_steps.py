"""Mixed steps as long as the answers beside them have time for: their tokens keep a pace in the mean."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.core.plan import Lane, Partition, Plan, Regime, Sharing, StepLaw
from weft.core.planner import SPEND
from weft.devices.simulated import continuation

SPLIT = (Lane.PREFILL, Lane.DECODE)
COST = StepLaw(fixed=0.5, token=0.1, slot=0.001)
PACED = Sharing(Regime.MIXED, Partition(1, 1), chunk=16, tpot=2.0)
LEAST = 4  # a quarter of the chunk


def seconds(plan: Plan, cost: StepLaw = COST) -> float:
    prompts = [piece for piece in plan.slices if len(piece.tokens) > 1]
    attended = cost.read * sum(piece.end for piece in prompts)
    attended += cost.pair * sum(len(piece.tokens) * (piece.start + piece.end + 1) / 2 for piece in prompts)
    return cost.fixed + cost.token * plan.tokens + cost.slot * sum(piece.end for piece in plan.slices) + attended


def begun(drive: Any, tokens: int, each: float) -> Any:
    """A request with one token at 0.0 and then so many more, a step of `each` seconds for each of them."""
    driver = drive(SPLIT, blocks=400, max_tokens=1000, max_num_batched_tokens=1000, max_model_len=900)
    driver.scheduler.share(PACED, COST)
    driver.submit("a", [1, 2, 3], max_tokens=800)
    for step in range(1 + tokens):
        driver.plan(Lane.DECODE)
        driver.now = step * each
        driver.land(Lane.DECODE)
    driver.submit("b", [7] * 500, max_tokens=2)
    return driver


@pytest.mark.parametrize(("tokens", "each"), [(0, 0.0), (4, 1.0), (30, 0.7), (3, 2.0)])
def test_a_step_takes_what_the_answer_has_saved_and_the_time_of_one_token(drive: Any, tokens: int, each: float) -> None:
    driver = begun(drive, tokens, each)
    plan = driver.plan(Lane.DECODE)
    left = PACED.tpot * (tokens + 1) - tokens * each  # until its next token is due
    assert seconds(plan) <= SPEND * left < seconds(plan) + COST.token + COST.slot, "and one token more would not fit"


def test_a_part_of_a_long_prompt_costs_what_it_attends_to(drive: Any) -> None:
    """So that the parts get shorter, and each step is as long as it may be."""
    cost, driver = StepLaw(0.1, 0.02, 1e-4, read=1e-3, pair=2e-4), begun(drive, 0, 0.0)
    driver.scheduler.share(PACED, cost)
    lengths = []
    while len(lengths) < 8:
        plan = driver.plan(Lane.DECODE)
        assert 0.95 * SPEND * PACED.tpot < seconds(plan, cost) <= SPEND * PACED.tpot
        lengths.append(plan.tokens - 1)
        driver.now += PACED.tpot  # nothing is saved
        driver.land(Lane.DECODE)
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > 2 * lengths[-1]


def test_an_answer_that_is_behind_catches_up_while_prompts_get_their_least(drive: Any) -> None:
    driver = begun(drive, 6, 3.0)
    shapes = []
    for _ in range(12):
        plan = driver.plan(Lane.DECODE)
        shapes.append(plan.tokens - 1)
        driver.now += seconds(plan)
        driver.land(Lane.DECODE)
    assert shapes[0] == LEAST and shapes[-1] > LEAST
    taken = driver.now / (len(driver.tokens["a", 0]) - 1)
    assert taken <= PACED.tpot


def test_an_answer_that_is_far_behind_keeps_the_pace_from_now_on(drive: Any) -> None:
    driver = begun(drive, 6, 0.1)
    driver.now += 100.0
    for _ in range(5):
        plan = driver.plan(Lane.DECODE)
        assert seconds(plan) <= SPEND * PACED.tpot < seconds(plan) + COST.token + COST.slot
        driver.now += seconds(plan)
        driver.land(Lane.DECODE)


def test_the_answer_that_has_saved_least_counts(drive: Any) -> None:
    driver = begun(drive, 10, 0.6)
    alone = driver.plan(Lane.DECODE).tokens
    driver = begun(drive, 10, 0.6)
    driver.submit("new", [9], max_tokens=9, priority=-1)
    plan = driver.plan(Lane.DECODE)
    driver.land(Lane.DECODE)
    assert driver.tokens["new", 0], "it has its first token now"
    assert plan.tokens == alone > 100 and driver.plan(Lane.DECODE).tokens < 20


def test_without_a_cost_the_chunk_holds(drive: Any) -> None:
    driver = begun(drive, 40, 0.6)
    driver.scheduler.share(PACED)
    assert driver.plan(Lane.DECODE).tokens == PACED.chunk


@pytest.mark.parametrize(
    ("fixed", "prompts", "shapes"),
    [
        (0.25, [30, 30], [30]),  # eight times the fixed cost are 20 tokens: nobody waits for the second prompt
        (0.25, [12, 12, 12], [12, 12]),
        (2.0, [30, 30], [30, 30]),
        (0.0, [1, 30], [1]),
    ],
)
def test_a_step_that_is_worth_its_cost_ends_with_a_prompt(
    drive: Any, fixed: float, prompts: list[int], shapes: list[int]
) -> None:
    driver = drive(SPLIT, blocks=400, max_num_batched_tokens=100)
    driver.scheduler.share(PACED, StepLaw(fixed, 0.1, 0.0))
    for number, length in enumerate(prompts):
        driver.submit(str(number), [number] * length, max_tokens=3)
    assert [len(piece.tokens) for piece in driver.plan(Lane.DECODE).slices] == shapes
    driver.land(Lane.DECODE)
    driver.drain()
    assert all(driver.tokens[str(i), 0] == list(continuation((i,) * n, 3, 50)) for i, n in enumerate(prompts))


asks = st.lists(st.tuples(st.floats(0, 60), st.integers(1, 120), st.integers(2, 40)), min_size=1, max_size=12)
QUICK = StepLaw(fixed=0.5, token=0.02, slot=0.0002)


@given(asks=asks, errs=st.lists(st.floats(0.7, 1.0 / SPEND), min_size=1, max_size=7))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_answer_keeps_the_pace_on_a_device_that_errs(drive: Any, asks: Any, errs: list[float]) -> None:
    """Twelve that decode and the least of a prompt take 1.3 s with the greatest error, so that the pace can be kept;
    then it is, by every answer, and prompts and tokens are what they should be."""
    driver = drive(SPLIT, blocks=900, max_num_seqs=12, max_tokens=300, max_num_batched_tokens=300)
    driver.scheduler.share(PACED, QUICK)
    began: dict[str, float] = {}
    ended: dict[str, float] = {}
    asks, at = sorted(asks), 0
    while len(ended) < len(asks):
        while at < len(asks) and (asks[at][0] <= driver.now or not driver.scheduler.live):
            driver.now = max(driver.now, asks[at][0])
            driver.submit(str(at), [at] * asks[at][1], max_tokens=asks[at][2], ignore_eos=True)
            at += 1
        plan = driver.plan(Lane.DECODE)
        assert plan is not None
        driver.now += seconds(plan, QUICK) * errs[plan.step % len(errs)]
        driver.land(Lane.DECODE)
        for name in driver.ends.keys() - ended.keys():
            ended[name] = driver.now
        for name, _ in driver.tokens:
            began.setdefault(name, driver.now)
    for number, (_, prompt, output) in enumerate(asks):
        name = str(number)
        assert driver.tokens[name, 0] == list(continuation((number,) * prompt, output, 50))
        assert ended[name] - began[name] <= PACED.tpot * (output - 1) * (1 + 1e-9)
