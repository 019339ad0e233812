"""From a checkpoint to packed weights, layer by layer.

A layer is mapped, converted, packed by the kernels and dropped again (its mapping too), its experts one by one, so that
loading takes one layer more memory than serving. Names and shapes are checked against the config before the first
tensor is touched.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch

from weft.comet.checkpoint import METHOD, parse
from weft.errors import CheckpointError
from weft.kernels.base import Kernels
from weft.models import quantised
from weft.models.checkpoint import Checkpoint, Shape
from weft.models.experts import Mixture, take_mixture
from weft.models.families import ModelConfig
from weft.models.foreign import ForeignCheckpoint
from weft.models.mixtures import mixture_linears
from weft.models.rope import Rotary
from weft.models.shard import FLAG, WHOLE, Cut, Cuts, Part, Readable, Shard, float_cuts, head_cut, shard_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' letters
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
OUTPUT, DOWN = "self_attn.o_proj", "mlp.down_proj"
DUMMY_SPREAD = 0.035  # uniform in [-spread, spread): a standard deviation of 0.02, as at the start of training


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: four packed linears (q, k and v joined, gate and up joined) and its norms.

    output_zeros: how many zeros the input of `output` ends in, after what the heads give (see shard.py).
    mixture: of a layer with experts, which has it in the place of gate_up and down; these are None then.
    """

    input_norm: torch.Tensor
    mlp_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    qkv: Any
    output: Any
    gate_up: Any
    down: Any
    output_zeros: int = 0
    mixture: Mixture | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything that the decoders of one process share, packed but for the norms; size: bytes of all.

    notes: what people should know of them, one sentence each.
    """

    dtype: torch.dtype
    embedding: Any
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Any
    rotary: Rotary
    size: int
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """Where tensors come from."""

    def __contains__(self, name: str) -> bool: ...
    def take(self, names: Sequence[str]) -> dict[str, torch.Tensor]: ...


def stored_dtype(folder: Path) -> str | None:
    """What the embedding is stored in, for a config.json that does not say; None where weft reads no such dtype."""
    entry = Checkpoint(folder).entries.get(EMBEDDING)
    return None if entry is None else STORED.get(entry.dtype)


def compute_dtype(setting: str, stored: str | None) -> tuple[torch.dtype, str | None]:
    """The dtype for --dtype `setting` (auto, float32, bfloat16), and a note where it is not the checkpoint's own.

    stored: what config.json or the weights say; None, where there are none to say it, is bfloat16.
    """
    if setting != "auto":
        return DTYPES[setting], None
    if stored == "float16":
        return torch.bfloat16, (
            "the checkpoint is float16, which weft does not compute in: --dtype auto takes bfloat16, "
            "with 8 significant bits for its 11; --dtype float32 loses nothing"
        )
    return DTYPES[stored or "bfloat16"], None


def load_weights(
    folder: Path,
    config: ModelConfig,
    kernels: Kernels,
    dtype: torch.dtype,
    *,
    dummy_seed: int | None = None,
    say: Callable[[str], None] | None = None,
    room: int | None = None,
    part: Part = WHOLE,
) -> Weights:
    """The packed weights of `folder`, or random ones of the same shapes when there is a `dummy_seed`.

    `say` is told when the phase begins. room: bytes of memory where the kernels put them; None: the machine's.
    part: only these, for a decoder of `shard_config`; no more of the files is read. config: of the whole model.
    Raises CheckpointError naming the file and the tensor that is missing, misshapen, unexpected or cut short.
    """
    if say is not None:
        say("weights")
    if config.quantization is not None:
        if dummy_seed is not None:
            raise CheckpointError(
                "--load-format dummy draws unquantised weights, and config.json has a quantization_config; "
                "serve the checkpoint's own weights, or a folder without that key"
            )
        method = config.quantization.get("quant_method")
        if method == METHOD:
            return _load_quantised(folder, config, kernels, dtype, part)
        if part.ranks > 1:
            raise CheckpointError(
                f"{FLAG} is {part.ranks}, and weights that are {method} cannot be cut; 1 rank serves them, and several "
                f"serve what `weft quantize` makes of the original"
            )
        return _load_foreign(folder, config, kernels, dtype)
    if room is None:
        _check_memory(config, dtype)
    whole: Readable
    if dummy_seed is None:
        whole = checkpoint = Checkpoint(folder)
        checkpoint.check(tensor_shapes(config), optional=[HEAD] if config.tied else [])
    else:
        whole = Dummy(tensor_shapes(config), dummy_seed, absent=HEAD if config.tied else None)
    cuts = _float_cuts(config, part)
    source: Source = Shard(whole, cuts) if cuts else whole
    own = shard_config(config, part)
    layers = (_layer(source, own, index, kernels, dtype) for index in range(config.layers))
    with torch.no_grad():
        outer = _pack_outer(source, kernels, dtype, head_cut(config, part))
    return _assemble(source, own, dtype, outer, layers, weight_bytes(config, dtype, cuts))


def move(weights: Weights, device: torch.device) -> Weights:
    """The same with the norms and rotary tables on `device`, where the kernels have packed the rest."""

    def there(norm: torch.Tensor | None) -> torch.Tensor | None:
        return None if norm is None else norm.to(device)

    weights.rotary.move(device)
    layers = tuple(
        replace(
            layer,
            input_norm=layer.input_norm.to(device),
            mlp_norm=layer.mlp_norm.to(device),
            q_norm=there(layer.q_norm),
            k_norm=there(layer.k_norm),
        )
        for layer in weights.layers
    )
    return replace(weights, layers=layers, norm=weights.norm.to(device))


def _float_cuts(config: ModelConfig, part: Part) -> dict[str, Cut]:
    """Of all tensors; none for the whole model."""
    if part.ranks == 1:
        return {}
    cuts = {HEAD: head_cut(config, part)}
    for index in range(config.layers):
        cuts |= float_cuts(config, part, f"model.layers.{index}.")
    return cuts


def _load_quantised(folder: Path, config: ModelConfig, kernels: Kernels, dtype: torch.dtype, part: Part) -> Weights:
    fmpq = parse(config.quantization, config)
    source = Checkpoint(folder)
    shapes = quantised.outer_shapes(config, fmpq)
    for index in range(config.layers):
        shapes |= quantised.layer_shapes(config, fmpq, index)
    # With the embedding in few bits, the output layer is always written down.
    optional = [HEAD] if config.tied and fmpq.embedding_bits == 16 else []
    source.check(shapes, optional=optional, readable=quantised.BYTES)
    own = shard_config(config, part)
    if part.ranks > 1:
        shard, fmpq = quantised.shard(source, config, fmpq, part)
    else:
        shard = Shard(source, {})
    with torch.no_grad():
        outer = quantised.take_outer(shard, config, fmpq, kernels, dtype, part)
    layers = (
        LayerWeights(**quantised.take_layer(shard, own, fmpq, index, kernels, dtype)) for index in range(config.layers)
    )
    return _assemble(shard, own, dtype, outer, layers, quantised.stored_bytes(shard))


def _load_foreign(folder: Path, config: ModelConfig, kernels: Kernels, dtype: torch.dtype) -> Weights:
    checkpoint = ForeignCheckpoint(folder, config)
    with torch.no_grad():
        embedding = checkpoint.embedding(dtype)
        outer = kernels.pack_embedding(embedding), checkpoint.head(kernels, embedding)
        del embedding
    layers = (LayerWeights(**checkpoint.layer(index, kernels, dtype)) for index in range(config.layers))
    weights = _assemble(checkpoint.source, config, dtype, outer, layers, 0)
    return replace(weights, size=checkpoint.size + weights.norm.nbytes, notes=checkpoint.notes())


def _assemble(
    source: Source,
    config: ModelConfig,
    dtype: torch.dtype,
    outer: tuple[Any, Any],
    layers: Iterable[LayerWeights],
    size: int,
) -> Weights:
    """The packed embedding and output layer, and the layers, one at a time."""
    embedding, head = outer
    with torch.no_grad():
        return Weights(
            dtype=dtype,
            embedding=embedding,
            layers=tuple(layers),
            norm=_plain(source, NORM, dtype),
            head=head,
            rotary=Rotary(config.rope, config.head_dim),
            size=size,
        )


def _layer(source: Source, config: ModelConfig, index: int, kernels: Kernels, dtype: torch.dtype) -> LayerWeights:
    prefix, experts = f"model.layers.{index}.", config.experts
    tensors = source.take(list(_shapes_beside_experts(config, prefix)))

    def pack(*names: str) -> Any:
        """The linears of these names as one, their outputs one after the other."""
        weight = torch.cat([tensors.pop(f"{prefix}{name}.weight").to(dtype) for name in names])
        biased = f"{prefix}{names[0]}.bias" in tensors
        bias = torch.cat([tensors.pop(f"{prefix}{name}.bias").to(dtype) for name in names]) if biased else None
        return kernels.pack_linear(weight, bias)

    def norm(name: str) -> torch.Tensor:
        return tensors[f"{prefix}{name}.weight"].to(dtype, copy=True)

    return LayerWeights(
        input_norm=norm("input_layernorm"),
        mlp_norm=norm("post_attention_layernorm"),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        qkv=pack(*QKV),
        output=pack(OUTPUT),
        gate_up=pack(*GATE_UP) if experts is None else None,
        down=pack(DOWN) if experts is None else None,
        mixture=None if experts is None else take_mixture(source.take, prefix, config.family, experts, kernels, dtype),
    )


def _pack_outer(source: Source, kernels: Kernels, dtype: torch.dtype, cut: Cut) -> tuple[Any, Any]:
    """The embedding and the output layer. cut: of the rows of this one."""
    embedding = _plain(source, EMBEDDING, dtype)
    # A tied checkpoint that holds an output layer all the same means it: transformers decides so too.
    head = _plain(source, HEAD, dtype) if HEAD in source else cut.read(embedding, embedding.shape)
    return kernels.pack_embedding(embedding), kernels.pack_linear(head)


def _plain(source: Source, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of our own, not a view of a file."""
    return source.take([name])[name].to(dtype, copy=True)


def layer_shapes(config: ModelConfig, index: int) -> dict[str, Shape]:
    """The tensors of layer `index`, as Hugging Face names them, and their shapes."""
    prefix = f"model.layers.{index}."
    shapes = _shapes_beside_experts(config, prefix)
    if config.experts is not None:
        for name, rows, columns in mixture_linears(config.family, config.experts, config.hidden_size):
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
    return shapes


def _shapes_beside_experts(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    q, k, v = QKV
    gate, up = GATE_UP
    linears = [
        (q, queries, hidden, config.qkv_bias),
        (k, keys, hidden, config.qkv_bias),
        (v, keys, hidden, config.qkv_bias),
        (OUTPUT, hidden, queries, config.output_bias),
    ]
    if config.experts is None:
        linears += [
            (gate, inner, hidden, config.mlp_bias),
            (up, inner, hidden, config.mlp_bias),
            (DOWN, hidden, inner, config.mlp_bias),
        ]
    shapes: dict[str, Shape] = {}
    for name, rows, columns, bias in linears:
        shapes[f"{prefix}{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{prefix}{name}.bias"] = (rows,)
    shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
    shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    if config.qk_norm:
        shapes[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
        shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def outer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The tensors outside of the layers; the output layer too, which a tied checkpoint usually leaves out."""
    table = (config.vocabulary, config.hidden_size)
    return {EMBEDDING: table, NORM: (config.hidden_size,), HEAD: table}


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of the model and its shape."""
    shapes = outer_shapes(config)
    for index in range(config.layers):
        shapes |= layer_shapes(config, index)
    return shapes


def weight_bytes(config: ModelConfig, dtype: torch.dtype, cuts: Cuts = MappingProxyType({})) -> int:
    """Memory of the loaded weights; a tied output layer counts, since it is packed beside the embedding."""
    shapes = tensor_shapes(config).items()
    return sum(math.prod(cuts[name].shape(shape) if name in cuts else shape) for name, shape in shapes) * dtype.itemsize


class Dummy:
    """Random weights: the numbers of a tensor depend on its name and the seed, so not on the order of reading."""

    def __init__(self, shapes: Mapping[str, Shape], seed: int, absent: str | None = None) -> None:
        self.shapes = {name: shape for name, shape in shapes.items() if name != absent}
        self.seed = seed

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def take(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: self._draw(name) for name in names}

    def take_part(self, name: str, cut: Cut) -> torch.Tensor:
        return cut.read(self._draw(name), self.shapes[name])

    def _draw(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        random = np.random.Generator(np.random.SFC64([self.seed % 2**64, zlib.crc32(name.encode())]))
        values = random.random(shape, dtype=np.float32)
        values -= 0.5
        values *= 2 * DUMMY_SPREAD
        return torch.from_numpy(values)


def _check_memory(config: ModelConfig, dtype: torch.dtype) -> None:
    needed = weight_bytes(config, dtype)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise CheckpointError(
            f"the weights in config.json take {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, "
            f"and this machine has {there / 2**30:.1f} GiB of memory"
        )
