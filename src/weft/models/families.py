"""What a checkpoint's config.json says, as one flat dataclass that steers the one decoder.

Llama 2 / 3 / 3.1, Mistral, Mixtral, Qwen2 / 2.5, Qwen2-MoE, Qwen3 and Qwen3-MoE differ in six things only: biases,
norms on q and k, sliding windows, rotary scaling, whether head_dim is written down, and experts (mixtures.py). A config
that asks for anything else is refused by name: a model that runs with a setting left out gives plausible nonsense.

Both spellings are read: `rope_parameters` and `dtype` (transformers 5), `rope_theta`, `rope_scaling` and `torch_dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import CheckpointError
from weft.models.keys import CONFIG_FILE, LARGEST, Keys, read_object
from weft.models.mixtures import Experts, read_experts

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
DTYPES = ("float32", "bfloat16", "float16")
GPTQ_FILE = "quantize_config.json"  # what AutoGPTQ wrote before config.json had a place for it
QUANTISED = ("fmpq", "gptq", "awq", "compressed-tensors")  # quant_method of `quantization_config`
LARGEST_WIDTH = 2**20


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions become angles. kind: default, linear, dynamic, llama3 or yarn; each reads its own fields.

    original_context: the length the frequencies were trained for (llama3, yarn).
    attention_factor: what yarn multiplies cos and sin by; None where it follows from its factor.
    """

    kind: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shapes and switches of one decoder.

    intermediate_size: channels between gate, up and down; with experts, of each of them.
    context: the longest sequence, in tokens, that the checkpoint says it can do.
    windows: for each layer, how many positions a token attends to (its own included), or None for all.
    qkv_bias, output_bias, mlp_bias: which linear layers have one. qk_norm: RMSNorm on each head of q and k.
    tied: the output layer is the embedding. dtype: what the weights are stored in, None where the file does not say.
    quantization: the file's `quantization_config`; None for plain weights.
    experts: what each layer has in the place of one MLP; None where it has one.
    """

    family: str
    vocabulary: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    context: int
    rope: Rope
    windows: tuple[int | None, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    dtype: str | None
    quantization: Mapping[str, Any] | None = None
    experts: Experts | None = None


def read_config(folder: Path) -> ModelConfig:
    """The model that `folder`/config.json describes. Raises CheckpointError naming the key and its value."""
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}: it is not a Hugging Face model folder")
    raw, beside = read_object(folder / CONFIG_FILE), folder / GPTQ_FILE
    if raw.get("quantization_config") is None and beside.exists():
        raw["quantization_config"] = {"quant_method": "gptq"} | read_object(beside)
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """As `read_config`, from the parsed file."""
    keys = Keys(raw)
    family = _family(keys)
    _refuse_the_unknown(keys)
    hidden_size = keys.count("hidden_size", most=LARGEST_WIDTH)
    layers = keys.count("num_hidden_layers", most=10_000)
    heads = keys.count("num_attention_heads", most=LARGEST_WIDTH)
    kv_heads = keys.count(
        "num_key_value_heads", default=heads if family == "llama" or "num_key_value_heads" in raw else None
    )
    if heads % kv_heads:
        raise keys.error("num_key_value_heads", f"it must divide num_attention_heads, which is {heads}")
    rope, context = _rope(keys, family, keys.count("max_position_embeddings"))
    attention_bias = family in ("llama", "qwen3", "qwen3_moe") and keys.flag("attention_bias")
    experts = read_experts(keys, family, LARGEST_WIDTH)
    return ModelConfig(
        family=family,
        vocabulary=keys.count("vocab_size"),
        hidden_size=hidden_size,
        # That of a Qwen with experts is of dense layers, which there are none of.
        intermediate_size=keys.count("intermediate_size", most=LARGEST_WIDTH) if experts is None else experts.inner,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(keys, family, hidden_size, heads),
        eps=keys.number("rms_norm_eps", default=1e-5 if family == "mixtral" else 1e-6),
        context=context,
        rope=rope,
        windows=_windows(keys, family, layers),
        qkv_bias=family == "qwen2" or attention_bias or (family == "qwen2_moe" and keys.flag("qkv_bias", True)),
        output_bias=attention_bias,
        mlp_bias=family == "llama" and keys.flag("mlp_bias"),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        tied=keys.flag("tie_word_embeddings"),
        dtype=_dtype(keys),
        quantization=raw.get("quantization_config"),
        experts=experts,
    )


def _family(keys: Keys) -> str:
    served = f"weft serves {', '.join(ARCHITECTURES)}"
    named = keys.get("architectures", [])
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise keys.error("architectures", "it must be a list of names")
    model_type = keys.text("model_type", "")
    if named:
        families = {ARCHITECTURES.get(name) for name in named}
        if len(families) != 1 or None in families:
            raise keys.error("architectures", served)
        (family,) = families
        if model_type not in ("", family):
            raise keys.error("model_type", f"with architectures {named} it must be {family!r}")
        return str(family)
    if model_type not in ARCHITECTURES.values():
        if not model_type:
            raise CheckpointError(f"{CONFIG_FILE} lacks architectures and model_type; {served}")
        raise keys.error("model_type", served)
    return model_type


def _refuse_the_unknown(keys: Keys) -> None:
    quantised = keys.raw.get("quantization_config")
    if quantised is not None and not (isinstance(quantised, dict) and quantised.get("quant_method") in QUANTISED):
        raise keys.error(
            "quantization_config",
            "weft serves unquantised weights (float32, bfloat16, float16), and those whose quant_method is "
            "fmpq (made by `weft quantize`), gptq, awq or compressed-tensors",
        )
    if keys.raw.get("auto_map") is not None:
        raise keys.error(
            "auto_map", "weft never runs a checkpoint's own code, so it cannot serve a model that needs it"
        )
    if keys.text("hidden_act", "silu") not in ("silu", "swish"):
        raise keys.error("hidden_act", "weft has silu only")
    if keys.number("partial_rotary_factor", 1.0) != 1.0:
        raise keys.error("partial_rotary_factor", "weft rotates whole heads only (1.0)")


def _head_dim(keys: Keys, family: str, hidden_size: int, heads: int) -> int:
    if keys.raw.get("head_dim") is None and family != "qwen3" and hidden_size % heads:
        raise keys.error(
            "num_attention_heads", f"it must divide hidden_size, which is {hidden_size}, or head_dim must be given"
        )
    head_dim = keys.count("head_dim", default=128 if family == "qwen3" else max(1, hidden_size // heads), most=4096)
    if head_dim % 2:
        raise CheckpointError(f"{CONFIG_FILE}: head_dim is {head_dim}; it must be even, since halves of it are rotated")
    return head_dim


def _dtype(keys: Keys) -> str | None:
    key = "dtype" if keys.raw.get("dtype") is not None else "torch_dtype"
    name = keys.text(key, "").removeprefix("torch.")
    if name and name not in DTYPES:
        raise keys.error(key, f"weft reads {', '.join(DTYPES)}")
    return name or None


def _windows(keys: Keys, family: str, layers: int) -> tuple[int | None, ...]:
    """Mistral and Mixtral: every layer, when there is a window. Qwen: only with use_sliding_window; the layers named by
    layer_types, or from max_window_layers on. Qwen3-MoE: every layer then. Llama has none."""
    switched = family.startswith("qwen") and keys.flag("use_sliding_window")
    window: int | None = None
    if family == "mistral" or switched or (family == "mixtral" and "sliding_window" in keys.raw):
        null = "sliding_window" in keys.raw and keys.raw["sliding_window"] is None
        window = None if null else keys.count("sliding_window", default=4096)  # null: no window; absent: their default
    first = keys.count("max_window_layers", default=28, least=0) if family in ("qwen2", "qwen3") else 0
    plain = tuple(window if index >= first else None for index in range(layers))

    kinds = keys.raw.get("layer_types")
    if kinds is None:
        if family == "qwen2_moe" and window is not None:
            raise keys.error("use_sliding_window", "layer_types must say which layers of a qwen2_moe model it is for")
        return plain
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise keys.error("layer_types", f"it must be a list of num_hidden_layers = {layers} names")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise keys.error("layer_types", "weft has full_attention and sliding_attention")
    if "sliding_attention" in kinds and window is None:
        raise keys.error("layer_types", "it names sliding_attention, and no sliding_window is in force for this model")
    named = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family not in ("qwen2", "qwen2_moe", "qwen3") and named != plain:
        raise keys.error("layer_types", f"the layers of a {family} model are all alike")
    return named


def _rope(keys: Keys, family: str, context: int) -> tuple[Rope, int]:
    """The rotary parameters and the context that they allow; `context` is max_position_embeddings.

    In either spelling one object holds the kind and its numbers. yarn is often added to a config afterwards, with
    max_position_embeddings left at the trained length, so the stretched length counts.
    """
    scaling = keys.inner("rope_scaling") or keys.inner("rope_parameters") or Keys({}, "rope_parameters.")
    for key, value in scaling.raw.items():
        if isinstance(value, dict):
            raise scaling.error(key, "weft has one set of rotary parameters for all layers")
    theta = scaling.number("rope_theta", keys.number("rope_theta", 1e6 if family == "mixtral" else 1e4))
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise scaling.error("partial_rotary_factor", "weft rotates whole heads only (1.0)")
    if scaling.raw.get("mrope_section") is not None:
        raise scaling.error("mrope_section", "weft serves text only, so it has no multimodal positions")
    if kind == "default":
        return Rope(kind, theta), context
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        key = "rope_type" if scaling.raw.get("rope_type") is not None else "type"
        raise scaling.error(key, "weft has default, linear, dynamic, llama3 and yarn")
    if kind in ("linear", "dynamic"):
        return Rope(kind, theta, scaling.number("factor")), context
    holder = keys if keys.raw.get("original_max_position_embeddings") is not None else scaling
    original = holder.count("original_max_position_embeddings", default=context)
    if kind == "llama3":
        return _llama3(scaling, theta, original), context
    rope = _yarn(scaling, theta, original, context)
    return rope, min(LARGEST, max(context, int(original * rope.factor)))


def _llama3(scaling: Keys, theta: float, original: int) -> Rope:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise scaling.error("low_freq_factor", f"it must be less than high_freq_factor, which is {high:g}")
    return Rope(
        "llama3",
        theta,
        scaling.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=original,
    )


def _yarn(scaling: Keys, theta: float, original: int, context: int) -> Rope:
    if theta <= 1.0:
        raise CheckpointError(f"{CONFIG_FILE}: rope_theta is {theta:g}; yarn needs more than 1")
    factor = scaling.number("factor", context / original)
    attention: float | None = None
    if scaling.raw.get("attention_factor") is not None:
        attention = scaling.number("attention_factor")
    elif scaling.raw.get("mscale") and scaling.raw.get("mscale_all_dim"):
        mscale, whole = scaling.number("mscale"), scaling.number("mscale_all_dim")
        attention = yarn_scale(factor, mscale) / yarn_scale(factor, whole)
    return Rope(
        "yarn",
        theta,
        factor,
        original_context=original,
        attention_factor=attention,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
    )


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """How much yarn sharpens attention when it stretches positions by `factor`."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
