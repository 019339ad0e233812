"""Linear layers with 4-bit weights and 8-bit activations on this CPU, against the machine's own limits.

    python benchmarks/w4ax_cpu.py [--quick] [--json FILE] [--plot FILE] [--level LEVEL]

Few rows are bound by memory: compared is the rate at which packed weights are read with a plain read of as much memory,
on the same threads, huge pages alike. Many rows are bound by arithmetic: compared is the rate of products with 8-bit
products that stay in registers (VNNI at level avx512). Preparing and quantising the input is part of the time, and all
layers are one program (csrc/program.h), as in a step of a model: no Python is in between. The limits are measured
before and after every layer, and a ratio is of one round.

* gemv_of_bandwidth: one row, the weights of 1.1B Llama's layers one after another.
* gemm_m64_of_vnni_peak: 64 rows; the worse of 2048 x 5632 and 4096 x 4096.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common
import torch

from weft import _native
from weft.core.plan import Slice
from weft.kernels import resolve
from weft.kernels.cpu import CpuKernels
from weft.kernels.pages import huge_bytes
from weft.kernels.quantised import ROW_BYTES, W4AxLinear
from weft.kernels.w4ax_weights import BLOCK

# (out, in): a decoder block of the 1.1B, and the shapes of the claim. No weight is still in a cache at its next turn:
# COPIES of each take turns.
LLAMA = ((2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632))
DOWN = 5632  # channels of the input that comes in the right order
SQUARE = ((2048, 5632), (4096, 4096))
COPIES = 8
FEW, MANY = (1, 2, 4, 8), (16, 64, 128, 512)
ROUNDS, QUICK_ROUNDS = 11, 5
READ_BYTES = 256 * 2**20
PROBE_STEPS = 200_000
BFLOAT16 = 1  # as the kernels number types


@dataclass(frozen=True)
class Measured:
    """One number of rows on some shapes: our rate and the limit's, round by round; bytes or operations a second."""

    name: str
    rows: int
    unit: str
    ours: list[float]
    limit: list[float]

    @property
    def ratio(self) -> common.Figure:
        return common.Figure.of([one / most for one, most in zip(self.ours, self.limit, strict=True)])


class Step:
    """Layers one after the other, each on the same random rows, as one call."""

    def __init__(self, kernels: CpuKernels, layers: list[W4AxLinear], rows: int) -> None:
        widest, longest = (max(getattr(layer, name) for layer in layers) for name in ("inputs", "outputs"))
        # Places of the input, the quantised input and the output: bytes per row.
        x, quantised = 0, widest * torch.bfloat16.itemsize
        y = quantised + widest // BLOCK * ROW_BYTES
        self._arena = _native.Memory(rows * (y + longest * torch.bfloat16.itemsize), kernels.native)
        values = torch.randn(rows * widest).bfloat16()
        ctypes.memmove(self._arena.address, values.data_ptr(), values.nbytes)
        self._backend, self._layers = kernels.native, layers
        self._slices = [Slice(0, 0, (0,) * rows, tuple(range(rows)))]
        self._tables = _native.Tables()
        self._program = _native.Program(self._arena.address, rows, self._arena.address, 0)
        for layer in layers:
            self._program.quantise(layer.native, 0, x, BFLOAT16, quantised)
            self._program.multiply(layer.native, 0, quantised, y, BFLOAT16)

    def __call__(self) -> None:
        self._program.run(self._backend, self._slices, self._tables, 1, [], 0, 2 * len(self._layers))


def main() -> None:
    arguments = _arguments()
    level, _ = resolve(arguments.level)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    kernels = CpuKernels(level, cores)
    watch = common.LoadWatch()
    memory = _native.Memory(READ_BYTES, kernels.native)
    layers = {shape: [_layer(kernels, shape) for _ in range(COPIES)] for shape in {*LLAMA, *SQUARE}}
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    measured = [_few(kernels, layers, rows, memory, rounds) for rows in FEW]
    for shape in SQUARE:
        measured += [_many(kernels, layers[shape], rows, rounds) for rows in MANY]
    print(f"{level} kernels, {len(cores)} threads\n")
    print(common.table(["", "weft", "limit", "of the limit"], [_cells(one) for one in measured]))
    print()
    if arguments.plot is not None:
        _plot(arguments, measured)
    note = common.load_note(watch)
    packed = [layer for copies in layers.values() for layer in copies]
    notes = [_pages(packed), *([note] if note else [])]
    common.report(arguments, _claims(measured), [_row(one) for one in measured], notes)


def _arguments() -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--level", default="auto", choices=("auto", "avx512", "avx2", "portable"))
    return parser.parse_args()


def _layer(kernels: CpuKernels, shape: tuple[int, int]) -> W4AxLinear:
    values = torch.randint(-8, 8, shape, dtype=torch.int8)
    scales = torch.rand(shape[0], shape[1] // BLOCK, dtype=torch.bfloat16)
    # As in a checkpoint: the order of the channels of `down` is hidden in the weights before it.
    order = None if shape[1] == DOWN else torch.randperm(shape[1])
    return kernels.pack_w4ax(values, scales, permutation=order, outlier_blocks=1, hadamard=True)


def _few(
    kernels: CpuKernels,
    layers: dict[tuple[int, int], list[W4AxLinear]],
    rows: int,
    memory: _native.Memory,
    rounds: int,
) -> Measured:
    """All layers of COPIES decoder blocks, one after another."""
    order = [layers[shape][copy] for copy in range(COPIES) for shape in LLAMA]
    work = Step(kernels, order, rows)

    def limit() -> float:
        return READ_BYTES / _seconds(lambda: kernels.native.probe_read(memory))

    size = float(sum(layer.bytes for layer in order))
    return _measure("decoder block", rows, "GB/s", size, work, limit, rounds)


def _many(kernels: CpuKernels, copies: list[W4AxLinear], rows: int, rounds: int) -> Measured:
    inputs, outputs = copies[0].inputs, copies[0].outputs
    turns = max(1, len(copies) * 64 // max(rows, 64))
    work = Step(kernels, copies[:turns], rows)

    def limit() -> float:
        start = time.perf_counter()
        done = kernels.native.probe_integers(PROBE_STEPS)
        return done / (time.perf_counter() - start)

    operations = 2.0 * rows * inputs * outputs * turns
    return _measure(f"{inputs} -> {outputs}", rows, "GOP/s", operations, work, limit, rounds)


def _measure(
    name: str, rows: int, unit: str, size: float, work: Callable[[], None], limit: Callable[[], float], rounds: int
) -> Measured:
    work()
    ours, limits = [], []
    for _ in range(rounds):
        before = limit()
        ours.append(size / _seconds(work))
        limits.append(statistics.mean((before, limit())))
    return Measured(name, rows, unit, ours, limits)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _claims(measured: list[Measured]) -> dict[str, float]:
    gemv = next(one for one in measured if one.rows == 1)
    return {
        "gemv_of_bandwidth": gemv.ratio.median,
        "gemm_m64_of_vnni_peak": min(one.ratio.median for one in measured if one.rows == 64),
    }


def _row(one: Measured) -> dict[str, Any]:
    figures = {key: common.Figure.of([rate / 1e9 for rate in rates]) for key, rates in _rates(one)}
    return {"name": one.name, "rows": one.rows, "unit": one.unit, **figures, "of_limit": one.ratio}


def _rates(one: Measured) -> tuple[tuple[str, list[float]], ...]:
    return ("weft", one.ours), ("limit", one.limit)


def _cells(one: Measured) -> list[str]:
    row = _row(one)
    return [f"{one.name}, {one.rows} rows ({one.unit})", *(str(row[key]) for key in ("weft", "limit", "of_limit"))]


def _pages(layers: list[W4AxLinear]) -> str:
    total = sum(layer.bytes for layer in layers)
    huge = huge_bytes((layer.native.address, layer.bytes) for layer in layers)
    return f"{'unknown' if huge is None else f'{huge / total:.0%}'} of {total / 2**20:.0f} MiB of weights on huge pages"


def _plot(arguments: argparse.Namespace, measured: list[Measured]) -> None:
    from matplotlib.figure import Figure as Picture

    picture = Picture(layout="constrained")
    axes = picture.subplots()
    for name in dict.fromkeys(one.name for one in measured):
        points = [one for one in measured if one.name == name]
        label = f"{name}: of {'bandwidth' if points[0].unit == 'GB/s' else 'integer peak'}"
        axes.plot([one.rows for one in points], [one.ratio.median for one in points], "o-", label=label)
    axes.set(xscale="log", xlabel="rows", ylabel="share of the limit", ylim=(0, 1.05))
    axes.legend()
    picture.savefig(arguments.plot)


if __name__ == "__main__":
    main()
