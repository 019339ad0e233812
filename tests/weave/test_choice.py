"""The choice between plain, fused and woven: against the sums of its definition, and laws that must always hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.weave.choice import GAIN, Costs, Curve, Mode, choose_mode, slowest

SECONDS = st.floats(1e-6, 1.0)


def line(floor: float, each: float) -> Curve:
    return Curve(tuple((tokens, floor + each * tokens) for tokens in (1, 64, 1024)))


def test_a_curve_goes_through_its_points_and_on_beyond_them() -> None:
    curve = Curve(((10, 1.0), (20, 2.0), (40, 2.5)))
    assert [curve(tokens) for tokens in (1, 10, 15, 20, 30, 40, 80)] == [1.0, 1.0, 1.5, 2.0, 2.25, 2.5, 3.5]
    assert [Curve(((8, 3.0),))(tokens) for tokens in (1, 100)] == [3.0, 3.0]


def woven_by_events(costs: Costs, prefix: int, suffix: int) -> float:
    """Clock by clock: a stage starts when its strand's seam has come, and the other's seam starts after the stage."""
    assert costs.drag is not None
    now, flying = 0.0, 0.0  # what is left of the seam in flight
    for _ in range(costs.layers):
        for stage in (costs.attend, costs.feed):
            for own in (prefix, suffix):
                busy = stage(own)
                now += max(busy, flying) + costs.drag * min(busy, flying)
                flying = costs.seams[Mode.FUSED](own)
    return now + flying


@given(SECONDS, SECONDS, SECONDS, st.floats(0, 1), st.integers(1, 40), st.integers(2, 900), st.data())
@settings(deadline=None)
def test_the_time_of_a_woven_step(
    attend: float, feed: float, seam: float, drag: float, layers: int, tokens: int, data: st.DataObject
) -> None:
    prefix = data.draw(st.integers(1, tokens - 1))
    costs = Costs(layers, line(0.0, attend), line(0.01, feed), {Mode.FUSED: line(0.001, seam)}, drag)
    took = woven_by_events(costs, prefix, tokens - prefix)
    # By the clock nothing is in flight beside the first stage; in a layer of many it is.
    first = costs.attend(prefix)
    last = costs.seams[Mode.FUSED](tokens - prefix)
    beside = max(first, last) + drag * min(first, last)
    assert costs.seconds(Mode.WOVEN, tokens, prefix) == pytest.approx(took - first + beside)


@given(
    st.lists(SECONDS, min_size=8, max_size=8),
    st.floats(0, 1) | st.none(),
    st.integers(1, 2000),
    st.integers(0, 2000),
    st.sets(st.sampled_from([Mode.PLAIN, Mode.ONE_SHOT])),
)
@settings(deadline=None)
def test_the_chosen_mode_is_never_slower_than_a_simpler_one(
    numbers: list[float], drag: float | None, tokens: int, prefix: int, others: set[Mode]
) -> None:
    a, b, c, d, e, f, g, h = numbers
    seams = {Mode.FUSED: line(c, d), Mode.PLAIN: line(e, f), Mode.ONE_SHOT: line(f, c)}
    costs = Costs(4, line(a, b), line(g, h), {mode: seams[mode] for mode in (Mode.FUSED, *others)}, drag)
    chosen = choose_mode(costs, tokens, prefix)
    simpler = [mode for mode in list(Mode)[: list(Mode).index(chosen)] if mode in costs.seams]
    took = costs.seconds(chosen, tokens, prefix)
    assert all(took <= (1 - GAIN) * costs.seconds(mode, tokens, prefix) for mode in simpler)
    for mode in costs.seams:  # nothing that there is would save much more
        assert took <= costs.seconds(mode, tokens, prefix) / (1 - GAIN)
    if drag is None or not 0 < prefix < tokens:
        assert chosen is not Mode.WOVEN


def test_weaving_loses_where_seams_are_latency_and_wins_where_they_are_bandwidth() -> None:
    latency = Costs(8, line(0.0, 1e-5), line(0.0, 1e-5), {Mode.FUSED: line(4e-3, 0.0)}, 0.0)
    assert choose_mode(latency, 200, 100) is Mode.FUSED
    bandwidth = Costs(8, line(0.0, 1e-5), line(0.0, 1e-5), {Mode.FUSED: line(0.0, 5e-6)}, 0.1)
    assert choose_mode(bandwidth, 200, 100) is Mode.WOVEN
    taxed = Costs(8, Curve(((1, 1e-3), (256, 1.1e-3))), line(1e-3, 0.0), {Mode.FUSED: line(0.0, 5e-6)}, 0.1)
    assert choose_mode(taxed, 200, 100) is Mode.FUSED  # a half costs as much as the whole: one wave
    assert (
        choose_mode(Costs(8, line(0.0, 1e-5), line(0.0, 1e-5), {Mode.FUSED: line(0.0, 5e-6)}, 1.0), 200, 100)
        is Mode.FUSED
    )


def test_all_ranks_go_by_the_slowest() -> None:
    assert slowest([[1.0, 5.0], [2.0, 4.0]]) == [2.0, 5.0]
