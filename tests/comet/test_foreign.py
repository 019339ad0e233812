"""Checkpoints of others, packed here number by number after the formats' own descriptions."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.comet.foreign import ForeignLinear, check_shape, join, read_linear
from weft.comet.reference import QuantisedLinear
from weft.comet.scheme import Scheme, parse_scheme
from weft.errors import CheckpointError

OUTPUTS, INPUTS, GROUP = 16, 256, 128
NAME, FILE = "model.layers.0.mlp.up_proj", "model.safetensors"


def signed(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((words & 0xFFFFFFFF).astype(np.uint32).view(np.int32))


def pack(columns: np.ndarray, places: tuple[int, ...], bits: int = 4) -> torch.Tensor:
    """Unsigned numbers [R, C] into words [R, C * bits / 32]; of neighbours, the one at places[i] has place i."""
    per_word = 32 // bits
    words = np.zeros((columns.shape[0], columns.shape[1] // per_word), np.int64)
    for column in range(words.shape[1]):
        for place, neighbour in enumerate(places):
            words[:, column] |= columns[:, per_word * column + neighbour].astype(np.int64) << (bits * place)
    return signed(words)


BYTES = (0, 1, 2, 3)
IN_ORDER = tuple(range(8))
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)


class Drawn:
    """Integers, zero points and scales, and the float weight [out, in] that they stand for."""

    def __init__(self, groups: int, seed: int = 0, index: np.ndarray | None = None, bits: int = 4) -> None:
        generator = np.random.default_rng(seed)
        self.values = generator.integers(0, 2**bits, (OUTPUTS, INPUTS))
        self.zeros = generator.integers(1, 2**bits, (OUTPUTS, groups))
        self.scales = torch.from_numpy(generator.uniform(0.01, 0.1, (OUTPUTS, groups))).half()
        self.index = np.arange(INPUTS) // (INPUTS // groups) if index is None else index
        zero, scale = self.zeros[:, self.index], self.scales.float().numpy()[:, self.index]
        self.weight = torch.from_numpy(((self.values - zero) * scale).astype(np.float32))


def read(scheme: Scheme, tensors: dict[str, torch.Tensor]) -> ForeignLinear:
    named = {f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()}
    return read_linear(scheme, named, NAME, (OUTPUTS, INPUTS), FILE)


def packed_weight(parts: list[ForeignLinear]) -> torch.Tensor:
    """What the kernels are given, as floats in the model's order of channels."""
    joined = join(parts)
    assert joined.values.dtype == torch.int8
    weight = QuantisedLinear(joined.values, joined.scales, None, joined.zeros).dequantised()
    return weight if joined.permutation is None else weight[:, joined.permutation.argsort()]


def check(scheme: Scheme, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    linear = read(scheme, tensors)
    assert torch.allclose(linear.dequantised(), weight, rtol=1e-6, atol=0)
    assert not join([linear]).rounded
    assert torch.allclose(packed_weight([linear, linear]), weight.repeat(2, 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("desc_act", [False, True])
def test_gptq(form: str, group: int, desc_act: bool) -> None:
    # The greatest zero point of 4 bits, 15, is stored as 14 in format gptq.
    groups = 1 if group == -1 else INPUTS // GROUP
    index = np.random.default_rng(1).permutation(np.arange(INPUTS) // (INPUTS // groups)) if desc_act else None
    drawn = Drawn(groups, index=index)
    raw = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": desc_act, "checkpoint_format": form}
    tensors = {
        "qweight": pack(drawn.values, IN_ORDER).T.contiguous(),
        "qzeros": pack(drawn.zeros.T - (form == "gptq"), IN_ORDER),
        "scales": drawn.scales.T.contiguous(),
        "g_idx": torch.from_numpy(drawn.index).int(),
    }
    check(parse_scheme(raw), tensors, drawn.weight)
    del tensors["g_idx"]
    if not desc_act:
        check(parse_scheme(raw), tensors, drawn.weight)


@pytest.mark.parametrize(("bits", "ones"), [(4, 0x11111111), (8, 0x01010101)])
def test_gptq_takes_its_offset_from_whole_words(bits: int, ones: int) -> None:
    """As GPTQModel writes zero points of 0 in format gptq: what they lack is borrowed from their neighbours."""
    drawn = Drawn(INPUTS // GROUP, bits=bits)
    drawn.zeros[::3] = 0
    drawn.weight = torch.from_numpy(drawn.values - drawn.zeros[:, drawn.index]).float()
    drawn.weight *= drawn.scales.float()[:, drawn.index]
    places = IN_ORDER if bits == 4 else BYTES
    tensors = {
        "qweight": pack(drawn.values, places, bits).T.contiguous(),
        "qzeros": pack(drawn.zeros.T, places, bits) - ones,
        "scales": drawn.scales.T.contiguous(),
    }
    linear = read(parse_scheme(GPTQ | {"bits": bits, "sym": False}), tensors)
    assert torch.allclose(linear.dequantised(), drawn.weight, rtol=1e-6, atol=0)


def test_gptq_of_8_bits() -> None:
    drawn = Drawn(2, bits=8)
    drawn.zeros[:] = 128
    drawn.weight = torch.from_numpy(drawn.values - 128).float() * drawn.scales.float()[:, drawn.index]
    raw = {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": False}
    tensors = {
        "qweight": pack(drawn.values, BYTES, bits=8).T.contiguous(),
        "qzeros": pack(drawn.zeros.T - 1, BYTES, bits=8),
        "scales": drawn.scales.T.contiguous(),
        "bias": torch.arange(OUTPUTS).half(),
    }
    check(parse_scheme(raw), tensors, drawn.weight)
    bias = join([read(parse_scheme(raw), tensors)]).bias
    assert bias is not None and bias.tolist() == list(range(OUTPUTS))


@pytest.mark.parametrize("zero_point", [True, False])
def test_awq(zero_point: bool) -> None:
    drawn = Drawn(INPUTS // GROUP)
    if not zero_point:
        drawn.weight = drawn.weight + torch.from_numpy(drawn.zeros - 8).float().repeat_interleave(
            GROUP, dim=1
        ) * drawn.scales.float().repeat_interleave(GROUP, dim=1)
    raw = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": zero_point, "version": "gemm"}
    tensors = {
        "qweight": pack(drawn.values.T, INTERLEAVED),
        "qzeros": pack(drawn.zeros.T, INTERLEAVED),
        "scales": drawn.scales.T.contiguous(),
    }
    linear = read(parse_scheme(raw), tensors)
    assert torch.allclose(linear.dequantised(), drawn.weight, atol=1e-6)
    assert torch.allclose(packed_weight([linear]), drawn.weight, atol=1e-6)


def compressed(form: str = "pack-quantized", weights: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    usual = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": usual | (weights or {}), "input_activations": None} | more
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("actorder", [None, "weight", "group"])
def test_compressed_tensors_of_4_bits(symmetric: bool, actorder: str | None) -> None:
    index = np.random.default_rng(1).permutation(np.arange(INPUTS) // GROUP) if actorder == "group" else None
    drawn = Drawn(INPUTS // GROUP, index=index)
    if symmetric:
        drawn.zeros[:] = 8
        drawn.weight = torch.from_numpy(drawn.values - 8).float() * drawn.scales.float()[:, drawn.index]
    tensors = {
        "weight_packed": pack(drawn.values, IN_ORDER),
        "weight_scale": drawn.scales,
        "weight_shape": torch.tensor([OUTPUTS, INPUTS]),
        "weight_g_idx": torch.from_numpy(drawn.index).int(),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack(drawn.zeros.T, IN_ORDER).T.contiguous()
    scheme = parse_scheme(compressed(weights={"symmetric": symmetric, "actorder": actorder}))
    assert scheme.activation_bits == 16
    check(scheme, tensors, drawn.weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_of_4_bits_in_bytes(symmetric: bool) -> None:
    # What llm-compressor makes of W4A8.
    drawn = Drawn(INPUTS // GROUP)
    tensors = {
        "weight": torch.from_numpy(drawn.values - 8).to(torch.int8),
        "weight_scale": drawn.scales,
        "weight_zero_point": torch.from_numpy(drawn.zeros - 8).to(torch.int8) * (not symmetric),
    }
    zeros = 8 if symmetric else drawn.zeros[:, drawn.index]
    weight = torch.from_numpy(drawn.values - zeros).float() * drawn.scales.float()[:, drawn.index]
    scheme = parse_scheme(compressed("int-quantized", {"symmetric": symmetric}, input_activations=TOKEN))
    assert scheme.activation_bits == 8
    check(scheme, tensors, weight)
    tensors["weight"][3, 5] = 8
    with pytest.raises(CheckpointError, match=rf"{FILE}: {NAME}.weight has values from -8 to 8; num_bits 4 allows"):
        read(scheme, tensors)


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_compressed_tensors_of_8_bits(form: str) -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(-128, 128, (OUTPUTS, INPUTS))
    scales = torch.from_numpy(generator.uniform(0.01, 0.1, (OUTPUTS, 1))).bfloat16()
    stored = {
        "pack-quantized": {"weight_packed": pack(values + 128, BYTES, bits=8)},
        "int-quantized": {"weight": torch.from_numpy(values).to(torch.int8)},
    }[form]
    raw = compressed(form, {"num_bits": 8, "strategy": "channel", "group_size": None}, input_activations=TOKEN)
    scheme = parse_scheme(raw)
    assert scheme.activation_bits == 8
    check(scheme, stored | {"weight_scale": scales}, torch.from_numpy(values).float() * scales.float())


def test_what_does_not_fit_blocks_of_128_is_rounded_to_8_bits() -> None:
    generator = torch.Generator().manual_seed(3)

    def drawn(group: int, order: torch.Tensor | None = None, bits: int = 4, zero: int = 0) -> ForeignLinear:
        values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (OUTPUTS, INPUTS), generator=generator)
        scales = torch.rand(OUTPUTS, INPUTS // group, generator=generator)
        zeros = torch.full_like(scales, zero).short() if zero else None
        return ForeignLinear(values.to(torch.int8), scales, zeros, order, None)

    orders = [torch.randperm(INPUTS, generator=generator) for _ in range(2)]
    for parts in (
        [drawn(32), drawn(32)],
        [drawn(128, orders[0]), drawn(128, orders[1])],
        [drawn(128), drawn(128, orders[0])],
        [drawn(128, bits=8, zero=-3)],
    ):
        joined = join(parts)
        assert joined.rounded and joined.wide
        exact = torch.cat([part.dequantised() for part in parts])
        largest = exact.unflatten(1, (-1, 128)).abs().amax(dim=-1).repeat_interleave(128, dim=1)
        assert ((packed_weight(parts) - exact).abs() <= largest / 254 * 1.0001).all()

    same = [drawn(128, orders[0]), drawn(256, orders[0]), drawn(128, orders[0], zero=5)]
    joined = join(same)
    assert not joined.rounded and not joined.wide
    assert torch.allclose(packed_weight(same), torch.cat([part.dequantised() for part in same]))


def test_zero_points_beyond_4_bits_keep_the_integers_exact() -> None:
    values = torch.arange(-8, 8).repeat(OUTPUTS, INPUTS // 16).to(torch.int8)
    linear = ForeignLinear(values, torch.ones(OUTPUTS, 2), torch.full((OUTPUTS, 2), 8, dtype=torch.int16), None, None)
    joined = join([linear])
    assert (joined.wide, joined.rounded, joined.zeros) == (True, False, None)
    assert torch.equal(joined.values, values - 8)


def test_which_layers_the_config_leaves_alone() -> None:
    def left(raw: dict[str, Any]) -> set[str]:
        names = [f"model.layers.{index}.{part}" for index in (1, 11) for part in ("self_attn.q_proj", "mlp.up_proj")]
        return {name for name in [*names, "lm_head"] if not parse_scheme(raw).quantises(name)}

    up = {"model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"}
    assert left(compressed()) == {"lm_head"}
    assert left(compressed() | {"ignore": []}) == set()
    assert left(compressed() | {"ignore": ["re:.*up_proj", "model.layers.1.self_attn.q_proj"]}) == up | {
        "model.layers.1.self_attn.q_proj"
    }
    assert left(AWQ) == {"lm_head"}
    assert left(AWQ | {"modules_to_not_convert": ["up_proj"]}) == up | {"lm_head"}
    assert left(GPTQ) == {"lm_head"}
    assert left(GPTQ | {"lm_head": True}) == set()
    assert left(GPTQ | {"dynamic": {r"-:model\.layers\.1\.mlp": {}}}) == {"model.layers.1.mlp.up_proj", "lm_head"}
    named = {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["self_attn.k_proj"]]}
    assert left(GPTQ | named) == up | {"lm_head"}


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([], "quantization_config is []; it must be an object"),
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'; weft reads fmpq"),
        (GPTQ | {"bits": 3}, "quantization_config.bits is 3; weft reads 4 and 8"),
        (GPTQ | {"group_size": 0}, "group_size is 0"),
        (GPTQ | {"group_size": None}, "group_size is None"),
        (GPTQ | {"desc_act": 1}, "desc_act is 1; it must be true or false"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"checkpoint_format": None, "format": "bitblas"}, "checkpoint_format is None"),
        (GPTQ | {"format": "bitblas"}, "checkpoint_format is 'bitblas'"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format is True"),
        (GPTQ | {"lm_head": "yes"}, "lm_head is 'yes'"),
        (GPTQ | {"modules_in_block_to_quantize": [3]}, "modules_in_block_to_quantize is [3]; it must be a list"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic is"),
        (GPTQ | {"dynamic": {"-:(": {}}}, "dynamic is '('; it is no regular expression"),
        (GPTQ | {"dynamic": {"-:a{99999999999999999999}": {}}}, "it is no regular expression"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'; weft reads gemm"),
        (AWQ | {"format": "marlin"}, "format is 'marlin'; weft reads gemm"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "must be a list of module names"),
        (compressed("float-quantized"), "format is 'float-quantized'"),
        (compressed() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
        (compressed() | {"transform_config": {"a": 1}}, "transform_config is"),
        (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is"),
        (compressed() | {"config_groups": {}}, "config_groups is {}"),
        (compressed(targets=["re:.*mlp"]), "config_groups.group_0 is"),
        (compressed(weights={"type": "float"}), "config_groups.group_0.weights.type is 'float'; weft reads 'int'"),
        (compressed(weights={"num_bits": 2}), "weights.num_bits is 2"),
        (compressed(weights={"actorder": "heavy"}), "weights.actorder is 'heavy'"),
        (compressed(output_activations=TOKEN), "group_0.output_activations is"),
        (compressed() | {"ignore": ["re:("]}, "ignore is '('; it is no regular expression"),
        (compressed(weights={"strategy": "tensor"}), "weights.strategy is 'tensor'"),
        (compressed(input_activations=TOKEN | {"num_bits": 4}), "input_activations.num_bits is 4; weft reads 8"),
        (compressed(input_activations=TOKEN | {"dynamic": False}), "input_activations.dynamic is False"),
        (compressed(input_activations=TOKEN | {"strategy": "tensor"}), "input_activations.strategy is 'tensor'"),
        (compressed(input_activations=TOKEN | {"symmetric": False}), "input_activations.symmetric is False"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_key(raw: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_scheme(raw)
    assert words in caught.value.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["re:a{9}", "-:x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_value_anywhere_is_read_or_refused(data: st.DataObject) -> None:
    raw = copy.deepcopy(data.draw(st.sampled_from([GPTQ, AWQ, compressed(), compressed(input_activations=TOKEN)])))
    more = ["dynamic", "lm_head", "modules_in_block_to_quantize", "modules_to_not_convert", "checkpoint_format"]
    inner = raw["config_groups"]["group_0"] if "config_groups" in raw else raw
    for part in (raw, inner, inner.get("weights", raw), inner.get("input_activations") or raw):
        part |= data.draw(st.dictionaries(st.sampled_from([*part, *more]), JSON, max_size=1))
    try:
        scheme = parse_scheme(raw)
    except CheckpointError as error:
        assert "config.json: quantization_config" in error.message
    else:
        assert scheme.bits in (4, 8) and scheme.quantises(NAME) in (True, False)


def test_broken_tensors_are_refused_by_file_and_name() -> None:
    scheme = parse_scheme(GPTQ | {"group_size": GROUP, "desc_act": True})
    drawn = Drawn(2)
    good = {
        f"{NAME}.qweight": pack(drawn.values, IN_ORDER).T.contiguous(),
        f"{NAME}.qzeros": pack(drawn.zeros.T, IN_ORDER),
        f"{NAME}.scales": drawn.scales.T.contiguous(),
        f"{NAME}.g_idx": torch.from_numpy(drawn.index).int(),
    }

    def refused(change: dict[str, torch.Tensor], shape: tuple[int, int] = (OUTPUTS, INPUTS)) -> str:
        with pytest.raises(CheckpointError) as caught:
            read_linear(scheme, {f"{NAME}.{suffix}": tensor for suffix, tensor in change.items()}, NAME, shape, FILE)
        assert FILE in caught.value.message and NAME in caught.value.message
        return caught.value.message

    plain = {name.removeprefix(f"{NAME}."): tensor for name, tensor in good.items()}
    assert "lacks the tensor" in refused({name: plain[name] for name in ("qweight", "scales", "g_idx")})
    assert "I32 [31, 16]; the config asks for I32 [32, 16]" in refused(plain | {"qweight": plain["qweight"][:31]})
    assert "F32" in refused(plain | {"qweight": plain["qweight"].float()})
    assert "not finite" in refused(plain | {"scales": plain["scales"] * torch.inf})
    assert "not finite" in refused(plain | {"scales": plain["scales"] * torch.nan})
    assert "scales is 0 for 32 groups" in refused(plain | {"scales": plain["scales"] * 0})
    assert "does not put 128 channels" in refused(plain | {"g_idx": torch.zeros(INPUTS, dtype=torch.int32)})
    assert "does not put 128 channels" in refused(plain | {"g_idx": plain["g_idx"] + 1})


def test_a_group_of_nothing_may_have_a_scale_of_0() -> None:
    drawn = Drawn(2)
    drawn.values[3, :GROUP] = drawn.zeros[3, 0]
    drawn.scales[3, 0] = 0
    drawn.weight[3, :GROUP] = 0
    tensors = {
        "qweight": pack(drawn.values, IN_ORDER).T.contiguous(),
        "qzeros": pack(drawn.zeros.T - 1, IN_ORDER),
        "scales": drawn.scales.T.contiguous(),
    }
    check(parse_scheme(GPTQ), tensors, drawn.weight)


def test_shapes_that_no_kernel_takes_are_refused() -> None:
    for raw, shape, words in (
        (GPTQ, (OUTPUTS, 200), "groups of 128 do not divide them"),
        (GPTQ | {"group_size": -1}, (OUTPUTS, 200), "blocks of 128, which must divide them"),
        (AWQ, (OUTPUTS + 1, INPUTS), "8 of them share a word"),
    ):
        with pytest.raises(CheckpointError) as caught:
            check_shape(parse_scheme(raw), NAME, shape)
        assert NAME in caught.value.message and words in caught.value.message


def test_what_a_checkpoint_says_twice_must_agree() -> None:
    scheme = parse_scheme(compressed())
    tensors = {
        "weight_packed": torch.zeros(OUTPUTS, INPUTS // 8, dtype=torch.int32),
        "weight_scale": torch.ones(OUTPUTS, 2),
        "weight_shape": torch.tensor([OUTPUTS, 2 * INPUTS]),
    }
    with pytest.raises(CheckpointError, match=r"weight_shape is \[16, 512\]; config.json asks for \[16, 256\]"):
        read(scheme, tensors)
    tensors = tensors | {
        "weight_shape": torch.tensor([OUTPUTS, INPUTS]),
        "weight_zero_point": torch.ones(OUTPUTS, 2, dtype=torch.int8),
    }
    with pytest.raises(CheckpointError, match="weight_zero_point is not 0 everywhere"):
        read(scheme, tensors)
