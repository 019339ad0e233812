"""The fmpq checkpoint: what is written is what is read, and what is wrong is refused by file and tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.comet.checkpoint import (
    FmpqConfig,
    HeadForm,
    QuantisedLayer,
    QuantisedSite,
    layer_tensors,
    parse,
    read_layer,
    site_shapes,
    tensor_shapes,
)
from weft.comet.forward import SITES
from weft.comet.reference import InputForm, QuantisedLinear
from weft.errors import CheckpointError

from .conftest import tiny_config

_, SHAPES = tiny_config()
FILE = Path("model-00001-of-00003.safetensors")


def config_of(bits: int = 4) -> FmpqConfig:
    return FmpqConfig(
        bits,
        {"attention": (1, 0), "output": (0, 1), "mlp": (0, 0), "down": (1, 2)},
        {"attention": (True, False), "output": (False, False), "mlp": (True, True), "down": (True, True)},
    )


def layer_of(config: FmpqConfig, index: int, biased: bool = False) -> QuantisedLayer:
    generator = torch.Generator().manual_seed(index)
    sites = {}
    for site, (rows, columns) in site_shapes(SHAPES).items():
        count, blocks = sum(rows.values()), config.outlier_blocks[site][index]
        values = torch.randint(-8, 8, (count, columns), generator=generator, dtype=torch.int8)
        if config.outlier_weight_bits == 8:
            values[:, : blocks * 128] = torch.randint(-127, 128, (count, blocks * 128), generator=generator)
        sites[site] = QuantisedSite(
            InputForm(
                columns,
                None if site == "down" else torch.randperm(columns, generator=generator).int(),
                blocks,
                config.hadamard[site][index],
            ),
            QuantisedLinear(
                values,
                torch.randn(count, columns // 128, generator=generator).bfloat16().float(),
                torch.randn(count, generator=generator) if biased else None,
            ),
        )
    return QuantisedLayer(sites, {"input_layernorm.weight": torch.rand(128)})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_a_layer_comes_back_from_its_tensors(bits: int, biased: bool, index: int) -> None:
    config = config_of(bits)
    layer = layer_of(config, index, biased)
    tensors = layer_tensors(layer, config, SHAPES)
    assert tensors.keys() - set(tensor_shapes(config, SHAPES, index)) == {
        "input_layernorm.weight",
        *(f"{name}.bias" for names in SITES.values() for name in names if biased),
    }
    found = read_layer(tensors, config, SHAPES, index, FILE)
    assert found.norms.keys() == layer.norms.keys()
    for site, one in layer.sites.items():
        other = found.sites[site]
        assert torch.equal(other.linear.values, one.linear.values)
        assert torch.equal(other.linear.scales, one.linear.scales)
        assert (other.linear.bias is None) == (not biased)
        if biased:
            assert torch.equal(other.linear.bias, one.linear.bias)
        assert (other.form.outlier_blocks, other.form.hadamard) == (one.form.outlier_blocks, one.form.hadamard)
        if one.form.permutation is not None:
            assert torch.equal(other.form.permutation, one.form.permutation)


@pytest.mark.parametrize("head", [None, HeadForm(4, 0, True), HeadForm(4, 1, False), HeadForm(8, 1, False)])
@pytest.mark.parametrize("embedding_bits", [4, 8, 16])
def test_the_config_comes_back_from_its_json(head: HeadForm | None, embedding_bits: int) -> None:
    config = replace(config_of(8), head=head, embedding_bits=embedding_bits)
    assert parse(config.as_json(), SHAPES) == config


def test_a_config_of_version_1_leaves_embedding_and_output_layer_as_they_were() -> None:
    raw = config_of().as_json() | {"version": 1}
    del raw["head"], raw["embedding_bits"]
    assert parse(raw, SHAPES) == config_of()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "awq"}, "quantization_config.quant_method is 'awq'"),
        ({"version": 3}, "quantization_config.version is 3"),
        ({"version": True}, "quantization_config.version is True"),
        ({"block_size": 64}, "quantization_config.block_size is 64"),
        ({"outlier_weight_bits": 6}, "quantization_config.outlier_weight_bits is 6; it must be 4 or 8"),
        ({"outlier_blocks": None}, "quantization_config.outlier_blocks.attention is None"),
        ({"hadamard": {"attention": [True]}}, "it must list 2 bools"),
        ({"hadamard": {"attention": [1, 0]}}, "it must list 2 bools"),
        ({"outlier_blocks": {"attention": [0, 2]}}, "it must list 2 ints from 0 to 1, one for each layer"),
        ({"outlier_blocks": {"attention": [0, True]}}, "it must list 2 ints"),
        ({"modules_to_not_convert": []}, "modules_to_not_convert is []; it must be ['lm_head']"),
        ({"embedding_bits": 6}, "quantization_config.embedding_bits is 6; it must be 4 or 8 or 16"),
        ({"head": 4}, "quantization_config.head is 4; it must be null or an object"),
        ({"head": {"weight_bits": 4, "outlier_blocks": 2, "hadamard": True}}, "outlier_blocks from 0 to 1"),
        ({"head": {"weight_bits": 8, "outlier_blocks": 0, "hadamard": False}}, "all 1 blocks are outlier blocks"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_key(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(config_of().as_json() | change, SHAPES)
    assert words in caught.value.message


def test_a_config_that_is_no_object_or_not_divisible_is_refused() -> None:
    with pytest.raises(CheckpointError, match="must be an object"):
        parse([], SHAPES)
    with pytest.raises(CheckpointError, match="the down input has 200 input channels"):
        parse(config_of().as_json(), tiny_config(intermediate_size=200)[1])


def broken(name: str, tensor: torch.Tensor | None) -> str:
    """The error for a layer whose tensor `name` is replaced, or missing."""
    config = config_of(8)
    tensors = layer_tensors(layer_of(config, 0), config, SHAPES)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    with pytest.raises(CheckpointError) as caught:
        read_layer(tensors, config, SHAPES, 0, FILE)
    assert str(FILE) in caught.value.message and name in caught.value.message
    return caught.value.message


def test_broken_tensors_are_refused_by_file_and_name() -> None:
    twice = torch.zeros(128, dtype=torch.int32)
    assert "is no permutation" in broken("attention.permutation", twice)
    assert "is no permutation" in broken("attention.permutation", torch.arange(1, 129, dtype=torch.int32))
    assert "is no permutation" in broken("attention.permutation", torch.arange(-1, 127, dtype=torch.int32))
    assert "I32 [64]; the config asks for I32 [128]" in broken("mlp.permutation", twice[:64])
    assert "lacks the tensor" in broken("mlp.up_proj.weight_packed", None)
    assert "lacks the tensor" in broken("self_attn.v_proj.weight_outlier", None)
    assert "float32 [256, 1]" in broken("mlp.up_proj.weight_scale", torch.zeros(256, 1))
    nan = torch.full((256, 1), torch.nan, dtype=torch.bfloat16)
    assert "not finite" in broken("mlp.up_proj.weight_scale", nan)
