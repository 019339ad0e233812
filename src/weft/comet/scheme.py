"""`quantization_config` of a checkpoint that is not weft's: what its linears are stored as.

| quant_method | what is read |
|---|---|
| gptq | 4 or 8 bits along the input, in groups or per output; with and without desc_act; formats gptq and gptq_v2 |
| awq | 4 bits along the output, version gemm |
| compressed-tensors | pack-quantized and int-quantized of 4 or 8 bits; activations left alone, or 8 bits per token |

Everything else is an error that says why: a checkpoint that runs with a setting left out gives plausible nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft.errors import CheckpointError

METHODS = ("gptq", "awq", "compressed-tensors")
HEAD = "lm_head"
DEFAULTS = {"type": "int", "dynamic": False, "symmetric": True}  # of compressed-tensors, for keys that are left out


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the linears of a checkpoint are stored. form: gptq, awq, pack-quantized or int-quantized.

    group: input channels that share a scale, None for one scale for each output. zero_points: whether it has them.
    zero_offset: what a stored GPTQ zero point lacks. reordered: groups are not of neighbouring channels.
    activation_bits: 16 (left alone) or 8 (symmetric, one scale for each token).
    ignored: modules left unquantised, matched from the beginning of the name. only: endings of the modules that are
    quantised, None for all. head: whether the output layer may be among them.
    """

    form: str
    bits: int
    group: int | None
    zero_points: bool
    activation_bits: int = 16
    zero_offset: int = 0
    reordered: bool = False
    ignored: tuple[re.Pattern[str], ...] = ()
    only: tuple[str, ...] | None = None
    head: bool = False

    def quantises(self, module: str) -> bool:
        """Whether the linear layer of this name is stored quantised."""
        if module == HEAD:
            return self.head and not any(pattern.match(module) for pattern in self.ignored)
        if self.only is not None and not any(module.endswith(f".{ending}") for ending in self.only):
            return False
        return not any(pattern.match(module) for pattern in self.ignored)


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
            raise _wrong("quant_method", other, f"weft reads fmpq, {', '.join(METHODS)}")


def _gptq(raw: Mapping[str, Any]) -> Scheme:
    _require(raw, "", bits=(4, 8))
    form = raw.get("checkpoint_format", raw.get("format", "gptq"))
    if form not in ("gptq", "gptq_v2"):
        raise _wrong("checkpoint_format", form, "weft reads gptq and gptq_v2")
    if raw.get("pack_dtype", "int32") != "int32":
        raise _wrong("pack_dtype", raw["pack_dtype"], "weft reads int32")
    for key in ("is_marlin_format", "rotation", "adapter"):
        if raw.get(key):
            raise _wrong(key, raw[key], "weft cannot honour it")
    return Scheme(
        form="gptq",
        bits=raw["bits"],
        group=_group(raw, ""),
        zero_points=True,
        zero_offset=int(form == "gptq"),
        reordered=_flag(raw, "", "desc_act", False),
        ignored=_skipped(raw.get("dynamic")),
        only=_only(raw.get("modules_in_block_to_quantize")),
        head=_flag(raw, "", "lm_head", False),
    )


def _skipped(dynamic: Any) -> tuple[re.Pattern[str], ...]:
    """The modules that GPTQModel's `dynamic` leaves alone; other settings for some modules are refused."""
    if not dynamic:
        return ()
    if not isinstance(dynamic, Mapping) or not all(str(key).startswith("-:") for key in dynamic):
        raise _wrong("dynamic", dynamic, 'weft reads one setting for all modules; only "-:" entries may leave some out')
    return tuple(_pattern("dynamic", key.removeprefix("-:")) for key in dynamic)


def _only(raw: Any) -> tuple[str, ...] | None:
    """optimum's list of names, or list of lists of names."""
    if raw is None:
        return None
    names = [name for part in raw for name in ([part] if isinstance(part, str) else part)] if _nested(raw) else None
    if names is None:
        raise _wrong("modules_in_block_to_quantize", raw, "it must be a list of module names, or of such lists")
    return tuple(names)


def _nested(raw: Any) -> bool:
    return isinstance(raw, list) and all(
        isinstance(part, str) or (isinstance(part, list) and all(isinstance(name, str) for name in part))
        for part in raw
    )


def _awq(raw: Mapping[str, Any]) -> Scheme:
    _require(raw, "", bits=(4,))
    for key in ("version", "format"):
        version = raw.get(key, "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise _wrong(key, version, "weft reads gemm")
    names = _names("modules_to_not_convert", raw.get("modules_to_not_convert"))
    ignored = tuple(_pattern("modules_to_not_convert", f".*{re.escape(name)}") for name in names)
    return Scheme("awq", 4, _group(raw, ""), _flag(raw, "", "zero_point", True), ignored=ignored)


def _compressed(raw: Mapping[str, Any]) -> Scheme:
    form = raw.get("format")
    if form not in ("pack-quantized", "int-quantized"):
        raise _wrong("format", form, "weft reads pack-quantized and int-quantized")
    if raw.get("kv_cache_scheme"):
        reason = "weft has no KV cache with scales from a checkpoint; remove the key, and choose with --kv-cache-dtype"
        raise _wrong("kv_cache_scheme", raw["kv_cache_scheme"], reason)
    if raw.get("transform_config"):
        raise _wrong("transform_config", raw["transform_config"], "weft cannot honour it")
    sparsity = raw.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense"):
        raise _wrong("sparsity_config", sparsity, "weft reads dense weights")
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise _wrong("config_groups", groups, "weft reads one group, with one setting for all linear layers")
    (name, group), key = next(iter(groups.items())), "config_groups."
    if not isinstance(group, Mapping) or group.get("targets") != ["Linear"]:
        raise _wrong(f"{key}{name}", group, 'it must be an object with targets ["Linear"]')
    if group.get("output_activations"):
        raise _wrong(f"{key}{name}.output_activations", group["output_activations"], "weft cannot honour it")
    ignored = tuple(_ignored(entry) for entry in _names("ignore", raw.get("ignore")))
    activation_bits = _activation_bits(group.get("input_activations"), f"{key}{name}.input_activations")
    return _compressed_weights(form, group.get("weights"), f"{key}{name}.weights", activation_bits, ignored)


def _compressed_weights(
    form: str, weights: Any, name: str, activation_bits: int, ignored: tuple[re.Pattern[str], ...]
) -> Scheme:
    if not isinstance(weights, Mapping):
        raise _wrong(name, weights, "it must be an object")
    key = f"{name}."
    _require(weights, key, type=("int",), dynamic=(False,), num_bits=(4, 8), strategy=("group", "channel"))
    order = weights.get("actorder")
    if order not in (None, False, True, "weight", "static", "group", "dynamic"):
        raise _wrong(f"{key}actorder", order, "weft reads weight, static, group and dynamic")
    return Scheme(
        form=form,
        bits=weights["num_bits"],
        group=_group(weights, key) if weights["strategy"] == "group" else None,
        zero_points=not _flag(weights, key, "symmetric", True),
        activation_bits=activation_bits,
        reordered=order in (True, "group", "dynamic"),
        ignored=ignored,
        head=True,
    )


def _activation_bits(raw: Any, key: str) -> int:
    if raw is None:
        return 16
    if not isinstance(raw, Mapping):
        raise _wrong(key, raw, "it must be an object")
    _require(raw, f"{key}.", num_bits=(8,), type=("int",), symmetric=(True,), strategy=("token",), dynamic=(True,))
    return 8


def _ignored(entry: str) -> re.Pattern[str]:
    """Of compressed-tensors: a whole name, or a pattern for its beginning after "re:"."""
    pattern = entry.removeprefix("re:") if entry.startswith("re:") else rf"{re.escape(entry)}\Z"
    return _pattern("ignore", pattern)


def _pattern(key: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise _wrong(key, text, f"it is no regular expression: {error}") from error


def _require(raw: Mapping[str, Any], prefix: str, **wanted: tuple[Any, ...]) -> None:
    """The key is one of the values, of the same type (True is not 1)."""
    for key, values in wanted.items():
        found = raw.get(key, DEFAULTS.get(key))
        if not any(found == value and type(found) is type(value) for value in values):
            raise _wrong(f"{prefix}{key}", found, f"weft reads {' and '.join(map(repr, values))}")


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


def _names(key: str, raw: Any) -> tuple[str, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list | tuple) or not all(isinstance(name, str) for name in raw):
        raise _wrong(key, raw, "it must be a list of module names")
    return tuple(raw)


def _wrong(key: str, value: Any, reason: str) -> CheckpointError:
    shown = repr(value) if len(repr(value)) <= 200 else repr(value)[:200] + "..."
    return CheckpointError(f"config.json: quantization_config{'.' if key else ''}{key} is {shown}; {reason}")
