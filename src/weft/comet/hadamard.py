"""The Walsh-Hadamard transform of blocks: spreads an outlier over its block, and is undone exactly in the weights."""

from __future__ import annotations

import torch


def hadamard(x: torch.Tensor, size: int) -> torch.Tensor:
    """x [..., K], K a multiple of `size` (a power of two) -> x H for each run of `size` channels, not normalised.

    H H = size, so `hadamard(hadamard(x)) / size` is x. Sums and differences only, strides 1, 2, 4 ...: another backend
    that keeps this order has the same bits.
    """
    if size < 1 or size & (size - 1) or x.shape[-1] % size:
        raise ValueError(f"Hadamard blocks of {size} in {x.shape[-1]} channels: it must be a power of two that divides")
    rows = x.reshape(-1, x.shape[-1])
    stride = 1
    while stride < size:
        pairs = rows.view(len(rows), -1, 2, stride)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        sums = torch.empty_like(pairs)
        torch.add(first, second, out=sums[:, :, 0])
        torch.sub(first, second, out=sums[:, :, 1])
        rows = sums.view(len(rows), -1)
        stride *= 2
    return rows.view(x.shape)
