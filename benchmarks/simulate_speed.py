"""How fast the simulator is: an hour of traffic on one GPU, and ten minutes of it on a fleet of a thousand.

    python benchmarks/simulate_speed.py AZURE_CONVERSATION_TRACE [--gpus 96] [--processes 1] [--quick] [--json FILE]
                                        [--plot FILE]

azure_hour_s: seconds that an hour of the trace takes (its first 35 minutes, repeated) on one simulated A100 with
Llama-3-8B; azure_hour_h100_s: on an H100, which takes more and smaller steps for the same tokens. fleet_seconds:
seconds that ten minutes take on 1,000 H100s with Llama-3-70B, as 125 replicas of 8 ranks behind a router, each with
the load of one copy of the trace. The fleet that is run is smaller (--gpus), and the figure extrapolated in proportion
to the replicas; a fleet of a quarter of it is run beside it to show that the cost of a token does not grow with the
fleet. --gpus 1000 runs it whole.

The hour takes one core; the fleets as many as --processes. CPU seconds are given beside wall seconds, because other
load moves the latter.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

from weft.bench.stats import Slo
from weft.bench.traces import read_trace
from weft.config import EngineConfig
from weft.sim.estimate import cost_of, setup_of
from weft.sim.hardware import find_gpu
from weft.sim.load import Load
from weft.sim.models import find_model
from weft.sim.study import Fleet, study

HOUR, MINUTES = 3600.0, 600.0
GPUS, RANKS = 1000, 8
SLO = Slo(1.0, 0.05)
PATIENCE = 10.0  # seconds of a tenth of a run from which on it says how far it is


@dataclass(frozen=True, slots=True)
class Timed:
    """What a run took. grown: MiB of resident memory between a tenth of the run and its end."""

    name: str
    replicas: int
    virtual: float
    wall: float
    cpu: float
    steps: int
    requests: int
    tokens: int
    grown: float

    def row(self) -> dict[str, Any]:
        return {
            "run": self.name, "replicas": self.replicas, "virtual_seconds": self.virtual, "wall_seconds": self.wall,
            "cpu_seconds": self.cpu, "steps": self.steps, "requests": self.requests, "output_tokens": self.tokens,
            "cpu_us_per_step": 1e6 * self.cpu / self.steps, "cpu_us_per_token": 1e6 * self.cpu / self.tokens,
            "rss_growth_mib": self.grown,
        }  # fmt: skip


def run(name: str, fleet: Fleet, load: Load, seconds: float, processes: int = 1) -> Timed:
    """Serve so many seconds of the load."""
    seen: list[int] = []
    wall, cpu = time.perf_counter(), common.simulating_seconds()

    def look(now: float) -> None:
        seen.append(common.simulating_bytes())
        if time.perf_counter() - wall > PATIENCE * len(seen):
            common.say(f"{now:.0f} of {seconds:.0f} s")

    outcome = study(fleet, load.stream(1.0), SLO, seconds=seconds, looks=10, processes=processes, on_time=look)
    wall, cpu = time.perf_counter() - wall, common.simulating_seconds() - cpu
    totals = outcome.totals
    if totals.failed:
        common.say(f"{name}: {totals.failed} requests failed: {totals.errors}")
    grown = (seen[-1] - seen[0]) / 2**20 if len(seen) > 1 else 0.0
    requests, tokens = totals.completed + totals.failed, totals.output_tokens
    return Timed(name, fleet.count, seconds, wall, cpu, outcome.steps, requests, tokens, grown)


def config(tokens: int = 2048) -> EngineConfig:
    """Without a prefix cache: the trace does not tell what its prompts share."""
    return EngineConfig(
        max_num_seqs=256, max_num_batched_tokens=tokens, block_size=64, enable_prefix_caching=False,
        max_num_queued_reqs=10**6,
    )  # fmt: skip


def loads(path: Path, seconds: float, copies: int = 1) -> Load:
    return Load(dataset="trace", rows=tuple(read_trace(path)), seconds=seconds, copies=copies, longest=8192)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, help="azure2023_conv: arrival_s, input_tokens, output_tokens")
    parser.add_argument("--gpus", type=int, default=96, help="of the fleet that is run; 1000 for the whole (96)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that compute a fleet (1)")
    arguments = parser.parse_args()
    watch = common.LoadWatch()
    runs = measure(arguments)
    hour, quicker, small, large = runs
    fleet = large.wall * (GPUS / RANKS / large.replicas) * (MINUTES / large.virtual)
    notes = [
        "SIMULATED time; what is measured is what simulating it takes",
        f"the hour: {hour.virtual:.0f} s were run in {hour.wall:.1f} s wall, {hour.cpu:.1f} s CPU",
        f"the fleet: {large.replicas} of {GPUS // RANKS} replicas for {large.virtual:.0f} of {MINUTES:.0f} s were run "
        f"in {large.wall:.1f} s wall, {large.cpu:.1f} s CPU, {arguments.processes} processes"
        + ("; extrapolated" if fleet != large.wall else ""),
        f"a token of the fleet costs {large.cpu * small.tokens / (large.tokens * small.cpu):.2f} times one of a "
        f"fleet of {small.replicas}",
        *filter(None, [common.load_note(watch)]),
    ]
    rows = [one.row() for one in runs]
    head = ("run", "replicas", "virtual s", "wall s", "CPU s", "steps", "requests", "us/step", "us/token", "grown MiB")
    print(common.table(head, [_cells(row) for row in rows]))
    if arguments.plot is not None:
        _draw(rows, arguments.plot)
    claims = {
        "azure_hour_s": hour.wall * HOUR / hour.virtual,
        "azure_hour_cpu_s": hour.cpu * HOUR / hour.virtual,
        "azure_hour_h100_s": quicker.wall * HOUR / quicker.virtual,
        "azure_hour_h100_cpu_s": quicker.cpu * HOUR / quicker.virtual,
        "fleet_seconds": fleet,
        "fleet_cpu_seconds": fleet * large.cpu / large.wall,
        "rss_growth_mib": max(one.grown for one in runs),
    }
    common.report(arguments, claims, rows, notes)


def measure(arguments: argparse.Namespace) -> list[Timed]:
    """The hour (or a part of it) on two GPUs, then a small fleet and a larger one."""
    part, found = 0.05 if arguments.quick else 1.0, []
    for gpu in ("a100-80", "h100"):
        common.say(f"one {gpu}")
        one = Fleet(setup_of(cost_of(find_model("llama-3-8b"), find_gpu(gpu), 1, "bf16"), config()))
        found.append(run(f"one {gpu}, Llama-3-8B", one, loads(arguments.trace, HOUR * part), HOUR * part))
    large = max(1, round((16 if arguments.quick else arguments.gpus) / RANKS))
    big = setup_of(cost_of(find_model("llama-3-70b"), find_gpu("h100"), RANKS, "bf16"), config())
    for count in (max(1, large // 4), large):
        common.say(f"{count} replicas of {RANKS}")
        fleet = Fleet(big, count, "least-loaded")
        load = loads(arguments.trace, MINUTES * part, count)
        found.append(run(f"{count} x {RANKS} H100, Llama-3-70B", fleet, load, MINUTES * part, arguments.processes))
    return found


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    return (
        row["run"], row["replicas"], f"{row['virtual_seconds']:.0f}", f"{row['wall_seconds']:.1f}",
        f"{row['cpu_seconds']:.1f}", row["steps"], row["requests"], f"{row['cpu_us_per_step']:.1f}",
        f"{row['cpu_us_per_token']:.2f}", f"{row['rss_growth_mib']:.1f}",
    )  # fmt: skip


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    names = [row["run"].partition(",")[0] for row in rows]
    for axes, value in zip(panels, ("cpu_us_per_step", "cpu_us_per_token"), strict=True):
        axes.bar(names, [row[value] for row in rows])
        axes.set(ylabel=value.replace("_", " "))
        axes.tick_params(axis="x", labelsize=6)
    figure.suptitle("what simulating costs")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
