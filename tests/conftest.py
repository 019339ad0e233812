"""Where there is no GPU, Triton interprets its kernels. It reads the variable while it is imported, so that this comes
before any test module."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests import row_products

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}

EXPERTS = TINY | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if row_products.wanted():
    row_products.compute_rows_alone()


if find_spec("hypothesis") is not None:  # a bare GPU image has none
    from hypothesis import HealthCheck, settings

    # How long an example takes says something of the machine, and nothing of the code.
    settings.register_profile("weft", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("weft")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights that is small enough for interpreted kernels. Its vocabulary is the built-in
    model's."""
    return _write(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture(scope="session")
def tiny_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as a Mixtral."""
    return _write(tmp_path_factory.mktemp("experts"), EXPERTS)


def _write(made: Path, config: dict[str, Any]) -> Path:
    import torch
    from safetensors.torch import save_file

    from weft.models.families import read_config
    from weft.models.loader import tensor_shapes

    (made / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.ones(shape) if name.endswith("norm.weight") else torch.randn(shape, generator=generator) * 0.2
        for name, shape in tensor_shapes(read_config(made)).items()
    }
    save_file(tensors, made / "model.safetensors")
    return made
