"""Attention: what the slices of a step sum up to, against a loop over rows, and laws of its time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.sim.attention import ROWS, Heads, Work, attention_seconds, decoding_seconds, work_of
from weft.sim.hardware import AttentionFit, find_gpu, gpu_names
from weft.sim.profiles import Attentions, heads_of, works

LLAMA = Heads(32, 8, 128, 128, 256)
GPUS = st.sampled_from(gpu_names())
LENGTHS = st.integers(0, 30_000)
SLICES = st.lists(st.tuples(st.one_of(st.just(1), st.integers(1, 3000)), LENGTHS), min_size=1, max_size=20)


def seconds(name: str, slices: list[tuple[int, int]], heads: Heads = LLAMA, share: float = 1.0) -> float:
    gpu = find_gpu(name)
    return float(attention_seconds(gpu.attention, gpu.part(share), heads, work(gpu.attention, slices, heads)))


def work(fit: AttentionFit, slices: list[tuple[int, int]], heads: Heads = LLAMA) -> Work:
    rows, before = zip(*slices, strict=True)
    return work_of(rows, before, heads.together(fit.packed))


@settings(deadline=None)
@given(SLICES)
def test_the_work_covers_every_pair_that_a_row_may_see(slices: list[tuple[int, int]]) -> None:
    found = work_of(*zip(*slices, strict=True), 1.0)
    prompts = [(rows, before) for rows, before in slices if rows > 1]
    pairs = sum(rows * before + rows * (rows + 1) // 2 for rows, before in prompts)
    filled = sum(-(-rows // ROWS) * ROWS * (before + rows / 2 + ROWS) for rows, before in prompts)
    assert pairs <= found.pairs <= filled
    assert found.rows == sum(rows for rows, _ in prompts)
    assert found.slots == sum(before + 1 for rows, before in slices if rows == 1)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 5000), LENGTHS, st.booleans())
def test_batches_of_a_profile_are_the_same_work(batch: int, rows: int, before: int, packed: bool) -> None:
    column = [np.array([float(value)]) for value in (batch, rows, before, 32, 8, 1)]
    profile = Attentions(*column)
    found = works(profile, packed)
    expected = work_of([rows] * batch, [before] * batch, LLAMA.together(packed))
    assert heads_of(profile).group == LLAMA.group
    for name in Work.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name)), name


@settings(deadline=None)
@given(GPUS, SLICES, st.data())
def test_more_context_or_more_sequences_never_take_less(
    name: str, slices: list[tuple[int, int]], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(slices) - 1))
    longer = [*slices]
    longer[at] = (slices[at][0], slices[at][1] + data.draw(LENGTHS))
    assert seconds(name, longer) >= seconds(name, slices) * (1 - 1e-9)
    assert seconds(name, [*slices, (1, data.draw(LENGTHS))]) >= seconds(name, slices) * (1 - 1e-9)


@settings(deadline=None)
@given(GPUS, SLICES, st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_a_greater_share_never_takes_longer(name: str, slices: list[tuple[int, int]], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert seconds(name, slices, share=high) <= seconds(name, slices, share=low) * (1 + 1e-9)


@settings(deadline=None)
@given(GPUS, st.lists(LENGTHS, min_size=1, max_size=64), st.sampled_from([16.0, 8.25, 4.25]))
def test_keys_and_values_are_read_at_most_at_full_bandwidth(name: str, before: list[int], bits: float) -> None:
    heads = Heads(32, 8, 128, 128, 256, bits)
    moved = sum(known + 1 for known in before) * 8 * 256 * bits / 8
    assert seconds(name, [(1, known) for known in before], heads) >= moved / find_gpu(name).bandwidth


@settings(deadline=None)
@given(GPUS, st.lists(st.tuples(st.integers(2, 3000), LENGTHS), min_size=1, max_size=8))
def test_prompts_are_computed_at_most_at_the_peak(name: str, slices: list[tuple[int, int]]) -> None:
    pairs = sum(rows * before + rows * (rows + 1) // 2 for rows, before in slices)
    assert seconds(name, slices) >= 4 * 128 * 32 * pairs / find_gpu(name).part().flops


def test_latent_attention_reads_one_head_for_all() -> None:
    latent, full = Heads(128, 1, 192, 128, 576, latent=True), Heads(128, 128, 128, 128, 256)
    slices = [(1, 8000)] * 64
    assert seconds("h100", slices, latent) < seconds("h100", slices, full) / 20


@settings(deadline=None)
@given(
    GPUS,
    st.sampled_from([LLAMA, Heads(8, 1, 128, 128, 256, 4.25), Heads(4, 4, 64, 64, 128), Heads(16, 1, 192, 128, 576)]),
    st.lists(LENGTHS, min_size=1, max_size=20),
    st.floats(0.05, 1),
)
def test_steps_that_only_decode_take_what_they_take_to_the_last_bit(
    name: str, heads: Heads, before: list[int], share: float
) -> None:
    quick = decoding_seconds(find_gpu(name).attention, find_gpu(name).part(share), heads)
    expected = seconds(name, [(1, known) for known in before], heads, share)
    assert quick(len(before), sum(before) + len(before), max(before) + 1) == expected


def test_no_work_takes_a_launch() -> None:
    gpu = find_gpu("h100")
    assert attention_seconds(gpu.attention, gpu.part(), LLAMA, Work()) == pytest.approx(gpu.attention.launch)
