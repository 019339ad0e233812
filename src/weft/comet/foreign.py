"""Quantised checkpoints of others, read into the one form that weft's kernels repack from.

| quant_method | what is read |
|---|---|
| gptq | 4 bits along the input, in groups or per output; with and without desc_act; formats gptq and gptq_v2 |
| awq | 4 bits along the output, version gemm |
| compressed-tensors | pack-quantized of 4 or 8 bits, int-quantized of 8; activations left alone, or 8 bits per token |

Everything else is an error that says why: a checkpoint that runs with a setting left out gives plausible nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from weft.comet.packing import PER_WORD, SHIFTS, unpack_nibbles
from weft.errors import CheckpointError

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of each of eight neighbouring outputs
MIDDLE = 8  # what stands for zero in an unsigned nibble
DEFAULTS = {"type": "int", "dynamic": False, "symmetric": True}  # of compressed-tensors, for keys that are left out
HALVES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the linears of a checkpoint are stored. form: gptq, awq, pack-quantized or int-quantized.

    group: input channels that share a scale, None for one scale for each output. zero_points: whether it has them.
    zero_offset: what a stored GPTQ zero point lacks. reordered: groups are not of neighbouring channels.
    activation_bits: 16 (left alone) or 8 (symmetric, one scale for each token). ignored: modules left unquantised.
    """

    form: str
    bits: int
    group: int | None
    zero_points: bool
    activation_bits: int = 16
    zero_offset: int = 0
    reordered: bool = False
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ForeignLinear:
    """weight = values * scales, both by group: values int8 [N, K], the zero point already subtracted (so that 4 bits
    with zero points reach from -15 to 15); scales float32 [N, K / group].

    order: int64 [K] or None. Column i belongs to input channel order[i]; the groups are of neighbouring columns.
    """

    values: torch.Tensor
    scales: torch.Tensor
    order: torch.Tensor | None

    def dequantised(self) -> torch.Tensor:
        """float32 [N, K], columns in the model's order."""
        group = self.values.shape[1] // self.scales.shape[1]
        weight = self.values * self.scales.repeat_interleave(group, dim=1)
        return weight if self.order is None else weight[:, self.order.argsort()]


def parse_scheme(raw: Any) -> Scheme:
    """`quantization_config` of a checkpoint that is not weft's. Raises CheckpointError naming key and value."""
    if not isinstance(raw, Mapping):
        raise _wrong("", raw, "it must be an object")
    match raw.get("quant_method"):
        case "gptq":
            return _gptq(raw)
        case "awq":
            return _awq(raw)
        case "compressed-tensors":
            return _compressed(raw)
        case other:
            raise _wrong("quant_method", other, "weft reads fmpq, compressed-tensors, gptq and awq")


def read_linear(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], name: str, shape: tuple[int, int], file: str
) -> ForeignLinear:
    """The linear `name` of `shape` [out, in], from its tensors by their full names. Raises CheckpointError."""
    outputs, inputs = shape
    group = scheme.group or inputs
    if inputs % group:
        raise CheckpointError(f"{file}: {name} has {inputs} input channels; groups of {group} do not divide them")
    if scheme.bits == 4 and (inputs % PER_WORD or outputs % PER_WORD):
        raise CheckpointError(f"{file}: {name} is {list(shape)}; weft reads 4 bits where 8 divides both numbers")
    take = _Taker(tensors, name, file)
    if scheme.form == "gptq":
        return _read_gptq(scheme, take, outputs, inputs, group)
    if scheme.form == "awq":
        return _read_awq(scheme, take, outputs, inputs, group)
    return _read_compressed(scheme, take, outputs, inputs, group)


class _Taker:
    """Tensors of one linear by suffix, of the right shape and dtype, or an error."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], name: str, file: str) -> None:
        self._tensors, self._name, self._file = tensors, name, file

    def __call__(self, suffix: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> torch.Tensor:
        full = f"{self._name}.{suffix}"
        found = self._tensors.get(full)
        if found is None:
            raise CheckpointError(f"{self._file} lacks the tensor {full}")
        if tuple(found.shape) != shape or found.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            dtype = str(found.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self._file}: {full} is {dtype} {list(found.shape)}; the config asks for {wanted} {list(shape)}"
            )
        return found

    def scales(self, suffix: str, shape: tuple[int, int]) -> torch.Tensor:
        scales = self(suffix, shape, *HALVES).float()
        if not bool(torch.isfinite(scales).all()):
            raise CheckpointError(f"{self._file}: {self._name}.{suffix} has a value that is not finite")
        return scales

    def order(self, suffix: str, inputs: int, group: int) -> torch.Tensor | None:
        """From the group of each channel to an order in which groups are of neighbours; None if they are already."""
        index = self(suffix, (inputs,), torch.int32, torch.int64).long()
        expected = torch.arange(inputs) // group
        if torch.equal(index, expected):
            return None
        order = index.argsort(stable=True)
        if not torch.equal(index[order], expected):
            raise CheckpointError(f"{self._file}: {self._name}.{suffix} does not put {group} channels into each group")
        return order


def _read_gptq(scheme: Scheme, take: _Taker, outputs: int, inputs: int, group: int) -> ForeignLinear:
    groups = inputs // group
    packed = take("qweight", (inputs // PER_WORD, outputs), torch.int32)
    zeros = take("qzeros", (groups, outputs // PER_WORD), torch.int32)
    scales = take.scales("scales", (groups, outputs)).T.contiguous()
    order = take.order("g_idx", inputs, group) if scheme.reordered else None
    values = unpack_nibbles(packed.T.contiguous(), inputs)
    values = values if order is None else values[:, order]
    zero = unpack_nibbles(zeros, outputs).T + scheme.zero_offset  # both still have MIDDLE subtracted
    return ForeignLinear(values - zero.repeat_interleave(group, dim=1), scales, order)


def _read_awq(scheme: Scheme, take: _Taker, outputs: int, inputs: int, group: int) -> ForeignLinear:
    groups = inputs // group
    packed = take("qweight", (inputs, outputs // PER_WORD), torch.int32)
    scales = take.scales("scales", (groups, outputs)).T.contiguous()
    values = _awq_unpacked(packed).T.contiguous()
    if not scheme.zero_points:
        return ForeignLinear(values - MIDDLE, scales, None)
    zero = _awq_unpacked(take("qzeros", (groups, outputs // PER_WORD), torch.int32)).T
    return ForeignLinear(values - zero.repeat_interleave(group, dim=1), scales, None)


def _awq_unpacked(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N / 8] -> int8 [R, N] from 0 to 15."""
    shifts = SHIFTS[list(AWQ_PLACES)]
    return ((words[..., None] >> shifts) & 15).to(torch.int8).flatten(-2)


def _read_compressed(scheme: Scheme, take: _Taker, outputs: int, inputs: int, group: int) -> ForeignLinear:
    groups = inputs // group
    scales = take.scales("weight_scale", (outputs, groups))
    if scheme.form == "int-quantized":
        return ForeignLinear(take("weight", (outputs, inputs), torch.int8), scales, None)
    per_word = 32 // scheme.bits
    packed = take("weight_packed", (outputs, -(-inputs // per_word)), torch.int32)
    order = take.order("weight_g_idx", inputs, group) if scheme.reordered else None
    values = unpack_nibbles(packed, inputs) if scheme.bits == 4 else _unpack_bytes(packed, inputs)
    values = values if order is None else values[:, order]
    if scheme.zero_points:
        zeros = take("weight_zero_point", (outputs // PER_WORD, groups), torch.int32)
        zero = unpack_nibbles(zeros.T.contiguous(), outputs).T
        values = values - zero.repeat_interleave(group, dim=1)
    return ForeignLinear(values, scales, order)


def _unpack_bytes(words: torch.Tensor, length: int) -> torch.Tensor:
    """int32 [R, ceil(length / 4)], values + 128, the first in the lowest bits -> int8 [R, length]."""
    shifts = torch.arange(0, 32, 8, dtype=torch.int32)
    return (((words[..., None] >> shifts) & 255) - 128).to(torch.int8).flatten(-2)[..., :length]


def _gptq(raw: Mapping[str, Any]) -> Scheme:
    _require(raw, "", bits=4)
    form = raw.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise _wrong("checkpoint_format", form, "weft reads gptq and gptq_v2")
    if raw.get("lm_head", False) is not False:
        raise _wrong("lm_head", raw["lm_head"], "weft reads an output layer that is not quantised")
    if raw.get("dynamic"):
        raise _wrong("dynamic", raw["dynamic"], "weft reads one setting for all modules")
    reordered = _flag(raw, "", "desc_act", False)
    return Scheme("gptq", 4, _group(raw, ""), True, zero_offset=int(form == "gptq"), reordered=reordered)


def _awq(raw: Mapping[str, Any]) -> Scheme:
    _require(raw, "", bits=4)
    version = raw.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise _wrong("version", version, "weft reads gemm")
    ignored = raw.get("modules_to_not_convert") or ()
    return Scheme("awq", 4, _group(raw, ""), _flag(raw, "", "zero_point", True), ignored=_names(ignored))


def _compressed(raw: Mapping[str, Any]) -> Scheme:
    form = raw.get("format")
    if form not in ("pack-quantized", "int-quantized"):
        raise _wrong("format", form, "weft reads pack-quantized and int-quantized")
    for key in ("kv_cache_scheme", "transform_config"):
        if raw.get(key):
            raise _wrong(key, raw[key], "weft cannot honour it")
    sparsity = raw.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense"):
        raise _wrong("sparsity_config", sparsity, "weft reads dense weights")
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise _wrong("config_groups", groups, "weft reads one group, with one setting for all linear layers")
    (name, group), key = next(iter(groups.items())), "config_groups."
    if not isinstance(group, Mapping) or group.get("targets") != ["Linear"]:
        raise _wrong(f"{key}{name}", group, 'it must be an object with targets ["Linear"]')
    weights = group.get("weights")
    key = f"{key}{name}.weights."
    if not isinstance(weights, Mapping):
        raise _wrong(key.rstrip("."), weights, "it must be an object")
    _require(weights, key, type="int", dynamic=False)
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if bits not in (4, 8) or (bits == 4 and form == "int-quantized"):
        raise _wrong(f"{key}num_bits", bits, "weft reads 8, and 4 where the format is pack-quantized")
    if strategy not in ("group", "channel"):
        raise _wrong(f"{key}strategy", strategy, "weft reads group and channel")
    symmetric = _flag(weights, key, "symmetric", True)
    if not symmetric and bits == 8:
        raise _wrong(f"{key}symmetric", False, "weft reads weights of 8 bits without zero points")
    return Scheme(
        form=form,
        bits=bits,
        group=_group(weights, key) if strategy == "group" else None,
        zero_points=not symmetric,
        activation_bits=_activation_bits(group.get("input_activations"), f"config_groups.{name}.input_activations"),
        reordered=weights.get("actorder") in ("group", True),
        ignored=_names(raw.get("ignore") or ()),
    )


def _activation_bits(raw: Any, key: str) -> int:
    if raw is None:
        return 16
    if not isinstance(raw, Mapping):
        raise _wrong(key, raw, "it must be an object")
    _require(raw, f"{key}.", num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    return 8


def _require(raw: Mapping[str, Any], prefix: str, **wanted: Any) -> None:
    for key, value in wanted.items():
        found = raw.get(key, DEFAULTS.get(key))
        if found != value or type(found) is not type(value):
            raise _wrong(f"{prefix}{key}", found, f"weft reads {value!r}")


def _group(raw: Mapping[str, Any], prefix: str) -> int | None:
    group = raw.get("group_size")
    if type(group) is not int or (group != -1 and not 8 <= group <= 2**20):
        raise _wrong(f"{prefix}group_size", group, "it must be a number of channels, at least 8, or -1 for all")
    return None if group == -1 else group


def _flag(raw: Mapping[str, Any], prefix: str, key: str, default: bool) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise _wrong(f"{prefix}{key}", value, "it must be true or false")
    return value


def _names(raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, list | tuple) or not all(isinstance(name, str) for name in raw):
        raise _wrong("ignore", raw, "it must be a list of module names")
    return tuple(raw)


def _wrong(key: str, value: Any, reason: str) -> CheckpointError:
    shown = repr(value) if len(repr(value)) <= 200 else repr(value)[:200] + "..."
    return CheckpointError(f"config.json: quantization_config{'.' if key else ''}{key} is {shown}; {reason}")
