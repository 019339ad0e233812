"""fmpq checkpoints (docs/fmpq_checkpoint.md): which tensors they hold, and a layer of them as the decoder's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from weft.comet.checkpoint import (
    FmpqConfig,
    QuantisedSite,
    Stored,
    check_permutation,
    read_layer,
    site_shapes,
    tensor_shapes,
)
from weft.comet.forward import INPUT_NORM, K_NORM, MLP_NORM, Q_NORM
from weft.comet.outer import EMBEDDING, HEAD, NORM, embedding_shapes, head_shapes, read_embedding, read_head
from weft.kernels.base import Kernels
from weft.models.checkpoint import Checkpoint, Shape
from weft.models.families import ModelConfig
from weft.models.shard import Part, Shard, fmpq_cuts, head_cut, head_rows, output_order, shard_fmpq

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I8": 1}  # what a file may hold, in safetensors' letters


def outer_shapes(config: ModelConfig, fmpq: FmpqConfig) -> dict[str, Shape]:
    """The tensors outside of the layers and their shapes; an output layer that is left as it was among them."""
    table = (config.vocabulary, config.hidden_size)
    embedding = {name: shape for name, (shape, _) in embedding_shapes(fmpq, config).items()} or {EMBEDDING: table}
    head = {name: shape for name, (shape, _) in head_shapes(fmpq, config).items()} or {HEAD: table}
    return embedding | head | {NORM: (config.hidden_size,)}


def shard(source: Checkpoint, config: ModelConfig, fmpq: FmpqConfig, part: Part) -> tuple[Shard, FmpqConfig]:
    """This rank's tensors and what the config says of them. Raises CheckpointError for an order that is none."""
    names = [f"{_prefix(index)}output.permutation" for index in range(config.layers)]
    found = source.take(names)
    orders = [found[name] for name in names]
    cuts = {name: head_cut(config, part) for name in (HEAD, *_rows(head_shapes(fmpq, config)))}
    made = {}
    for index, (name, order) in enumerate(zip(names, orders, strict=True)):
        check_permutation(order, str(source.entries[name].file), name)
        cuts |= fmpq_cuts(fmpq, config, part, index, _prefix(index), order)
        made[name] = output_order(order, config, part)
    return Shard(source, cuts, made), shard_fmpq(fmpq, config, part, orders)


def take_outer(
    source: Shard, config: ModelConfig, fmpq: FmpqConfig, kernels: Kernels, dtype: torch.dtype, part: Part
) -> tuple[Any, Any]:
    """The packed embedding and output layer. config: of the whole model. Raises CheckpointError naming file and
    tensor."""
    embedding = None
    if names := list(embedding_shapes(fmpq, config)):
        found = read_embedding(source.take(names), fmpq, config, source.entries[names[0]].file)
        packed = kernels.pack_embedding(found.values, found.scales)
    else:
        embedding = source.take([EMBEDDING])[EMBEDDING].to(dtype, copy=True)
        packed = kernels.pack_embedding(embedding)
    if names := list(head_shapes(fmpq, config)):
        rows = replace(config, vocabulary=head_rows(config.vocabulary, part.ranks))
        head = _pack(read_head(source.take(names), fmpq, rows, source.entries[names[0]].file), kernels)
    elif embedding is None or HEAD in source:  # a quantised embedding is never the output layer
        head = kernels.pack_linear(source.take([HEAD])[HEAD].to(dtype, copy=True))
    else:
        head = kernels.pack_linear(head_cut(config, part).read(embedding, embedding.shape))
    return packed, head


def layer_shapes(config: ModelConfig, fmpq: FmpqConfig, index: int) -> dict[str, Shape]:
    """The tensors of layer `index`, by their names in the files, and their shapes."""
    shapes = {name: shape for name, (shape, _) in tensor_shapes(fmpq, config, index).items()}
    biased = {
        "attention": config.qkv_bias,
        "output": config.output_bias,
        "mlp": config.mlp_bias,
        "down": config.mlp_bias,
    }
    for site, (rows, _) in site_shapes(config).items():
        if biased[site]:
            shapes |= {f"{name}.bias": (count,) for name, count in rows.items()}
    shapes |= {INPUT_NORM: (config.hidden_size,), MLP_NORM: (config.hidden_size,)}
    if config.qk_norm:
        shapes |= {Q_NORM: (config.head_dim,), K_NORM: (config.head_dim,)}
    return {f"{_prefix(index)}{name}": shape for name, shape in shapes.items()}


def take_layer(
    source: Shard, config: ModelConfig, fmpq: FmpqConfig, index: int, kernels: Kernels, dtype: torch.dtype
) -> dict[str, Any]:
    """The fields of LayerWeights. Raises CheckpointError naming file and tensor."""
    names = list(layer_shapes(config, fmpq, index))
    prefix = _prefix(index)
    heads = config.heads * config.head_dim
    order = source.made.get(f"{prefix}output.permutation")
    channels = heads if order is None else len(order)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in source.take(names).items()}
    layer = read_layer(tensors, fmpq, config, index, source.entries[names[0]].file, channels)
    norms = {name: norm.to(dtype, copy=True) for name, norm in layer.norms.items()}
    return {
        "input_norm": norms[INPUT_NORM],
        "mlp_norm": norms[MLP_NORM],
        "q_norm": norms.get(Q_NORM),
        "k_norm": norms.get(K_NORM),
        "qkv": _pack(layer.sites["attention"], kernels),
        "output": _pack(layer.sites["output"], kernels),
        "gate_up": _pack(layer.sites["mlp"], kernels),
        "down": _pack(layer.sites["down"], kernels),
        "output_zeros": channels - heads,
    }


def stored_bytes(source: Shard) -> int:
    """Bytes of all tensors as the files hold them; packed, they take as much and some padding."""
    return sum(math.prod(entry.shape) * BYTES[entry.dtype] for entry in source.entries.values())


def _pack(site: QuantisedSite, kernels: Kernels) -> Any:
    form, linear = site.form, site.linear
    return kernels.pack_w4ax(
        linear.values,
        linear.scales,
        linear.bias,
        permutation=form.permutation,
        outlier_blocks=form.outlier_blocks,
        hadamard=form.hadamard,
    )


def _rows(shapes: Mapping[str, Stored]) -> list[str]:
    """Those of a linear's tensors that have a row for each output."""
    return [name for name, (shape, _) in shapes.items() if len(shape) == 2]


def _prefix(index: int) -> str:
    return f"model.layers.{index}."
