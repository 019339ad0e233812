"""The kernels of the C++ extension: checks in Python, work in csrc/.

Calls pass addresses and sizes, because that costs 0.4 us and a tensor through DLPack costs 2 us. So everything that the
C++ side relies on (type, contiguity, shape) is checked here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from weft import _native
from weft.errors import DeviceError
from weft.kernels.base import Batch

_TYPES = {torch.float32: 0, torch.bfloat16: 1}


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


class CpuKernels:
    """One lane's kernels at one level. The calling thread is one of its threads; see `open_kernels` for the pinning."""

    def __init__(self, level: str, cores: tuple[int, ...]) -> None:
        self.name = level
        try:
            self.native = _native.Backend(level, list(cores))
        except ValueError as error:
            raise DeviceError(f"cannot open the {level} kernels on cores {cores}: {error}") from error

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

    def linear(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        return self.linear_into(x, packed, x.new_empty((x.shape[0], packed.outputs)))

    def linear_into(self, x: torch.Tensor, packed: Linear, y: torch.Tensor) -> torch.Tensor:
        """`linear` into y [T, out], which is returned."""
        if x.dtype is not packed.dtype or y.dtype is not packed.dtype:
            raise TypeError(f"x is {x.dtype} and y {y.dtype}; the weight was packed as {packed.dtype}")
        rows = x.shape[0]
        if x.shape != (rows, packed.inputs) or y.shape != (rows, packed.outputs):
            raise ValueError(
                f"x is {tuple(x.shape)} and y {tuple(y.shape)}; "
                f"they must be [T, {packed.inputs}] and [T, {packed.outputs}]"
            )
        if not (x.is_contiguous() and y.is_contiguous()):
            raise ValueError("x and y must be contiguous")
        self.native.linear(packed.native, x.data_ptr(), rows, y.data_ptr())
        return y

    def make_kv(self, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Any:
        raise NotImplementedError

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        raise NotImplementedError

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def rotary_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: Any,
        batch: Batch,
        heads: int,
        kv_heads: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        raise NotImplementedError

    def attention(
        self, q: torch.Tensor, kv: Any, batch: Batch, heads: int, kv_heads: int, scale: float, window: int | None = None
    ) -> torch.Tensor:
        raise NotImplementedError

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def _type(tensor: torch.Tensor, what: str) -> int:
    try:
        return _TYPES[tensor.dtype]
    except KeyError:
        raise TypeError(f"{what} is {tensor.dtype}; the C++ kernels take float32 and bfloat16") from None
