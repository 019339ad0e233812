"""How prefill and decode should share one device: chunked prefill, static splits, overlap, semi-PD's controller, auto.

The real engine, scheduler and controllers run on the simulated device in virtual time, so the figures are SIMULATED:
they compare policies under one cost model, and are no promise for any device. Traces: files with arrival_s,
input_tokens, output_tokens (CSV, also .gz), such as Azure's; the last one is cut from those given, prompt-heavy, then
generation-heavy, then prompt-heavy again.

    python benchmarks/phases.py TRACE [TRACE ...] [--quick] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np

from weft.bench import traces, traffic
from weft.bench.stats import Record, Slo, Summary, summarise
from weft.core.plan import Capacity, Partition, Regime, Sharing
from weft.core.request import Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices.cost import CostModel
from weft.devices.virtual import VirtualDevice
from weft.errors import QueueFull
from weft.loop.engine import Engine
from weft.phases.auto import AutoPolicy
from weft.phases.controller import Controller, FixedPolicy, Policy
from weft.phases.forecast import Device as Forecast
from weft.phases.observations import Targets
from weft.phases.paper import PaperPolicy

# A model of 8 billion 16-bit weights on an accelerator of 2 TB/s and some 190 usable TFLOP/s; half of its cores fill
# the memory's bandwidth.
COST = CostModel(fixed=1e-3, per_token=85e-6, per_context=65e-9, weights=8e-3, saturation=0.5, contention=0.2)
SHARES = 12
LONGEST = 8192
CAPACITY = Capacity(
    blocks=16384, block_size=16, max_tokens=2048, max_slices=256, shares=SHARES, max_model_len=LONGEST, vocabulary=512
)
# Of one request alone: some 8 times its TTFT, and twice its TPOT. Tighter than the paper's 10 times for TPOT.
TARGETS = Targets(ttft=1.0, tpot=0.025)
LONE = ("split 6:6", "split 8:4")
CHUNKS = (64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class Contestant:
    """policy: makes the policy anew for each run. lone: whether a lane alone gets the whole device."""

    name: str
    policy: Callable[[], Policy]
    lone: bool = False


def contestants() -> list[Contestant]:
    whole = Partition(SHARES, SHARES)
    splits = [Partition(unit, SHARES - unit) for unit in range(2, SHARES - 1, 2)]
    ways = {f"chunk {chunk}": Sharing(Regime.MIXED, whole, chunk) for chunk in CHUNKS}
    ways |= {f"split {one.prefill}:{one.decode}": Sharing(Regime.SPLIT, one) for one in splits}
    ways |= {"overlap": Sharing(Regime.SPLIT, whole)}
    found = [Contestant(name, partial(FixedPolicy, way)) for name, way in ways.items()]
    # A split that lets a lane alone have the whole device, which the paper's caps do not.
    found += [Contestant(f"{name} lone", partial(FixedPolicy, ways[name]), lone=True) for name in LONE]
    found.append(Contestant("paper", partial(PaperPolicy, TARGETS, SHARES)))
    device = Forecast(SHARES, CAPACITY.max_tokens, CAPACITY.max_slices)
    found.append(Contestant("auto", partial(AutoPolicy, TARGETS, device), lone=True))
    return found


def serve(one: Contestant, shots: Sequence[traffic.Shot]) -> tuple[list[Record], int]:
    """One record for each request, and how often the shares changed. In virtual time."""
    device = VirtualDevice(CAPACITY, Partition(SHARES, SHARES), cost=COST)
    given = SchedulerSettings(
        CAPACITY.max_slices, CAPACITY.max_tokens, max_num_queued_reqs=10**6, enable_prefix_caching=False
    )
    scheduler = Scheduler(CAPACITY, device.lanes(), given)
    controller = Controller(one.policy(), lone=one.lone)
    engine = Engine(device, scheduler, device.clock, step_timeout=None, controller=controller)
    times: dict[str, list[float]] = {}
    records: dict[str, Record] = {}
    at = 0
    while at < len(shots) or not engine.idle:
        now = device.clock()
        while at < len(shots) and shots[at].due <= now + 1e-9:
            _submit(engine, str(at), shots[at], records)
            at += 1
        left = max(shots[at].due - now, 0.0) if at < len(shots) else None
        for event in engine.step(left):
            if isinstance(event, TokenOutput) and event.token is not None:
                times.setdefault(event.request, []).append(device.clock())
            elif isinstance(event, RequestEnd):
                shot = shots[int(event.request)]
                seen = times.pop(event.request, [])
                records[event.request] = Record(
                    shot.due, shot.due, seen[0] if seen else None, seen[-1] if seen else None, device.clock(),
                    shot.input_tokens, len(seen), error=event.error,
                )  # fmt: skip
    return [records[str(index)] for index in range(len(shots))], engine.stats().partition_switches


def _submit(engine: Engine, name: str, shot: traffic.Shot, records: dict[str, Record]) -> None:
    params = SamplingParams(max_tokens=shot.output_tokens, ignore_eos=True)
    try:
        engine.submit(Request(name, tuple(shot.prompt), params))  # type: ignore[arg-type]
    except QueueFull as error:
        records[name] = Record(shot.due, shot.due, None, None, shot.due, shot.input_tokens, 0, error=error.message)


def trace_of(path: Path, seconds: float, rate: float) -> tuple[list[float], list[traces.Size]]:
    """The first part of a trace, `rate` times as fast, as long as `seconds`, cut to the context of the model."""
    rows = [row for row in traces.read_trace(path) if row[0] <= seconds * rate]
    due, sizes = traces.scale_trace(rows, len(rows), rate, 1.0)
    return due, traces.clip(sizes, LONGEST - 1100, 1000)[0]


def changing(seconds: float, rng: np.random.Generator) -> tuple[list[float], list[traces.Size]]:
    """Prompt-heavy, generation-heavy, prompt-heavy: a third of the time each. Poisson arrivals."""
    due: list[float] = []
    sizes: list[traces.Size] = []
    for part, (rate, read, written) in enumerate(((4.0, 2000, 40), (8.0, 150, 300), (4.0, 2000, 40))):
        count = int(rate * seconds / 3)
        due += [part * seconds / 3 + one for one in traffic.arrivals(count, rate, 1.0, rng)]
        sizes += traffic.random_sizes(count, read, written, 0.5, rng)
    order = sorted(range(len(due)), key=lambda index: due[index])
    return [due[index] for index in order], [sizes[index] for index in order]


def row(trace: str, rate: float, one: Contestant, found: Summary, switches: int) -> dict[str, Any]:
    return {
        "trace": trace, "rate": rate, "policy": one.name, "requests": found.completed,
        "ttft_p50": found.ttft.p50, "ttft_p90": found.ttft.p90, "ttft_p99": found.ttft.p99,
        "tpot_p50": found.tpot.p50, "tpot_p90": found.tpot.p90, "tpot_p99": found.tpot.p99,
        "attainment": found.attainment, "goodput": found.goodput, "switches": switches,
    }  # fmt: skip


def show(rows: Sequence[dict[str, Any]]) -> str:
    head = ("policy", "TTFT P50", "P90", "P99 s", "TPOT P50", "P90", "P99 ms", "in target", "goodput/s", "switches")
    return common.table(
        head,
        [
            (
                one["policy"],
                *(f"{one[f'ttft_p{p}']:.2f}" for p in (50, 90, 99)),
                *(f"{1e3 * one[f'tpot_p{p}']:.1f}" for p in (50, 90, 99)),
                f"{one['attainment']:.1%}",
                f"{one['goodput']:.2f}",
                one["switches"],
            )
            for one in rows
        ],
    )


def claims_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """auto against the best that stays the same, and against the best chunk, by attainment; the least of all loads."""
    ratios: dict[str, list[float]] = {"best_fixed": [], "best_chunk": [], "changing": []}
    for key in {(one["trace"], one["rate"]) for one in rows}:
        here = [one for one in rows if (one["trace"], one["rate"]) == key]
        auto = next(one["attainment"] for one in here if one["policy"] == "auto")
        fixed = [one for one in here if one["policy"] not in ("auto", "paper")]
        best = max(one["attainment"] for one in fixed)
        chunk = max(one["attainment"] for one in fixed if one["policy"].startswith("chunk"))
        ratios["changing" if key[0] == "changing" else "best_fixed"].append(auto / max(best, 1e-9))
        ratios["best_chunk"].append(auto / max(chunk, 1e-9))
    return {f"simulated_auto_vs_{name}": min(values) for name, values in ratios.items() if values}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({one["trace"] for one in rows})
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        here = [one for one in rows if one["trace"] == name]
        policies = list(dict.fromkeys(one["policy"] for one in here))
        for policy in policies:
            line = [(one["rate"], one["attainment"]) for one in here if one["policy"] == policy]
            wide = 2.5 if policy == "auto" else 1.0
            axis.plot(*zip(*line, strict=True), marker="o", label=policy, linewidth=wide, markersize=3)
        axis.set_title(f"{name} (simulated)")
        axis.set_xlabel("rate, times the trace's")
    axes[0][0].set_ylabel("requests within both targets")
    axes[0][-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE", help="CSV files; default: the changing load")
    parser.add_argument("--seconds", type=float, help="of virtual time; default 300, 45 with --quick")
    parser.add_argument("--rates", type=float, nargs="+", help="times the trace's rate; default 0.8 1.1 1.4; 1.1 quick")
    parser.add_argument("--only", nargs="+", metavar="POLICY", help="such as auto 'chunk 256'")
    parser.add_argument("--log", action="store_true", help="print every decision")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("weft.partition").setLevel(logging.INFO if arguments.log else logging.WARNING)
    rows = run(arguments)
    claims = {} if arguments.only else claims_of(rows)
    notes = [f"SIMULATED: {COST}, {SHARES} shares, targets TTFT {TARGETS.ttft:g} s and TPOT {TARGETS.tpot:g} s"]
    if arguments.plot is not None:
        draw(rows, arguments.plot)
    common.report(arguments, claims, rows, notes)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    seconds = arguments.seconds or (45.0 if arguments.quick else 300.0)
    rates = arguments.rates or ([1.1] if arguments.quick else [0.8, 1.1, 1.4])
    rows: list[dict[str, Any]] = []
    for name in [*arguments.traces, "changing"]:
        for rate in rates:
            rng = np.random.default_rng(5)
            due, sizes = changing(seconds, rng) if name == "changing" else trace_of(name, seconds, rate)
            if name == "changing":
                due = [one / rate for one in due]
            shots = [
                replace(one, output_tokens=max(1, one.output_tokens))
                for one in traffic.shots(due, sizes, CAPACITY.vocabulary, 0, rng)
            ]
            label = name if isinstance(name, str) else name.name.split(".")[0]
            here = []
            for one in contestants():
                if arguments.only and one.name not in arguments.only:
                    continue
                records, switches = serve(one, shots)
                found = summarise(records, Slo(TARGETS.ttft, TARGETS.tpot))
                here.append(row(label, rate, one, found, switches))
            print(f"\n{label}, {rate:g} times its rate: {len(shots)} requests in {due[-1]:.0f} s (simulated)")
            print(show(here), flush=True)
            rows += here
    return rows


if __name__ == "__main__":
    main()
