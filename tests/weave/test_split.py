"""Where a step is cut: the laws of weave/split.py, against searches of all cuts."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate, pairwise
from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core.plan import Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.weave.split import Waves, choose_cut, choose_strands, divide, even_bounds, kept_bounds

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=8)


def legal_cuts(total: int, wave: int) -> list[int]:
    return [cut for cut in range(1, total) if ceil(cut / wave) + ceil((total - cut) / wave) <= ceil(total / wave)]


@given(LENGTHS, st.integers(1, 64), st.floats(0, 1), st.integers(2, 5))
@settings(deadline=None)
def test_the_chosen_cut_is_the_best_legal_one(lengths: list[int], wave: int, tolerance: float, parts: int) -> None:
    total, even = sum(lengths), Fraction(sum(lengths), parts)
    legal = legal_cuts(total, wave)
    cut = choose_cut(lengths, Waves(wave), tolerance, parts)
    if not legal:
        assert cut == total
        return
    assert cut in legal
    between = [end for end in accumulate(lengths) if end in legal and abs(end - even) <= Fraction(tolerance) * total]
    candidates = between or legal
    assert abs(cut - even) == min(abs(other - even) for other in candidates)
    assert cut in candidates


@given(LENGTHS, st.integers(1, 64), st.integers(1, 5))
@settings(deadline=None)
def test_strands_have_all_tokens_and_take_no_more_waves(lengths: list[int], wave: int, count: int) -> None:
    total = sum(lengths)
    strands = choose_strands(lengths, Waves(wave), count)
    assert sum(strands) == total and min(strands) > 0 and len(strands) <= count
    assert sum(ceil(strand / wave) for strand in strands) <= ceil(total / wave)
    assert choose_strands(lengths, Waves(wave), 2) in ((total,), (cut := choose_cut(lengths, Waves(wave)), total - cut))
    if all(length % wave == 0 for length in lengths) and total >= count * wave:
        assert len(strands) == count


def test_strands_are_even_where_they_can_be() -> None:
    assert choose_strands([1024], Waves(12), 3) == (341, 336, 347)
    assert choose_strands([300, 330, 394], Waves(12), 3) == (300, 330, 394)


@given(st.integers(1, 64), st.integers(1, 64))
@settings(deadline=None)
def test_a_step_of_one_wave_is_left_whole(total: int, more: int) -> None:
    assert choose_cut([total], Waves(total + more - 1)) == total


@pytest.mark.parametrize(
    ("lengths", "tolerance", "parts"), [([], 0.1, 2), ([3, 0], 0.1, 2), ([3], 2, 2), ([3], 0.1, 1)]
)
def test_impossible_arguments(lengths: list[int], tolerance: float, parts: int) -> None:
    with pytest.raises(ValueError, match="slices have tokens"):
        choose_cut(lengths, Waves(1), tolerance, parts)


@pytest.mark.parametrize(
    "wrong", [{"rows": 0}, {"rows": 1, "units": 0}, {"rows": 1, "products": ((1, 0),)}, {"rows": 1, "slack": 1.0}]
)
def test_impossible_waves(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a wave has rows"):
        Waves(**wrong)


@given(LENGTHS, st.integers(1, 20), st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_where_units_share_tiles_the_fewest_waves_are_taken(
    lengths: list[int], rows: int, units: int, widths: list[int], data: st.DataObject
) -> None:
    """Of all cuts within the tolerance, by the tiles of each product one by one."""
    total, slack = sum(lengths), data.draw(st.sampled_from([0.0, 0.125, 0.5]))
    waves = Waves(rows, units, tuple((beside, depth) for depth, beside in enumerate(widths, 1)), slack)

    def took(tokens: int) -> int:
        return sum(ceil(ceil(tokens / rows) * beside / units) * depth for depth, beside in enumerate(widths, 1))

    more = {cut: max(0, took(cut) + took(total - cut) - took(total)) for cut in range(1, total)}
    allowed = {cut for cut, waste in more.items() if waste <= slack * took(total)}
    near = {cut for cut in allowed if abs(2 * cut - total) <= 2 * 0.1 * total}
    cut = choose_cut(lengths, waves)
    if cut == total:
        assert not near
        return
    assert cut in allowed
    assert more[cut] <= min((more[other] for other in near), default=more[cut])


def test_a_step_of_a_large_model_is_cut_where_waves_are_full() -> None:
    """A rank of eight of a 70B model on 132 SMs, in tiles of 128: the even cut of 3840 tokens takes a tenth more."""
    shapes = ((1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584))
    waves = Waves(128, 132, tuple((ceil(outputs / 128), depth) for outputs, depth in shapes), 0.2)

    def taken(cut: int, total: int) -> float:
        return (waves(cut) + waves(total - cut)) / waves(total)

    assert taken(1920, 3840) > 1.1 and taken(choose_cut([3840], waves), 3840) < 1.05
    assert taken(3712, 7424) > 1.05 and taken(choose_cut([7424], waves), 7424) <= 1.0
    assert choose_cut([128], waves) == 128, "a single wave is left whole"


def piece(sequence: int, start: int, length: int, *, sampled: bool) -> Slice:
    draw = Sampling(SamplingParams(), seed=sequence, position=start + length) if sampled else None
    later = None if sampled else 7
    tokens = tuple(range(1000 * sequence, 1000 * sequence + length))
    return Slice(sequence, start, tokens, (sequence,), draw, prompt_logprobs=2, next_token=later)


@given(LENGTHS, st.data())
@settings(deadline=None)
def test_dividing_loses_nothing_and_changes_no_order(lengths: list[int], data: st.DataObject) -> None:
    slices = [
        piece(number, data.draw(st.integers(0, 50)), length, sampled=data.draw(st.booleans()))
        for number, length in enumerate(lengths)
    ]
    at = data.draw(st.integers(1, sum(lengths)))
    first, rest = divide(slices, at)
    assert sum(len(part.tokens) for part in first) == at
    both = [*first, *rest]
    rows = [(part.sequence, part.start + n, token) for part in both for n, token in enumerate(part.tokens)]
    assert rows == [(part.sequence, part.start + n, token) for part in slices for n, token in enumerate(part.tokens)]
    assert [part.sample for part in both if part.sample] == [part.sample for part in slices if part.sample]
    for part in both:
        (whole,) = [one for one in slices if one.sequence == part.sequence]
        assert part.blocks == whole.blocks and part.prompt_logprobs == 2
        if part.end == whole.end:
            assert (part.sample, part.next_token) == (whole.sample, whole.next_token)
        else:  # the row before the cut is followed by the one after it
            assert part.sample is None and part.next_token == whole.tokens[part.end - whole.start]


@pytest.mark.parametrize("at", [0, 6])
def test_a_cut_outside_of_the_step(at: int) -> None:
    with pytest.raises(ValueError, match="at = "):
        divide([piece(1, 0, 5, sampled=True)], at)


@given(st.integers(0, 300), st.integers(1, 9), st.data())
@settings(deadline=None)
def test_every_row_has_one_owner_and_kept_rows_stay_with_theirs(rows: int, ranks: int, data: st.DataObject) -> None:
    bounds = even_bounds(rows, ranks)
    sizes = [end - first for first, end in pairwise(bounds)]
    assert len(bounds) == ranks + 1 and sum(sizes) == rows and max(sizes) - min(sizes) <= 1
    kept = sorted(data.draw(st.sets(st.integers(0, rows - 1)))) if rows else []
    after = kept_bounds(bounds, kept)
    for rank in range(ranks):
        assert kept[after[rank] : after[rank + 1]] == [row for row in kept if bounds[rank] <= row < bounds[rank + 1]]


@pytest.mark.parametrize("kept", [[2, 1], [1, 1], [9], [-1, 3]])
def test_rows_that_cannot_be_kept(kept: list[int]) -> None:
    with pytest.raises(ValueError, match=r"kept|keep"):
        kept_bounds((0, 2, 5), kept)
