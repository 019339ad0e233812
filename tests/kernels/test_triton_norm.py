"""Norms and the gated activation in Triton, alone and before a quantised product, against the reference."""

from __future__ import annotations

import pytest
import torch

from weft.comet import reference as comet
from weft.comet.reference import InputForm
from weft.kernels.base import Kernels
from weft.kernels.reference import ReferenceKernels

pytest.importorskip("triton", reason="triton is not installed")

from weft.kernels.triton import TritonKernels
from weft.kernels.triton_norm import add_rms_norm, rms_norm, silu_mul
from weft.kernels.triton_rows import Norm, quantise_rows
from weft.kernels.triton_w4ax import Prepared
from weft.kernels.w4ax_weights import Form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
reference = ReferenceKernels((0,))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def within_a_rounding(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Of the activations' type: sums and powers of e may differ in the last bit of a float32."""
    assert found.dtype is expected.dtype and found.shape == expected.shape
    error = 2 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=error, atol=1e-6)


def normal(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (70, 96), (3, 1000)], ids=str)
def test_norms_are_the_references(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, weight = (normal(i, *shape[i == 2 :], dtype=dtype) for i in range(3))
    x[0] *= 100
    within_a_rounding(rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5), reference.rms_norm(x, weight, 1e-5))
    here = residual.to(DEVICE, copy=True)
    found, total = add_rms_norm(x.to(DEVICE), here, weight.to(DEVICE), 1e-5)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert total is here and torch.equal(total.cpu(), expected_total)
    within_a_rounding(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 100, 1500])
def test_the_gated_activation_is_the_references(columns: int, dtype: torch.dtype) -> None:
    gate_up = normal(0, 66, 2 * columns, dtype=dtype)
    gate_up[0, :columns], gate_up[1, :columns] = 200, -200  # whose power of e is no float32
    within_a_rounding(silu_mul(gate_up.to(DEVICE)), reference.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_row_are_its_own(dtype: torch.dtype) -> None:
    x, weight = normal(0, 70, 130, dtype=dtype).to(DEVICE), normal(1, 130, dtype=dtype).to(DEVICE)
    assert torch.equal(rms_norm(x[69:], weight, 1e-5), rms_norm(x, weight, 1e-5)[69:])
    assert torch.equal(silu_mul(x[69:]), silu_mul(x)[69:])
    residual = x.flip(0).contiguous()
    alone, _ = add_rms_norm(x[69:], residual[69:].clone(), weight, 1e-5)
    assert torch.equal(alone, add_rms_norm(x, residual, weight, 1e-5)[0][69:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact_a4", [False, True])
def test_a_gated_row_is_quantised_as_the_activation_that_it_stands_for(dtype: torch.dtype, exact_a4: bool) -> None:
    channels, outliers = 3 * 128, 1
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(2))
    gate_up = normal(3, 5, 2 * channels, dtype=dtype)
    form = Form(channels, order.int().to(DEVICE), outliers, outliers if exact_a4 else 3, True)
    rows = quantise_rows(gate_up.to(DEVICE), form, gated=True)
    activation = silu_mul(gate_up.to(DEVICE)).cpu()
    prepared = comet.prepare(activation, InputForm(channels, order, outliers, True))
    expected = comet.quantise_rows(prepared, outliers, exact_a4=exact_a4)
    assert torch.equal(rows.values.cpu(), expected.values) and torch.equal(rows.scales.cpu(), expected.scales)


@pytest.mark.parametrize(
    "kernels",
    [{}, {"exact_a4": True}, {"sixteen": True}, {"sixteen": True, "invariant": True}],
    ids=["W4A8", "exact-a4", "W4A16", "W4A16, invariant"],
)
@pytest.mark.parametrize("count", [0, 1, 70])
def test_what_a_quantised_linear_alone_reads_comes_ready_for_it(kernels: dict[str, bool], count: int) -> None:
    """And changes no bit of what this linear gives."""
    channels, chance = 3 * 128, torch.Generator().manual_seed(5)
    backend: Kernels = TritonKernels(torch.device(DEVICE), **kernels)
    packed, other = (
        backend.pack_w4ax(
            torch.randint(-8, 8, (40, channels), dtype=torch.int8, generator=chance),
            torch.rand(40, 3, generator=chance),
            permutation=torch.randperm(channels, generator=chance),
            outlier_blocks=1,
            hadamard=True,
        )
        for _ in range(2)
    )
    x, residual, gate_up = (
        normal(i, count, channels * (1 + i // 8), dtype=torch.bfloat16).to(DEVICE) for i in (6, 7, 8)
    )
    weight = normal(9, channels, dtype=torch.bfloat16).to(DEVICE)
    again = residual.clone()
    sums = backend.add_rms_norm(x, residual, weight, 1e-5)
    ready = backend.add_rms_norm(x, again, weight, 1e-5, packed)
    assert sums[1] is residual and ready[1] is again and torch.equal(residual, again)
    pairs = [
        (backend.rms_norm(x, weight, 1e-5), backend.rms_norm(x, weight, 1e-5, packed)),
        (sums[0], ready[0]),
        (backend.silu_mul(gate_up), backend.silu_mul(gate_up, packed)),
    ]
    for rows, prepared in pairs:
        assert isinstance(prepared, Prepared)
        for dtype in (None, torch.float32):
            expected = backend.linear(rows, packed, dtype)
            assert expected.shape == (count, 40) and torch.equal(backend.linear(prepared, packed, dtype), expected)
        with pytest.raises(ValueError, match="for another weight"):
            backend.linear(prepared, other)


def test_what_a_plain_linear_reads_stays_as_it_is() -> None:
    backend, x = TritonKernels(torch.device(DEVICE)), normal(0, 2, 64, dtype=torch.bfloat16).to(DEVICE)
    plain = backend.pack_linear(torch.ones(5, 64).bfloat16())
    assert torch.equal(backend.rms_norm(x, x[0], 1e-5, plain), rms_norm(x, x[0], 1e-5))
    assert torch.equal(backend.silu_mul(x, plain), silu_mul(x))


def test_no_rows_give_no_rows() -> None:
    x = torch.empty(0, 64, device=DEVICE)
    assert rms_norm(x, torch.ones(64, device=DEVICE), 1e-5).shape == (0, 64) and silu_mul(x).shape == (0, 32)


def test_wrong_arguments_are_refused() -> None:
    x = torch.ones(2, 128, device=DEVICE)
    with pytest.raises(TypeError, match="float64"):
        rms_norm(x.double(), x[0].double(), 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        silu_mul(x.T)
    with pytest.raises(ValueError, match="2 F"):
        silu_mul(x[:, :63].contiguous())
    with pytest.raises(ValueError, match="x has 128 columns"):
        rms_norm(x, x[0, :64], 1e-5)
    with pytest.raises(ValueError, match="the residual is"):
        add_rms_norm(x, x.half(), x[0], 1e-5)
    form = Form(128, None, 0, 1, False)
    with pytest.raises(ValueError, match=r"contiguous \[T, 256\]"):
        quantise_rows(x, form, gated=True)
    with pytest.raises(ValueError, match="follows no norm"):
        quantise_rows(torch.ones(2, 256, device=DEVICE), form, Norm(x[0], 1e-5), gated=True)
