"""The embedding table of every level against indexing and one product; what is refused before memory is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.kernels.reference import ReferenceKernels

many = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
reference = ReferenceKernels((0,))


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@many
@given(
    vocabulary=st.integers(1, 40), size=st.integers(1, 200), count=st.integers(0, 90), stored=dtypes, dtype=dtypes,
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_a_row_of_floats_is_the_tables_rounded_once(
    backends: Any, vocabulary: int, size: int, count: int, stored: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    table = torch.randn(vocabulary, size, generator=random(seed)).to(stored)
    tokens = torch.randint(vocabulary, (count,), generator=random(seed))
    for kernels in (backends.one, backends.two, reference):
        rows = kernels.embed(tokens, kernels.pack_embedding(table), dtype)
        assert rows.dtype is dtype and rows.equal(table[tokens].to(dtype))


@many
@given(
    vocabulary=st.integers(1, 40), groups=st.integers(1, 3), count=st.integers(1, 90), wide=st.booleans(), dtype=dtypes,
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_a_row_of_integers_is_value_times_scale_rounded_once(
    backends: Any, vocabulary: int, groups: int, count: int, wide: bool, dtype: torch.dtype, seed: int
) -> None:
    low, high = (-128, 128) if wide else (-8, 8)
    values = torch.randint(low, high, (vocabulary, groups * 128), generator=random(seed), dtype=torch.int8)
    values[0, :2] = torch.tensor([low, high - 1])
    scales = torch.rand(vocabulary, groups, generator=random(seed)) - 0.3
    tokens = torch.randint(vocabulary, (count,), generator=random(seed))
    want = (values[tokens].float() * scales[tokens].repeat_interleave(128, dim=1)).to(dtype)
    for kernels in (backends.one, backends.two, reference):
        packed = kernels.pack_embedding(values, scales)
        assert kernels.embed(tokens, packed, dtype).equal(want)
        if kernels is not reference:
            assert packed.bytes == values.numel() // (1 if wide else 2) + scales.numel() * 4


def test_a_table_that_is_none_is_refused(backends: Any) -> None:
    values, scales = torch.ones(4, 128, dtype=torch.int8), torch.ones(4, 1)
    for kernels in (backends.one, reference):
        with pytest.raises(ValueError, match=r"shape \[128\]"):
            kernels.pack_embedding(torch.ones(128))
        with pytest.raises(TypeError, match="int8 without scales"):
            kernels.pack_embedding(values)
        with pytest.raises(TypeError, match="float32 with scales"):
            kernels.pack_embedding(values.float(), scales)
        with pytest.raises(ValueError, match=r"\[4, 100\] and its scales \[4, 1\]"):
            kernels.pack_embedding(values[:, :100], scales)
        with pytest.raises(ValueError, match=r"its scales \[4, 2\]"):
            kernels.pack_embedding(values, torch.ones(4, 2))
        with pytest.raises(ValueError, match="finite"):
            kernels.pack_embedding(values, scales / 0)


def test_a_token_beyond_the_table_is_refused_before_memory_is_read(backends: Any) -> None:
    packed = backends.one.pack_embedding(torch.ones(4, 8))
    for token in (4, -1, 2**60):
        with pytest.raises(ValueError, match=f"no token {token} for row 1; the embedding has 4"):
            backends.one.embed(torch.tensor([0, token]), packed, torch.float32)
    with pytest.raises(TypeError, match="tokens"):
        backends.one.embed(torch.tensor([0], dtype=torch.int32), packed, torch.float32)
    with pytest.raises(TypeError, match="float16"):
        backends.one.embed(torch.tensor([0]), packed, torch.float16)
    packed.native.release()
    with pytest.raises(RuntimeError, match="released"):
        backends.one.embed(torch.tensor([0]), packed, torch.float32)
