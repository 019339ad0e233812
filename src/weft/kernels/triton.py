"""Kernels for GPUs: cuBLAS through torch for plain products, one backend for attention, Triton for all the rest, and
for plain products too where a row's bits have to be its own.

Importing this module needs triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from weft.kernels import triton_linear, triton_norm, triton_w4ax
from weft.kernels.attention import Attention, open_attention
from weft.kernels.base import EMBEDDING_GROUP, Batch, check_embedding, kept_rows
from weft.kernels.reference import PlainEmbedding, PlainLinear
from weft.kernels.triton_rows import Norm
from weft.kernels.triton_w4ax import Prepared, TritonW4Ax


class TritonKernels:
    """Kernels (see base.py) on one GPU, or, where Triton interprets, on CPU tensors. Without state: lanes share it.

    attention: as --attention-backend. exact_a4: quantised linears round activations to 4 bits outside of the outlier
    blocks. sixteen: quantised linears leave activations in 16 bits (bfloat16 only). invariant: no product's bits depend
    on the number of rows; without it those of integers do not.
    """

    name = "triton"

    def __init__(
        self,
        device: torch.device,
        attention: str = "triton",
        *,
        exact_a4: bool = False,
        sixteen: bool = False,
        invariant: bool = False,
    ) -> None:
        self.device = device
        self.attend: Attention = open_attention(attention, device)
        self._exact_a4 = exact_a4
        self._sixteen = sixteen
        self._invariant = invariant

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PlainLinear:
        return PlainLinear(self._own(weight), None if bias is None else self._own(bias))

    def pack_w4ax(
        self,
        values: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        permutation: torch.Tensor | None = None,
        outlier_blocks: int = 0,
        hadamard: bool = False,
        zeros: torch.Tensor | None = None,
    ) -> Any:
        return triton_w4ax.pack_w4ax(
            values,
            scales,
            bias,
            permutation=permutation,
            outlier_blocks=outlier_blocks,
            hadamard=hadamard,
            zeros=zeros,
            exact_a4=self._exact_a4,
            device=self.device,
        )

    def linear(self, x: torch.Tensor | Prepared, packed: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """x may be prepared already, for this very weight."""
        if isinstance(x, Prepared):
            if x.packed is not packed:
                raise ValueError("the rows were prepared for another weight")
            return triton_w4ax.multiply_prepared(x, dtype, invariant=self._invariant)
        if isinstance(packed, TritonW4Ax):
            return self.linear(self._prepared(x, packed), packed, dtype)
        if self._invariant:
            return triton_linear.linear(x, packed, dtype)
        if dtype is None or dtype is x.dtype:
            return linear(x, packed.weight, packed.bias)
        return _wide(x, packed, dtype)

    def pack_embedding(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> PlainEmbedding:
        check_embedding(weight, scales)
        return PlainEmbedding(self._own(weight), None if scales is None else self._own(scales))

    def embed(self, tokens: torch.Tensor, packed: PlainEmbedding, dtype: torch.dtype) -> torch.Tensor:
        rows = packed.values[tokens]
        if packed.scales is None:
            return rows.to(dtype)
        groups = rows.float().view(len(tokens), -1, EMBEDDING_GROUP)
        return (groups * packed.scales[tokens].float()[:, :, None]).flatten(1).to(dtype)

    def make_kv(
        self, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str = "auto"
    ) -> Any:
        return self.attend.make_kv(blocks, block_size, kv_heads, head_dim, dtype, cache)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, reader: Any = None
    ) -> torch.Tensor | Prepared:
        if isinstance(reader, TritonW4Ax):
            return self._prepared(x, reader, Norm(weight, eps))
        return triton_norm.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, reader: Any = None
    ) -> tuple[torch.Tensor | Prepared, torch.Tensor]:
        if isinstance(reader, TritonW4Ax):
            return self._prepared(x, reader, Norm(weight, eps, residual)), residual
        return triton_norm.add_rms_norm(x, residual, weight, eps)

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
        return self.attend.rotary_write(qkv, cos, sin, kv, batch, heads, kv_heads, q_norm, k_norm, eps)

    def attention(
        self, q: torch.Tensor, kv: Any, batch: Batch, heads: int, kv_heads: int, scale: float, window: int | None = None
    ) -> torch.Tensor:
        return self.attend.attention(q, kv, batch, heads, kv_heads, scale, window)

    def keep(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        return kept_rows(x, batch)

    def silu_mul(self, gate_up: torch.Tensor, reader: Any = None) -> torch.Tensor | Prepared:
        if isinstance(reader, TritonW4Ax):
            return self._prepared(gate_up, reader, gated=True)
        return triton_norm.silu_mul(gate_up)

    def set_cores(self, cores: tuple[int, ...]) -> None:
        """A GPU has none to choose from: the stream decides what a lane runs on."""

    def close(self) -> None:
        """Nothing to stop; tensors go with their last user."""

    def _prepared(
        self, x: torch.Tensor, packed: TritonW4Ax, norm: Norm | None = None, *, gated: bool = False
    ) -> Prepared:
        return triton_w4ax.prepare(x, packed, norm, gated=gated, sixteen=self._sixteen)

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device).contiguous()


def _wide(x: torch.Tensor, packed: PlainLinear, dtype: torch.dtype) -> torch.Tensor:
    """The product in a wider type than x's, its sums not rounded to x's on the way."""
    if x.is_cuda:
        product = torch.mm(x, packed.weight.T, out_dtype=dtype)
        return product if packed.bias is None else product + packed.bias
    return linear(x.to(dtype), packed.weight.to(dtype), None if packed.bias is None else packed.bias.to(dtype))
