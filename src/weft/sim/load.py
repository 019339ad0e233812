"""The traffic of a study, from settings: which stream, at which rate, for how long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from weft.bench.traces import Row, read_clients, read_trace
from weft.errors import ConfigError
from weft.sim import traffic

DATASETS = ("random", "trace", "clients")
DEFAULT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Load:
    """dataset: one of DATASETS. rows: of the trace; clients: its rows by client. A rate is a factor of the trace's own,
    or requests/s where the load is drawn.

    seconds: of virtual time; None: the trace once, or ten minutes. copies: of the trace, shifted against each other.
    shape: factors of the rate, each for shape_seconds, round and round; empty: none.
    """

    dataset: str = "random"
    rows: tuple[Row, ...] = ()
    clients: tuple[tuple[Row, ...], ...] = ()
    seconds: float | None = None
    copies: int = 1
    input_scale: float = 1.0
    output_scale: float = 1.0
    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.5
    burstiness: float = 1.0
    shape: tuple[float, ...] = ()
    shape_seconds: float = 3600.0
    longest: int | None = None
    seed: int = 0
    name: str = field(default="random")

    def length(self, rate: float) -> float:
        """Seconds of virtual time in which requests come."""
        if self.seconds is not None:
            return self.seconds
        return traffic.period(self.rows) / rate if self.dataset == "trace" else DEFAULT_SECONDS

    def stream(self, rate: float) -> Iterator[Row]:
        """The same requests each time it is asked for the same rate."""
        rng = np.random.default_rng(self.seed)
        made = traffic.resized(self._source(rate, rng), self.input_scale, self.output_scale)
        if self.longest is not None:
            made = traffic.clipped(made, self.longest)
        if self.shape:
            made = traffic.shaped(made, self.shape, self.shape_seconds)
        return traffic.until(made, self.length(rate))

    def words(self, rate: float) -> str:
        """What a run at this rate is, for its title."""
        length = self.length(rate)
        if self.dataset != "trace":
            return f"{self.name}, {rate:g} requests/s for {length:g} s"
        turns = length * rate / traffic.period(self.rows)
        copies = f", {self.copies} copies shifted against each other" if self.copies > 1 else ""
        repeats = f", repeated {turns:.2f} times" if turns > 1.001 and self.copies == 1 else ""
        return f"{self.name}, {rate:g} times its rate for {length:.0f} s{copies}{repeats}"

    def _source(self, rate: float, rng: np.random.Generator) -> Iterator[Row]:
        if self.dataset == "clients":
            return traffic.clients(self.clients, rate, rng)
        if self.dataset == "random":
            sizes = traffic.uniform(self.input_len, self.output_len, self.range_ratio, rng)
            return traffic.renewal(rate, self.burstiness, sizes, rng)
        whole = traffic.repeated(self.rows) if self.copies == 1 else traffic.copies(self.rows, self.copies, rng)
        return traffic.faster(whole, rate)


def read_rows(dataset: str, path: Path | None) -> tuple[tuple[Row, ...], tuple[tuple[Row, ...], ...]]:
    """(rows of a trace, rows by client). Raises ConfigError when the file is needed and absent, or cannot be read."""
    if dataset == "random":
        return (), ()
    if path is None:
        raise ConfigError(f"--dataset-name {dataset} needs --dataset-path FILE")
    if dataset == "clients":
        return (), tuple(tuple(rows) for rows in read_clients(path))
    return tuple(read_trace(path)), ()
