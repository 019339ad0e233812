"""Attention on a GPU: rotary embedding, the keys and values, and what attends to them; one file for each backend."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from weft.errors import ConfigError
from weft.kernels.base import Batch

TRITON, TORCH, FLASHINFER = "triton", "torch", "flashinfer"


class Attention(Protocol):
    """A part of `Kernels` (base.py) that keeps its keys and values in a layout of its own.

    capturable: it never waits for the device, so a step of it can be recorded in a graph.
    """

    name: str
    capturable: bool

    def make_kv(
        self, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str = "auto"
    ) -> Any: ...

    def token_bytes(self, kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str) -> int:
        """Bytes of one token's keys and values in one layer. Raises ValueError for what `make_kv` refuses."""
        ...

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
    ) -> torch.Tensor: ...

    def attention(
        self, q: torch.Tensor, kv: Any, batch: Batch, heads: int, kv_heads: int, scale: float, window: int | None = None
    ) -> torch.Tensor: ...


def open_attention(name: str, device: torch.device) -> Attention:
    """The backend for --attention-backend `name`, which is never exchanged for another. Raises ConfigError.

    flashinfer is a name that is kept for it: its kernels run on GPUs only, and this code has not met one.
    """
    if name == TORCH:
        from weft.kernels.torch_attention import TorchAttention

        return TorchAttention(device)
    if name == TRITON:
        from weft.kernels.triton_backend import TritonAttention

        return TritonAttention(device)
    if name == FLASHINFER:
        raise ConfigError(
            f"--attention-backend is {name}, which this version of weft does not drive, whether or not "
            "flashinfer-python is installed; what would work: triton, torch"
        )
    raise ConfigError(f"--attention-backend is {name!r}; on a GPU it must be one of auto, triton, torch, flashinfer")
