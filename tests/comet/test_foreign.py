"""Checkpoints of others, packed here number by number after the formats' own descriptions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from weft.comet.foreign import Scheme, parse_scheme, read_linear
from weft.errors import CheckpointError

OUTPUTS, INPUTS, GROUP = 16, 64, 32
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


IN_ORDER = tuple(range(8))
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)


class Drawn:
    """Integers, zero points and scales, and the float weight [out, in] that they stand for."""

    def __init__(self, groups: int, seed: int = 0, index: np.ndarray | None = None) -> None:
        generator = np.random.default_rng(seed)
        self.values = generator.integers(0, 16, (OUTPUTS, INPUTS))
        self.zeros = generator.integers(1, 16, (OUTPUTS, groups))
        self.scales = torch.from_numpy(generator.uniform(0.01, 0.1, (OUTPUTS, groups))).half()
        self.index = np.arange(INPUTS) // (INPUTS // groups) if index is None else index
        zero, scale = self.zeros[:, self.index], self.scales.float().numpy()[:, self.index]
        self.weight = torch.from_numpy(((self.values - zero) * scale).astype(np.float32))


def check(scheme: Scheme, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    named = {f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()}
    linear = read_linear(scheme, named, NAME, (OUTPUTS, INPUTS), FILE)
    assert linear.values.dtype == torch.int8
    assert torch.allclose(linear.dequantised(), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("desc_act", [False, True])
def test_gptq(form: str, group: int, desc_act: bool) -> None:
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
    named = {f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()}
    linear = read_linear(parse_scheme(raw), named, NAME, (OUTPUTS, INPUTS), FILE)
    assert torch.allclose(linear.dequantised(), drawn.weight, atol=1e-6)


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
        "weight_zero_point": pack(drawn.zeros.T, IN_ORDER).T.contiguous(),
        "weight_g_idx": torch.from_numpy(drawn.index).int(),
    }
    scheme = parse_scheme(compressed(weights={"symmetric": symmetric, "actorder": actorder}))
    assert (scheme.activation_bits, scheme.ignored) == (16, ("lm_head",))
    check(scheme, tensors, drawn.weight)


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_compressed_tensors_of_8_bits(form: str) -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(-128, 128, (OUTPUTS, INPUTS))
    scales = torch.from_numpy(generator.uniform(0.01, 0.1, (OUTPUTS, 1))).bfloat16()
    stored = {
        "pack-quantized": {"weight_packed": pack(values + 128, (0, 1, 2, 3), bits=8)},
        "int-quantized": {"weight": torch.from_numpy(values).to(torch.int8)},
    }[form]
    raw = compressed(form, {"num_bits": 8, "strategy": "channel", "group_size": None}, input_activations=TOKEN)
    scheme = parse_scheme(raw)
    assert scheme.activation_bits == 8
    check(scheme, stored | {"weight_scale": scales}, torch.from_numpy(values).float() * scales.float())


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([], "quantization_config is []; it must be an object"),
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'; weft reads fmpq"),
        (GPTQ | {"bits": 3}, "quantization_config.bits is 3; weft reads 4"),
        (GPTQ | {"group_size": 0}, "group_size is 0"),
        (GPTQ | {"group_size": None}, "group_size is None"),
        (GPTQ | {"desc_act": 1}, "desc_act is 1; it must be true or false"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"lm_head": True}, "lm_head is True"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic is"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'; weft reads gemm"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "must be a list of module names"),
        (compressed("float-quantized"), "format is 'float-quantized'"),
        (compressed() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
        (compressed() | {"transform_config": {"a": 1}}, "transform_config is"),
        (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is"),
        (compressed() | {"config_groups": {}}, "config_groups is {}"),
        (compressed(targets=["re:.*mlp"]), "config_groups.group_0 is"),
        (compressed(weights={"type": "float"}), "config_groups.group_0.weights.type is 'float'; weft reads 'int'"),
        (compressed(weights={"num_bits": 2}), "weights.num_bits is 2"),
        (compressed("int-quantized"), "weights.num_bits is 4"),
        (compressed(weights={"strategy": "tensor"}), "weights.strategy is 'tensor'"),
        (compressed(weights={"num_bits": 8, "symmetric": False}), "weights.symmetric is False"),
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
    assert "int32 [7, 16]; the config asks for int32 [8, 16]" in refused(plain | {"qweight": plain["qweight"][:7]})
    assert "float32" in refused(plain | {"qweight": plain["qweight"].float()})
    assert "not finite" in refused(plain | {"scales": plain["scales"] * torch.inf})
    assert "does not put 32 channels" in refused(plain | {"g_idx": torch.zeros(INPUTS, dtype=torch.int32)})
    assert "groups of 32 do not divide" in refused(plain, (OUTPUTS, 72))
    assert "8 divides both" in refused(plain, (OUTPUTS + 1, INPUTS))
