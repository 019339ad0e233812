"""The choice between plain, fused and woven: against the sums of its definition, and laws that must always hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.weave.choice import COLLECTIVES, FEW, GAIN, Costs, Curve, Mode, choose_mode, slowest

SECONDS = st.floats(1e-6, 1.0)


def line(floor: float, each: float) -> Curve:
    return Curve(tuple((tokens, floor + each * tokens) for tokens in (1, 64, 1024)))


def test_a_curve_goes_through_its_points_and_on_beyond_them() -> None:
    curve = Curve(((10, 1.0), (20, 2.0), (40, 2.5)))
    assert [curve(tokens) for tokens in (1, 10, 15, 20, 30, 40, 80)] == [1.0, 1.0, 1.5, 2.0, 2.25, 2.5, 3.5]
    assert [Curve(((8, 3.0),))(tokens) for tokens in (1, 100)] == [3.0, 3.0]


def two_by_pairs(costs: Costs, prefix: int, suffix: int) -> float:
    """Two strands: each stage is beside the seam of the other, and both must be over before the next."""
    assert costs.drag is not None
    now, flying = 0.0, 0.0  # what is left of the seam in flight
    for _ in range(costs.layers):
        for stage in (costs.attend, costs.feed):
            for own in (prefix, suffix):
                busy = stage(own)
                now += max(busy, flying) + costs.drag * min(busy, flying)
                flying = costs.seams[Mode.FUSED](own)
    return now + flying


def by_lists(costs: Costs, strands: list[int]) -> float:
    """Any number of strands, without drag, all layers: when each stage and each seam ends."""
    stages: list[float] = []
    seams: list[float] = []
    for number in range(2 * costs.layers * len(strands)):
        own = strands[number % len(strands)]
        stage = (costs.attend, costs.feed)[number // len(strands) % 2]
        last = seams[number - len(strands)] if number >= len(strands) else 0.0
        stages.append(max(stages[-1] if stages else 0.0, last) + stage(own))
        seams.append(max(stages[-1], seams[-1] if seams else 0.0) + costs.seams[Mode.FUSED](own))
    return max(stages[-1], seams[-1])


@given(SECONDS, SECONDS, SECONDS, st.floats(0, 1), st.integers(1, 40), st.integers(2, 900), st.data())
@settings(deadline=None)
def test_the_time_of_a_woven_step(
    attend: float, feed: float, seam: float, drag: float, layers: int, tokens: int, data: st.DataObject
) -> None:
    prefix = data.draw(st.integers(1, tokens - 1))
    costs = Costs(layers, line(0.0, attend), line(0.01, feed), {Mode.FUSED: line(0.001, seam)}, drag)
    assert costs.seconds(Mode.WOVEN, (prefix, tokens - prefix)) == pytest.approx(
        two_by_pairs(costs, prefix, tokens - prefix)
    )


@pytest.mark.parametrize(
    ("stage", "seam", "took"),
    [
        # Each seam is beside the stage after it, all but the last, and both take longer by half of the seam.
        (4.0, 1.0, 6 * 4 + 5 * 0.5 + 1),
        # Seams wait for one another, each beside a stage, and both take longer by half of the stage.
        (2.0, 3.0, 2 + 6 * 3 + 5 * 1),
    ],
)
def test_three_strands_pay_for_what_goes_side_by_side(stage: float, seam: float, took: float) -> None:
    one, join = Curve(((1, stage),)), Curve(((1, seam),))
    assert Costs(1, one, one, {Mode.FUSED: join}, 0.5).seconds(Mode.WOVEN, (5, 5, 5)) == took


def test_a_program_stands_for_fused_steps_up_to_its_last_point() -> None:
    """And may so be chosen where the same calls one by one would not be."""
    stage, seams = line(0.0, 1e-5), {Mode.PLAIN: line(0.0, 1e-6), Mode.FUSED: line(0.0, 5e-6)}
    calls = Costs(4, stage, stage, seams, 0.0)
    small = replace(calls, program=Curve(((1, 1e-6), (64, 64e-6))))
    assert small.seconds(Mode.FUSED, (64,)) == pytest.approx(4 * 64e-6)
    for mode, strands in ((Mode.FUSED, (65,)), (Mode.PLAIN, (64,)), (Mode.WOVEN, (32, 32))):
        assert small.seconds(mode, strands) == calls.seconds(mode, strands)
    assert choose_mode(calls, 64, [(32, 32)])[0] is not Mode.FUSED
    assert choose_mode(small, 64, [(32, 32)]) == (Mode.FUSED, (64,))


@given(SECONDS, SECONDS, SECONDS, st.integers(1, 40), st.integers(2, 5), st.integers(1, 300))
@settings(deadline=None)
def test_a_few_layers_tell_of_all(
    attend: float, feed: float, seam: float, layers: int, strands: int, tokens: int
) -> None:
    """They are exact where there are no more; else nearly so, since seams that are too long pile up by and by."""
    costs = Costs(layers, line(0.0, attend), line(0.01, feed), {Mode.FUSED: line(0.001, seam)}, 0.0)
    exact = by_lists(costs, [tokens] * strands)
    assert costs.seconds(Mode.WOVEN, [tokens] * strands) == pytest.approx(exact, rel=1e-6 if layers <= FEW else 0.1)


def rejoining(costs: Costs, strands: list[int]) -> float:
    """All layers, without drag: when the wire is free, and when each strand's rows have come."""
    now = wire = 0.0
    come = [0.0] * len(strands)

    def send(strand: int) -> None:
        nonlocal wire
        wire = come[strand] = max(now, wire) + costs.seams[Mode.FUSED](strands[strand])

    for _ in range(costs.layers):
        for strand, own in enumerate(strands):
            now = max(now, come[strand]) + costs.attend(own)
            send(strand)
        now = max(now, wire) + costs.feed(sum(strands))
        for strand in range(len(strands)):
            send(strand)
    return max(now, wire)


@given(SECONDS, SECONDS, SECONDS, st.integers(1, 40), st.lists(st.integers(1, 300), min_size=2, max_size=4))
@settings(deadline=None)
def test_the_time_of_a_step_whose_strands_rejoin(
    attend: float, feed: float, seam: float, layers: int, strands: list[int]
) -> None:
    costs = Costs(layers, line(0.0, attend), line(0.01, feed), {Mode.FUSED: line(0.001, seam)}, 0.0, mixed=True)
    assert costs.seconds(Mode.REJOINED, strands) == pytest.approx(rejoining(costs, strands), rel=1e-6)


def test_experts_are_computed_once_where_a_part_of_the_rows_costs_as_much_as_all() -> None:
    """And apart where it does not: then there is more beside a seam. Only where there are experts."""
    seam, attend = {Mode.FUSED: line(0.0, 2e-6)}, line(0.0, 5e-6)
    read, computed = Curve(((1, 2e-3), (900, 3e-3))), line(0.0, 4e-6)
    cuts = [(450, 450), (300, 300, 300)]
    assert choose_mode(Costs(20, attend, read, seam, 0.0, mixed=True), 900, cuts)[0] is Mode.REJOINED
    assert choose_mode(Costs(20, attend, computed, seam, 0.0, mixed=True), 900, cuts)[0] is Mode.WOVEN
    assert choose_mode(Costs(20, attend, read, seam, 0.0), 900, cuts)[0] is not Mode.REJOINED
    assert Mode.REJOINED not in COLLECTIVES and Mode.REJOINED.seams is Mode.WOVEN


def test_a_third_strand_evens_out_short_and_long_stages() -> None:
    costs = Costs(20, line(0.0, 2e-6), line(0.0, 8e-6), {Mode.FUSED: line(0.0, 3e-6)}, 0.0)
    alone = 20 * 10e-6 * 900
    two, three = (costs.seconds(Mode.WOVEN, [900 // count] * count) / alone for count in (2, 3))
    assert two > 1.09 and three < 1.02
    assert choose_mode(costs, 900, [(450, 450), (300, 300, 300)]) == (Mode.WOVEN, (300, 300, 300))


@given(
    st.lists(SECONDS, min_size=8, max_size=8),
    st.floats(0, 1) | st.none(),
    st.integers(1, 2000),
    st.integers(0, 2000),
    st.sets(st.sampled_from([Mode.PLAIN, Mode.ONE_SHOT])),
    st.booleans(),
)
@settings(deadline=None)
def test_the_chosen_mode_is_never_slower_than_a_simpler_one(
    numbers: list[float], drag: float | None, tokens: int, prefix: int, others: set[Mode], mixed: bool
) -> None:
    a, b, c, d, e, f, g, h = numbers
    seams = {Mode.FUSED: line(c, d), Mode.PLAIN: line(e, f), Mode.ONE_SHOT: line(f, c)}
    costs = Costs(4, line(a, b), line(g, h), {mode: seams[mode] for mode in (Mode.FUSED, *others)}, drag, mixed=mixed)
    cuts = [(prefix, tokens - prefix), (prefix, 1, tokens - prefix - 1)] if 0 < prefix < tokens - 1 else [(tokens,)]
    chosen, strands = choose_mode(costs, tokens, cuts)
    simpler = [mode for mode in list(Mode)[: list(Mode).index(chosen)] if mode in costs.seams]
    took = costs.seconds(chosen, strands)
    assert all(took <= (1 - GAIN) * costs.seconds(mode, (tokens,)) for mode in simpler)
    for mode in costs.seams:  # nothing that there is would save much more
        assert took <= costs.seconds(mode, (tokens,)) / (1 - GAIN)
    if drag is not None and len(cuts) > 1:
        woven = [Mode.WOVEN, Mode.REJOINED] if mixed else [Mode.WOVEN]
        assert all(took <= costs.seconds(mode, cut) / (1 - GAIN) for mode in woven for cut in cuts)
    assert strands in cuts if chosen.seams is Mode.WOVEN else strands == (tokens,)
    if drag is None or len(cuts) == 1:
        assert chosen.seams is not Mode.WOVEN
    assert mixed or chosen is not Mode.REJOINED


def test_weaving_loses_where_seams_are_latency_and_wins_where_they_are_bandwidth() -> None:
    def chosen(stage: Curve, seam: Curve, drag: float) -> Mode:
        return choose_mode(Costs(8, stage, stage, {Mode.FUSED: seam}, drag), 200, [(100, 100), (67, 67, 66)])[0]

    assert chosen(line(0.0, 1e-5), line(4e-3, 0.0), 0.0) is Mode.FUSED
    assert chosen(line(0.0, 1e-5), line(0.0, 5e-6), 0.1) is Mode.WOVEN
    one_wave = Curve(((1, 1e-3), (256, 1.1e-3)))  # a part costs as much as the whole
    assert chosen(one_wave, line(0.0, 5e-6), 0.1) is Mode.FUSED
    assert chosen(line(0.0, 1e-5), line(0.0, 5e-6), 1.0) is Mode.FUSED


def test_all_ranks_go_by_the_slowest() -> None:
    assert slowest([[1.0, 5.0], [2.0, 4.0]]) == [2.0, 5.0]
