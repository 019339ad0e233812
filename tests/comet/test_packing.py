"""Nibbles against a loop over single values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.comet.packing import pack_nibbles, unpack_nibbles


def pack_one_by_one(row: list[int]) -> list[int]:
    """The words of one row, as signed 32-bit numbers."""
    words = [0] * -(-len(row) // 8)
    for index in range(8 * len(words)):
        value = row[index] if index < len(row) else 0
        words[index // 8] |= (value + 8) << (4 * (index % 8))
    return [word - 2**32 if word >= 2**31 else word for word in words]


nibbles = st.integers(-8, 7)


@settings(max_examples=60, deadline=None)
@given(st.lists(nibbles, min_size=1, max_size=40), st.integers(1, 3))
def test_words_are_those_of_the_loop_and_come_back(row: list[int], rows: int) -> None:
    table = [row[step:] + row[:step] for step in range(rows)]
    values = torch.tensor(table, dtype=torch.int8)
    words = pack_nibbles(values)
    assert words.dtype == torch.int32
    assert words.tolist() == [pack_one_by_one(one) for one in table]
    assert torch.equal(unpack_nibbles(words, len(row)), values)


def test_the_first_value_has_the_lowest_bits() -> None:
    assert pack_nibbles(torch.tensor([[-7, -6, -5, -4, -3, -2, -1, 0]], dtype=torch.int8)).item() == (
        0x87654321 - 2**32
    )


def test_all_pairs_of_neighbours_survive() -> None:
    every = torch.arange(-8, 8, dtype=torch.int8)
    values = torch.stack([every.repeat_interleave(16), every.repeat(16)], dim=-1).flatten()[None]
    assert torch.equal(unpack_nibbles(pack_nibbles(values), 512), values)


def test_more_dimensions_pack_along_the_last() -> None:
    values = torch.randint(-8, 8, (2, 3, 16), dtype=torch.int8)
    words = pack_nibbles(values)
    assert words.shape == (2, 3, 2)
    assert torch.equal(unpack_nibbles(words, 16), values)


@pytest.mark.parametrize("value", [-9, 8])
def test_a_value_without_a_nibble_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"{value}"):
        pack_nibbles(torch.tensor([0, value], dtype=torch.int8))


def test_wrong_dtypes_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        pack_nibbles(torch.zeros(8))
    with pytest.raises(ValueError, match="17 of them"):
        unpack_nibbles(torch.zeros(1, 2, dtype=torch.int32), 17)
