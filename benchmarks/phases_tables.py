"""Rows, claims and pictures of benchmarks/phases.py: the same for the simulated device and for a real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from phases_loads import CHANGING

from weft.bench.stats import Summary

Row = dict[str, Any]
# Fixed policies of the paper and its baselines; others go beyond them, and are compared with apart.
FIXED = ("chunk", "split", "overlap")
BEYOND = (*FIXED, "turns", "lone", "ordered")
LEAST = 1e-9


def row(device: str, load: str, rate: float, name: str, kind: str, found: Summary, switches: int | None) -> Row:
    """rate: a factor of the load's own rate. attainment: of all requests, refused ones too. goodput: requests/s."""
    return {
        "device": device, "trace": load, "rate": rate, "policy": name, "kind": kind,
        "requests": found.completed + found.failed, "failed": found.failed, "errors": dict(found.errors),
        "offered": (found.completed + found.failed) / max(found.duration, LEAST),
        "ttft_p50": found.ttft.p50, "ttft_p90": found.ttft.p90, "ttft_p99": found.ttft.p99,
        "tpot_p50": found.tpot.p50, "tpot_p90": found.tpot.p90, "tpot_p99": found.tpot.p99,
        "attainment": found.attainment, "goodput": found.goodput, "switches": switches,
    }  # fmt: skip


def show(rows: Sequence[Row]) -> str:
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
                "-" if one["switches"] is None else one["switches"],
            )
            for one in rows
        ],
    )


def cells(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    """The rows of every load at every rate."""
    found: dict[tuple[str, float], list[Row]] = {}
    for one in rows:
        found.setdefault((one["trace"], one["rate"]), []).append(one)
    return found


def ratios(rows: Sequence[Row], against: Callable[[Row], bool]) -> dict[tuple[str, float], float]:
    """auto's attainment over the best of those, in every cell that has them. None within the targets counts as half a
    request, so that there is a ratio."""
    found = {}
    for cell, here in cells(rows).items():
        auto = [_attained(one) for one in here if one["policy"] == "auto"]
        others = [_attained(one) for one in here if against(one)]
        if auto and others:
            found[cell] = auto[0] / max(others)
    return found


def _attained(one: Row) -> float:
    return max(float(one["attainment"]), 0.5 / one["requests"])


def claims(rows: Sequence[Row], prefix: str = "") -> dict[str, float]:
    """The least over all cells. *_fixed: best chunk, every static split, overlap, chosen in hindsight cell by cell;
    *_ordered: those that take turns, order the queue, or let a lane alone have the device, too, which no rival does.
    *_pd: disaggregation, for each of its devices."""
    kinds: Mapping[str, Callable[[Row], bool]] = {
        "auto_vs_best_fixed": lambda one: one["kind"] in FIXED,
        "auto_vs_best_chunk": lambda one: one["kind"] == "chunk",
        "auto_vs_best_ordered": lambda one: one["kind"] in BEYOND,
        "auto_vs_paper": lambda one: one["kind"] == "paper",
        "auto_vs_pd": lambda one: one["kind"] == "pd",
    }
    found = {}
    for name, against in kinds.items():
        known = ratios(rows, against)
        for part, values in (
            ("", [value for (trace, _), value in known.items() if trace != CHANGING]),
            ("_changing", [value for (trace, _), value in known.items() if trace == CHANGING]),
        ):
            if values:
                found[f"{prefix}{name}{part}"] = min(values)
    changing = f"{prefix}auto_vs_best_fixed_changing"
    if changing in found:
        found[f"{prefix}auto_vs_every_fixed_changing"] = found.pop(changing)
    return found


def no_room(rows: Sequence[Row], wanted: float = 1.1) -> list[str]:
    """Where the mix changes and a fixed policy still does so well that none could be `wanted` times better: notes."""
    found = []
    for (trace, rate), here in cells(rows).items():
        fixed = [one for one in here if one["kind"] in FIXED]
        if trace == CHANGING and fixed:
            best = max(fixed, key=_attained)
            if _attained(best) * wanted > 1.0:
                found.append(
                    f"{trace} at {rate:g}: {best['policy']} has {best['attainment']:.1%} in target, so that nothing "
                    f"could be {wanted:g} times better"
                )
    return found


def chosen_elsewhere(tuned: Sequence[Row], reported: Sequence[Row], prefix: str = "") -> dict[str, float]:
    """auto against the fixed policy that was best on the other part of the same load: what an operator could choose."""
    best = {}
    for cell, here in cells(tuned).items():
        fixed = [one for one in here if one["kind"] in FIXED]
        if fixed:
            best[cell] = max(fixed, key=lambda one: one["attainment"])["policy"]
    found: dict[str, list[float]] = {}
    for cell, here in cells(reported).items():
        values = {one["policy"]: _attained(one) for one in here}
        if "auto" in values and best.get(cell) in values:
            name = "auto_vs_chosen_before" + ("_changing" if cell[0] == CHANGING else "")
            found.setdefault(f"{prefix}{name}", []).append(values["auto"] / values[best[cell]])
    return {name: min(values) for name, values in found.items()}


def draw(rows: Sequence[Row], path: Path, device: str, targets: tuple[float, float]) -> None:
    """One column a load: attainment, goodput, P90 of TTFT and of TPOT, against the rate."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one["trace"] for one in rows))
    values = (("attainment", "in target"), ("goodput", "goodput (requests/s)"))
    values += (("ttft_p90", "P90 TTFT (s)"), ("tpot_p90", "P90 TPOT (s)"))
    figure = Figure(figsize=(4 * len(names) + 2, 12), layout="constrained")
    panels: Any = figure.subplots(len(values), len(names), squeeze=False)
    for column, name in enumerate(names):
        for line, (value, words) in enumerate(values):
            axes = panels[line, column]
            _lines(axes, [one for one in rows if one["trace"] == name], value)
            if line >= 2:
                axes.set_yscale("log")
                axes.axhline(targets[line - 2], color="black", linewidth=0.8, linestyle=":")
            axes.set(xlabel="rate, times the load's", ylabel=words if column == 0 else "")
        panels[0, column].set_title(f"{name} ({device})")
    panels[0, -1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def _lines(axes: Any, rows: Sequence[Row], value: str) -> None:
    for policy in dict.fromkeys(one["policy"] for one in rows):
        points = sorted((one["rate"], one[value]) for one in rows if one["policy"] == policy)
        wide = 2.5 if policy == "auto" else 1.0
        axes.plot(*zip(*points, strict=True), marker="o", label=policy, linewidth=wide, markersize=3)
