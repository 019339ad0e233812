"""What an owner does with its rows, and quantised rows on their way: the C++ kernels at every level, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.comet import reference
from weft.comet.reference import InputForm
from weft.kernels import REFERENCE, available
from weft.weave import rows

many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
LEVELS = tuple(name for name in available() if name != REFERENCE)


@pytest.fixture(scope="module", params=LEVELS or ("none",))
def kernels(request: pytest.FixtureRequest) -> Iterator[Any]:
    if not LEVELS:
        pytest.skip("the C++ extension is not built")
    from weft.kernels.cpu import CpuKernels

    cores = sorted(os.sched_getaffinity(0))
    made = CpuKernels(request.param, (cores[0], cores[-1]))
    yield made
    made.close()


def random(seed: int, *shape: int) -> torch.Tensor:
    """Rows of very different sizes, zeros, and now and then an infinity or a NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-3, 4, (shape[0], 1), generator=generator)
    kinds = torch.randint(0, 9, (shape[0],), generator=generator)
    x[kinds == 0] = 0
    x[kinds == 1, seed % shape[1]] = torch.inf
    x[kinds == 2, seed % shape[1]] = torch.nan
    return x


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, but all NaN are one."""
    bits = {1: found.dtype, 2: torch.int16, 4: torch.int32}[found.element_size()]
    return found.shape == expected.shape and bool(
        ((found.view(bits) == expected.view(bits)) | (found.isnan() & expected.isnan())).all()
    )


@many
@given(
    seed=st.integers(0, 2**20),
    count=st.integers(1, 5),
    tokens=st.integers(0, 33),
    size=st.sampled_from([1, 3, 15, 16, 17, 64, 127, 130, 515]),
    dtype=dtypes,
    wide=st.booleans(),
)
def test_one_pass_gives_the_bits_of_the_single_steps(
    seed: int, count: int, tokens: int, size: int, dtype: torch.dtype, wide: bool, kernels: Any
) -> None:
    from weft.kernels.wire import FusedRows

    parts = [random(seed + rank, max(tokens, 1), size)[:tokens] for rank in range(count)]
    parts = [part.contiguous() if wide else part.to(dtype).contiguous() for part in parts]
    residuals = [random(seed + 9, max(tokens, 1), size)[:tokens].to(dtype) for _ in range(2)]
    weight = random(seed + 10, 1, size)[0].to(dtype)
    hidden, residual = FusedRows(kernels)(parts, residuals[0], weight, 1e-5, None)
    expected = rows.plain(kernels.rms_norm)(parts, residuals[1], weight, 1e-5, None)
    assert same(hidden, expected[0]) and same(residual, expected[1])
    if count == 1 and parts[0].dtype is dtype:
        again = random(seed + 9, max(tokens, 1), size)[:tokens].to(dtype)
        assert same(hidden, kernels.add_rms_norm(parts[0], again, weight, 1e-5)[0])


@many
@given(
    seed=st.integers(0, 2**20),
    tokens=st.integers(1, 40),
    blocks=st.sampled_from([1, 2, 8, 9]),
    outlier_blocks=st.integers(0, 2),
    hadamard=st.booleans(),
    exact_a4=st.booleans(),
    permuted=st.booleans(),
    dtype=dtypes,
)
def test_rows_travel_as_the_linear_would_quantise_them(
    seed: int,
    tokens: int,
    blocks: int,
    outlier_blocks: int,
    hadamard: bool,
    exact_a4: bool,
    permuted: bool,
    dtype: torch.dtype,
    kernels: Any,
) -> None:
    """Against comet/reference.py; and the product is that of the rows themselves."""
    from weft.kernels.quantised import unpack_rows
    from weft.kernels.wire import FusedRows, input_format

    channels, outlier_blocks = 128 * blocks, min(blocks, outlier_blocks)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(channels, generator=generator) if permuted else None
    packed = kernels.pack_w4ax(
        torch.randint(-8, 8, (9, channels), generator=generator, dtype=torch.int8),
        torch.rand((9, blocks), generator=generator),
        permutation=order,
        outlier_blocks=outlier_blocks,
        hadamard=hadamard,
        exact_a4=exact_a4,
    )
    form = input_format(kernels, packed)
    assert form is not None
    four = blocks - outlier_blocks if exact_a4 else 0
    assert form.row_bytes == channels - 64 * four + 4 * blocks  # no byte more than the integers and their scales

    x = random(seed, tokens, channels).to(dtype)
    prepared = form.decode(form.encode(x), dtype)
    expected = reference.quantise_rows(
        reference.prepare(x, InputForm(channels, order, outlier_blocks, hadamard)), outlier_blocks, exact_a4=exact_a4
    )
    values, scales, totals = unpack_rows(prepared.data, tokens)
    assert torch.equal(values, expected.values) and same(scales, expected.scales)
    assert torch.equal(totals, expected.values.view(tokens, blocks, 128).sum(-1, dtype=torch.int32))
    assert same(kernels.linear(prepared, packed), kernels.linear(x, packed))

    weight = torch.rand(channels, generator=generator).to(dtype)
    wire, _ = FusedRows(kernels)([x, x], x.clone(), weight, 1e-5, form)
    separate, _ = rows.plain(kernels.rms_norm)([x, x], x.clone(), weight, 1e-5, form)
    for found, wanted in zip(
        *(unpack_rows(form.decode(one, dtype).data, tokens) for one in (wire, separate)), strict=True
    ):
        assert same(found, wanted)


def test_rows_are_for_the_weight_that_they_were_prepared_for(kernels: Any) -> None:
    from weft.kernels.wire import input_format

    first, second = (kernels.pack_w4ax(torch.ones((4, 128), dtype=torch.int8), torch.ones(4, 1)) for _ in range(2))
    form = input_format(kernels, first)
    assert form is not None and input_format(kernels, kernels.pack_linear(torch.ones(4, 4))) is None
    prepared = form.decode(form.encode(torch.ones(3, 128)), torch.float32)
    assert kernels.linear(prepared, first).tolist() == [[128.0] * 4] * 3
    with pytest.raises(ValueError, match="prepared for another weight"):
        kernels.linear(prepared, second)
    with pytest.raises(ValueError, match=r"\[n, 128\]"):
        form.encode(torch.ones(3, 129))
