"""The truth: every kernel in a few lines of plain torch. Slow; other backends are compared with it.

All arithmetic is float32 and is rounded once, to the dtype of the activations, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear, silu

from weft.errors import DeviceError
from weft.kernels.base import EMBEDDING_GROUP, Batch, check_embedding, kept_rows
from weft.kernels.kv import Codes, QuantisedKv, bits_of


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """weight [out, in] and bias [out], as given."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PlainEmbedding:
    """values [vocabulary, D], as given; scales [vocabulary, D / 128] of integers."""

    values: torch.Tensor
    scales: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PlainKv:
    """keys and values [blocks, block_size, kv_heads, head_dim]. kernels/kv.py has the same with fewer bits."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def block_size(self) -> int:
        return self.keys.shape[1]

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """float32 [T, kv_heads, head_dim] each, into slots [T]."""
        at = (slots // self.block_size, slots % self.block_size)
        self.keys[at], self.values[at] = keys.to(self.keys.dtype), values.to(self.values.dtype)

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Whole blocks to others."""
        for part in (self.keys, self.values):
            part[list(target)] = part[list(source)]

    def read(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of these blocks, float32 [slots, kv_heads, head_dim] each."""
        return self.keys[blocks].flatten(0, 1).float(), self.values[blocks].flatten(0, 1).float()

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        return q

    def output(self, x: torch.Tensor) -> torch.Tensor:
        return x


class ReferenceKernels:
    """Kernels (see base.py) in plain torch, on torch's own threads."""

    name = "reference"

    def __init__(self, cores: tuple[int, ...]) -> None:
        self.cores = cores

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PlainLinear:
        return PlainLinear(weight, bias)

    def pack_w4ax(self, *_weight: Any, **_form: Any) -> Any:
        # The reference of quantised linears is comet/reference.py, which these kernels may not import.
        raise DeviceError("these kernels have no quantised linears; weft.comet.linear.QuantisedReferenceKernels have")

    def linear(self, x: torch.Tensor, packed: PlainLinear, dtype: torch.dtype | None = None) -> torch.Tensor:
        bias = None if packed.bias is None else packed.bias.float()
        return linear(x.float(), packed.weight.float(), bias).to(dtype or x.dtype)

    def pack_embedding(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> PlainEmbedding:
        check_embedding(weight, scales)
        return PlainEmbedding(weight, scales)

    def embed(self, tokens: torch.Tensor, packed: PlainEmbedding, dtype: torch.dtype) -> torch.Tensor:
        rows = packed.values[tokens].float()
        if packed.scales is not None:
            groups = rows.view(len(tokens), -1, EMBEDDING_GROUP)
            rows = (groups * packed.scales[tokens].float()[:, :, None]).flatten(1)
        return rows.to(dtype)

    def make_kv(
        self, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str = "auto"
    ) -> PlainKv | QuantisedKv:
        shape, bits = (blocks, block_size, kv_heads, head_dim), bits_of(cache, dtype)
        if bits is not None:
            return QuantisedKv(Codes.make(*shape), Codes.make(*shape), bits)
        return PlainKv(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        reader: Any = None,  # noqa: ARG002
    ) -> torch.Tensor:
        return _normalise(x.float(), weight, eps).to(x.dtype)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        reader: Any = None,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual.copy_(residual.float() + x.float())
        return self.rms_norm(residual, weight, eps), residual

    def rotary_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: PlainKv | QuantisedKv,
        batch: Batch,
        heads: int,
        kv_heads: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        rows = len(qkv)
        parts = qkv.float().view(rows, heads + 2 * kv_heads, -1)
        q, k, v = parts[:, :heads], parts[:, heads : heads + kv_heads], parts[:, heads + kv_heads :]
        q = q if q_norm is None else _normalise(q, q_norm, eps)
        k = k if k_norm is None else _normalise(k, k_norm, eps)
        positions = batch.positions.long()
        q, k = (_rotate(part, cos[positions, None], sin[positions, None]) for part in (q, k))
        kv.write(batch.slots, k, v)
        return kv.queries(q).to(qkv.dtype).reshape(rows, -1)

    def attention(
        self,
        q: torch.Tensor,
        kv: PlainKv | QuantisedKv,
        batch: Batch,
        heads: int,
        kv_heads: int,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        starts = batch.starts.tolist()
        for first, end, context, table in zip(
            starts[:-1], starts[1:], batch.contexts.tolist(), batch.tables, strict=True
        ):
            keys, values = (  # [heads, context, head_dim]: each kv head serves heads / kv_heads query heads in turn
                part[:context].transpose(0, 1).repeat_interleave(heads // kv_heads, dim=0)
                for part in kv.read(table[: -(-context // kv.block_size)].long())
            )
            queries = q[first:end].float().view(end - first, heads, -1).transpose(0, 1)
            distance = batch.positions[first:end, None] - torch.arange(context)
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            weights = (queries @ keys.mT * scale).masked_fill(hidden, -torch.inf).softmax(dim=-1)
            out[first:end] = kv.output(weights @ values).transpose(0, 1).reshape(end - first, -1)
        return out

    def keep(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        return kept_rows(x, batch)

    def silu_mul(self, gate_up: torch.Tensor, reader: Any = None) -> torch.Tensor:  # noqa: ARG002
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (silu(gate) * up).to(gate_up.dtype)

    def set_cores(self, cores: tuple[int, ...]) -> None:
        self.cores = cores

    def close(self) -> None:
        pass


def _normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x float32 [..., D], weight [D]."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [..., D]: the pair (x[i], x[i + D/2]) is turned by the i-th angle; cos and sin [..., D / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
