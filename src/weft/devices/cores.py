"""Which cores there are, how ranks share them, and what ranks exchange rows through."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence

from weft.config import EngineConfig, parse_cores
from weft.errors import ConfigError
from weft.kernels import LEVELS, REFERENCE, resolve

Cores = tuple[int, ...]


def usable_cores(wanted: str | None) -> Cores:
    """The cores for --cores `wanted`, or all that this process may use. Raises ConfigError."""
    allowed = tuple(sorted(os.sched_getaffinity(0)))
    if wanted is None:
        return allowed
    cores = parse_cores(wanted)
    absent = [core for core in cores if core not in allowed]
    if absent:
        raise ConfigError(f"--cores names core {absent[0]}; this process may use {_list(allowed)}")
    return cores


def cores_of_rank(cores: Cores, rank: int, ranks: int) -> Cores:
    """Neighbours for one rank, a part of about equal size; where there are fewer cores than ranks, one that others have
    as well."""
    if len(cores) < ranks:
        return (cores[rank % len(cores)],)
    return cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks]


def share_cores(own: Sequence[int], others: Iterable[Sequence[int]]) -> bool:
    """Whether others may run on some of these cores, too."""
    return any(set(own) & set(other) for other in others)


def collective_of(config: EngineConfig) -> str:
    """What --collective comes to. Raises DeviceError for kernels that are not there."""
    if config.collective != "auto":
        return config.collective
    if config.device == "cuda":
        return "nccl"
    name, _ = resolve(config.kernels)
    return "shm" if name in LEVELS and config.weave not in ("plain", "one-shot") else "gloo"


def kernels_of(config: EngineConfig) -> str:
    """What --kernels comes to here. Raises DeviceError for kernels that are not there."""
    return config.device if config.device == "cuda" else resolve(config.kernels)[0]


def least_kernels(names: Collection[str]) -> str:
    """Of these, the ones that all CPUs that have one of them can run."""
    return max(names, key=(*LEVELS, REFERENCE).index)


def _list(cores: Sequence[int]) -> str:
    return ", ".join(map(str, cores))
