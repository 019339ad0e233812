"""4-bit weights and integer activations against comet/reference.py, bit for bit at every level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weft.comet import reference
from weft.comet.packing import BLOCK
from weft.comet.reference import InputForm, QuantisedLinear
from weft.kernels.quantised import W4AxLinear, quantise_rows, unpack_rows

many = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Around the tile heights (4, 6), the group of rows (512) and the panel (64 columns).
rows = st.one_of(st.integers(1, 13), st.sampled_from([24, 31, 32, 40, 96, 193, 257, 512, 513]))
outputs = st.one_of(st.integers(1, 9), st.sampled_from([63, 64, 65, 128, 129]))
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made_weight(seed: int, n: int, blocks: int, wide_blocks: int, *, extreme: bool, bias: bool) -> QuantisedLinear:
    """Values that use all of their range; `extreme`: only its ends."""

    def drawn(columns: int, low: int, high: int) -> torch.Tensor:
        values = torch.randint(low, high + 1, (n, columns), generator=random(seed + columns))
        return torch.where(values * 2 < low + high, low, high) if extreme else values

    border = wide_blocks * BLOCK
    values = torch.cat((drawn(border, -128, 127), drawn(blocks * BLOCK - border, -8, 7)), dim=1).to(torch.int8)
    scales = torch.randn(n, blocks, generator=random(seed + 1)).bfloat16().float()
    return QuantisedLinear(values, scales, torch.randn(n, generator=random(seed + 2)) if bias else None)


def made_form(seed: int, blocks: int, outlier_blocks: int, *, run: int, hadamard: bool) -> InputForm:
    """run: so many channels stay together when they are permuted; 0: they are not."""
    channels, order = blocks * BLOCK, None
    if run:
        starts = torch.randperm(channels // run, generator=random(seed + 3)) * run
        order = (starts[:, None] + torch.arange(run)).flatten()
    return InputForm(channels, order, outlier_blocks, hadamard)


def made_input(seed: int, m: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different sizes, with outliers, ties, zeros and now and then an infinity or a NaN."""
    x = torch.randn(m, channels, generator=random(seed + 4)) * 10.0 ** torch.randint(
        -3, 4, (m, 1), generator=random(seed + 5)
    )
    kinds = torch.randint(0, 12, (m,), generator=random(seed + 6))
    x[kinds == 0] = 0
    x[kinds == 1] = x[kinds == 1].sign() * 3
    x[kinds == 2] = (x[kinds == 2] * 8).round() / 8
    x[kinds == 3, :BLOCK] *= 1e-38
    x[kinds == 4, -BLOCK:] *= 1e34
    x[kinds == 5, seed % channels] = torch.inf
    x[kinds == 6, seed % channels] = torch.nan
    return x.to(dtype)


def packed_of(kernels: Any, form: InputForm, weight: QuantisedLinear, *, exact_a4: bool = False) -> W4AxLinear:
    packed = kernels.pack_w4ax(
        weight.values,
        weight.scales,
        weight.bias,
        permutation=form.permutation,
        outlier_blocks=form.outlier_blocks,
        hadamard=form.hadamard,
        exact_a4=exact_a4,
    )
    assert isinstance(packed, W4AxLinear)
    return packed


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Of every number; a NaN is a NaN."""
    assert found.dtype is expected.dtype and found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[found.dtype]
    clean = [torch.where(x.isnan(), 0, x).view(whole) for x in (found, expected)]
    assert torch.equal(*clean)


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    blocks = draw(st.one_of(st.integers(1, 5), st.sampled_from([16, 17, 33])))  # around the piece of a row
    outliers = draw(st.sampled_from([0, 1, blocks]))
    return {
        "blocks": blocks,
        "outliers": outliers,
        "wide": draw(st.sampled_from([0, outliers])),
        "n": draw(outputs),
        "run": draw(st.sampled_from([0, 1, 4, 8, 16, 64, 128])),  # around the lanes of a vector, and heads
        "hadamard": draw(st.booleans()),
        "exact_a4": draw(st.booleans()),
        "extreme": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "seed": draw(seeds),
    }


def make(layer: dict[str, Any]) -> tuple[InputForm, QuantisedLinear]:
    seed, blocks = layer["seed"], layer["blocks"]
    form = made_form(seed, blocks, layer["outliers"], run=layer["run"], hadamard=layer["hadamard"])
    weight = made_weight(seed, layer["n"], blocks, layer["wide"], extreme=layer["extreme"], bias=layer["bias"])
    return form, weight


@many
@given(layer=layers(), m=rows, dtype=dtypes)
def test_outputs_are_the_references_bit_for_bit(
    backends: Any, layer: dict[str, Any], m: int, dtype: torch.dtype
) -> None:
    form, weight = make(layer)
    x = made_input(layer["seed"], m, form.channels, dtype)
    quantised = reference.quantise_rows(reference.prepare(x, form), form.outlier_blocks, exact_a4=layer["exact_a4"])
    expected = reference.combine(reference.accumulate(quantised, weight), quantised, weight)
    for kernels in (backends.one, backends.two):
        packed = packed_of(kernels, form, weight, exact_a4=layer["exact_a4"])
        assert_same_bits(kernels.linear(x, packed, torch.float32), expected)
        assert_same_bits(kernels.linear(x, packed), expected.to(dtype))


@many
@given(layer=layers(), m=rows, dtype=dtypes)
def test_quantised_rows_are_the_references_bit_for_bit(
    backends: Any, layer: dict[str, Any], m: int, dtype: torch.dtype
) -> None:
    form, weight = make(layer)
    x = made_input(layer["seed"], m, form.channels, dtype)
    expected = reference.quantise_rows(reference.prepare(x, form), form.outlier_blocks, exact_a4=layer["exact_a4"])
    packed = packed_of(backends.two, form, weight, exact_a4=layer["exact_a4"])
    values, scales, totals = unpack_rows(quantise_rows(backends.two.native, x, packed), m)
    assert torch.equal(values, expected.values)
    assert_same_bits(scales, expected.scales)
    assert torch.equal(totals, expected.values.view(m, -1, BLOCK).sum(-1, dtype=torch.int32))


@many
@given(layer=layers(), m=rows, zeros=st.booleans())
def test_zero_points_and_scales_of_32_bits_are_exact_too(
    backends: Any, layer: dict[str, Any], m: int, zeros: bool
) -> None:
    form, weight = make(layer)
    seed, (n, blocks) = layer["seed"], weight.scales.shape
    scales = torch.randn(n, blocks, generator=random(seed + 7))  # more digits than bfloat16 has
    points = torch.randint(-8, 8, (n, blocks), generator=random(seed + 8), dtype=torch.int8)
    # What is left after the subtraction must fit the reference's int8.
    values = weight.values.clamp(-119, 119)
    shifted = values - points.repeat_interleave(BLOCK, dim=1) if zeros else values
    x = made_input(seed, m, form.channels, torch.float32)
    quantised = reference.quantise_rows(reference.prepare(x, form), form.outlier_blocks, exact_a4=False)
    truth = QuantisedLinear(shifted, scales, weight.bias)
    expected = reference.combine(reference.accumulate(quantised, truth), quantised, truth)
    for kernels in (backends.one, backends.two):
        packed = kernels.pack_w4ax(
            values,
            scales,
            weight.bias,
            permutation=form.permutation,
            outlier_blocks=form.outlier_blocks,
            hadamard=form.hadamard,
            zeros=points if zeros else None,
        )
        assert_same_bits(kernels.linear(x, packed), expected)


@pytest.mark.parametrize("exact_a4", [False, True])
def test_a_block_is_zero_below_the_least_magnitude(backends: Any, exact_a4: bool) -> None:
    least = torch.tensor(reference.TINY)
    x = torch.zeros(4, BLOCK)
    x[:, 5] = torch.stack((least, -least, least.nextafter(torch.tensor(0.0)), torch.tensor(2.0**-101)))
    packed = backends.one.pack_w4ax(torch.ones(3, BLOCK, dtype=torch.int8), torch.ones(3, 1), exact_a4=exact_a4)
    expected = reference.quantise_rows(x, 0, exact_a4=exact_a4)
    assert expected.values.any(dim=1).tolist() == [True, True, False, False]
    values, scales, _ = unpack_rows(quantise_rows(backends.one.native, x, packed), 4)
    assert torch.equal(values, expected.values) and torch.equal(scales, expected.scales)


@many
@given(m=rows, n=outputs, wide=st.booleans(), extreme=st.booleans(), ends=st.booleans(), seed=seeds)
@example(m=6, n=64, wide=True, extreme=True, ends=True, seed=0)
@example(m=257, n=65, wide=False, extreme=True, ends=True, seed=0)
def test_accumulators_are_exact(
    backends: Any, m: int, n: int, wide: bool, extreme: bool, ends: bool, seed: int
) -> None:
    # With one block, scales of 1 and rows that hold 127, the outputs are the accumulators: below 2**24.
    weight = made_weight(seed, n, 1, int(wide), extreme=extreme, bias=False)
    weight = QuantisedLinear(weight.values, torch.ones(n, 1), None)
    x = torch.randint(-127, 128, (m, BLOCK), generator=random(seed))
    x = torch.where(x < 0, -127, 127) if ends else x
    x[:, seed % BLOCK] = 127
    expected = (x @ weight.values.long().T).float()
    form = InputForm(BLOCK, None, int(wide), False)
    for kernels in (backends.one, backends.two):
        assert torch.equal(kernels.linear(x.float(), packed_of(kernels, form, weight)), expected)


@pytest.mark.parametrize("wide", [False, True])
def test_the_largest_sums_do_not_saturate(backends: Any, wide: bool) -> None:
    for value in (-128, 127) if wide else (-8, 7):
        weight = QuantisedLinear(torch.full((70, BLOCK), value, dtype=torch.int8), torch.ones(70, 1), None)
        packed = packed_of(backends.one, InputForm(BLOCK, None, int(wide), False), weight)
        for x in (-127, 127):
            y = backends.one.linear(torch.full((7, BLOCK), float(x)), packed)
            assert (y == BLOCK * x * value).all()


@many
@given(layer=layers(), m=rows, dtype=dtypes, data=st.data())
def test_the_bits_of_a_row_are_its_own(
    backends: Any, layer: dict[str, Any], m: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    form, weight = make(layer)
    x = made_input(layer["seed"], m, form.channels, dtype)
    packed = packed_of(backends.one, form, weight, exact_a4=layer["exact_a4"])
    whole = backends.one.linear(x, packed)
    assert_same_bits(backends.two.linear(x, packed), whole)
    start = data.draw(st.integers(0, m - 1))
    end = data.draw(st.integers(start + 1, m))
    assert_same_bits(backends.two.linear(x[start:end], packed), whole[start:end])
    order = torch.randperm(m, generator=random(layer["seed"]))
    assert_same_bits(backends.one.linear(x[order], packed), whole[order])


def test_every_nibble_lands_in_its_place(backends: Any) -> None:
    # One channel at a time: unit inputs, so that a swapped nibble or column shows.
    values = (torch.arange(65 * 2 * BLOCK).view(65, -1) * 7 % 16 - 8).to(torch.int8)
    weight = QuantisedLinear(values, torch.ones(65, 2), None)
    packed = packed_of(backends.two, InputForm(2 * BLOCK, None, 0, False), weight)
    y = backends.two.linear(torch.eye(2 * BLOCK) * 127, packed)
    assert torch.equal(y, values.T.float() * 127)


def test_a_layer_takes_four_bits_a_weight_and_its_scales(backends: Any) -> None:
    form, n = InputForm(2048, None, 1, True), 256
    four = packed_of(backends.one, form, made_weight(0, n, 16, 0, extreme=False, bias=False))
    assert four.bytes == n * 2048 * 4.125 / 8
    eight = packed_of(backends.one, form, made_weight(0, n, 16, 1, extreme=False, bias=False))
    assert eight.bytes == four.bytes + n * BLOCK / 2
    general = backends.one.pack_w4ax(torch.zeros(n, 2048, dtype=torch.int8), torch.full((n, 16), 0.1))
    assert general.bytes == n * 2048 * 4.3125 / 8


def test_no_rows_give_no_rows(backends: Any) -> None:
    weight = made_weight(0, 5, 1, 0, extreme=False, bias=True)
    packed = packed_of(backends.two, InputForm(BLOCK, None, 0, True), weight)
    assert backends.two.linear(torch.empty(0, BLOCK), packed).shape == (0, 5)


def test_wrong_weights_are_refused(backends: Any) -> None:
    pack, ones = backends.one.pack_w4ax, torch.ones(5, 1)
    values = torch.zeros(5, BLOCK, dtype=torch.int8)
    with pytest.raises(TypeError, match="int8"):
        pack(values.int(), ones)
    with pytest.raises(ValueError, match="128 must divide"):
        pack(values[:, :100], ones)
    with pytest.raises(ValueError, match="scales have shape"):
        pack(values, torch.ones(5, 2))
    for scale in (torch.nan, torch.inf, 1e39):
        with pytest.raises(ValueError, match="scales must be finite"):
            pack(values, ones.double() * scale)
    with pytest.raises(TypeError, match="zeros are"):
        pack(values, ones, zeros=torch.zeros(5, 1))
    with pytest.raises(ValueError, match="zeros have shape"):
        pack(values, ones, zeros=torch.zeros(5, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match="zeros go from 8 to 8"):
        pack(values, ones, zeros=torch.full((5, 1), 8, dtype=torch.int8))
    with pytest.raises(ValueError, match="bias has shape"):
        pack(values, ones, torch.ones(4))
    with pytest.raises(ValueError, match="1 blocks"):
        pack(values, ones, outlier_blocks=2)
    with pytest.raises(ValueError, match="go from 0 to 8"):
        pack(torch.where(torch.arange(BLOCK) == 3, 8, values).to(torch.int8), ones)
    for wrong in (torch.arange(BLOCK) + 1, torch.zeros(BLOCK), torch.arange(BLOCK - 1)):
        with pytest.raises(ValueError, match="permutation"):
            pack(values, ones, permutation=wrong)


def test_wrong_inputs_are_refused(backends: Any) -> None:
    kernels = backends.one
    packed = kernels.pack_w4ax(torch.zeros(5, BLOCK, dtype=torch.int8), torch.ones(5, 1))
    with pytest.raises(TypeError, match="float16"):
        kernels.linear(torch.ones(1, BLOCK, dtype=torch.float16), packed)
    with pytest.raises(ValueError, match=r"x is \[2, 64\]"):
        kernels.linear(torch.ones(2, 64), packed)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.linear(torch.ones(BLOCK, 2).T, packed)
    with pytest.raises(TypeError, match="or float32"):
        kernels.linear(torch.ones(1, BLOCK), packed, torch.bfloat16)
    with pytest.raises(ValueError, match="y is"):
        kernels.linear_into(torch.ones(2, BLOCK), packed, torch.ones(5, 2).T)
    packed.native.release()
    with pytest.raises(RuntimeError, match="released"):
        kernels.linear(torch.ones(1, BLOCK), packed)
