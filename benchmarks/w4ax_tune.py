"""Which tiles the products with 4-bit weights should have on this GPU: those in use, beside others.

    python benchmarks/w4ax_tune.py [--quick] [--json FILE] [--plot FILE] [--minutes 8]
                                   [--shapes 28672x4096 ...] [--rows 16 64 ...]

The tiles in use are data (W4A8 and W4A16 in src/weft/kernels/triton_tiles.py), chosen by architecture, rows and
outputs; nothing is tuned when weft starts. This measures every candidate on the shapes of the 8B model of gpu.py, from
a graph of as many products as have weights that no cache holds, and prints the best for each shape and number of rows,
from which the tables are written. A candidate that this GPU refuses, for its registers or its shared memory, is left
out. Rows are written as they come, so a run that is killed leaves what it has. Without a GPU it says so and ends;
TRITON_INTERPRET=1 runs it on a tiny shape, to show that it works and nothing else.

* w4a8_tile_of_best, w4a16_tile_of_best: the best candidate's time by that of the tile in use; the worst row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import common
import torch

from weft.comet.packing import BLOCK
from weft.devices.cuda_streams import Gpu, Interpreted, open_gpu
from weft.errors import DeviceError
from weft.kernels import triton_w4ax
from weft.kernels.triton_rows import quantise_rows
from weft.kernels.triton_tiles import ANY, W4A8, W4A16, ProductTile, architecture

FORMS = {"W4A8": W4A8, "W4A16": W4A16}


@dataclass(frozen=True)
class Sizes:
    """shapes: (outputs, inputs). rows: of products. cached: bytes that may stay in a cache. rounds: of a candidate."""

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    cached: int
    rounds: int


REAL = Sizes(
    ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    (1, 16, 32, 64, 128, 256, 1024, 4096),
    256 * 2**20,
    5,
)
QUICK = Sizes(REAL.shapes[:2], (1, 256), REAL.cached, 3)
TINY = Sizes(((96, 128),), (1, 70), 0, 1)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="stop with what there is after so long")
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="OUTxIN", help="instead of the 8B model's")
    parser.add_argument("--rows", type=int, nargs="+", help="of products, instead of many from 1 to 4096")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    try:
        gpu = open_gpu()
    except DeviceError as error:
        raise SystemExit(f"w4ax_tune.py: nothing measured: {error}") from error
    sizes = TINY if isinstance(gpu, Interpreted) else QUICK if arguments.quick else REAL
    given = {name: tuple(getattr(arguments, name)) for name in ("shapes", "rows") if getattr(arguments, name)}
    sizes = replace(sizes, **given)
    gpu.adopt()
    rows: list[dict[str, Any]] = []
    notes = [gpu.name]
    for form, shape, count in product(FORMS, sizes.shapes, sizes.rows):
        if time.monotonic() > end:
            notes.append(f"the time was over: nothing of {form} {shape} with {count} rows, and of what follows")
            break
        rows.append(measured(gpu, sizes, form, shape, count))
        common.write_json(arguments, claims(rows), rows, [*notes, "not finished"])
    print(common.table(["", "rows", "best tile", "us", "in use", "us", "left out"], [cells(row) for row in rows]))
    if arguments.plot is not None:
        plot(arguments.plot, rows)
    common.report(arguments, claims(rows), rows, notes)


def shape_of(word: str) -> tuple[int, int]:
    """Raises ValueError."""
    outputs, inputs = map(int, word.split("x"))
    if outputs < 1 or inputs < 1 or inputs % BLOCK:
        raise ValueError(word)
    return outputs, inputs


def measured(gpu: Gpu, sizes: Sizes, form: str, shape: tuple[int, int], count: int) -> dict[str, Any]:
    """Seconds of a product by every candidate."""
    outputs, _ = shape
    used = triton_w4ax.tile_of(FORMS[form][architecture(gpu.device)], count, outputs)
    work = products(gpu, sizes, form, shape, count)
    taken: dict[tuple[int, ...], float] = {}
    refused = 0
    for tile in candidates(count, used):
        try:
            taken[key(tile)] = seconds(gpu, work(tile), sizes.rounds)
        except Exception as error:  # of the compiler or the launch: there is no one type for it
            if key(tile) == key(used):
                raise
            refused += 1
            common.say(f"{form} {shape}, {count} rows, {key(tile)}: {type(error).__name__}")
    best = min(taken, key=lambda one: taken[one])
    common.say(f"{form} {shape}, {count} rows: {best}, {taken[key(used)] / taken[best]:.2f} times as fast as in use")
    return {
        "form": form,
        "shape": shape,
        "rows": count,
        "best": best,
        "seconds": taken[best],
        "used": key(used),
        "used_seconds": taken[key(used)],
        "refused": refused,
        "all": [{"tile": tile, "seconds": one} for tile, one in taken.items()],
    }


def candidates(count: int, used: ProductTile) -> list[ProductTile]:
    """What is used, and the others. Few rows take the least height that holds them all."""
    heights = [next(height for height in (16, 32, 64) if height >= count)] if count <= 64 else [64, 128]
    columns = (32, 64, 128) if count <= 64 else (64, 128, 256)
    tiles = [
        ProductTile((ANY, ANY), (height, width), warps, stages)
        for height, width, warps, stages in product(heights, columns, (4, 8), (3, 4, 5))
    ]
    return [used, *(tile for tile in tiles if key(tile) != key(used))]


def key(tile: ProductTile) -> tuple[int, ...]:
    return (*tile.size, tile.warps, tile.stages)


def products(
    gpu: Gpu, sizes: Sizes, form: str, shape: tuple[int, int], count: int
) -> Callable[[ProductTile], tuple[Callable[[], None], int]]:
    """What makes of a tile a run of products, and says how many they are."""
    outputs, inputs = shape
    copies = max(1, 2 * sizes.cached // (outputs * inputs // 2))
    values = torch.randint(-8, 8, shape, dtype=torch.int8, device=gpu.device)
    scales = torch.rand(outputs, inputs // 128, device=gpu.device).bfloat16().float()
    packed = [triton_w4ax.pack_w4ax(values, scales) for _ in range(copies)]
    x = torch.randn(count, inputs, device=gpu.device).bfloat16()
    rows = quantise_rows(x, packed[0].form)

    def made(tile: ProductTile) -> tuple[Callable[[], None], int]:
        def run() -> None:
            for weight in packed:
                if form == "W4A8":
                    triton_w4ax.multiply(rows, weight, torch.bfloat16, tile=tile)
                else:
                    triton_w4ax.linear_a16(x, weight, tile=tile)

        return run, copies

    return made


def seconds(gpu: Gpu, work: tuple[Callable[[], None], int], rounds: int) -> float:
    """Of one product, from a graph of all copies: no launch is waited for."""
    run, copies = work
    gpu.settle()
    stream = gpu.stream()
    replay = stream.capture(run)
    taken = []
    with stream.use():
        replay()
        for _ in range(rounds):
            began = stream.mark()
            replay()
            taken.append((began, stream.mark()))
    stream.check()
    return statistics.median(max(end.seconds_since(began), 1e-9) for began, end in taken) / copies


def claims(rows: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        name = f"{row['form'].lower()}_tile_of_best"
        found[name] = min(found.get(name, 1.0), row["seconds"] / row["used_seconds"])
    return found


def cells(row: dict[str, Any]) -> list[object]:
    outputs, inputs = row["shape"]
    best, used = ("x".join(map(str, row[name])) for name in ("best", "used"))
    times = (f"{1e6 * row[name]:.1f}" for name in ("seconds", "used_seconds"))
    return [f"{row['form']}, {inputs} -> {outputs}", row["rows"], best, next(times), used, next(times), row["refused"]]


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure as Picture

    picture = Picture(layout="constrained", figsize=(8, 0.25 * len(rows) + 1))
    axes = picture.subplots()
    names = [f"{cells(row)[0]}, {row['rows']} rows" for row in rows]
    axes.barh(names, [100 * row["seconds"] / row["used_seconds"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="time of the best tile, in percent of the time of the tile in use")
    picture.savefig(path)


if __name__ == "__main__":
    main()
