"""What the tests on a real GPU share: small models on disk. They run in a bare source tree: benchmarks/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights."""
    from safetensors.torch import save_file

    from weft.models.families import read_config
    from weft.models.loader import Dummy, tensor_shapes

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps({**TINY, "torch_dtype": "float32"}))
    shapes = tensor_shapes(read_config(folder))
    save_file(Dummy(shapes, 3).take(list(shapes)), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def quantised_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `weft quantize` writes it, of random integers: linear layers, output layer and embedding in 4
    bits, so that no product is left to a library that may sum another batch in another order."""
    from safetensors.torch import save_file

    from weft.comet.checkpoint import FmpqConfig, HeadForm, tensor_shapes
    from weft.comet.forward import SITES
    from weft.comet.outer import embedding_shapes, head_shapes
    from weft.models.families import parse_config

    folder = tmp_path_factory.mktemp("quantised")
    plain = parse_config(TINY)
    blocks = dict.fromkeys(SITES, (1,) * plain.layers)
    flags = dict.fromkeys(SITES, (True,) * plain.layers)
    form = FmpqConfig(8, blocks, flags, HeadForm(4, 1, True), 4)
    raw = {**TINY, "torch_dtype": "bfloat16", "quantization_config": form.as_json()}
    (folder / "config.json").write_text(json.dumps(raw))
    wanted = embedding_shapes(form, plain) | head_shapes(form, plain)
    norms = ["model.norm.weight"]
    for index in range(plain.layers):
        prefix = f"model.layers.{index}."
        wanted |= {f"{prefix}{name}": stored for name, stored in tensor_shapes(form, plain, index).items()}
        norms += [f"{prefix}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
    torch.manual_seed(5)
    tensors = {name: _drawn(name, *stored) for name, stored in wanted.items()}
    tensors |= {name: torch.ones(plain.hidden_size, dtype=torch.bfloat16) for name in norms}
    save_file(tensors, folder / "model.safetensors")
    return folder


def _drawn(name: str, shape: tuple[int, ...], letters: str) -> torch.Tensor:
    if name.endswith("permutation"):
        return torch.randperm(shape[0]).int()
    if letters == "I8":
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    if letters == "I32":  # eight values of 4 bits in each
        return torch.randint(-(2**31), 2**31, shape).int()
    scales = (torch.rand(shape) + 0.5) * 0.02
    return scales.bfloat16()
