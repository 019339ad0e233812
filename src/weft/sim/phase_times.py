"""Reader of what benchmarks/gpu_phases.py has measured of work that memory bounds, decode attention: how long it takes
on parts of a GPU's SMs, alone and beside the other lane."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from weft.errors import ConfigError

RATE = "GB/s"  # what the benchmark gives for work that memory bounds; products have TFLOP/s


class Beside(NamedTuple):
    """Work on `share` of the device while the other lane computes on `rival` of it takes `times` as long as alone."""

    share: float
    rival: float
    times: float


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """alone: seconds, by part of the device."""

    alone: Mapping[float, float]
    beside: tuple[Beside, ...]


def read_phase_times(path: Path) -> PhaseTimes:
    """Raises ConfigError for a file that is none of the benchmark's, and for one of a GPU that was not divided."""
    try:
        rows = json.loads(path.read_text())["rows"]
        curves = [row for row in rows if row["part"] == "curves" and RATE in row]
        beside = [row for row in rows if row["part"] == "beside" and row["what"] in {curve["what"] for curve in curves}]
        if not all(row["divided"] for row in (*curves, *beside)):
            raise ConfigError(f"{path}: the SMs of this GPU were not divided, so that the rows tell nothing of parts")
        return PhaseTimes(
            {_part(row["share"], row["of"]): _positive(row["seconds"]) for row in curves},
            tuple(
                Beside(_part(row["share"], row["of"]), _part(row["rival"], row["of"]), _positive(row["times"]))
                for row in beside
            ),
        )
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no file of benchmarks/gpu_phases.py: {error!r}") from error


def _part(units: Any, of: Any) -> float:
    if not 0 < units <= of:
        raise ValueError(f"a part of {units} of {of} units")
    return float(units / of)


def _positive(value: Any) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"a time of {value}")
    return float(value)
