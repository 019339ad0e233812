from __future__ import annotations

import pytest

from weft.core.admission import Admission, SchedulerSettings, outgrown, request_seed, sequence_seed
from weft.core.plan import Capacity
from weft.core.request import Request
from weft.core.sampling import SamplingParams
from weft.errors import ContextTooLong, InvalidRequest, NeverFits, QueueFull

CAPACITY = Capacity(blocks=10, block_size=4, max_tokens=64, max_slices=8, shares=1, max_model_len=60, vocabulary=100)


def check(prompt: tuple[int, ...], door: Admission | None = None, now: float = 0.0, **params: object) -> None:
    (door or Admission(CAPACITY, SchedulerSettings())).check(Request("r", prompt, SamplingParams(**params)), now)  # type: ignore[arg-type]


def test_a_prompt_larger_than_the_pool_is_refused_with_the_numbers_and_the_flags() -> None:
    check((1,) * 39)
    with pytest.raises(NeverFits) as refused:
        check((1,) * 40)
    for part in ("40 tokens", "11 KV blocks", "has 10", "--num-blocks", "--kv-cache-memory-bytes"):
        assert part in refused.value.message


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    with pytest.raises(ContextTooLong, match=r"60 tokens.*context of 60"):
        check((1,) * 60)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "empty"),
        ((1, 2.0), "not a list of token ids"),
        (("a",), "not a list of token ids"),
        ((1, 2**70), r"prompt token 1 is 1180591620717411303424.*between 0 and 99"),
        ((1, 100), "prompt token 1 is 100.*between 0 and 99"),
        ((-1,), "prompt token 0 is -1"),
    ],
)
def test_a_prompt_that_is_none_is_refused(prompt: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        check(prompt)
    assert refused.value.param == "prompt"


def test_parameters_out_of_bounds_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="temperature"):
        check((1,), temperature=float("nan"))
    with pytest.raises(InvalidRequest, match="token ids must be between 0 and 99"):
        check((1,), stop_token_ids=(100,))


@pytest.mark.parametrize("priority", [2**31, -(2**31), 10**400])
def test_a_priority_out_of_bounds_is_refused(priority: int) -> None:
    with pytest.raises(InvalidRequest, match="between -2147483647 and 2147483647") as refused:
        Admission(CAPACITY, SchedulerSettings()).check(Request("r", (1,), priority=priority), 0.0)
    assert refused.value.param == "priority"


def test_the_queue_is_bounded_in_requests() -> None:
    door = Admission(CAPACITY, SchedulerSettings(max_num_queued_reqs=2))
    for _ in range(2):
        check((1,), door)
        door.enter(1)
    with pytest.raises(QueueFull, match=r"2 requests wait.*--max-num-queued-reqs") as refused:
        check((1,), door)
    assert refused.value.retry_after == 1
    door.leave(1, None)
    check((1,), door)


def test_the_queue_is_bounded_in_prompt_tokens_but_one_prompt_always_fits() -> None:
    door = Admission(CAPACITY, SchedulerSettings(max_num_queued_tokens=10))
    check((1,) * 30, door)
    door.enter(30)
    with pytest.raises(QueueFull, match=r"30 prompt tokens wait.*--max-num-queued-tokens 10"):
        check((1,), door)
    door.leave(30, 0.0)
    check((1,), door)


def test_retry_after_is_the_time_in_which_half_of_the_queue_starts() -> None:
    door = Admission(CAPACITY, SchedulerSettings(max_num_queued_reqs=8))
    for _ in range(18):
        door.enter(1)
    for second in range(10):
        door.leave(1, float(second))
    # One start a second, eight in the queue.
    assert door.retry_after(10.0) == 4
    # A queue that has stopped gets longer and longer, up to a minute.
    assert door.retry_after(60.0) == 24
    assert door.retry_after(10_000.0) == 60


def test_outgrown_says_what_the_pool_has() -> None:
    assert outgrown(40, CAPACITY) is None
    reason = outgrown(41, CAPACITY)
    assert reason is not None
    assert "41 tokens" in reason and "11 KV blocks" in reason and "has 10" in reason and "--num-blocks" in reason


def test_seeds_are_64_bits_differ_and_can_be_drawn_again() -> None:
    assert request_seed(-1, 0, 5) == 2**64 - 1
    assert request_seed(7, 0, 5) == request_seed(7, 1, 6) == 7
    assert request_seed(0, 3, 5) == 0
    drawn = [request_seed(None, 3, number) for number in range(100)]
    assert len(set(drawn)) == 100 and drawn == [request_seed(None, 3, number) for number in range(100)]
    assert request_seed(None, 4, 0) != drawn[0]
    assert sequence_seed(9, 0) == 9
    several = {sequence_seed(9, index) for index in range(128)}
    assert len(several) == 128 and all(0 <= seed < 2**64 for seed in several)
