"""Linear layers with 4-bit weights on this GPU, against torch's products in BF16 and INT8 and the device's own limits.

    python benchmarks/w4ax_gpu.py [--quick] [--json FILE] [--plot FILE]

Contestants take turns, round by round, each from a graph, for one launch takes the host longer than the GPU needs for a
product of few rows; each has as many copies of its weight as do not fit in a cache. Quantising the input is part of
W4A8 and W4A4. W4A4 (the CUDA kernels, a tenth of the blocks in 8 bits) runs where there are INT4 units
and nvcc. Without a GPU it says so and ends.

* gpu_w4a8_vs_bf16_m16, gpu_w4a8_vs_bf16_m256: how much faster than torch's BF16; the worse shape.
* gpu_w4a4_vs_bf16_m16, gpu_w4a4_vs_bf16_m256: the same.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch

from weft.kernels import cuda_w4ax

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # (out, in)
ROWS, QUICK_ROWS = (1, 4, 16, 64, 256, 1024, 4096), (1, 16, 256)
ROUNDS, QUICK_ROUNDS = 15, 5
CACHE_BYTES = 256 * 2**20
SOURCE = Path(__file__).resolve().parent.parent / "csrc/cuda/w4ax.cu"
# Dense T(FL)OP/s by data sheet: BF16, INT8, INT4 (0: no such units).
PEAKS = {"A100": (312, 624, 1248), "H100": (989, 1979, 0), "H200": (989, 1979, 0)}


@dataclass(frozen=True)
class Measured:
    """Rates in TFLOP/s or TOP/s, round by round."""

    name: str
    shape: tuple[int, int]
    rows: int
    rates: list[float]

    @property
    def rate(self) -> common.Figure:
        return common.Figure.of(self.rates)


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return
    library = _library()
    notes = [torch.cuda.get_device_name(), *([] if library else ["no INT4 units or no nvcc: W4A4 was not measured"])]
    measured: list[Measured] = []
    for shape in SHAPES[:1] if arguments.quick else SHAPES:
        for rows in QUICK_ROWS if arguments.quick else ROWS:
            measured += _measure(shape, rows, library, QUICK_ROUNDS if arguments.quick else ROUNDS)
            common.write_json(arguments, _claims(measured), _rows(measured), [*notes, "not finished"])
    print(torch.cuda.get_device_name(), "\n")
    print(common.table(["", "rows", "T(FL)OP/s", "of its peak"], [_cells(one) for one in measured]), "\n")
    if arguments.plot is not None:
        _plot(arguments.plot, measured)
    common.report(arguments, _claims(measured), _rows(measured), notes)


def _rows(measured: list[Measured]) -> list[dict[str, Any]]:
    return [{"name": one.name, "shape": one.shape, "rows": one.rows, "rate": one.rate} for one in measured]


def _library() -> cuda_w4ax.Library | None:
    """The CUDA kernels, built for this GPU; None where it has no INT4 units, or nvcc is missing."""
    major, minor = torch.cuda.get_device_capability()
    compiler = shutil.which("nvcc")
    if major != 8 or compiler is None:
        return None
    path = Path(tempfile.mkdtemp()) / "_cuda.so"
    flags = [f"-arch=sm_{major}{minor}", "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(path)], check=True)
    return cuda_w4ax.Library(path)


def _measure(shape: tuple[int, int], rows: int, library: cuda_w4ax.Library | None, rounds: int) -> list[Measured]:
    copies = max(2, 2 * CACHE_BYTES // (shape[0] * shape[1]))
    contestants = {name: _recorded(run) for name, run in _contestants(shape, rows, library, copies).items()}
    for run in contestants.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    operations = 2.0 * rows * shape[0] * shape[1] * copies
    for _ in range(rounds):
        for name, run in contestants.items():
            taken[name].append(operations / _seconds(run) / 1e12)
    return [Measured(name, shape, rows, rates) for name, rates in taken.items()]


def _contestants(
    shape: tuple[int, int], rows: int, library: cuda_w4ax.Library | None, copies: int
) -> dict[str, Callable[[], None]]:
    """Each runs all of its copies."""
    from weft.kernels import triton_w4ax
    from weft.kernels.triton_rows import quantise_rows

    outputs, inputs = shape
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    values = torch.randint(-8, 8, shape, dtype=torch.int8, device="cuda")
    scales = torch.rand(outputs, inputs // 128, device="cuda").bfloat16().float()
    form = {"permutation": torch.randperm(inputs, device="cuda"), "hadamard": True}
    outliers = max(1, inputs // 128 // 10)
    floats = [values.bfloat16() for _ in range(copies)]
    packed = [triton_w4ax.pack_w4ax(values, scales, outlier_blocks=outliers, **form) for _ in range(copies)]

    def each(work: Callable[[int], Any]) -> Callable[[], None]:
        def run() -> None:
            for copy in range(copies):
                work(copy)

        return run

    found = {
        "torch BF16": each(lambda copy: x @ floats[copy].T),
        "W4A16": each(lambda copy: triton_w4ax.linear_a16(x, packed[copy])),
        "W4A8": each(lambda copy: triton_w4ax.linear(x, packed[copy])),
    }
    if rows > 16:  # torch's product of 8 bits wants more rows
        bytes_in, weights = x.to(torch.int8), [values.clone() for _ in range(copies)]
        found["torch INT8"] = each(lambda copy: torch._int_mm(bytes_in, weights[copy].T))
    if library is not None:
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        blocks = inputs // 128
        segments = cuda_w4ax.segments_for(outputs, blocks, 0, outliers, processors)
        four = [
            cuda_w4ax.pack_w4ax(values, scales, outlier_blocks=outliers, exact_a4=True, segments=segments, **form)
            for _ in range(copies)
        ]

        def multiply(copy: int) -> None:
            made = quantise_rows(x, four[copy].form, nibbles=True)
            library.multiply(made.values, made.scales, made.totals, four[copy], torch.bfloat16, spread=rows <= 64)

        found["W4A4"] = each(multiply)
    return found


def _recorded(run: Callable[[], None]) -> Callable[[], None]:
    """What replays it."""
    from weft.devices.cuda_streams import TorchGpu

    torch.cuda.synchronize()  # what it reads was made on another stream
    return TorchGpu(torch.cuda.current_device()).stream().capture(run)


def _seconds(run: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _peak(name: str) -> float:
    """T(FL)OP/s of the units that a contestant uses, by data sheet; 0 where unknown."""
    device = torch.cuda.get_device_name()
    peaks = next((peaks for key, peaks in PEAKS.items() if key in device), (0, 0, 0))
    return float(peaks[{"W4A8": 1, "torch INT8": 1, "W4A4": 2}.get(name, 0)])


def _cells(one: Measured) -> list[str]:
    peak = _peak(one.name)
    share = f"{one.rate.median / peak:.0%}" if peak else "-"
    return [f"{one.name}, {one.shape[1]} -> {one.shape[0]}", str(one.rows), str(one.rate), share]


def _claims(measured: list[Measured]) -> dict[str, float]:
    plain = {(one.shape, one.rows): one.rates for one in measured if one.name == "torch BF16"}
    claims: dict[str, float] = {}
    for one in measured:
        if one.name in ("W4A8", "W4A4") and one.rows in (16, 256):
            pairs = zip(one.rates, plain[one.shape, one.rows], strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            name = f"gpu_{one.name.lower()}_vs_bf16_m{one.rows}"
            claims[name] = min(ratio, claims.get(name, ratio))
    return claims


def _plot(path: Path, measured: list[Measured]) -> None:
    from matplotlib.figure import Figure as Picture

    picture = Picture(layout="constrained")
    axes = picture.subplots()
    for name in dict.fromkeys(one.name for one in measured):
        points = [one for one in measured if one.name == name and one.shape == SHAPES[0]]
        axes.plot([one.rows for one in points], [one.rate.median for one in points], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="T(FL)OP/s", title=f"{SHAPES[0][1]} -> {SHAPES[0][0]}")
    axes.legend()
    picture.savefig(path)


if __name__ == "__main__":
    main()
