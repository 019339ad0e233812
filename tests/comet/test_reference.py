"""The W4Ax reference against arithmetic in plain Python and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.comet import reference
from weft.comet.hadamard import hadamard
from weft.comet.packing import BLOCK
from weft.comet.reference import InputForm, QuantisedLinear, QuantisedRows


def drawn(seed: int, rows: int, blocks: int) -> torch.Tensor:
    """Rows with outliers, zeros and exact halves among them."""
    x = torch.randn(rows, blocks * BLOCK, generator=torch.Generator().manual_seed(seed))
    x[:, 3::37] *= 40
    x[0, :BLOCK] = 0
    x[-1, :BLOCK] = torch.arange(BLOCK) / 2 - 31.75  # the least and the greatest are equally far from zero
    return x


def quantise_one(block: np.ndarray, bits: int) -> tuple[list[int], float]:
    """One block, value by value, in numpy's float32 scalars."""
    one = np.float32
    if bits == 8:
        largest = max(abs(one(value)) for value in block)
        scale, inverse = (largest / one(127), one(127) / largest) if largest else (one(0), one(0))
        return [round(float(one(value) * inverse)) for value in block], float(scale)
    low, high = min(block), max(block)
    extreme = low if -low >= high else high
    scale, inverse = (extreme / one(-8), one(-8) / extreme) if extreme else (one(0), one(0))
    return [min(7, max(-8, round(float(one(value) * inverse)))) for value in block], float(scale)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 3), st.data())
def test_rows_are_quantised_as_one_value_after_another(seed: int, rows: int, blocks: int, data: st.DataObject) -> None:
    outliers = data.draw(st.integers(0, blocks))
    x = drawn(seed, rows, blocks)
    quantised = reference.quantise_rows(x, outliers, exact_a4=True)
    assert quantised.values.dtype == torch.int8
    for row in range(rows):
        for block in range(blocks):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            values, scale = quantise_one(x[row, part].numpy(), 8 if block < outliers else 4)
            assert quantised.values[row, part].tolist() == values
            assert quantised.scales[row, block].item() == scale


def test_without_exact_a4_every_block_has_8_bits() -> None:
    x = drawn(1, 4, 3)
    quantised = reference.quantise_rows(x, 1, exact_a4=False)
    assert torch.equal(quantised.values, reference.quantise_rows(x, 3, exact_a4=True).values)
    assert quantised.values.abs().amax() == 127


@pytest.mark.parametrize("sign", [1, -1])
def test_four_bits_use_all_sixteen_levels(sign: int) -> None:
    ramp = sign * torch.linspace(-8, 7, 16).repeat(8)[None]
    quantised = reference.quantise_rows(ramp, 0, exact_a4=True)
    assert sorted(set(quantised.values.flatten().tolist())) == list(range(-8, 8))
    assert torch.equal(quantised.dequantised(), ramp)


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_nothing_and_of_nonsense_are_well_defined(bits: int) -> None:
    x = torch.zeros(5, BLOCK)
    x[1, 5] = 1e-38
    x[2, 5] = math.inf
    x[3, 5] = math.nan
    x[4, 5] = 3e38
    quantised = reference.quantise_rows(x, 1 if bits == 8 else 0, exact_a4=True)
    assert not quantised.values[:4].any()
    assert quantised.scales[:2].flatten().tolist() == [0, 0]
    assert torch.isnan(quantised.scales[2:4]).all()
    assert quantised.dequantised()[4, 5].item() == pytest.approx(3e38, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 33), st.integers(1, 20), st.integers(1, 4), st.booleans())
def test_accumulators_are_the_integer_dot_products(
    seed: int, tokens: int, outputs: int, blocks: int, extreme: bool
) -> None:
    generator = np.random.default_rng(seed)
    lowest, highest = (-127, -126) if extreme else (-127, 128)
    x = generator.integers(lowest, highest, (tokens, blocks * BLOCK))
    w = generator.integers(-127 if extreme else -8, -126 if extreme else 8, (outputs, blocks * BLOCK))
    rows = QuantisedRows(torch.from_numpy(x).to(torch.int8), torch.ones(tokens, blocks))
    weight = QuantisedLinear(torch.from_numpy(w).to(torch.int8), torch.ones(outputs, blocks), None)
    expected = np.einsum("tbk,nbk->tnb", x.reshape(tokens, blocks, -1), w.reshape(outputs, blocks, -1))
    accumulators = reference.accumulate(rows, weight)
    assert accumulators.dtype == torch.int32
    assert np.array_equal(accumulators.numpy(), expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 9), st.integers(1, 3))
def test_zero_points_are_subtracted_from_the_integers(seed: int, tokens: int, outputs: int, blocks: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.integers(-127, 128, (tokens, blocks, BLOCK))
    w = generator.integers(-8, 8, (outputs, blocks, BLOCK))
    z = generator.integers(-8, 8, (outputs, blocks))
    scales = torch.from_numpy(generator.uniform(-1, 1, (outputs, blocks)).astype(np.float32))
    rows = QuantisedRows(torch.from_numpy(x).to(torch.int8).flatten(1), torch.ones(tokens, blocks))
    weight = QuantisedLinear(
        torch.from_numpy(w).to(torch.int8).flatten(1), scales, None, torch.from_numpy(z).to(torch.int8)
    )
    expected = np.einsum("tbk,nbk->tnb", x, w - z[..., None])
    accumulators = reference.accumulate(rows, weight)
    assert accumulators.dtype == torch.int32
    assert np.array_equal(accumulators.numpy(), expected)
    floats = (w - z[..., None]) * scales.numpy()[..., None]
    assert np.array_equal(weight.dequantised().numpy(), floats.astype(np.float32).reshape(outputs, -1))


@pytest.mark.parametrize("outlier_blocks", [0, 1, 3])
@pytest.mark.parametrize("rotated", [False, True])
def test_the_output_is_the_product_of_what_was_stored(outlier_blocks: int, rotated: bool) -> None:
    generator = torch.Generator().manual_seed(outlier_blocks)
    x = drawn(7, 6, 3)
    weight = QuantisedLinear(
        torch.randint(-8, 8, (10, 384), generator=generator, dtype=torch.int8),
        torch.rand(10, 3, generator=generator) - 0.5,
        torch.randn(10, generator=generator),
    )
    permutation = torch.randperm(384, generator=generator).int()
    form = InputForm(384, permutation, outlier_blocks, rotated)
    y = reference.linear(x, form, weight, exact_a4=True)

    prepared = x[:, permutation.long()].double()
    for block in range(outlier_blocks if rotated else 3, 3):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        prepared[:, part] = prepared[:, part] @ hadamard_matrix(BLOCK)
    rows = reference.quantise_rows(prepared.float(), outlier_blocks, exact_a4=True)
    expected = rows.dequantised().double() @ weight.dequantised().double().T + weight.bias.double()
    assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-3 * expected.abs().max())


def hadamard_matrix(size: int) -> torch.Tensor:
    return torch.tensor(
        [[1.0 - 2.0 * ((row & column).bit_count() % 2) for column in range(size)] for row in range(size)],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("size", [1, 2, 64, 128])
def test_hadamard_is_the_matrix_of_bit_parities_and_its_own_inverse(size: int) -> None:
    x = torch.randn(5, 256, dtype=torch.float64)
    expected = (x.unflatten(-1, (-1, size)) @ hadamard_matrix(size)).flatten(-2)
    assert torch.allclose(hadamard(x, size), expected)
    assert torch.allclose(hadamard(hadamard(x, size), size) / size, x)


@pytest.mark.parametrize("size", [0, 3, 96, 512])
def test_hadamard_refuses_sizes_that_do_not_fit(size: int) -> None:
    with pytest.raises(ValueError, match=f"of {size} in 256"):
        hadamard(torch.zeros(2, 256), size)


def test_a_row_does_not_depend_on_the_others() -> None:
    x = drawn(3, 9, 2)
    weight = QuantisedLinear(torch.randint(-8, 8, (5, 256), dtype=torch.int8), torch.rand(5, 2), None)
    form = InputForm(256, None, 1, True)
    whole = reference.linear(x, form, weight, exact_a4=True)
    alone = torch.cat([reference.linear(row[None], form, weight, exact_a4=True) for row in x])
    assert torch.equal(whole, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    weight = QuantisedLinear(torch.zeros(5, 128, dtype=torch.int8), torch.rand(5, 1), None)
    assert reference.linear(torch.ones(2, 128, dtype=dtype), InputForm(128, None, 0, False), weight).dtype == dtype
