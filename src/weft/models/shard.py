"""One rank's part of a model: which heads, channels and rows of which tensor, decided from outside of the decoder.

    q, k, v            by rows: whole heads, each query head with its key-value head
    output             by columns: those of the rank's heads
    gate, up, down     by rows, rows, columns: the same channels of the intermediate size; of each expert, too
    router             whole: every rank has the same rows, and so takes the same experts for them
    output layer       by rows: a part of the vocabulary, filled up with zeros to the same number on every rank
    embedding, norms   whole

A sum over ranks follows `output` and `down`; so the bias of these is rank 0's, and zeros elsewhere. Of an fmpq
checkpoint the channels of `down` are dealt out in blocks of 128, one to each rank in turn, so that each has its part of
the outlier blocks, which come first. The columns of `output` were put in an order when it was quantised, so that a
block of 128 may have heads of several ranks (of 64 channels). Each of these ranks has the block, with zeros in the
place of what is not its own: linear and transform are sums, so that their sum over the ranks is the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch

from weft.comet.checkpoint import FmpqConfig
from weft.comet.packing import BLOCK, PER_WORD
from weft.errors import ConfigError
from weft.models.checkpoint import Checkpoint, Entry, Shape
from weft.models.families import ModelConfig
from weft.models.mixtures import Experts, sharded_names

Ranges = tuple[tuple[int, int], ...]
FLAG = "--tensor-parallel-size"


@dataclass(frozen=True, slots=True)
class Part:
    """Rank `rank` of `ranks`."""

    rank: int
    ranks: int

    def span(self, count: int) -> tuple[int, int]:
        """First and end of this rank's part of `count` things; no two ranks differ by more than one."""
        return self.rank * count // self.ranks, (self.rank + 1) * count // self.ranks

    def dealt(self, count: int) -> range:
        """This rank's of `count` things that are dealt out in turn."""
        return range(self.rank, count, self.ranks)


WHOLE = Part(0, 1)


@dataclass(frozen=True, slots=True)
class Cut:
    """Ranges of a tensor's dimension `dim`, one after the other, and zeros up to `size`."""

    dim: int
    ranges: Ranges
    size: int

    @property
    def taken(self) -> int:
        return sum(end - first for first, end in self.ranges)

    def shape(self, whole: Sequence[int]) -> Shape:
        return (*whole[: self.dim], self.size, *whole[self.dim + 1 :])

    def read(self, tensor: Any, whole: Sequence[int]) -> torch.Tensor:
        """The part of a tensor of shape `whole`, which is indexed (so of a file only these bytes are read)."""
        before = (slice(None),) * self.dim
        parts = [tensor[(*before, slice(first, end))] for first, end in self.ranges]
        if self.taken < self.size or not parts:
            empty = tensor[tuple(slice(0, 0) for _ in whole)]
            parts.append(empty.new_zeros(replace(self, size=self.size - self.taken).shape(whole)))
        return torch.cat(parts, dim=self.dim) if len(parts) > 1 else parts[0]


Cuts = Mapping[str, Cut]


class Readable(Protocol):
    """Where whole tensors come from, or a part of one."""

    def __contains__(self, name: str) -> bool: ...
    def take(self, names: Sequence[str]) -> dict[str, torch.Tensor]: ...
    def take_part(self, name: str, cut: Cut) -> torch.Tensor: ...


class Shard:
    """The tensors of a checkpoint as one rank has them: a `Source` of the loader.

    cuts: of tensors by name; those without one are whole. made: tensors that are not read, but these instead.
    """

    def __init__(self, source: Readable, cuts: Cuts, made: Mapping[str, torch.Tensor] = MappingProxyType({})) -> None:
        self.source = source
        self.cuts = cuts
        self.made = made

    def __contains__(self, name: str) -> bool:
        return name in self.source

    @property
    def entries(self) -> dict[str, Entry]:
        """Of a checkpoint on disk: where the tensors lie, with the shapes that `take` gives."""
        if not isinstance(self.source, Checkpoint):
            return {}
        return {name: replace(entry, shape=self._shape(name, entry)) for name, entry in self.source.entries.items()}

    def take(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        tensors = self.source.take([name for name in names if name not in self.cuts and name not in self.made])
        tensors |= {name: self.source.take_part(name, self.cuts[name]) for name in names if name in self.cuts}
        return tensors | {name: self.made[name] for name in names if name in self.made}

    def _shape(self, name: str, entry: Entry) -> Shape:
        if name in self.made:
            return tuple(self.made[name].shape)
        return self.cuts[name].shape(entry.shape) if name in self.cuts else entry.shape


def shard_config(config: ModelConfig, part: Part) -> ModelConfig:
    """The decoder that this rank has: fewer heads and channels. `vocabulary` stays that of the whole model.

    Raises ConfigError naming the flag for a number of ranks that the model's heads, or the channels of its experts,
    cannot be divided by.
    """
    ranks = part.ranks
    if ranks == 1:
        return config
    experts = None if config.experts is None else _shard_experts(config.experts, part)
    if config.kv_heads % ranks or config.intermediate_size < ranks * (1 if config.quantization is None else BLOCK):
        fitting = [str(count) for count in range(1, config.kv_heads + 1) if config.kv_heads % count == 0]
        raise ConfigError(
            f"{FLAG} is {ranks}; the model has {config.heads} heads, {config.kv_heads} key-value heads and an "
            f"intermediate size of {config.intermediate_size}, and each rank needs as many whole key-value heads as "
            f"the others, and channels: {', '.join(fitting)} would divide the heads"
        )
    return replace(
        config,
        heads=config.heads // ranks,
        kv_heads=config.kv_heads // ranks,
        intermediate_size=sum(end - first for first, end in inner_channels(config, part)),
        experts=experts,
    )


def _shard_experts(experts: Experts, part: Part) -> Experts:
    for whose, channels in (("each expert", experts.inner), ("the shared expert", experts.shared)):
        if 0 < channels < part.ranks:
            raise ConfigError(
                f"{FLAG} is {part.ranks}, and {whose} of the model has {channels} channel"
                f"{'s' if channels > 1 else ''}: each rank needs one at least, so {channels} would be the most"
            )
    inner, shared = (end - first for first, end in (part.span(experts.inner), part.span(experts.shared)))
    return replace(experts, inner=inner, shared=shared)


def head_rows(vocabulary: int, ranks: int) -> int:
    """Rows of the output layer that each rank has, zeros at the end among them."""
    return -(-vocabulary // ranks)


def inner_channels(config: ModelConfig, part: Part) -> Ranges:
    """The channels between gate, up and down that this rank has; with experts, of each but the shared one."""
    if config.quantization is None:
        return (part.span(config.intermediate_size),)
    return tuple((block * BLOCK, (block + 1) * BLOCK) for block in part.dealt(config.intermediate_size // BLOCK))


def head_cut(config: ModelConfig, part: Part) -> Cut:
    rows = head_rows(config.vocabulary, part.ranks)
    first = min(part.rank * rows, config.vocabulary)
    return Cut(0, ((first, min(first + rows, config.vocabulary)),), rows)


def float_cuts(config: ModelConfig, part: Part, prefix: str) -> dict[str, Cut]:
    """The cuts of a layer's tensors, whose names begin with `prefix`, in a checkpoint that is not quantised."""
    cuts = {}
    for name, ranges in _row_ranges(config, part).items():
        for end in ("weight", "bias"):
            cuts[f"{prefix}{name}.{end}"] = _cut(0, ranges)
    cuts[f"{prefix}self_attn.o_proj.weight"] = _cut(1, _heads(config, part, config.heads))
    if config.experts is None:
        cuts[f"{prefix}mlp.down_proj.weight"] = _cut(1, inner_channels(config, part))
    else:
        cuts |= _expert_cuts(config.family, config.experts, part, prefix)
    return cuts | _summed_biases(config, part, prefix)


def _expert_cuts(family: str, experts: Experts, part: Part, prefix: str) -> dict[str, Cut]:
    cuts: dict[str, Cut] = {}
    for (gate, up, down), channels in sharded_names(family, experts):
        own = (part.span(channels),)
        cuts |= {f"{prefix}{name}.weight": _cut(dim, own) for name, dim in ((gate, 0), (up, 0), (down, 1))}
    return cuts


def shard_fmpq(fmpq: FmpqConfig, config: ModelConfig, part: Part, orders: Sequence[torch.Tensor]) -> FmpqConfig:
    """What the config says of this rank's part. orders: `output.permutation` of every layer."""
    outliers = dict(fmpq.outlier_blocks)
    outliers["down"] = tuple(len(part.dealt(count)) for count in fmpq.outlier_blocks["down"])
    outliers["output"] = tuple(
        sum(block < count for block in output_blocks(order, config, part))
        for order, count in zip(orders, fmpq.outlier_blocks["output"], strict=True)
    )
    return replace(fmpq, outlier_blocks=outliers)


def fmpq_cuts(
    fmpq: FmpqConfig, config: ModelConfig, part: Part, index: int, prefix: str, order: torch.Tensor
) -> dict[str, Cut]:
    """The cuts of layer `index`, but for `output.permutation`, which `output_order` makes anew. order: that one."""
    cuts = {}
    for name, ranges in _row_ranges(config, part).items():
        for end in ("weight_packed", "weight_outlier", "weight_scale", "bias"):
            cuts[f"{prefix}{name}.{end}"] = _cut(0, ranges)
    blocks = {
        "self_attn.o_proj": ("output", output_blocks(order, config, part)),
        "mlp.down_proj": ("down", tuple(part.dealt(config.intermediate_size // BLOCK))),
    }
    for name, (site, own) in blocks.items():
        count = fmpq.outlier_blocks[site][index]
        wide = count if fmpq.eight(count) else 0  # blocks whose weights have 8 bits, in a tensor of their own
        whole = f"{prefix}{name}"
        cuts[f"{whole}.weight_scale"] = _cut(1, tuple((block, block + 1) for block in own))
        cuts[f"{whole}.weight_outlier"] = _cut(1, _of_blocks([block for block in own if block < wide], BLOCK))
        cuts[f"{whole}.weight_packed"] = _cut(
            1, _of_blocks([block - wide for block in own if block >= wide], BLOCK // PER_WORD)
        )
    return cuts | _summed_biases(config, part, prefix)


def output_blocks(order: torch.Tensor, config: ModelConfig, part: Part) -> tuple[int, ...]:
    """The blocks of the prepared input of o_proj that have a channel of this rank's heads."""
    return tuple(_owned(order, config, part).view(-1, BLOCK).any(dim=1).nonzero().flatten().tolist())


def output_order(order: torch.Tensor, config: ModelConfig, part: Part) -> torch.Tensor:
    """The permutation of this rank's o_proj: its input are the channels of its heads, and after them as many zeros as
    its blocks have places of other ranks' channels."""
    blocks = list(output_blocks(order, config, part))
    places = order.view(-1, BLOCK)[blocks].flatten()
    own = _owned(places, config, part)
    ((first, end),) = _heads(config, part, config.heads)
    zeros = torch.arange(int((~own).sum()), dtype=order.dtype) + (end - first)
    made = places - first
    made[~own] = zeros
    return made


def _owned(channels: torch.Tensor, config: ModelConfig, part: Part) -> torch.Tensor:
    """Which of these channels of o_proj's input are of this rank's heads."""
    ((first, end),) = _heads(config, part, config.heads)
    return (channels >= first) & (channels < end)


def _row_ranges(config: ModelConfig, part: Part) -> dict[str, Ranges]:
    """Of the linears that are cut by rows."""
    inner, keys = inner_channels(config, part), _heads(config, part, config.kv_heads)
    ranges = {
        "self_attn.q_proj": _heads(config, part, config.heads),
        "self_attn.k_proj": keys,
        "self_attn.v_proj": keys,
    }
    return ranges if config.experts is not None else ranges | {"mlp.gate_proj": inner, "mlp.up_proj": inner}


def _heads(config: ModelConfig, part: Part, count: int) -> Ranges:
    first, end = part.span(count)
    return ((first * config.head_dim, end * config.head_dim),)


def _summed_biases(config: ModelConfig, part: Part, prefix: str) -> dict[str, Cut]:
    if part.rank == 0:
        return {}
    nothing = Cut(0, (), config.hidden_size)
    return {f"{prefix}{name}.bias": nothing for name in ("self_attn.o_proj", "mlp.down_proj")}


def _of_blocks(blocks: Sequence[int], size: int) -> Ranges:
    return tuple((block * size, (block + 1) * size) for block in blocks)


def _cut(dim: int, ranges: Ranges) -> Cut:
    return Cut(dim, ranges, sum(end - first for first, end in ranges))
