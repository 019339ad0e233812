"""What a load run asks for: when each request arrives, how long it is, and what its prompt says. Pure functions.

Everything random is drawn from one numpy generator, so that a seed fixes the whole run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from weft.bench.traces import MAX_TRACE_TOKENS, Size, read_text
from weft.errors import ConfigError

FIRST_TOKEN_ID = 16  # the first ids of a vocabulary are often special tokens
WORDS = ("the", "of", "one", "file", "value", "line", "list", "name", "time", "data", "code", "read", "write", "open")


@dataclass(frozen=True, slots=True)
class Shot:
    """One request to send. due: seconds after the start of the run. prompt: token ids, or a text of about
    input_tokens tokens. output_tokens: what is asked for as max_tokens."""

    due: float
    prompt: tuple[int, ...] | str
    input_tokens: int
    output_tokens: int


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


def shots(
    due: Sequence[float], sizes: Sequence[Size], vocabulary: int | None, prefix_len: int, rng: np.random.Generator
) -> list[Shot]:
    """Random prompts of the given sizes: token ids below `vocabulary`, or texts when that is None.

    prefix_len: so many leading tokens (or words) are the same in every prompt. Those of the blocks that a size names
    come after them, the same for the same name.
    """

    def draw(length: int, prefix: tuple[Any, ...], source: np.random.Generator) -> tuple[Any, ...]:
        if vocabulary is None:
            return tuple(prompt_text(length, prefix, source).split())
        return prompt_ids(length, vocabulary, prefix, source)

    @cache
    def block(name: int, length: int) -> tuple[Any, ...]:
        return draw(length, (), np.random.default_rng([seed, name]))

    shared = draw(prefix_len, (), rng)
    seed = int(rng.integers(2**32)) if any(size.hashes for size in sizes) else 0
    made = []
    for when, size in zip(due, sizes, strict=True):
        named = size.hashes[: -(-size.input // size.block)]
        prompt = draw(size.input, (*shared, *(token for name in named for token in block(name, size.block))), rng)
        made.append(Shot(when, " ".join(prompt) if vocabulary is None else prompt, size.input, size.output))
    return made


def read_prompts(path: Path, output_len: int) -> list[Shot]:
    """Prompts of a JSON-lines file: {"prompt": text or token ids, "output_tokens": optional}; all due at 0."""
    made = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
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
