"""Attention and the elementwise kernels of a 1.1B Llama on this CPU: against the machine's limits, and against torch.

    python benchmarks/attention_cpu.py [--quick] [--json FILE] [--plot FILE] [--level LEVEL] [--dtype DTYPE]
                                       [--kv-cache-dtype CACHE ...]

Prefill (512 tokens of one sequence, one layer) is bound by arithmetic: compared with products that stay in registers,
and only the flops of the causal half count. Decode (16 sequences at 640 tokens, the KV of all layers in turn, in blocks
of 16 slots in random order) is bound by memory: compared with a plain read. The norm and the gate read and write 512
rows. torch has its scaled_dot_product_attention on contiguous keys and values, so it need not look up blocks.
Limits, weft and torch take turns, round by round, and every ratio is of one round.

* attention_prefill_of_peak, attention_decode_of_bandwidth: of the limit.
* attention_prefill_vs_torch, attention_decode_vs_torch: times as fast as torch.

The second table has a KV of fewer bits beside one of the activations' type, in turns, for several batches and contexts.
Layers are many enough that no cache holds them: in a model, a layer's weights have passed between two uses of its KV.

* kv_bytes_ratio: bytes of the 4-bit KV to those of bfloat16.
* kv4_decode_vs_bf16, kv4_prefill_vs_bf16: times as fast, decode at the longest context of a batch of 16.
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
from torch.nn import functional

from weft import _native
from weft.core.plan import Slice
from weft.kernels import resolve
from weft.kernels.base import Batch
from weft.kernels.cpu import CpuKernels
from weft.kernels.kv import BITS, token_bytes
from weft.models.batch import make_batch

HEADS, KV_HEADS, HEAD_DIM, LAYERS, HIDDEN, INNER = 32, 4, 64, 22, 2048, 5632
PROMPT, SEQUENCES, CONTEXT, BLOCK = 512, 16, 640, 16
ROUNDS, QUICK_ROUNDS = 11, 5
READ_BYTES = 512 * 2**20
CACHED = ((1, 128, 1), (1, 1024, 1), (1, 4096, 1), (16, 128, 1), (16, 512, 1), (16, 1024, 1), (1, 512, 512))
CACHED_BYTES = 96 * 2**20  # of all layers, in the activations' type
KEYS = ("sequences", "context", "rows", "cache", "microseconds", "bandwidth", "rate", "vs_auto")
PROBE_STEPS = 400_000
SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True)
class Contest:
    """One kernel: both contestants, the work of one call (flops or bytes), and what bounds it."""

    name: str
    weft: Callable[[], object]
    torch: Callable[[], object]
    work: float
    bound: str  # "peak" or "bandwidth"
    claim: bool = True


def main() -> None:
    arguments = _arguments()
    level, _ = resolve(arguments.level)
    dtype = getattr(torch, arguments.dtype)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    torch.set_num_threads(len(cores))
    kernels = CpuKernels(level, cores)
    watch = common.LoadWatch()
    contests = [_prefill(kernels, dtype), _decode(kernels, dtype), _norm(kernels, dtype), _gate(kernels, dtype)]
    memory = _native.Memory(READ_BYTES, kernels.native)
    for contest in contests:
        contest.weft(), contest.torch()
    rounds = [_round(kernels, contests, memory, dtype) for _ in range(QUICK_ROUNDS if arguments.quick else ROUNDS)]
    print(f"{level} kernels, {arguments.dtype}, {len(cores)} threads\n")
    rows = [_row(contest, [one[contest.name] for one in rounds]) for contest in contests]
    print(common.table(["", "weft", "torch", "limit", "of the limit", "vs torch"], [_cells(row) for row in rows]))
    print()
    if arguments.plot is not None:
        _plot(arguments, rows)
    claims = {f"attention_{row['name']}_of_{row['bound']}": row["of_limit"].median for row in rows if row["claim"]}
    claims |= {f"attention_{row['name']}_vs_torch": row["vs_torch"].median for row in rows if row["claim"]}
    kept = [row for case in CACHED for row in _caches(kernels, dtype, arguments, *case)]
    header = ["sequences", "context", "rows", "KV", "us a layer", "GB/s", "GFLOP/s", "vs activations' type"]
    print(common.table(header, [[str(row[key]) for key in KEYS] for row in kept]), "\n")
    claims |= _cache_claims(kept, dtype)
    note = common.load_note(watch)
    common.report(arguments, claims, rows + kept, [note] if note else [])


def _arguments() -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--level", default="auto", choices=("auto", "avx512", "avx2", "portable"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--kv-cache-dtype", nargs="*", default=("int8", "int4"), choices=tuple(BITS))
    return parser.parse_args()


def _prefill(kernels: CpuKernels, dtype: torch.dtype) -> Contest:
    batch = make_batch([Slice(0, 0, (0,) * PROMPT, tuple(range(PROMPT // BLOCK)), None)], BLOCK)
    (kv,) = _filled(kernels, dtype, 1, PROMPT)
    q = torch.randn(PROMPT, HEADS * HEAD_DIM).to(dtype)
    theirs = [torch.randn(1, heads, PROMPT, HEAD_DIM).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return Contest(
        "prefill",
        lambda: kernels.attention(q, kv, batch, HEADS, KV_HEADS, SCALE),
        lambda: functional.scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=True),
        2.0 * PROMPT * (PROMPT + 1) * HEADS * HEAD_DIM,
        "peak",
    )


def _decode(kernels: CpuKernels, dtype: torch.dtype) -> Contest:
    batch = _shuffled(SEQUENCES, CONTEXT, 1)
    layers = _filled(kernels, dtype, SEQUENCES, CONTEXT, layers=LAYERS)
    q = torch.randn(SEQUENCES, HEADS * HEAD_DIM).to(dtype)
    query = torch.randn(SEQUENCES, HEADS, 1, HEAD_DIM).to(dtype)
    plain = [torch.randn(2, SEQUENCES, KV_HEADS, CONTEXT, HEAD_DIM).to(dtype) for _ in range(LAYERS)]

    def weft() -> None:
        for kv in layers:
            kernels.attention(q, kv, batch, HEADS, KV_HEADS, SCALE)

    def baseline() -> None:
        for keys, values in plain:
            functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return Contest("decode", weft, baseline, float(LAYERS * plain[0].nbytes), "bandwidth")


def _norm(kernels: CpuKernels, dtype: torch.dtype) -> Contest:
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((PROMPT, HIDDEN), (PROMPT, HIDDEN), (HIDDEN,)))

    def baseline() -> torch.Tensor:
        return functional.rms_norm(residual.copy_(residual + x), (HIDDEN,), weight, 1e-5)

    residual.zero_()
    return Contest(
        "add_rms_norm",
        lambda: kernels.add_rms_norm(x, residual, weight, 1e-5),
        baseline,
        4.0 * x.nbytes,
        "bandwidth",
        False,
    )


def _gate(kernels: CpuKernels, dtype: torch.dtype) -> Contest:
    x = torch.randn(PROMPT, 2 * INNER).to(dtype)

    def baseline() -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up

    return Contest("silu_mul", lambda: kernels.silu_mul(x), baseline, 1.5 * x.nbytes, "bandwidth", False)


def _shuffled(sequences: int, context: int, rows: int) -> Batch:
    """The last `rows` tokens of each sequence, whose blocks lie in random order."""
    each = context // BLOCK
    order = torch.randperm(sequences * each, generator=torch.Generator().manual_seed(0)).tolist()
    tables = [tuple(order[i * each : (i + 1) * each]) for i in range(sequences)]
    return make_batch([Slice(i, context - rows, (0,) * rows, table, None) for i, table in enumerate(tables)], BLOCK)


def _filled(
    kernels: CpuKernels, dtype: torch.dtype, sequences: int, context: int, cache: str = "auto", layers: int = 1
) -> list[Any]:
    """The KV of some layers with random numbers in every slot, the same in all."""
    angles = torch.rand(context, HEAD_DIM // 2)
    qkv = torch.randn(sequences * context, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)
    batch, stores = _shuffled(sequences, context, context), []
    for _ in range(layers):
        stores.append(kernels.make_kv(sequences * context // BLOCK, BLOCK, KV_HEADS, HEAD_DIM, dtype, cache))
        kernels.rotary_write(qkv, angles.cos(), angles.sin(), stores[-1], batch, HEADS, KV_HEADS, None, None, 1e-5)
    return stores


def _caches(
    kernels: CpuKernels, dtype: torch.dtype, arguments: argparse.Namespace, sequences: int, context: int, rows: int
) -> list[dict[str, Any]]:
    """Attention of the last `rows` tokens of each sequence, over each cache in turn."""
    layers = max(1, CACHED_BYTES // (sequences * context * token_bytes(KV_HEADS, HEAD_DIM, dtype, "auto")))
    layers = 1 if rows > 1 else layers
    batch, q = _shuffled(sequences, context, rows), torch.randn(sequences * rows, HEADS * HEAD_DIM).to(dtype)
    names = ("auto", *arguments.kv_cache_dtype)
    stores = {name: _filled(kernels, dtype, sequences, context, name, layers) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def attend(name: str) -> None:
        for kv in stores[name]:
            kernels.attention(q, kv, batch, HEADS, KV_HEADS, SCALE)

    for _ in range(1 + (QUICK_ROUNDS if arguments.quick else ROUNDS)):  # the first one warms up
        for name in names:
            seconds[name].append(_seconds(lambda name=name: attend(name)) / layers)
    seen = sequences * (rows * context - rows * (rows - 1) / 2)  # query rows times the positions that they see
    flops, tokens = 4.0 * HEADS * HEAD_DIM * seen, sequences * context
    return [
        {
            "name": f"KV {name}, {sequences} x {context}, {rows} rows",
            "sequences": sequences,
            "context": context,
            "rows": rows,
            "cache": name,
            "microseconds": common.Figure.of([one * 1e6 for one in times[1:]]),
            "bandwidth": common.Figure.of(
                [tokens * token_bytes(KV_HEADS, HEAD_DIM, dtype, name) / one / 1e9 for one in times[1:]]
            ),
            "rate": common.Figure.of([flops / one / 1e9 for one in times[1:]]),
            "vs_auto": common.Figure.of([base / one for base, one in zip(seconds["auto"][1:], times[1:], strict=True)]),
        }
        for name, times in seconds.items()
    ]


def _cache_claims(rows: list[dict[str, Any]], dtype: torch.dtype) -> dict[str, float]:
    claims = {"kv_bytes_ratio": token_bytes(KV_HEADS, HEAD_DIM, torch.bfloat16, "int4")
              / token_bytes(KV_HEADS, HEAD_DIM, torch.bfloat16, "bf16")}  # fmt: skip
    if dtype is torch.bfloat16:
        for row in rows:
            if row["cache"] == "int4" and row["rows"] > 1:
                claims["kv4_prefill_vs_bf16"] = row["vs_auto"].median
            elif row["cache"] == "int4" and row["sequences"] > 1:
                claims["kv4_decode_vs_bf16"] = row["vs_auto"].median  # of the last, longest context
    return claims


def _round(
    kernels: CpuKernels, contests: list[Contest], memory: _native.Memory, dtype: torch.dtype
) -> dict[str, tuple[float, float, float]]:
    """(weft, torch, limit) in flop/s or bytes/s, by name."""
    found = {}
    for contest in contests:
        if contest.bound == "peak":
            limit = _peak(kernels, dtype)
        else:
            limit = READ_BYTES / _seconds(lambda: kernels.native.probe_read(memory))
        found[contest.name] = (contest.work / _seconds(contest.weft), contest.work / _seconds(contest.torch), limit)
    return found


def _peak(kernels: CpuKernels, dtype: torch.dtype) -> float:
    start = time.perf_counter()
    done = kernels.native.probe_multiply(int(dtype is torch.bfloat16), PROBE_STEPS)
    return done / (time.perf_counter() - start)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _row(contest: Contest, rates: list[tuple[float, float, float]]) -> dict[str, Any]:
    return {
        "name": contest.name,
        "bound": contest.bound,
        "unit": "GB/s" if contest.bound == "bandwidth" else "GFLOP/s",
        **{
            who: common.Figure.of([rate[i] / 1e9 for rate in rates]) for i, who in enumerate(("weft", "torch", "limit"))
        },
        "of_limit": common.Figure.of([weft / limit for weft, _, limit in rates]),
        "vs_torch": common.Figure.of([weft / theirs for weft, theirs, _ in rates]),
        "claim": contest.claim,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['name']} ({row['unit']})",
        *(str(row[key]) for key in ("weft", "torch", "limit", "of_limit", "vs_torch")),
    ]


def _plot(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure as Picture

    picture = Picture(layout="constrained")
    axes = picture.subplots()
    axes.bar([row["name"] for row in rows], [row["vs_torch"].median for row in rows])
    axes.axhline(1.0, linestyle=":")
    axes.set(ylabel="times as fast as torch")
    picture.savefig(arguments.plot)


if __name__ == "__main__":
    main()
