"""semi-PD's controller: the moves of the public code, one by one."""

from __future__ import annotations

from typing import Any

import pytest

from weft.core.plan import Partition, Regime
from weft.phases.observations import Decision, Finished, Queue, Targets
from weft.phases.paper import PaperPolicy, PaperState, prefill_curve, tpot_curve, waiting_curve

POLICY = PaperPolicy(Targets(0.5, 0.1), 100)


def ended(ttft: float, tpot: float, count: int = 400, waited: float = 0.0) -> tuple[Finished, ...]:
    return tuple(Finished(float(i), 0.0, ttft, waited, tpot, 50) for i in range(count))


def after(state: PaperState, *seen: Finished) -> tuple[PaperState, Decision | None]:
    moved, decision = POLICY.decide(state, seen, Queue(), 7.0)
    assert isinstance(moved, PaperState)
    return moved, decision


def shares(state: PaperState) -> tuple[int, int]:
    return state.prefill, state.decode


def test_the_curves_are_those_of_the_code_and_one_at_the_whole_device() -> None:
    for curve in (tpot_curve, prefill_curve, waiting_curve):
        assert curve(100) == 1.0
    assert tpot_curve(80) == pytest.approx(0.610 * 1.25 + 0.415)
    assert prefill_curve(80) == pytest.approx(0.732 * 1.25 + 0.319)
    assert waiting_curve(80) == pytest.approx(1.119, abs=0.001), "the digest's value"
    assert waiting_curve(89) < waiting_curve(80) and waiting_curve(89) < waiting_curve(99)


def test_it_starts_with_both_at_the_whole_device_and_waits_for_400_requests() -> None:
    first = POLICY.first(1.0)
    assert first.sharing.partition == Partition(100, 100) and first.sharing.regime is Regime.SPLIT
    state, decision = after(POLICY.start(), *ended(9.0, 9.0, 399))
    assert decision is None and len(state.window) == 399
    state, decision = after(state, *ended(9.0, 9.0, 1))
    assert state.window == ()


def test_one_token_answers_have_no_tpot_and_do_not_count() -> None:
    state, _ = after(POLICY.start(), Finished(1.0, 0.0, 1.0, 0.0, None, 1))
    assert state.window == ()


@pytest.mark.parametrize(
    ("before", "ttft", "tpot", "wanted"),
    [
        ((100, 100), 0.4, 0.09, (100, 100)),  # both met: 0.09 * 1.1 is just below the target
        ((100, 100), 0.1, 0.2, (94, 100)),  # TPOT misses, decode is at 100: prefill gives three steps of two
        ((100, 100), 0.46, 0.2, (96, 100)),  # and only as far as the predicted TTFT holds
        ((82, 100), 0.1, 0.2, (80, 100)),  # never below the floor
        ((100, 90), 0.1, 0.2, (100, 96)),  # decode is below 100: it gets three steps
        ((100, 98), 0.1, 0.2, (100, 100)),
        ((100, 100), 2.0, 0.05, (100, 94)),  # the mirror image for TTFT
        ((84, 100), 2.0, 0.05, (90, 100)),
        ((90, 90), 2.0, 0.2, (100, 100)),  # both miss
        ((90, 100), 2.0, 0.2, (90, 100)),  # both miss, and one is at 100 already: nothing, as in the code
    ],
)
def test_the_moves(before: tuple[int, int], ttft: float, tpot: float, wanted: tuple[int, int]) -> None:
    state, decision = after(PaperState(*before), *ended(ttft, tpot))
    assert shares(state) == wanted
    assert (decision is None) == (before == wanted)
    if decision is not None:
        assert (
            decision.sharing.partition == Partition(*wanted) and f"{wanted[0]}:{wanted[1]} percent" in decision.reason
        )


def test_it_takes_the_90th_percentile() -> None:
    fine, bad = ended(0.1, 0.05, 362), ended(0.1, 0.5, 38)
    assert after(POLICY.start(), *fine, *bad)[1] is None
    assert after(POLICY.start(), *fine[:358], *bad, *ended(0.1, 0.5, 4))[1] is not None


def test_the_reason_says_of_how_many_requests_it_speaks() -> None:
    """More than the window, where several end between two questions."""
    state, _ = after(POLICY.start(), *ended(0.1, 0.5, 399))
    _, decision = after(state, *ended(0.1, 0.5, 4))
    assert decision is not None and "of 403 requests" in decision.reason


def test_percent_are_rounded_to_the_devices_units() -> None:
    for units, wanted in ((2, Partition(2, 2)), (12, Partition(11, 12)), (1, Partition(1, 1))):
        policy: Any = PaperPolicy(Targets(0.5, 0.1), units)
        assert policy._decision(PaperState(94, 100), 0.0, "").sharing.partition == wanted
