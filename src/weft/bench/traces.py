"""Recorded loads: when each request arrived, how long it and its answer were, and which prompts began alike.

Two forms are read: CSV (or CSV.gz) with the columns arrival_s, input_tokens, output_tokens, or with those of Azure's
own files, TIMESTAMP, ContextTokens, GeneratedTokens; and Mooncake's JSON lines (.jsonl or .jsonl.gz), whose prompts
name their blocks, so that two prompts that begin with the same names begin with the same tokens.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import ConfigError

TRACE_COLUMNS = ("arrival_s", "input_tokens", "output_tokens")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
CLIENT_COLUMN = "client_id"
MAX_TRACE_TOKENS = 10**7
MAX_TRACE_SECONDS = 1e12  # seconds since 1970 are far less; microseconds are told apart up to there or so
HASHED_TOKENS = 512  # of a prompt, in each block that Mooncake's traces name
SPREAD_SEED = 0


@dataclass(frozen=True, slots=True)
class Size:
    """Tokens in and out of one request.

    hashes: names of the prompt's first blocks of `block` tokens, in order; equal names mean equal tokens. Empty where
    nothing is known of the prompt.
    """

    input: int
    output: int
    hashes: tuple[int, ...] = ()
    block: int = HASHED_TOKENS


Row = tuple[float, Size]


def read_trace(path: Path) -> list[Row]:
    """(arrival in seconds, size) of every request, in order of arrival. Raises ConfigError that names file and line."""
    text = read_text(path)
    names = path.suffixes[-2:]
    rows = _read_mooncake(path, text) if ".jsonl" in names else _read_csv(path, text)
    if not rows:
        raise ConfigError(f"{path}: the trace has no rows")
    return sorted(rows, key=lambda row: row[0])


def read_clients(path: Path) -> list[list[Row]]:
    """The rows of each client of a CSV that has a client_id, too, in order of arrival. Raises ConfigError."""
    found: dict[str, list[Row]] = {}
    for row, values in _csv_rows(path, read_text(path), (*TRACE_COLUMNS, CLIENT_COLUMN)):
        found.setdefault(values[CLIENT_COLUMN], []).append(row)
    if not found:
        raise ConfigError(f"{path}: the trace has no rows")
    return [sorted(rows, key=lambda row: row[0]) for rows in found.values()]


def _read_csv(path: Path, text: str) -> list[Row]:
    columns = AZURE_COLUMNS if text.lstrip("\ufeff").startswith(AZURE_COLUMNS[0]) else TRACE_COLUMNS
    rows = [row for row, _ in _csv_rows(path, text, columns)]
    if columns is AZURE_COLUMNS and rows:
        first = min(arrival for arrival, _ in rows)
        rows = [(arrival - first, size) for arrival, size in rows]
    return rows


def _csv_rows(path: Path, text: str, columns: Sequence[str]) -> Iterator[tuple[Row, dict[str, str]]]:
    """Each row with what it was made of. columns: of the arrival, the tokens in and those out; others must be there."""
    reader = csv.DictReader(io.StringIO(text.lstrip("\ufeff")))
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(f"{path}: the first line must name the columns {', '.join(columns)}; no {missing[0]}")
    when, read, written = columns[:3]
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        try:
            arrival = _seconds(row[when]) if columns is AZURE_COLUMNS else float(row[when])
            size = Size(int(row[read]), int(row[written]))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error
        yield _checked(where, arrival, size), row


def _seconds(text: str) -> float:
    """Of a moment such as 2023-11-16 18:15:46.6805900, since some fixed day."""
    return (datetime.fromisoformat(text).replace(tzinfo=None) - datetime(2000, 1, 1)).total_seconds()


def _read_mooncake(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row: Any = json.loads(line)
            arrival, hashes = float(row["timestamp"]) / 1000, row["hash_ids"]
            size = Size(int(row["input_length"]), int(row["output_length"]))
        except KeyError as error:
            raise ConfigError(f"{where}: it has no {error}") from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error
        if not isinstance(hashes, list) or any(type(name) is not int or name < 0 for name in hashes):
            raise ConfigError(f"{where}: hash_ids must be a list of whole numbers, at least 0; not {hashes!r:.60}")
        rows.append(_checked(where, arrival, replace(size, hashes=tuple(hashes))))
    return _spread(sorted(rows, key=lambda row: row[0]))


def _checked(where: str, arrival: float, size: Size) -> Row:
    if not 0 <= arrival < math.inf or min(size.input, size.output) < 0:
        raise ConfigError(f"{where}: arrival and token counts must not be negative")
    if arrival > MAX_TRACE_SECONDS:
        raise ConfigError(f"{where}: the arrival is {arrival:g} s; it must be at most {MAX_TRACE_SECONDS:g} s")
    if max(size.input, size.output) > MAX_TRACE_TOKENS:
        raise ConfigError(f"{where}: more than {MAX_TRACE_TOKENS} tokens")
    return arrival, size


def _spread(rows: Sequence[Row]) -> list[Row]:
    """Arrivals that were rounded to a common time, spread evenly at random up to the next time, by a fixed seed."""
    rng = np.random.default_rng(SPREAD_SEED)
    groups = [(when, [size for _, size in group]) for when, group in groupby(rows, key=lambda row: row[0])]
    found: list[Row] = []
    for number, (when, sizes) in enumerate(groups):
        after = groups[number + 1][0] if number + 1 < len(groups) else when
        late = sorted(rng.uniform(0.0, after - when, len(sizes)).tolist()) if len(sizes) > 1 else [0.0]
        found += [(when + more, size) for more, size in zip(late, sizes, strict=True)]
    return found


def between(rows: Sequence[Row], first: float, last: float) -> list[Row]:
    """The rows that arrive in [first, last) seconds, from 0 on. Raises ConfigError when there are none."""
    found = [(arrival - first, size) for arrival, size in rows if first <= arrival < last]
    if not found:
        raise ConfigError(f"no request of the trace arrives between {first:g} and {last:g} s")
    return found


def scale_trace(
    rows: Sequence[Row], count: int, rate_scale: float, length_scale: float, output_scale: float | None = None
) -> tuple[list[float], list[Size]]:
    """The first `count` rows, arriving `rate_scale` times as fast, with lengths times `length_scale`, at least 1.

    output_scale: for the lengths of answers, if not the same.
    """
    longer = length_scale if output_scale is None else output_scale
    kept = rows[:count]
    start = kept[0][0]
    return [(arrival - start) / rate_scale for arrival, _ in kept], [
        stretched(size, length_scale, longer) for _, size in kept
    ]


def stretched(size: Size, input_scale: float, output_scale: float) -> Size:
    """Lengths times a factor, at least 1; blocks that the prompt names grow with it."""
    read, written = max(1, round(size.input * input_scale)), max(1, round(size.output * output_scale))
    block = max(1, round(size.block * input_scale)) if size.hashes else size.block
    return Size(read, written, size.hashes, block)


def clip(sizes: Sequence[Size], most_input: int | None, most_output: int | None) -> tuple[list[Size], int]:
    """Sizes within the limits, and how many had to be cut."""
    cut = [
        replace(
            size,
            input=size.input if most_input is None else min(size.input, most_input),
            output=size.output if most_output is None else min(size.output, most_output),
        )
        for size in sizes
    ]
    return cut, sum(before != after for before, after in zip(sizes, cut, strict=True))


def read_text(path: Path) -> str:
    """A file that may be compressed. Raises ConfigError."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
