"""What came of simulated runs: tables for people, JSON for programs, and a picture. Each says that it is simulated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from weft.bench.plot import require_picture
from weft.bench.report import finite
from weft.bench.stats import Slo, Spread
from weft.errors import ConfigError
from weft.sim.study import Outcome

SIMULATED = "simulated: virtual time on devices that exist on paper"


@dataclass(frozen=True, slots=True)
class Run:
    """rate: what the load was scaled by. words: what the run was."""

    rate: float
    words: str
    outcome: Outcome


def print_runs(runs: Sequence[Run], slo: Slo, console: Console) -> None:
    """Two lines for each run: throughput and goodput, and latencies."""
    served = Table("rate", "requests/s", "goodput/s", "in target", "failed", "out tok/s", "cached", "KV most", box=None)
    latencies = Table("rate", *_heads("TTFT", "s"), *_heads("TPOT", "ms"), box=None)
    for column in (*served.columns, *latencies.columns):
        column.justify = "right"
    for run in runs:
        totals = run.outcome.totals
        kv = max(run.outcome.timeline.kv, default=math.nan)
        served.add_row(
            f"{run.rate:g}", f"{totals.request_rate:.2f}", f"{totals.goodput:.2f}", f"{totals.attainment:.1%}",
            f"{totals.failed}", f"{totals.output_rate:.0f}", f"{run.outcome.cached:.0%}", _number(kv * 100, 0) + "%",
        )  # fmt: skip
        latencies.add_row(f"{run.rate:g}", *_cells(totals.ttft, 1.0, 3), *_cells(totals.tpot, 1e3, 1))
    console.print(f"{SIMULATED}\ntargets: {_targets(slo)}", markup=False, highlight=False)
    console.print(served)
    console.print(latencies)
    for run in runs:
        for reason, count in run.outcome.totals.errors:
            console.print(f"rate {run.rate:g}: {count} requests failed: {reason}", markup=False, highlight=False)
        if run.outcome.retried:
            console.print(f"rate {run.rate:g}: {run.outcome.retried} requests went on elsewhere", highlight=False)


def as_json(settings: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """{"simulated": true, "settings", "runs": [...]}; seconds, NaN as null."""
    content: dict[str, Any] = finite({"simulated": True, "settings": dict(settings), "runs": [*map(_row, runs)]})
    return content


def plot(runs: Sequence[Run], title: str, path: Path) -> None:
    """Latencies, goodput against rate, and how lanes and KV pool were used over time. Raises ConfigError."""
    require_picture(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    panels: Any = figure.subplots(2, 3)
    _curves(panels[0, 0], "TTFT (s)", [(run, run.outcome.tally.ttft) for run in runs])
    _curves(panels[0, 1], "TPOT (s)", [(run, run.outcome.tally.tpot) for run in runs])
    _goodput(panels[0, 2], runs)
    last = runs[-1]
    _lanes(panels[1, 0], last, "share of the device", last.outcome.timeline.share)
    _lanes(panels[1, 1], last, "part of the time busy", last.outcome.timeline.busy)
    for run in runs:
        panels[1, 2].plot(run.outcome.timeline.at, run.outcome.timeline.kv, label=f"rate {run.rate:g}", linewidth=1)
    panels[1, 2].set(xlabel="seconds", ylabel="KV pool held", ylim=(0, 1.02))
    panels[1, 2].legend(fontsize=7)
    figure.suptitle(f"{title} ({SIMULATED})", fontsize=9)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from error


def _row(run: Run) -> dict[str, Any]:
    outcome = run.outcome
    line = outcome.timeline
    return {
        "rate": run.rate,
        "words": run.words,
        **asdict(outcome.totals),
        "steps": outcome.steps,
        "step_tokens": outcome.step_tokens,
        "preemptions": outcome.preemptions,
        "cached": outcome.cached,
        "partition_switches": outcome.switches,
        "retried": outcome.retried,
        "wall_seconds": outcome.wall,
        "timeline": {
            "at": list(line.at),
            "share": {lane.value: list(values) for lane, values in line.share.items()},
            "busy": {lane.value: list(values) for lane, values in line.busy.items()},
            "kv": list(line.kv),
            "running": list(line.running),
            "waiting": list(line.waiting),
        },
    }


def _curves(axes: Any, name: str, sketches: Sequence[tuple[Run, Any]]) -> None:
    axes.set(xlabel=name, ylabel="part of the requests", ylim=(0, 1.02), xscale="log")
    axes.grid(alpha=0.3)
    for run, sketch in sketches:
        axes.step(*sketch.curve(), where="post", label=f"rate {run.rate:g}", linewidth=1)
    axes.legend(fontsize=7)


def _goodput(axes: Any, runs: Sequence[Run]) -> None:
    rates = [run.rate for run in runs]
    axes.plot(rates, [run.outcome.totals.request_rate for run in runs], "o-", label="completed", linewidth=1)
    axes.plot(rates, [run.outcome.totals.goodput for run in runs], "o-", label="within targets", linewidth=1)
    axes.set(xlabel="rate", ylabel="requests/s", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _lanes(axes: Any, run: Run, name: str, lanes: Mapping[Any, Sequence[float]]) -> None:
    for lane, values in lanes.items():
        axes.step(run.outcome.timeline.at, values, where="post", label=lane.value, linewidth=1)
    axes.set(xlabel="seconds", ylabel=f"{name}, rate {run.rate:g}", ylim=(0, 1.1))
    axes.legend(fontsize=7)


def _heads(name: str, unit: str) -> tuple[str, ...]:
    return f"{name} P50", "P90", f"P99 {unit}"


def _cells(values: Spread, factor: float, digits: int) -> tuple[str, ...]:
    return tuple(_number(value * factor, digits) for value in (values.p50, values.p90, values.p99))


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _targets(slo: Slo) -> str:
    given = [f"{name} {value:g} s" for name, value in (("TTFT", slo.ttft), ("TPOT", slo.tpot)) if value is not None]
    return ", ".join(given) or "none"
