"""One decoder layer, cut at its two seams: attend, then feed.

    hidden ─▶ qkv ─▶ (norm) rotate, write KV ─▶ attention ─▶ output ─▶ partial      attend
    hidden ─▶ gate_up ─▶ silu · mul ─▶ down ─▶ partial                              feed (with experts: experts.py)

A partial is this rank's part of the stage's output; who drives the strand adds it to the residual and normalises. What
`hidden` is, only the linear that reads it needs to know (`reader` in kernels/base.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from weft.kernels.base import Batch, Kernels
from weft.models.experts import mix
from weft.models.families import ModelConfig
from weft.models.loader import LayerWeights


class Layer:
    """One layer's weights bound to one lane's kernels. Everything constant is looked up here, once.

    mlp_reader: the linear that alone reads what `feed` is given; None with experts, since several do.
    """

    __slots__ = (
        "_cos",
        "_eps",
        "_heads",
        "_kernels",
        "_kv_heads",
        "_scale",
        "_sin",
        "_weights",
        "_window",
        "mlp_norm",
        "mlp_reader",
    )

    def __init__(
        self,
        config: ModelConfig,
        weights: LayerWeights,
        kernels: Kernels,
        window: int | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None:
        self.mlp_norm, self.mlp_reader = weights.mlp_norm, weights.gate_up
        self._weights = weights
        self._kernels = kernels
        self._window = window
        self._cos, self._sin = cos, sin
        self._heads, self._kv_heads = config.heads, config.kv_heads
        self._scale = config.head_dim**-0.5
        self._eps = config.eps

    @property
    def mixed(self) -> bool:
        """Whether the layer has experts: which linears compute on a row depends on what is in the row."""
        return self._weights.mixture is not None

    def attend(self, hidden: Any, kv: Any, batch: Batch, *, last: bool = False) -> torch.Tensor:
        """[T, hidden] -> partial [T, hidden]; writes the rows' keys and values to their slots.

        last: of the last layer only the rows that the batch keeps are computed on: partial [R, hidden].
        """
        kernels, weights = self._kernels, self._weights
        heads, kv_heads = self._heads, self._kv_heads
        qkv = kernels.linear(hidden, weights.qkv)
        q = kernels.rotary_write(
            qkv, self._cos, self._sin, kv, batch, heads, kv_heads, weights.q_norm, weights.k_norm, self._eps
        )
        mixed = kernels.attention(q, kv, batch, heads, kv_heads, self._scale, self._window)
        if last:
            mixed = kernels.keep(mixed, batch)
        if weights.output_zeros:
            mixed = pad(mixed, (0, weights.output_zeros))
        return kernels.linear(mixed, weights.output)

    def feed(self, hidden: Any) -> torch.Tensor:
        """[T, hidden] -> partial [T, hidden]."""
        kernels, weights = self._kernels, self._weights
        if weights.mixture is not None:
            return mix(hidden, weights.mixture, kernels)
        activated = kernels.silu_mul(kernels.linear(hidden, weights.gate_up), weights.down)
        return kernels.linear(activated, weights.down)
