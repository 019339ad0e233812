"""Which tokens can win a draw: so that the sampler (models/sampler.py) computes a few weights, not a vocabulary's."""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from weft import _native
except ImportError:  # without the extension draws take longer, and give the same tokens
    _native = None  # type: ignore[assignment]

Row = np.ndarray[Any, np.dtype[np.float32]]
Ids = np.ndarray[Any, np.dtype[np.int64]]

# Of shorter rows all weights are computed in no more time.
WORTHWHILE = 1024


def contenders(row: Row, peak: float, temperature: float, keys: tuple[int, int], level: str = "") -> Ids | None:
    """The ids that may have the largest weight / E of the race that the sampler's text defines, ascending: the winner
    is one of them. None: nothing is known, for the row is short, very many may win, or there is no extension.

    row: float32 [V] without NaN, contiguous; peak: its largest, finite. temperature: above 1e-38. keys: of the draw,
    low and high. level: of the kernels, the best of this CPU if none is named.
    """
    if _native is None or len(row) < WORTHWHILE:
        return None
    level = level or _native.levels()[0]
    found = _native.contenders(level, row.ctypes.data, len(row), peak, temperature, *keys)
    return None if found is None else np.array(found, np.int64)
