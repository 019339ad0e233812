"""The shapes of a model that its speed depends on, from any Hugging Face config.json: dense, experts, latent attention.

Unlike weft.models.families this says nothing of what weft can serve.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.models.keys import Keys, read_object
from weft.sim.attention import Heads
from weft.sim.hardware import DATA

MODELS = DATA / "models"
# Whose shapes are read right: gated MLPs, attention over all positions or one window for all layers.
KNOWN = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gemma",
)  # fmt: skip
ATTENDING = ("full_attention", "sliding_attention", "chunked_attention")  # layers that have KV
# Keys of models that have other layers, too, with a state instead of KV.
STATES = (
    "linear_num_value_heads", "linear_attn_config", "mamba_d_state", "mamba_state_dim", "ssm_state_size", "state_size",
    "ssm_cfg", "layers_block_type", "hybrid_override_pattern", "attn_layer_period", "attn_type_list", "block_types",
    "conv_L_cache",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Experts:
    """count: routed experts, `chosen` of which each token takes. intermediate: of one of them. shared: intermediate
    size of the experts that every token takes, together. dense_layers: first layers that have none."""

    count: int
    chosen: int
    intermediate: int
    shared: int
    dense_layers: int


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2). q_rank: 0 where queries are not compressed. rank, rope: elements of
    the cached latent and of the rotated key beside it. nope, value: of a head's unrotated key and value."""

    q_rank: int
    rank: int
    rope: int
    nope: int
    value: int


@dataclass(frozen=True, slots=True)
class Linear:
    """A product with a weight [k, n] in each of `layers` layers. split: which of both the ranks divide, or neither.
    rows: once for each token, or for each sequence that samples."""

    name: str
    n: int
    k: int
    layers: int
    split: str = ""
    sampled: bool = False

    def on(self, ranks: int) -> tuple[int, int]:
        """n and k of one rank, rounded up."""
        n, k = (-(-self.n // ranks), self.k) if self.split == "n" else (self.n, self.k)
        return n, -(-k // ranks) if self.split == "k" else k


@dataclass(frozen=True, slots=True)
class Model:
    """window: positions that a token attends to, or None for all. caveat: what may be wrong with these shapes."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    tied: bool
    window: int | None = None
    experts: Experts | None = None
    latent: Latent | None = None
    caveat: str | None = None

    def linears(self) -> Iterator[Linear]:
        """All products but those of routed experts."""
        yield from self._attention()
        experts = self.experts
        dense = self.layers if experts is None else experts.dense_layers
        yield Linear("gate_up", 2 * self.intermediate, self.hidden, dense, "n")
        yield Linear("down", self.hidden, self.intermediate, dense, "k")
        if experts is not None:
            sparse = self.layers - dense
            yield Linear("router", experts.count, self.hidden, sparse)
            yield Linear("shared_gate_up", 2 * experts.shared, self.hidden, sparse, "n")
            yield Linear("shared_down", self.hidden, experts.shared, sparse, "k")
        yield Linear("output", self.vocabulary, self.hidden, 1, "n", sampled=True)

    def _attention(self) -> Iterator[Linear]:
        latent = self.latent
        if latent is None:
            wide = (self.heads + 2 * self.kv_heads) * self.head_dim
            yield Linear("qkv", wide, self.hidden, self.layers, "n")
            yield Linear("o", self.hidden, self.heads * self.head_dim, self.layers, "k")
            return
        queries = self.heads * (latent.nope + latent.rope)
        down = latent.q_rank + latent.rank + latent.rope
        yield Linear("qkv_down", down if latent.q_rank else latent.rank + latent.rope, self.hidden, self.layers)
        yield Linear("q_up", queries, latent.q_rank or self.hidden, self.layers, "n")
        # Prompts unpack keys and values; decoding multiplies queries and results with the same weights instead.
        yield Linear("kv_up", self.heads * (latent.nope + latent.value), latent.rank, self.layers, "n")
        yield Linear("o", self.hidden, self.heads * latent.value, self.layers, "k")

    def parameters(self, ranks: int = 1) -> float:
        """Of one rank's linear layers, routed experts included; without embedding and output."""
        dense = sum(n * k * each.layers for each in self.linears() if not each.sampled for n, k in (each.on(ranks),))
        if self.experts is None:
            return float(dense)
        sparse = self.layers - self.experts.dense_layers
        wide = -(-self.experts.intermediate // ranks)
        return float(dense + sparse * self.experts.count * 3 * self.hidden * wide)

    def embeddings(self, ranks: int = 1) -> float:
        """Parameters of one rank's embedding and output, which stay in 16 bits."""
        return float(self.vocabulary * self.hidden * (1 if self.tied else 2)) / ranks

    def slots(self, ranks: int = 1) -> int:
        """Elements that one rank's cache keeps for a position of one layer."""
        heads = self.prompt_heads(ranks)
        return int(heads.kv_heads * heads.slot)

    def prompt_heads(self, ranks: int, kv_bits: float = 16) -> Heads:
        """Attention of one rank over prompts. Ranks beyond the number of kv heads keep copies of them."""
        latent = self.latent
        heads = -(-self.heads // ranks)
        if latent is None:
            kv_heads = max(1, self.kv_heads // ranks)
            return Heads(heads, kv_heads, self.head_dim, self.head_dim, 2 * self.head_dim, kv_bits)
        slot = latent.rank + latent.rope
        return Heads(heads, 1, latent.nope + latent.rope, latent.value, slot, kv_bits, latent=True)


def model_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in MODELS.glob("*.json")))


def find_model(name: str) -> Model:
    """By name, or from a config.json or its folder. Raises ConfigError naming the models there are, or CheckpointError
    naming the key of a file that does not tell the shapes."""
    if name in model_names():
        return read_model(name, read_object(MODELS / f"{name}.json"))
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.exists():
        raise ConfigError(
            f"no model is called {name!r}; there are {', '.join(model_names())}, and any Hugging Face config.json"
        )
    return read_model(path.parent.name if path.stem == "config" else path.stem, read_object(path))


def read_model(name: str, raw: dict[str, Any]) -> Model:
    """From a parsed config.json. Raises CheckpointError naming a key that is missing or cannot be."""
    keys = Keys(raw)
    family = keys.text("model_type", "")
    _check_layers(keys)
    layers, hidden = keys.count("num_hidden_layers"), keys.count("hidden_size")
    heads = keys.count("num_attention_heads")
    kv_heads = keys.count("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise keys.error("num_key_value_heads", f"it must divide num_attention_heads, which is {heads}")
    windowed = keys.flag("use_sliding_window", family == "mistral")
    window = keys.count("sliding_window") if windowed and raw.get("sliding_window") is not None else None
    return Model(
        name=name,
        layers=layers,
        hidden=hidden,
        intermediate=keys.count("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=keys.count("head_dim", default=max(1, hidden // heads)),
        vocabulary=keys.count("vocab_size"),
        context=keys.count("max_position_embeddings", default=4096),
        tied=keys.flag("tie_word_embeddings", family.startswith("gemma")),
        window=window,
        experts=_experts(keys, layers),
        latent=_latent(keys),
        caveat=None if family in KNOWN else _caveat(name, family),
    )


def _check_layers(keys: Keys) -> None:
    """Refuses models with layers that have a state instead of KV: neither their memory nor their time is known."""
    kinds = keys.get("layer_types", [])
    if not isinstance(kinds, list):
        raise keys.error("layer_types", "it must be a list")
    wrong = "layer_types" if any(kind not in ATTENDING for kind in kinds) else None
    wrong = wrong or next((key for key in STATES if keys.raw.get(key)), None)
    if wrong is not None:
        raise keys.error(wrong, "layers of linear attention or with a state (SSM) are not simulated; all must attend")


def _caveat(name: str, family: str) -> str:
    kind = f"its model_type {family!r} is not known" if family else "its config.json has no model_type"
    return (
        f"{name}: {kind}, so its shapes are read as those of a Llama: three matrices in each MLP, and attention over "
        f"all positions in every layer; known are {', '.join(KNOWN)}"
    )


def _experts(keys: Keys, layers: int) -> Experts | None:
    """Mixtral says num_local_experts; DeepSeek n_routed_experts, Qwen num_experts with a size of their own."""
    count = next(
        (name for name in ("n_routed_experts", "num_local_experts", "num_experts") if keys.raw.get(name)), None
    )
    if count is None:
        return None
    wide = keys.count("moe_intermediate_size", default=keys.count("intermediate_size"))
    every = keys.count(
        "shared_expert_intermediate_size", keys.count("n_shared_experts", default=0, least=0) * wide, least=0
    )
    dense = keys.count("first_k_dense_replace", default=0, least=0)
    if dense > layers:
        raise keys.error("first_k_dense_replace", f"it must be at most num_hidden_layers, which is {layers}")
    number, chosen = keys.count(count), keys.count("num_experts_per_tok")
    if chosen > number:
        raise keys.error("num_experts_per_tok", f"it must be at most {count}, which is {number}")
    return Experts(number, chosen, wide, every, dense)


def _latent(keys: Keys) -> Latent | None:
    if keys.raw.get("kv_lora_rank") is None:
        return None
    return Latent(
        q_rank=keys.count("q_lora_rank", default=0, least=0),
        rank=keys.count("kv_lora_rank"),
        rope=keys.count("qk_rope_head_dim"),
        nope=keys.count("qk_nope_head_dim"),
        value=keys.count("v_head_dim"),
    )
