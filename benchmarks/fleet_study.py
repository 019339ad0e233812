"""A fleet for a day: a router that knows prefixes against one that does not, and a node that fails at the peak.

    python benchmarks/fleet_study.py MOONCAKE_TRACE [--gpus 128] [--quick] [--json FILE] [--plot FILE]
    python benchmarks/fleet_study.py MOONCAKE_TRACE --gpus 1000 --routers prefix-aware

The trace names the blocks of its prompts, so that the prefix caches of the replicas are exercised. The traffic is as
many copies of it as the fleet can take, each from a place of its own and with blocks of its own; the rate follows a
day of 24 hours, which --day-part shortens to so many seconds each. Bursts and the pauses between the turns of a
conversation stay about as long as they were, only the day is shorter. At hour 15 one node of eight GPUs is lost with
all its KV, for an hour.

Every figure is SIMULATED: Llama-3-70B on H100, each replica a node of eight ranks with four-bit weights and woven
seams. What simulating it takes, in time and memory, is measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common

from weft.bench.stats import Record, Slo
from weft.bench.traces import read_trace
from weft.config import EngineConfig
from weft.progress import Bar
from weft.sim.estimate import cost_of, setup_of
from weft.sim.hardware import find_gpu
from weft.sim.load import Load
from weft.sim.models import find_model
from weft.sim.replica import Setup
from weft.sim.study import Failure, Fleet, Outcome, study
from weft.sim.tally import Tally

RANKS = 8
HOURS = 24
# One swing, with the least traffic at four in the night: four tenths of the mean; the most, at 16 h, is 1.6 times it.
SWING, NIGHT = 0.6, 4
DAY = tuple(1.0 - SWING * math.cos(2 * math.pi * (hour - NIGHT) / HOURS) for hour in range(HOURS))
FAILS = 15
# Prompts of 11,000 tokens on average take half a second and more, alone.
SLO = Slo(5.0, 0.05)
LONGEST = 32768
ROUTERS = ("least-loaded", "prefix-aware")


@dataclass(slots=True)
class Day:
    """What came of one run. memory: (virtual seconds, requests ended, MiB resident) at intervals."""

    router: str
    replicas: int
    hours: list[Tally]
    outcome: Outcome | None = None
    cpu: float = 0.0
    ended: int = 0
    memory: list[tuple[float, int, float]] = field(default_factory=list)

    @property
    def result(self) -> Outcome:
        if self.outcome is None:
            raise RuntimeError("the day has not been run")
        return self.outcome


def replica(kv_cache_dtype: str) -> Setup:
    """A node: eight H100, W4A8, woven. A block of 128 slots divides the trace's blocks of 512 tokens."""
    config = EngineConfig(
        max_num_seqs=256, max_num_batched_tokens=2048, block_size=128, max_model_len=LONGEST,
        max_num_queued_reqs=10**6, kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    cost = cost_of(find_model("llama-3-70b"), find_gpu("h100"), RANKS, "w4a8", kv_cache_dtype, weave=True)
    return setup_of(cost, config)


def run(setup: Setup, router: str, arguments: argparse.Namespace) -> Day:
    """One day of the fleet behind one router."""
    replicas, part = max(2, arguments.gpus // RANKS), arguments.day_part
    copies = max(1, round(arguments.load * replicas))
    seconds = HOURS * part
    load = Load(
        dataset="trace", rows=tuple(read_trace(arguments.trace)), seconds=seconds, copies=copies, shape=DAY,
        shape_seconds=part, longest=LONGEST,
    )  # fmt: skip
    failures = (Failure(FAILS * part, 1, part),) if arguments.fail else ()
    day = Day(router, replicas, [Tally(SLO) for _ in range(HOURS)])

    def ended(record: Record) -> None:
        day.ended += 1
        day.hours[min(HOURS - 1, int(record.sent // part))](record)

    with Bar(seconds) as bar:

        def looked(now: float) -> None:
            resident = common.simulating_bytes() / 2**20
            day.memory.append((now, day.ended, resident))
            words = f"{router}: {now:.0f} of {seconds:.0f} s, {day.ended} requests, {resident:.0f} MiB"
            bar.show(min(now, seconds), words)
            if len(day.memory) % 4 == 0:
                common.say(words)

        cpu = common.simulating_seconds()
        day.outcome = study(
            Fleet(setup, replicas, router, failures), load.stream(arguments.load * replicas / copies), SLO,
            seconds=seconds, looks=2 * HOURS, processes=arguments.processes, on_end=ended, on_time=looked,
        )  # fmt: skip
        day.cpu = common.simulating_seconds() - cpu
    return day


def row(day: Day) -> dict[str, Any]:
    outcome, totals = day.result, day.result.totals
    return {
        "router": day.router, "replicas": day.replicas, "gpus": day.replicas * RANKS,
        "requests": totals.completed + totals.failed, "failed": totals.failed, "errors": dict(totals.errors),
        "attainment": totals.attainment, "goodput": totals.goodput, "cached": outcome.cached,
        "ttft_p50": totals.ttft.p50, "ttft_p90": totals.ttft.p90, "ttft_p99": totals.ttft.p99,
        "tpot_p50": totals.tpot.p50, "tpot_p90": totals.tpot.p90, "tpot_p99": totals.tpot.p99,
        "retried": outcome.retried, "preemptions": outcome.preemptions, "steps": outcome.steps,
        "output_tokens": totals.output_tokens, "wall_seconds": outcome.wall, "cpu_seconds": day.cpu,
        "hours": [
            {"requests": one.completed + one.failed, "attainment": one.attainment, "ttft_p90": one.ttft.p90}
            for one in (tally.totals() for tally in day.hours)
        ],
        "memory": [
            {"seconds": at, "ended": ended, "resident_mib": resident, "kv_held": held, "kv_cached": cached}
            for (at, ended, resident), held, cached in zip(
                day.memory, outcome.timeline.kv, outcome.timeline.cached, strict=True
            )
        ],
    }  # fmt: skip


def show(rows: Sequence[dict[str, Any]], part: float) -> str:
    """Three tables: the day, its hours, and the memory that simulating it takes."""
    head = ("router", "requests", "in target", "goodput/s", "cached", "TTFT P50", "P90", "P99 s", "TPOT P50", "P90 ms",
            "went on")  # fmt: skip
    whole = [
        (
            one["router"], one["requests"], f"{one['attainment']:.1%}", f"{one['goodput']:.1f}", f"{one['cached']:.1%}",
            *(f"{one[f'ttft_p{p}']:.2f}" for p in (50, 90, 99)), *(f"{1e3 * one[f'tpot_p{p}']:.1f}" for p in (50, 90)),
            one["retried"],
        )
        for one in rows
    ]  # fmt: skip
    names = [name for one in rows for name in (f"{one['router']}: in target", "TTFT P90 s")]
    hours = [
        (hour, f"{DAY[hour]:.2f}", f"{rows[0]['hours'][hour]['requests'] / part:.1f}",
         *(cell for one in rows for cell in (f"{one['hours'][hour]['attainment']:.1%}",
                                             f"{one['hours'][hour]['ttft_p90']:.2f}")))
        for hour in range(HOURS)
    ]  # fmt: skip
    memory = [
        (one["router"], f"{at['seconds']:.0f}", at["ended"], f"{at['resident_mib']:.0f}", f"{at['kv_held']:.0%}",
         f"{at['kv_cached']:.0%}")
        for one in rows for at in one["memory"][3::8]
    ]  # fmt: skip
    return "\n\n".join(
        (
            common.table(head, whole),
            common.table(("hour", "rate", "requests/s", *names), hours),
            common.table(("router", "virtual s", "ended", "RSS MiB", "KV held", "KV cached"), memory),
        )
    )


def claims(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    found = {}
    for one in rows:
        name = one["router"].replace("-", "_")
        found |= {
            f"{name}_attainment": one["attainment"], f"{name}_cached": one["cached"],
            f"{name}_wall_seconds": one["wall_seconds"], f"{name}_cpu_seconds": one["cpu_seconds"],
            f"{name}_rss_growth_second_half_mib": growth(one["memory"]),
        }  # fmt: skip
    by_name = {one["router"]: one for one in rows}
    if by_name.keys() >= set(ROUTERS):
        found["prefix_aware_goodput_ratio"] = by_name[ROUTERS[1]]["goodput"] / by_name[ROUTERS[0]]["goodput"]
    return found


def growth(memory: Sequence[dict[str, Any]]) -> float:
    """MiB of resident memory between the middle of the run and its end."""
    return float(memory[-1]["resident_mib"] - memory[len(memory) // 2]["resident_mib"]) if memory else 0.0


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, help="Mooncake's JSON lines, with hash_ids")
    parser.add_argument("--gpus", type=int, default=128, metavar="N", help="of the fleet, in nodes of 8 (128)")
    parser.add_argument("--load", type=float, default=0.6, metavar="X", help="copies of the trace for each node (0.6)")
    parser.add_argument("--day-part", type=float, default=25.0, metavar="S", help="virtual seconds of an hour (25)")
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=list(ROUTERS))
    parser.add_argument("--kv-cache-dtype", choices=("bf16", "int8", "int4"), default="int8")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that compute the fleet (1)")
    parser.add_argument("--fail", action=argparse.BooleanOptionalAction, default=True, help="lose a node at hour 15")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.gpus, arguments.day_part = min(arguments.gpus, 32), min(arguments.day_part, 5.0)
    watch = common.LoadWatch()
    setup = replica(arguments.kv_cache_dtype)
    rows: list[dict[str, Any]] = []
    for router in arguments.routers:
        rows.append(row(run(setup, router, arguments)))
        common.write_json(arguments, {}, rows, ["unfinished"])
    print(show(rows, arguments.day_part))
    notes = [
        f"SIMULATED: {rows[0]['replicas']} nodes of {RANKS} H100, Llama-3-70B in w4a8 with {arguments.kv_cache_dtype} "
        f"KV, woven; a day in {HOURS * arguments.day_part:.0f} s; targets TTFT {SLO.ttft:g} s, TPOT {SLO.tpot:g} s",
        *filter(None, [common.load_note(watch)]),
    ]
    if arguments.plot is not None:
        _draw(rows, arguments.plot)
    common.report(arguments, claims(rows), rows, notes)


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels: Any = figure.subplots(1, 3)
    for one in rows:
        for axes, value in zip(panels, ("attainment", "ttft_p90"), strict=False):
            axes.step(range(HOURS), [hour[value] for hour in one["hours"]], where="mid", label=one["router"])
        ended = [at["ended"] for at in one["memory"]]
        panels[2].plot(ended, [at["resident_mib"] for at in one["memory"]], label=f"{one['router']}: MiB resident")
    panels[0].set(xlabel="hour", ylabel="part of the requests in target", ylim=(0, 1.02))
    panels[1].set(xlabel="hour", ylabel="TTFT P90 (s)", yscale="log")
    panels[2].set(xlabel="requests ended", ylabel="memory of the simulation", ylim=(0, None))
    for axes in panels:
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.suptitle(f"a simulated day of {rows[0]['gpus']} H100", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
