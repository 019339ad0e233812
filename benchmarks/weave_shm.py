"""A seam between two ranks on one host, one core each: shared memory against torch.distributed's gloo.

    python benchmarks/weave_shm.py [--quick] [--json FILE] [--plot FILE] [--level LEVEL] [--slot-kib N]

The seam is that of a bfloat16 layer: both ranks have partial sums [tokens, hidden]; at its end both have the normalised
sum. The baseline is gloo's all-reduce, in place, and then the residual and the norm of all rows on every rank, by the
same kernels. In between is the fused order over gloo (weave/distributed.py): reduce-scatter, norm of own rows,
all-gather. Contestants take turns, every ratio is of one round; the results are compared first, bit for bit where they
must be.

The limit is memory: a rank must read its partial sums, read and write the residual of its own half of the rows, and
write all hidden rows: 3 times the bytes of [tokens, hidden], on both ranks, over the bandwidth that both cores reach
together. What crosses can stay in the caches. So can all of a small message: it may beat this limit.

* fused_vs_gloo: times as fast as the baseline, the worst case of the grid.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist

from weft import _native
from weft.kernels import resolve
from weft.kernels.cpu import CpuKernels
from weft.kernels.wire import FusedRows
from weft.weave.collective import Collective, Join
from weft.weave.distributed import DistributedCollective, connect
from weft.weave.messages import Messages
from weft.weave.shm import SLOT_BYTES, ShmCollective, new_name

GRID = tuple((tokens, hidden) for hidden in (2048, 8192) for tokens in (64, 128, 256, 512, 1024, 2048, 4096))
QUICK_GRID = ((64, 2048), (1024, 2048), (64, 8192), (1024, 8192))
ROUNDS, QUICK_ROUNDS = 11, 5
BLOCK_SECONDS = 0.03  # of one contestant's turn, at least one seam
RANKS, TIMEOUT, EPS = 2, 120.0, 1e-5
READ_BYTES = 256 * 2**20
CONTESTANTS = ("shared memory", "gloo, fused", "gloo, all-reduce")


def main() -> None:
    arguments = _arguments()
    level, _ = resolve(arguments.level)
    cores = sorted(os.sched_getaffinity(0))
    watch = common.LoadWatch()
    grid = QUICK_GRID if arguments.quick else GRID
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answer, theirs = context.Pipe(duplex=False)
        common_arguments = (new_name(), folder, level, grid, rounds, arguments.slot_kib * 1024, theirs)
        ranks = [
            context.Process(target=_rank, args=(rank, cores[rank % len(cores)], *common_arguments))
            for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.start()
        theirs.close()
        bandwidth, times = answer.recv()  # EOFError where both have ended without one
        for rank in ranks:
            rank.join()
    rows = [_row(tokens, hidden, bandwidth, times[tokens, hidden]) for tokens, hidden in grid]
    print(f"{level} kernels, bfloat16, {RANKS} ranks on {len(cores)} cores; both read {bandwidth / 1e9:.1f} GB/s\n")
    head = ["tokens", "hidden", *(f"{name}, us" for name in CONTESTANTS), "limit, us", "of the limit", "vs gloo"]
    print(common.table(head, [_cells(row) for row in rows]), "\n")
    if arguments.plot is not None:
        _plot(arguments.plot, rows)
    note = common.load_note(watch)
    notes = [*([note] if note else []), *(["fewer cores than ranks"] if len(cores) < RANKS else [])]
    common.report(arguments, {"fused_vs_gloo": min(row["vs_gloo"].median for row in rows)}, rows, notes)


def _arguments() -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--level", default="auto", choices=("auto", "avx512", "avx2", "portable"))
    parser.add_argument("--slot-kib", type=int, default=SLOT_BYTES // 1024, metavar="N", help="memory of one slot")
    return parser.parse_args()


def _rank(
    rank: int,
    core: int,
    name: str,
    folder: str,
    level: str,
    grid: tuple[tuple[int, int], ...],
    rounds: int,
    slot_bytes: int,
    answer: Any,
) -> None:
    """One rank's process. Rank 0 answers with the bandwidth and the seconds of a seam, by case and contestant."""
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
    if rank == 0:
        answer.send((bandwidth * RANKS, times))
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
        messages.wait(messages.all_reduce(partial))
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
    messages.wait(messages.all_reduce(total))
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
