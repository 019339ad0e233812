"""What the tests of the C++ kernels share: one backend per level of this CPU and number of threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from weft.kernels import REFERENCE, available

LEVELS = tuple(name for name in available() if name != REFERENCE)
CORES = tuple(sorted(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Backends:
    """The same level on one thread and on two (both on the same core where there is only one)."""

    one: Any
    two: Any


def open_backends(level: str) -> Iterator[Backends]:
    from weft.kernels.cpu import CpuKernels

    backends = Backends(CpuKernels(level, CORES[:1]), CpuKernels(level, (CORES[0], CORES[-1])))
    yield backends
    backends.one.close()
    backends.two.close()


@pytest.fixture(scope="module", params=LEVELS or ("none",))
def backends(request: pytest.FixtureRequest) -> Iterator[Backends]:
    if not LEVELS:
        pytest.skip("the C++ extension is not built")
    yield from open_backends(request.param)


@pytest.fixture
def best_level() -> str:
    if not LEVELS:
        pytest.skip("the C++ extension is not built")
    return LEVELS[0]
