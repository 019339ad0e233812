"""The loads of benchmarks/phases.py: parts of recorded traces scaled to a machine, and one whose mix changes twice.

A part is `tune` or `report`: what was chosen by looking at the one, a policy's constants or the best of the fixed
policies, is shown on the other. Seeds are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from weft.bench import traces, traffic
from weft.bench.traces import Row, Size
from weft.bench.traffic import Shot

# Where the parts of a trace begin, in its own seconds, and the seeds of what is drawn.
BEGINS = {"tune": 300.0, "report": 1200.0}
SEEDS = {"tune": 5, "report": 11}
CHANGING = "changing"


@dataclass(frozen=True, slots=True)
class Scale:
    """How loads are fitted to a device. input, output: factors of lengths; longest: most tokens of a prompt and of an
    answer. rate: of arrivals, for the factor 1."""

    input: float
    output: float
    longest: tuple[int, int]
    rate: float


@dataclass(frozen=True, slots=True)
class Mix:
    """One part of the changing load. rate: requests/s; mean tokens of prompts and answers, each within a half."""

    rate: float
    input: int
    output: int


@dataclass(frozen=True, slots=True)
class Load:
    """name: of the trace. caching: whether its prompts begin alike, so that the prefix cache takes part.
    make(part, rate, seconds, vocabulary): the requests."""

    name: str
    caching: bool
    make: Callable[[str, float, float, int], list[Shot]]


def recorded(path: Path, scale: Scale) -> Load:
    """A trace from a file. Its first name says which: azure2023_conv_first35min.csv.gz is azure2023_conv."""
    name = "_".join(path.name.split(".")[0].split("_")[:2])
    rows = traces.read_trace(path)
    caching = any(size.hashes for _, size in rows)

    def make(part: str, rate: float, seconds: float, vocabulary: int) -> list[Shot]:
        factor = scale.rate * rate
        begin = BEGINS[part]
        if begin + seconds * factor > rows[-1][0]:
            raise SystemExit(f"{path.name} is too short for {seconds:g} s at {factor:g} times its rate, from {begin:g}")
        kept = traces.between(rows, begin, begin + seconds * factor)
        return fitted(kept, factor, scale, vocabulary, np.random.default_rng(SEEDS[part]))

    return Load(name, caching, make)


def fitted(rows: Sequence[Row], factor: float, scale: Scale, vocabulary: int, rng: np.random.Generator) -> list[Shot]:
    due, sizes = traces.scale_trace(rows, len(rows), factor, scale.input, scale.output)
    return traffic.shots(due, traces.clip(sizes, *scale.longest)[0], vocabulary, 0, rng)


def changing(mixes: Sequence[Mix]) -> Load:
    """Poisson arrivals of one mix after another, each for its part of the time."""

    def make(part: str, rate: float, seconds: float, vocabulary: int) -> list[Shot]:
        rng = np.random.default_rng(SEEDS[part])
        due: list[float] = []
        sizes: list[Size] = []
        length = seconds / len(mixes)
        for number, mix in enumerate(mixes):
            count = max(1, round(mix.rate * rate * length))
            due += [number * length + when for when in traffic.arrivals(count, mix.rate * rate, 1.0, rng)]
            sizes += traffic.random_sizes(count, mix.input, mix.output, 0.5, rng)
        shots = traffic.shots(due, sizes, vocabulary, 0, rng)
        return [replace(one, due=max(0.0, one.due)) for one in sorted(shots, key=lambda one: one.due)]

    return Load(CHANGING, False, make)
