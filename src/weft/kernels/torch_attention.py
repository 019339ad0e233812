"""Attention by the reference kernels, on the device where the tensors are: the slow oracle of the other backends."""

from __future__ import annotations

from typing import Any

import torch

from weft.kernels.base import Batch
from weft.kernels.kv import bits_of
from weft.kernels.reference import ReferenceKernels


class TorchAttention:
    """See attention.py. It reads lengths on the host, so that no graph can hold it."""

    name = "torch"
    capturable = False

    def __init__(self, device: torch.device) -> None:
        self._device = device  # the reference makes its tensors wherever torch makes them by default
        self._reference = ReferenceKernels(())

    def make_kv(
        self, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str = "auto"
    ) -> Any:
        with self._device:
            return self._reference.make_kv(blocks, block_size, kv_heads, head_dim, dtype, cache)

    def token_bytes(self, kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str) -> int:
        """A code takes a byte here, of 4 bits too."""
        plain = bits_of(cache, dtype) is None
        return 2 * kv_heads * (head_dim * dtype.itemsize if plain else head_dim + 3)

    def rotary_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: Any,
        batch: Batch,
        heads: int,
        kv_heads: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        with self._device:
            return self._reference.rotary_write(qkv, cos, sin, kv, batch, heads, kv_heads, q_norm, k_norm, eps)

    def attention(
        self, q: torch.Tensor, kv: Any, batch: Batch, heads: int, kv_heads: int, scale: float, window: int | None = None
    ) -> torch.Tensor:
        with self._device:
            return self._reference.attention(q, kv, batch, heads, kv_heads, scale, window)

    def planner(self, *_lane: Any, **_more: Any) -> None:
        """Nothing is planned."""
