"""The search for the cheapest fleet, against trying everything."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.bench.stats import Slo
from weft.bench.traces import Size
from weft.devices.cost import CostModel
from weft.errors import ConfigError
from weft.sim import plan_search
from weft.sim.plan_search import Candidate, Targets, Verdict, confirmed, search, traffic_of
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
    traffic = traffic_of(lambda: iter(LOAD))
    assert traffic.rate == pytest.approx(80.0) and traffic.seconds == LOAD[-1][0]
    verdicts = search(candidates(setup), traffic, TARGETS, 64, lambda done, words: shown.append((done, words)))
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
    verdicts = search(candidates(setup)[:1], traffic_of(lambda: iter(LOAD)), TARGETS, 1, lambda done, words: None)
    assert verdicts[0].replicas is None
    assert "--max-gpus 1" in verdicts[0].reason or "with 1 replica" in verdicts[0].reason


@given(
    bound=st.integers(1, 30), needed=st.integers(1, 90), most=st.integers(1, 64), best=st.none() | st.integers(1, 70)
)
def test_the_fewest_replicas_are_found_within_the_limits(bound: int, needed: int, most: int, best: int | None) -> None:
    """However many it takes: as if one after the other had been tried, from the bound on."""
    asked: list[int] = []

    def enough(setup: Any, traffic: Any, targets: Any, count: int) -> tuple[str | None, None]:
        asked.append(count)
        return (None if count >= needed else "misses"), None

    nothing: Any = None
    verdict = Verdict(Candidate("any", 1, 1.0, too_small), "", bound)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plan_search, "_try", enough)
        price = math.inf if best is None else float(best)
        found = plan_search._fewest(verdict, nothing, nothing, TARGETS, most, price)
    limit = most if best is None else min(most, best - 1)
    expected = next((count for count in range(bound, limit + 1) if count >= needed), None)
    assert found.replicas == expected and found.reason
    assert len(asked) == len(set(asked)) and all(bound <= count <= limit for count in asked)


def test_the_bound_is_no_more_than_what_it_takes(setup: Any) -> None:
    traffic = traffic_of(lambda: iter(LOAD))
    for candidate in candidates(setup)[:2]:
        made = candidate.make()
        assert 1 <= plan_search._bound(made, traffic) <= fewest(made)


def test_the_answer_is_confirmed_on_its_whole_fleet(setup: Any) -> None:
    traffic = traffic_of(lambda: iter(LOAD))
    (verdict,) = search(candidates(setup)[1:2], traffic, TARGETS, 64, lambda done, words: None)
    found = confirmed(verdict, traffic, TARGETS, "least-loaded", 64)
    assert found.replicas is not None and found.totals is not None and found.totals.completed == len(LOAD)
    assert TARGETS.missed(found.totals) is None
    with pytest.raises(ConfigError, match="--max-gpus 0"):
        confirmed(verdict, traffic, TARGETS, "least-loaded", 0)


def test_traffic_without_a_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 1 requests"):
        traffic_of(lambda: iter([(0.0, Size(1, 1))]))
