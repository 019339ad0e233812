"""What is remembered of the past, and for how long."""

from __future__ import annotations

import itertools

import pytest

from weft.core.plan import Lane
from weft.phases.history import ARRIVALS, RATE_SECONDS, SPACING, STEPS_EACH, kept, rate, recent
from weft.phases.observations import Arrived, Stepped


def test_what_is_known_of_a_share_outlives_a_long_stay_at_another() -> None:
    def step(at: float, share: float) -> Stepped:
        return Stepped(at, Lane.DECODE, 0.01, 0, 4, 100, share)

    known = kept([step(i * 0.1, 0.25) for i in range(50)], [step(10 + i * 0.1, 0.75) for i in range(5000)])
    assert len([one for one in known if one.share == 0.25]) == STEPS_EACH
    at = [one.at for one in known if one.share == 0.75]
    assert all(b - a >= SPACING for a, b in itertools.pairwise(at)), "many of one moment are of one moment"
    assert max(one.at for one in known) == pytest.approx(10 + 499.9)


def arrivals(every: float, until: float) -> list[Arrived]:
    return [Arrived(every * (number + 1), 100) for number in range(round(until / every))]


@pytest.mark.parametrize("true", [0.5, 4.0, 40.0, 200.0, 1000.0])
def test_a_rate_is_found_however_high_it_is(true: float) -> None:
    found: list[Arrived] = []
    for one in arrivals(1.0 / true, 30.0):  # told one by one, as they come
        found = recent([*found, one], one.at)
    assert rate(found, 30.0) == pytest.approx(true, rel=0.11)
    assert len(found) <= max(ARRIVALS, 1.0 * true + 1) and found[0].at >= 30.0 - RATE_SECONDS


def test_a_few_requests_at_once_are_no_rate() -> None:
    assert rate(recent(arrivals(0.005, 0.05), 0.05), 0.05) < 10.0
    assert rate([], 1.0) == rate(arrivals(1.0, 1.0), 1.0) == 0.0
