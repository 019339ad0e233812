"""Kernels that compute nothing: they write down what a decoder calls, once, so that C++ can repeat it.

The decoder is driven with a `Recorder` in the place of its kernels, and with `Value`s in the place of tensors: so there
is one description of a model. What comes out is a list of operations on values, which kernels/program.py arranges.
All shapes and types are checked here; the C++ side checks the batch of each step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

from weft import _native
from weft.kernels.base import Batch
from weft.kernels.cpu import Embedding, Linear, PagedKv
from weft.kernels.quantised import ROW_BYTES, TYPES, W4AxLinear
from weft.kernels.w4ax_weights import BLOCK


class Domain(IntEnum):
    """What the rows of a value are: the tokens of the batch, or those of them that are sampled after."""

    TOKENS = 0
    SAMPLED = 1


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """What a tensor [rows, columns] will be. dtype None: quantised rows, as a W4Ax product takes them."""

    domain: Domain
    columns: int
    dtype: torch.dtype | None

    @property
    def row_bytes(self) -> int:
        return self.columns // BLOCK * ROW_BYTES if self.dtype is None else self.columns * self.dtype.itemsize

    @property
    def type(self) -> int:
        if self.dtype not in TYPES:
            raise TypeError(f"a value of {self.dtype}; the C++ kernels take float32 and bfloat16")
        return TYPES[self.dtype]


Place = Callable[[Value], int]


@dataclass(frozen=True, slots=True)
class Embed:
    table: Embedding
    out: Value

    def uses(self) -> tuple[Value, ...]:
        return (self.out,)

    def emit(self, program: _native.Program, at: Place) -> None:
        program.embed(self.table.native, self.out.type, at(self.out))


@dataclass(frozen=True, slots=True)
class Norm:
    """residual: x is added to it, in place, and the sum is normalised."""

    x: Value
    residual: Value | None
    weight: torch.Tensor
    eps: float
    out: Value

    def uses(self) -> tuple[Value, ...]:
        return (self.x, self.out) if self.residual is None else (self.x, self.residual, self.out)

    def emit(self, program: _native.Program, at: Place) -> None:
        program.norm(*self.arguments(at))

    def arguments(self, at: Place) -> tuple[int, int, float, int, int, int, int, int]:
        residual = -1 if self.residual is None else at(self.residual)
        x = self.x
        return x.type, self.weight.data_ptr(), self.eps, x.columns, x.domain, at(x), residual, at(self.out)


@dataclass(frozen=True, slots=True)
class Multiply:
    """A linear layer: x are floats for a `Linear`, quantised rows for a `W4AxLinear`."""

    packed: Linear | W4AxLinear
    x: Value
    out: Value

    def uses(self) -> tuple[Value, ...]:
        return (self.x, self.out)

    def emit(self, program: _native.Program, at: Place) -> None:
        x, out = at(self.x), at(self.out)
        if isinstance(self.packed, Linear):
            program.linear(self.packed.native, self.x.domain, x, out, self.out.type)
        else:
            program.multiply(self.packed.native, self.x.domain, x, out, self.out.type)


@dataclass(frozen=True, slots=True)
class Quantise:
    """Prepares and quantises the input of `packed`."""

    packed: W4AxLinear
    x: Value
    out: Value

    def uses(self) -> tuple[Value, ...]:
        return (self.x, self.out)

    def emit(self, program: _native.Program, at: Place) -> None:
        program.quantise(self.packed.native, self.x.domain, at(self.x), self.x.type, at(self.out))


@dataclass(frozen=True, slots=True)
class RotaryWrite:
    kv: PagedKv
    cos: torch.Tensor
    sin: torch.Tensor
    heads: int
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
    qkv: Value
    q: Value

    def uses(self) -> tuple[Value, ...]:
        return (self.qkv, self.q)

    def emit(self, program: _native.Program, at: Place) -> None:
        q_norm, k_norm = (0 if norm is None else norm.data_ptr() for norm in (self.q_norm, self.k_norm))
        program.rotary_write(
            self.kv.native,
            self.cos.data_ptr(),
            self.sin.data_ptr(),
            len(self.cos),
            self.heads,
            q_norm,
            k_norm,
            self.eps,
            at(self.qkv),
            at(self.q),
        )


@dataclass(frozen=True, slots=True)
class Attention:
    kv: PagedKv
    heads: int
    scale: float
    window: int
    q: Value
    out: Value

    def uses(self) -> tuple[Value, ...]:
        return (self.q, self.out)

    def emit(self, program: _native.Program, at: Place) -> None:
        program.attention(self.kv.native, self.heads, self.scale, self.window, at(self.q), at(self.out))


@dataclass(frozen=True, slots=True)
class SiluMul:
    x: Value
    out: Value

    def uses(self) -> tuple[Value, ...]:
        return (self.x, self.out)

    def emit(self, program: _native.Program, at: Place) -> None:
        program.silu_mul(self.x.type, self.x.domain, at(self.x), self.out.columns, at(self.out))


@dataclass(frozen=True, slots=True)
class MakeAndQuantise:
    """A norm or a gated activation, and the quantisation of what it gives, row by row."""

    make: Norm | SiluMul
    quantise: Quantise

    def uses(self) -> tuple[Value, ...]:
        return (*self.make.uses(), self.quantise.out)

    def emit(self, program: _native.Program, at: Place) -> None:
        packed, out = self.quantise.packed.native, at(self.quantise.out)
        if isinstance(self.make, Norm):
            program.norm_quantise(*self.make.arguments(at), packed, out)
        else:
            x, between = self.make.x, self.make.out
            program.silu_mul_quantise(x.type, x.domain, at(x), between.columns, at(between), packed, out)


@dataclass(frozen=True, slots=True)
class Take:
    """The rows that are sampled after."""

    x: Value
    out: Value

    def uses(self) -> tuple[Value, ...]:
        return (self.x, self.out)

    def emit(self, program: _native.Program, at: Place) -> None:
        program.take(at(self.x), self.x.row_bytes, at(self.out))


@dataclass(frozen=True, slots=True)
class BestOfRows:
    """The greatest element of each sampled row, for whoever runs the program."""

    x: Value

    def uses(self) -> tuple[Value, ...]:
        return (self.x,)

    def emit(self, program: _native.Program, at: Place) -> None:
        program.best(at(self.x), self.x.columns)


@dataclass(frozen=True, slots=True)
class Meet:
    """A seam of ranks (weave/collective.py). residual: this rank's own rows."""

    group: _native.Seams
    x: Value
    residual: Value
    weight: torch.Tensor
    eps: float
    out: Value

    def uses(self) -> tuple[Value, ...]:
        return (self.x, self.residual, self.out)

    def emit(self, program: _native.Program, at: Place) -> None:
        x, places = self.x, (at(self.x), at(self.residual), at(self.out))
        weight = self.weight.data_ptr()
        program.seam(self.group, x.type, weight, self.eps, x.columns, x.domain, *places)


@dataclass(frozen=True, slots=True)
class OwnRows:
    """Of a value with all rows, this rank's own, from the place of `out` on: its first residual."""

    group: _native.Seams
    x: Value
    out: Value

    def uses(self) -> tuple[Value, ...]:
        return (self.x, self.out)

    def emit(self, program: _native.Program, at: Place) -> None:
        program.own_rows(self.group, at(self.x), self.x.row_bytes, at(self.out))


@dataclass(frozen=True, slots=True)
class TakeOwn:
    """Of a residual at a seam, the own rows that are sampled after."""

    group: _native.Seams
    residual: Value
    out: Value

    def uses(self) -> tuple[Value, ...]:
        return (self.residual, self.out)

    def emit(self, program: _native.Program, at: Place) -> None:
        program.take_own(self.group, at(self.residual), self.residual.row_bytes, at(self.out))


Operation = (
    Embed
    | Norm
    | Multiply
    | Quantise
    | RotaryWrite
    | Attention
    | SiluMul
    | MakeAndQuantise
    | BestOfRows
    | Take
    | Meet
    | OwnRows
    | TakeOwn
)


class Recorder:
    """Kernels (see base.py) that append to `operations`. Weights and KV are those of the C++ kernels.

    Whatever it is given as tokens and batch, the program takes those of its step. It finds out by itself what a norm or
    an activation can be joined with (`fuse` in kernels/program.py), whatever the reader.
    """

    name = "recorder"

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def embed(self, tokens: Any, packed: Embedding, dtype: torch.dtype) -> Value:  # noqa: ARG002
        out = Value(Domain.TOKENS, packed.size, dtype)
        self.operations.append(Embed(packed, out))
        return out

    def linear(self, x: Value, packed: Linear | W4AxLinear, dtype: torch.dtype | None = None) -> Value:
        out = Value(x.domain, packed.outputs, dtype or x.dtype)
        _same(x, packed.inputs, packed.dtype if isinstance(packed, Linear) else x.dtype, "x")
        if out.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"x is {x.dtype} and y {out.dtype}; y must be that or float32")
        if isinstance(packed, W4AxLinear):
            quantised = Value(x.domain, packed.inputs, None)
            self.operations.append(Quantise(packed, x, quantised))
            x = quantised
        self.operations.append(Multiply(packed, x, out))
        return out

    def rms_norm(self, x: Value, weight: torch.Tensor, eps: float, reader: Any = None) -> Value:  # noqa: ARG002
        return self._norm(x, None, weight, eps)

    def add_rms_norm(
        self,
        x: Value,
        residual: Value,
        weight: torch.Tensor,
        eps: float,
        reader: Any = None,  # noqa: ARG002
    ) -> tuple[Value, Value]:
        _same(residual, x.columns, x.dtype, "residual")
        return self._norm(x, residual, weight, eps), residual

    def rotary_write(
        self,
        qkv: Value,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: PagedKv,
        batch: Batch,  # noqa: ARG002
        heads: int,
        kv_heads: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> Value:
        _same(qkv, (heads + 2 * kv_heads) * kv.head_dim, kv.dtype, "qkv")
        for table in (cos, sin):
            _same_tensor(table, (len(cos), kv.head_dim // 2), torch.float32, "cos or sin")
        for norm in (q_norm, k_norm):
            if norm is not None:
                _same_tensor(norm, (kv.head_dim,), kv.dtype, "q_norm or k_norm")
        q = Value(qkv.domain, heads * kv.head_dim, qkv.dtype)
        self.operations.append(RotaryWrite(kv, cos, sin, heads, q_norm, k_norm, eps, qkv, q))
        return q

    def attention(
        self,
        q: Value,
        kv: PagedKv,
        batch: Batch,  # noqa: ARG002
        heads: int,
        kv_heads: int,
        scale: float,
        window: int | None = None,
    ) -> Value:
        _same(q, heads * kv.head_dim, kv.dtype, "q")
        if kv_heads != kv.kv_heads or heads < 1 or heads % kv_heads:
            raise ValueError(f"{heads = } must be a multiple of {kv_heads = }, and the KV has {kv.kv_heads}")
        if not scale > 0 or (window is not None and window < 1):
            raise ValueError(f"{scale = } must be over 0, and {window = } at least 1 or None")
        out = Value(q.domain, q.columns, q.dtype)
        self.operations.append(Attention(kv, heads, scale, window or 0, q, out))
        return out

    def silu_mul(self, gate_up: Value, reader: Any = None) -> Value:  # noqa: ARG002
        if gate_up.columns % 2:
            raise ValueError(f"gate_up has {gate_up.columns} columns; it must be [T, 2 F]")
        out = Value(gate_up.domain, gate_up.columns // 2, gate_up.dtype)
        self.operations.append(SiluMul(gate_up, out))
        return out

    def keep(self, x: Value, batch: Batch) -> Value:  # noqa: ARG002
        """The sampled rows of x."""
        out = Value(Domain.SAMPLED, x.columns, x.dtype)
        self.operations.append(Take(x, out))
        return out

    def own_rows(self, group: _native.Seams, x: Value) -> Value:
        """This rank's own rows of x, which has all: what `meet` takes for a residual."""
        out = Value(x.domain, x.columns, x.dtype)
        self.operations.append(OwnRows(group, x, out))
        return out

    def meet(
        self, group: _native.Seams, x: Value, residual: Value, weight: torch.Tensor, eps: float
    ) -> tuple[Value, Value]:
        """A seam: (hidden, residual). residual: of the seam before, with all rows that it had."""
        _same_tensor(weight, (x.columns,), x.dtype, "weight")
        if residual.domain is not x.domain:
            kept = Value(x.domain, x.columns, x.dtype)
            self.operations.append(TakeOwn(group, residual, kept))
            residual = kept
        out = Value(x.domain, x.columns, x.dtype)
        self.operations.append(Meet(group, x, residual, weight, eps, out))
        return out, residual

    def _norm(self, x: Value, residual: Value | None, weight: torch.Tensor, eps: float) -> Value:
        _same_tensor(weight, (x.columns,), x.dtype, "weight")
        out = Value(x.domain, x.columns, x.dtype)
        self.operations.append(Norm(x, residual, weight, eps, out))
        return out


def _same(value: Value, columns: int, dtype: torch.dtype | None, what: str) -> None:
    if value.dtype is not dtype:
        raise TypeError(f"{what} is {value.dtype}; it must be {dtype}")
    if value.columns != columns:
        raise ValueError(f"{what} has {value.columns} columns; it must have {columns}")


def _same_tensor(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, what: str) -> None:
    if tensor.dtype is not dtype:
        raise TypeError(f"{what} is {tensor.dtype}; it must be {dtype}")
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{what} must be contiguous {list(shape)}, not {list(tensor.shape)} {tensor.stride()}")
