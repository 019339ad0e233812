"""Routers against plain counts of what is under way."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.bench.traces import Size
from weft.errors import DeviceError
from weft.sim.router import LeastLoaded, PrefixAware, RoundRobin, Router


def test_round_robin_goes_round_those_that_are_up() -> None:
    router = RoundRobin([4, 5, 6])
    assert [router.choose(number, Size(1, 1)) for number in range(4)] == [4, 5, 6, 4]
    router.down(5)
    assert [router.choose(number, Size(1, 1)) for number in range(3)] == [6, 4, 6]
    router.up(5)
    assert [router.choose(number, Size(1, 1)) for number in range(3)] == [4, 5, 6]
    assert router.has(6) and not router.has(0)


steps = st.lists(
    st.tuples(st.sampled_from(["new", "new", "end", "down", "up"]), st.integers(0, 7), st.integers(1, 100)), max_size=60
)


@given(steps)
def test_the_least_loaded_has_the_fewest_tokens_under_way(script: list[tuple[str, int, int]]) -> None:
    router = LeastLoaded(range(4))
    load: Counter[int] = Counter()
    under_way: dict[int, tuple[int, int]] = {}
    down: set[int] = set()
    for number, (what, which, tokens) in enumerate(script):
        if what == "new" and len(down) < 4:
            index = router.choose(number, Size(tokens, 1))
            assert index not in down and load[index] == min(load[one] for one in range(4) if one not in down)
            load[index] += tokens
            under_way[number] = (index, tokens)
        elif what == "end" and under_way:
            name = sorted(under_way)[which % len(under_way)]
            index, cost = under_way.pop(name)
            router.ended(index, name)
            load[index] -= cost
        elif what == "down":
            down.add(which % 4)
            router.down(which % 4)
        elif what == "up" and which % 4 in down:
            down.discard(which % 4)
            router.up(which % 4)


def test_what_is_no_longer_true_is_not_kept() -> None:
    router = LeastLoaded(range(3))
    sizes = [Size(1 + 7 * number % 50, 1) for number in range(2000)]
    chosen = [router.choose(number, size) for number, size in enumerate(sizes)]
    for number, index in enumerate(chosen):
        router.ended(index, number)
    assert (
        len(router._order) <= 16 * 3 and router._costs == {} and [router.load(index) for index in range(3)] == [0] * 3
    )
    assert sorted({router.choose(number, Size(1, 1)) for number in range(3)}) == [0, 1, 2]


@pytest.mark.parametrize("make", [RoundRobin, LeastLoaded, lambda indices: PrefixAware(indices, 1000)])
def test_when_all_are_down_there_is_nobody_to_choose(make: type[RoundRobin]) -> None:
    router: Router = make([0, 1])
    router.down(0)
    router.down(1)
    with pytest.raises(DeviceError, match="every replica is down"):
        router.choose(0, Size(1, 1))


def test_a_prefix_is_sent_where_it_is_known_unless_that_one_has_too_much_to_do() -> None:
    router = PrefixAware(range(3), 10_000)
    prompt = Size(1024, 1, (1, 2), 512)
    first = router.choose(0, prompt)
    router.ended(first, 0)
    assert router.choose(1, Size(1030, 1, (1, 2, 3), 512)) == first, "6 new tokens there, 1030 elsewhere"
    router.ended(first, 1)
    busy = [router.choose(number, Size(2000, 1)) for number in range(10, 13)]
    assert sorted(busy) == [0, 1, 2], "what nobody knows goes to the least loaded"
    router.ended(next(index for index in busy if index != first), 10 + busy.index(next(i for i in busy if i != first)))
    assert router.choose(20, prompt) != first, "1024 tokens elsewhere are less than 2001 there"


def test_a_replica_that_was_down_knows_nothing_and_what_does_not_fit_is_forgotten() -> None:
    router = PrefixAware(range(2), 1024)
    first = router.choose(0, Size(512, 1, (1,), 512))
    router.ended(first, 0)
    router.down(first)
    router.up(first)
    assert router._holders == {}
    for number in range(1, 9):
        index = router.choose(number, Size(512, 1, (number,), 512))
        router.ended(index, number)
    assert sum(len(held) for held in router._held.values()) <= 4 and len(router._holders) <= 4
