"""A picture of a run: how the latencies are distributed, and what was under way when. matplotlib is an extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weft.bench.stats import Record
from weft.errors import ConfigError

KINDS = (".png", ".svg", ".pdf", ".jpg", ".webp")


def picture_problems(path: Path) -> list[str]:
    """What would keep a picture from being drawn; asked before a run rather than after it."""
    problems = []
    if importlib.util.find_spec("matplotlib") is None:
        problems.append("--plot needs matplotlib: pip install 'weft[plot]'")
    if path.suffix.lower() not in KINDS:
        problems.append(f"--plot is {path}; its name must end with one of {', '.join(KINDS)}")
    return problems


def require_picture(path: Path) -> None:
    """Raises ConfigError where no picture can be drawn."""
    if problems := picture_problems(path):
        raise ConfigError("\n".join(problems))


def plot(records: Sequence[Record], title: str, path: Path) -> None:
    """Write a picture; the ending of `path` says its format. Raises ConfigError when it cannot be written."""
    require_picture(path)
    from matplotlib.figure import Figure

    good = [record for record in records if record.error is None]
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels: Any = figure.subplots(2, 2)
    _distribution(panels[0, 0], "TTFT (ms)", [record.ttft for record in good if record.ttft is not None])
    _distribution(panels[0, 1], "TPOT (ms)", [record.tpot for record in good if record.tpot is not None])
    _distribution(panels[1, 0], "ITL (ms)", [gap for record in good for gap in record.gaps])
    _under_way(panels[1, 1], records)
    figure.suptitle(title)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from error


def _distribution(axes: Any, name: str, values: Sequence[float]) -> None:
    """The share of values at most x, with the 50th, 90th and 99th percentile."""
    axes.set(xlabel=name, ylabel="share", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    if not values:
        return
    ordered = np.sort(np.asarray(values)) * 1000
    axes.step(ordered, np.arange(1, ordered.size + 1) / ordered.size, where="post")
    for percentile in (50, 90, 99):
        axes.axvline(np.percentile(ordered, percentile), color="grey", linewidth=0.8, linestyle=":")


def _under_way(axes: Any, records: Sequence[Record]) -> None:
    """Requests under way over time, and the moments at which requests failed."""
    changes = sorted([(record.sent, 1) for record in records] + [(record.ended, -1) for record in records])
    axes.step([when for when, _ in changes], np.cumsum([change for _, change in changes]), where="post")
    failed = [record.ended for record in records if record.error is not None]
    if failed:
        axes.plot(failed, [0] * len(failed), "rx", label="failed")
        axes.legend()
    axes.set(xlabel="seconds", ylabel="requests under way")
    axes.grid(alpha=0.3)
