"""The scheduler's decisions one by one; test_scheduler_machine.py has them in every order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from weft.core.inflight import UnknownTicket
from weft.core.plan import Lane, Plan, Result, Sampled, Ticket
from weft.core.request import Finish, PromptScores, RequestEnd, TokenOutput
from weft.core.sequence import Line
from weft.devices.simulated import continuation, oracle
from weft.errors import ContextTooLong, InvalidRequest, NeverFits, QueueFull

VOCABULARY = 50
SPLIT = (Lane.PREFILL, Lane.DECODE)


def right(prompt: Any, count: int) -> list[int]:
    return list(continuation(tuple(prompt), count, VOCABULARY))


def shape(plan: Plan | None) -> list[tuple[int, int, bool]]:
    """(start, tokens, whether it samples) of each slice."""
    assert plan is not None
    return [(piece.start, len(piece.tokens), piece.sample is not None) for piece in plan.slices]


# -- what killed others ----------------------------------------------------------------------------------------------


def test_a_prompt_larger_than_the_pool_is_refused_at_once(drive: Any) -> None:
    driver = drive(blocks=4, block_size=4)
    with pytest.raises(NeverFits, match="5 KV blocks of 4 slots, and the pool has 4"):
        driver.submit("r", [1] * 16)
    driver.submit("fits", [1] * 15, max_tokens=1)
    driver.drain()
    assert driver.tokens["fits", 0] == right([1] * 15, 1)


def test_a_sequence_that_outgrows_the_pool_ends_with_an_error_and_the_others_go_on(drive: Any) -> None:
    driver = drive(blocks=4, block_size=4)
    driver.submit("grows", [1, 2, 3], max_tokens=100)
    driver.submit("small", [4, 5, 6], max_tokens=6)
    driver.drain()
    end = driver.ends["grows"]
    assert (end.reason, end.code) == (Finish.ERROR, "request_too_large")
    assert "5 KV blocks" in end.error and "has 4" in end.error and "--num-blocks" in end.error
    # It got everything that the pool can hold, and the token that follows.
    assert driver.tokens["grows", 0] == right([1, 2, 3], 14)
    assert driver.tokens["small", 0] == right([4, 5, 6], 6) and driver.ends["small"].reason is Finish.LENGTH


def test_an_impossible_request_is_refused_and_leaves_nothing_behind(drive: Any) -> None:
    driver = drive(max_model_len=10)
    with pytest.raises(ContextTooLong):
        driver.submit("r", range(10))
    with pytest.raises(InvalidRequest, match="empty"):
        driver.submit("r", ())
    with pytest.raises(InvalidRequest, match="token ids must be"):
        driver.submit("r", [VOCABULARY])
    assert driver.scheduler.live == driver.scheduler.waiting == driver.scheduler.admission.queued == 0
    assert driver.plan() is None


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("lanes", [(Lane.MIXED,), SPLIT])
def test_two_sequences_that_together_exceed_the_pool_both_finish(drive: Any, lanes: Any, caching: bool) -> None:
    driver = drive(lanes, blocks=8, block_size=4, enable_prefix_caching=caching)
    driver.submit("older", [1, 2, 3], max_tokens=28)
    driver.submit("newer", [4, 5, 6], max_tokens=28)
    driver.drain()
    assert driver.tokens["older", 0] == right([1, 2, 3], 28) and driver.tokens["newer", 0] == right([4, 5, 6], 28)
    assert driver.ends["older"].preemptions == 0, "the most urgent one is never preempted"
    assert driver.ends["newer"].preemptions > 0


def test_max_tokens_of_any_size_means_up_to_the_context(drive: Any) -> None:
    driver = drive(max_model_len=12)
    driver.submit("most", [1, 2], max_tokens=2**31 - 1, ignore_eos=True)
    driver.submit("none", [1, 2], max_tokens=None, ignore_eos=True)
    driver.drain()
    for name in ("most", "none"):
        assert driver.tokens[name, 0] == right([1, 2], 10) and driver.ends[name].reason is Finish.LENGTH


# -- plans -----------------------------------------------------------------------------------------------------------


def test_decode_comes_first_and_prompts_are_cut_to_the_budget(drive: Any) -> None:
    driver = drive(max_num_batched_tokens=8)
    driver.submit("a", [1, 2, 3], max_tokens=9)
    assert shape(driver.plan()) == [(0, 3, True)]
    driver.land()
    driver.submit("b", range(20), max_tokens=2)
    assert shape(driver.plan()) == [(3, 1, True), (0, 7, False)]
    driver.land()
    assert shape(driver.plan()) == [(4, 1, True), (7, 7, False)]
    driver.land()
    assert shape(driver.plan()) == [(5, 1, True), (14, 6, True)]
    driver.land()
    assert shape(driver.plan()) == [(6, 1, True), (20, 1, True)]


def test_a_lane_has_one_ticket_in_flight(drive: Any) -> None:
    driver = drive()
    assert driver.plan() is None
    driver.submit("a", [1])
    assert driver.plan() is not None
    driver.submit("b", [2])
    assert driver.plan() is None


def test_two_lanes_work_at_the_same_time_and_hand_over_without_a_copy(drive: Any) -> None:
    driver = drive(SPLIT)
    driver.submit("a", [1, 2, 3, 4, 5], max_tokens=9)
    assert driver.plan(Lane.DECODE) is None
    prefill = driver.plan(Lane.PREFILL)
    driver.land(Lane.PREFILL)
    driver.submit("b", [6, 7, 8], max_tokens=9)
    decode, other = driver.plan(Lane.DECODE), driver.plan(Lane.PREFILL)
    assert shape(decode) == [(5, 1, True)] and shape(other) == [(0, 3, True)]
    assert decode.slices[0].blocks == prefill.slices[0].blocks
    assert (driver.scheduler.owned(Lane.DECODE), driver.scheduler.owned(Lane.PREFILL)) == (1, 1)
    driver.land(Lane.DECODE)
    driver.land(Lane.PREFILL)
    driver.drain()
    assert driver.tokens["b", 0] == right([6, 7, 8], 9)


def test_no_more_sequences_run_than_there_are_seats(drive: Any) -> None:
    driver = drive(max_num_seqs=2, blocks=64)
    for index in range(5):
        driver.submit(f"r{index}", [index], max_tokens=3)
    driver.plan()
    assert len(driver.scheduler.running) == 2 and driver.scheduler.waiting == 3
    driver.land()
    driver.drain()
    assert len(driver.ends) == 5


def test_a_prefill_starts_only_when_decode_has_room_to_grow(drive: Any) -> None:
    driver = drive(blocks=5, block_size=4)
    driver.submit("a", [1, 2, 3], max_tokens=8)
    driver.plan()
    driver.submit("b", range(9), max_tokens=1)
    driver.land()
    # Three blocks for b's prompt would leave one; a's next growth and b's own take two.
    assert len(driver.plan().slices) == 1
    driver.land()
    driver.drain()
    assert driver.scheduler.running.preemptions == 0


def test_penalties_get_the_tokens_so_far_and_others_get_none(drive: Any) -> None:
    driver = drive()
    driver.submit("plain", [1, 2], max_tokens=3, logit_bias=((3, 1.0),))
    driver.submit("penalised", [1, 2], max_tokens=3, frequency_penalty=0.5)
    driver.plan()
    driver.land()
    plain, penalised = (piece.sample for piece in driver.plan().slices)
    assert (plain.prompt, plain.output) == ((), ())
    assert (penalised.prompt, penalised.output) == ((1, 2), tuple(right([1, 2], 1)))
    assert plain.position == penalised.position == 3


# -- order -----------------------------------------------------------------------------------------------------------


def order_of_ends(driver: Any) -> list[str]:
    return list(driver.ends)


def test_a_smaller_priority_is_served_first_and_equals_in_order_of_arrival(drive: Any) -> None:
    driver = drive(max_num_seqs=1)
    for name, priority in (("late", 1), ("first", 0), ("second", 0), ("urgent", -1)):
        driver.submit(name, [1], priority=priority, max_tokens=2)
    driver.drain()
    assert order_of_ends(driver) == ["urgent", "first", "second", "late"]


def test_waiting_improves_a_priority(drive: Any) -> None:
    driver = drive(max_num_seqs=1)
    driver.submit("patient", [1], priority=3, max_tokens=1)
    driver.now = 29.0
    driver.submit("urgent", [1], priority=0, max_tokens=1)
    driver.now = 31.0
    driver.submit("too late", [1], priority=0, max_tokens=1)
    driver.drain()
    assert order_of_ends(driver) == ["urgent", "patient", "too late"]


def test_an_urgent_request_goes_before_a_prompt_that_is_half_done(drive: Any) -> None:
    driver = drive(max_num_batched_tokens=8)
    driver.submit("long", range(20), max_tokens=1)
    driver.plan()
    driver.land()
    driver.submit("urgent", [1, 2, 3], priority=-1, max_tokens=1)
    assert shape(driver.plan()) == [(0, 3, True), (8, 5, False)]


def test_the_least_urgent_sequence_is_preempted(drive: Any) -> None:
    driver = drive(blocks=6, block_size=2, max_num_seqs=3)
    driver.submit("low", [1], priority=5, max_tokens=7)
    driver.submit("high", [2], priority=-5, max_tokens=7)
    driver.submit("middle", [3], priority=0, max_tokens=7)
    driver.drain()
    assert driver.ends["high"].preemptions == 0
    assert order_of_ends(driver) == ["high", "middle", "low"]
    for name, token in (("low", 1), ("high", 2), ("middle", 3)):
        assert driver.tokens[name, 0] == right([token], 7)


# -- prefix cache, n, preemption -------------------------------------------------------------------------------------


def test_a_second_prompt_takes_the_first_ones_full_blocks_once_they_are_complete(drive: Any) -> None:
    driver = drive(blocks=32)
    driver.submit("a", range(10), max_tokens=20)
    driver.submit("same step", range(10), max_tokens=20)
    first = driver.plan()
    assert not set(first.slices[0].blocks) & set(first.slices[1].blocks), "nothing is shared before it is written"
    driver.land()
    driver.submit("b", (*range(8), 40, 41), max_tokens=20)
    shared = driver.plan().slices[-1]
    assert shared.start == 8 and shared.blocks[:2] == first.slices[0].blocks[:2]
    driver.land()
    driver.drain()
    assert driver.ends["b"].cached_tokens == 8 and driver.ends["a"].cached_tokens == 0
    assert driver.scheduler.running.prefix_hits == 8 and driver.scheduler.running.prefix_queries == 30
    assert driver.tokens["b", 0] == right((*range(8), 40, 41), 20)


def test_salts_and_the_switch_keep_prompts_apart(drive: Any) -> None:
    for given, salt in (({}, "other"), ({"enable_prefix_caching": False}, "")):
        driver = drive(**given)
        driver.submit("a", range(10), max_tokens=1)
        driver.drain()
        driver.submit("b", range(10), salt=salt, max_tokens=1)
        driver.drain()
        assert driver.ends["b"].cached_tokens == 0


def test_n_sequences_share_the_prompts_blocks_and_draw_with_different_seeds(drive: Any) -> None:
    driver = drive(blocks=16)
    driver.submit("r", range(9), n=3, seed=5, max_tokens=4)
    first = driver.plan()
    assert len(first.slices) == 1 and driver.scheduler.waiting == 2
    driver.land()
    plan = driver.plan()
    assert shape(plan) == [(9, 1, True), (8, 1, True), (8, 1, True)]
    tables = [piece.blocks for piece in plan.slices]
    assert len({table[:2] for table in tables}) == 1 and len({table[2] for table in tables}) == 3
    seeds = [piece.sample.seed for piece in plan.slices]
    assert seeds[0] == 5 and len(set(seeds)) == 3
    driver.land()
    driver.drain()
    assert {index for _, index in driver.tokens} == {0, 1, 2}
    end = driver.ends["r"]
    assert (end.generated_tokens, end.cached_tokens, end.reason) == (12, 0, Finish.LENGTH)
    assert driver.scheduler.prompt_tokens == 9


@pytest.mark.parametrize(("prompt", "caching"), [(range(3), True), (range(9), False)])
def test_n_sequences_that_cannot_share_do_not_wait_for_each_other(drive: Any, prompt: Any, caching: bool) -> None:
    driver = drive(blocks=32, enable_prefix_caching=caching)
    driver.submit("r", prompt, n=3, max_tokens=4)
    assert [start for start, _, _ in shape(driver.plan())] == [0, 0, 0]
    driver.land()
    driver.drain()
    assert [driver.tokens["r", index] for index in range(3)] == [right(prompt, 4)] * 3


def test_seeds_are_drawn_from_the_engines_where_the_request_brings_none(drive: Any) -> None:
    def seeds(engine_seed: int) -> list[int]:
        driver = drive(seed=engine_seed)
        driver.submit("a", [1])
        driver.submit("b", [1])
        return [piece.sample.seed for piece in driver.plan().slices]

    assert seeds(1) == seeds(1) and len({*seeds(1), *seeds(2)}) == 4


@pytest.mark.parametrize("caching", [True, False])
def test_a_resume_computes_what_the_cache_does_not_have_and_goes_on_with_the_same_tokens(
    drive: Any, caching: bool
) -> None:
    driver = drive(enable_prefix_caching=caching)
    driver.submit("r", range(9), max_tokens=10)
    for _ in range(5):
        driver.round()
    assert driver.scheduler.preempt("r") == 1 and driver.scheduler.preempt("nobody") == 0
    assert driver.pool.held == 0
    # 9 tokens of prompt and 5 of output: three full blocks are found again.
    assert shape(driver.plan()) == [(12, 2, True) if caching else (0, 14, True)]
    driver.land()
    driver.drain()
    assert driver.tokens["r", 0] == right(range(9), 10)
    assert driver.ends["r"].preemptions == driver.scheduler.running.preemptions == 1
    assert driver.ends["r"].cached_tokens == 0, "cached_tokens is about the prompt's first start"


def test_a_preemption_in_flight_drops_the_result_and_pins_the_blocks(drive: Any) -> None:
    driver = drive()
    driver.submit("r", range(9), max_tokens=3)
    plan = driver.plan()
    driver.scheduler.preempt("r")
    assert (driver.pool.pinned, driver.pool.held) == (len(plan.slices[0].blocks), 0)
    assert driver.land() == [] and driver.pool.pinned == 0
    driver.drain()
    assert driver.tokens["r", 0] == right(range(9), 3)


def test_decode_waits_for_blocks_that_the_other_lane_still_names(drive: Any) -> None:
    driver = drive(SPLIT, blocks=4, block_size=4)
    driver.submit("old", [1, 2, 3], max_tokens=12)
    driver.round()
    driver.submit("new", [4, 5], max_tokens=5)
    driver.plan(Lane.PREFILL)
    for _ in range(9):
        assert driver.plan(Lane.DECODE) is not None
        driver.land(Lane.DECODE)
    # The fourth block is the other lane's: its sequence is preempted, but its ticket has not landed.
    assert driver.plan(Lane.DECODE) is None and driver.pool.pinned == 1
    assert driver.plan(Lane.DECODE) is None and driver.scheduler.running.preemptions == 1
    assert driver.land(Lane.PREFILL) == []
    assert driver.plan(Lane.DECODE) is not None
    driver.land(Lane.DECODE)
    driver.drain()
    assert driver.tokens["old", 0] == right([1, 2, 3], 12) and driver.tokens["new", 0] == right([4, 5], 5)


# -- ends ------------------------------------------------------------------------------------------------------------


def test_stop_ids_and_end_of_text_end_a_sequence_unless_told_otherwise(drive: Any) -> None:
    tokens = right([1], 3)
    assert len(set(tokens)) == 3
    driver = drive()
    driver.submit("stop", [1], max_tokens=9, stop_token_ids=(tokens[1],))
    driver.submit("eos", [1], max_tokens=9, eos=(tokens[2],))
    driver.submit("ignored", [1], max_tokens=9, eos=(tokens[2],), ignore_eos=True)
    driver.submit("last", [1], max_tokens=2, stop_token_ids=(tokens[1],))
    driver.drain()
    assert driver.tokens["stop", 0] == tokens[:2] and driver.tokens["eos", 0] == tokens
    assert driver.tokens["ignored", 0] == right([1], 9)
    for name, reason in (("stop", "stop"), ("eos", "stop"), ("ignored", "length"), ("last", "stop")):
        assert driver.ends[name].reason.value == reason
    stopped = {output.request: output.stop_token for output in driver.outputs if output.finish is not None}
    assert stopped == {"stop": tokens[1], "eos": tokens[2], "ignored": None, "last": tokens[1]}


def test_stop_ids_are_forbidden_until_min_tokens_were_generated(drive: Any) -> None:
    first = oracle([1], VOCABULARY)
    driver = drive()
    driver.submit("r", [1], max_tokens=6, min_tokens=2, eos=(first, VOCABULARY + 7))
    forbidden = []
    while driver.scheduler.live:
        forbidden.append(driver.plan().slices[0].sample.forbidden)
        driver.land()
    assert forbidden[:3] == [(first,), (first,), ()], "an id outside of the vocabulary is none that can be drawn"
    assert driver.tokens["r", 0][0] == oracle([1], VOCABULARY, {first}) != first


def test_a_device_that_draws_a_stop_id_too_early_does_not_end_the_sequence(drive: Any) -> None:
    driver = drive()
    driver.submit("r", [1], max_tokens=3, min_tokens=1, eos=(7,))
    for _ in range(2):
        driver.plan()
        driver.land(change=lambda result: replace(result, sampled=(Sampled(0, 7),)))
    assert driver.tokens["r", 0] == [7, 7] and driver.ends["r"].reason is Finish.STOP


def test_prompt_scores_come_once_in_order_and_take_no_hits(drive: Any) -> None:
    driver = drive(max_num_batched_tokens=8, blocks=32)
    driver.submit("warm", range(20), max_tokens=1)
    driver.drain()
    driver.submit("r", range(20), max_tokens=2, prompt_logprobs=3, n=2)
    assert shape(driver.plan()) == [(0, 8, False)] and driver.plans[-1].slices[0].next_token == 8
    driver.land()
    driver.plan()
    driver.scheduler.preempt("r")  # what was scored is scored again
    driver.land()
    driver.drain()
    scores = driver.scores["r"].scores
    assert [score.token for score in scores] == list(range(1, 20)) and all(len(score.top) == 3 for score in scores)
    kinds = [PromptScores] + [TokenOutput] * 4 + [RequestEnd]
    assert kinds == [type(event) for event in replay(drive, "r", range(20))]


def test_prompt_scores_come_before_the_tokens_of_any_sequence(drive: Any) -> None:
    driver = drive(enable_prefix_caching=False, blocks=32)
    driver.submit("r", range(9), n=3, max_tokens=2, prompt_logprobs=1)
    assert len(driver.plan().slices) == 1 and driver.scheduler.waiting == 2
    driver.scheduler.preempt("r")  # the siblings would be first now, had they not waited
    driver.land()
    driver.drain()
    assert driver.scores["r"].request == "r"
    kinds = [type(event) for event in replay(drive, "r", range(9))]
    assert kinds.index(PromptScores) == 0


def replay(drive: Any, id: str, prompt: Any) -> list[Any]:
    driver, events = drive(), []
    driver.submit(id, prompt, max_tokens=2, prompt_logprobs=0, n=2)
    while driver.scheduler.live:
        driver.plan()
        events += driver.land()
    return events


@pytest.mark.parametrize("when", ["queued", "in flight", "between steps"])
def test_an_abort_ends_a_request_at_once_and_its_blocks_come_back(drive: Any, when: str) -> None:
    driver = drive()
    driver.submit("r", range(9), n=2, max_tokens=5)
    if when != "queued":
        driver.plan()
    if when == "between steps":
        driver.land()
    events = driver.abort("r")
    assert [type(event) for event in events] == [TokenOutput, TokenOutput, RequestEnd]
    assert all(event.finish is Finish.ABORT and event.token is None for event in events[:2])
    assert driver.ends["r"].reason is Finish.ABORT
    assert (driver.pool.held, driver.pool.pinned) == (0, 3 if when == "in flight" else 0)
    if when == "in flight":
        assert driver.land() == []
    assert driver.pool.available == 16 and driver.scheduler.admission.queued == 0
    assert driver.abort("r") == driver.abort("nobody") == []


@pytest.mark.parametrize("when", ["in flight", "between", "preempted"])
def test_a_stop_string_ends_one_sequence_at_once_and_its_blocks_and_seat_are_free(drive: Any, when: str) -> None:
    driver = drive(blocks=40)
    driver.submit("a", range(9), n=3, max_tokens=9)
    while not driver.tokens.get(("a", 1)):
        driver.round()
    if when == "in flight":
        driver.plan()
    elif when == "preempted":
        assert driver.scheduler.preempt("a") == 3
    (output,) = driver.stop("a", 1)
    assert (output.index, output.token, output.finish, output.stop_token) == (1, None, Finish.STOP, None)
    assert driver.stop("a", 1) == driver.stop("a", 7) == driver.stop("b") == []
    if when == "in flight":
        driver.land()
    said = len(driver.tokens["a", 1])
    driver.stop("a")
    driver.drain()
    assert (len(driver.tokens["a", 1]), len(driver.tokens["a", 2])) == (said, 9) and len(driver.tokens["a", 0]) < 9
    end = driver.ends["a"]
    assert (end.reason, end.generated_tokens) == (Finish.STOP, sum(map(len, driver.tokens.values())))
    assert (driver.pool.held, driver.pool.pinned) == (0, 0)


def test_a_sequence_without_text_cannot_be_stopped(drive: Any) -> None:
    driver = drive()
    driver.submit("a", range(9), n=2, max_tokens=3)
    assert driver.stop("a") == []
    driver.drain()
    assert len(driver.tokens["a", 0]) == len(driver.tokens["a", 1]) == 3


def test_an_abort_of_a_shared_prompt_leaves_the_others_blocks(drive: Any) -> None:
    driver = drive()
    driver.submit("a", range(9), max_tokens=5)
    driver.round()
    driver.submit("b", range(9), max_tokens=5)
    driver.plan()
    driver.abort("a")
    driver.land()
    driver.drain()
    assert driver.tokens["b", 0] == right(range(9), 5)


def test_a_failed_step_ends_the_requests_in_it_and_no_others(drive: Any) -> None:
    driver = drive(SPLIT)
    driver.submit("decoding", [1, 2, 3], max_tokens=5)
    driver.round()
    driver.submit("prefilling", range(9), n=2, max_tokens=5)
    driver.plan(Lane.DECODE)
    driver.plan(Lane.PREFILL)
    driver.fail(Lane.PREFILL)
    end = driver.ends["prefilling"]
    assert (end.reason, end.code, end.error) == (Finish.ERROR, "step_failed", "broken")
    driver.land(Lane.DECODE)
    driver.submit("again", range(9), max_tokens=5)
    driver.drain()
    assert driver.ends["again"].cached_tokens == 0, "what a failed step wrote is not found"
    assert driver.tokens["decoding", 0] == right([1, 2, 3], 5) and driver.tokens["again", 0] == right(range(9), 5)


def test_a_failed_step_with_several_sequences_of_one_request_ends_it_once(drive: Any) -> None:
    driver = drive()
    driver.submit("r", [1, 2], n=3, max_tokens=5)
    driver.round()
    assert len(driver.plan().slices) == 3
    driver.fail(message="")
    assert driver.ends["r"].reason is Finish.ERROR and driver.pool.available == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: replace(result, failed=((0, "NaN logits"),)), "NaN logits"),
        (lambda result: replace(result, sampled=result.sampled[1:]), "no token"),
        (lambda result: replace(result, sampled=(Sampled(0, VOCABULARY), result.sampled[1])), "outside"),
        (lambda result: replace(result, prompt_scores=()), "scored 0 prompt tokens instead of 2"),
    ],
)
def test_a_slice_that_fails_alone_ends_its_request_alone(drive: Any, change: Any, message: str) -> None:
    driver = drive()
    driver.submit("bad", [1, 2, 3], prompt_logprobs=0)
    driver.submit("good", [1, 2], max_tokens=3)
    driver.plan()
    driver.land(change=change)
    driver.drain()
    assert driver.ends["bad"].code == "step_failed" and message in driver.ends["bad"].error
    assert driver.tokens["good", 0] == right([1, 2], 3)


def test_results_of_unknown_tickets_are_refused_and_change_nothing(drive: Any) -> None:
    driver = drive()
    driver.submit("r", [1], max_tokens=2)
    plan = driver.plan()
    for ticket in (Ticket(plan.step + 1, Lane.MIXED), Ticket(plan.step, Lane.DECODE)):
        with pytest.raises(UnknownTicket, match="not in flight"):
            driver.scheduler.complete(Result(ticket, (Sampled(0, 3),)), 0.0)
    driver.land()
    with pytest.raises(UnknownTicket):
        driver.scheduler.complete(Result(Ticket(plan.step, Lane.MIXED), (Sampled(0, 3),)), 0.0)
    driver.drain()
    assert driver.tokens["r", 0] == right([1], 2)


def test_a_lost_step_ends_its_requests_and_keeps_its_blocks_until_a_late_result(drive: Any) -> None:
    driver = drive()
    driver.submit("lost", range(9), max_tokens=5)
    plan = driver.plan()
    driver.submit("next", [1, 2], max_tokens=2)
    assert driver.scheduler.lose(99, "?", 0.0) == []
    driver.hear(driver.scheduler.lose(plan.step, "it hangs", 0.0))
    assert (driver.ends["lost"].code, driver.ends["lost"].error) == ("step_failed", "it hangs")
    assert driver.pool.pinned == 3 and driver.plan() is None, "its lane gets no other plan"
    assert driver.land() == [] and driver.pool.pinned == 0
    driver.drain()
    assert driver.tokens["next", 0] == right([1, 2], 2)


def test_a_dead_device_ends_every_request(drive: Any) -> None:
    driver = drive()
    driver.submit("running", [1], max_tokens=5)
    driver.plan()
    driver.submit("waiting", [1], n=3)
    driver.hear(driver.scheduler.fail_all("no power", "unavailable", 1.0))
    assert {end.code for end in driver.ends.values()} == {"unavailable"} and len(driver.ends) == 2
    assert driver.scheduler.live == driver.scheduler.waiting == driver.scheduler.admission.queued == 0


def test_after_an_internal_error_the_pool_starts_anew_without_what_is_in_flight(drive: Any) -> None:
    driver = drive(SPLIT)
    driver.submit("a", range(9), max_tokens=9)
    driver.round()
    plan = driver.plan(Lane.DECODE)
    driver.submit("b", [1], max_tokens=9)
    driver.plan(Lane.PREFILL)
    driver.land(Lane.PREFILL)
    driver.pool._free.append(driver.pool._free[-1])  # the harm
    assert not driver.pool.conserved
    driver.hear(driver.scheduler.recover("a bug", 1.0))
    assert {end.code for end in driver.ends.values()} == {"step_failed"} and len(driver.ends) == 2
    assert driver.pool.conserved and driver.pool.pinned == len(plan.slices[0].blocks)
    driver.submit("c", range(9), max_tokens=9)
    driver.plan(Lane.PREFILL)
    assert driver.land(Lane.DECODE) == []
    driver.land(Lane.PREFILL)
    driver.drain()
    assert driver.tokens["c", 0] == right(range(9), 9) and driver.pool.available == 16


# -- the door --------------------------------------------------------------------------------------------------------


def test_an_id_that_is_live_is_refused_and_can_be_used_again_afterwards(drive: Any) -> None:
    driver = drive()
    driver.submit("r", [1])
    with pytest.raises(InvalidRequest, match="under way"):
        driver.submit("r", [1])
    driver.abort("r")
    driver.ends.clear()
    driver.submit("r", [1])


def test_only_requests_that_wait_for_their_first_step_count_for_the_queue(drive: Any) -> None:
    driver = drive(max_num_queued_reqs=2, max_num_seqs=1)
    driver.submit("running", [1], max_tokens=9)
    driver.round()
    driver.submit("b", [1])
    driver.submit("c", [1])
    with pytest.raises(QueueFull):
        driver.submit("d", [1])
    driver.abort("b")
    driver.submit("d", [1])
    driver.drain()
    assert set(driver.ends) == {"running", "b", "c", "d"}


def test_the_end_tells_when_things_happened(drive: Any) -> None:
    driver = drive(max_num_batched_tokens=8)
    driver.now = 10.0
    driver.submit("r", range(10), max_tokens=3)
    driver.now = 12.0
    driver.drain()
    timing = driver.ends["r"].timing
    assert (timing.arrived, timing.scheduled, timing.first_token, timing.ended) == (10.0, 12.0, 13.0, 15.0)
    assert driver.ends["r"].prompt_tokens == 10 and driver.ends["r"].generated_tokens == 3
    assert (driver.scheduler.prompt_tokens, driver.scheduler.generation_tokens) == (10, 3)


def test_a_line_gives_back_only_what_is_in_it(drive: Any) -> None:
    driver = drive()
    driver.submit("r", [1])
    sequence = driver.scheduler.running.waiting.first
    assert Line().last is None
    with pytest.raises(LookupError, match="not in the line"):
        Line().remove(sequence)
