"""What the machine itself reaches now, by weft's own probes: a plain read of memory, and 8-bit products in registers.

The question {"op": "run", ...} (its arguments are of no use here) answers {"bandwidth": bytes/s, "integers": op/s}: the
medians of a few short runs. The median rather than the best, because a virtual core may lose half of a real one for
seconds, and that is to be seen.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from workerloop import serve

from weft import _native
from weft.kernels import resolve
from weft.kernels.cpu import CpuKernels

READ_BYTES = 256 * 2**20
STEPS = 200_000
RUNS = 5


class Probes:
    def __init__(self) -> None:
        level, _ = resolve("auto")
        self._kernels = CpuKernels(level, tuple(sorted(os.sched_getaffinity(0))))
        self._memory = _native.Memory(READ_BYTES, self._kernels.native)
        self.name = f"weft's probes, {level}"

    def run(self, **_: Any) -> dict[str, Any]:
        native = self._kernels.native

        def read() -> float:
            native.probe_read(self._memory)
            return READ_BYTES

        return {"bandwidth": _rate(read), "integers": _rate(lambda: float(native.probe_integers(STEPS)))}

    def score(self, **_: Any) -> dict[str, Any]:
        raise NotImplementedError("probes score nothing")


def _rate(work: Callable[[], float]) -> float:
    rates = []
    for _ in range(RUNS):
        start = time.perf_counter()
        done = work()
        rates.append(done / (time.perf_counter() - start))
    return statistics.median(rates)


if __name__ == "__main__":
    serve(Probes)
