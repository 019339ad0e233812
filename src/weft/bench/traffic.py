"""What a load run asks for: when each request arrives, how long it is, and what its prompt says. Pure functions.

Everything random is drawn from one numpy generator, so that a seed fixes the whole run.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import ConfigError

FIRST_TOKEN_ID = 16  # the first ids of a vocabulary are often special tokens
WORDS = ("the", "of", "one", "file", "value", "line", "list", "name", "time", "data", "code", "read", "write", "open")
TRACE_COLUMNS = ("arrival_s", "input_tokens", "output_tokens")
MAX_TRACE_TOKENS = 10**7


@dataclass(frozen=True, slots=True)
class Shot:
    """One request to send. due: seconds after the start of the run. prompt: token ids, or a text of about
    input_tokens tokens. output_tokens: what is asked for as max_tokens."""

    due: float
    prompt: tuple[int, ...] | str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Size:
    """Tokens in and out of one request."""

    input: int
    output: int


def arrivals(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Arrival times in seconds, the first at 0, of a renewal process with gamma-distributed gaps of mean 1 / rate.

    burstiness: shape of the gamma distribution; 1 is a Poisson process, less is burstier (the gaps' coefficient of
    variation is 1 / sqrt(burstiness)), more is more regular. An infinite rate sends everything at once.
    """
    if math.isinf(rate):
        return [0.0] * count
    gaps = rng.gamma(burstiness, 1.0 / (rate * burstiness), size=max(count - 1, 0))
    return [0.0, *np.cumsum(gaps).tolist()][:count]


def random_sizes(
    count: int, input_len: int, output_len: int, range_ratio: float, rng: np.random.Generator
) -> list[Size]:
    """Lengths drawn evenly from [length * (1 - range_ratio), length * (1 + range_ratio)], at least 1 each."""

    def draw(length: int) -> list[int]:
        low = max(1, math.floor(length * (1 - range_ratio)))
        high = max(low, math.ceil(length * (1 + range_ratio)))
        drawn: list[int] = rng.integers(low, high, size=count, endpoint=True).tolist()
        return drawn

    return [Size(*pair) for pair in zip(draw(input_len), draw(output_len), strict=True)]


def prompt_ids(length: int, vocabulary: int, prefix: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    """`prefix` and then random ids from [16, vocabulary); `length` ids in all."""
    kept = tuple(prefix[:length])
    return kept + tuple(rng.integers(FIRST_TOKEN_ID, vocabulary, size=length - len(kept)).tolist())


def prompt_text(length: int, prefix: Sequence[str], rng: np.random.Generator) -> str:
    """`length` common English words, of about a token each; the server's usage says how many tokens they were."""
    kept = list(prefix[:length])
    return " ".join(kept + [WORDS[i] for i in rng.integers(0, len(WORDS), size=length - len(kept))])


def read_trace(path: Path) -> list[tuple[float, Size]]:
    """Rows of a trace in order of arrival: CSV (or CSV.gz) with columns arrival_s, input_tokens, output_tokens.

    Other columns are passed over. Raises ConfigError that names file and line.
    """
    rows = []
    reader = csv.DictReader(io.StringIO(_read_text(path)))
    missing = [name for name in TRACE_COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(f"{path}: the first line must name the columns {', '.join(TRACE_COLUMNS)}; no {missing[0]}")
    for row in reader:
        try:
            arrival, size = float(row["arrival_s"]), Size(int(row["input_tokens"]), int(row["output_tokens"]))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}, line {reader.line_num}: {error}") from error
        if not 0 <= arrival < math.inf or min(size.input, size.output) < 0:
            raise ConfigError(f"{path}, line {reader.line_num}: arrival and token counts must not be negative")
        if max(size.input, size.output) > MAX_TRACE_TOKENS:
            raise ConfigError(f"{path}, line {reader.line_num}: more than {MAX_TRACE_TOKENS} tokens")
        rows.append((arrival, size))
    if not rows:
        raise ConfigError(f"{path}: the trace has no rows")
    return sorted(rows, key=lambda row: row[0])


def scale_trace(
    rows: Sequence[tuple[float, Size]], count: int, rate_scale: float, length_scale: float
) -> tuple[list[float], list[Size]]:
    """The first `count` rows, arriving `rate_scale` times as fast, with lengths times `length_scale`, at least 1."""

    def stretch(tokens: int) -> int:
        return max(1, round(tokens * length_scale))

    kept = rows[:count]
    start = kept[0][0]
    return (
        [(arrival - start) / rate_scale for arrival, _ in kept],
        [Size(stretch(size.input), stretch(size.output)) for _, size in kept],
    )


def clip(sizes: Sequence[Size], most_input: int | None, most_output: int | None) -> tuple[list[Size], int]:
    """Sizes within the limits, and how many had to be cut."""
    cut = [
        Size(
            size.input if most_input is None else min(size.input, most_input),
            size.output if most_output is None else min(size.output, most_output),
        )
        for size in sizes
    ]
    return cut, sum(before != after for before, after in zip(sizes, cut, strict=True))


def shots(
    due: Sequence[float], sizes: Sequence[Size], vocabulary: int | None, prefix_len: int, rng: np.random.Generator
) -> list[Shot]:
    """Random prompts of the given sizes: token ids below `vocabulary`, or texts when that is None.

    prefix_len: so many leading tokens (or words) are the same in every prompt.
    """
    made = []
    shared_ids = () if vocabulary is None else prompt_ids(prefix_len, vocabulary, (), rng)
    shared_words = prompt_text(prefix_len, (), rng).split() if vocabulary is None else []
    for when, size in zip(due, sizes, strict=True):
        prompt: tuple[int, ...] | str = (
            prompt_text(size.input, shared_words, rng)
            if vocabulary is None
            else prompt_ids(size.input, vocabulary, shared_ids, rng)
        )
        made.append(Shot(when, prompt, size.input, size.output))
    return made


def read_prompts(path: Path, output_len: int) -> list[Shot]:
    """Prompts of a JSON-lines file: {"prompt": text or token ids, "output_tokens": optional}; all due at 0."""
    made = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if line.strip():
            made.append(_prompt_row(f"{path}, line {number}", line, output_len))
    if not made:
        raise ConfigError(f"{path}: the file has no prompts")
    return made


def at_times(made: Sequence[Shot], due: Sequence[float]) -> list[Shot]:
    """As many shots as there are times, taken round and round."""
    return [replace(made[i % len(made)], due=when) for i, when in enumerate(due)]


def _prompt_row(where: str, line: str, output_len: int) -> Shot:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        prompt = tuple(prompt)
    elif not isinstance(prompt, str) or not prompt:
        raise ConfigError(f'{where}: it must be an object with "prompt", a text or a list of token ids')
    wanted = row.get("output_tokens", output_len)
    if type(wanted) is not int or not 1 <= wanted <= MAX_TRACE_TOKENS:
        raise ConfigError(f"{where}: output_tokens is {wanted!r}; it must be a whole number, at least 1")
    return Shot(0.0, prompt, len(prompt) if isinstance(prompt, tuple) else len(prompt.split()), wanted)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
