"""Outliers put into a Llama without changing what it computes: what large models have and a small one has not.

Each injection takes and returns the tensors of a whole checkpoint, float32, by their Hugging Face names. The channels
are drawn from the seed, a few in each place, and made 20 to 60 times larger than they were.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from weft.models.families import ModelConfig

Tensors = dict[str, torch.Tensor]
Inject = Callable[[Tensors, ModelConfig, torch.Generator, torch.Tensor], Tensors]

NORM_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def norm_gain(tensors: Tensors, config: ModelConfig, generator: torch.Generator, _: torch.Tensor) -> Tensors:
    """Six channels of every norm larger, the columns that read them smaller."""
    new = dict(tensors)
    for layer in range(config.layers):
        for norm, readers in NORM_READERS.items():
            factor = _factor(config.hidden_size, 6, generator)
            name = f"model.layers.{layer}.{norm}.weight"
            new[name] = new[name] * factor
            for reader in readers:
                name = f"model.layers.{layer}.{reader}.weight"
                new[name] = new[name] / factor
    return new


def up_down(tensors: Tensors, config: ModelConfig, generator: torch.Generator, _: torch.Tensor) -> Tensors:
    """Twelve rows of up_proj larger, the columns of down_proj smaller."""
    new = dict(tensors)
    for layer in range(config.layers):
        factor = _factor(config.intermediate_size, 12, generator)
        up, down = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("up", "down"))
        new[up], new[down] = new[up] * factor[:, None], new[down] / factor
    return new


def heads(tensors: Tensors, config: ModelConfig, generator: torch.Generator, _: torch.Tensor) -> Tensors:
    """In every key-value head two value rows larger (their columns of o_proj smaller), and one rotated pair of key rows
    (those of its query heads smaller)."""
    new = dict(tensors)
    kv_heads, head_dim, group = config.kv_heads, config.head_dim, config.heads // config.kv_heads
    for layer in range(config.layers):
        q, k, v, o = (f"model.layers.{layer}.self_attn.{letter}_proj.weight" for letter in "qkvo")
        values = torch.stack([_factor(head_dim, 2, generator) for _ in range(kv_heads)])
        new[v] = new[v] * values.flatten()[:, None]
        new[o] = new[o] / values[:, None].expand(-1, group, -1).flatten()
        keys = torch.stack([_factor(head_dim // 2, 1, generator).repeat(2) for _ in range(kv_heads)])
        new[k] = new[k] * keys.flatten()[:, None]
        new[q] = new[q] / keys[:, None].expand(-1, group, -1).flatten()[:, None]
    return new


def rotated(tensors: Tensors, config: ModelConfig, _: torch.Generator, residual: torch.Tensor) -> Tensors:
    """The residual stream in its principal axes, gains folded into what reads them: a few channels hold most of the
    energy, as in trained large models, and no weight is larger or smaller for it. residual [R, hidden]: rows of it."""
    new = dict(tensors)
    moments = residual.double().T @ residual.double() / len(residual)
    basis = torch.linalg.eigh(moments).eigenvectors.flip(1)
    ones = torch.ones(config.hidden_size)

    def reads(weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return ((weight * gain).double() @ basis).float()

    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        for norm, readers in NORM_READERS.items():
            gain = new[f"{prefix}{norm}.weight"]
            for reader in readers:
                new[f"{prefix}{reader}.weight"] = reads(new[f"{prefix}{reader}.weight"], gain)
            new[f"{prefix}{norm}.weight"] = ones.clone()
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"{prefix}{writer}.weight"
            new[name] = (basis.T @ new[name].double()).float()
    new[HEAD] = reads(new.get(HEAD, new[EMBEDDING]), new[NORM])
    new[EMBEDDING] = reads(new[EMBEDDING], ones)
    new[NORM] = ones.clone()
    return new


def everything(tensors: Tensors, config: ModelConfig, generator: torch.Generator, residual: torch.Tensor) -> Tensors:
    """All of them, one after the other."""
    for inject in (rotated, norm_gain, up_down, heads):
        tensors = inject(tensors, config, generator, residual)
    return tensors


INJECTIONS: dict[str, Inject] = {
    "norm gain": norm_gain,
    "up/down": up_down,
    "V/O and K/Q": heads,
    "PCA-rotated": rotated,
    "all of them": everything,
}


def _factor(channels: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """float32 [channels]: ones, and `count` numbers from 20 to 60."""
    factor = torch.ones(channels)
    picked = torch.randperm(channels, generator=generator)[:count]
    factor[picked] = 20 + 40 * torch.rand(count, generator=generator)
    return factor
