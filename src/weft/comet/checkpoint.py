"""The fmpq checkpoint: a quantised layer as named tensors, and the part of config.json that describes them.

docs/fmpq_checkpoint.md is the format's description. Reading checks everything that a kernel would rely on: a wrong
permutation or a cut tensor is an error that names file and tensor, never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weft.comet.forward import SITES, Shapes
from weft.comet.packing import BLOCK, PER_WORD, pack_nibbles, unpack_nibbles
from weft.comet.reference import InputForm, QuantisedLinear
from weft.errors import CheckpointError

METHOD = "fmpq"
VERSION = 1
KEY = "quantization_config"
PERMUTED = ("attention", "output", "mlp")  # the order of `down` is hidden in the rows of gate_proj and up_proj
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class QuantisedSite:
    """How the input of a site is prepared, and the integers of its linears, joined."""

    form: InputForm
    linear: QuantisedLinear


@dataclass(frozen=True, slots=True)
class QuantisedLayer:
    """sites by name; norms by tensor name, in their stored dtype."""

    sites: dict[str, QuantisedSite]
    norms: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class FmpqConfig:
    """`quantization_config` of an fmpq checkpoint. outlier_blocks and hadamard: for each site, one entry a layer."""

    outlier_weight_bits: int
    outlier_blocks: dict[str, tuple[int, ...]]
    hadamard: dict[str, tuple[bool, ...]]

    def as_json(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "version": VERSION,
            "block_size": BLOCK,
            "weight_bits": 4,
            "outlier_weight_bits": self.outlier_weight_bits,
            "activation_bits": 4,
            "outlier_activation_bits": 8,
            "outlier_blocks": {site: list(counts) for site, counts in self.outlier_blocks.items()},
            "hadamard": {site: list(flags) for site, flags in self.hadamard.items()},
            "modules_to_not_convert": ["lm_head"],
        }


def parse(raw: Any, shapes: Shapes) -> FmpqConfig:
    """The parsed `quantization_config`. Raises CheckpointError naming the key and its value."""
    if not isinstance(raw, Mapping):
        raise _wrong("", raw, "it must be an object")
    for key, wanted in {
        "quant_method": METHOD,
        "version": VERSION,
        "block_size": BLOCK,
        "weight_bits": 4,
        "activation_bits": 4,
        "outlier_activation_bits": 8,
        "modules_to_not_convert": ["lm_head"],
    }.items():
        if raw.get(key) != wanted or isinstance(raw.get(key), bool):
            raise _wrong(key, raw.get(key), f"this version of weft reads {wanted!r}")
    bits = raw.get("outlier_weight_bits")
    if bits not in (4, 8) or isinstance(bits, bool):
        raise _wrong("outlier_weight_bits", bits, "it must be 4 or 8")
    inputs = site_shapes(shapes)
    blocks: dict[str, tuple[int, ...]] = {}
    flags: dict[str, tuple[bool, ...]] = {}
    for site, (_, channels) in inputs.items():
        check_divisible(channels, f"{KEY} of config.json", f"the {site} input")
        blocks[site] = _per_layer(raw, "outlier_blocks", site, shapes.layers, range(channels // BLOCK + 1), int)
        flags[site] = _per_layer(raw, "hadamard", site, shapes.layers, (False, True), bool)
    return FmpqConfig(bits, blocks, flags)


def site_shapes(shapes: Shapes) -> dict[str, tuple[dict[str, int], int]]:
    """For each site the rows of its linears by name, and their columns."""
    queries, keys = shapes.heads * shapes.head_dim, shapes.kv_heads * shapes.head_dim
    rows = {
        "attention": (queries, keys, keys),
        "output": (shapes.hidden_size,),
        "mlp": (shapes.intermediate_size, shapes.intermediate_size),
        "down": (shapes.hidden_size,),
    }
    columns = {
        "attention": shapes.hidden_size,
        "output": queries,
        "mlp": shapes.hidden_size,
        "down": shapes.intermediate_size,
    }
    return {site: (dict(zip(SITES[site], rows[site], strict=True)), columns[site]) for site in SITES}


def layer_tensors(layer: QuantisedLayer, shapes: Shapes, outlier_weight_bits: int) -> dict[str, torch.Tensor]:
    """The tensors of one layer, by their names below model.layers.N."""
    tensors: dict[str, torch.Tensor] = dict(layer.norms)
    for site, (rows, _) in site_shapes(shapes).items():
        form, linear = layer.sites[site].form, layer.sites[site].linear
        if form.permutation is not None:
            tensors[f"{site}.permutation"] = form.permutation.int()
        eight = form.outlier_blocks * BLOCK if outlier_weight_bits == 8 else 0
        start = 0
        for name, count in rows.items():
            part = slice(start, start + count)
            start += count
            tensors[f"{name}.weight_packed"] = pack_nibbles(linear.values[part, eight:])
            tensors[f"{name}.weight_scale"] = linear.scales[part].to(SCALE_DTYPE)
            if eight:
                tensors[f"{name}.weight_outlier"] = linear.values[part, :eight].contiguous()
            if linear.bias is not None:
                tensors[f"{name}.bias"] = linear.bias[part].clone()
    return tensors


def tensor_shapes(config: FmpqConfig, shapes: Shapes, index: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes (in safetensors' letters) of layer `index`'s tensors, biases and norms apart."""
    wanted: dict[str, tuple[tuple[int, ...], str]] = {}
    for site, (rows, columns) in site_shapes(shapes).items():
        eight = config.outlier_blocks[site][index] * BLOCK if config.outlier_weight_bits == 8 else 0
        if site in PERMUTED:
            wanted[f"{site}.permutation"] = ((columns,), "I32")
        for name, count in rows.items():
            wanted[f"{name}.weight_packed"] = ((count, (columns - eight) // PER_WORD), "I32")
            wanted[f"{name}.weight_scale"] = ((count, columns // BLOCK), "BF16")
            if eight:
                wanted[f"{name}.weight_outlier"] = ((count, eight), "I8")
    return wanted


def read_layer(
    tensors: Mapping[str, torch.Tensor], config: FmpqConfig, shapes: Shapes, index: int, file: Path
) -> QuantisedLayer:
    """The layer from its tensors. file: where they come from, for errors. Raises CheckpointError."""
    for name, (shape, dtype) in tensor_shapes(config, shapes, index).items():
        if name not in tensors:
            raise CheckpointError(f"{file} lacks the tensor {name} of layer {index}")
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != _DTYPES[dtype]:
            raise CheckpointError(
                f"{file}: {name} of layer {index} is {_LETTERS.get(found.dtype, found.dtype)} "
                f"{list(found.shape)}; the config asks for {dtype} {list(shape)}"
            )
    sites = {}
    for site, (rows, columns) in site_shapes(shapes).items():
        permutation = None
        if site in PERMUTED:
            permutation = tensors[f"{site}.permutation"]
            check_permutation(permutation, str(file), f"{site}.permutation of layer {index}")
        form = InputForm(columns, permutation, config.outlier_blocks[site][index], config.hadamard[site][index])
        eight = form.outlier_blocks * BLOCK if config.outlier_weight_bits == 8 else 0
        values, scales, biases = [], [], []
        for name in rows:
            four = unpack_nibbles(tensors[f"{name}.weight_packed"], columns - eight)
            values.append(torch.cat((tensors[f"{name}.weight_outlier"], four), dim=1) if eight else four)
            scale = tensors[f"{name}.weight_scale"].float()
            if not bool(torch.isfinite(scale).all()):
                raise CheckpointError(f"{file}: {name}.weight_scale of layer {index} has a value that is not finite")
            scales.append(scale)
            if f"{name}.bias" in tensors:
                biases.append(tensors[f"{name}.bias"].float())
        bias = torch.cat(biases) if biases else None
        sites[site] = QuantisedSite(form, QuantisedLinear(torch.cat(values), torch.cat(scales), bias))
    norms = {name: tensor for name, tensor in tensors.items() if name.endswith("norm.weight")}
    return QuantisedLayer(sites, norms)


def check_permutation(permutation: torch.Tensor, file: str, name: str) -> None:
    """Raise CheckpointError unless every channel occurs once."""
    if not torch.equal(permutation.long().sort().values, torch.arange(len(permutation))):
        raise CheckpointError(f"{file}: {name} is no permutation: each of 0 to {len(permutation) - 1} must occur once")


def check_divisible(channels: int, file: str, name: str) -> None:
    """Raise CheckpointError for a number of input channels that blocks do not divide."""
    if channels % BLOCK:
        raise CheckpointError(
            f"{file}: {name} has {channels} input channels; weft quantises in blocks of {BLOCK}, which must divide them"
        )


_DTYPES = {"I32": torch.int32, "BF16": torch.bfloat16, "I8": torch.int8}
_LETTERS = {dtype: letters for letters, dtype in _DTYPES.items()}


def _per_layer(
    raw: Mapping[str, Any], key: str, site: str, layers: int, allowed: Collection[Any], kind: type
) -> tuple[Any, ...]:
    table = raw.get(key)
    entries: Any = table.get(site) if isinstance(table, Mapping) else None
    whole = isinstance(entries, list) and len(entries) == layers
    if not whole or not all(type(entry) is kind and entry in allowed for entry in entries):
        choice = f"{kind.__name__}s from {min(allowed)} to {max(allowed)}"
        raise _wrong(f"{key}.{site}", entries, f"it must list {layers} {choice}, one for each layer")
    return tuple(entries)


def _wrong(key: str, value: Any, reason: str) -> CheckpointError:
    shown = repr(value) if len(repr(value)) <= 200 else repr(value)[:200] + "..."
    return CheckpointError(f"config.json: {KEY}{'.' if key else ''}{key} is {shown}; {reason}")
