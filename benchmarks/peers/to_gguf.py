"""A Hugging Face folder of the Llama architecture as a BF16 GGUF file, without a tokenizer: ids go in and come out.

Usage: to_gguf.py FOLDER FILE. Needs numpy and gguf. Weights stay the same bits; the two norms of a layer become FP32,
as llama.cpp wants them. Reads safetensors by itself, because the environment has no torch.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def read_safetensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """BF16 tensors as uint16 bits, mapped rather than read."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", 8 + length)
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} is {entry['dtype']}; this converter takes BF16 only")
            first, last = entry["data_offsets"]
            found[name] = data[first:last].view(np.uint16).reshape(entry["shape"])
    return found


def interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of q or k in llama.cpp's order: it rotates neighbours (2i, 2i + 1), Hugging Face the halves (i, i + d/2)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{kind}"


def convert(folder: Path, out: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        raise SystemExit(f"model_type is {config['model_type']}; this converter takes llama only")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(str(out), "llama")
    writer.add_name(folder.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(32)  # MOSTLY_BF16
    writer.add_tokenizer_model("no_vocab")
    for path in sorted(folder.glob("*.safetensors")):
        for name, bits in read_safetensors(path).items():
            add(writer, name, bits, heads, kv_heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: GGUFWriter, name: str, bits: np.ndarray[Any, Any], heads: int, kv_heads: int) -> None:
    if bits.ndim == 1:
        wide = (bits.astype(np.uint32) << 16).view(np.float32)
        writer.add_tensor(gguf_name(name), wide)
        return
    if "q_proj" in name or "k_proj" in name:
        bits = interleave(bits, heads if "q_proj" in name else kv_heads)
    data = np.ascontiguousarray(bits).view(np.uint8)
    writer.add_tensor(gguf_name(name), data, raw_shape=data.shape, raw_dtype=GGMLQuantizationType.BF16)


def rope_theta(config: dict[str, Any]) -> float:
    """rope_theta where transformers 5 puts it, or where earlier versions did."""
    scaled = config.get("rope_parameters") or {}
    if config.get("rope_scaling") or scaled.get("rope_type", "default") != "default":
        raise SystemExit("this converter takes plain rotary embedding only")
    return float(scaled.get("rope_theta") or config.get("rope_theta") or 10000.0)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
