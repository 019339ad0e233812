"""Two lanes on parts of one GPU: what parts cost, what each kind of work makes of its part, and how the two disturb.

    python benchmarks/gpu_phases.py [--quick] [--json FILE] [--minutes 8]

1. *parts*: seconds to make a green context and its stream, what a step pays for a move to one that is there, and what
   it pays, in bytes too, for a graph of the decode step of 4 that is recorded for a new part.
2. *curves*: a prefill-like product (2048 rows, BF16) and decode attention (64 sequences of 2048), each alone on so many
   units of SMs, and the same on all of them.
3. *beside*: both at once on the two halves of a split, at five splits, and each with all SMs: how much longer each
   takes than alone on the same part. 2 and 3 are what the simulator's cost model is fitted on:
   tools/fit_gpu.py --gpu h200 --phases FILE --out mine.json (docs/simulator_model.md).
4. *serving*: the 8B shape of gpu.py in BF16 with random weights under a Poisson load (prompts of 1024 tokens, answers
   of 128, on average), in one process without HTTP: chunks of several sizes in one mixed lane, fixed splits, full
   overlap, and `auto`. Requests arrive for 8 seconds. One counts that has its first token within eight times, the
   others within twice what one request alone takes, and it may end when no more arrive.

Rows are written as they come, so a run that is killed leaves what it has. Without a GPU it says so and ends;
TRITON_INTERPRET=1 runs all of it on a tiny shape, to show that it works and nothing else.

Claims (only from a GPU that can be divided): `switch_us` of a step; `interference_worst`: the longest time beside the
other, by that alone, over the splits; `h200_goodput_vs_best_chunk`: requests a second that count, of auto and of the
best chunk, each at the rate that suits it best.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import common
import gpu_model
import gpu_phases_serving as serving
import torch

from weft.core.plan import Lane, Slice
from weft.devices.cuda_inputs import layout_of, send
from weft.devices.cuda_streams import Gpu, Interpreted, Stream, open_gpu
from weft.errors import DeviceError
from weft.kernels.triton import TritonKernels
from weft.models.batch import make_batch

LANES = (Lane.PREFILL, Lane.DECODE)
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """rows of a product [rows, width] x [width, wide]; sequences of so many positions; repeats of a measurement."""

    rows: int = 2048
    width: int = 4096
    wide: int = 14336
    sequences: int = 64
    context: int = 2048
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    repeats: int = 7


TINY = Shape(4, 16, 32, 1, 3, 2, 1, 16, 1)


@dataclass(frozen=True, slots=True)
class Work:
    """What a lane does. launch: once, on the stream in use. unit: of `amount`, for people."""

    name: str
    launch: Callable[[], None]
    amount: float
    unit: str


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="stop with what there is after so long")
    parser.add_argument("--parts", choices=("all", "sms", "serving"), default="all", help="1 to 3, or 4 (all)")
    arguments = parser.parse_args()
    try:
        gpu = open_gpu()
    except DeviceError as error:
        print(f"nothing measured: {error.message}")
        return
    gpu.adopt()
    tiny = isinstance(gpu, Interpreted)
    shape = TINY if tiny else Shape(repeats=3 if arguments.quick else 7)
    end = time.monotonic() + arguments.minutes * 60
    rows: list[dict[str, Any]] = []
    notes = [gpu.name, *([] if gpu.undivided is None else [f"the SMs were not divided: {gpu.undivided}"])]
    with torch.inference_mode():
        for row in rows_of(gpu, shape, arguments.parts, end, quick=arguments.quick):
            rows.append(row)
            common.say(", ".join(f"{name} {_words(value)}" for name, value in row.items()))
            common.write_json(arguments, {}, rows, [*notes, "not finished"])
            if time.monotonic() > end:
                notes.append(f"stopped after {arguments.minutes:g} minutes, before the end")
                break
    common.report(arguments, {} if gpu.undivided is not None else claims(rows) | serving.claims(rows), rows, notes)


def rows_of(gpu: Gpu, shape: Shape, parts: str, end: float, *, quick: bool) -> Iterator[dict[str, Any]]:
    if parts != "serving":
        yield from measure(gpu, shape, quick=quick)
    if parts != "sms":
        sizes, traffic = gpu_model.REAL, serving.Traffic(rates=(0.6,)) if quick else serving.Traffic()
        if shape is TINY:
            sizes, traffic = gpu_model.TINY, serving.TINY
        yield from serving.measure(gpu, sizes.raw, traffic, end)


def measure(gpu: Gpu, shape: Shape, *, quick: bool) -> Iterator[dict[str, Any]]:
    works = {Lane.PREFILL: product(gpu, shape), Lane.DECODE: attention(gpu, shape)}
    streams = {}
    for lane in LANES:
        began = time.perf_counter()
        streams[lane] = gpu.lane_stream(lane, gpu.shares)
        yield {"part": "parts", "what": f"first context, {lane.value}", "seconds": time.perf_counter() - began}
    for lane in LANES:  # compiled, and libraries have their memory
        seconds(streams[lane], works[lane], 1)
    for share in shares(gpu.shares, quick):
        for lane in LANES:
            began = time.perf_counter()
            streams[lane].move(share)
            made = time.perf_counter() - began
            taken = [seconds(streams[lane], works[lane], shape.repeats) for _ in range(3)]
            yield {
                "part": "curves",
                "what": works[lane].name,
                "share": share,
                "of": gpu.shares,
                "divided": gpu.undivided is None,
                **rates(works[lane], taken),
            }
            yield {"part": "parts", "what": f"context, {lane.value}", "share": share, "seconds": made}
    yield {"part": "parts", "what": "move", "seconds": moving(gpu, streams[Lane.DECODE])}
    for prefill, decode in splits(gpu.shares):
        for lane, share in zip(LANES, (prefill, decode), strict=True):
            streams[lane].move(share)
        alone = {
            lane: statistics.median(seconds(streams[lane], works[lane], shape.repeats) for _ in range(3))
            for lane in LANES
        }
        both = beside(gpu, streams, works, alone, 0.05 if quick else 0.3)
        for lane, share, rival in ((Lane.PREFILL, prefill, decode), (Lane.DECODE, decode, prefill)):
            row = {"part": "beside", "what": works[lane].name, "share": share, "rival": rival, "of": gpu.shares}
            row |= {"divided": gpu.undivided is None, "alone": alone[lane], "beside": both[lane]}
            yield {**row, "times": both[lane] / max(alone[lane], 1e-12)}


def product(gpu: Gpu, shape: Shape) -> Work:
    dtype = torch.bfloat16
    x = torch.randn(shape.rows, shape.width, device=gpu.device).to(dtype)
    weight = torch.randn(shape.wide, shape.width, device=gpu.device).to(dtype)
    out = torch.empty(shape.rows, shape.wide, device=gpu.device, dtype=dtype)
    flops = 2.0 * shape.rows * shape.width * shape.wide
    return Work(f"product of {shape.rows} rows", lambda: torch.matmul(x, weight.T, out=out), flops / 1e12, "TFLOP/s")


def attention(gpu: Gpu, shape: Shape) -> Work:
    kernels = TritonKernels(gpu.device)
    dtype = torch.bfloat16
    each = -(-shape.context // BLOCK_SIZE)
    kv = kernels.make_kv(shape.sequences * each, BLOCK_SIZE, shape.kv_heads, shape.head_dim, dtype)
    slices = [Slice(i, shape.context - 1, (0,), tuple(range(i * each, (i + 1) * each))) for i in range(shape.sequences)]
    batch = make_batch(slices, BLOCK_SIZE)
    inputs = layout_of(batch).inputs(send(gpu, batch, None), BLOCK_SIZE, whole=True)
    q = torch.randn(shape.sequences, shape.heads * shape.head_dim, device=gpu.device).to(dtype)
    scale = shape.head_dim**-0.5

    def launch() -> None:
        kernels.attention(q, kv, inputs.batch, shape.heads, shape.kv_heads, scale)

    moved = 2.0 * shape.sequences * shape.context * shape.kv_heads * shape.head_dim * dtype.itemsize
    return Work(f"attention of {shape.sequences} x {shape.context}", launch, moved / 1e9, "GB/s")


def seconds(stream: Stream, work: Work, repeats: int) -> float:
    """Of one launch, by the device's clock."""
    with stream.use():
        began = stream.mark()
        for _ in range(repeats):
            work.launch()
        ended = stream.mark()
    ended.wait()
    return max(ended.seconds_since(began), 1e-12) / repeats


def moving(gpu: Gpu, stream: Stream) -> float:
    """Of the host, for a move between two parts that are there."""
    places = (1, gpu.shares)
    for share in places:
        stream.move(share)
    taken = []
    for i in range(200):
        began = time.perf_counter()
        stream.move(places[i % 2])
        taken.append(time.perf_counter() - began)
    stream.check()
    return statistics.median(taken)


def beside(
    gpu: Gpu, streams: dict[Lane, Stream], works: dict[Lane, Work], alone: dict[Lane, float], least: float
) -> dict[Lane, float]:
    """Seconds of one launch of each, while the other goes on. Each lane has a thread, as in the engine; only what was
    launched while both were busy counts."""
    taken: dict[Lane, list[float]] = {lane: [] for lane in LANES}
    ready = threading.Barrier(2)
    over = threading.Event()

    def run(lane: Lane) -> None:
        gpu.adopt()
        count = max(1, int(0.01 / alone[lane]))  # about 10 ms at a time
        with torch.inference_mode():
            ready.wait()
            while not over.is_set():
                taken[lane].append(seconds(streams[lane], works[lane], count))

    threads = [threading.Thread(target=run, args=(lane,)) for lane in LANES]
    for thread in threads:
        thread.start()
    time.sleep(least)
    over.set()
    for thread in threads:
        thread.join()
    return {lane: statistics.median(taken[lane] or [float("nan")]) for lane in LANES}


def shares(units: int, quick: bool) -> list[int]:
    """From one unit to all of them."""
    if quick:
        return sorted({1, max(1, units // 2), units})
    return [*range(1, units + 1)] if units <= 20 else sorted({1, *range(4, units, 4), units})


def splits(units: int) -> list[tuple[int, int]]:
    """Five that divide the device, and all of it for both."""
    cut = sorted({min(units - 1, max(1, round(units * part))) for part in (0.2, 0.35, 0.5, 0.65, 0.8)})
    return [*[(prefill, units - prefill) for prefill in cut], (units, units)]


def rates(work: Work, taken: list[float]) -> dict[str, Any]:
    middle = statistics.median(taken)
    return {"seconds": middle, "spread": max(taken) - min(taken), work.unit: work.amount / middle}


def claims(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Those of the rows that there are."""
    found = {}
    moves = [row["seconds"] for row in rows if row["what"] == "move"]
    if moves:
        found["switch_us"] = moves[0] * 1e6
    times = [row["times"] for row in rows if row["part"] == "beside"]
    if times:
        found["interference_worst"] = max(times)
    return found


def _words(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
