"""A mixture of experts in a checkpoint: what config.json says of it, and what its tensors are called.

In the place of a layer's MLP are many small ones, the experts. A router gives each token to a few of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weft.models.keys import Keys

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
MOST_EXPERTS = 1024

SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")
SHARED_GATE = "mlp.shared_expert_gate"
ROUTERS = {"mixtral": "block_sparse_moe.gate", "qwen2_moe": "mlp.gate", "qwen3_moe": "mlp.gate"}


@dataclass(frozen=True, slots=True)
class Experts:
    """count: how many a layer has; active: how many of them each token takes. inner: channels between gate, up and
    down of each. shared: those of the expert that every token takes; 0 where there is none. normalised: whether the
    weights of the experts that a token takes are made to sum to 1."""

    count: int
    active: int
    inner: int
    shared: int
    normalised: bool


def read_experts(keys: Keys, family: str, widest: int) -> Experts | None:
    """None for a family without. widest: the most channels that there may be. Raises CheckpointError."""
    if family not in MIXTURES:
        return None
    if keys.raw.get("quantization_config") is not None:
        raise keys.error("quantization_config", f"weft serves the experts of {family} models unquantised only")
    key, count = _count(keys, family)
    active = keys.count("num_experts_per_tok", most=MOST_EXPERTS)
    if active > count:
        raise keys.error("num_experts_per_tok", f"it must be at most {key}, which is {count}")
    if family == "mixtral":
        return Experts(count, active, keys.count("intermediate_size", most=widest), 0, normalised=True)
    _refuse_dense_layers(keys)
    inner = keys.count("moe_intermediate_size", most=widest)
    shared = keys.count("shared_expert_intermediate_size", most=widest) if family == "qwen2_moe" else 0
    return Experts(count, active, inner, shared, keys.flag("norm_topk_prob"))


def _count(keys: Keys, family: str) -> tuple[str, int]:
    """(the key, the number of experts). Each family has its own key, and transformers writes Mixtral's for Qwen3."""
    own, other = ("num_experts", "num_local_experts")
    if family == "mixtral":
        own, other = other, own
    if keys.raw.get(other) is None:
        return own, keys.count(own, most=MOST_EXPERTS)
    count = keys.count(other, most=MOST_EXPERTS)
    if keys.count(own, default=count, most=MOST_EXPERTS) != count:
        raise keys.error(own, f"{other}, which means the same, is {count}")
    return other, count


def _refuse_dense_layers(keys: Keys) -> None:
    without = "weft has experts in all layers of a model or in none"
    if keys.count("decoder_sparse_step", default=1) != 1:
        raise keys.error("decoder_sparse_step", without)
    if keys.get("mlp_only_layers", []) != []:
        raise keys.error("mlp_only_layers", without)


def expert_names(family: str, expert: int) -> tuple[str, str, str]:
    """Gate, up and down of an expert: the names of its tensors, without `model.layers.N.` and `.weight`."""
    if family == "mixtral":
        prefix = f"block_sparse_moe.experts.{expert}"
        return f"{prefix}.w1", f"{prefix}.w3", f"{prefix}.w2"
    prefix = f"mlp.experts.{expert}"
    return f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj"


def sharded_names(family: str, experts: Experts) -> Iterator[tuple[tuple[str, str, str], int]]:
    """Gate, up and down of each expert, the shared one last, and the channels between them."""
    for expert in range(experts.count):
        yield expert_names(family, expert), experts.inner
    if experts.shared:
        yield SHARED, experts.shared


def mixture_linears(family: str, experts: Experts, hidden: int) -> Iterator[tuple[str, int, int]]:
    """(name, outputs, inputs) of all linears of a layer's mixture, which have no biases."""
    yield ROUTERS[family], experts.count, hidden
    for (gate, up, down), inner in sharded_names(family, experts):
        yield gate, inner, hidden
        yield up, inner, hidden
        yield down, hidden, inner
    if experts.shared:
        yield SHARED_GATE, 1, hidden
