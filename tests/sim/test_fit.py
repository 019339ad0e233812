"""Fitting: coefficients come back from times made with them, and the shipped ones describe what they have not seen."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weft.errors import ConfigError
from weft.sim import fit, profiles
from weft.sim.gemm import gemm_seconds
from weft.sim.hardware import Gpu, find_gpu, find_link
from weft.sim.phase_times import read_phase_times
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


def phase_rows(gpu: Gpu, noise: float = 0.0, units: int = 16) -> list[dict[str, Any]]:
    """What benchmarks/gpu_phases.py would write of a GPU that is as the cost model says: attention moves 1 GB, and
    takes 20 us more on any part."""
    chance = np.random.default_rng(3)

    def seconds(share: float, rival: float = 0.0) -> float:
        return float((20e-6 + 1e9 / gpu.part(share, rival).bandwidth) * np.exp(chance.normal(0.0, noise)))

    same = {"what": "attention", "of": units, "divided": True}
    rows = [
        {"part": "curves", "share": share, "seconds": seconds(share / units), "GB/s": 1.0, **same}
        for share in range(1, units + 1)
    ]
    for share, rival in ((13, 3), (10, 6), (8, 8), (6, 10), (3, 13), (16, 16)):
        times = seconds(share / units, rival / units) / seconds(share / units)
        rows.append({"part": "beside", "share": share, "rival": rival, "times": times, **same})
    product = {"what": "product", "share": 3, "of": units, "divided": True}
    return [
        {"part": "parts", "what": "move", "seconds": 1e-6},
        {"part": "curves", "seconds": 1.0, "TFLOP/s": 1.0, **product},
        {"part": "beside", "rival": 13, "times": 1.01, **product},
        *rows,
        {"part": "serving", "what": "auto", "goodput": 1.0},
    ]


def fitted_on(rows: Sequence[dict[str, Any]], folder: Path, taken: str = "h200") -> Gpu:
    file, made = folder / "phases.json", folder / "mine.json"
    file.write_text(json.dumps({"claims": {}, "rows": rows}))
    command = [sys.executable, str(TOOL), "--gpu", taken, "--phases", str(file), "--out", str(made)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(done.stderr)
    return find_gpu(str(made))


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize(("saturation", "contention"), [(0.3, 0.7), (0.62, 0.0), (1.0, 0.2), (0.5, 0.2)])
def test_what_lanes_cost_each_other_is_found_from_times_on_parts(
    tmp_path: Path, saturation: float, contention: float, noise: float
) -> None:
    """And the cost model goes by it."""
    law = replace(find_gpu("h200"), saturation=saturation, contention=contention)
    found = fitted_on(phase_rows(law, noise), tmp_path)
    assert found.saturation == pytest.approx(saturation, abs=0.005 + 4 * noise)
    assert found.contention == pytest.approx(contention, abs=0.005 + 4 * noise)
    for share, rival in ((0.2, 0.8), (0.5, 0.5), (1.0, 1.0)):
        assert found.part(share, rival).bandwidth == pytest.approx(
            law.part(share, rival).bandwidth, rel=0.01 + 4 * noise
        )
    assert found.note.endswith("saturation and contention fitted on phases.json")
    assert replace(found, saturation=0.5, contention=0.2, note="") == replace(find_gpu("h200"), note="")


def test_a_gpu_that_saturates_below_every_part_that_was_measured_keeps_what_fits_and_is_near(tmp_path: Path) -> None:
    rows = phase_rows(replace(find_gpu("h200"), saturation=0.1))
    assert fitted_on([row for row in rows if row.get("share", 16) >= 4], tmp_path).saturation == 0.25


def changed(rows: Sequence[dict[str, Any]], part: str, place: int, **changes: Any) -> list[dict[str, Any]]:
    return [row | changes if (row["part"], row.get("share")) == (part, place) else row for row in rows]


def test_times_that_cannot_tell_what_lanes_cost_are_refused(tmp_path: Path) -> None:
    rows = phase_rows(find_gpu("h200"))
    few = [row for row in rows if row["part"] != "curves" or row["share"] in (1, 8, 16)]
    (quick,) = [row["seconds"] for row in rows if (row["part"], row.get("share")) == ("curves", 8)]
    for wrong, words in (
        (few, "times on 3 different parts of the device; saturation is fitted on at least 4"),
        (
            [row for row in rows if row["part"] != "beside"],
            "on 0 different parts of the device; contention is fitted on",
        ),
        (
            changed(rows, "curves", 12, seconds=1.3 * quick),
            "s on 0.75 of the device, and .* more SMs cannot take longer",
        ),
        (changed(rows, "beside", 8, times=0.7), "takes 0.7 times as long beside another lane as alone"),
        (changed(rows, "curves", 4, divided=False), "the SMs of this GPU were not divided"),
        (changed(rows, "curves", 4, seconds=None), "is no file of benchmarks/gpu_phases.py"),
        (changed(rows, "curves", 4, share=17), "a part of 17 of 16 units"),
    ):
        with pytest.raises(ConfigError, match=words):
            fitted_on(wrong, tmp_path)
    with pytest.raises(ConfigError, match=r"none\.json cannot be read"):
        read_phase_times(tmp_path / "none.json")


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
