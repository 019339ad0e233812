"""make_batch against the definition, one token at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core.plan import Slice
from weft.models.batch import make_batch


@st.composite
def slices_of(draw: st.DrawFn, block_size: int) -> Slice:
    start = draw(st.integers(0, 70))
    tokens = tuple(draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=draw(st.sampled_from([1, 1, 40])))))
    need = -(-(start + len(tokens)) // block_size)
    blocks = draw(st.lists(st.integers(0, 2**31 - 1), min_size=need, max_size=need + 3))
    return Slice(draw(st.integers(0, 99)), start, tokens, tuple(blocks))


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Slice], int]:
    block_size = draw(st.sampled_from([1, 4, 16]))
    return draw(st.lists(slices_of(block_size), min_size=1, max_size=6)), block_size


@settings(max_examples=150, deadline=None)
@given(steps())
def test_a_batch_is_what_its_slices_say(step: tuple[list[Slice], int]) -> None:
    slices, block_size = step
    tokens, positions, slots, starts = [], [], [], [0]
    for piece in slices:
        for offset, token in enumerate(piece.tokens):
            position = piece.start + offset
            tokens.append(token)
            positions.append(position)
            slots.append(piece.blocks[position // block_size] * block_size + position % block_size)
        starts.append(len(tokens))
    width = max(len(piece.blocks) for piece in slices)

    batch = make_batch(slices, block_size)
    assert batch.tokens.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.slots.tolist() == slots
    assert batch.starts.tolist() == starts
    assert batch.contexts.tolist() == [piece.end for piece in slices]
    assert batch.tables.tolist() == [[*piece.blocks, *[-1] * (width - len(piece.blocks))] for piece in slices]
    assert batch.block_size == block_size
    whole = (batch.positions, batch.starts, batch.contexts, batch.tables)
    assert [part.dtype for part in (batch.tokens, batch.slots, *whole)] == [torch.int64] * 2 + [torch.int32] * 4
    assert all(part.is_contiguous() for part in (batch.tokens, batch.slots, *whole))


@pytest.mark.parametrize(
    "broken",
    [
        Slice(1, 15, (7, 8), (3,)),
        Slice(1, 0, (7,), ()),
        Slice(1, 16, (7,), (3,)),
    ],
)
def test_a_table_that_is_too_short_is_refused_rather_than_written_past(broken: Slice) -> None:
    long = Slice(2, 0, (1,) * 40, (0, 1, 2))
    for slices in ([broken], [broken, long], [long, broken]):
        with pytest.raises(ValueError, match="too short"):
            make_batch(slices, 16)


@pytest.mark.parametrize("slices", [[], [Slice(1, 0, (), (3,))], [Slice(1, 0, (5,), (3,)), Slice(2, 4, (), (1,))]])
def test_a_step_without_tokens_is_refused(slices: list[Slice]) -> None:
    with pytest.raises(ValueError, match="tokens"):
        make_batch(slices, 16)
