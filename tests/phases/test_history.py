"""What is remembered of the past, and for how long."""

from __future__ import annotations

import itertools

import pytest

from weft.core.plan import Lane
from weft.phases.history import ARRIVALS, NEVER, RATE_SECONDS, SPACING, STEPS_EACH, Usual, kept, rate, recent
from weft.phases.observations import Arrived, Stepped


def test_what_is_known_of_a_share_outlives_a_long_stay_at_another() -> None:
    def step(at: float, share: float) -> Stepped:
        return Stepped(at, Lane.DECODE, 0.01, 0, 4, 100, share)

    known = kept([step(i * 0.1, 0.25) for i in range(50)], [step(10 + i * 0.1, 0.75) for i in range(5000)])
    assert len([one for one in known if one.share == 0.25]) == STEPS_EACH
    at = [one.at for one in known if one.share == 0.75]
    assert all(b - a >= SPACING for a, b in itertools.pairwise(at)), "many of one moment are of one moment"
    assert max(one.at for one in known) == pytest.approx(10 + 499.9)


def arrivals(every: float, until: float, begin: float = 0.0) -> list[Arrived]:
    return [Arrived(begin + every * (number + 1), 100) for number in range(round((until - begin) / every))]


def told(found: list[Arrived], usual: Usual, new: list[Arrived]) -> tuple[list[Arrived], Usual]:
    """What is remembered after these, which are told one by one, as they come."""
    for one in new:
        found, usual = recent([*found, one], one.at), usual.then(1, one.at)
    return found, usual


@pytest.mark.parametrize("true", [0.05, 0.5, 4.0, 40.0, 200.0, 1000.0])
def test_a_rate_is_found_however_high_it_is(true: float) -> None:
    found, usual = told([], NEVER, arrivals(1.0 / true, 30.0 + 2.0 / true))
    now = found[-1].at
    assert rate(found, usual, now) == pytest.approx(true, rel=0.15)
    assert len(found) <= max(ARRIVALS, 1.0 * true + 1) and found[0].at >= now - RATE_SECONDS


def test_a_few_requests_at_once_are_no_rate() -> None:
    few = recent(arrivals(0.005, 0.05), 0.05)
    assert rate(few, NEVER, 0.05) < 10.0 and rate(few, NEVER.then(len(few), 0.05), 0.05) < 15.0
    assert rate([], NEVER, 1.0) == rate(arrivals(1.0, 1.0), NEVER, 1.0) == 0.0


def test_two_requests_that_follow_each_other_closely_are_no_other_rate_and_a_dozen_are() -> None:
    found, usual = told([], NEVER, arrivals(16.0, 800.0))
    true, now = 1.0 / 16.0, found[-1].at  # of the two alone it would be eight times as much
    assert rate(*told(found, usual, [Arrived(now + 2.0, 100)]), now + 2.0) < 2 * true
    assert rate(*told(found, usual, arrivals(0.25, now + 3.0, now)), now + 3.0) > 7 * true


def test_what_is_usual_follows_a_load_that_has_changed_for_good() -> None:
    found, usual = told([], NEVER, arrivals(10.0, 1000.0))
    assert usual.count / usual.seconds == pytest.approx(0.1, rel=0.1)
    _, usual = told(found, usual, arrivals(1.0, 2000.0, 1000.0))
    assert usual.count / usual.seconds == pytest.approx(1.0, rel=0.1)
