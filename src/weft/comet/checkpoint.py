"""The fmpq checkpoint: a quantised layer as named tensors, and the part of config.json that describes them.

docs/fmpq_checkpoint.md is the format's description. Reading checks everything that a kernel would rely on: a wrong
permutation or a cut tensor is an error that names file and tensor, never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from weft.comet.forward import SITES, Shapes
from weft.comet.packing import BLOCK, PER_WORD, pack_nibbles, unpack_nibbles
from weft.comet.reference import InputForm, QuantisedLinear
from weft.errors import CheckpointError

METHOD = "fmpq"
VERSION = 2
READABLE = (1, 2)  # of version 1 are checkpoints whose embedding and output layer were left as they were
KEY = "quantization_config"
PERMUTED = ("attention", "output", "mlp")  # the order of `down` is hidden in the rows of gate_proj and up_proj
NORMS = ("input_layernorm", "post_attention_layernorm")
SCALE_DTYPE = torch.bfloat16

Stored = tuple[tuple[int, ...], str]  # a tensor's shape, and its dtype in safetensors' letters


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
class HeadForm:
    """How the output layer is stored. weight_bits 4: like a site of a layer, with these outlier blocks and transform.
    8: weights and input have 8 bits throughout."""

    weight_bits: int
    outlier_blocks: int
    hadamard: bool


@dataclass(frozen=True, slots=True)
class FmpqConfig:
    """`quantization_config` of an fmpq checkpoint. outlier_blocks and hadamard: for each site, one entry a layer.
    head: None where the output layer is left as it was. embedding_bits: 4, 8, or 16 where it is left as it was."""

    outlier_weight_bits: int
    outlier_blocks: dict[str, tuple[int, ...]]
    hadamard: dict[str, tuple[bool, ...]]
    head: HeadForm | None = None
    embedding_bits: int = 16

    def eight(self, outlier_blocks: int, weight_bits: int = 4) -> int:
        """How many leading columns of a weight have 8 bits."""
        return outlier_blocks * BLOCK if 8 in (weight_bits, self.outlier_weight_bits) else 0

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
            "head": None if self.head is None else asdict(self.head),
            "embedding_bits": self.embedding_bits,
            "modules_to_not_convert": ["lm_head"] if self.head is None else [],
        }


def parse(raw: Any, shapes: Shapes) -> FmpqConfig:
    """The parsed `quantization_config`. Raises CheckpointError naming the key and its value."""
    if not isinstance(raw, Mapping):
        raise _wrong("", raw, "it must be an object")
    for key, wanted in {
        "quant_method": METHOD,
        "block_size": BLOCK,
        "weight_bits": 4,
        "activation_bits": 4,
        "outlier_activation_bits": 8,
    }.items():
        if raw.get(key) != wanted or isinstance(raw.get(key), bool):
            raise _wrong(key, raw.get(key), f"this version of weft reads {wanted!r}")
    version = _one_of(raw, "version", READABLE)
    bits = _one_of(raw, "outlier_weight_bits", (4, 8))
    embedding_bits = _one_of(raw, "embedding_bits", (4, 8, 16)) if version > 1 else 16
    head = _head(raw.get("head"), shapes) if version > 1 else None
    left = ["lm_head"] if head is None else []
    if raw.get("modules_to_not_convert") != left:
        raise _wrong("modules_to_not_convert", raw.get("modules_to_not_convert"), f"it must be {left}")
    inputs = site_shapes(shapes)
    blocks: dict[str, tuple[int, ...]] = {}
    flags: dict[str, tuple[bool, ...]] = {}
    for site, (_, channels) in inputs.items():
        check_divisible(channels, f"{KEY} of config.json", f"the {site} input")
        blocks[site] = _per_layer(raw, "outlier_blocks", site, shapes.layers, range(channels // BLOCK + 1), int)
        flags[site] = _per_layer(raw, "hadamard", site, shapes.layers, (False, True), bool)
    return FmpqConfig(bits, blocks, flags, head, embedding_bits)


def site_shapes(shapes: Shapes, output_channels: int | None = None) -> dict[str, tuple[dict[str, int], int]]:
    """For each site the rows of its linears by name, and their columns.

    output_channels: of o_proj's input, where that has more than the heads give: one rank's part of it ends in zeros.
    """
    queries, keys = shapes.heads * shapes.head_dim, shapes.kv_heads * shapes.head_dim
    rows = {
        "attention": (queries, keys, keys),
        "output": (shapes.hidden_size,),
        "mlp": (shapes.intermediate_size, shapes.intermediate_size),
        "down": (shapes.hidden_size,),
    }
    columns = {
        "attention": shapes.hidden_size,
        "output": output_channels or queries,
        "mlp": shapes.hidden_size,
        "down": shapes.intermediate_size,
    }
    return {site: (dict(zip(SITES[site], rows[site], strict=True)), columns[site]) for site in SITES}


def layer_tensors(layer: QuantisedLayer, config: FmpqConfig, shapes: Shapes) -> dict[str, torch.Tensor]:
    """The tensors of one layer, by their names below model.layers.N."""
    tensors: dict[str, torch.Tensor] = dict(layer.norms)
    for site, (rows, _) in site_shapes(shapes).items():
        form, linear = layer.sites[site].form, layer.sites[site].linear
        if form.permutation is not None:
            tensors[f"{site}.permutation"] = form.permutation.int()
        start = 0
        for name, count in rows.items():
            own = slice(start, start + count)
            bias = None if linear.bias is None else linear.bias[own]
            part = QuantisedLinear(linear.values[own], linear.scales[own], bias)
            tensors |= linear_tensors(name, part, config.eight(form.outlier_blocks))
            start += count
    return tensors


def tensor_shapes(
    config: FmpqConfig, shapes: Shapes, index: int, output_channels: int | None = None
) -> dict[str, Stored]:
    """Shapes and dtypes of layer `index`'s tensors, biases and norms apart. output_channels: as `site_shapes`."""
    wanted: dict[str, Stored] = {}
    for site, (rows, columns) in site_shapes(shapes, output_channels).items():
        if site in PERMUTED:
            wanted[f"{site}.permutation"] = ((columns,), "I32")
        for name, count in rows.items():
            wanted |= linear_shapes(name, count, columns, config.eight(config.outlier_blocks[site][index]))
    return wanted


def read_layer(
    tensors: Mapping[str, torch.Tensor],
    config: FmpqConfig,
    shapes: Shapes,
    index: int,
    file: Path,
    output_channels: int | None = None,
) -> QuantisedLayer:
    """The layer from its tensors. file: where they come from, for errors. output_channels: as `site_shapes`.

    Raises CheckpointError.
    """
    whose = f" of layer {index}"
    check_tensors(tensors, tensor_shapes(config, shapes, index, output_channels), file, whose)
    sites = {}
    for site, (rows, columns) in site_shapes(shapes, output_channels).items():
        permutation = None
        if site in PERMUTED:
            permutation = tensors[f"{site}.permutation"]
            check_permutation(permutation, str(file), f"{site}.permutation{whose}")
        form = InputForm(columns, permutation, config.outlier_blocks[site][index], config.hadamard[site][index])
        eight = config.eight(form.outlier_blocks)
        parts = [read_linear(tensors, name, columns, eight, file, whose) for name in rows]
        biases = [part.bias for part in parts if part.bias is not None]
        joined = QuantisedLinear(
            torch.cat([part.values for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(biases) if biases else None,
        )
        sites[site] = QuantisedSite(form, joined)
    norms = {name: tensor for name, tensor in tensors.items() if name.endswith("norm.weight")}
    return QuantisedLayer(sites, norms)


def linear_tensors(name: str, linear: QuantisedLinear, eight: int) -> dict[str, torch.Tensor]:
    """One linear layer as it is stored; its first `eight` columns have 8 bits."""
    tensors = {
        f"{name}.weight_packed": pack_nibbles(linear.values[:, eight:]),
        f"{name}.weight_scale": linear.scales.to(SCALE_DTYPE),
    }
    if eight:
        tensors[f"{name}.weight_outlier"] = linear.values[:, :eight].contiguous()
    if linear.bias is not None:
        tensors[f"{name}.bias"] = linear.bias.clone()
    return tensors


def linear_shapes(name: str, rows: int, columns: int, eight: int) -> dict[str, Stored]:
    wanted: dict[str, Stored] = {
        f"{name}.weight_packed": ((rows, (columns - eight) // PER_WORD), "I32"),
        f"{name}.weight_scale": ((rows, columns // BLOCK), "BF16"),
    }
    if eight:
        wanted[f"{name}.weight_outlier"] = ((rows, eight), "I8")
    return wanted


def read_linear(
    tensors: Mapping[str, torch.Tensor], name: str, columns: int, eight: int, file: Path, whose: str
) -> QuantisedLinear:
    """The inverse of `linear_tensors`, for tensors that `check_tensors` has seen."""
    values = unpack_nibbles(tensors[f"{name}.weight_packed"], columns - eight)
    if eight:
        values = torch.cat((tensors[f"{name}.weight_outlier"], values), dim=1)
    scales = tensors[f"{name}.weight_scale"].float()
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"{file}: {name}.weight_scale{whose} has a value that is not finite")
    bias = tensors.get(f"{name}.bias")
    return QuantisedLinear(values, scales, None if bias is None else bias.float())


def check_tensors(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, Stored], file: Path, whose: str = ""
) -> None:
    """Raise CheckpointError for a tensor that is missing, of another shape or dtype."""
    for name, (shape, dtype) in wanted.items():
        if name not in tensors:
            raise CheckpointError(f"{file} lacks the tensor {name}{whose}")
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != _DTYPES[dtype]:
            raise CheckpointError(
                f"{file}: {name}{whose} is {_LETTERS.get(found.dtype, found.dtype)} "
                f"{list(found.shape)}; the config asks for {dtype} {list(shape)}"
            )


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


def _one_of(raw: Mapping[str, Any], key: str, allowed: tuple[int, ...]) -> int:
    value = raw.get(key)
    if type(value) is not int or value not in allowed:
        raise _wrong(key, value, f"it must be {' or '.join(map(str, allowed))}")
    return value


def _head(raw: Any, shapes: Shapes) -> HeadForm | None:
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise _wrong("head", raw, "it must be null or an object")
    bits, hadamard, blocks = raw.get("weight_bits"), raw.get("hadamard"), raw.get("outlier_blocks")
    most = shapes.hidden_size // BLOCK
    if bits not in (4, 8) or type(hadamard) is not bool or type(blocks) is not int or not 0 <= blocks <= most:
        raise _wrong("head", raw, f"it needs weight_bits 4 or 8, hadamard, and outlier_blocks from 0 to {most}")
    if bits == 8 and (hadamard or blocks != most):
        raise _wrong("head", raw, f"with 8 bits, all {most} blocks are outlier blocks, and none is transformed")
    return HeadForm(bits, blocks, hadamard)


def _wrong(key: str, value: Any, reason: str) -> CheckpointError:
    shown = repr(value) if len(repr(value)) <= 200 else repr(value)[:200] + "..."
    return CheckpointError(f"config.json: {KEY}{'.' if key else ''}{key} is {shown}; {reason}")
