"""What the scripts of the papers' tables share: the papers' own figures, tables for documents, and their notes.

paper_figures.json has what the papers print, with the figure or table it comes from. What weft says beside it is
SIMULATED: no coefficient of the simulator was changed to come nearer to any of these figures.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common

from weft.bench.traces import Row
from weft.config import EngineConfig
from weft.sim.estimate import setup_of
from weft.sim.replica import Setup
from weft.sim.step import StepCost

BLOCK = 64  # tokens of a KV block
FIGURES = Path(__file__).with_name("paper_figures.json")
SIMULATED = "SIMULATED: no GPU was used, and no coefficient was changed to come nearer to the paper"


def figures(paper: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FIGURES.read_text())[paper]
    return found


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as documents have it; the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def into_document(path: Path, tables: Mapping[str, str]) -> None:
    """Put each table between the lines <!-- NAME --> and <!-- end --> of a document. Raises SystemExit for a table that
    it has no place for, and for a place that there is no table for."""
    text = path.read_text()
    if empty := set(re.findall(r"<!-- (\w+) -->", text)) - tables.keys() - {"end"}:
        raise SystemExit(f"{path} has places for {', '.join(sorted(empty))}, which are no tables of this script")
    for name, table in tables.items():
        begin, between, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not between or not end:
            raise SystemExit(f"{path} has no lines <!-- {name} --> and <!-- end --> for the table {name!r}")
        text = f"{begin}{between}{table}\n{end}{after}"
    path.write_text(text)


def parser(description: str) -> argparse.ArgumentParser:
    made = common.parser(description)
    made.add_argument("--doc", type=Path, metavar="FILE", help="put the tables into this document, too")
    return made


def number(value: float | None, digits: int = 2) -> str:
    """A figure of a table; a dash where the paper has none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def lengths(mean: float, spread: float, longest: int, drawn: Sequence[float]) -> list[int]:
    """Lengths with this mean and none above `longest`: exp(spread * z) for each standard normal z, times one factor."""
    low, high = 0.0, float(longest)
    for _ in range(60):
        scale = (low + high) / 2
        values = [min(float(longest), max(1.0, scale * math.exp(spread * z))) for z in drawn]
        low, high = (scale, high) if sum(values) < mean * len(values) else (low, scale)
    return [round(value) for value in values]


def setup(
    cost: StepCost, *, tokens: int = 8192, seats: int = 512, partition: str = "off", longest: int = 10240, **more: Any
) -> Setup:
    """A replica as the papers' servers were: no prefix cache, and nobody is refused for others' sake."""
    config = EngineConfig(
        max_num_seqs=seats, max_num_batched_tokens=max(tokens, seats), block_size=BLOCK, max_model_len=longest,
        enable_prefix_caching=False, max_num_queued_reqs=10**6, partition=partition, **more,
    )  # fmt: skip
    return setup_of(cost, config)


def at_once(sizes: Sequence[Any]) -> list[Row]:
    """All requests at time 0: offline."""
    return [(0.0, size) for size in sizes]


def finish(
    arguments: argparse.Namespace,
    paper: Mapping[str, Any],
    claims: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
    tables: Mapping[str, str],
    notes: Sequence[str] = (),
) -> None:
    """Claims, the JSON and the tables of the document where they were asked for. tables: printed already."""
    common.report(arguments, claims, rows, [SIMULATED, f"{paper['paper']}: {paper['source']}", *notes])
    if arguments.doc is not None:
        made = "\n".join(f"{name} = {value:.3f}" for name, value in claims.items())
        into_document(arguments.doc, {**tables, "claims": f"```\n{made}\n```"})
