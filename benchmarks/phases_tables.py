"""Rows, claims and pictures of benchmarks/phases.py: the same for the simulated device and for a real one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from paper_common import markdown
from phases_loads import CHANGING

from weft.bench.stats import Summary

Row = dict[str, Any]
Cell = tuple[str, str, float | str]  # device, load and rate
# The kinds of policies that stay the same on one device.
FIXED = ("chunk", "split", "overlap", "turns")
LEAST = 1e-9
ALL = "all"  # in place of a rate: all of a load's together
ALL_ROUNDS = 0.9  # of the requests that auto had: who had as many was in all rounds
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


# What pictures and tables show of a load: auto, and of these kinds the policy that did best at all its rates together.
SHOWN = {
    "auto": ("auto",), "best chunk": ("chunk",), "best split": ("split",), "overlap or turns": ("overlap", "turns"),
    "paper": ("paper",), "pd": ("pd",), "llama-server": ("peer",),
}  # fmt: skip
LATENCIES = [(f"{what}_p{p}", what.upper(), p) for what in ("ttft", "tpot") for p in (50, 90, 99)]


def chosen(rows: Sequence[Row]) -> dict[str, str]:
    """Of one load on one device: the policies that are shown, by SHOWN."""
    by: dict[tuple[str, str], list[Row]] = {}
    for one in rows:
        by.setdefault((one["kind"], one["policy"]), []).append(one)
    auto = by.get(("auto", "auto"))
    worth = {key: _worth(here, auto or here) for key, here in by.items()}
    found = {}
    for name, kinds in SHOWN.items():
        if here := [key for key in by if key[0] in kinds]:
            found[name] = max(here, key=worth.__getitem__)[1]
    return found


def _worth(rows: Sequence[Row], auto: Sequence[Row]) -> tuple[float, float]:
    """How good a policy was at all its rates together, in the rounds that auto was in, too. Where these are not told,
    one that was in all of them is better than one that was not."""
    count, all_of = (sum(one["requests"] for one in part) for part in (rows, auto))
    part = sum(one["attainment"] * one["requests"] for one in rows) / max(count, 1)
    if all("rounds" in one for one in (*rows, *auto)):
        return 1.0 / ratio(pooled(auto)[0], pooled(rows)[0]), part
    return float(count >= ALL_ROUNDS * all_of), part


def draw(rows: Sequence[Row], path: Path, targets: Mapping[str, tuple[float, float]]) -> None:
    """A picture of each device: the first one's at `path`, those of others beside it, named after them."""
    for number, device in enumerate(dict.fromkeys(one["device"] for one in rows)):
        stem = f"{path.stem}_{device.replace(' ', '_')}" if number else path.stem
        _draw([one for one in rows if one["device"] == device], path.with_stem(stem), targets.get(device))


def _draw(rows: Sequence[Row], path: Path, targets: tuple[float, float] | None) -> None:
    """One column for each load: attainment, goodput, and P50, P90 and P99 of both latencies, against the rate; bars
    where there is one rate. targets: of TTFT and TPOT."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    loads = list(dict.fromkeys(one["trace"] for one in rows))
    values = [("attainment", "in target (part)"), ("goodput", "goodput\n(requests/s)")]
    values += [(value, f"{what} P{p} ({'s' if what == 'TTFT' else 'ms'})") for value, what, p in LATENCIES]
    figure = Figure(figsize=(3.0 * len(loads) + 0.6, 1.75 * len(values) + 0.8), layout="constrained")
    panels: Any = figure.subplots(len(values), len(loads), squeeze=False, sharex="col")
    handles: dict[str, Any] = {}
    for column, load in enumerate(loads):
        here = [one for one in rows if one["trace"] == load]
        names = chosen(here)
        one_rate = len({one["rate"] for one in here}) == 1
        for line, (value, words) in enumerate(values):
            axes, latency = panels[line, column], line - 2
            handles |= (_bars if one_rate else _lines)(axes, here, names, value)
            if latency >= 0:
                if targets is not None:
                    axes.axhline(_unit(value) * targets[latency // 3], color="black", linewidth=0.8, linestyle=":")
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
                axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_ylabel(words if column == 0 else "", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
        if not one_rate:
            _label(panels[-1, column], here)
        which = ", ".join(name for kind, name in names.items() if name not in (kind, "pd 1:1"))
        panels[0, column].set_title(f"{load}\n{which}", fontsize=8)
    figure.suptitle(f"{rows[0]['device']}: of each kind the policy that did best; dotted: the target", fontsize=9)
    figure.legend(handles.values(), handles, fontsize=8, loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=100)


def _unit(value: str) -> float:
    """What a row's value is multiplied with to be drawn."""
    return 1e3 if value.startswith("tpot") else 1.0


def _label(axes: Any, rows: Sequence[Row]) -> None:
    """The rates of a load, and where they are told the requests/s that come: those of a burst may be the same."""
    told = {one["rate"]: one.get("per_second") for one in rows if one["kind"] != "pd"}
    rates = sorted(told)
    several = all(told[rate] is not None for rate in rates)
    words = [f"{rate:g}" + (f"\n{told[rate]:.1f}/s" if several else "") for rate in rates]
    axes.set_xticks(rates, words)
    axes.set_xlabel(
        "rate, times the load's; requests/s" if several else "rate, in parts of what can be served", fontsize=8
    )


def _colour(name: str) -> str:
    return f"C{list(SHOWN).index(name)}"


def _lines(axes: Any, rows: Sequence[Row], names: Mapping[str, str], value: str) -> dict[str, Any]:
    found = {}
    for name, policy in names.items():
        points = sorted((one["rate"], _unit(value) * one[value]) for one in rows if one["policy"] == policy)
        wide = 2.5 if name == "auto" else 1.2
        (found[name],) = axes.plot(
            *zip(*points, strict=True), marker="o", color=_colour(name), linewidth=wide, markersize=3
        )
    return found


def _bars(axes: Any, rows: Sequence[Row], names: Mapping[str, str], value: str) -> dict[str, Any]:
    by = {one["policy"]: _unit(value) * one[value] for one in rows}
    found = {}
    for place, (name, policy) in enumerate(names.items()):
        found[name] = axes.bar(place, by[policy], color=_colour(name))
    axes.set_xticks(range(len(names)), names.values(), rotation=60, ha="right", fontsize=7)
    return found


def documents(rows: Sequence[Row], claims: Mapping[str, float]) -> dict[str, str]:
    """The tables that a document has, by their places in it."""
    made = "\n".join(f"{name} = {value:.3f}" for name, value in claims.items())
    return {
        "simulated": _by_rate(rows), "fixed": _every_fixed(rows), "latencies": _latencies(rows),
        "claims": f"```\n{made}\n```",
    }  # fmt: skip


def _by_rate(rows: Sequence[Row]) -> str:
    """One line for each load at each rate: auto, the best fixed policy there, and those that semi-PD is about."""
    ways = ["best fixed", "paper", "pd"]
    head = [
        "device",
        "load",
        "rate",
        "requests/s",
        "in target: auto",
        *ways,
        "goodput/s: auto",
        *ways,
        "refused by auto",
    ]
    made = []
    for (device, load, rate), here in cells(rows).items():
        by = {one["kind"]: one for one in here}
        best = max((one for one in here if one["kind"] in FIXED), key=_attained)
        shown = [by["auto"], best, by["paper"], by["pd"]]
        parts = [f"{one['attainment']:.0%}" for one in shown]
        parts[1] += f" ({best['policy']})"
        goodput = [f"{one['goodput']:.2f}" for one in shown]
        refused = f"{by['auto']['failed']} of {by['auto']['requests']}"
        made.append([device, load, _rate(rate), f"{by['auto']['per_second']:.2f}", *parts, *goodput, refused])
    return markdown(head, made)


def _every_fixed(rows: Sequence[Row]) -> str:
    """The part in target of every policy that stays the same; the best of each line is bold."""
    made = []
    for device in dict.fromkeys(one["device"] for one in rows):
        names = list(dict.fromkeys(o["policy"] for o in rows if o["device"] == device and o["kind"] in FIXED))
        lines = []
        for (place, load, rate), here in cells(rows).items():
            if place == device:
                by = {one["policy"]: one["attainment"] for one in here}
                best = max(by[name] for name in names)
                parts = [f"**{by[name]:.0%}**" if by[name] == best else f"{by[name]:.0%}" for name in names]
                lines.append([load, _rate(rate), *parts])
        made.append(f"{device}:\n\n{markdown(['load', 'rate', *names], lines)}")
    return "\n" + "\n\n".join(made) + "\n"


def _latencies(rows: Sequence[Row]) -> str:
    """What the pictures show, as tables: folded up, one for each load on each device."""
    head = ["rate", "policy", "in target", "goodput/s", "TTFT P50 s", "P90", "P99", "TPOT P50 ms", "P90", "P99"]
    made = []
    for device, load in dict.fromkeys((one["device"], one["trace"]) for one in rows):
        here = [one for one in rows if (one["device"], one["trace"]) == (device, load)]
        names, lines = chosen(here), []
        for (_, _, rate), there in cells(here).items():
            by = {one["policy"]: one for one in there}
            for one in (by[name] for name in names.values()):
                times = [f"{_unit(value) * one[value]:.{1 if what == 'TPOT' else 2}f}" for value, what, _ in LATENCIES]
                lines.append([_rate(rate), one["policy"], f"{one['attainment']:.1%}", f"{one['goodput']:.2f}", *times])
        made.append(f"<details><summary>{device}, {load}</summary>\n\n{markdown(head, lines)}\n\n</details>")
    return "\n" + "\n\n".join(made) + "\n"


def told(path: Path) -> Found:
    """What the JSON of an earlier run says."""
    content = json.loads(path.read_text())
    rows = [
        {key: math.nan if value is None and key != "switches" else value for key, value in one.items()}
        for one in content["rows"]
    ]
    targets = {}
    for note in content["notes"]:
        if found := re.match(r"(?:SIMULATED )?([^:]+): .*targets TTFT ([\d.]+) s and TPOT ([\d.]+) s", note):
            targets[found[1]] = float(found[2]), float(found[3])
    return Found(rows, content["claims"], content["notes"], targets)
