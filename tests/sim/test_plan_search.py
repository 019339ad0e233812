"""The search for the cheapest fleet, against trying everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.bench.stats import Slo
from weft.bench.traces import Row, Size
from weft.devices.cost import CostModel
from weft.errors import ConfigError
from weft.sim import plan_search
from weft.sim.plan_search import Candidate, Targets, Traffic, Tried, Verdict, search, traffic_of
from weft.sim.replica import Setup
from weft.sim.study import Fleet, study
from weft.sim.traffic import every

TARGETS = Targets(ttft=0.12, tpot=0.02)
LOAD = [(number * 0.0125, Size(30 + 11 * number % 60, 4 + number % 10)) for number in range(300)]


def candidates(setup: Callable[..., Setup]) -> list[Candidate]:
    fast = CostModel(fixed=1e-3, per_token=4e-5, per_context=1e-7, weights=2e-3)
    slow = CostModel(fixed=2e-3, per_token=2e-4, per_context=1e-7, weights=5e-3)
    lame = CostModel(fixed=5e-2, per_token=1e-4)
    return [
        Candidate("slow", 1, 1.0, lambda: setup(cost=slow)),
        Candidate("fast", 1, 2.4, lambda: setup(cost=fast)),
        Candidate("pair", 2, 9.0, lambda: setup(cost=fast)),
        Candidate("lame", 1, 0.1, lambda: setup(cost=lame)),
        Candidate("dwarf", 1, 0.1, too_small),
    ]


def traffic(rows: Sequence[Row] = LOAD) -> Traffic:
    return traffic_of(lambda: iter(rows))


def searched(
    options: list[Candidate], load: Traffic, targets: Targets = TARGETS, router: str = "round-robin", most: int = 64
) -> list[Verdict]:
    return search(options, load, targets, router, most, lambda done, words: None)


def too_small() -> Setup:
    raise ConfigError("weights leave no room")


def fewest(setup: Setup) -> int:
    """By trying one after the other."""
    for count in range(1, 20):
        totals = study(Fleet(setup), every(LOAD, count), Slo(TARGETS.ttft, TARGETS.tpot)).totals
        if TARGETS.missed(totals) is None:
            return count
    raise AssertionError("none")


def test_the_cheapest_is_found_and_the_others_are_told_why_not(setup: Any) -> None:
    shown: list[tuple[int, str]] = []
    load = traffic()
    assert load.rate == pytest.approx(80.0) and load.span == LOAD[-1][0] and load.requests == 300
    options = candidates(setup)
    verdicts = search(options, load, TARGETS, "round-robin", 64, lambda done, words: shown.append((done, words)))
    by_name = {one.candidate.name: one for one in verdicts}
    prices = {name: fewest(by_name[name].candidate.make()) * by_name[name].candidate.price for name in ("slow", "fast")}
    assert verdicts[0].price == min(prices.values()) and verdicts[0].candidate.name == min(
        prices, key=prices.__getitem__
    )
    assert by_name["pair"].replicas is None and "no cheaper than the best" in by_name["pair"].reason
    assert "one request at a time" in by_name["lame"].reason and "TPOT" in by_name["lame"].reason
    assert by_name["dwarf"].reason == "does not fit: weights leave no room"
    assert [done for done, _ in shown] == sorted(done for done, _ in shown) and shown[-1][0] == 5


def test_what_does_not_fit_the_limit_is_not_an_answer(setup: Any) -> None:
    (verdict,) = searched(candidates(setup)[:1], traffic(), most=1)
    assert verdict.replicas is None and "--max-gpus 1" in verdict.reason


@given(bound=st.integers(1, 30), needed=st.integers(1, 90), more=st.integers(0, 60), down=st.booleans())
def test_the_fewest_replicas_are_found_within_the_limits(bound: int, needed: int, more: int, down: bool) -> None:
    """As if one after the other had been tried, also where the bound was none."""
    asked: list[int] = []

    def run(count: int) -> Tried:
        asked.append(count)
        return Tried(None if count >= needed else "misses", None)

    count, reason, _ = plan_search._fewest(run, 0, bound, bound + more if down else bound, bound + more)
    assert count == (needed if needed <= bound + more else None)
    most = max((one for one in asked if one < needed), default=0)
    assert reason == (f"with {plan_search.replicas(most)} misses" if most else plan_search.ONE)
    assert len(asked) == len(set(asked)) and (count is None or count == most + 1)


@pytest.mark.parametrize(("percentile", "partition"), [(90, "off"), (50, "1:1")])
@pytest.mark.parametrize(("gap", "ttft"), [(0.0125, 0.12), (0.0001, 0.3)])
def test_the_bound_is_no_more_than_what_a_fleet_takes(
    setup: Any, gap: float, ttft: float, percentile: int, partition: str
) -> None:
    """Also of a burst, whose queue has time to empty behind the last arrival."""
    rows = [(number * gap, size) for number, (_, size) in enumerate(LOAD[:150])]
    targets = Targets(ttft, 0.1, percentile)
    option = Candidate("any", 1, 1.0, lambda: setup(partition=partition, max_num_seqs=64))
    (found,) = searched([option], traffic(rows), targets)
    assert found.replicas is not None and found.bound <= found.replicas
    for count in range(1, found.bound):
        totals = study(Fleet(option.make(), count), rows, Slo(ttft, 0.1)).totals
        assert targets.missed(totals) is not None


def test_the_bound_tells_something(setup: Any) -> None:
    """Where requests come for much longer than they may wait, most of what it takes."""
    rows = [(number * 0.002, Size(64, 2)) for number in range(1000)]
    (found,) = searched([Candidate("any", 1, 1.0, setup)], traffic(rows), Targets(0.2, None, 99))
    assert found.replicas is not None and 1 < 0.7 * found.replicas <= found.bound


def test_two_lanes_may_do_more_than_one(setup: Any) -> None:
    """Half of this device has all of its memory's bandwidth."""
    one, two = (plan_search._cheapest(setup(partition=text)) for text in ("off", "1:1"))
    assert 0.5 * one <= two < 0.95 * one


def test_a_rate_that_changes_late_is_seen(setup: Any) -> None:
    rows = [(number * 0.01, Size(60, 5)) for number in range(100)]
    late = traffic([*rows, *((1.0 + number, Size(4, 9)) for number in range(900))])
    assert late.rate == pytest.approx(1.11, rel=0.01) and late.inputs.mean() == pytest.approx(9.6)


def beginnings(topics: int, count: int = 200) -> list[Row]:
    """Prompts that begin as others of their topic do, of which a replica holds few."""
    return [(n * 0.02, Size(88, 3, tuple(10 * (n * 7 % topics) + part for part in range(5)), 16)) for n in range(count)]


def test_what_a_shared_beginning_can_change_excludes_nothing(setup: Any) -> None:
    """A prompt of 88 tokens takes two steps, and more than 10 ms, unless 80 of them are there."""
    cost = CostModel(fixed=1e-3, per_token=1e-4)
    option = Candidate("any", 1, 1.0, lambda: setup(cost=cost, enable_prefix_caching=True))
    rows, targets = beginnings(4), Targets(0.008, None)
    (found,) = searched([option], traffic(rows), targets)
    assert found.replicas == 1
    without = Candidate("any", 1, 1.0, lambda: setup(cost=cost, enable_prefix_caching=False))
    (found,) = searched([without], traffic(rows), targets)
    assert "even one request at a time misses: TTFT" in found.reason
    (found,) = searched([option], traffic(rows), replace(targets, tpot=1e-4))
    assert "even one request at a time misses: TPOT" in found.reason


def test_a_router_that_knows_prefixes_is_tried_as_a_whole_fleet(setup: Any) -> None:
    """No replica holds all beginnings: a router that goes round never finds one, however many replicas there are."""
    option = Candidate("any", 1, 1.0, lambda: setup(cost=CostModel(1e-3, 1e-4), blocks=40, enable_prefix_caching=True))
    load, targets = traffic(beginnings(17, 400)), Targets(0.008, None)
    (found,) = searched([option], load, targets, "prefix-aware", 8)
    assert found.confirmed and found.replicas is not None and found.totals is not None
    assert found.totals.completed == 400
    (other,) = searched([option], load, targets, "round-robin", 8)
    assert other.replicas is None


class Fleets:
    """Instead of runs: how many replicas a configuration takes for one of them to do, and as a whole fleet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, needed: dict[str, tuple[int, int]], bounds: dict[str, int]):
        self.runs: list[tuple[str, bool, int]] = []
        self.needed = needed
        monkeypatch.setattr(plan_search, "_possible", lambda candidate, traffic, targets: candidate.name)
        monkeypatch.setattr(plan_search, "_bound", lambda setup, traffic, targets: bounds.get(setup, 1))
        monkeypatch.setattr(plan_search, "_shares", lambda setup, traffic: False)
        monkeypatch.setattr(plan_search, "_try", self.run)

    def run(self, setup: Any, traffic: Any, targets: Any, router: str | None, count: int) -> Tried:
        self.runs.append((setup, router is not None, count))
        return Tried(None if count >= self.needed[setup][router is not None] else "is late", None)


def test_the_answer_stays_the_cheapest_when_its_whole_fleet_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A takes 4 and not 2, so B comes first; C, left out because of A's first price, is looked at again."""
    options = [Candidate("a", 1, 5.0, too_small), Candidate("b", 1, 6.0, too_small), Candidate("c", 1, 3.9, too_small)]
    fleets = Fleets(monkeypatch, {"a": (2, 4), "b": (2, 3), "c": (4, 4)}, {"b": 2, "c": 3})
    first, *others = searched(options, traffic())
    assert (first.candidate.name, first.replicas, first.confirmed, first.price) == ("c", 4, True, 15.6)
    assert first.reason == "with 3 replicas is late"
    by_name = {one.candidate.name: one for one in others}
    assert by_name["a"].replicas is None and "with 3 replicas behind" in by_name["a"].reason
    assert all(one.reason and one.price >= first.price for one in others)
    assert len(fleets.runs) == len(set(fleets.runs))


def test_one_run_tells_what_cannot_be_cheaper_than_a_known_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """A takes 4, for 20.0. B would have to do with 6, and misses; C with 4, and does with 3."""
    options = [Candidate("a", 1, 5.0, too_small), Candidate("b", 1, 3.0, too_small), Candidate("c", 1, 4.0, too_small)]
    fleets = Fleets(monkeypatch, {"a": (4, 4), "b": (9, 9), "c": (3, 3)}, {"b": 2, "c": 2})
    first, *_ = searched(options, traffic())
    assert (first.candidate.name, first.replicas, first.price) == ("c", 3, 12.0)
    assert [count for name, _, count in fleets.runs if name == "b"] == [6]
    assert [count for name, whole, count in fleets.runs if name == "c" and not whole] == [4, 2, 3]


def test_a_whole_fleet_that_takes_fewer_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    fleets = Fleets(monkeypatch, {"a": (40, 7), "b": (60, 1)}, {})
    (first,) = searched([Candidate("a", 1, 1.0, too_small)], traffic())
    assert (first.replicas, first.confirmed) == (7, True) and "with 6 replicas" in first.reason
    assert sum(whole for _, whole, _ in fleets.runs) <= 8
    (first,) = searched([Candidate("b", 1, 1.0, too_small)], traffic())
    assert (first.replicas, first.reason) == (1, plan_search.ONE)


def test_an_answer_that_the_limit_forbids_leaves_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    Fleets(monkeypatch, {"a": (2, 4), "b": (3, 3)}, {})
    options = [Candidate("a", 1, 1.0, too_small), Candidate("b", 1, 9.0, too_small)]
    first, other = searched(options, traffic(), most=3)
    assert (first.candidate.name, first.replicas) == ("b", 3)
    assert other.replicas is None
    assert other.reason == "with 3 replicas behind --router round-robin is late; --max-gpus 3 allows no more"


def test_failed_requests_are_told_with_their_reason_and_do_not_count_twice(setup: Any) -> None:
    """A tenth may fail and a tenth of the others be late."""
    sizes = [Size(600, 1), Size(400, 1), *[Size(30, 1)] * 10]
    rows = [(number * 0.5, sizes[number % 12]) for number in range(120)]
    option = Candidate("any", 1, 1.0, setup)
    assert plan_search._try(setup(), traffic(rows), Targets(0.05, None), None, 1).missed is None
    (found,) = searched([option], traffic([(at, Size(600, 1)) for at, _ in LOAD]))
    assert "20 of 20 requests failed (20 context_length_exceeded: --max-model-len would cut them" in found.reason


def test_traffic_without_a_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 1 requests"):
        traffic_of(lambda: iter([(0.0, Size(1, 1))]))
