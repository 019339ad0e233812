"""The kernels of the C++ extension: checks in Python, work in csrc/.

Calls pass addresses and sizes, because that costs 0.4 us and a tensor through DLPack costs 2 us. So everything that the
C++ side relies on (type, contiguity, shape) is checked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft import _native
from weft.errors import DeviceError
from weft.kernels import quantised
from weft.kernels.base import EMBEDDING_GROUP, Batch, check_embedding, kept_rows
from weft.kernels.kv import bits_of
from weft.kernels.quantised import TYPES, PreparedRows, W4AxLinear

_INT8, _INT4 = 2, 3  # how an embedding may be stored, beside the types


@dataclass(frozen=True, slots=True)
class Linear:
    """A packed weight. Its memory is given back when the object goes."""

    native: _native.PackedLinear
    dtype: torch.dtype
    inputs: int
    outputs: int

    @property
    def bytes(self) -> int:
        return self.native.bytes


@dataclass(frozen=True, slots=True)
class Embedding:
    """A table of token embeddings. Its memory is given back when the object goes."""

    native: _native.PackedEmbedding
    size: int

    @property
    def bytes(self) -> int:
        return self.native.bytes


@dataclass(frozen=True, slots=True)
class PagedKv:
    """Keys and values of one layer; dtype: of the activations. Their memory is given back when the object goes."""

    native: _native.LayerKv
    dtype: torch.dtype
    block_size: int
    kv_heads: int
    head_dim: int

    @property
    def bytes(self) -> int:
        return self.native.bytes

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Whole blocks to others. ValueError for one that is not there."""
        self.native.copy(list(source), list(target))


class CpuKernels:
    """One lane's kernels at one level. The calling thread is one of its threads; see `open_kernels` for the pinning."""

    def __init__(self, level: str, cores: tuple[int, ...], *, exact_a4: bool = False) -> None:
        self.name = level
        self.exact_a4 = exact_a4
        try:
            self.native = _native.Backend(level, list(cores))
        except ValueError as error:
            raise DeviceError(f"cannot open the {level} kernels on cores {cores}: {error}") from error
        self._seen: tuple[Batch | None, Any, int] = (None, None, 0)  # the last batch, its native view and its rows

    def set_cores(self, cores: tuple[int, ...]) -> None:
        try:
            self.native.set_cores(list(cores))
        except ValueError as error:
            raise DeviceError(f"cannot move the {self.name} kernels to cores {cores}: {error}") from error

    def close(self) -> None:
        """End the threads; idempotent. What was packed stays usable by other lanes."""
        self.native.close()

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        kind = _type(weight, "weight")
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [out, in]")
        outputs, inputs = weight.shape
        if bias is not None and bias.shape != (outputs,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; the weight needs [{outputs}]")
        rows = weight if weight.stride(1) == 1 else weight.contiguous()
        floats = None if bias is None else bias.to(torch.float32).contiguous()
        native = _native.PackedLinear(
            self.native,
            rows.data_ptr(),
            rows.stride(0),
            0 if floats is None else floats.data_ptr(),
            outputs,
            inputs,
            kind,
        )
        return Linear(native, weight.dtype, inputs, outputs)

    def pack_w4ax(
        self,
        values: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        permutation: torch.Tensor | None = None,
        outlier_blocks: int = 0,
        hadamard: bool = False,
        zeros: torch.Tensor | None = None,
        exact_a4: bool | None = None,
    ) -> W4AxLinear:
        """A 4-bit weight for `linear`, which then quantises its input as well: see kernels/quantised.py.

        exact_a4: None for what these kernels were opened with.
        """
        return quantised.pack_w4ax(
            self.native,
            values,
            scales,
            bias,
            permutation=permutation,
            outlier_blocks=outlier_blocks,
            hadamard=hadamard,
            zeros=zeros,
            exact_a4=self.exact_a4 if exact_a4 is None else exact_a4,
        )

    def linear(self, x: torch.Tensor | PreparedRows, packed: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """x may be prepared already (kernels/wire.py), for this very weight."""
        if isinstance(x, PreparedRows):
            if x.packed is not packed:
                raise ValueError("the rows were prepared for another weight")
            y = torch.empty((x.rows, packed.outputs), dtype=dtype or x.dtype)
            return quantised.multiply_into(self.native, x, y)
        return self.linear_into(x, packed, x.new_empty((x.shape[0], packed.outputs), dtype=dtype))

    def linear_into(self, x: torch.Tensor, packed: Linear | W4AxLinear, y: torch.Tensor) -> torch.Tensor:
        """`linear` into y [T, out] of the weight's type (x's, where the weight is quantised) or float32; returns y."""
        if isinstance(packed, W4AxLinear):
            return quantised.linear_into(self.native, x, packed, y)
        if x.dtype is not packed.dtype or y.dtype not in (packed.dtype, torch.float32):
            raise TypeError(f"x is {x.dtype} and y {y.dtype}; the weight was packed as {packed.dtype}")
        rows = x.shape[0]
        if x.shape != (rows, packed.inputs) or y.shape != (rows, packed.outputs):
            raise ValueError(
                f"x is {tuple(x.shape)} and y {tuple(y.shape)}; "
                f"they must be [T, {packed.inputs}] and [T, {packed.outputs}]"
            )
        if not (x.is_contiguous() and y.is_contiguous()):
            raise ValueError("x and y must be contiguous")
        self.native.linear(packed.native, x.data_ptr(), rows, y.data_ptr(), TYPES[y.dtype])
        return y

    def pack_embedding(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> Embedding:
        check_embedding(weight, scales)
        rows, size = weight.shape
        if scales is None:
            table, floats, stored = weight.contiguous(), None, _type(weight, "the embedding")
        else:
            four = -8 <= int(weight.min()) <= int(weight.max()) <= 7
            table, stored = (_nibbles(weight), _INT4) if four else (weight.contiguous(), _INT8)
            floats = scales.to(torch.float32).contiguous()
        native = _native.PackedEmbedding(
            self.native, table.data_ptr(), 0 if floats is None else floats.data_ptr(), rows, size, stored
        )
        return Embedding(native, size)

    def embed(self, tokens: torch.Tensor, packed: Embedding, dtype: torch.dtype) -> torch.Tensor:
        count = tokens.shape[0]
        _same(tokens, (count,), torch.int64, "tokens")
        out = torch.empty((count, packed.size), dtype=dtype)
        self.native.embed(packed.native, tokens.data_ptr(), count, out.data_ptr(), _type(out, "the output"))
        return out

    def make_kv(
        self, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str = "auto"
    ) -> PagedKv:
        kind, bits = _type_of(dtype, "the KV"), bits_of(cache, dtype) or 0
        native = _native.LayerKv(self.native, blocks, block_size, kv_heads, head_dim, kind, bits)
        return PagedKv(native, dtype, block_size, kv_heads, head_dim)

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        reader: Any = None,  # noqa: ARG002
    ) -> torch.Tensor:
        rows, size = _matrix(x, "x")
        _same(weight, (size,), x.dtype, "weight")
        out = torch.empty_like(x)
        self.native.norm(_type(x, "x"), x.data_ptr(), 0, weight.data_ptr(), eps, rows, size, out.data_ptr())
        return out

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        reader: Any = None,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, size = _matrix(x, "x")
        _same(residual, (rows, size), x.dtype, "residual")
        _same(weight, (size,), x.dtype, "weight")
        out = torch.empty_like(x)
        self.native.norm(
            _type(x, "x"), x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, rows, size, out.data_ptr()
        )
        return out, residual

    def rotary_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: PagedKv,
        batch: Batch,
        heads: int,
        kv_heads: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        view, rows = self._view(batch, kv, heads, kv_heads)
        head_dim = kv.head_dim
        _same(qkv, (rows, (heads + 2 * kv_heads) * head_dim), kv.dtype, "qkv")
        positions = cos.shape[0]
        _same(cos, (positions, head_dim // 2), torch.float32, "cos")
        _same(sin, (positions, head_dim // 2), torch.float32, "sin")
        for norm, what in ((q_norm, "q_norm"), (k_norm, "k_norm")):
            if norm is not None:
                _same(norm, (head_dim,), kv.dtype, what)
        q = qkv.new_empty((rows, heads * head_dim))
        self.native.rotary_write(
            kv.native,
            view,
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            positions,
            heads,
            0 if q_norm is None else q_norm.data_ptr(),
            0 if k_norm is None else k_norm.data_ptr(),
            eps,
            q.data_ptr(),
        )
        return q

    def attention(
        self,
        q: torch.Tensor,
        kv: PagedKv,
        batch: Batch,
        heads: int,
        kv_heads: int,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        view, rows = self._view(batch, kv, heads, kv_heads)
        _same(q, (rows, heads * kv.head_dim), kv.dtype, "q")
        if not scale > 0 or (window is not None and window < 1):
            raise ValueError(f"{scale = } must be over 0, and {window = } at least 1 or None")
        out = torch.empty_like(q)
        self.native.attention(kv.native, view, q.data_ptr(), heads, scale, window or 0, out.data_ptr())
        return out

    def keep(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        return kept_rows(x, batch)

    def silu_mul(self, gate_up: torch.Tensor, reader: Any = None) -> torch.Tensor:  # noqa: ARG002
        rows, columns = _matrix(gate_up, "gate_up")
        if columns % 2:
            raise ValueError(f"gate_up has {columns} columns; it must be [T, 2 F]")
        out = gate_up.new_empty((rows, columns // 2))
        self.native.silu_mul(_type(gate_up, "gate_up"), gate_up.data_ptr(), rows, columns // 2, out.data_ptr())
        return out

    def _view(self, batch: Batch, kv: PagedKv, heads: int, kv_heads: int) -> tuple[_native.BatchView, int]:
        """The batch as the C++ side sees it, checked and made once per batch, and its number of rows."""
        if kv_heads != kv.kv_heads or heads < 1 or heads % kv_heads:
            raise ValueError(f"{heads = } must be a multiple of {kv_heads = }, and the KV has {kv.kv_heads}")
        if batch.block_size != kv.block_size:
            raise ValueError(f"the batch has blocks of {batch.block_size} slots, the KV of {kv.block_size}")
        return self.view(batch)

    def view(self, batch: Batch) -> tuple[_native.BatchView, int]:
        """The same, without the KV: addresses of the batch's tensors, which must live as long."""
        if batch is not self._seen[0]:
            self._seen = (batch, _view(batch), batch.positions.shape[0])
        return self._seen[1:]


def _nibbles(values: torch.Tensor) -> torch.Tensor:
    """int8 [V, D], -8 to 7 -> uint8 [V, D / 2]: of each group of 128 channels byte j holds channels j and 64 + j."""
    low, high = (values.contiguous() + 8).view(torch.uint8).view(len(values), -1, 2, EMBEDDING_GROUP // 2).unbind(2)
    return (low | high << 4).flatten(1)


def _view(batch: Batch) -> _native.BatchView:
    rows, slices = batch.positions.shape[0], batch.contexts.shape[0]
    width = batch.tables.shape[1] if batch.tables.dim() == 2 else -1
    _same(batch.positions, (rows,), torch.int32, "positions")
    _same(batch.slots, (rows,), torch.int64, "slots")
    _same(batch.starts, (slices + 1,), torch.int32, "starts")
    _same(batch.contexts, (slices,), torch.int32, "contexts")
    _same(batch.tables, (slices, width), torch.int32, "tables")
    tensors = (batch.positions, batch.slots, batch.starts, batch.contexts, batch.tables)
    return _native.BatchView(rows, slices, width, *(tensor.data_ptr() for tensor in tensors))


def _matrix(tensor: torch.Tensor, what: str) -> tuple[int, int]:
    if tensor.dim() != 2 or not tensor.is_contiguous():
        raise ValueError(f"{what} must be contiguous [T, columns], not {tuple(tensor.shape)} {tensor.stride()}")
    rows, columns = tensor.shape
    return rows, columns


def _same(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    if tensor.dtype is not dtype:
        raise TypeError(f"{what} is {tensor.dtype}; it must be {dtype}")
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{what} must be contiguous {list(shape)}, not {list(tensor.shape)} {tensor.stride()}")


def _type(tensor: torch.Tensor, what: str) -> int:
    return _type_of(tensor.dtype, what)


def _type_of(dtype: torch.dtype, what: str) -> int:
    try:
        return TYPES[dtype]
    except KeyError:
        raise TypeError(f"{what} is {dtype}; the C++ kernels take float32 and bfloat16") from None
