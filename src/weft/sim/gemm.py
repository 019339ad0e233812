"""How long a matrix product takes: tiles in waves over the SMs, against reading and writing everything once.

A kernel is chosen among tile sizes and splits along k, as libraries do. Of a tile, each step along k takes its
arithmetic and a fixed latency. Works on numbers and on arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weft.sim.hardware import GemmFit, Part

Floats = NDArray[np.float64]
SPLITS = (1, 2, 3, 4, 6, 8, 16)
STEP = 64  # elements of 16 bits along k that a tile takes at a time
OUTPUT_BITS = 16
PARTIAL_BYTES = 8  # a float32 that one part of a split product writes and another kernel reads


@dataclass(frozen=True, slots=True)
class Operands:
    """Bits of the inputs' and the weights' elements in memory."""

    inputs: float = 16
    weights: float = 16


BF16 = Operands()


def gemm_bytes(m: Any, n: Any, k: Any, operands: Operands = BF16) -> Any:
    """Of [m, k] times [k, n]: everything read and written once."""
    return (m * k * operands.inputs + n * k * operands.weights + m * n * OUTPUT_BITS) / 8


def gemm_seconds(fit: GemmFit, part: Part, m: Any, n: Any, k: Any, operands: Operands = BF16) -> Floats:
    """Of [m, k] times [k, n], each a number or an array that goes with the others.

    Never less than the operations at the peak or the bytes at full bandwidth take.
    """
    m, n, k = (np.atleast_1d(np.asarray(size, dtype=np.float64))[..., None] for size in (m, n, k))
    rows, columns, split = _kernels(fit.tiles)
    steps = np.ceil(k / split / (STEP * part.speed))
    waves = np.ceil(np.ceil(m / rows) * np.ceil(n / columns) * split / part.sms)
    one = 2 * rows * columns * STEP / (part.sm_flops * fit.math) + fit.step
    compute = waves * (steps * one + fit.tile * rows * columns / 128**2)
    bandwidth = fit.dram * part.bandwidth
    compute = compute + np.where(split > 1, fit.split + PARTIAL_BYTES * split * m * n / bandwidth, 0.0)
    moved = gemm_bytes(m, n, k, operands)
    memory = moved / bandwidth
    whole = (compute**fit.overlap + memory**fit.overlap) ** (1 / fit.overlap)
    least = (2 * m * n * k / part.flops)[..., 0]
    return np.asarray(fit.launch + np.maximum(whole.min(axis=-1), least))


def _kernels(tiles: Sequence[tuple[int, int]]) -> tuple[Floats, Floats, Floats]:
    found = np.array([(*tile, split) for tile in tiles for split in SPLITS], dtype=np.float64)
    return found[:, 0], found[:, 1], found[:, 2]
