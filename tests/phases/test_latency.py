"""The latency models against data made from known parameters: with noise, outliers, drift, and too little of it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core.plan import Lane
from weft.phases.latency import StepModel, TtftModel, TtftSample, Unfit, drift, fit_one_share, fit_steps, fit_ttft
from weft.phases.observations import Stepped

SHARES = (0.2, 0.35, 0.5, 0.65, 0.8, 1.0)


def ttft_samples(truth: TtftModel, rng: random.Random, count: int = 120, noise: float = 0.05) -> list[TtftSample]:
    made = []
    for number in range(count):
        share = rng.choice(SHARES)
        load = rng.uniform(0.0, 0.8) * share
        seconds = truth.predict(share, load) * math.exp(rng.gauss(0.0, noise))
        made.append(TtftSample(number * 0.1, share, load, seconds))
    return made


def steps(
    truth: StepModel,
    rng: random.Random,
    count: int = 240,
    noise: float = 0.03,
    shares: tuple[float, ...] = SHARES,
    start: float = 0.0,
) -> list[Stepped]:
    made = []
    for number in range(count):
        share, batch, context = rng.choice(shares), rng.randint(1, 32), rng.randint(100, 20000)
        rival = rng.choice([0.0, 0.0, 0.6, 1.0])
        seconds = truth.predict(batch, context, share, rival) * math.exp(rng.gauss(0.0, noise))
        made.append(Stepped(start + number * 0.1, Lane.DECODE, seconds, 0, batch, context, share, rival))
    return made


def far(samples: list[Stepped], rng: random.Random, part: float) -> list[Stepped]:
    """A part of the samples made 3 to 30 times too slow, as by a stalled machine."""
    return [
        Stepped(s.at, s.lane, s.seconds * rng.uniform(3, 30), 0, s.output, s.context, s.share, s.rival)
        if rng.random() < part
        else s
        for s in samples
    ]


def bent(samples: list[Stepped], law: StepModel, bend: float) -> list[Stepped]:
    """As on a device whose curve over shares is another: a share counts as share ** bend."""
    made = []
    for one in samples:
        other = replace(one, share=one.share**bend)
        made.append(replace(one, seconds=one.seconds * law.of_step(other) / law.of_step(one)))
    return made


@given(a=st.floats(0.01, 2.0), b=st.floats(0.0, 0.5), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_ttft_curve_is_found_again(a: float, b: float, seed: int) -> None:
    rng, truth = random.Random(seed), TtftModel(a, b)
    model = fit_ttft(ttft_samples(truth, rng), now=12.0)
    assert isinstance(model, TtftModel)
    for share, load in ((0.3, 0.1), (0.5, 0.3), (0.9, 0.2), (1.0, 0.7)):
        assert model.predict(share, load) == pytest.approx(truth.predict(share, load), rel=0.08)
    assert model.error < 0.08 and model.shares == pytest.approx(SHARES)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_a_fifth_of_gross_outliers_does_not_move_the_ttft_curve(seed: int) -> None:
    rng, truth = random.Random(seed), TtftModel(0.3, 0.05)
    samples = [
        TtftSample(s.at, s.share, s.load, s.seconds * (20.0 if rng.random() < 0.2 else 1.0))
        for s in ttft_samples(truth, rng)
    ]
    model = fit_ttft(samples, now=12.0)
    assert isinstance(model, TtftModel)
    assert model.predict(0.6, 0.3) == pytest.approx(truth.predict(0.6, 0.3), rel=0.12)


def test_an_unstable_queue_is_infinite_and_tells_nothing() -> None:
    model = TtftModel(0.3, 0.1)
    assert model.predict(0.5, 0.5) == math.inf and model.predict(0.5, 0.495) == math.inf
    assert model.predict(0.5, 0.4) == pytest.approx(3.1)
    rng = random.Random(1)
    samples = ttft_samples(model, rng)
    with_nonsense = samples + [TtftSample(1.0, 0.2, 0.9, 77.0)] * 50
    assert fit_ttft(with_nonsense, now=12.0) == fit_ttft(samples, now=12.0)


def test_one_share_alone_is_refused_by_name() -> None:
    rng = random.Random(2)
    alone = [s for s in ttft_samples(TtftModel(0.3, 0.1), rng, 300) if s.share == 0.5]
    refused = fit_ttft(alone, now=30.0)
    assert isinstance(refused, Unfit) and "one share alone (50%)" in refused.reason
    refused = fit_steps(steps(StepModel(0.01, 0.01, 0, 0), rng, shares=(0.8,)), now=24.0)
    assert isinstance(refused, Unfit) and "one share alone (80%)" in refused.reason
    assert isinstance(fit_ttft([], now=0.0), Unfit) and isinstance(fit_steps([], now=0.0), Unfit)


def test_a_share_that_was_left_long_ago_is_no_longer_known() -> None:
    rng, truth = random.Random(3), StepModel(0.002, 0.01, 1e-4, 1e-7)
    old, new = steps(truth, rng, 50, shares=(0.3,)), steps(truth, rng, 50, shares=(0.8,), start=600.0)
    assert isinstance(fit_steps(old + new, now=605.0, half_life=60.0), Unfit)
    assert isinstance(fit_steps(old + new, now=605.0, half_life=600.0), StepModel)


@given(
    fixed=st.floats(0.0, 0.01),
    base=st.floats(0.004, 0.05),
    token=st.floats(0.0, 5e-4),
    slot=st.floats(0.0, 1e-6),
    saturation=st.sampled_from([0.35, 0.5, 0.7, 1.0]),
    contention=st.floats(0.0, 0.6),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=20, deadline=None)
def test_the_step_law_is_found_again(
    fixed: float, base: float, token: float, slot: float, saturation: float, contention: float, seed: int
) -> None:
    rng = random.Random(seed)
    truth = StepModel(fixed, base, token, slot, saturation, contention)
    model = fit_steps(far(steps(truth, rng), rng, 0.1), now=24.0)
    assert isinstance(model, StepModel)
    for share in (0.25, 0.5, 0.9):
        for rival in (0.0, 1.0):
            wanted = truth.predict(16, 8000, share, rival)
            assert model.predict(16, 8000, share, rival) == pytest.approx(wanted, rel=0.15)


def test_the_saturation_point_takes_three_shares_and_is_where_the_curve_bends() -> None:
    rng, truth = random.Random(5), StepModel(0.001, 0.01, 0, 0, saturation=0.5)
    model = fit_steps(steps(truth, rng), now=24.0)
    assert isinstance(model, StepModel) and model.saturation == pytest.approx(0.5, abs=0.051)
    two = fit_steps(steps(truth, rng, shares=(0.2, 0.4)), now=24.0)
    assert isinstance(two, StepModel) and two.saturation is None
    below = fit_steps(steps(truth, rng, shares=(0.1, 0.2, 0.3, 0.4)), now=24.0)
    assert isinstance(below, StepModel) and below.saturation == 1.0


@given(contention=st.floats(0.0, 0.6), bend=st.floats(0.85, 1.2), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_contention_is_found_where_shares_and_rivals_are_drawn_apart_whatever_the_curve(
    contention: float, bend: float, seed: int
) -> None:
    """bend: the exponent of the device's curve over shares, which the law takes for 1."""
    rng, truth = random.Random(seed), StepModel(0.001, 0.01, 1e-4, 1e-7, contention=contention)
    model = fit_steps(bent(steps(truth, rng, 400), truth, bend), now=40.0)
    assert isinstance(model, StepModel) and model.contention == pytest.approx(contention, abs=0.05)
    assert model.excess == 0.0


@given(contention=st.floats(0.0, 0.6), bend=st.floats(0.85, 1.2), sizes=st.booleans(), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_rival_at_some_shares_only_or_beside_some_sizes_only_does_not_tell_contention(
    contention: float, bend: float, sizes: bool, seed: int
) -> None:
    """As an engine sees it: a lane alone has the whole device, and a share of it beside the other lane. Contention and
    a steeper curve explain that equally well. Likewise where steps beside a rival are all larger than those alone."""
    rng, truth = random.Random(seed), StepModel(0.001, 0.01, 1e-4, 1e-7, contention=contention)
    made = []
    for one in steps(truth, rng, 300):
        rival, output = float(one.share < 1.0), one.output
        if sizes:
            rival, output = rng.choice([(0.0, rng.randint(1, 7)), (1.0, rng.randint(8, 31))])
        seconds = truth.predict(output, one.context, one.share, rival)
        made.append(replace(one, output=output, rival=rival, seconds=seconds * math.exp(rng.gauss(0.0, 0.02))))
    seen = bent(made, truth, bend)
    model = fit_steps(seen, now=30.0)
    assert isinstance(model, StepModel) and model.contention is None
    # What was seen is predicted as well as before: mean costs beside and alone are those that were observed.
    for rival in (0.0, 1.0):
        assert drift(model, [one for one in seen if one.rival == rival]) == pytest.approx(1.0, abs=0.12)


def test_what_a_slope_explains_is_not_put_down_to_the_rival() -> None:
    """Half of the device takes 1.5 times as long, beside a rival; that may be the share alone."""
    rng, slope = random.Random(6), StepModel(0.005, 0.005, 0, 0)
    seen = [replace(one, rival=float(one.share < 1.0)) for one in steps(slope, rng, shares=(0.5, 1.0))]
    seen = [replace(one, seconds=0.015 if one.rival else 0.01) for one in seen]
    model = fit_steps(seen, now=24.0)
    assert isinstance(model, StepModel) and model.contention is None and model.excess < 0.01
    beyond = [replace(one, seconds=0.026 if one.rival else 0.01) for one in seen]
    model = fit_steps(beyond, now=24.0)
    assert isinstance(model, StepModel) and model.contention is None and model.excess == pytest.approx(0.3, abs=0.01)
    assert model.predict(8, 500, 0.5, rival=1.0) == pytest.approx(0.026, rel=0.02)
    assert model.predict(8, 500, 1.0) == pytest.approx(0.01, rel=0.02)


def test_contention_that_was_seen_long_ago_is_no_longer_told() -> None:
    rng, truth = random.Random(6), StepModel(0.001, 0.01, 0, 0, contention=0.4)
    old, new = steps(truth, rng), [one for one in steps(truth, rng, start=600.0) if one.rival == 1.0]
    told, untold = (fit_steps(old + new, now=624.0, half_life=one) for one in (600.0, 60.0))
    assert isinstance(told, StepModel) and told.contention == pytest.approx(0.4, abs=0.05)
    assert isinstance(untold, StepModel) and untold.contention is None


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_a_device_that_becomes_slower_is_followed(seed: int) -> None:
    rng = random.Random(seed)
    before, after = StepModel(0.001, 0.01, 0, 0, 0.6), StepModel(0.001, 0.02, 0, 0, 0.6)
    samples = steps(before, rng, 300) + steps(after, rng, 300, start=30.0)
    model = fit_steps(samples, now=60.0, half_life=5.0)
    assert isinstance(model, StepModel)
    assert model.predict(16, 8000, 0.4) == pytest.approx(after.predict(16, 8000, 0.4), rel=0.08)


def test_each_part_of_a_step_that_is_cut_costs_the_fixed_part_anew() -> None:
    truth, rng, steps = StepModel(2e-3, 4e-3, 5e-5, 1e-8), random.Random(4), []
    for number in range(120):
        share, parts, tokens = rng.choice([0.25, 0.5, 1.0]), rng.choice([1, 2, 8]), rng.randint(64, 512)
        seconds = truth.predict(tokens, 3000, share, parts=parts) * rng.uniform(0.99, 1.01)
        steps.append(Stepped(float(number) / 10, Lane.PREFILL, seconds, tokens, 0, 3000, share, parts=parts))
    found = fit_steps(steps, 12.0)
    assert isinstance(found, StepModel) and found.fixed == pytest.approx(truth.fixed, rel=0.1)
    assert found.predict(512, 3000, 0.5, parts=8) == pytest.approx(truth.predict(512, 3000, 0.5, parts=8), rel=0.03)


def chunks(prompt: int, chunk: int, truth: StepModel, decoding: int, rng: random.Random, at: float) -> list[Stepped]:
    """The steps of one prompt, beside so many that decode, each with 500 slots."""
    made = []
    for start in range(0, prompt, chunk):
        tokens = min(chunk, prompt - start)
        read, pairs = start + tokens, tokens * start + tokens * (tokens + 1) // 2
        step = Stepped(at, Lane.DECODE, 1.0, tokens, decoding, read + 500 * decoding, 1.0, read=read, pairs=pairs)
        made.append(replace(step, at=at + 0.1 * len(made), seconds=truth.of_step(step) * rng.uniform(0.97, 1.03)))
    return made


def test_long_prompts_do_not_look_like_a_device_that_has_become_slower() -> None:
    """Small chunks late in a prompt of 30,000 tokens, whose attention is most of what they cost."""
    rng, truth = random.Random(8), StepModel(0.0, 0.017, 1.1e-4, 1e-7, read=1e-6, pair=2e-9)
    seen = [one for k in range(12) for one in chunks(rng.randint(500, 12000), 2048, truth, k % 5, rng, 3.0 * k)]
    seen += [one for k in range(12) for one in chunks(rng.randint(500, 4000), 256, truth, 1 + k % 5, rng, 40.0 + k)]
    for k in range(48):  # decode, which reads as much and takes little for it
        step = Stepped(52.0 + k / 8, Lane.DECODE, 1.0, 0, 1 + k % 24, 1500 * (1 + k % 24), 1.0)
        seen.append(replace(step, seconds=truth.of_step(step) * rng.uniform(0.97, 1.03)))
    model = fit_one_share(seen, now=60.0)
    late = chunks(30000, 128, truth, 1, rng, 60.0)[-40:]
    assert isinstance(model, StepModel) and drift(model, late) == pytest.approx(1.0, abs=0.1)
    without = replace(truth, read=0.0, pair=0.0)
    assert drift(without, late) > 1.5, "that is what it would look like"


def test_from_few_steps_attention_is_not_told_from_other_costs() -> None:
    rng, truth = random.Random(9), StepModel(0.0, 0.01, 1e-4, 1e-7, read=1e-6, pair=2e-9)
    found = fit_one_share(chunks(20000, 2048, truth, 1, rng, 0.0), now=2.0)
    assert isinstance(found, StepModel) and (found.read, found.pair) == (0.0, 0.0)


def test_from_one_share_the_costs_there_are_known() -> None:
    rng, truth = random.Random(7), StepModel(0.0, 0.01, 1e-3, 1e-6)
    model = fit_one_share(steps(truth, rng, shares=(0.5,), noise=0.0), now=24.0)
    assert isinstance(model, StepModel) and model.shares == pytest.approx((0.5,))
    assert model.predict(8, 4000, 0.5) == pytest.approx(truth.predict(8, 4000, 0.5), rel=0.03)
    assert isinstance(fit_one_share([], 0.0), Unfit)


def test_many_steps_that_are_alike_do_not_make_outliers_of_the_few_that_tell() -> None:
    """Two dozen of 27 tokens, exact, and seven large ones that are off by a thousandth: all of them tell what a token
    costs."""
    truth = StepModel(0.0, 6e-3, 2.6e-3, 3e-6)
    sizes = [(27, 60 + 10 * number, 1.0) for number in range(24)] + [
        (300 + 30 * number, 400, 1.001) for number in range(7)
    ]
    made = [
        Stepped(0.1 * number, Lane.DECODE, off * truth.predict(tokens, context), tokens - 2, 2, context, 1.0)
        for number, (tokens, context, off) in enumerate(sizes)
    ]
    model = fit_one_share(made, now=3.0)
    assert isinstance(model, StepModel)
    assert model.token == pytest.approx(truth.token, rel=0.02)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_a_device_that_is_slower_now_shows_in_a_few_steps(factor: float) -> None:
    rng, truth = random.Random(3), StepModel(1e-3, 5e-3, 1e-4, 1e-6, contention=0.3)
    now = far(steps(truth.scaled(factor), rng, 40), rng, 0.1)
    assert drift(truth, now) == pytest.approx(factor, rel=0.05)
    assert drift(truth, now[:3]) == 1.0, "three steps are no evidence"
    one = now[0]
    assert truth.scaled(factor).predict(one.output, one.context, one.share) == pytest.approx(
        factor * truth.predict(one.output, one.context, one.share)
    )
