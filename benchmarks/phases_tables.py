"""Rows, claims and pictures of benchmarks/phases.py: the same for the simulated device and for a real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from phases_loads import CHANGING

from weft.bench.stats import Summary

Row = dict[str, Any]
Cell = tuple[str, str, float | str]  # device, load and rate
# The kinds of policies that stay the same on one device.
FIXED = ("chunk", "split", "overlap", "turns")
LEAST = 1e-9
ALL = "all"  # in place of a rate: all of a load's together
WANTED = 1.1  # times as good as every fixed policy is what auto should be where the mix changes


@dataclass(frozen=True, slots=True)
class Found:
    """What a contest came to. targets: of TTFT and TPOT, by device."""

    rows: list[Row]
    claims: dict[str, float]
    notes: list[str]
    targets: dict[str, tuple[float, float]]


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


def in_order(rows: Sequence[Row]) -> list[Row]:
    """By device and load as they come; within these by kind, and chunks by size."""
    kinds, places = (*FIXED, "pd", "paper", "auto"), list(cells(rows))

    def key(one: Row) -> tuple[int, int, int]:
        kind = kinds.index(one["kind"]) if one["kind"] in kinds else len(kinds)
        size = int(one["policy"].split()[-1]) if one["kind"] == "chunk" else 0
        return places.index((one["device"], one["trace"], one["rate"])), kind, size

    return sorted(rows, key=key)


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


def cells(rows: Sequence[Row]) -> dict[Cell, list[Row]]:
    """The rows of every load at every rate on every device."""
    found: dict[Cell, list[Row]] = {}
    for one in rows:
        found.setdefault((one["device"], one["trace"], one["rate"]), []).append(one)
    return found


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Rows with rounds, those of all rates of a load in one: in as many requests as that, the best of several policies
    is no longer the luckiest. One policy has to do for all of them, as an operator would have it."""
    found: dict[tuple[str, str, str], Row] = {}
    for one in rows:
        key = one["device"], one["trace"], one["policy"]
        whole = found.setdefault(key, {name: one[name] for name in ("device", "trace", "policy", "kind")})
        whole.setdefault("rounds", {}).update({(one["rate"], turn): met for turn, met in one["rounds"].items()})
    for whole in found.values():
        met, count = (sum(values) for values in zip(*whole["rounds"].values(), strict=True))
        whole |= {"rate": ALL, "requests": count, "attainment": met / max(count, 1)}
    return list(found.values())


def ratios(rows: Sequence[Row], against: Callable[[Row], bool]) -> dict[Cell, float]:
    """auto's attainment over the best of those, in every cell that has them."""
    found = {}
    for cell, here in cells(rows).items():
        beside = [ratio(auto, one) for auto in here if auto["policy"] == "auto" for one in here if against(one)]
        if beside:
            found[cell] = min(beside)
    return found


def ratio(auto: Row, other: Row) -> float:
    """auto's attainment over another's, with the same requests: in the rounds that both were in. None within the
    targets counts as half a request, so that there is a ratio."""
    if "rounds" not in other:  # on a simulated device there is one
        return _attained(auto) / _attained(other)
    both = [key for key in other["rounds"] if key in auto["rounds"]]
    ours, theirs = ([one["rounds"][key][0] for key in both] for one in (auto, other))
    return max(sum(ours), 0.5) / max(sum(theirs), 0.5)


def _attained(one: Row) -> float:
    return max(float(one["attainment"]), 0.5 / one["requests"])


def claims(rows: Sequence[Row], prefix: str = "") -> dict[str, float]:
    """The least over all cells, those of the load that changes apart: there only of rates at which no fixed policy does
    so well that nothing could be much better, unless there are no such rates. *_fixed: best chunk, every static split,
    overlap and turns, chosen in hindsight cell by cell. *_pd: disaggregation, for each of its devices."""
    kinds: Mapping[str, Callable[[Row], bool]] = {
        "auto_vs_best_fixed": lambda one: one["kind"] in FIXED,
        "auto_vs_best_chunk": lambda one: one["kind"] == "chunk",
        "auto_vs_best_split": lambda one: one["kind"] == "split",
        "auto_vs_paper": lambda one: one["kind"] == "paper",
        "auto_vs_pd": lambda one: one["kind"] == "pd",
    }
    found = {}
    full = _without_room(rows)
    for name, against in kinds.items():
        known = ratios(rows, against)
        changing = {cell: value for cell, value in known.items() if cell[1] == CHANGING}
        for part, values in (
            ("", [value for cell, value in known.items() if cell not in changing]),
            ("_changing", [value for cell, value in changing.items() if cell not in full] or list(changing.values())),
        ):
            if values:
                found[f"{prefix}{name}{part}"] = min(values)
    if (before := f"{prefix}auto_vs_best_fixed_changing") in found:
        found[f"{prefix}auto_vs_every_fixed_changing"] = found.pop(before)
    return found


def no_room(rows: Sequence[Row]) -> list[str]:
    """Where the mix changes and a fixed policy still does so well that none could be WANTED times better: notes."""
    return [
        f"{device}, {trace} at {_rate(rate)}: {best['policy']} has {best['attainment']:.1%} in target, so that nothing "
        f"could be {WANTED:g} times better"
        for (device, trace, rate), best in _without_room(rows).items()
    ]


def _rate(rate: float | str) -> str:
    return "all its rates" if rate == ALL else f"{rate:g}"


def _without_room(rows: Sequence[Row]) -> dict[Cell, Row]:
    """Those cells, each with its best fixed policy."""
    found = {}
    for (device, trace, rate), here in cells(rows).items():
        most = max((len(one.get("rounds", ())) for one in here), default=0)
        fixed = [one for one in here if one["kind"] in FIXED and len(one.get("rounds", ())) == most]
        if trace == CHANGING and fixed:
            best = max(fixed, key=_attained)
            if _attained(best) * WANTED > 1.0:
                found[device, trace, rate] = best
    return found


def against_best(rows: Sequence[Row]) -> list[str]:
    """One line for each cell: auto, and the best of those that stay the same."""
    found = []
    for (device, trace, rate), here in cells(rows).items():
        auto = next((one for one in here if one["policy"] == "auto"), None)
        fixed = [one for one in here if one["kind"] in FIXED]
        if auto is not None and fixed:
            best = min(fixed, key=lambda one: ratio(auto, one))
            rounds = f" in {len(best['rounds'])} pieces" if "rounds" in best else ""
            found.append(
                f"{device}, {trace} at {_rate(rate)}: auto {auto['attainment']:.1%}, {best['policy']} "
                f"{best['attainment']:.1%}{rounds}: {ratio(auto, best):.2f}"
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
            name = "auto_vs_chosen_before" + ("_changing" if cell[1] == CHANGING else "")
            found.setdefault(f"{prefix}{name}", []).append(values["auto"] / values[best[cell]])
    return {name: min(values) for name, values in found.items()}


def draw(rows: Sequence[Row], path: Path, targets: Mapping[str, tuple[float, float]]) -> None:
    """One column for each device and load: attainment, goodput, P90 of TTFT and of TPOT, against the rate; bars where
    there is one rate. targets: of TTFT and TPOT, by device."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(_of(one) for one in rows))
    values = (("attainment", "in target"), ("goodput", "goodput (requests/s)"))
    values += (("ttft_p90", "P90 TTFT (s)"), ("tpot_p90", "P90 TPOT (s)"))
    figure = Figure(figsize=(3.4 * len(names) + 2, 12), layout="constrained")
    panels: Any = figure.subplots(len(values), len(names), squeeze=False)
    rates = [{one["rate"] for one in rows if _of(one) == name} for name in names]
    several = [column for column, here in enumerate(rates) if len(here) > 1]
    for column, (device, trace) in enumerate(names):
        here, one_rate = [one for one in rows if _of(one) == (device, trace)], column not in several
        for line, (value, words) in enumerate(values):
            axes = panels[line, column]
            (_bars if one_rate else _lines)(axes, here, value)
            if line >= 2:
                axes.axhline(targets[device][line - 2], color="black", linewidth=0.8, linestyle=":")
                axes.set_yscale("log")  # has something to scale by now, even where no answer has two tokens
            axes.set(xlabel="" if one_rate else "rate, times the load's", ylabel=words if column == 0 else "")
        panels[0, column].set_title(f"{trace}\n({device})", fontsize=9)
    if several:
        lines, policies = panels[0, several[-1]].get_legend_handles_labels()
        figure.legend(lines, policies, fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=90)


def _of(one: Row) -> tuple[str, str]:
    return one["device"], one["trace"]


def _lines(axes: Any, rows: Sequence[Row], value: str) -> None:
    for policy in dict.fromkeys(one["policy"] for one in rows):
        points = sorted((one["rate"], one[value]) for one in rows if one["policy"] == policy)
        wide = 2.5 if policy == "auto" else 1.0
        axes.plot(*zip(*points, strict=True), marker="o", label=policy, linewidth=wide, markersize=3)


def _bars(axes: Any, rows: Sequence[Row], value: str) -> None:
    names = [one["policy"] for one in rows]
    colours = ["tab:orange" if name == "auto" else "tab:blue" for name in names]
    axes.bar(range(len(names)), [one[value] for one in rows], color=colours)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
