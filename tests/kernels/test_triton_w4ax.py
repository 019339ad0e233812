"""The Triton kernels against comet/reference.py: interpreted where there is no GPU, and compiled ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weft.comet import reference
from weft.comet.packing import BLOCK
from weft.comet.reference import InputForm, QuantisedLinear, QuantisedRows

pytest.importorskip("triton", reason="triton is not installed")

from weft.kernels import triton_norm, triton_w4ax
from weft.kernels.cuda_w4ax import pack_rows
from weft.kernels.triton_rows import Norm, Rows, prepare_rows, quantise_rows
from weft.kernels.triton_tiles import ProductTile
from weft.kernels.triton_w4ax import TritonW4Ax
from weft.kernels.w4ax_weights import Form

# The interpreter computes with numpy, which warns of the infinities that some of the inputs hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOOL = Path(__file__).parent.parent.parent / "tools" / "check_triton.py"

few = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(low: int, high: int, shape: tuple[int, ...], seed: int, *, extreme: bool = False) -> torch.Tensor:
    values = torch.randint(low, high + 1, shape, generator=random(seed))
    return (torch.where(values * 2 < low + high, low, high) if extreme else values).to(torch.int8)


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    blocks = draw(st.sampled_from([1, 2, 3, 9]))
    outliers = draw(st.sampled_from([0, 1, blocks]))
    names = ("permuted", "hadamard", "exact_a4", "extreme", "bias", "zeros", "long_scales")
    flags = {name: draw(st.booleans()) for name in names}
    wide = draw(st.sampled_from([0, outliers]))
    outputs = draw(st.sampled_from([1, 9, 63, 65, 129]))
    return {"blocks": blocks, "outliers": outliers, "wide": wide, "n": outputs, "seed": draw(seeds), **flags}


def made(layer: dict[str, Any]) -> tuple[InputForm, QuantisedLinear]:
    seed, n, blocks = layer["seed"], layer["n"], layer["blocks"]
    order = torch.randperm(blocks * BLOCK, generator=random(seed)) if layer["permuted"] else None
    form = InputForm(blocks * BLOCK, order, layer["outliers"], layer["hadamard"])
    values = drawn(-8, 7, (n, blocks * BLOCK), seed + 1, extreme=layer["extreme"])
    border = layer["wide"] * BLOCK
    values[:, :border] = drawn(-128, 127, (n, border), seed + 2, extreme=layer["extreme"])
    scales = torch.randn(n, blocks, generator=random(seed + 3))
    scales = scales if layer["long_scales"] else scales.bfloat16().float()
    bias = torch.randn(n, generator=random(seed + 4)) if layer["bias"] else None
    zeros = drawn(-8, 7, (n, blocks), seed + 5) if layer["zeros"] else None
    return form, QuantisedLinear(values, scales, bias, zeros)


def packed_of(form: InputForm, weight: QuantisedLinear, exact_a4: bool) -> TritonW4Ax:
    return triton_w4ax.pack_w4ax(
        weight.values,
        weight.scales,
        weight.bias,
        permutation=form.permutation,
        outlier_blocks=form.outlier_blocks,
        hadamard=form.hadamard,
        zeros=weight.zeros,
        exact_a4=exact_a4,
        device=DEVICE,
    )


def made_input(seed: int, m: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different sizes, with ties, zeros and now and then an infinity or a NaN."""
    x = torch.randn(m, channels, generator=random(seed + 6))
    kinds = torch.randint(0, 9, (m,), generator=random(seed + 7))
    x[kinds == 0] = 0
    x[kinds == 1] = x[kinds == 1].sign() * 3
    x[kinds == 2] = (x[kinds == 2] * 8).round() / 8
    x[kinds == 3, :BLOCK] *= 1e-38
    x[kinds == 4, -BLOCK:] *= 1e34
    x[kinds == 5, seed % channels] = torch.inf
    x[kinds == 6, seed % channels] = torch.nan
    return x.to(dtype)


def triton_form(form: InputForm, exact_a4: bool) -> Form:
    order = None if form.permutation is None else form.permutation.int().to(DEVICE)
    eight = form.outlier_blocks if exact_a4 else form.blocks
    return Form(form.channels, order, form.outlier_blocks, eight, form.hadamard)


def rows_of(expected: QuantisedRows) -> Rows:
    totals = expected.values.view(len(expected.values), -1, BLOCK).sum(-1, dtype=torch.int32)
    return Rows(*(part.contiguous().to(DEVICE) for part in (expected.values, expected.scales, totals)))


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Of every number; a NaN is a NaN."""
    found = found.cpu()
    assert found.dtype is expected.dtype and found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    clean = [torch.where(x.isnan(), 0, x).float().view(torch.int32) for x in (found, expected)]
    assert torch.equal(*clean)


@few
@given(layer=layers(), m=st.integers(1, 6), dtype=dtypes)
def test_quantised_rows_are_the_references_bit_for_bit(layer: dict[str, Any], m: int, dtype: torch.dtype) -> None:
    form, _ = made(layer)
    x = made_input(layer["seed"], m, form.channels, dtype)
    expected = reference.quantise_rows(reference.prepare(x, form), form.outlier_blocks, exact_a4=layer["exact_a4"])
    prepared = triton_form(form, layer["exact_a4"])
    rows = quantise_rows(x.to(DEVICE), prepared)
    assert torch.equal(rows.values.cpu(), expected.values)
    assert_same_bits(rows.scales, expected.scales)
    nibbles = quantise_rows(x.to(DEVICE), prepared, nibbles=True).values
    assert torch.equal(nibbles.cpu(), pack_rows(expected.values, prepared.eight))
    assert torch.equal(rows.totals.cpu(), expected.values.view(m, -1, BLOCK).sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("exact_a4", [False, True])
def test_a_block_is_zero_below_the_least_magnitude(exact_a4: bool) -> None:
    least = torch.tensor(reference.TINY)
    x = torch.zeros(4, BLOCK)
    x[:, 5] = torch.stack((least, -least, least.nextafter(torch.tensor(0.0)), torch.tensor(2.0**-101)))
    expected = reference.quantise_rows(x, 0, exact_a4=exact_a4)
    assert expected.values.any(dim=1).tolist() == [True, True, False, False]
    rows = quantise_rows(x.to(DEVICE), Form(BLOCK, None, 0, 0 if exact_a4 else 1, False))
    assert torch.equal(rows.values.cpu(), expected.values) and torch.equal(rows.scales.cpu(), expected.scales)


def test_among_equals_the_negative_one_is_the_extreme() -> None:
    x = torch.ones(3, BLOCK)
    x[0, 7], x[1], x[2, :5] = -1, -1, 0
    expected = reference.quantise_rows(x, 0, exact_a4=True)
    assert expected.scales[:, 0].sign().tolist() == [1, 1, -1]
    rows = quantise_rows(x.to(DEVICE), Form(BLOCK, None, 0, 0, False))
    assert torch.equal(rows.values.cpu(), expected.values) and torch.equal(rows.scales.cpu(), expected.scales)


@few
@given(layer=layers(), m=st.integers(1, 4), dtype=dtypes, added=st.booleans())
@example(m=3, dtype=torch.bfloat16, added=True, layer={"blocks": 9, "outliers": 1, "n": 1, "seed": 0}
         | dict.fromkeys(("permuted", "hadamard"), True)
         | dict.fromkeys(("wide", "exact_a4", "extreme", "bias", "zeros", "long_scales"), False))  # fmt: skip
def test_behind_a_norm_rows_are_those_of_what_the_norm_gives(
    layer: dict[str, Any], m: int, dtype: torch.dtype, added: bool
) -> None:
    form, _ = made(layer)
    x, residual = (torch.randn(m, form.channels, generator=random(layer["seed"] + i)).to(DEVICE, dtype) for i in (8, 9))
    gain = torch.randn(form.channels, generator=random(layer["seed"] + 10)).to(DEVICE, dtype)
    sums = [residual.clone() for _ in range(2)]
    prepared = triton_form(form, layer["exact_a4"])
    rows, floats = (
        make(x, prepared, Norm(gain, 1e-6, total if added else None))
        for make, total in zip((quantise_rows, prepare_rows), sums, strict=True)
    )
    normalised = triton_norm.add_rms_norm(x, residual, gain, 1e-6)[0] if added else triton_norm.rms_norm(x, gain, 1e-6)
    assert all(torch.equal(total, residual) for total in sums)
    ready = reference.prepare(normalised.cpu(), form)
    assert torch.equal(floats.cpu(), ready.to(dtype))
    expected = reference.quantise_rows(ready, form.outlier_blocks, exact_a4=layer["exact_a4"])
    assert torch.equal(rows.values.cpu(), expected.values)
    assert_same_bits(rows.scales, expected.scales)
    assert torch.equal(rows.totals.cpu(), expected.values.view(m, -1, BLOCK).sum(-1, dtype=torch.int32))


@few
@given(layer=layers(), m=st.one_of(st.integers(1, 5), st.sampled_from([16, 17, 33, 65])))
@example(m=257, layer={"blocks": 3, "outliers": 1, "wide": 1, "n": 129, "seed": 0, "extreme": False, "zeros": True}
         | dict.fromkeys(("permuted", "hadamard", "exact_a4", "bias", "long_scales"), True))  # fmt: skip
@example(m=128, layer={"blocks": 2, "outliers": 0, "wide": 0, "n": 128, "seed": 1, "extreme": True, "zeros": False}
         | dict.fromkeys(("permuted", "hadamard", "exact_a4", "bias", "long_scales"), False))  # fmt: skip
def test_accumulators_and_outputs_are_the_references_bit_for_bit(layer: dict[str, Any], m: int) -> None:
    form, weight = made(layer)
    x = made_input(layer["seed"], m, form.channels, torch.float32)
    quantised = reference.quantise_rows(reference.prepare(x, form), form.outlier_blocks, exact_a4=layer["exact_a4"])
    rows, packed = rows_of(quantised), packed_of(form, weight, layer["exact_a4"])
    expected = reference.accumulate(quantised, weight)
    assert torch.equal(triton_w4ax.accumulators(rows, packed).cpu(), expected)
    y = reference.combine(expected, quantised, weight)
    assert_same_bits(triton_w4ax.multiply(rows, packed, torch.float32), y)
    assert_same_bits(triton_w4ax.multiply(rows, packed, torch.float16), y.half())
    assert_same_bits(triton_w4ax.multiply(rows, packed, torch.bfloat16), y.bfloat16())


@few
@given(m=st.integers(1, 20), n=st.sampled_from([1, 64, 65]), wide=st.booleans(), ends=st.booleans(), seed=seeds)
def test_accumulators_hold_the_largest_sums(m: int, n: int, wide: bool, ends: bool, seed: int) -> None:
    low, high = (-128, 127) if wide else (-8, 7)
    values = drawn(low, high, (n, BLOCK), seed, extreme=True)
    values = torch.full_like(values, low) if ends else values
    x = torch.full((m, BLOCK), -127, dtype=torch.int8) if ends else drawn(-127, 127, (m, BLOCK), seed + 1, extreme=True)
    rows = rows_of(QuantisedRows(x, torch.ones(m, 1)))
    packed = triton_w4ax.pack_w4ax(values, torch.ones(n, 1), outlier_blocks=int(wide), device=DEVICE)
    assert torch.equal(triton_w4ax.accumulators(rows, packed)[..., 0].cpu(), (x.long() @ values.long().T).int())


def test_a_linear_layer_prepares_quantises_and_multiplies() -> None:
    order = torch.randperm(3 * BLOCK, generator=random(1))
    weight = QuantisedLinear(drawn(-8, 7, (70, 3 * BLOCK), 2), torch.randn(70, 3, generator=random(3)), None)
    form = InputForm(3 * BLOCK, order, 1, True)
    x = torch.randn(5, 3 * BLOCK, generator=random(4)).bfloat16()
    for exact_a4 in (False, True):
        packed = packed_of(form, weight, exact_a4)
        expected = reference.linear(x.float(), form, weight, exact_a4=exact_a4)
        assert_same_bits(triton_w4ax.linear(x.to(DEVICE), packed, torch.float32), expected)


@few
@given(layer=layers(), m=st.integers(1, 17), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_sixteen_bit_rows_come_close_to_the_dequantised_product(
    layer: dict[str, Any], m: int, dtype: torch.dtype
) -> None:
    form, weight = made(layer)
    x = torch.randn(m, form.channels, generator=random(layer["seed"])).to(dtype)
    packed = packed_of(form, weight, layer["exact_a4"])
    prepared = reference.prepare(x, form).to(dtype)
    assert torch.equal(prepare_rows(x.to(DEVICE), packed.form).cpu(), prepared)
    whole = weight.dequantised().double()
    expected = prepared.double() @ whole.T
    expected = expected if weight.bias is None else expected + weight.bias
    error = (triton_w4ax.linear_a16(x.to(DEVICE), packed, torch.float32).cpu() - expected).abs().max()
    assert error <= 1e-5 * (prepared.double().abs() @ whole.abs().T).max()


def test_invariant_sixteen_bit_rows_have_one_tile_and_their_own_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: set[ProductTile] = set()
    tile_of = triton_w4ax.tile_of
    monkeypatch.setattr(triton_w4ax, "tile_of", lambda *given: (tiles.add(tile_of(*given)), tile_of(*given))[1])
    packed = triton_w4ax.pack_w4ax(drawn(-8, 7, (70, 256), 0), torch.ones(70, 2), hadamard=True, device=DEVICE)
    x = torch.randn(130, 256, generator=random(1)).bfloat16().to(DEVICE)
    whole = triton_w4ax.linear_a16(x, packed, invariant=True)
    for count in (1, 17, 40, 65):
        assert torch.equal(triton_w4ax.linear_a16(x[:count], packed, invariant=True), whole[:count])
    assert len(tiles) == 1


def test_a_layer_takes_four_bits_a_weight_and_its_scales() -> None:
    n, channels = 256, 2048
    scales = torch.ones(n, channels // BLOCK)
    packed = triton_w4ax.pack_w4ax(drawn(-8, 7, (n, channels), 0), scales, outlier_blocks=1)
    assert packed.bytes == n * channels * 4.125 / 8
    longer = triton_w4ax.pack_w4ax(drawn(-8, 7, (n, channels), 0), scales / 3)
    assert longer.bytes == n * channels * 4.25 / 8


def test_no_rows_give_no_rows() -> None:
    packed = triton_w4ax.pack_w4ax(drawn(-8, 7, (5, BLOCK), 0), torch.ones(5, 1), device=DEVICE)
    assert triton_w4ax.linear(torch.empty(0, BLOCK, device=DEVICE), packed).shape == (0, 5)
    assert triton_w4ax.linear_a16(torch.empty(0, BLOCK, device=DEVICE).half(), packed).shape == (0, 5)


def test_wrong_weights_are_refused() -> None:
    pack, ones = triton_w4ax.pack_w4ax, torch.ones(5, 1)
    values = torch.zeros(5, BLOCK, dtype=torch.int8)
    with pytest.raises(TypeError, match="int8"):
        pack(values.int(), ones)
    with pytest.raises(ValueError, match="128 must divide"):
        pack(values[:, :100], ones)
    with pytest.raises(ValueError, match="scales have shape"):
        pack(values, torch.ones(5, 2))
    for scale in (torch.nan, torch.inf, 1e39):
        with pytest.raises(ValueError, match="finite float32"):
            pack(values, ones.double() * scale)
    with pytest.raises(ValueError, match="bias has shape"):
        pack(values, ones, torch.ones(4))
    with pytest.raises(ValueError, match="1 blocks"):
        pack(values, ones, outlier_blocks=2)
    with pytest.raises(ValueError, match="go from 0 to 8"):
        pack(torch.where(torch.arange(BLOCK) == 3, 8, values).to(torch.int8), ones)
    with pytest.raises(ValueError, match="go from -9"):
        pack(values - 9, ones)
    with pytest.raises(TypeError, match="zeros are"):
        pack(values, ones, zeros=ones)
    with pytest.raises(ValueError, match="zeros have shape"):
        pack(values, ones, zeros=values)
    with pytest.raises(ValueError, match="zeros go from 8"):
        pack(values, ones, zeros=torch.full((5, 1), 8, dtype=torch.int8))
    for wrong in (torch.arange(BLOCK) + 1, torch.zeros(BLOCK), torch.arange(BLOCK - 1)):
        with pytest.raises(ValueError, match="permutation"):
            pack(values, ones, permutation=wrong)


def test_wrong_inputs_are_refused() -> None:
    packed = triton_w4ax.pack_w4ax(torch.zeros(5, BLOCK, dtype=torch.int8), torch.ones(5, 1))
    with pytest.raises(TypeError, match="float64"):
        triton_w4ax.linear(torch.ones(1, BLOCK, dtype=torch.float64), packed)
    with pytest.raises(ValueError, match=r"x is \[2, 64\]"):
        triton_w4ax.linear(torch.ones(2, 64), packed)
    with pytest.raises(ValueError, match="contiguous"):
        triton_w4ax.linear(torch.ones(BLOCK, 2).T, packed)
    with pytest.raises(TypeError, match="outputs in"):
        triton_w4ax.linear(torch.ones(1, BLOCK), packed, torch.int32)
    with pytest.raises(TypeError, match="takes bfloat16 and float16"):
        triton_w4ax.linear_a16(torch.ones(1, BLOCK), packed)
    with pytest.raises(ValueError, match="rows are"):
        triton_w4ax.multiply(rows_of(QuantisedRows(torch.zeros(1, 256).char(), torch.ones(1, 2))), packed, torch.half)
    ones = torch.ones(BLOCK)
    with pytest.raises(ValueError, match="norm's weight"):
        quantise_rows(torch.ones(1, BLOCK), packed.form, Norm(ones[:5], 1e-6))
    with pytest.raises(ValueError, match="residual is"):
        quantise_rows(torch.ones(1, BLOCK), packed.form, Norm(ones, 1e-6, torch.ones(2, BLOCK)))
    with pytest.raises(TypeError, match="one type"):
        quantise_rows(torch.ones(1, BLOCK), packed.form, Norm(ones, 1e-6, torch.ones(1, BLOCK).half()))


@pytest.mark.slow
def test_compiled_ahead_of_time_the_kernels_use_the_tensor_cores(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(TOOL), "--quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
