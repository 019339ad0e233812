"""The Triton and CUDA kernels on a real GPU, at the sizes of models, against comet/reference.py.

tests/kernels/test_triton_w4ax.py runs there, too, on the same GPU instead of the interpreter.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from weft.comet import reference
from weft.comet.packing import BLOCK
from weft.comet.reference import InputForm, QuantisedLinear, QuantisedRows
from weft.kernels import cuda_w4ax

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from weft.kernels import triton_norm, triton_w4ax
from weft.kernels.triton_rows import Norm, Rows, quantise_rows

SOURCE = Path(__file__).parent.parent.parent / "csrc/cuda/w4ax.cu"
SHAPES = [(1, 4096, 4096), (16, 1000, 2048), (64, 5632, 2048), (257, 4096, 1408), (1024, 2048, 5632)]


def made(n: int, k: int, wide: bool) -> tuple[InputForm, QuantisedLinear]:
    torch.manual_seed(n + k)
    values = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    values[:, :BLOCK] = torch.randint(-128, 128, (n, BLOCK)) if wide else values[:, :BLOCK]
    weight = QuantisedLinear(values, torch.randn(n, k // BLOCK), torch.randn(n))
    return InputForm(k, torch.randperm(k), 1, True), weight


def quantised(m: int, form: InputForm, exact_a4: bool) -> tuple[torch.Tensor, QuantisedRows]:
    x = torch.randn(m, form.channels).bfloat16()
    return x, reference.quantise_rows(reference.prepare(x, form), form.outlier_blocks, exact_a4=exact_a4)


def on_gpu(rows: QuantisedRows) -> Rows:
    totals = rows.values.unflatten(1, (-1, BLOCK)).sum(-1, dtype=torch.int32)
    return Rows(rows.values.cuda(), rows.scales.cuda(), totals.cuda())


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_gives_the_references_bits(shape: tuple[int, int, int], wide: bool) -> None:
    m, n, k = shape
    form, weight = made(n, k, wide)
    packed = triton_w4ax.pack_w4ax(
        weight.values,
        weight.scales,
        weight.bias,
        permutation=form.permutation,
        outlier_blocks=1,
        hadamard=True,
        device="cuda",
    )
    x, rows = quantised(m, form, exact_a4=False)
    found = quantise_rows(x.cuda(), packed.form)
    assert torch.equal(found.values.cpu(), rows.values) and torch.equal(found.scales.cpu(), rows.scales)
    sums = reference.accumulate(rows, weight)
    assert torch.equal(triton_w4ax.accumulators(found, packed).cpu(), sums)
    expected = reference.combine(sums, rows, weight)
    assert torch.equal(triton_w4ax.multiply(found, packed, torch.float32).cpu(), expected)
    assert torch.equal(triton_w4ax.linear(x.cuda(), packed).cpu(), expected.bfloat16())


@pytest.mark.parametrize("m", [1, 64, 300])
def test_triton_with_sixteen_bit_rows_is_close(m: int) -> None:
    form, weight = made(2048, 4096, True)
    packed = triton_w4ax.pack_w4ax(
        weight.values, weight.scales, permutation=form.permutation, outlier_blocks=1, hadamard=True, device="cuda"
    )
    x = torch.randn(m, 4096).bfloat16()
    prepared = reference.prepare(x, form).bfloat16().double()
    whole = weight.dequantised().double()
    error = (triton_w4ax.linear_a16(x.cuda(), packed, torch.float32).cpu() - prepared @ whole.T).abs().max()
    assert error <= 1e-5 * (prepared.abs() @ whole.abs().T).max()


@pytest.mark.parametrize("k", [1408, 4096, 8192])
def test_the_norm_and_the_activation_before_the_rows_change_no_bit(k: int) -> None:
    form, _ = made(1, k, False)
    blocks, order = k // BLOCK, form.permutation
    packed = triton_w4ax.pack_w4ax(
        torch.zeros(1, k).char(), torch.ones(1, blocks), permutation=order, hadamard=True, device="cuda"
    )
    x, residual, gain = torch.randn(33, k).bfloat16(), torch.randn(33, k).bfloat16(), torch.randn(k).bfloat16()
    both, added = torch.randn(33, 2 * k).bfloat16().cuda(), residual.cuda()
    normalised, summed = triton_norm.add_rms_norm(x.cuda(), residual.cuda(), gain.cuda(), 1e-6)
    rows = quantise_rows(x.cuda(), packed.form, Norm(gain.cuda(), 1e-6, added))
    assert torch.equal(added, summed)
    for found, floats in (
        (rows, normalised),
        (quantise_rows(both, packed.form, gated=True), triton_norm.silu_mul(both)),
    ):
        prepared = reference.prepare(floats.cpu(), InputForm(k, order, 0, True))
        expected = reference.quantise_rows(prepared, 0, exact_a4=False)
        assert torch.equal(found.values.cpu(), expected.values) and torch.equal(found.scales.cpu(), expected.scales)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> cuda_w4ax.Library:
    major, minor = torch.cuda.get_device_capability()
    compiler = shutil.which("nvcc")
    if compiler is None or major != 8:  # others have no INT4 units, and compile for minutes what emulates them
        pytest.skip("the CUDA kernels need nvcc and a GPU of capability 8.x")
    path = tmp_path_factory.mktemp("cuda") / "_cuda.so"
    flags = [f"-arch=sm_{major}{minor}", "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(path)], check=True, timeout=60)
    return cuda_w4ax.Library(path)


@pytest.mark.parametrize("exact_a4", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_gives_the_references_bits(
    library: cuda_w4ax.Library, shape: tuple[int, int, int], wide: bool, exact_a4: bool
) -> None:
    m, n, k = shape
    form, weight = made(n, k, wide)
    _, rows = quantised(m, form, exact_a4)
    sums = reference.accumulate(rows, weight)
    expected = reference.combine(sums, rows, weight)
    given = on_gpu(rows)
    for segments in (1, 4):
        packed = cuda_w4ax.pack_w4ax(
            weight.values,
            weight.scales,
            weight.bias,
            outlier_blocks=1,
            exact_a4=exact_a4,
            segments=segments,
            device="cuda",
        )
        nibbles = cuda_w4ax.pack_rows(given.values, packed.form.eight)
        found = torch.empty(k // BLOCK, m, n, dtype=torch.int32, device="cuda")
        y = library.multiply(nibbles, given.scales, given.totals, packed, sums=found)
        assert torch.equal(found.permute(1, 2, 0).cpu(), sums)
        for spread in (False, True):
            assert torch.equal(library.multiply(nibbles, given.scales, given.totals, packed, spread=spread), y)
        if segments == 1:
            assert torch.equal(y.cpu(), expected)
        else:
            torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-3 * expected.abs().max().item())
