"""Attention on a GPU: rotary embedding, the keys and values, and what attends to them; one file for each backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from weft.errors import ConfigError
from weft.kernels.base import Batch

TRITON, TORCH, FLASHINFER = "triton", "torch", "flashinfer"


@dataclass(frozen=True, slots=True)
class Shape:
    """What attention is asked for in every step of a model. windows: those of its layers, each once."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    block_size: int
    dtype: torch.dtype
    windows: tuple[int | None, ...]


class Planner(Protocol):
    """Of one lane: tells a backend of each step on the host, before it is launched."""

    def plan(self, batch: Batch, *, captured: bool = False) -> Any:
        """What `Batch.plan` is of this step's batch on the device. batch: on the host. What is planned is copied there
        by this stream, from memory that the next plan overwrites: who plans again waits until the stream got here.

        captured: for a decode step in a graph, which is recorded with what this returns, and replayed after another
        plan for as many rows: that is the same object.
        """
        ...

    def bytes(self, graphs: int) -> int:
        """Of the device that are held, with so many sizes of graphs."""
        ...


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

    def planner(
        self, shape: Shape, max_slices: int, width: int, send: Callable[[torch.Tensor], torch.Tensor]
    ) -> Planner | None:
        """One for a lane whose steps have up to `max_slices` slices, with tables of up to `width` blocks; None where
        nothing is planned. send: copies a tensor of the host's to the device, on the stream, without waiting."""
        ...


def open_attention(name: str, device: torch.device) -> Attention:
    """The backend for --attention-backend `name`, which is never exchanged for another. Raises ConfigError."""
    if name == TORCH:
        from weft.kernels.torch_attention import TorchAttention

        return TorchAttention(device)
    if name == TRITON:
        from weft.kernels.triton_backend import TritonAttention

        return TritonAttention(device)
    if name == FLASHINFER:
        from weft.kernels.flashinfer_attention import open_flashinfer

        return open_flashinfer(device)
    raise ConfigError(f"--attention-backend is {name!r}; on a GPU it must be one of auto, triton, torch, flashinfer")
