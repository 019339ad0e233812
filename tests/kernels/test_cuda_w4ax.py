"""The CUDA kernels on an emulated GPU (csrc/cuda/emulate.h), against comet/reference.py; and what nvcc makes of them.

The emulation compiles csrc/cuda/w4ax.cu as it is. It spreads fragments over lanes as the PTX manual has it, lets copies
arrive as late as they may, and runs threads in an order drawn from a seed.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weft.comet import reference
from weft.comet.packing import BLOCK
from weft.comet.reference import QuantisedLinear, QuantisedRows
from weft.kernels import cuda_w4ax
from weft.kernels.cuda_w4ax import CudaW4Ax, Library, cuts, pack_rows, pieces_before, segments_for

ROOT = Path(__file__).parent.parent.parent
few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31 - 1)
# Around the heights of tiles (16, 32, 64, 128) and their width (128).
heights = st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 33, 64, 65, 129]))
widths = st.sampled_from([1, 7, 127, 128, 130])


class Emulated:
    """The kernels on an emulated GPU, which reads nothing but the arguments."""

    def __init__(self, path: Path) -> None:
        self.library = Library(path)
        self._control = ctypes.CDLL(str(path))
        self._control.weft_emulated_problem.restype = ctypes.c_char_p
        self._control.weft_emulated_input.argtypes = (ctypes.c_void_p, ctypes.c_int64)

    def multiply(
        self, rows: QuantisedRows, packed: CudaW4Ax, dtype: torch.dtype = torch.float32, *, seed: int = 1, **how: Any
    ) -> torch.Tensor:
        totals = rows.values.unflatten(1, (-1, BLOCK)).sum(-1, dtype=torch.int32)
        nibbles = pack_rows(rows.values, packed.form.eight)
        self._control.weft_emulated_seed(seed)
        self._control.weft_emulated_input(None, 0)
        for tensor in (nibbles, rows.scales, packed.weights, packed.scales):
            self._control.weft_emulated_input(tensor.data_ptr(), tensor.nbytes)
        try:
            return self.library.multiply(nibbles, rows.scales, totals, packed, dtype, **how)
        except RuntimeError as error:
            raise AssertionError(self._control.weft_emulated_problem()) from error


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to build the emulation with")
    path = tmp_path_factory.mktemp("cuda") / "emulated.so"
    flags = ["-x", "c++", "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(ROOT / "csrc/cuda/w4ax.cu"), "-o", str(path)], check=True)
    return Emulated(path)


def drawn(low: int, high: int, shape: tuple[int, ...], seed: int, *, extreme: bool = False) -> torch.Tensor:
    values = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))
    return (torch.where(values * 2 < low + high, low, high) if extreme else values).to(torch.int8)


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    blocks = draw(st.integers(1, 6))
    outliers = draw(st.sampled_from([0, 1, blocks]))
    flags = {name: draw(st.booleans()) for name in ("exact_a4", "extreme", "bias", "zeros")}
    wide, segments = draw(st.sampled_from([0, outliers])), draw(st.integers(1, min(4, blocks)))
    return {"blocks": blocks, "outliers": outliers, "wide": wide, "segments": segments, "seed": draw(seeds), **flags}


def made(layer: dict[str, Any], m: int, n: int) -> tuple[QuantisedRows, QuantisedLinear, CudaW4Ax]:
    seed, blocks, wide = layer["seed"], layer["blocks"], layer["wide"] * BLOCK
    values = drawn(-8, 7, (n, blocks * BLOCK), seed, extreme=layer["extreme"])
    values[:, :wide] = drawn(-128, 127, (n, wide), seed + 1, extreme=layer["extreme"])
    if wide:
        values[0, 0] = 127  # whatever was drawn: more than four bits
    torch.manual_seed(seed)
    bias = torch.randn(n) if layer["bias"] else None
    zeros = drawn(-8, 7, (n, blocks), seed + 2) if layer["zeros"] else None
    weight = QuantisedLinear(values, torch.randn(n, blocks), bias, zeros)
    x = torch.randn(m, blocks * BLOCK)
    x = x.sign() * 3 if layer["extreme"] else x
    rows = reference.quantise_rows(x, layer["outliers"], exact_a4=layer["exact_a4"])
    packed = cuda_w4ax.pack_w4ax(
        values,
        weight.scales,
        bias,
        outlier_blocks=layer["outliers"],
        zeros=zeros,
        exact_a4=layer["exact_a4"],
        segments=layer["segments"],
    )
    return rows, weight, packed


def combined(sums: torch.Tensor, rows: QuantisedRows, weight: QuantisedLinear, packed: CudaW4Ax) -> torch.Tensor:
    """The reference's float sum, segment by segment, and the segments in order."""
    parts = []
    for first, end in itertools.pairwise(packed.cuts):
        part = QuantisedRows(rows.values, rows.scales[:, first:end])
        columns = QuantisedLinear(weight.values, weight.scales[:, first:end], None)
        parts.append(reference.combine(sums[..., first:end], part, columns))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total if weight.bias is None else total + weight.bias


WHOLE = {"blocks": 4, "outliers": 1, "wide": 0, "exact_a4": True, "extreme": False, "bias": True, "zeros": False}


@few
@given(layer=layers(), m=heights, n=widths)
@example(m=257, n=130, layer=WHOLE | {"segments": 1, "seed": 0})
@example(m=129, n=128, layer=WHOLE | {"segments": 3, "seed": 1, "wide": 1, "zeros": True})
def test_accumulators_and_outputs_are_the_references(emulated: Emulated, layer: dict[str, Any], m: int, n: int) -> None:
    rows, weight, packed = made(layer, m, n)
    expected = reference.accumulate(rows, weight)
    y = combined(expected, rows, weight, packed)
    if layer["segments"] == 1:
        assert torch.equal(y, reference.combine(expected, rows, weight))
    sums = torch.full((layer["blocks"], m, n), -1, dtype=torch.int32)
    assert torch.equal(emulated.multiply(rows, packed, sums=sums, seed=layer["seed"]), y)
    assert torch.equal(sums.permute(1, 2, 0), expected)
    # Without the accumulators another form of the kernel runs; with `spread`, another order of thread blocks.
    assert torch.equal(emulated.multiply(rows, packed, seed=layer["seed"] + 1), y)
    assert torch.equal(emulated.multiply(rows, packed, spread=True), y)
    assert torch.equal(emulated.multiply(rows, packed, torch.bfloat16), y.bfloat16())


@pytest.mark.parametrize("wide", [0, 1])
def test_the_largest_sums_are_exact(emulated: Emulated, wide: int) -> None:
    for value in (-128, 127) if wide else (-8, 7):
        packed = cuda_w4ax.pack_w4ax(
            torch.full((9, BLOCK), value, dtype=torch.int8), torch.ones(9, 1), outlier_blocks=wide
        )
        for x in (-127, 127):
            rows = QuantisedRows(torch.full((3, BLOCK), x, dtype=torch.int8), torch.ones(3, 1))
            assert (emulated.multiply(rows, packed) == BLOCK * x * value).all()


def test_outputs_that_are_not_numbers_stay_so(emulated: Emulated) -> None:
    packed = cuda_w4ax.pack_w4ax(drawn(1, 7, (3, BLOCK), 0), torch.ones(3, 1))
    for scale, dtype in ((torch.nan, torch.float32), (torch.nan, torch.bfloat16)):
        rows = QuantisedRows(torch.ones(2, BLOCK, dtype=torch.int8), torch.tensor([[scale], [1.0]]))
        y = emulated.multiply(rows, packed, dtype)
        assert y[0].isnan().all() and y[1].isfinite().all()


@few
@given(layer=layers(), m=st.sampled_from([40, 70, 129]), n=widths, data=st.data())
def test_the_bits_of_a_row_are_its_own(
    emulated: Emulated, layer: dict[str, Any], m: int, n: int, data: st.DataObject
) -> None:
    rows, _, packed = made(layer, m, n)
    whole = emulated.multiply(rows, packed)
    first = data.draw(st.integers(0, m - 1))
    end = data.draw(st.integers(first + 1, min(m, first + 5)))
    part = QuantisedRows(rows.values[first:end].contiguous(), rows.scales[first:end].contiguous())
    assert torch.equal(emulated.multiply(part, packed, spread=True), whole[first:end])


def test_weights_lie_as_the_registers_of_the_product_want_them() -> None:
    # By the PTX manual: register r of B of m16n8k64 in lane l holds rows 32 r + 8 (l % 4) ... + 7 of column l / 4.
    values = drawn(-8, 7, (256, 2 * BLOCK), 3)
    packed = cuda_w4ax.pack_w4ax(values, torch.ones(256, 2))
    words = packed.weights.view(torch.int32).view(2, 2, 16, 32, 4)  # [tile, chunk, 8 columns, lane, word]
    for tile, chunk, group, lane, word in [(0, 0, 0, 0, 0), (1, 1, 15, 31, 3), (1, 0, 3, 18, 2), (0, 1, 9, 5, 1)]:
        column = values[tile * 128 + group * 8 + lane // 4, chunk * BLOCK :]
        half, register = divmod(word, 2)
        first = 64 * half + 32 * register + 8 * (lane % 4)
        found = (words[tile, chunk, group, lane, word] >> torch.arange(0, 32, 4)) & 15
        assert found.tolist() == (column[first : first + 8] & 15).tolist()


@given(blocks=st.integers(1, 90), data=st.data())
def test_segments_cost_the_same_as_nearly_as_whole_blocks_can(blocks: int, data: st.DataObject) -> None:
    eight = data.draw(st.integers(0, blocks))
    wide = data.draw(st.sampled_from([0, eight]))
    segments = data.draw(st.integers(1, min(16, blocks)))
    found = cuts(blocks, wide, eight, segments)
    assert found[0] == 0 and found[-1] == blocks and len(found) == segments + 1
    assert all(first < end for first, end in itertools.pairwise(found))
    costs = [4 if block < wide else 2 if block < eight else 1 for block in range(blocks)]
    assert [pieces_before(at, wide, eight) for at in found] == [sum(costs[:at]) for at in found]
    if segments <= blocks // 8:
        parts = [sum(costs[first:end]) for first, end in itertools.pairwise(found)]
        assert max(parts) <= sum(costs) / segments + 4


def test_few_tiles_are_cut_until_every_multiprocessor_has_one() -> None:
    assert segments_for(4096, 32, 0, 3, 108) == 4  # 32 tiles of 35 pieces
    assert segments_for(128 * 108, 32, 0, 3, 108) == 1
    assert segments_for(1024, 86, 0, 9, 108) == 11
    assert segments_for(128, 4, 0, 0, 108) == 1  # too few pieces to cut


def test_no_rows_give_no_rows(emulated: Emulated) -> None:
    packed = cuda_w4ax.pack_w4ax(drawn(-8, 7, (5, BLOCK), 0), torch.ones(5, 1))
    rows = QuantisedRows(torch.empty(0, BLOCK, dtype=torch.int8), torch.empty(0, 1))
    assert emulated.multiply(rows, packed).shape == (0, 5)


def test_wrong_arguments_are_refused(emulated: Emulated) -> None:
    values, ones = torch.zeros(5, BLOCK, dtype=torch.int8), torch.ones(5, 1)
    with pytest.raises(ValueError, match="1 to 1 runs"):
        cuda_w4ax.pack_w4ax(values, ones, segments=2)
    packed = cuda_w4ax.pack_w4ax(values, ones)
    nibbles, scales, totals = torch.zeros(2, BLOCK).byte(), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32)
    multiply = emulated.library.multiply
    with pytest.raises(ValueError, match="rows are"):
        multiply(nibbles[:, :64], scales, totals, packed)
    with pytest.raises(ValueError, match="row_scales are"):
        multiply(nibbles, scales[:1], totals, packed)
    with pytest.raises(ValueError, match="row_totals are"):
        multiply(nibbles, scales, totals.long(), packed)
    with pytest.raises(ValueError, match="sums are"):
        multiply(nibbles, scales, totals, packed, sums=totals)
    with pytest.raises(TypeError, match="write float32 and bfloat16"):
        multiply(nibbles, scales, totals, packed, torch.float16)


def test_the_compiled_kernels_multiply_on_int4_units() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    pytest.importorskip("triton", reason="triton's wheel has the disassembler, and is not installed")
    command = [sys.executable, str(ROOT / "tools/check_int4_sass.py"), "80"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
