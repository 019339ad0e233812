"""Tiny random models of each family, as a config and tensors, with outliers that a trained model has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from weft.comet.calibrate import Model
from weft.comet.forward import Rotation
from weft.comet.outer import EMBEDDING, NORM
from weft.models.families import ModelConfig, parse_config
from weft.models.loader import layer_shapes
from weft.models.rope import Rotary

FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "biased llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 5},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 64},
}


def tiny_config(family: str = "llama", **changes: Any) -> tuple[dict[str, Any], ModelConfig]:
    """(config.json, what is read of it)."""
    raw: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    raw |= FAMILIES[family] | changes
    return raw, parse_config(raw)


def random_layer(config: ModelConfig, index: int) -> dict[str, torch.Tensor]:
    """One layer's tensors by their names below the layer; some channels of each norm and of up_proj are large."""
    generator = torch.Generator().manual_seed(index)
    tensors = {}
    for name, shape in layer_shapes(config, index).items():
        short = name.removeprefix(f"model.layers.{index}.")
        if short.endswith("norm.weight"):
            tensors[short] = 1 + 0.2 * torch.randn(shape, generator=generator)
        else:
            tensors[short] = 0.08 * torch.randn(shape, generator=generator)
        if short in ("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.up_proj.weight"):
            tensors[short][5::50] *= 20
    return tensors


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Model:
    layers = [
        {name: tensor.to(dtype) for name, tensor in random_layer(config, index).items()}
        for index in range(config.layers)
    ]
    generator = torch.Generator().manual_seed(99)
    rest: Mapping[str, torch.Tensor] = {
        EMBEDDING: torch.randn(config.vocabulary, config.hidden_size, generator=generator).to(dtype),
        NORM: torch.full((config.hidden_size,), 0.125, dtype=dtype),
    }
    rotation = Rotation(*Rotary(config.rope, config.head_dim).tables(config.context))
    return Model(config, rotation, lambda index: layers[index], lambda: rest, lambda name: f"the file of {name}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only lose by being shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model_of() -> Callable[..., Model]:
    """A tiny model of a family; keyword arguments change its config."""

    def build(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
        return make_model(tiny_config(family, **changes)[1], dtype)

    return build
