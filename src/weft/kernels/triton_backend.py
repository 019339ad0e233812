"""Attention in Triton, as a backend (see attention.py): for prefill, decode and mixed batches, in graphs too."""

from __future__ import annotations

from typing import Any

import torch

from weft.kernels import triton_attention, triton_kv, triton_rotary
from weft.kernels.base import Batch


class TritonAttention:
    """See attention.py. Importing this module needs triton."""

    name = "triton"
    capturable = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def make_kv(
        self, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str = "auto"
    ) -> Any:
        return triton_kv.make_kv(blocks, block_size, kv_heads, head_dim, dtype, cache, self._device)

    def token_bytes(self, kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str) -> int:
        return triton_kv.token_bytes(kv_heads, head_dim, dtype, cache)

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
        return triton_rotary.rotary_write(qkv, cos, sin, kv, batch, heads, kv_heads, q_norm, k_norm, eps)

    def attention(
        self, q: torch.Tensor, kv: Any, batch: Batch, heads: int, kv_heads: int, scale: float, window: int | None = None
    ) -> torch.Tensor:
        return triton_attention.attention(q, kv, batch, heads, kv_heads, scale, window)

    def planner(self, *_lane: Any, **_more: Any) -> None:
        """Nothing is planned."""
