"""Tables, sentences and the picture of benchmarks/union.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import common

from weft.sim.tally import Totals

PARTS = ("phases", "weave", "comet")


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination on one GPU and trace. factor: of the trace's own rate, the highest that met the targets; rate:
    the same in requests/s. tokens: most in a step, of the best; totals: at that rate; None where no rate met them.
    runs: that it took to find."""

    gpu: str
    trace: str
    combination: str
    factor: float
    rate: float
    tokens: int
    totals: Totals | None
    runs: int

    def row(self) -> dict[str, Any]:
        totals = self.totals
        return {
            "gpu": self.gpu, "trace": self.trace, "combination": self.combination, "factor": self.factor,
            "goodput": self.rate, "step_tokens": self.tokens, "runs": self.runs,
            **({} if totals is None else {
                "attainment": totals.attainment, "ttft_p50": totals.ttft.p50, "ttft_p90": totals.ttft.p90,
                "tpot_p50": totals.tpot.p50, "tpot_p90": totals.tpot.p90, "output_rate": totals.output_rate,
            }),
        }  # fmt: skip


Group = dict[frozenset[str], Cell]


def grouped(cells: Sequence[Cell]) -> dict[tuple[str, str], Group]:
    """(GPU, trace) -> what is on -> cell."""
    found: dict[tuple[str, str], Group] = {}
    for cell in cells:
        on = frozenset(cell.combination.split(" + ")) - {"none"}
        found.setdefault((cell.gpu, cell.trace), {})[on] = cell
    return found


def show(cells: Sequence[Cell]) -> str:
    """A table for each GPU and trace, and one of what each part gives."""
    head = ("goodput/s", "x none", "step", "TTFT P50", "P90 s", "TPOT P50", "P90 ms")
    tables = []
    for (gpu, trace), group in grouped(cells).items():
        none = group[frozenset()].rate
        lines = [_line(cell, none) for cell in group.values()]
        tables.append(common.table((f"{gpu}, {trace} (simulated)", *head), lines))
    return "\n\n".join([*tables, effects(cells)]) + "\n"


def _line(cell: Cell, none: float) -> tuple[object, ...]:
    times = "-" if not none else f"{cell.rate / none:.2f}"
    if cell.totals is None:
        return cell.combination, "0", times, "-", "-", "-", "-", "-"
    ttft, tpot = cell.totals.ttft, cell.totals.tpot
    return (
        cell.combination, f"{cell.rate:.2f}", times, cell.tokens, f"{ttft.p50:.2f}", f"{ttft.p90:.2f}",
        f"{1e3 * tpot.p50:.1f}", f"{1e3 * tpot.p90:.1f}",
    )  # fmt: skip


def effects(cells: Sequence[Cell]) -> str:
    """How much each part gives alone and on top of the two others, and how the pairs go together."""
    pairs = list(combinations(PARTS, 2))
    head = [words for name in PARTS for words in (f"{name} alone", "on top")]
    head += [f"{one} + {other}" for one, other in pairs]
    lines = []
    for (gpu, trace), group in grouped(cells).items():
        line = [f"x{value:.2f}" for name in PARTS for value in (gain(group, name), gain(group, name, _others(name)))]
        lines.append((f"{gpu}, {trace}", *line, *(f"x{together(group, *pair):.2f}" for pair in pairs)))
    return common.table(("what each gives (simulated)", *head), lines)


def gain(group: Group, name: str, beside: frozenset[str] = frozenset()) -> float:
    """Goodput with the part over that without it; NaN where there is none without it."""
    before = group[beside].rate
    return group[beside | {name}].rate / before if before else math.nan


def together(group: Group, one: str, other: str) -> float:
    """What one gives beside the other, over what it gives alone: more than 1 where they help each other; NaN where one
    of the rates is nothing."""
    alone = gain(group, one)
    return gain(group, one, frozenset({other})) / alone if alone else math.nan


def _others(name: str) -> frozenset[str]:
    return frozenset(PARTS) - {name}


def findings(cells: Sequence[Cell], close: float) -> Iterator[str]:
    """What the table says, in sentences. close: rates that are no further apart are the same."""
    for (gpu, trace), group in grouped(cells).items():
        where = f"{gpu}, {trace}"
        for name in PARTS:
            alone, top = gain(group, name), gain(group, name, _others(name))
            if top < 1 / close:
                yield f"{where}: {name} costs goodput on top of the others (x{top:.2f}; alone x{alone:.2f})"
            elif top <= close:
                yield f"{where}: {name} adds nothing on top of the others (x{top:.2f}; alone x{alone:.2f})"
        for one, other in combinations(PARTS, 2):
            both = together(group, one, other)
            if both > close**2 or both < 1 / close**2:
                verb = "help each other" if both > 1 else "take from each other"
                yield f"{where}: {one} and {other} {verb} (x{both:.2f} of what each gives alone)"


def claims(cells: Sequence[Cell]) -> dict[str, float]:
    """All three over none of them, over the best one alone and over the best two."""
    found = {}
    for (gpu, trace), group in grouped(cells).items():
        name, whole = f"union_{gpu}_{trace}".replace("-", "_"), group[frozenset(PARTS)].rate
        best = [max(cell.rate for on, cell in group.items() if len(on) == count) for count in range(3)]
        for words, rate in zip(("none", "best_one", "best_two"), best, strict=True):
            found[f"{name}_over_{words}"] = whole / rate if rate else math.nan
    return found


def draw(cells: Sequence[Cell], path: Path) -> None:
    from matplotlib.figure import Figure

    groups = grouped(cells)
    figure = Figure(figsize=(4.2 * len(groups), 3.6), layout="constrained")
    panels: Any = figure.subplots(1, len(groups), squeeze=False)
    for axes, ((gpu, trace), group) in zip(panels[0], groups.items(), strict=True):
        names = [cell.combination.replace(" + ", "\n") for cell in group.values()]
        bars = axes.bar(names, [cell.rate for cell in group.values()])
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
        axes.set(title=f"{gpu}, {trace}", ylabel="requests/s within the targets")
        axes.tick_params(axis="x", labelsize=6)
    figure.suptitle("phases, weave and comet, Llama-3-70B on eight GPUs (simulated)", fontsize=9)
    figure.savefig(path, dpi=110)
