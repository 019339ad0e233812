"""The loads of benchmarks/phases.py: parts of recorded traces scaled to a device, and one whose mix changes twice.

A part is `tune` or `report`: what was chosen by looking at the one, a policy's constants, a rate, or the best of the
fixed policies, is shown on the other. Seeds are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    rate: float = 1.0


@dataclass(frozen=True, slots=True)
class Mix:
    """One part of the changing load. rate: requests/s; mean tokens of prompts and answers, each within a half."""

    rate: float
    input: int
    output: int


@dataclass(frozen=True, slots=True)
class Load:
    """name: of the trace. caching: whether its prompts begin alike, so that the prefix cache takes part.
    make(part, rate, seconds, piece, before): the requests of one piece of so many seconds; no two pieces are alike.
    before: the rates of the earlier pieces, summed up, where they were not all this one's."""

    name: str
    caching: bool
    make: Callable[..., list[Row]]

    def shots(
        self,
        part: str,
        rate: float,
        seconds: float,
        vocabulary: int,
        piece: int = 0,
        before: float | None = None,
        again: int = 0,
    ) -> list[Shot]:
        """The same with prompts, for a server that computes something. again: how often it has served this piece: the
        prompts are others then, of the same lengths, since it may still have the KV of the first ones."""
        rows = self.make(part, rate, seconds, piece, before)
        if not rows:
            return []
        rng = np.random.default_rng([SEEDS[part], piece, *([again] if again else [])])
        return traffic.shots([due for due, _ in rows], [size for _, size in rows], vocabulary, 0, rng)


def load_all(paths: Sequence[Path], azure: Scale, mooncake: Scale, mixes: Sequence[Mix]) -> list[Load]:
    """The traces, and the load that changes. mooncake: for traces whose prompts begin alike."""
    found = []
    for path in paths:
        load = recorded(path, azure)
        found.append(recorded(path, mooncake) if load.caching else load)
    return [*found, changing(mixes)]


def recorded(path: Path, scale: Scale) -> Load:
    """A trace from a file. Its first name says which: azure2023_conv_first35min.csv.gz is azure2023_conv."""
    name = "_".join(path.name.split(".")[0].split("_")[:2])
    rows = traces.read_trace(path)
    caching = any(size.hashes for _, size in rows)

    def make(part: str, rate: float, seconds: float, piece: int = 0, before: float | None = None) -> list[Row]:
        factor = scale.rate * rate
        begin = BEGINS[part] + seconds * scale.rate * (piece * rate if before is None else before)
        if begin + seconds * factor > rows[-1][0]:
            raise SystemExit(f"{path.name} is too short for {seconds:g} s at {factor:g} times its rate, from {begin:g}")
        kept = [row for row in rows if begin <= row[0] < begin + seconds * factor]
        if not kept:
            return []
        kept = traces.between(kept, begin, begin + seconds * factor)
        due, sizes = traces.scale_trace(kept, len(kept), factor, scale.input, scale.output)
        return list(zip(due, traces.clip(sizes, *scale.longest)[0], strict=True))

    return Load(name, caching, make)


def changing(mixes: Sequence[Mix]) -> Load:
    """Poisson arrivals of one mix after another, each for its part of the time."""

    def make(part: str, rate: float, seconds: float, piece: int = 0, _before: float | None = None) -> list[Row]:
        rng = np.random.default_rng([SEEDS[part], piece])
        found: list[Row] = []
        length = seconds / len(mixes)
        for number, mix in enumerate(mixes):
            count = max(1, round(mix.rate * rate * length))
            due = [number * length + when for when in traffic.arrivals(count, mix.rate * rate, 1.0, rng)]
            sizes: list[Size] = traffic.random_sizes(count, mix.input, mix.output, 0.5, rng)
            found += zip(due, sizes, strict=True)
        return sorted(found, key=lambda row: row[0])

    return Load(CHANGING, False, make)
