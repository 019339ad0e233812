"""Models for tests of several ranks: the shape of a small one, and an fmpq checkpoint of random integers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weft.comet.checkpoint import FmpqConfig, HeadForm, tensor_shapes
from weft.comet.outer import embedding_shapes, head_shapes
from weft.models import quantised
from weft.models.families import parse_config

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 150,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
FMPQ: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "attention_bias": True,
    "mlp_bias": True,
}


def write_fmpq(folder: Path, outlier_bits: int, order: torch.Tensor | None = None, **changes: Any) -> None:
    """A checkpoint of random integers, with these changes to the model; o_proj's input is put in this order, one
    that ranks can cut if not given."""
    draw = torch.Generator().manual_seed(7)
    config = FMPQ | changes
    plain = parse_config(config)
    fmpq = FmpqConfig(
        outlier_bits,
        {"attention": (1, 0), "output": (1, 2), "mlp": (0, 1), "down": (2, 3)},
        dict.fromkeys(("attention", "output", "mlp", "down"), (True, False)),
        HeadForm(4, 1, True),
        4,
    )
    tensors: dict[str, torch.Tensor] = {}
    stored = embedding_shapes(fmpq, plain) | head_shapes(fmpq, plain)
    for index in range(plain.layers):
        stored |= {f"model.layers.{index}.{name}": form for name, form in tensor_shapes(fmpq, plain, index).items()}
        for name, shape in quantised.layer_shapes(plain, fmpq, index).items():
            if name.endswith("norm.weight"):
                tensors[name] = 1 + 0.2 * torch.randn(shape, generator=draw)
            elif name.endswith("bias"):
                tensors[name] = torch.randn(shape, generator=draw) * 0.1
    tensors["model.norm.weight"] = torch.ones(plain.hidden_size)
    for name, (shape, letters) in stored.items():
        if name.endswith("output.permutation"):
            blocks = [block for block in (2, 0, 3, 1) if block < shape[0] // 128]
            tensors[name] = (shuffled(*blocks) if order is None else order).int()
        elif name.endswith("permutation"):
            tensors[name] = torch.randperm(shape[0], generator=draw).int()
        elif letters == "I32":
            tensors[name] = torch.randint(-(2**31), 2**31, shape, generator=draw).int()
        elif letters == "I8":
            tensors[name] = torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8)
        else:
            tensors[name] = (torch.rand(shape, generator=draw) * 0.01).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fmpq.as_json()}))


def shuffled(*blocks: int) -> torch.Tensor:
    """These blocks of channels, in this order, each in an order of its own."""
    draw = torch.Generator().manual_seed(3)
    return torch.cat([128 * block + torch.randperm(128, generator=draw) for block in blocks])


@pytest.fixture(name="write_fmpq", scope="session")
def fmpq_writer() -> Callable[..., None]:
    return write_fmpq


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with the shape of a small model, with these changes to it."""

    def make(**changes: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(SMALL | changes))
        return tmp_path

    return make
