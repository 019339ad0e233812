"""Checkpoints that others quantised (GPTQ, AWQ, compressed-tensors): which tensors they hold, and their layers packed.

Integers stay what they are wherever weft's kernels can have them so (blocks of 128 input channels, one order for all
linears of a site); where they cannot, `notes` says what was done instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weft.comet.checkpoint import site_shapes
from weft.comet.foreign import Joined, Wanted, check_shape, join, linear_tensors, read_linear
from weft.comet.forward import INPUT_NORM, K_NORM, MLP_NORM, Q_NORM
from weft.comet.packing import BLOCK
from weft.comet.scheme import HEAD, parse_scheme
from weft.errors import CheckpointError
from weft.kernels.base import Kernels
from weft.models.checkpoint import READABLE, Checkpoint
from weft.models.families import ModelConfig

FIELDS = {"attention": "qkv", "output": "output", "mlp": "gate_up", "down": "down"}  # of LayerWeights, by site
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of the model. bias: whether config.json asks for one. quantised: whether the config says so."""

    module: str
    shape: tuple[int, int]
    bias: bool
    quantised: bool


class ForeignCheckpoint:
    """The quantised checkpoint in a folder. Names, shapes and dtypes are checked when it is opened, before a tensor is
    touched. `size` counts the bytes of what was packed so far."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """Raises CheckpointError naming file and tensor, or key and value."""
        self.scheme = parse_scheme(config.quantization)
        self.source = Checkpoint(folder)
        self.size = 0
        self._config = config
        self._rounded: list[str] = []
        self._plain: list[str] = []
        self._check()

    def layer(self, index: int, kernels: Kernels, dtype: torch.dtype) -> dict[str, Any]:
        """The fields of LayerWeights. Raises CheckpointError naming file and tensor."""
        prefix = f"model.layers.{index}."
        norms = {name: self._own(f"{prefix}{name}", dtype) for name in self._norms()}
        sites = {FIELDS[site]: self._site(linears, kernels, dtype) for site, linears in self._sites(index).items()}
        return {
            "input_norm": norms[INPUT_NORM],
            "mlp_norm": norms[MLP_NORM],
            "q_norm": norms.get(Q_NORM),
            "k_norm": norms.get(K_NORM),
            **sites,
        }

    def embedding(self, dtype: torch.dtype) -> torch.Tensor:
        """[vocabulary, hidden], which is never quantised."""
        return self._own(EMBEDDING, dtype)

    def head(self, kernels: Kernels, embedding: torch.Tensor) -> Any:
        """The packed output layer. embedding: what it is where a tied checkpoint has none of its own."""
        head = self._head()
        if head.quantised:
            return self._site([head], kernels, embedding.dtype)
        plain = f"{HEAD}.weight"
        self.size += embedding.nbytes
        return kernels.pack_linear(
            self.source.take([plain])[plain].to(embedding.dtype, copy=True) if plain in self.source else embedding
        )

    def notes(self) -> tuple[str, ...]:
        """What people should know of the layers read so far, one sentence each."""
        found = []
        if self.scheme.activation_bits == 16:
            found.append(
                "the checkpoint leaves activations in 16 bits; weft rounds what enters its quantised layers to 8 bits, "
                f"with a scale for each token and {BLOCK} channels (--w4a16 on --device cuda leaves it alone)"
            )
        if self._rounded:
            group = self.scheme.group or "all"
            found.append(
                f"{_some(self._rounded)}: groups of {group} input channels, the order or zero points do not fit "
                f"blocks of {BLOCK}; the weights are held in 8 bits, within 1/254 of the largest of each block"
            )
        if self._plain:
            found.append(
                f"{_some(self._plain)}: the config quantises only some of the layers that share an input; "
                "all of them are held unquantised"
            )
        return tuple(found)

    def _site(self, linears: Sequence[Linear], kernels: Kernels, dtype: torch.dtype) -> Any:
        """The linears that read one input, as one packed weight."""
        if all(linear.quantised for linear in linears):
            joined = join([self._read(linear) for linear in linears])
            if joined.rounded:
                self._rounded.append(linears[0].module)
            return self._pack(joined, kernels)
        if any(linear.quantised for linear in linears):
            self._plain.append(linears[0].module)
        weights, biases = zip(*(self._unquantised(linear) for linear in linears), strict=True)
        weight = torch.cat([one.to(dtype) for one in weights])
        self.size += weight.nbytes
        biased = any(one is not None for one in biases)
        filled = [torch.zeros(len(w)) if b is None else b.float() for w, b in zip(weights, biases, strict=True)]
        return kernels.pack_linear(weight, torch.cat(filled).to(dtype) if biased else None)

    def _pack(self, joined: Joined, kernels: Kernels) -> Any:
        blocks = joined.values.shape[1] // BLOCK
        self.size += joined.values.numel() // (1 if joined.wide else 2) + joined.scales.nbytes
        return kernels.pack_w4ax(
            joined.values,
            joined.scales,
            joined.bias,
            permutation=joined.permutation,
            outlier_blocks=blocks if joined.wide else 0,
            zeros=joined.zeros,
        )

    def _read(self, linear: Linear) -> Any:
        names = [name for name in self._linear_tensors(linear) if name in self.source]
        file = self.source.entries[names[0]].file
        return read_linear(self.scheme, self.source.take(names), linear.module, linear.shape, str(file))

    def _unquantised(self, linear: Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight, bias), of a quantised linear too."""
        if linear.quantised:
            read = self._read(linear)
            return read.dequantised(), read.bias
        names = [f"{linear.module}.weight"] + [f"{linear.module}.bias"] * linear.bias
        tensors = self.source.take(names)
        return tensors[names[0]], tensors[names[1]] if linear.bias else None

    def _own(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of our own, not a view of a file."""
        tensor = self.source.take([name])[name].to(dtype, copy=True)
        self.size += tensor.nbytes
        return tensor

    def _check(self) -> None:
        """Raise CheckpointError unless the files hold what config.json asks for."""
        wanted = self._wanted()
        shapes = {name: one.shape for name, one in wanted.items()}
        optional = [name for name, one in wanted.items() if not one.required]
        readable = {letters for one in wanted.values() for letters in one.dtypes}
        self.source.check(shapes, optional, sorted(readable))
        for name, one in wanted.items():
            entry = self.source.entries.get(name)
            if entry is not None and entry.dtype not in one.dtypes:
                raise CheckpointError(
                    f"{entry.file}: {name} has the dtype {entry.dtype}; the config asks for {' or '.join(one.dtypes)}"
                )

    def _wanted(self) -> dict[str, Wanted]:
        config = self._config
        table = (config.vocabulary, config.hidden_size)
        wanted = {EMBEDDING: Wanted(table, READABLE), NORM: Wanted((config.hidden_size,), READABLE)}
        linears = [linear for index in range(config.layers) for part in self._sites(index).values() for linear in part]
        for linear in linears:
            wanted |= self._linear_tensors(linear)
        head = self._head()
        if head.quantised:
            wanted |= self._linear_tensors(head)
        else:
            wanted[f"{HEAD}.weight"] = Wanted(table, READABLE, required=not config.tied)
        for index in range(config.layers):
            for name, shape in self._norms().items():
                wanted[f"model.layers.{index}.{name}"] = Wanted(shape, READABLE)
        return wanted

    def _linear_tensors(self, linear: Linear) -> dict[str, Wanted]:
        """By their full names."""
        bias = {f"{linear.module}.bias": Wanted((linear.shape[0],), READABLE)} if linear.bias else {}
        if not linear.quantised:
            return {f"{linear.module}.weight": Wanted(linear.shape, READABLE)} | bias
        check_shape(self.scheme, linear.module, linear.shape)
        tensors = linear_tensors(self.scheme, linear.shape)
        return {f"{linear.module}.{suffix}": one for suffix, one in tensors.items()} | bias

    def _sites(self, index: int) -> dict[str, list[Linear]]:
        """The linears of layer `index` by site."""
        config = self._config
        biased = {
            "attention": config.qkv_bias,
            "output": config.output_bias,
            "mlp": config.mlp_bias,
            "down": config.mlp_bias,
        }
        sites: dict[str, list[Linear]] = {}
        for site, (rows, columns) in site_shapes(config).items():
            named = {f"model.layers.{index}.{name}": count for name, count in rows.items()}
            sites[site] = [
                Linear(name, (count, columns), biased[site], self.scheme.quantises(name))
                for name, count in named.items()
            ]
        return sites

    def _head(self) -> Linear:
        """A tied model has an output layer of its own only where the files hold one."""
        config = self._config
        there = not config.tied or any(name.startswith(f"{HEAD}.") for name in self.source.entries)
        plain = f"{HEAD}.weight" in self.source and self.source.entries[f"{HEAD}.weight"].dtype in READABLE
        quantised = there and not (config.tied and plain) and self.scheme.quantises(HEAD)
        return Linear(HEAD, (config.vocabulary, config.hidden_size), False, quantised)

    def _norms(self) -> dict[str, tuple[int, ...]]:
        config = self._config
        norms: dict[str, tuple[int, ...]] = {INPUT_NORM: (config.hidden_size,), MLP_NORM: (config.hidden_size,)}
        if config.qk_norm:
            norms |= {Q_NORM: (config.head_dim,), K_NORM: (config.head_dim,)}
        return norms


def _some(names: Sequence[str]) -> str:
    rest = len(names) - 1
    return names[0] + (f" and {rest} more" if rest else "")
