"""A run's figures as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from weft.bench.stats import Record, Slo, Spread, Summary
from weft.errors import ConfigError


def print_report(summary: Summary, slo: Slo | None, console: Console, open_loop: bool = True) -> None:
    """The tables, and why requests failed. open_loop: requests had times at which they were due."""
    console.print(_totals(summary, slo))
    console.print(_latencies(summary, open_loop))
    for reason, count in summary.errors:
        console.print(f"failed, {count} times: {reason}", markup=False, highlight=False)


def as_json(
    settings: Mapping[str, Any], summary: Summary, records: Sequence[Record], detailed: bool = False
) -> dict[str, Any]:
    """{"settings", "summary", "requests"}; times in seconds, NaN as null. detailed: with every request's token gaps."""
    rows = [{**asdict(record), "ttft": record.ttft, "tpot": record.tpot, "e2e": record.e2e} for record in records]
    for row in rows:
        if not detailed:
            del row["gaps"]
    content: dict[str, Any] = finite({"settings": dict(settings), "summary": asdict(summary), "requests": rows})
    return content


def _totals(summary: Summary, slo: Slo | None) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("requests completed / failed", f"{summary.completed} / {summary.failed}"),
        ("duration", f"{summary.duration:.2f} s"),
        ("tokens in / out", f"{summary.input_tokens} / {summary.output_tokens}"),
        ("requests", f"{summary.request_throughput:.2f} /s"),
        ("input tokens", f"{summary.input_throughput:.1f} /s"),
        ("output tokens", f"{summary.output_throughput:.1f} /s"),
        ("most at a time", f"{summary.peak_concurrency}"),
    ]
    if slo is not None and summary.goodput is not None and summary.attainment is not None:
        targets = [
            f"{name} <= {value * 1000:g} ms" for name, value in (("TTFT", slo.ttft), ("TPOT", slo.tpot)) if value
        ]
        rows.append((f"goodput ({', '.join(targets)})", f"{summary.goodput:.2f} /s, {summary.attainment:.1%}"))
    for row in rows:
        table.add_row(*row)
    return table


def _latencies(summary: Summary, open_loop: bool) -> Table:
    table = Table("milliseconds", *(name for name in ("mean", "p50", "p90", "p99", "max")), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in (
        ("TTFT", summary.ttft),
        ("TPOT", summary.tpot),
        ("ITL", summary.itl),
        ("E2E", summary.e2e),
        *([("sent late by", summary.lag)] if open_loop else []),
    ):
        table.add_row(name, *_milliseconds(values))
    return table


def _milliseconds(values: Spread) -> list[str]:
    figures = (values.mean, values.p50, values.p90, values.p99, values.max)
    return ["-" if math.isnan(figure) else f"{figure * 1000:.1f}" for figure in figures]


def output_problems(arguments: Any) -> list[str]:
    """Why the files of --json and --plot could not be written: asked before the work whose result they are to hold."""
    found = []
    for flag, path in (("--json", arguments.json), ("--plot", getattr(arguments, "plot", None))):
        if path is None:
            continue
        if path.is_dir():
            found.append(f"{flag} is {path}, a folder; give a file")
        elif not path.parent.is_dir():
            found.append(f"{flag} is {path}; there is no folder {path.parent}")
        elif not os.access(path if path.exists() else path.parent, os.W_OK):
            found.append(f"{flag} is {path}, which may not be written; give another file")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Into the file of --json. Raises ConfigError."""
    try:
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}") from error
    print(f"written: {path}", file=sys.stderr)


def finite(content: Any) -> Any:
    """The same content with NaN and infinities as None, which JSON can say."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
