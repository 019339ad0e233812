"""Rotary tables against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from weft.models.families import parse_config
from weft.models.rope import Rotary, inverse_frequencies

SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 4096}
THETAS = st.floats(100.0, 1e7)
FACTORS = st.floats(1.0, 40.0)
ORIGINALS = st.integers(16, 4096)


def kind(name: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"rope_type": st.just(name), "rope_theta": THETAS, **fields})


PARAMETERS = st.one_of(
    kind("default"),
    kind("linear", factor=FACTORS),
    kind("dynamic", factor=FACTORS),
    kind(
        "llama3",
        factor=FACTORS,
        low_freq_factor=st.floats(0.5, 2.0),
        high_freq_factor=st.floats(2.5, 8.0),
        original_max_position_embeddings=ORIGINALS,
    ),
    kind("yarn", factor=FACTORS, original_max_position_embeddings=ORIGINALS),
    kind(
        "yarn",
        factor=FACTORS,
        original_max_position_embeddings=ORIGINALS,
        attention_factor=st.floats(0.5, 2.0),
        beta_fast=st.floats(16.0, 64.0),
        beta_slow=st.floats(0.5, 4.0),
        truncate=st.booleans(),
    ),
    kind(
        "yarn",
        factor=FACTORS,
        original_max_position_embeddings=ORIGINALS,
        mscale=st.floats(0.5, 1.5),
        mscale_all_dim=st.floats(0.5, 1.5),
    ),
)


@settings(max_examples=150, deadline=None)
@given(PARAMETERS, st.sampled_from([16, 64, 128]))
def test_frequencies_are_those_of_transformers_to_the_bit(parameters: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(**SHAPE, head_dim=head_dim, rope_parameters=dict(parameters))
    theirs = LlamaRotaryEmbedding(config)
    raw = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    frequencies, factor = inverse_frequencies(
        parse_config(raw | SHAPE | {"rope_parameters": parameters}).rope, head_dim
    )
    assert frequencies.dtype == torch.float32
    assert frequencies.equal(theirs.inv_freq)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", ["default", "yarn"])
def test_tables_are_those_of_transformers_at_every_position(name: str) -> None:
    parameters = {"rope_type": name, "rope_theta": 10000.0}
    if name == "yarn":
        parameters |= {"factor": 4.0, "original_max_position_embeddings": 1024}
    config = LlamaConfig(**SHAPE, rope_parameters=parameters)
    theirs = LlamaRotaryEmbedding(config)(torch.empty(1), torch.arange(4096)[None])
    raw = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    rotary = Rotary(parse_config(raw | SHAPE | {"rope_parameters": parameters}).rope, 64)
    for ours, want in zip(rotary.tables(4096), theirs, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == (4096, 32)
        torch.testing.assert_close(ours, want[0, :, :32], atol=2e-7, rtol=0)


def test_tables_are_made_once_and_shared() -> None:
    raw = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    rotary = Rotary(parse_config(raw | SHAPE).rope, 64)
    first, again = rotary.tables(100)[0], rotary.tables(40)[0]
    assert again.data_ptr() == first.data_ptr() and len(again) == 40
    assert rotary.tables(200)[0][:100].equal(first)
