"""The linear layers of a 1.1B Llama on this CPU: against the machine's own limits, and against torch.

    python benchmarks/kernels_cpu.py [--quick] [--json FILE] [--plot FILE] [--level LEVEL] [--dtype DTYPE]

Few rows are bound by memory: compared is the rate at which weights are read with a plain read of as much memory, on
the same threads, huge pages alike. Many rows are bound by arithmetic: compared is the rate of products with products
that stay in registers. Limits, weft and torch take turns, round by round, and every ratio is of one round.

* linear_m1_of_bandwidth, linear_m512_of_peak: of the limit, all layers of a decoder block and the head together.
* linear_m1_vs_torch, linear_m16_vs_torch, linear_m512_vs_torch: times as fast as torch.nn.functional.linear.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common
import torch

from weft import _native
from weft.kernels import resolve
from weft.kernels.cpu import CpuKernels
from weft.kernels.pages import huge_bytes

# (out, in) of the layers; the block is repeated so that no weight is still in a cache when its turn comes again.
BLOCK = ((2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632))
HEAD = (32000, 2048)
BLOCKS = 3
ROWS = (1, 4, 8, 16, 64, 512)
ROUNDS, QUICK_ROUNDS = 11, 5
READ_BYTES = 512 * 2**20
PROBE_STEPS = 400_000


@dataclass(frozen=True)
class Layer:
    """One weight as both contestants want it."""

    plain: torch.Tensor
    packed: Any


def main() -> None:
    arguments = _arguments()
    level, _ = resolve(arguments.level)
    dtype = getattr(torch, arguments.dtype)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    torch.set_num_threads(len(cores))
    kernels = CpuKernels(level, cores)
    watch = common.LoadWatch()
    layers = _layers(kernels, dtype)
    memory = _native.Memory(READ_BYTES, kernels.native)
    for rows in ROWS:
        _one_pass(kernels, layers, _inputs(rows, dtype))
    rounds = [_round(kernels, layers, memory, dtype) for _ in range(QUICK_ROUNDS if arguments.quick else ROUNDS)]
    print(f"{level} kernels, {arguments.dtype}, {len(cores)} threads\n")
    rows = _rows(rounds)
    print(common.table(["", "weft", "torch", "limit", "of the limit", "vs torch"], [_cells(row) for row in rows]))
    print()
    if arguments.plot is not None:
        _plot(arguments, rows)
    claims = {f"linear_m{row['rows']}_of_{row['bound']}": row["of_limit"].median for row in rows if row["claim"]}
    claims |= {f"linear_m{row['rows']}_vs_torch": row["vs_torch"].median for row in rows if row["rows"] in (1, 16, 512)}
    note = common.load_note(watch)
    common.report(arguments, claims, rows, [_pages(layers), *([note] if note else [])])


def _arguments() -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--level", default="auto", choices=("auto", "avx512", "avx2", "portable"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    return parser.parse_args()


def _layers(kernels: CpuKernels, dtype: torch.dtype) -> list[Layer]:
    made = []
    for shape in (*(BLOCK * BLOCKS), HEAD):
        weight = (torch.randn(shape) * 0.02).to(dtype)
        made.append(Layer(weight, kernels.pack_linear(weight)))
    return made


def _inputs(rows: int, dtype: torch.dtype) -> dict[int, torch.Tensor]:
    return {size: torch.randn(rows, size).to(dtype) for size in {shape[1] for shape in (*BLOCK, HEAD)}}


def _one_pass(kernels: CpuKernels, layers: list[Layer], x: dict[int, torch.Tensor]) -> tuple[float, float]:
    """Seconds of weft and of torch for all layers once."""

    def weft() -> None:
        for layer in layers:
            kernels.linear(x[layer.plain.shape[1]], layer.packed)

    def baseline() -> None:
        for layer in layers:
            torch.nn.functional.linear(x[layer.plain.shape[1]], layer.plain)

    return _seconds(weft), _seconds(baseline)


def _round(
    kernels: CpuKernels, layers: list[Layer], memory: _native.Memory, dtype: torch.dtype
) -> dict[str, dict[int, float]]:
    """Rates by number of rows: bytes/s of weights or flop/s, whichever bounds them."""
    found: dict[str, dict[int, float]] = {"weft": {}, "torch": {}, "limit": {}}
    elements = sum(layer.plain.numel() for layer in layers)
    for rows in ROWS:
        if _bound(rows) == "bandwidth":
            work = float(sum(layer.packed.bytes for layer in layers))
            found["limit"][rows] = READ_BYTES / _seconds(lambda: kernels.native.probe_read(memory))
        else:
            work = 2.0 * rows * elements
            found["limit"][rows] = _peak(kernels, dtype)
        ours, theirs = _one_pass(kernels, layers, _inputs(rows, dtype))
        found["weft"][rows], found["torch"][rows] = work / ours, work / theirs
    return found


def _bound(rows: int) -> str:
    """Sixteen rows need about as long to compute as their weights to arrive."""
    return "bandwidth" if rows < 16 else "peak"


def _peak(kernels: CpuKernels, dtype: torch.dtype) -> float:
    start = time.perf_counter()
    done = kernels.native.probe_multiply(int(dtype is torch.bfloat16), PROBE_STEPS)
    return done / (time.perf_counter() - start)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _rows(rounds: list[dict[str, dict[int, float]]]) -> list[dict[str, Any]]:
    found = []
    for rows in ROWS:
        rate = {who: common.Figure.of([one[who][rows] / 1e9 for one in rounds]) for who in ("weft", "torch", "limit")}
        found.append(
            {
                "rows": rows,
                "bound": _bound(rows),
                "unit": "GB/s" if _bound(rows) == "bandwidth" else "GFLOP/s",
                **rate,
                "of_limit": common.Figure.of([one["weft"][rows] / one["limit"][rows] for one in rounds]),
                "vs_torch": common.Figure.of([one["weft"][rows] / one["torch"][rows] for one in rounds]),
                "claim": rows in (1, 512),
            }
        )
    return found


def _cells(row: dict[str, Any]) -> list[str]:
    name = f"{row['rows']} rows ({row['unit']})"
    return [name, *(str(row[key]) for key in ("weft", "torch", "limit", "of_limit", "vs_torch"))]


def _pages(layers: list[Layer]) -> str:
    total = sum(layer.packed.bytes for layer in layers)
    huge = huge_bytes((layer.packed.native.address, layer.packed.bytes) for layer in layers)
    return f"{'unknown' if huge is None else f'{huge / total:.0%}'} of {total / 2**20:.0f} MiB of weights on huge pages"


def _plot(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure as Picture

    picture = Picture(layout="constrained")
    axes = picture.subplots()
    axes.plot([row["rows"] for row in rows], [row["vs_torch"].median for row in rows], "o-")
    axes.axhline(1.0, linestyle=":")
    axes.set(xscale="log", xlabel="rows", ylabel="times as fast as torch")
    picture.savefig(arguments.plot)


if __name__ == "__main__":
    main()
