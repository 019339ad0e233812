"""Two ranks on one host, one core each: a seam through shared memory against torch.distributed's gloo, and whole steps.

    python benchmarks/weave_shm.py [--quick] [--json FILE] [--plot FILE] [--level LEVEL] [--slot-kib N]

The seam is that of a bfloat16 layer: both ranks have partial sums [tokens, hidden]; at its end both have the normalised
sum. The baseline is gloo's all-reduce, in place, and then the residual and the norm of all rows on every rank, by the
same kernels. In between is the fused order over gloo (weave/distributed.py): reduce-scatter, norm of own rows,
all-gather. Contestants take turns, every ratio is of one round; the results are compared first, bit for bit where they
must be.

The limit is memory: a rank must read its partial sums, read and write the residual of its own half of the rows, and
write all hidden rows: 3 times the bytes of [tokens, hidden], on both ranks, over the bandwidth that both cores reach
together. What crosses can stay in the caches. So can all of a small message: it may beat this limit.

Then steps of one prompt through some layers of a 1.1B model, random weights, as a rank of weft carries them out with
--weave fused, woven and auto, through shared memory; the time of the slower rank.

* fused_vs_gloo: times as fast as the baseline, the worst case of the grid.
* auto_vs_fused: a step with --weave fused over one with auto, the worst case.
* auto_regret_percent: auto over the better of fused and woven, the worst case.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from weave_link import SHAPE
from weave_ranks import KV_BLOCK, Model, make_model, prompt

from weft import _native
from weft.config import EngineConfig
from weft.devices.group import Group, open_ranked
from weft.ipc.ranks import new_name
from weft.kernels import resolve
from weft.kernels.cpu import CpuKernels
from weft.kernels.wire import FusedRows
from weft.models.ranked import LanePlace, Ranked
from weft.weave.collective import Collective, Join
from weft.weave.distributed import DistributedCollective, connect
from weft.weave.messages import Messages
from weft.weave.shm import SLOT_BYTES, ShmCollective

GRID = tuple((tokens, hidden) for hidden in (2048, 8192) for tokens in (64, 128, 256, 512, 1024, 2048, 4096))
QUICK_GRID = ((64, 2048), (1024, 2048), (64, 8192), (1024, 8192))
ROUNDS, QUICK_ROUNDS = 11, 5
BLOCK_SECONDS = 0.03  # of one contestant's turn, at least one seam
RANKS, TIMEOUT, EPS = 2, 120.0, 1e-5
READ_BYTES = 256 * 2**20
CONTESTANTS = ("shared memory", "gloo, fused", "gloo, all-reduce")
WEAVES = ("fused", "woven", "auto")
STEPS = tuple((precision, tokens) for precision in ("bf16", "w4a8") for tokens in (64, 256, 1024, 2048))
QUICK_STEPS = (("bf16", 256), ("w4a8", 1024))
LAYERS, QUICK_LAYERS = 6, 2  # of the model's 22
MOST = 2048  # tokens of a step


def main() -> None:
    arguments = _arguments()
    level, _ = resolve(arguments.level)
    cores = sorted(os.sched_getaffinity(0))
    watch = common.LoadWatch()
    grid = QUICK_GRID if arguments.quick else GRID
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    steps = Steps(*((QUICK_STEPS, QUICK_LAYERS) if arguments.quick else (STEPS, LAYERS)), len(cores) < RANKS)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answer, theirs = context.Pipe(duplex=False)
        common_arguments = (new_name(), folder, level, grid, steps, rounds, arguments.slot_kib * 1024, theirs)
        ranks = [
            context.Process(target=_rank, args=(rank, cores[rank % len(cores)], *common_arguments))
            for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.start()
        theirs.close()
        bandwidth, times, taken = answer.recv()  # EOFError where both have ended without one
        for rank in ranks:
            rank.join()
    rows = [_row(tokens, hidden, bandwidth, times[tokens, hidden]) for tokens, hidden in grid]
    print(f"{level} kernels, bfloat16, {RANKS} ranks on {len(cores)} cores; both read {bandwidth / 1e9:.1f} GB/s\n")
    head = ["tokens", "hidden", *(f"{name}, us" for name in CONTESTANTS), "limit, us", "of the limit", "vs gloo"]
    print(common.table(head, [_cells(row) for row in rows]), "\n")
    woven = [_step_row(*case, *found) for case, found in taken.items()]
    head = ["model", "tokens", *(f"{name}, ms" for name in WEAVES), "auto is", "fused / auto", "regret"]
    print(common.table(head, [_step_cells(row) for row in woven]), "\n")
    if arguments.plot is not None:
        _plot(arguments.plot, rows)
    note = common.load_note(watch)
    notes = [*([note] if note else []), *(["fewer cores than ranks"] if len(cores) < RANKS else [])]
    claims = {
        "fused_vs_gloo": min(row["vs_gloo"].median for row in rows),
        "auto_vs_fused": min(row["auto_vs_fused"].median for row in woven),
        "auto_regret_percent": max(100 * row["regret"] for row in woven),
    }
    common.report(arguments, claims, [*rows, *woven], [f"{steps.layers} layers", *notes])


def _arguments() -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--level", default="auto", choices=("auto", "avx512", "avx2", "portable"))
    parser.add_argument("--slot-kib", type=int, default=SLOT_BYTES // 1024, metavar="N", help="memory of one slot")
    return parser.parse_args()


@dataclass(frozen=True, slots=True)
class Steps:
    """cases: (precision, tokens). crowded: whether ranks share cores."""

    cases: tuple[tuple[str, int], ...]
    layers: int
    crowded: bool


def _rank(
    rank: int,
    core: int,
    name: str,
    folder: str,
    level: str,
    grid: tuple[tuple[int, int], ...],
    steps: Steps,
    rounds: int,
    slot_bytes: int,
    answer: Any,
) -> None:
    """One rank's process. Rank 0 answers with the bandwidth, the seconds of a seam, by case and contestant, and what
    `_take_steps` gives."""
    os.sched_setaffinity(0, {core})  # and the threads of gloo
    torch.set_num_threads(1)
    kernels = CpuKernels(level, (core,))
    shared = ShmCollective(name, rank, RANKS, kernels, timeout=TIMEOUT, slot_bytes=slot_bytes)
    messages = connect(dist.FileStore(str(Path(folder) / "store"), RANKS), rank, RANKS, timeout=TIMEOUT)
    capacity = max(tokens * hidden for tokens, hidden in grid) * 2
    fused = DistributedCollective(messages, FusedRows(kernels), capacity=capacity)

    def meet() -> None:
        shared.gather(torch.zeros(1))

    bandwidth = _bandwidth(kernels, meet)
    times = {}
    for tokens, hidden in grid:
        if rank == 0:
            common.say(f"{tokens} tokens, hidden {hidden}")
        _compare(tokens, hidden, rank, kernels, shared, fused, messages)
        seams = _seams(tokens, hidden, rank, kernels, shared, fused, messages)
        times[tokens, hidden] = _times(seams, rounds, shared)
    taken = _take_steps(rank, core, name, kernels, shared, steps, rounds)
    if rank == 0:
        answer.send((bandwidth * RANKS, times, taken))
    meet()
    shared.close()


def _bandwidth(kernels: CpuKernels, meet: Callable[[], None]) -> float:
    """Bytes a second that one rank reads while the other does, the best of some tries."""
    memory = _native.Memory(READ_BYTES, kernels.native)
    best = 0.0
    for _ in range(7):
        meet()
        start = time.perf_counter()
        kernels.native.probe_read(memory)
        best = max(best, READ_BYTES / (time.perf_counter() - start))
    return best


def _bounds(tokens: int) -> tuple[int, ...]:
    return tuple(tokens * rank // RANKS for rank in range(RANKS + 1))


def _seams(
    tokens: int,
    hidden: int,
    rank: int,
    kernels: CpuKernels,
    shared: Collective,
    fused: Collective,
    messages: Messages,
) -> dict[str, Callable[[], Any]]:
    """One seam of each contestant. Zeros, so that sums in place stay what they are."""
    bounds, weight = _bounds(tokens), torch.ones(hidden, dtype=torch.bfloat16)
    partial = torch.zeros(tokens, hidden, dtype=torch.bfloat16)
    own = torch.zeros(bounds[rank + 1] - bounds[rank], hidden, dtype=torch.bfloat16)
    all_rows = torch.zeros(tokens, hidden, dtype=torch.bfloat16)
    join = Join(partial, own, weight, EPS, bounds)

    def all_reduce() -> Any:
        messages.wait_sum(messages.begin_sum(partial), (), tokens)
        return kernels.add_rms_norm(partial, all_rows, weight, EPS)

    return dict(
        zip(
            CONTESTANTS,
            (lambda: shared.finish(shared.start(join)), lambda: fused.finish(fused.start(join)), all_reduce),
            strict=True,
        )
    )


def _compare(
    tokens: int, hidden: int, rank: int, kernels: CpuKernels, shared: Collective, fused: Collective, messages: Messages
) -> None:
    """Raises ArithmeticError where the contestants do not compute the same."""
    generator = torch.Generator().manual_seed(7)
    parts = [torch.randn(tokens, hidden, generator=generator).bfloat16() for _ in range(RANKS)]
    residual = torch.randn(tokens, hidden, generator=generator).bfloat16()
    bounds, weight = _bounds(tokens), torch.ones(hidden, dtype=torch.bfloat16)
    own = slice(bounds[rank], bounds[rank + 1])
    found = []
    for collective in (shared, fused):
        join = Join(parts[rank], residual[own].clone(), weight, EPS, bounds)
        found.append(collective.finish(collective.start(join)).hidden)
    total = parts[rank].clone()
    messages.wait_sum(messages.begin_sum(total), (), tokens)
    plain, _ = kernels.add_rms_norm(total, residual.clone(), weight, EPS)
    if not torch.equal(*found) or not torch.allclose(found[0].float(), plain.float(), atol=0.1, rtol=0.05):
        raise ArithmeticError(f"the contestants do not agree for {tokens} tokens, hidden {hidden}")


def _times(seams: dict[str, Callable[[], Any]], rounds: int, shared: Collective) -> dict[str, list[float]]:
    """Seconds of a seam, round by round. Both ranks need the same number of seams in a turn: rank 0 says how many."""
    found: dict[str, list[float]] = {name: [] for name in seams}
    counts = {}
    for name, seam in seams.items():
        seam()
        start = time.perf_counter()
        for _ in range(3):
            seam()
        wanted = BLOCK_SECONDS / ((time.perf_counter() - start) / 3)
        counts[name] = max(1, int(shared.gather(torch.tensor([wanted]))[0]))
    for _ in range(rounds):
        for name, seam in seams.items():
            shared.gather(torch.zeros(1))
            start = time.perf_counter()
            for _ in range(counts[name]):
                seam()
            found[name].append((time.perf_counter() - start) / counts[name])
    return found


def _take_steps(
    rank: int, core: int, name: str, kernels: CpuKernels, shared: Collective, steps: Steps, rounds: int
) -> dict[tuple[str, int], tuple[dict[str, list[float]], str]]:
    """The seconds of a step, round by round, by case and --weave, and how auto carries it out, by case."""
    found = {}
    group = Group(rank, RANKS, RANKS, name, "", None, "", TIMEOUT, steps.crowded, lambda blocks: blocks)
    raw = SHAPE | {"num_hidden_layers": steps.layers}
    for precision in dict.fromkeys(precision for precision, _ in steps.cases):
        model = make_model(raw, group.part, kernels, precision, MOST)
        ranked = {weave: _open(weave, precision, group, kernels, core, model) for weave in WEAVES}
        for tokens in (tokens for wanted, tokens in steps.cases if wanted == precision):
            if rank == 0:
                common.say(f"a step of {tokens} tokens, {precision}")
            seconds: dict[str, list[float]] = {weave: [] for weave in WEAVES}
            for at in range(1 + rounds):  # the first one warms up
                for weave, forward in ranked.items():
                    shared.gather(torch.zeros(1))
                    start = time.perf_counter()
                    forward.run([prompt(tokens)], [tokens - 1])
                    took = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
                    slower = max(float(one) for one in shared.gather(took))
                    if at:
                        seconds[weave].append(slower)
            mode, strands = ranked["auto"].choose([prompt(tokens)])
            found[precision, tokens] = seconds, f"{mode.value} {len(strands)}"
        for forward in ranked.values():
            forward.close()
    return found


def _open(weave: str, precision: str, group: Group, kernels: CpuKernels, core: int, model: Model) -> Ranked:
    config = EngineConfig(weave=weave, collective="shm", block_size=KV_BLOCK, max_num_batched_tokens=MOST)
    own, place = replace(group, name=f"{group.name}-{weave}"), LanePlace((core,))
    return open_ranked(config, own, None, precision, model.decoder, kernels, place, model.kv, MOST // KV_BLOCK)


def _step_row(precision: str, tokens: int, seconds: dict[str, list[float]], chosen: str) -> dict[str, Any]:
    def ratio(over: str, under: str) -> common.Figure:
        return common.Figure.of([a / b for a, b in zip(seconds[over], seconds[under], strict=True)])

    best = min(("fused", "woven"), key=lambda name: statistics.median(seconds[name]))
    return {
        "precision": precision,
        "tokens": tokens,
        **{weave: common.Figure.of([1000 * one for one in seconds[weave]]) for weave in WEAVES},
        "chosen": chosen,
        "auto_vs_fused": ratio("fused", "auto"),
        "regret": ratio("auto", best).median - 1,
    }


def _step_cells(row: dict[str, Any]) -> list[object]:
    times = [row[weave] for weave in WEAVES]
    return [row["precision"], row["tokens"], *times, row["chosen"], row["auto_vs_fused"], f"{row['regret']:.1%}"]


def _row(tokens: int, hidden: int, bandwidth: float, times: dict[str, list[float]]) -> dict[str, Any]:
    limit = 3 * 2 * tokens * hidden * RANKS / bandwidth
    ours, fused, baseline = (times[name] for name in CONTESTANTS)
    return {
        "tokens": tokens,
        "hidden": hidden,
        **{name: common.Figure.of([1e6 * one for one in times[name]]) for name in CONTESTANTS},
        "limit_us": 1e6 * limit,
        "of_limit": common.Figure.of([limit / one for one in ours]),
        "gloo_fused_vs_all_reduce": common.Figure.of([b / a for a, b in zip(fused, baseline, strict=True)]),
        "vs_gloo": common.Figure.of([b / a for a, b in zip(ours, baseline, strict=True)]),
    }


def _cells(row: dict[str, Any]) -> list[object]:
    times = [row[name] for name in CONTESTANTS]
    return [row["tokens"], row["hidden"], *times, f"{row['limit_us']:.0f}", row["of_limit"], row["vs_gloo"]]


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    from matplotlib import pyplot

    sizes = sorted({row["hidden"] for row in rows})
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(5 * len(sizes), 4), squeeze=False)
    for axis, hidden in zip(axes[0], sizes, strict=True):
        some = [row for row in rows if row["hidden"] == hidden]
        tokens = [row["tokens"] for row in some]
        for name in CONTESTANTS:
            axis.plot(tokens, [row[name].median for row in some], marker="o", label=name)
        axis.plot(tokens, [row["limit_us"] for row in some], linestyle=":", color="grey", label="limit of memory")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds a seam", title=f"hidden {hidden}")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
