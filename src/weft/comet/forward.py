"""A Llama-family layer in plain torch over whole sequences, open at its four linear layers and at its keys and values.

Calibration and the accuracy benchmark look at, or replace, what happens there; the serving decoder (weft.models) is for
speed and pages, and stays closed. Sites of a layer, each one input and one joined linear layer:

    norm ─▶ attention (q, k, v) ─▶ rotate, attend ─▶ output (o)      norm ─▶ mlp (gate, up) ─▶ silu · mul ─▶ down
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import linear, rms_norm, silu

SITES: dict[str, tuple[str, ...]] = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
INPUT_NORM, MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
Q_NORM, K_NORM = "self_attn.q_norm.weight", "self_attn.k_norm.weight"

Tensors = Mapping[str, torch.Tensor]  # of one layer, by their names below model.layers.N
Linears = Callable[[str, torch.Tensor], torch.Tensor]  # (site, [T, K]) -> [T, N], the site's linears joined
KeysValues = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Shapes(Protocol):
    """What this package reads of a model's config; `weft.models.families.ModelConfig` has it."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def eps(self) -> float: ...
    @property
    def windows(self) -> tuple[int | None, ...]: ...


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos and sin, float32 [L, head_dim / 2], of positions 0 to L - 1."""

    cos: torch.Tensor
    sin: torch.Tensor


def plain_linears(tensors: Tensors) -> Linears:
    """The layer's own weights, in float32."""

    def apply(site: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, *joined(tensors, site))

    return apply


def joined(tensors: Tensors, site: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights [N, K] and biases [N] of a site's linears, one below the other, float32."""
    names = SITES[site]
    weight = torch.cat([tensors[f"{name}.weight"].float() for name in names])
    biased = f"{names[0]}.bias" in tensors
    return weight, torch.cat([tensors[f"{name}.bias"].float() for name in names]) if biased else None


def run_layer(
    hidden: torch.Tensor,
    tensors: Tensors,
    shapes: Shapes,
    window: int | None,
    rotation: Rotation,
    linears: Linears,
    keys_values: KeysValues | None = None,
) -> torch.Tensor:
    """float32 [S, L, hidden] -> same: S whole sequences through one layer.

    keys_values: may change keys (after rotation) and values [S, L, kv_heads, head_dim] before attention sees them.
    """
    count, length, _ = hidden.shape

    def apply(site: str, x: torch.Tensor) -> torch.Tensor:
        return linears(site, x.reshape(count * length, -1)).view(count, length, -1)

    def normalised(x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, (x.shape[-1],), tensors[name].float(), shapes.eps)

    heads, kv_heads, head_dim = shapes.heads, shapes.kv_heads, shapes.head_dim
    parts = apply("attention", normalised(hidden, INPUT_NORM)).view(count, length, -1, head_dim)
    q, k, v = parts[:, :, :heads], parts[:, :, heads : heads + kv_heads], parts[:, :, heads + kv_heads :]
    if Q_NORM in tensors:
        q, k = normalised(q, Q_NORM), normalised(k, K_NORM)
    q, k = rotate(q, rotation), rotate(k, rotation)
    if keys_values is not None:
        k, v = keys_values(k, v)
    mixed = attend(q, k, v, window).reshape(count, length, heads * head_dim)
    hidden = hidden + apply("output", mixed)
    gate, up = apply("mlp", normalised(hidden, MLP_NORM)).chunk(2, dim=-1)
    return hidden + apply("down", silu(gate) * up)


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """x [S, L, H, D]: the pair (x[i], x[i + D / 2]) is turned by the i-th angle of its position."""
    cos, sin = rotation.cos[: x.shape[1], None], rotation.sin[: x.shape[1], None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Causal attention with grouped queries, [S, L, H, D] each; to the last `window` positions only, None for all."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = None
    if window is not None:
        positions = torch.arange(q.shape[2])
        distance = positions[:, None] - positions
        mask = (distance >= 0) & (distance < window)
    out: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2)
