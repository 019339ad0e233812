"""Products: laws that hold for every shape, and a tile count by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.sim.gemm import BF16, Operands, gemm_bytes, gemm_seconds
from weft.sim.hardware import GemmFit, Part, find_gpu, gpu_names

SIZES = st.integers(1, 20_000)
GPUS = st.sampled_from(gpu_names())
SHARES = st.floats(0.02, 1.0)
OPERANDS = st.sampled_from([Operands(), Operands(8, 8), Operands(16, 4.25), Operands(4.25, 4.25)])
# A GPU of ten SMs of 1 Gop/s and a kernel with one tile, that waits for nothing.
PLAIN = GemmFit(0.0, 1.0, 0.0, 0.0, 1.0, 60.0, 0.0, ((100, 100),))
TEN = Part(10, 1e9, 1e30)


def seconds(gpu: str, m: int, n: int, k: int, operands: Operands = BF16, share: float = 1.0) -> float:
    found = find_gpu(gpu)
    return gemm_seconds(found.gemm, found.part(share), m, n, k, operands).item()


@settings(deadline=None)
@given(GPUS, SIZES, SIZES, SIZES, OPERANDS, SHARES)
def test_never_faster_than_the_peaks(gpu: str, m: int, n: int, k: int, operands: Operands, share: float) -> None:
    part = find_gpu(gpu).part(share)
    taken = seconds(gpu, m, n, k, operands, share)
    assert taken >= 2 * m * n * k / part.flops
    assert taken >= gemm_bytes(m, n, k, operands) / part.bandwidth


@settings(deadline=None)
@given(GPUS, SIZES, SIZES, SIZES, SIZES)
def test_more_rows_never_take_less(gpu: str, m: int, more: int, n: int, k: int) -> None:
    assert seconds(gpu, m + more, n, k) >= seconds(gpu, m, n, k)


@settings(deadline=None)
@given(GPUS, SIZES, SIZES, SIZES, SHARES, SHARES)
def test_a_greater_share_never_takes_longer(gpu: str, m: int, n: int, k: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert seconds(gpu, m, n, k, share=high) <= seconds(gpu, m, n, k, share=low) * (1 + 1e-9)


@settings(deadline=None)
@given(GPUS, SIZES, st.integers(1, 2000), SIZES, st.sampled_from([2, 4, 8]))
def test_a_part_of_the_columns_takes_at_least_its_part(gpu: str, m: int, n: int, k: int, ranks: int) -> None:
    assert seconds(gpu, m, n, k) >= seconds(gpu, m, n * ranks, k) / ranks * (1 - 1e-9)


@pytest.mark.parametrize(("m", "n", "waves"), [(1, 1, 1), (100, 1000, 1), (101, 1000, 2), (1000, 1000, 10)])
def test_tiles_come_in_waves(m: int, n: int, waves: int) -> None:
    k = 64
    expected = waves * 2 * 100 * 100 * k / 1e9
    assert gemm_seconds(PLAIN, TEN, m, n, k).item() == pytest.approx(expected, rel=1e-6)


def test_a_long_product_of_few_tiles_is_split() -> None:
    whole = gemm_seconds(PLAIN, TEN, 100, 100, 6400).item()
    assert whole == pytest.approx(2 * 100 * 100 * math.ceil(6400 / 8 / 64) * 64 / 1e9, rel=1e-6)


def test_narrow_weights_are_read_faster() -> None:
    m, n, k = 1, 8192, 8192
    wide, narrow = seconds("h100", m, n, k), seconds("h100", m, n, k, Operands(16, 4.25))
    assert wide / 4 < narrow < wide / 2


def test_twice_the_arithmetic_takes_half_the_time_where_it_counts() -> None:
    gpu = find_gpu("a100-80")
    fit = replace(gpu.gemm, launch=0.0)
    shape = 16384, 16384, 16384
    one = gemm_seconds(fit, gpu.part(), *shape).item()
    assert gemm_seconds(fit, gpu.part(arithmetic="int8"), *shape).item() == pytest.approx(one / 2, rel=0.1)
