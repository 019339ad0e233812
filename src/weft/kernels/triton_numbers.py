"""What several Triton kernels need: numbers rounded to the type that they are stored in.

Importing this module needs triton. Set TRITON_INTERPRET=1 before, and kernels run on a CPU, slowly, through numpy.

Kernels name the counts that change from step to step in `do_not_specialize`: Triton would compile them again for a
count of 1, and for multiples of 16, while somebody waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def helper(function: Callable[..., Any]) -> Any:
    """Decorates what kernels call. The interpreter prepares a call of a jitted function for longer than most of them
    run, and can do without."""
    return function if INTERPRETED else triton.jit(function)


@helper
def rounded(x, KIND: tl.constexpr):
    """float32 -> KIND, halves to even. A GPU does so by itself; the interpreter cuts a bfloat16 off."""
    if INTERPRETED and tl.bfloat16 == KIND:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(KIND)


def product_kind(dtype: torch.dtype) -> tl.dtype:
    """The type that the operands of a product have: dtype's own, and float32 for the interpreter, which has no products
    of bfloat16 (the numbers are the same: a product of two bfloat16 is exact in float32)."""
    if dtype not in KINDS:
        raise TypeError(f"tensors are {dtype}; the Triton kernels take float32, bfloat16 and float16")
    return tl.float32 if INTERPRETED else KINDS[dtype]
