"""What the machine itself reaches now, as a contestant of its own: memory bandwidth and BF16 arithmetic, by torch.

The question {"op": "run", ...} (its arguments are of no use here) answers {"bandwidth": bytes/s, "bf16": flop/s}. The
BF16 figure is a large matrix product's, about nine tenths of what the instructions alone would give.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from workerloop import serve

READ_BYTES = 512 * 2**20
ROWS, INNER = 512, 2048
PRODUCTS = 16


class Limits:
    def __init__(self) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._memory = torch.ones(READ_BYTES // 4)
        self._left = torch.randn(ROWS, INNER, dtype=torch.bfloat16)
        self._right = torch.randn(INNER, INNER, dtype=torch.bfloat16)
        self.name = f"torch {torch.__version__}"

    def run(self, **_: Any) -> dict[str, Any]:
        return {
            "bandwidth": READ_BYTES / _best(self._memory.sum),
            "bf16": 2 * ROWS * INNER * INNER * PRODUCTS / _best(self._multiply),
        }

    def score(self, **_: Any) -> dict[str, Any]:
        raise NotImplementedError("limits score nothing")

    def _multiply(self) -> None:
        for _ in range(PRODUCTS):
            torch.mm(self._left, self._right)


def _best(work: Any, times: int = 4) -> float:
    """Seconds of the fastest of a few runs: a limit is what is reached at best."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


if __name__ == "__main__":
    serve(Limits)
