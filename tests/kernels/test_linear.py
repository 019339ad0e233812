"""The packed linear layer against float64, and the rule that a row's bits are its own."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
# Around the tile heights (4, 6), the cut of rows, the panel (64 columns), the pair of bfloat16 and the channels (512)
# whose inputs become floats at a time.
rows = st.one_of(st.integers(1, 20), st.integers(1, 130))
inputs = st.one_of(st.integers(1, 9), st.integers(1, 300), st.sampled_from([511, 512, 513, 1024, 1031]))
outputs = st.one_of(st.integers(1, 9), st.sampled_from([63, 64, 65, 128, 129]), st.integers(1, 260))


def normal(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and how far from it a float32 sum in any order may end, rounded to x's type."""
    product, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        product, size = product + bias.double(), size + bias.double().abs()
    rounding = 2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-23
    return product, product.abs() * rounding + size * 2.0**-23 * (x.shape[1] + 2)


@many
@given(m=rows, k=inputs, n=outputs, with_bias=st.booleans(), dtype=dtypes, seed=st.integers(0, 2**31))
@example(m=128, k=511, n=192, with_bias=True, dtype=torch.bfloat16, seed=0)
@example(m=130, k=257, n=65, with_bias=True, dtype=torch.float32, seed=0)
@example(m=1, k=1030, n=65, with_bias=True, dtype=torch.bfloat16, seed=0)
@example(m=7, k=1537, n=70, with_bias=True, dtype=torch.bfloat16, seed=0)
def test_it_is_the_product_in_float32(
    backends: Any, m: int, k: int, n: int, with_bias: bool, dtype: torch.dtype, seed: int
) -> None:
    x, weight = normal(seed, m, k, dtype=dtype), normal(seed + 1, n, k, dtype=dtype)
    bias = normal(seed + 2, n, dtype=dtype) if with_bias else None
    expected, tolerance = exact(x, weight, bias)
    for kernels in (backends.one, backends.two):
        y = kernels.linear(x, kernels.pack_linear(weight, bias))
        assert y.dtype is dtype and y.shape == (m, n)
        assert ((y.double() - expected).abs() <= tolerance).all()


@many
@given(m=rows, k=inputs, n=outputs, dtype=dtypes, seed=st.integers(0, 2**31), data=st.data())
def test_the_bits_of_a_row_are_its_own(
    backends: Any, m: int, k: int, n: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    x, weight = normal(seed, m, k, dtype=dtype), normal(seed + 1, n, k, dtype=dtype)
    packed = backends.one.pack_linear(weight, normal(seed + 2, n, dtype=dtype))
    whole = backends.one.linear(x, packed)
    assert torch.equal(backends.two.linear(x, packed), whole)
    start = data.draw(st.integers(0, m - 1))
    end = data.draw(st.integers(start + 1, m))
    assert torch.equal(backends.two.linear(x[start:end], packed), whole[start:end])
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(backends.one.linear(x[order], packed), whole[order])


def test_an_infinity_or_nan_stays_in_its_row(backends: Any) -> None:
    # Odd `in`: the last pair of a bfloat16 row must not read the first element of the next row.
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = normal(0, 9, 33, dtype=dtype), normal(1, 70, 33, dtype=dtype)
        packed = backends.two.pack_linear(weight)
        clean = backends.two.linear(x, packed)
        x[4, 0], x[6, :] = torch.inf, torch.nan
        dirty = backends.two.linear(x, packed)
        others = [0, 1, 2, 3, 5, 7, 8]
        assert torch.equal(dirty[others], clean[others])
        assert not dirty[4].isfinite().any() and dirty[6].isnan().all()


def test_no_rows_give_no_rows(backends: Any) -> None:
    packed = backends.two.pack_linear(torch.ones(5, 3))
    assert backends.two.linear(torch.empty(0, 3), packed).shape == (0, 5)


def test_a_weight_may_be_a_view(backends: Any) -> None:
    big, x = normal(0, 40, 50, dtype=torch.float32), normal(1, 3, 20, dtype=torch.float32)
    for view in (big[4:30, 7:27], big.T[4:30, 7:27]):
        y = backends.two.linear(x, backends.two.pack_linear(view))
        assert torch.equal(y, backends.two.linear(x, backends.two.pack_linear(view.contiguous())))
        torch.testing.assert_close(y, x @ view.T)


def test_a_result_can_go_into_a_given_buffer(backends: Any) -> None:
    x, weight = normal(0, 5, 64, dtype=torch.bfloat16), normal(1, 96, 64, dtype=torch.bfloat16)
    packed, y = backends.two.pack_linear(weight), torch.empty(5, 96, dtype=torch.bfloat16)
    assert backends.two.linear_into(x, packed, y) is y
    assert torch.equal(y, backends.two.linear(x, packed))


def test_float32_out_is_what_bfloat16_rounds(backends: Any) -> None:
    x, weight = normal(0, 9, 131, dtype=torch.bfloat16), normal(1, 70, 131, dtype=torch.bfloat16)
    packed = backends.two.pack_linear(weight)
    y = backends.two.linear(x, packed, torch.float32)
    assert y.dtype is torch.float32
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, atol=1e-4, rtol=1e-4)
    assert torch.equal(y.bfloat16(), backends.two.linear(x, packed))


def test_wrong_arguments_are_refused(backends: Any) -> None:
    kernels = backends.one
    packed = kernels.pack_linear(torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"x is \(2, 3\)"):
        kernels.linear(torch.ones(2, 3), packed)
    with pytest.raises(TypeError, match=r"packed as torch\.float32"):
        kernels.linear(torch.ones(2, 4, dtype=torch.bfloat16), packed)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.linear(torch.ones(4, 2).T, packed)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.linear_into(torch.ones(2, 4), packed, torch.ones(5, 2).T)
    with pytest.raises(TypeError, match="float16"):
        kernels.pack_linear(torch.ones(5, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"\[out, in\]"):
        kernels.pack_linear(torch.ones(0, 4))
    with pytest.raises(ValueError, match="bias has shape"):
        kernels.pack_linear(torch.ones(5, 4), torch.ones(4))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_packed_weights_are_freed_with_the_object(backends: Any) -> None:
    weight = torch.zeros(4096, 4096, dtype=torch.bfloat16)  # 32 MiB
    backends.two.pack_linear(weight)  # whatever the memory's region before this one still held goes with it
    gc.collect()
    before = resident()
    # Eight, since the rest of a test run gives back some tens of MiB when it likes.
    packed = [backends.two.pack_linear(weight) for _ in range(8)]
    assert all(one.bytes == weight.nbytes for one in packed)
    assert resident() - before > 128 * 2**20  # of 256. Stored as zeros, but every page was written.
    del packed
    gc.collect()
    assert resident() - before < 64 * 2**20


def test_released_weights_are_refused(backends: Any) -> None:
    packed = backends.one.pack_linear(torch.ones(5, 4))
    packed.native.release()
    with pytest.raises(RuntimeError, match="released"):
        backends.one.linear(torch.ones(1, 4), packed)
