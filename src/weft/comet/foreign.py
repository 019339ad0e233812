"""Linears of checkpoints that are not weft's, read into the one form that weft's kernels repack from.

A linear's tensors follow from its scheme (`linear_tensors`); reading them gives integers with scales and zero points
by group (`read_linear`). The linears of a site, which share an input, become one weight in blocks of 128 channels
(`join`): as it is wherever the groups allow it, else rounded to 8 bits, which `Joined.rounded` tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from weft.comet.packing import BLOCK, PER_WORD, SHIFTS, split, unpack_nibbles
from weft.comet.scheme import Scheme
from weft.errors import CheckpointError

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of each of eight neighbouring outputs
LETTERS = {  # what a tensor of a quantised linear may be, in safetensors' letters
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}
HALVES, INDICES = ("F16", "BF16", "F32"), ("I32", "I64")
ONES = {4: 0x11111111, 8: 0x01010101}  # a word whose integers of so many bits are all 1


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor that a checkpoint must have, or may have where it is not `required`."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    required: bool = True


@dataclass(frozen=True, slots=True)
class ForeignLinear:
    """weight = (values - zeros) * scales, both by group: values int8 [N, K]; zeros int16 and scales float32
    [N, K / group], zeros None where all are 0; bias float32 [N] or None.

    order: int64 [K] or None. Column i belongs to input channel order[i]; the groups are of neighbouring columns.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def group(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    def dequantised(self) -> torch.Tensor:
        """float32 [N, K], columns in the model's order."""
        values = split(self.values, self.group).float()
        values = values if self.zeros is None else values - self.zeros[..., None]
        weight = (values * self.scales[..., None]).flatten(-2)
        return weight if self.order is None else weight[:, self.order.argsort()]


@dataclass(frozen=True, slots=True)
class Joined:
    """What kernels pack: a `QuantisedLinear` of comet/reference.py, and the permutation of its input.

    wide: some values do not fit 4 bits. rounded: the weight is not the checkpoint's but the nearest in 8 bits.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    permutation: torch.Tensor | None
    wide: bool
    rounded: bool


def linear_tensors(scheme: Scheme, shape: tuple[int, int]) -> dict[str, Wanted]:
    """The tensors of a quantised linear [out, in], by their names below the linear's."""
    outputs, inputs = shape
    groups, per_word = inputs // (scheme.group or inputs), 32 // scheme.bits
    wanted = {"bias": Wanted((outputs,), HALVES, required=False)}  # AutoGPTQ wrote zeros where the model has none
    if scheme.form in ("gptq", "awq"):
        along_input = scheme.form == "gptq"
        packed = (inputs // per_word, outputs) if along_input else (inputs, outputs // per_word)
        wanted["qweight"] = Wanted(packed, ("I32",))
        wanted["qzeros"] = Wanted((groups, outputs // per_word), ("I32",), required=scheme.zero_points)
        wanted["scales"] = Wanted((groups, outputs), HALVES)
        if along_input:
            wanted["g_idx"] = Wanted((inputs,), INDICES, required=scheme.reordered)
        return wanted
    wanted["weight_scale"] = Wanted((outputs, groups), HALVES)
    if scheme.reordered:
        wanted["weight_g_idx"] = Wanted((inputs,), INDICES)
    plain_zeros = Wanted((outputs, groups), ("I8",), required=scheme.zero_points)
    if scheme.form == "int-quantized":
        return wanted | {"weight": Wanted(shape, ("I8",)), "weight_zero_point": plain_zeros}
    wanted["weight_packed"] = Wanted((outputs, -(-inputs // per_word)), ("I32",))
    wanted["weight_shape"] = Wanted((2,), INDICES, required=False)
    packed_zeros = Wanted((-(-outputs // per_word), groups), ("I32",))
    # Old versions stored the zero points of symmetric weights, too, and did not pack them.
    wanted["weight_zero_point"] = packed_zeros if scheme.zero_points else plain_zeros
    return wanted


def check_shape(scheme: Scheme, name: str, shape: tuple[int, int]) -> None:
    """Raise CheckpointError for a linear that the scheme, or weft's kernels, cannot store."""
    outputs, inputs = shape
    group = scheme.group or inputs
    if inputs % group:
        raise CheckpointError(f"config.json: {name} has {inputs} input channels; groups of {group} do not divide them")
    if inputs % BLOCK:
        raise CheckpointError(
            f"config.json: {name} has {inputs} input channels; weft multiplies integers in blocks of {BLOCK}, which "
            "must divide them: serve the checkpoint that this one was made from"
        )
    if scheme.form in ("gptq", "awq") and outputs % PER_WORD:
        raise CheckpointError(f"config.json: {name} has {outputs} outputs; {PER_WORD} of them share a word")


def read_linear(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], name: str, shape: tuple[int, int], file: str
) -> ForeignLinear:
    """The linear `name` of `shape` [out, in], from its tensors by their full names. Raises CheckpointError."""
    take = _Taker(tensors, name, file, linear_tensors(scheme, shape))
    group = scheme.group or shape[1]
    if scheme.form == "gptq":
        values, zeros, scales, order = _read_gptq(scheme, take, shape, group)
    elif scheme.form == "awq":
        values, zeros, scales, order = _read_awq(scheme, take)
    else:
        values, zeros, scales, order = _read_compressed(scheme, take, shape, group)
    values = values if order is None else values[:, order]
    zeros = zeros if zeros is not None and bool(zeros.any()) else None
    bias = take("bias").float().clone() if "bias" in take else None
    linear = ForeignLinear(values.contiguous(), scales, zeros, order, bias)
    if not bool(torch.isfinite(scales).all()):
        raise take.wrong(
            "scales" if scheme.form in ("gptq", "awq") else "weight_scale", "has a value that is not finite"
        )
    if not bool(scales.all()):
        _check_zero_scales(linear, take, scheme)
    return linear


Read = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]  # values, zeros, scales, order


class _Taker:
    """Tensors of one linear by suffix, of the wanted shape and dtype, or an error."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], name: str, file: str, wanted: Mapping[str, Wanted]) -> None:
        self._tensors, self._name, self._file, self._wanted = tensors, name, file, wanted

    def __contains__(self, suffix: str) -> bool:
        return f"{self._name}.{suffix}" in self._tensors

    def __call__(self, suffix: str) -> torch.Tensor:
        found, wanted = self._tensors.get(f"{self._name}.{suffix}"), self._wanted[suffix]
        if found is None:
            raise CheckpointError(f"{self._file} lacks the tensor {self._name}.{suffix}")
        letters = LETTERS.get(found.dtype, str(found.dtype))
        if tuple(found.shape) != wanted.shape or letters not in wanted.dtypes:
            asked = f"{' or '.join(wanted.dtypes)} {list(wanted.shape)}"
            raise self.wrong(suffix, f"is {letters} {list(found.shape)}; the config asks for {asked}")
        return found

    def wrong(self, suffix: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {self._name}.{suffix} {reason}")

    def order(self, suffix: str, inputs: int, group: int) -> torch.Tensor | None:
        """From the group of each channel to an order in which groups are of neighbours; None if they are already."""
        index = self(suffix).long()
        expected = torch.arange(inputs) // group
        if torch.equal(index, expected):
            return None
        order = index.argsort(stable=True)
        if not torch.equal(index[order], expected):
            raise self.wrong(suffix, f"does not put {group} channels into each of {inputs // group} groups")
        return order


def _read_gptq(scheme: Scheme, take: _Taker, shape: tuple[int, int], group: int) -> Read:
    outputs, inputs = shape
    # What is stored of a zero point lacks zero_offset. That was taken from whole words, so that a zero point of 0 has
    # borrowed from its neighbour, and is given back alike. Zero points and values are unsigned: their middle cancels.
    words = take("qzeros") + scheme.zero_offset * ONES[scheme.bits]
    zeros = _unpacked(words, scheme.bits, outputs).T.short()
    values = _unpacked(take("qweight").T, scheme.bits, inputs)
    order = take.order("g_idx", inputs, group) if scheme.reordered or "g_idx" in take else None
    return values, zeros, take("scales").T.float().contiguous(), order


def _read_awq(scheme: Scheme, take: _Taker) -> Read:
    values = _awq_unpacked(take("qweight")).T
    zeros = _awq_unpacked(take("qzeros")).T.short() if scheme.zero_points else None
    return values, zeros, take("scales").T.float().contiguous(), None


def _read_compressed(scheme: Scheme, take: _Taker, shape: tuple[int, int], group: int) -> Read:
    outputs, inputs = shape
    plain = scheme.form == "int-quantized"
    if "weight_shape" in take and take("weight_shape").tolist() != [outputs, inputs]:
        raise take.wrong("weight_shape", f"is {take('weight_shape').tolist()}; config.json asks for {list(shape)}")
    values = take("weight") if plain else _unpacked(take("weight_packed"), scheme.bits, inputs)
    if plain and scheme.bits == 4 and not -8 <= int(values.min()) <= int(values.max()) <= 7:
        reason = f"has values from {int(values.min())} to {int(values.max())}; num_bits 4 allows -8 to 7"
        raise take.wrong("weight", reason)
    zeros = None
    if scheme.zero_points or "weight_zero_point" in take:
        zeros = take("weight_zero_point")
        packed = scheme.zero_points and not plain
        zeros = (_unpacked(zeros.T, scheme.bits, outputs).T if packed else zeros).short()
        if not scheme.zero_points and bool(zeros.any()):
            raise take.wrong("weight_zero_point", "is not 0 everywhere, though the config calls the weights symmetric")
    order = take.order("weight_g_idx", inputs, group) if scheme.reordered else None
    return values, zeros, take("weight_scale").float(), order


def _unpacked(words: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """int32 [R, ceil(length * bits / 32)] of unsigned integers, the first in the lowest bits -> int8 [R, length], less
    half their range."""
    words = words.contiguous()
    if bits == 4:
        return unpack_nibbles(words, length)
    shifts = torch.arange(0, 32, 8, dtype=torch.int32)
    return (((words[..., None] >> shifts) & 255) - 128).to(torch.int8).flatten(-2)[..., :length]


def _awq_unpacked(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N / 8] -> int8 [R, N] from -8 to 7."""
    shifts = SHIFTS[list(AWQ_PLACES)]
    return (((words[..., None] >> shifts) & 15) - 8).to(torch.int8).flatten(-2)


def _check_zero_scales(linear: ForeignLinear, take: _Taker, scheme: Scheme) -> None:
    """A scale of 0 over nothing but zeros is a weight of 0; over other integers their size is lost."""
    values = split(linear.values, linear.group).short()
    values = values if linear.zeros is None else values - linear.zeros[..., None]
    lost = (linear.scales == 0) & values.any(dim=-1)
    if bool(lost.any()):
        suffix = "scales" if scheme.form in ("gptq", "awq") else "weight_scale"
        raise take.wrong(suffix, f"is 0 for {int(lost.sum())} groups whose integers are not")


def join(parts: Sequence[ForeignLinear]) -> Joined:
    """One weight of linears that read one input, their outputs one after the other."""
    if any(part.group % BLOCK for part in parts) or not all(_same_order(parts[0], part) for part in parts):
        return _rounded(parts)
    values = torch.cat([part.values for part in parts])
    scales = torch.cat([part.scales.repeat_interleave(part.group // BLOCK, dim=1) for part in parts])
    zeros = _joined_zeros(parts)
    if zeros is not None and (_wide(values) or not -8 <= int(zeros.min()) <= int(zeros.max()) <= 7):
        shifted = (split(values).short() - zeros[..., None]).flatten(-2)
        if not -128 <= int(shifted.min()) <= int(shifted.max()) <= 127:
            return _rounded(parts)
        values, zeros = shifted.to(torch.int8), None
    return Joined(
        values=values,
        scales=scales,
        zeros=None if zeros is None else zeros.to(torch.int8),
        bias=_joined_bias(parts),
        permutation=parts[0].order,
        wide=_wide(values),
        rounded=False,
    )


def _same_order(one: ForeignLinear, other: ForeignLinear) -> bool:
    if one.order is None or other.order is None:
        return one.order is other.order
    return torch.equal(one.order, other.order)


def _wide(values: torch.Tensor) -> bool:
    return int(values.min()) < -8 or int(values.max()) > 7


def _joined_zeros(parts: Sequence[ForeignLinear]) -> torch.Tensor | None:
    """int16 [N, K / 128], None where all are 0."""
    if all(part.zeros is None for part in parts):
        return None
    zeros = [torch.zeros_like(part.scales).short() if part.zeros is None else part.zeros for part in parts]
    return torch.cat(
        [one.repeat_interleave(part.group // BLOCK, dim=1) for one, part in zip(zeros, parts, strict=True)]
    )


def _joined_bias(parts: Sequence[ForeignLinear]) -> torch.Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    return torch.cat([torch.zeros(len(part.values)) if part.bias is None else part.bias for part in parts])


def _rounded(parts: Sequence[ForeignLinear]) -> Joined:
    """The same weight in 8 bits with a scale for each 128 channels: at most 1/254 of the largest of them from it."""
    values, scales = [], []
    for part in parts:
        blocks = split(part.dequantised())
        largest = blocks.abs().amax(dim=-1)
        values.append((blocks * (127 / largest.clamp(min=2.0**-100))[..., None]).round().to(torch.int8).flatten(-2))
        scales.append(largest / 127)
    return Joined(torch.cat(values), torch.cat(scales), None, _joined_bias(parts), None, wide=True, rounded=True)
