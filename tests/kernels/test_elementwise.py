"""Norms and the gated activation of every level against the reference, and the rule that a row's bits are its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weft.kernels.reference import ReferenceKernels

many = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
sizes = st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 256, 2048]))
seeds = st.integers(0, 2**31)
reference = ReferenceKernels((0,))


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """The reference works on small tensors, and torch's threads wait for one another longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounded(y: torch.Tensor, exact: torch.Tensor, error: float = 1e-6) -> None:
    """y is `exact` (float32, with this relative error) after one rounding to y's dtype."""
    rounding = 2.0**-8 if y.dtype is torch.bfloat16 else 0
    torch.testing.assert_close(y.float(), exact, rtol=rounding + error, atol=1e-30)


@many
@given(rows=st.integers(1, 9), size=sizes, dtype=dtypes, seed=seeds)
def test_rms_norm(backends: Any, rows: int, size: int, dtype: torch.dtype, seed: int) -> None:
    x, weight = normal(seed, rows, size, dtype=dtype), normal(seed + 1, size, dtype=dtype)
    y = backends.one.rms_norm(x, weight, 1e-5)
    assert y.dtype is dtype
    assert_rounded(y, reference.rms_norm(x.float(), weight.float(), 1e-5))


@many
@given(rows=st.integers(1, 9), size=sizes, dtype=dtypes, seed=seeds)
def test_add_rms_norm_adds_in_place_and_normalises_what_it_rounded(
    backends: Any, rows: int, size: int, dtype: torch.dtype, seed: int
) -> None:
    x, residual = (normal(seed + i, rows, size, dtype=dtype) for i in range(2))
    weight, expected = normal(seed + 2, size, dtype=dtype), x + residual
    y, returned = backends.one.add_rms_norm(x, residual, weight, 1e-5)
    assert returned is residual and torch.equal(residual, expected)
    assert torch.equal(y, backends.one.rms_norm(expected, weight, 1e-5))


@many
@given(rows=st.integers(1, 9), size=sizes, dtype=dtypes, seed=seeds, scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_silu_mul(backends: Any, rows: int, size: int, dtype: torch.dtype, seed: int, scale: float) -> None:
    x = (normal(seed, rows, 2 * size, dtype=torch.float32) * scale).to(dtype)
    # exp of a large argument carries the argument's rounding; what comes out there is tiny.
    assert_rounded(backends.one.silu_mul(x), reference.silu_mul(x.float()), 1e-6 * max(1, 4 * scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_mul_of_what_overflows_exp(backends: Any, dtype: torch.dtype) -> None:
    gate = torch.tensor([[-torch.inf, -3e38, -1e4, -0.0, 1e4, 3e38, torch.inf, torch.nan]], dtype=dtype)
    y = backends.one.silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    expected = torch.tensor([[torch.nan, 0, 0, 0, 1e4, 3e38, torch.inf, torch.nan]]).to(dtype)
    torch.testing.assert_close(y, expected, equal_nan=True)


@many
@given(rows=st.integers(1, 70), size=sizes, dtype=dtypes, seed=seeds, data=st.data())
@example(rows=70, size=2048, dtype=torch.bfloat16, seed=0, data=None)
def test_the_bits_of_a_row_are_its_own(
    backends: Any, rows: int, size: int, dtype: torch.dtype, seed: int, data: st.DataObject | None
) -> None:
    x, residual = (normal(seed + i, rows, size, dtype=dtype) for i in range(2))
    gates, weight = normal(seed + 2, rows, 2 * size, dtype=dtype), normal(seed + 3, size, dtype=dtype)
    row = data.draw(st.integers(0, rows - 1)) if data else rows // 2
    part = slice(row, row + 1)
    one, two = backends.one, backends.two
    for whole, alone in (
        (two.rms_norm(x, weight, 1e-5), one.rms_norm(x[part], weight, 1e-5)),
        (two.silu_mul(gates), one.silu_mul(gates[part])),
        (
            two.add_rms_norm(x, residual.clone(), weight, 1e-5)[0],
            one.add_rms_norm(x[part], residual[part].clone(), weight, 1e-5)[0],
        ),
    ):
        assert torch.equal(whole[part], alone)


def test_what_the_kernels_cannot_take_is_refused(backends: Any) -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(TypeError, match="float64"):
        backends.one.rms_norm(x.double(), weight.double(), 1e-5)
    with pytest.raises(TypeError, match=r"weight is torch\.bfloat16"):
        backends.one.rms_norm(x, weight.bfloat16(), 1e-5)
    with pytest.raises(ValueError, match=r"weight must be contiguous \[8\]"):
        backends.one.rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        backends.one.rms_norm(torch.ones(8, 2).T, weight, 1e-5)
    with pytest.raises(ValueError, match="residual"):
        backends.one.add_rms_norm(x, torch.ones(3, 8), weight, 1e-5)
    with pytest.raises(ValueError, match="9 columns"):
        backends.one.silu_mul(torch.ones(2, 9))
