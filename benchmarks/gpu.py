"""weft on one GPU: an 8B shape beside the device's own limits, and beside transformers on the same weights.

    python benchmarks/gpu.py --json FILE [--quick] [--resume] [--again NAME ...] [--only NAME] [--plot FILE]
                             [--commit HASH] [--dry-run]

A run takes nine minutes at most, and may be killed at any moment: the JSON is written after each row, most valuable
rows first, and names those that are missing; --resume measures them, and once more those that failed. Each row says
which commit it was measured on: after a change, --again measures the rows with NAME in their name, first of all.
It needs torch, triton, numpy, safetensors and tokenizers, no compiled extension, and no disk. Where transformers is
installed, rows in BF16 have it beside them.

The model has random weights in the shape of Llama 3.1 8B (32 layers, hidden 4096, 32/8 heads, inner 14336, vocabulary
128256): in BF16, in W4A16, and in W4A8 with keys and values in 4 bits (W4A8KV4). Plans go through weft's own device,
from `submit` to `poll`, as the engine loop sends them. A row's limit is the larger of its bytes (weights and KV) over
the bandwidth of a copy, and its operations over the rate of a large product, measured first. Decode begins in a pool
full of random keys and values. transformers is as it comes (sdpa, its growing cache), and takes turns with weft.

* decode_of_bandwidth: decode in BF16 at the short context, the least of one sequence and 64: limit over time.
* prefill_of_matmul_peak: a prompt of 4096 tokens in BF16: limit over time.
* attention_decode_of_bandwidth: the decode kernel alone with keys and values in BF16, 64 sequences at the long context.
* host_gap_percent: how much longer a step of decode in BF16 takes than on a device that has its launches before it can
  begin, so that none of the host's time is in it; the worse of the two rows.
* throughput_vs_transformers: decode of 64 sequences in BF16 at the short context, tokens a second.
* w4a8kv4_vs_bf16_throughput: decode at the long context of as many sequences as the device holds in each form.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from gpu_results import Results, Row

if TYPE_CHECKING:
    from gpu_bench import Bench
    from gpu_model import Sizes

    from weft.devices.cuda_streams import Gpu

SECONDS, GRACE = (
    525.0,
    12.0,
)  # of a run: no row begins after so many; a row that takes longer than so much more is given up
BUDGET, QUICK_BUDGET = 15.0, 4.0  # seconds of a row once it is warm
BF16, W4A8KV4, W4A16 = MODELS = ("BF16", "W4A8KV4", "W4A16")
CACHES = ("bf16", "int8", "int4")
LIMITS = {"copy": "copy", "product BF16": "bf16", "product INT8": "int8"}  # rows by what they are the limit of
STOPPED = 3  # exit status where the device is lost and --resume would go on


def main() -> None:
    arguments = _arguments()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, below
    started = time.monotonic()
    if find_spec("triton") is None:
        raise SystemExit("gpu.py: nothing measured: it needs the package triton, which is not installed")
    from gpu_model import REAL, TINY

    from weft.devices.cuda_streams import open_gpu
    from weft.errors import DeviceError

    try:
        gpu = open_gpu()
    except DeviceError as error:
        raise SystemExit(f"gpu.py: nothing measured: {error}") from error
    sizes = TINY if arguments.dry_run else REAL
    sizes = sizes.quick() if arguments.quick else sizes
    rows = _rows(sizes, claims_only=arguments.quick)
    again = {name for part in arguments.again for name in _named(rows, part, "--again")}
    only = set(rows) if arguments.only is None else {*LIMITS, *_named(rows, arguments.only, "--only")}
    results = Results(arguments, list(rows), _about(arguments, gpu), lambda found: claims(found, sizes))
    if arguments.resume:
        try:
            results.resume()
        except ValueError as error:
            raise SystemExit(f"gpu.py: {error}") from error
        if results.older():
            common.say(f"{len(results.older())} rows are of other commits; --again NAME measures rows anew")
    results.write()
    from gpu_bench import Bench

    bench = Bench(gpu, sizes, QUICK_BUDGET if arguments.quick else BUDGET)
    gpu.adopt()
    deadline = started + arguments.seconds
    with _ended(deadline + GRACE - time.monotonic()):
        _measure(bench, rows, results, results.todo([name for name in rows if name in only], again), deadline)
    _report(arguments, results)


def _named(rows: Iterable[str], part: str, flag: str) -> list[str]:
    """Those with this in their name."""
    found = [name for name in rows if part in name]
    if not found:
        raise SystemExit(f"gpu.py: {flag} {part!r}: no row has that in its name; there are {'; '.join(rows)}")
    return found


def _measure(
    bench: Bench,
    rows: Mapping[str, Callable[[Bench], Row]],
    results: Results,
    todo: Iterable[str],
    deadline: float,
) -> None:
    """These rows in turn, until the time is over. A row that fails says why, and the others go on."""
    from gpu_model import DoesNotFit, Stuck, settle
    from gpu_state import gpu_state

    _take_limits(bench, results)
    for name in todo:
        left = deadline - time.monotonic()
        if left < bench.budget:
            common.say(f"{left:.0f} s are left, too few for {name!r}; {len(results.missing())} rows are missing")
            return
        began = time.monotonic()
        try:
            row = rows[name](bench)
        except DoesNotFit as error:
            row = {"skipped": str(error)}
        except Stuck as error:
            results.add(name, {"error": str(error)})
            _give_up(f"{name}: {error}")
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        row["took_seconds"] = round(time.monotonic() - began, 1)
        row["gpu"] = gpu_state(bench.gpu.device)  # its clocks, before they fall again
        results.add(name, row)
        common.say(f"{name}: {_words(row)}")
        try:
            settle(bench.gpu)
        except RuntimeError as error:
            _give_up(f"the GPU failed in {name!r}: {error}")
        _take_limits(bench, results)


def _take_limits(bench: Bench, results: Results) -> None:
    for name, key in LIMITS.items():
        if "rate" in results.rows.get(name, {}):
            bench.limits[key] = results.rows[name]["rate"]


@contextmanager
def _ended(seconds: float) -> Iterator[None]:
    """The process ends where this takes longer."""
    timer = threading.Timer(seconds, _give_up, ["the time is over"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(reason: str) -> None:
    """No thread of this process can be waited for any more."""
    common.say(f"{reason}; what there is has been written, and --resume goes on with the next row")
    os._exit(STOPPED)


def _rows(sizes: Sizes, *, claims_only: bool) -> dict[str, Callable[[Bench], Row]]:
    """What is measured, most valuable first."""
    import gpu_bench
    import gpu_rows

    def decode(name: str, batch: int, context: int) -> None:
        found[f"{name} decode, {batch} at {context}"] = lambda bench: gpu_rows.decode_row(bench, name, batch, context)

    def prefill(name: str, tokens: int) -> None:
        found[f"{name} prefill, {tokens}"] = lambda bench: gpu_rows.prefill_row(bench, name, tokens)

    def attention(cache: str, batch: int, context: int) -> None:
        found[f"attention {cache}, {batch} at {context}"] = lambda bench: gpu_rows.attention_row(
            bench, cache, batch, context
        )

    def joining(name: str, batch: int, context: int) -> None:
        found[f"{name} decode, {batch} at {context}, one joins every {gpu_rows.JOIN} steps"] = lambda bench: (
            gpu_rows.joining_row(bench, name, batch, context)
        )

    def profile(name: str, batch: int | None, context: int) -> None:
        found[f"profile of {name} decode, {batch or 'as many as fit'} at {context}"] = lambda bench: (
            gpu_rows.profile_row(bench, name, batch, context)
        )

    def largest(name: str) -> None:
        found[_largest(name, long)] = lambda bench: gpu_rows.largest_row(bench, name, long)

    short, long = sizes.contexts
    one, _, many, _ = sizes.batches
    found: dict[str, Callable[[Bench], Row]] = {
        "copy": gpu_bench.copy_row,
        "product BF16": lambda bench: gpu_bench.product_row(bench, "bf16"),
        "product INT8": lambda bench: gpu_bench.product_row(bench, "int8"),
    }
    attention(CACHES[0], many, long)
    decode(BF16, many, short)
    decode(BF16, one, short)
    prefill(BF16, sizes.prompts[1])
    largest(BF16)
    largest(W4A8KV4)
    if claims_only:
        return found
    attention(CACHES[2], many, long)
    # A profiler may slow what is launched after it: what a claim needs is measured by then.
    profile(W4A8KV4, None, long)
    profile(BF16, many, short)
    profile(BF16, one, short)
    decode(gpu_bench.INVARIANT, many, short)
    joining(BF16, many, short)
    for name in (W4A8KV4, W4A16):
        decode(name, many, short)
        decode(name, one, short)
        prefill(name, sizes.prompts[1])
    attention(CACHES[1], many, long)
    for name in MODELS:  # what was measured already keeps its place
        for context in reversed(sizes.contexts):
            for batch in reversed(sizes.batches):
                decode(name, batch, context)
        for tokens in sizes.prompts:
            prefill(name, tokens)
    for cache in CACHES:
        attention(cache, sizes.batches[3], short)  # fewer would stay in a cache of 60 MB
    return found


def _largest(name: str, context: int) -> str:
    return f"{name} decode, as many as fit at {context}"


def claims(rows: Mapping[str, Row], sizes: Sizes) -> dict[str, float]:
    """Those that the rows there are allow."""
    short, long = sizes.contexts
    one, _, many, _ = sizes.batches
    found: dict[str, float] = {}

    def value(name: str, key: str) -> float | None:
        return rows.get(name, {}).get(key)

    def claim(name: str, values: list[float | None], fold: Callable[[list[float]], float]) -> None:
        there = [one for one in values if one is not None]
        if len(there) == len(values):
            found[name] = fold(there)

    decode = [f"{BF16} decode, {batch} at {short}" for batch in (one, many)]
    claim("decode_of_bandwidth", [value(name, "of_limit") for name in decode], min)
    claim("prefill_of_matmul_peak", [value(f"{BF16} prefill, {sizes.prompts[1]}", "of_limit")], min)
    attention = f"attention {CACHES[0]}, {many} at {long}"
    claim("attention_decode_of_bandwidth", [value(attention, "of_limit")], min)
    claim("host_gap_percent", [value(name, "host_gap") for name in decode], lambda gaps: 100 * max(gaps))
    claim("throughput_vs_transformers", [value(decode[1], "times_transformers")], min)
    rates = [value(_largest(name, long), "tokens_per_second") for name in (W4A8KV4, BF16)]
    claim("w4a8kv4_vs_bf16_throughput", rates, lambda both: both[0] / both[1])
    return found


def _about(arguments: argparse.Namespace, gpu: Gpu) -> Row:
    """What the figures are of."""
    import torch
    from gpu_state import gpu_state

    versions: dict[str, str | None] = {}
    for package in ("torch", "triton", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "quick": arguments.quick,
        "dry_run": arguments.dry_run,
        "device": gpu.name,
        "commit": arguments.commit or common.commit(),
        "versions": versions,
        "machine": {**common.machine(), "cuda": torch.version.cuda, "gpu": gpu_state(gpu.device)},
    }


def _words(row: Row) -> str:
    if "error" in row or "skipped" in row:
        return row.get("error") or f"skipped: {row['skipped']}"
    if "rate" in row:
        return f"{row['rate'] / 1e12:.3f} T a second"
    if "busy_seconds" in row:
        return f"{1e3 * row['busy_seconds']:.3f} ms in kernels, {1e3 * row['gap_seconds']:.3f} ms between them"
    parts = [f"{1e3 * row['seconds']['median']:.3f} ms"]
    parts += [f"batch {row['batch']}"] if "batch" in row else []
    parts += [f"{row['of_limit']:.0%} of the limit ({row['limit']})"] if "of_limit" in row else []
    parts += [f"{row['times_transformers']:.2f} times transformers"] if "times_transformers" in row else []
    parts += [f"without transformers: {row['transformers']}"] if "transformers" in row else []
    return ", ".join(parts)


def _report(arguments: argparse.Namespace, results: Results) -> None:
    print(common.table(["", "ms", "of limit", "x transformers"], [_cells(row) for row in results.rows.values()]))
    for name in results.failed():
        print(f"FAILED {name}: {results.rows[name]['error']}")
    if results.missing():
        print("MISSING: " + "; ".join(results.missing()))
    for name, value in results.claims().items():
        print(f"{name} = {value:.3f}")
    if arguments.plot is not None:
        _plot(arguments.plot, list(results.rows.values()))
    if results.failed():
        raise SystemExit(1)


def _cells(row: Row) -> list[str]:
    if "seconds" not in row:
        return [row["name"], _words(row)[:60], "", ""]
    share = f"{row['of_limit']:.0%}" if "of_limit" in row else "-"
    times = f"{row['times_transformers']:.2f}" if "times_transformers" in row else "-"
    return [row["name"], f"{1e3 * row['seconds']['median']:.3f}", share, times]


def _plot(path: Path, rows: list[Row]) -> None:
    from matplotlib.figure import Figure as Picture

    shown = [row for row in rows if "of_limit" in row]
    picture = Picture(layout="constrained", figsize=(8, 0.3 * len(shown) + 1))
    axes = picture.subplots()
    axes.barh([row["name"] for row in shown], [100 * row["of_limit"] for row in shown])
    axes.invert_yaxis()
    axes.set(xlabel="percent of the device's limit")
    picture.savefig(path)


def _arguments() -> Any:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--resume", action="store_true", help="measure what the --json file lacks, or has an error for")
    parser.add_argument(
        "--again",
        metavar="NAME",
        nargs="+",
        default=[],
        help="rows whose name has this in it, whatever the --json file has, then as --resume",
    )
    parser.add_argument("--only", metavar="NAME", help="rows whose name has this in it, and the limits")
    parser.add_argument("--commit", metavar="HASH", help="what is measured, where there is no git to ask")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no row begins when they are over")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="every row once on a tiny shape, interpreted on this CPU: figures mean nothing",
    )
    arguments = parser.parse_args()
    arguments.resume |= bool(arguments.again)
    if arguments.resume and arguments.json is None:
        parser.error("--resume and --again need --json FILE, the file to go on with")
    return arguments


if __name__ == "__main__":
    main()
