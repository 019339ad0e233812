"""Products of interpreted kernels, row by row.

A GPU gives a row of a product the same bits wherever it stands, and so does the kernels' reference. numpy, with which
Triton interprets kernels, leaves products to a library that does so on some CPUs and not on others.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import numpy as np


def wanted() -> bool:
    """Whether kernels are interpreted, on a CPU where a row's bits depend on its place."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return False
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((33, 100), np.float32), rng.standard_normal((100, 40), np.float32)
    return not all(np.array_equal((x[::-1] @ w[:, :n])[::-1], x @ w[:, :n]) for n in (1, 2, 16, 40))


def compute_rows_alone() -> None:
    """From now on, in this process, each row of an interpreted product is computed by itself."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    whole = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.data.ndim != 2:
            return whole(self, a, b, d, *rest)
        rows = [
            whole(self, TensorHandle(left, a.dtype), b, TensorHandle(sums, d.dtype), *rest).data
            for left, sums in zip(np.split(a.data, len(a.data)), np.split(d.data, len(d.data)), strict=True)
        ]
        return TensorHandle(np.concatenate(rows), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
