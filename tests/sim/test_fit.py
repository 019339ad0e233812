"""Fitting: coefficients come back from times made with them, and the shipped ones describe what they have not seen."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from weft.errors import ConfigError
from weft.sim import fit, profiles
from weft.sim.gemm import gemm_seconds
from weft.sim.hardware import Gpu, find_gpu, find_link
from weft.sim.profiles import Gemms, Reduces, kept_back

DATA = Path(__file__).parents[3] / "shared" / "data" / "gpu_profiles"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published profiles are not here")
TOOL = Path(__file__).parents[2] / "tools" / "fit_gpu.py"
RANDOM = np.random.default_rng(7)


def shapes(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    m, n, k = (2.0 ** RANDOM.uniform(low, 14, count) for low in (0, 7, 7))
    return np.round(m), np.round(n), np.round(k)


def test_a_line_is_found_whatever_the_outliers() -> None:
    x = np.linspace(1, 100, 50)
    measured = 2.0 + 3.0 * x
    measured[5::10] *= 2
    found = fit.fit_positive(lambda now: now[0] + now[1] * x, measured, (1.0, 1.0))
    assert found == pytest.approx([2.0, 3.0], rel=0.05)


def test_coefficients_stay_below_their_limits() -> None:
    x = np.linspace(1, 100, 50)
    found = fit.fit_positive(lambda now: now[0] + now[1] * x, 2.0 + 3.0 * x, (1.0, 1.0), (10.0, 2.0))
    assert found[1] == pytest.approx(2.0)


def test_products_are_described_again_by_a_fit_on_their_own_times() -> None:
    gpu = find_gpu("h100")
    m, n, k = shapes(300)
    times = Gemms(m, n, k, gemm_seconds(gpu.gemm, gpu.part(), m, n, k))
    found = fit.fit_gemm(gpu.part(), times, gpu.gemm.tiles)
    others = shapes(300)
    expected = gemm_seconds(gpu.gemm, gpu.part(), *others)
    assert np.abs(gemm_seconds(found, gpu.part(), *others) / expected - 1).mean() < 0.02


def on_parts(gpu: Gpu, most: float) -> dict[float, Gemms]:
    """Products of up to `most` rows, as they take on parts of the GPU."""
    found = {}
    for share in (0.125, 0.25, 0.5, 0.75):
        m, n, k = shapes(40)
        m = np.minimum(m, most)
        found[share] = Gemms(m, n, k, gemm_seconds(gpu.gemm, gpu.part(share), m, n, k))
    return found


@pytest.mark.parametrize("point", [0.2, 0.37, 0.9])
def test_where_memory_saturates_is_found_from_products_on_parts_of_the_device(point: float) -> None:
    gpu = find_gpu("h100")
    times = on_parts(replace(gpu, saturation=point), 64)
    assert fit.fit_saturation(gpu, times, "bf16") == pytest.approx(point, abs=0.03)


def test_products_that_no_memory_bounds_leave_saturation_as_it_was() -> None:
    gpu = replace(find_gpu("h100"), bandwidth=1e18, saturation=0.37)
    assert fit.fit_saturation(gpu, on_parts(gpu, 1e9), "bf16") == 0.37


def test_collectives_are_described_again_with_their_limit() -> None:
    link = find_link("nvlink4", "sglang")
    size = np.tile(2.0 ** np.arange(8, 30), 3)
    times = Reduces(np.repeat([2.0, 4.0, 8.0], 22), size, np.ones(66))
    times = replace(times, seconds=fit.reduce_predictions(link, times))
    found = fit.fit_collective(link, times, True, (2.0**20, link.collective.limit, 2.0**28))
    again = fit.reduce_predictions(replace(link, collective=found), times)
    assert found.limit == link.collective.limit
    assert np.abs(again / times.seconds - 1).mean() < 0.02


def test_what_is_kept_back_depends_on_the_shape_alone() -> None:
    n, k = RANDOM.integers(1, 10_000, (2, 5000))
    kept = kept_back(n, k)
    assert 0.17 < kept.mean() < 0.23
    assert (kept_back(n[::-1], k[::-1])[::-1] == kept).all()


def test_a_file_of_times_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    with path.open("w") as out:
        csv.writer(out).writerows([["m", "n", "k", "dtype", "seconds"], [1, 2, 3, "bf16", 1e-6]])
    found = profiles.read_gemms(path)
    assert (found.m[0], found.n[0], found.k[0], found.seconds[0]) == (1, 2, 3, 1e-6)
    assert profiles.read_shares(path, "bf16") == {}
    with pytest.raises(ConfigError, match="has no rows of int8; there are bf16"):
        profiles.read_gemms(path, "int8")
    path.write_text("m,n,seconds\n1,2,3\n")
    with pytest.raises(ConfigError, match="has no column k; it has m, n, seconds"):
        profiles.read_gemms(path)
    path.write_text("m,n,k,seconds\n1,2,x,3\n")
    with pytest.raises(ConfigError, match="could not convert string to float: 'x'"):
        profiles.read_gemms(path)
    path.write_text("m,n,k,seconds\n1,2,3,0\n1,2,3,-1\n")
    with pytest.raises(ConfigError, match="seconds is -1 in a row; it must be more than 0"):
        profiles.read_gemms(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        profiles.read_gemms(tmp_path / "none.csv")


def test_what_weft_bench_kernels_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    names = ("operation", "name", "precision", "m", "n", "k", "share", "shares", "seconds")
    rows = [
        ("gemm", "qkv", "bf16", 1, 2, 3, 1, 2, 9e-6),
        ("gemm", "qkv", "bf16", 1, 2, 3, 2, 2, 1e-6),
        ("gemm", "o", "w4a8", 4, 5, 6, 2, 2, 2e-6),
        ("norm", "norm", "bf16", 7, 8, 0, 2, 2, 3e-6),
    ]
    with path.open("w") as out:
        csv.writer(out).writerows([names, *rows])
    found = profiles.read_gemms(path, "bf16")
    assert (found.m.tolist(), found.seconds.tolist()) == ([1], [1e-6]), "products on the whole device"
    shares = profiles.read_shares(path, "bf16")
    assert {share: times.seconds.tolist() for share, times in shares.items()} == {0.5: [9e-6]}
    with pytest.raises(ConfigError, match="has no rows of int8; there are bf16, w4a8"):
        profiles.read_gemms(path, "int8")


def test_times_of_ones_own_become_a_gpu(tmp_path: Path) -> None:
    """A device of 300 TFLOP/s, where an H100 is taken for more; and a file that is not there is named."""
    times, made = tmp_path / "times.csv", tmp_path / "mine.json"
    shapes = [(m, n, k) for m in (1, 16, 256, 2048, 8192) for n, k in ((4096, 4096), (14336, 4096), (4096, 14336))]
    rows = [(m, n, k, "bf16", max(2 * m * n * k / 3e14, 2 * (m * k + n * k + m * n) / 2.6e12)) for m, n, k in shapes]
    with times.open("w") as out:
        csv.writer(out).writerows([("m", "n", "k", "dtype", "seconds"), *rows])
    command = [sys.executable, str(TOOL), "--gpu", "h100", "--out", str(made), "--csv"]
    subprocess.run([*command, str(times)], check=True, capture_output=True)
    mine, taken = find_gpu(str(made)), find_gpu("h100")
    ours, theirs = (gemm_seconds(gpu.gemm, gpu.part(1.0, 0.0), 8192, 14336, 4096).item() for gpu in (mine, taken))
    assert ours == pytest.approx(2 * 8192 * 14336 * 4096 / 3e14, rel=0.1) and theirs < 0.8 * ours
    (tmp_path / "one.csv").write_text("m,n,k,seconds\n16,4096,4096,1e-5\n")
    for name, words in (("none.csv", "none.csv cannot be read"), ("one.csv", "one.csv has 1 rows of bf16; 7 coeff")):
        failed = subprocess.run([*command, str(tmp_path / name)], check=False, capture_output=True, text=True)
        assert failed.returncode == 2 and words in failed.stderr and "Traceback" not in failed.stderr


@needs_data
@pytest.mark.parametrize(("name", "prefix"), [("a100-80", "a100_sxm"), ("h100", "h100_sxm"), ("h200", "h200_sxm")])
def test_shipped_coefficients_describe_shapes_that_were_kept_back(name: str, prefix: str) -> None:
    gpu = find_gpu(name)
    times = profiles.read_gemms(DATA / "aiconfigurator" / f"{prefix}_gemm_bf16.csv.gz")
    rows = np.flatnonzero(times.kept_back)[::5]
    some = times.where(rows)
    errors = np.abs(gemm_seconds(gpu.gemm, gpu.part(), some.m, some.n, some.k) / some.seconds - 1)
    assert errors.mean() < 0.10 and np.median(errors) < 0.07
