"""Published times of whole engines beside what the simulator says of the same set-ups.

    python benchmarks/simulator_published.py [--quick] [--json FILE] [--plot FILE] [--doc FILE]

published.json has the figures as their sources print them, with the addresses, and says which points were chosen and
what was left out. No coefficient was fitted on any of them, or changed because of one. Steps, and batches that begin
and end together, come from StepCost; other runs go through weft's scheduler in virtual time, with the places and tokens
of a step that the engine had. Everything is compared as a time: a throughput is the seconds that its run takes, so that
an error above 0 means "simulated too slow". --quick leaves out runs of more than 1000 requests.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import common
import numpy as np
from paper_common import at_once, into_document, markdown, parser, setup

from weft.bench.stats import Slo
from weft.bench.traces import Size
from weft.sim.estimate import cost_of
from weft.sim.hardware import find_gpu
from weft.sim.models import find_model, read_model
from weft.sim.step import StepCost
from weft.sim.study import Fleet, study
from weft.sim.tally import Totals

FIGURES = Path(__file__).with_name("published.json")
KINDS = {
    "decode": "a step that decodes",
    "first": "first token",
    "run": "whole run",
    "run_ttft": "mean TTFT of a run",
    "run_tpot": "mean TPOT of a run",
}
KV = {16: "auto", 8: "int8"}  # weft's name for as many bits
QUICK = 1000  # requests
BAND = 20  # percent, of the picture
HEAD = ("", "source", "GPU", "model", "points", "published", "median error %", "errors %", "of the peak %")


@dataclass(frozen=True, slots=True)
class Load:
    """What is computed. batch: sequences that begin together. requests: all sent at once; 0: the batch is all there is.
    seats, tokens: most of each in one step. reserves: a request starts only where its full length fits."""

    gpu: str
    model: str
    precision: str
    kv: int
    tp: int
    batch: int
    requests: int
    input: int
    output: int
    seats: int
    tokens: int
    reserves: bool

    @property
    def sequences(self) -> int:
        return self.requests or self.batch


@dataclass(frozen=True, slots=True)
class Point:
    """seconds: as published. marked: far slower than others' figures on such a GPU, see the source's note."""

    source: str
    engine: str
    generation: int
    kind: str
    load: Load
    seconds: float
    marked: bool


def read_points(raw: Mapping[str, Any]) -> Iterator[Point]:
    for each in raw["points"]:
        source = raw["sources"][each["source"]]
        load = Load(
            gpu=each["gpu"], model=each["model"], precision=each["precision"], kv=each["kv"], tp=each["tp"],
            batch=each.get("batch", 0), requests=each.get("requests", 0), input=each["input"], output=each["output"],
            seats=source["seats"], tokens=source["tokens"], reserves=source.get("reserves", False),
        )  # fmt: skip
        engine = each.get("engine", source["engine"])
        for one in each["measured"]:
            seconds = measured(load, one, each["measured"])
            marked = source.get("marked", False)
            yield Point(each["source"], engine, source["generation"], one["kind"], load, seconds, marked)


def measured(load: Load, one: Mapping[str, Any], beside: Sequence[Mapping[str, Any]]) -> float:
    """A published figure in seconds. beside: all figures of its row; of a sequence alone, the throughput covers the
    first token, too."""
    value, unit = one["value"], one["unit"]
    if unit in ("s", "ms"):
        return float(value) / (1000 if unit == "ms" else 1)
    if unit == "tok/s decoding":
        return 1 / float(value)
    if one["kind"] == "decode":
        first = next(each["value"] for each in beside if each["kind"] == "first")  # seconds
        return float((load.output / value - first) / (load.output - 1))
    return float(load.sequences * load.output / (value * (load.tp if unit == "tok/s/GPU" else 1)))


@cache
def cost(gpu: str, model: str, precision: str, kv: int, tp: int) -> StepCost:
    shapes = json.loads(FIGURES.read_text())["models"]
    found = read_model(model, shapes[model]) if model in shapes else find_model(model)
    return cost_of(found, find_gpu(gpu), tp, precision, KV[kv])


def cost_at(load: Load) -> StepCost:
    return cost(load.gpu, load.model, load.precision, load.kv, load.tp)


def simulated(point: Point) -> float:
    """Seconds. A decoding sequence has half of its answer behind it."""
    load, one = point.load, cost_at(point.load)
    half = load.input + load.output // 2
    if point.kind == "decode":
        return one.whole([1] * load.batch, [half] * load.batch, load.batch)
    if point.kind == "first":  # the others decode beside it
        return one.whole([load.input] + [1] * (load.batch - 1), [0] + [half] * (load.batch - 1), load.batch)
    if not load.requests:
        return together(one, load)
    totals = serve(load)
    return {"run": totals.seconds, "run_ttft": totals.ttft.mean, "run_tpot": totals.tpot.mean}[point.kind]


def together(one: StepCost, load: Load) -> float:
    """Seconds of a batch whose prompts are one step, and whose sequences decode from then on to the last."""
    count = load.batch
    steps = (one.whole([1] * count, [load.input + made] * count, count) for made in range(load.output - 1))
    return one.whole([load.input] * count, [0] * count, count) + sum(steps)


@cache
def serve(load: Load) -> Totals:
    """A run from the first request to the end of the last, all sent at time 0."""
    one, longest = cost_at(load), load.input + load.output
    seats, kv = load.seats, KV[load.kv]
    made = setup(one, tokens=load.tokens, seats=seats, longest=longest + 1, kv_cache_dtype=kv)
    room = made.capacity.blocks // -(-longest // made.capacity.block_size)
    if load.reserves and room < seats:
        made = setup(one, tokens=load.tokens, seats=room, longest=longest + 1, kv_cache_dtype=kv)
    return study(Fleet(made), at_once([Size(load.input, load.output)] * load.requests), Slo()).totals


def peak_percent(load: Load, seconds: float) -> float:
    """How much of the GPUs' peak, in its own arithmetic, the products of a run make up."""
    one = cost_at(load)
    operations = 2 * one.model.parameters() * load.sequences * (load.input + load.output)
    return 100 * operations / (seconds * load.tp * one.precision.part(one.gpu, 1.0, 0.0).flops)


def row(point: Point) -> dict[str, Any]:
    load, found = point.load, simulated(point)
    keys = ("gpu", "model", "precision", "kv", "tp", "batch", "requests", "input", "output")
    return {
        "source": point.source, "engine": point.engine, "generation": point.generation, "kind": point.kind,
        **{key: getattr(load, key) for key in keys}, "marked": point.marked, "caveats": list(cost_at(load).caveats),
        "measured_ms": 1e3 * point.seconds, "simulated_ms": 1e3 * found,
        "error_percent": 100 * (found / point.seconds - 1),
        "peak_percent": peak_percent(load, point.seconds) if point.kind == "run" else None,
    }  # fmt: skip


def claims(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians of the absolute error in percent, by what was timed and by the engines' generation: 2023, and from 2025
    on. unmarked: without the sources that are marked."""
    found = {}
    for kind in KINDS:
        for generation in (2023, 2025):
            some = [one for one in rows if one["kind"] == kind and one["generation"] == generation]
            for name, part in (("", some), ("_unmarked", [one for one in some if not one["marked"]])):
                if part and (not name or len(part) < len(some)):
                    errors = [abs(one["error_percent"]) for one in part]
                    found[f"{kind}_{generation}{name}_median_percent"] = float(np.median(errors))
    return found


def groups(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line for each kind, source, GPU and model. Errors: least..greatest. Of the peak: as published."""
    split: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for kind in KINDS:
        for one in rows:
            if one["kind"] == kind:
                key = tuple(one[name] for name in ("kind", "source", "engine", "gpu", "model", "precision", "marked"))
                split.setdefault(key, []).append(one)
    return [_line(key, part) for key, part in split.items()]


def _line(key: tuple[Any, ...], part: Sequence[Mapping[str, Any]]) -> list[str]:
    kind, source, engine, gpu, model, precision, marked = key
    times, errors = [one["measured_ms"] for one in part], [one["error_percent"] for one in part]
    peaks = [one["peak_percent"] for one in part if one["peak_percent"] is not None]
    ranks = sorted({one["tp"] for one in part})
    many = "" if ranks == [1] else f" x {_range(ranks)}"
    return [
        KINDS[kind], f"{engine}, {source}{', marked' if marked else ''}", gpu + many,
        f"{model}, {precision}", str(len(part)), _range([_time(one) for one in (min(times), max(times))]),
        f"{np.median(errors):+.0f}", _range([f"{one:+.0f}" for one in (min(errors), max(errors))]),
        _range([f"{one:.0f}" for one in (min(peaks), max(peaks))]) if peaks else "-",
    ]  # fmt: skip


def _range(values: Sequence[object]) -> str:
    first, last = str(values[0]), str(values[-1])
    return first if first == last else f"{first}..{last}"


def _time(ms: float) -> str:
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.4g} s"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    times = [one[key] for one in rows for key in ("measured_ms", "simulated_ms")]
    line = np.array([min(times) / 1.5, max(times) * 1.5])
    axes.fill_between(line, line * (1 - BAND / 100), line * (1 + BAND / 100), color="lightgrey", label=f"±{BAND} %")
    axes.plot(line, line, color="black", linewidth=0.7)
    for (kind, title), shape in zip(KINDS.items(), "os^vD", strict=True):
        for generation, colour in ((2023, "tab:blue"), (2025, "tab:orange")):
            for marked, face in ((False, colour), (True, "none")):
                keys = kind, generation, marked
                some = [one for one in rows if (one["kind"], one["generation"], one["marked"]) == keys]
                label = f"{title}, {generation}{', marked' if marked else ''}" if some else None
                x, y = ([one[key] for one in some] for key in ("measured_ms", "simulated_ms"))
                axes.scatter(x, y, s=22, marker=shape, edgecolors=colour, facecolors=face, label=label)
    axes.set(xscale="log", yscale="log", xlabel="published, ms", ylabel="simulated, ms")
    axes.set_title("published times of whole engines, and the same set-ups simulated")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def notes(raw: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    said = [
        "The times beside the published ones are SIMULATED: no GPU was used, and no coefficient was changed for them."
    ]
    said += [f"{name}: {one['title']}, {one['version']}, {one['url']}" for name, one in raw["sources"].items()]
    said += [f"Left out: {one['source']}: {one['why']}." for one in raw["left_out"]]
    caveats = sorted({each for one in rows for each in one["caveats"]})
    return said + [f"Caveat: {each}." for each in caveats]


def main() -> None:
    arguments = _arguments()
    raw = json.loads(FIGURES.read_text())
    points = [one for one in read_points(raw) if not arguments.quick or one.load.requests <= QUICK]
    rows = [row(one) for one in points]
    lines = groups(rows)
    print(common.table(HEAD, lines))
    if arguments.plot is not None:
        draw(rows, arguments.plot)
    if arguments.doc is not None:
        into_document(arguments.doc, {"published": markdown(HEAD, lines)})
    common.report(arguments, claims(rows), rows, notes(raw, rows))


def _arguments() -> argparse.Namespace:
    return parser(__doc__.split("\n")[0]).parse_args()


if __name__ == "__main__":
    main()
