"""config.json: what published checkpoints say is read; what weft cannot do is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import CheckpointError
from weft.models.families import ModelConfig, Rope, parse_config, read_config
from weft.models.mixtures import Experts

LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA31 = LLAMA2 | {
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL = LLAMA31 | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "rope_scaling": None,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 28,
    "max_window_layers": 28,
    "sliding_window": None,
}
MIXTRAL = LLAMA31 | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "max_position_embeddings": 32768,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
QWEN2_MOE = QWEN2 | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def test_llama_2_is_read() -> None:
    assert parse_config(LLAMA2) == ModelConfig(
        family="llama",
        vocabulary=32000,
        hidden_size=4096,
        intermediate_size=11008,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        eps=1e-5,
        context=4096,
        rope=Rope("default", 10000.0),
        windows=(None,) * 32,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied=False,
        dtype="float16",
    )


def test_old_llamas_without_key_value_heads_have_one_for_each_head() -> None:
    assert parse_config(without(LLAMA2, "num_key_value_heads")).kv_heads == 32
    assert parse_config(MISTRAL | {"num_key_value_heads": None}).kv_heads == 32


def test_llama_31_scales_its_rope() -> None:
    config = parse_config(LLAMA31)
    assert config.rope == Rope("llama3", 500000.0, 8.0, 1.0, 4.0, original_context=8192)
    assert (config.context, config.kv_heads, config.dtype) == (131072, 8, "bfloat16")


def test_mistral_has_a_window_in_every_layer_unless_it_is_null() -> None:
    assert parse_config(MISTRAL).windows == (4096,) * 32
    assert parse_config(without(MISTRAL, "sliding_window")).windows == (4096,) * 32  # the default of transformers
    assert parse_config(MISTRAL | {"sliding_window": None}).windows == (None,) * 32
    assert parse_config(MISTRAL | {"layer_types": ["sliding_attention"] * 32}).windows == (4096,) * 32


def test_qwen2_has_biases_on_q_k_and_v_and_windows_only_where_they_are_switched_on() -> None:
    config = parse_config(QWEN2)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.tied) == (True, False, False, True)
    assert config.windows == (None,) * 24
    switched = QWEN2 | {"use_sliding_window": True, "sliding_window": 100}
    assert parse_config(switched).windows == (None,) * 21 + (100,) * 3
    assert parse_config(switched | {"max_window_layers": 0}).windows == (100,) * 24
    named = ["full_attention", "sliding_attention"] * 12
    assert parse_config(switched | {"layer_types": named}).windows == (None, 100) * 12


def test_qwen3_has_norms_on_q_and_k_and_a_head_dim_of_its_own() -> None:
    config = parse_config(QWEN3)
    assert (config.qk_norm, config.qkv_bias, config.head_dim) == (True, False, 128)
    assert parse_config(without(QWEN3, "head_dim")).head_dim == 128  # not 1024 / 16


def test_yarn_stretches_the_context() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = parse_config(QWEN2 | {"rope_scaling": scaling})
    assert (config.rope.kind, config.rope.original_context, config.context) == ("yarn", 32768, 131072)


def test_mixtral_says_the_channels_of_each_expert_and_has_defaults_of_its_own() -> None:
    config = parse_config(MIXTRAL)
    assert (config.experts, config.intermediate_size) == (Experts(8, 2, 14336, 0, True), 14336)
    assert (config.qkv_bias, config.qk_norm, config.head_dim) == (False, False, 128)
    bare = parse_config(without(MIXTRAL, "sliding_window", "rope_theta", "rms_norm_eps"))
    assert (bare.windows, bare.rope.theta, bare.eps) == ((None,) * 32, 1e6, 1e-5)
    assert parse_config(MIXTRAL | {"sliding_window": 4096}).windows == (4096,) * 32


def test_qwen2_moe_has_a_shared_expert() -> None:
    config = parse_config(QWEN2_MOE)
    assert (config.experts, config.intermediate_size) == (Experts(60, 4, 1408, 5632, False), 1408)
    assert (config.qkv_bias, config.output_bias, config.head_dim) == (True, False, 128)
    assert not parse_config(QWEN2_MOE | {"qkv_bias": False}).qkv_bias
    switched = QWEN2_MOE | {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 12}
    assert parse_config(switched).windows == (None, 32768) * 12


def test_qwen3_moe_has_norms_on_q_and_k_and_one_window_for_all_layers() -> None:
    config = parse_config(QWEN3_MOE)
    assert (config.experts, config.intermediate_size) == (Experts(128, 8, 768, 0, True), 768)
    assert (config.qk_norm, config.qkv_bias, config.head_dim) == (True, False, 128)
    assert parse_config(without(QWEN3_MOE, "head_dim")).head_dim == 64  # 2048 / 32, and not Qwen3's 128
    assert parse_config(without(QWEN3_MOE, "norm_topk_prob")).experts == Experts(128, 8, 768, 0, False)
    windowed = QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 100}
    assert parse_config(windowed).windows == (100,) * 28


@pytest.mark.parametrize("raw", [MIXTRAL, QWEN2_MOE, QWEN3_MOE])
def test_either_key_says_how_many_experts_there_are(raw: dict[str, Any]) -> None:
    keys = {"num_experts", "num_local_experts"}
    (own,) = keys & set(raw)
    (other,) = keys - {own}
    renamed = without(raw, own) | {other: raw[own]}
    assert parse_config(renamed) == parse_config(raw | {other: raw[own]}) == parse_config(raw)
    with pytest.raises(CheckpointError, match=f"{own} is {raw[own]}; {other}, which means the same, is 7"):
        parse_config(raw | {other: 7})


@pytest.mark.parametrize("raw", [LLAMA2, LLAMA31, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE])
def test_both_spellings_say_the_same(raw: dict[str, Any]) -> None:
    scaling = {"rope_theta": raw.get("rope_theta", 10000.0)} | (raw.get("rope_scaling") or {"rope_type": "default"})
    new = without(raw, "rope_theta", "rope_scaling", "torch_dtype")
    new |= {"rope_parameters": scaling, "dtype": raw["torch_dtype"]}
    assert parse_config(new) == parse_config(raw)


def test_a_model_type_is_enough() -> None:
    assert parse_config(without(QWEN3, "architectures")) == parse_config(QWEN3)
    assert parse_config(without(QWEN3, "model_type")) == parse_config(QWEN3)


ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GPT2LMHeadModel"]}, r"architectures is \['GPT2LMHeadModel'\]; weft serves LlamaForCausalLM, "),
    ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "architectures"),
    ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; it must be a list"),
    ({"architectures": [3]}, "architectures"),
    ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
    ({"architectures": [], "model_type": "gpt2"}, "model_type is 'gpt2'; weft serves"),
    ({"architectures": None, "model_type": None}, "lacks architectures and model_type"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .*'fp8'.*unquantised.*gptq, awq"),
    ({"quantization_config": "gptq"}, "quantization_config is 'gptq'; weft serves"),
    ({"auto_map": {"AutoModel": "modeling.Llama"}}, "auto_map .*own code"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; weft has silu"),
    ({"hidden_act": 7}, "hidden_act is 7; it must be a string"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"hidden_size": None}, "lacks hidden_size"),
    ({"hidden_size": "4096"}, "hidden_size is '4096'; it must be a whole number"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"hidden_size": 4096.5}, "hidden_size is 4096.5"),
    ({"hidden_size": 10**30}, "hidden_size is 10000"),
    ({"hidden_size": 4097}, "num_attention_heads is 32; it must divide hidden_size, which is 4097"),
    ({"vocab_size": 0}, "vocab_size is 0; it must be a whole number from 1"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000; it must be a whole number from 1 to 10000"),
    ({"num_attention_heads": []}, r"num_attention_heads is \[\]"),
    ({"num_key_value_heads": 5}, "num_key_value_heads is 5; it must divide num_attention_heads, which is 32"),
    ({"head_dim": 33}, "head_dim is 33; it must be even"),
    ({"hidden_size": 32, "head_dim": None}, "head_dim is 1; it must be even"),
    ({"max_position_embeddings": None}, "lacks max_position_embeddings"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; it must be a positive number"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
    ({"attention_bias": 1}, "attention_bias is 1; it must be true or false"),
    ({"torch_dtype": "int8"}, "torch_dtype is 'int8'; weft reads float32, bfloat16, float16"),
    ({"dtype": 16}, "dtype is 16; it must be a string"),
    ({"rope_theta": 0}, "rope_theta is 0; it must be a positive number"),
    ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; it must be an object"),
    ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.type is 'longrope'; weft has default, linear"),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_scaling.rope_type"),
    ({"rope_scaling": {"rope_type": "linear"}}, "lacks rope_scaling.factor"),
    ({"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
    ({"rope_parameters": ROPE | {"factor": "8"}}, "rope_parameters.factor is '8'"),
    ({"rope_parameters": ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor is 4.0; it must be less than"),
    ({"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}}, "rope_parameters.partial_rotary_factor"),
    ({"rope_parameters": {"full_attention": ROPE}}, "rope_parameters.full_attention .*one set"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2}}, "rope_theta is 1; yarn"),
    ({"layer_types": ["full_attention"]}, "layer_types .*num_hidden_layers = 32"),
    ({"layer_types": ["linear_attention"] * 32}, "layer_types .*weft has full_attention and sliding_attention"),
    ({"layer_types": ["sliding_attention"] * 32}, "layer_types .*no sliding_window is in force"),
    ({"layer_types": [["full_attention"]] * 32}, "layer_types"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN, ids=lambda value: str(value)[:60])
def test_what_cannot_be_honoured_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        parse_config(LLAMA2 | change)


def test_the_windows_of_mistral_and_qwen_are_checked() -> None:
    with pytest.raises(CheckpointError, match="sliding_window is 0"):
        parse_config(MISTRAL | {"sliding_window": 0})
    with pytest.raises(CheckpointError, match="layers of a mistral model are all alike"):
        parse_config(MISTRAL | {"layer_types": ["full_attention", "sliding_attention"] * 16})
    with pytest.raises(CheckpointError, match="max_window_layers is -1"):
        parse_config(QWEN2 | {"use_sliding_window": True, "max_window_layers": -1})
    with pytest.raises(CheckpointError, match="lacks num_key_value_heads"):
        parse_config(without(QWEN2, "num_key_value_heads"))


EXPERTS_BROKEN: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (MIXTRAL, {"num_local_experts": None}, "lacks num_local_experts"),
    (MIXTRAL, {"num_local_experts": 0}, "num_local_experts is 0; it must be a whole number from 1 to 1024"),
    (MIXTRAL, {"num_experts_per_tok": None}, "lacks num_experts_per_tok"),
    (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; it must be at most num_local_experts, which is 8"),
    (MIXTRAL, {"intermediate_size": 0}, "intermediate_size is 0"),
    (MIXTRAL, {"layer_types": ["sliding_attention"] * 32}, "layer_types .*no sliding_window is in force"),
    (MIXTRAL, {"model_type": "mistral"}, "model_type is 'mistral'; .*it must be 'mixtral'"),
    (QWEN2_MOE, {"num_experts": "60"}, "num_experts is '60'; it must be a whole number"),
    (QWEN2_MOE, {"num_experts_per_tok": 61}, "num_experts_per_tok is 61; it must be at most num_experts, which is 60"),
    (QWEN2_MOE, {"moe_intermediate_size": None}, "lacks moe_intermediate_size"),
    (QWEN2_MOE, {"moe_intermediate_size": 2**21}, "moe_intermediate_size is 2097152"),
    (QWEN2_MOE, {"shared_expert_intermediate_size": None}, "lacks shared_expert_intermediate_size"),
    (QWEN2_MOE, {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0"),
    (QWEN2_MOE, {"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be true or false"),
    (QWEN2_MOE, {"qkv_bias": "yes"}, "qkv_bias is 'yes'; it must be true or false"),
    (QWEN2_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; weft has experts in all layers of a model or"),
    (QWEN2_MOE, {"use_sliding_window": True}, "use_sliding_window is True; layer_types must say which layers"),
    (QWEN3_MOE, {"mlp_only_layers": [0, 3]}, r"mlp_only_layers is \[0, 3\]; weft has experts in all layers"),
    (QWEN3_MOE, {"mlp_only_layers": 3}, "mlp_only_layers is 3"),
    (QWEN3_MOE, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config .*'gptq'.*unquantised only"),
]


@pytest.mark.parametrize(("raw", "change", "words"), EXPERTS_BROKEN, ids=lambda value: str(value)[-60:])
def test_what_cannot_be_of_experts_is_named(raw: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        parse_config(raw | change)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NESTED = ("factor", "rope_type", "type", "low_freq_factor", "original_max_position_embeddings", "mscale", "truncate")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_value_anywhere_is_read_or_refused(data: st.DataObject) -> None:
    raw = dict(data.draw(st.sampled_from([LLAMA31, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE])))
    keys = [*raw, "layer_types", "rope_parameters", "dtype", "auto_map", "use_sliding_window"]
    raw |= data.draw(st.dictionaries(st.sampled_from(keys), JSON, max_size=3))
    if data.draw(st.booleans()):
        kind = data.draw(st.sampled_from(["linear", "dynamic", "llama3", "yarn"]))
        scaling = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        raw["rope_scaling"] = scaling | data.draw(st.dictionaries(st.sampled_from(NESTED), JSON, max_size=2))
    try:
        config = parse_config(raw)
    except CheckpointError as error:
        assert "config.json" in error.message
    else:
        assert len(config.windows) == config.layers and config.heads % config.kv_heads == 0
        assert config.experts is None or config.experts.active <= config.experts.count


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1]", "holds a JSON list; it must be an object"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in caught.value.message


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA31))
    assert read_config(tmp_path) == parse_config(LLAMA31)
