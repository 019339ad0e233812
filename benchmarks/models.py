"""The models that benchmarks run: the built-in one, and a Llama of 1.1 billion random weights, made on the spot."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SPREAD = 0.02
LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What the limits of a model follow from. body: weights of all matrices that every token is multiplied with.
    head: weights of the output matrix, which only a token that is followed by a draw meets."""

    vocabulary: int
    body: int
    head: int

    @classmethod
    def of(cls, folder: Path) -> Shape:
        config = json.loads((folder / "config.json").read_text())
        outer = ("model.embed_tokens.weight", "lm_head.weight")
        body = sum(math.prod(shape) for name, shape in tensors(config) if len(shape) == 2 and name not in outer)
        return cls(config["vocab_size"], body, config["vocab_size"] * config["hidden_size"])


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight of a Llama."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (config["vocab_size"], hidden)


def random_llama(cache: Path, config: dict[str, Any] | None = None, name: str = "llama-1.1b") -> Path:
    """The folder of the random-weight model; made when the cache has none. About 2.2 GB and half a minute."""
    config = LLAMA_1B if config is None else config
    folder = cache / "models" / name
    if (folder / "config.json").exists() and json.loads((folder / "config.json").read_text()) == config:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder / "model.safetensors", config)
    _write_tokenizer(folder, config["vocab_size"])
    # Last, because it says that the folder is complete.
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def _write_weights(path: Path, config: dict[str, Any]) -> None:
    """BF16 safetensors, tensor by tensor: normal with a standard deviation of 0.02, norms 1; always the same ones."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors(config):
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    rng = np.random.default_rng(0)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _, shape in tensors(config):
            file.write(_bits(np.ones(shape, np.float32) if len(shape) == 1 else _normal(rng, shape)))
    part.replace(path)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return rng.standard_normal(shape, np.float32) * np.float32(SPREAD)


def _bits(values: Any) -> bytes:
    """FP32 as BF16, rounded to nearest even."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    data: bytes = rounded.astype(np.uint16).tobytes()
    return data


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A word for each id, so that engines that insist on a tokenizer have one."""
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(vocabulary)}, "unk_token": "w0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))


def builtin() -> Path:
    """The folder of the model in the package."""
    from weft.text.hub import resolve_model

    return resolve_model("builtin", None)
