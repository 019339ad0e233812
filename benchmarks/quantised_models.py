"""Quantised forms of a float model for benchmarks of speed, made in a minute: every weight rounded to its nearest.

* fmpq: what `weft quantize` would write, but with orders of channels drawn at random, and 8-bit blocks that are simply
  the first tenth. The down projection's input is transformed. Embedding and output layer have the bits that
  `weft quantize` gives them. It computes about what the float model computes, and runs as fast as a calibrated one.
* w8a8: compressed-tensors' int8 weights, one scale a row, with activations quantised token by token: for vLLM.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from weft.cli.quantize import NARROW
from weft.comet.checkpoint import (
    NORMS,
    PERMUTED,
    FmpqConfig,
    HeadForm,
    QuantisedLayer,
    QuantisedSite,
    layer_tensors,
    site_shapes,
)
from weft.comet.forward import SITES
from weft.comet.hadamard import hadamard
from weft.comet.outer import EMBEDDING, HEAD, NORM, Outer, outer_tensors, quantise_embedding
from weft.comet.packing import BLOCK
from weft.comet.reference import InputForm
from weft.comet.weights import Rounding, quantise_weight
from weft.comet.work import save_whole, shard, write_index
from weft.models.checkpoint import Checkpoint
from weft.models.families import ModelConfig, read_config

OUTLIER_SHARE = 0.1
TRANSFORMED = ("down",)
LEAST = 1e-20  # a row of zeros has a scale all the same
COMPLETE = "complete"  # a file that says so; what it holds is what the folder was made of
Tensors = dict[str, torch.Tensor]


def fmpq(folder: Path, cache: Path) -> Path:
    """The folder of the fmpq form of `folder`; made where the cache has none for these very weights."""
    return _made(folder, cache / "models" / f"{folder.name}-fmpq", _write_fmpq)


def w8a8(folder: Path, cache: Path) -> Path:
    """The folder of the int8 form of `folder`; made where the cache has none for these very weights."""
    return _made(folder, cache / "models" / f"{folder.name}-w8a8", _write_w8a8)


def _made(folder: Path, out: Path, write: Callable[[Path, Path], None]) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    state = json.dumps([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])
    done = out / COMPLETE
    if done.exists() and done.read_text() == state:
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for file in folder.glob("*.json"):
        shutil.copyfile(file, out / file.name)
    with torch.inference_mode():
        write(folder, out)
    done.write_text(state)
    return out


def _write_fmpq(folder: Path, out: Path) -> None:
    source, config = Checkpoint(folder), read_config(folder)
    drawn = torch.Generator().manual_seed(0)
    form = fmpq_config(config)
    for index in range(config.layers):
        prefix = f"model.layers.{index}."
        names = [name for name in source.entries if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): tensor for name, tensor in source.take(names).items()}
        layer = quantised_layer(tensors, config, form, index, drawn)
        stored = layer_tensors(layer, form, config)
        save_whole(shard(out, index, config.layers), {prefix + name: one for name, one in stored.items()}, {})
    names = [name for name in (EMBEDDING, NORM, HEAD) if name in source]
    outer = quantised_outer(source.take(names), config, form, drawn)
    stored = outer_tensors(outer, form, tied=config.tied)
    save_whole(shard(out, config.layers, config.layers), stored, {})
    write_index(out, config.layers)
    _add_quantisation(out, form.as_json())


def fmpq_config(config: ModelConfig) -> FmpqConfig:
    """The first tenth of the blocks of every input has 8 bits."""
    blocks = {site: round(OUTLIER_SHARE * columns / BLOCK) for site, (_, columns) in site_shapes(config).items()}
    hidden = config.hidden_size // BLOCK
    bits = 8 if config.hidden_size < NARROW else 4
    return FmpqConfig(
        outlier_weight_bits=4,
        outlier_blocks={site: (count,) * config.layers for site, count in blocks.items()},
        hadamard={site: (site in TRANSFORMED,) * config.layers for site in SITES},
        head=HeadForm(bits, hidden if bits == 8 else round(OUTLIER_SHARE * hidden), hadamard=False),
        embedding_bits=bits,
    )


def quantised_layer(
    tensors: Mapping[str, torch.Tensor], config: ModelConfig, form: FmpqConfig, index: int, drawn: torch.Generator
) -> QuantisedLayer:
    """tensors: by their names below model.layers.N. The order of `down`'s channels goes into the rows before it."""
    inner = torch.randperm(config.intermediate_size, generator=drawn)
    sites = {}
    for site, (rows, columns) in site_shapes(config).items():
        weights = [tensors[f"{name}.weight"].float() for name in rows]
        biases = [tensors[f"{name}.bias"].float() for name in rows if f"{name}.bias" in tensors]
        if site == "mlp":
            weights, biases = [weight[inner] for weight in weights], [bias[inner] for bias in biases]
        order = None
        if site in PERMUTED:
            order = _head_order(config, drawn) if site == "output" else torch.randperm(columns, generator=drawn)
        prepared = InputForm(columns, order, form.outlier_blocks[site][index], form.hadamard[site][index])
        joined = torch.cat(weights)[:, inner if order is None else order]
        sites[site] = _quantised_site(joined, torch.cat(biases) if biases else None, prepared)
    norms = {name: tensor for name, tensor in tensors.items() if name.endswith("norm.weight")}
    if missing := [name for name in NORMS if f"{name}.weight" not in norms]:
        raise ValueError(f"layer {index} lacks {missing[0]}.weight")
    return QuantisedLayer(sites, norms)


def quantised_outer(
    rest: Mapping[str, torch.Tensor], config: ModelConfig, form: FmpqConfig, drawn: torch.Generator
) -> Outer:
    head = form.head
    if head is None:
        raise ValueError("the output layer is quantised here")
    weight = rest.get(HEAD, rest[EMBEDDING]).float()
    order = torch.randperm(config.hidden_size, generator=drawn) if head.weight_bits == 4 else None
    prepared = InputForm(config.hidden_size, order, head.outlier_blocks, head.hadamard)
    site = _quantised_site(weight if order is None else weight[:, order], None, prepared, head.weight_bits)
    return Outer(quantise_embedding(rest[EMBEDDING], form.embedding_bits), rest[NORM], site)


def _quantised_site(
    weight: torch.Tensor, bias: torch.Tensor | None, form: InputForm, outlier_bits: int = 4
) -> QuantisedSite:
    """weight: columns in the order of the prepared input, not transformed yet."""
    kept = form.outlier_blocks * BLOCK
    if form.hadamard and kept < form.channels:
        weight = torch.cat((weight[:, :kept], hadamard(weight[:, kept:], BLOCK) / BLOCK), dim=1)
    rounding = Rounding(outlier_bits=outlier_bits, compensate=False, search=False)
    linear = quantise_weight(weight, bias, None, form.outlier_blocks, rounding, lambda _: None)
    order = None if form.permutation is None else form.permutation.int()
    return QuantisedSite(InputForm(form.channels, order, form.outlier_blocks, form.hadamard), linear)


def _head_order(config: ModelConfig, drawn: torch.Generator) -> torch.Tensor:
    """Whole heads in a drawn order, as `weft quantize` has the output projection's input."""
    heads = torch.randperm(config.heads, generator=drawn)
    return (heads[:, None] * config.head_dim + torch.arange(config.head_dim)).flatten()


def _write_w8a8(folder: Path, out: Path) -> None:
    source, tensors = Checkpoint(folder), {}
    for name in source.entries:
        tensor = source.take([name])[name]
        if tensor.ndim != 2 or name in (EMBEDDING, HEAD):
            tensors[name] = tensor.clone()
            continue
        values, scale = int8_rows(tensor.float())
        tensors[name], tensors[f"{name}_scale"] = values, scale.to(tensor.dtype)
    save_whole(out / "model.safetensors", tensors, {"format": "pt"})
    _add_quantisation(out, W8A8)


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N, K] -> int8 [N, K], scales float32 [N, 1], which bfloat16 holds exactly."""
    largest = weight.abs().amax(dim=1, keepdim=True).clamp_min(LEAST)
    scale = (largest / 127).bfloat16().float()
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


def _add_quantisation(out: Path, content: dict[str, Any]) -> None:
    path = out / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": content}, indent=1))


W8A8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
