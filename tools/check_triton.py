"""Compile the Triton kernels ahead of time, without a GPU, and look for the tensor-core instructions in their PTX.

    python tools/check_triton.py [--quick] [CAPABILITY ...]        by default 80 90

--quick leaves out tiles of other sizes. Prints a table, and fails unless every product has products of its own kind in
each form: of 8-bit integers for W4A8, of 16-bit floats for W4A16 and attention; `wgmma` on capability 9 where the tile
is high enough. And no W4A8 kernel and none that quantises may hold a fused multiply-add of floats: they promise the
reference's bits.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from weft.kernels.triton_matmul import w4a8_kernel, w4a16_kernel
from weft.kernels.triton_quantise import rows_kernel
from weft.kernels.triton_rows import TILE
from weft.kernels.triton_w4ax import tile

INTEGERS, FLOATS = r"\bs8\.s8|\.s32\.s8\.s8", r"\.f32\.bf16\.bf16"
WGMMA_ROWS = 64  # the least height of a tile for wgmma
# Pointers are 16-byte aligned and row lengths multiples of 16, as torch's are.
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Case:
    """One kernel in one form: the types of its arguments (None: absent), and its compile-time constants."""

    name: str
    kernel: Any
    types: Mapping[str, str | None]
    constants: dict[str, Any]
    product: str | None
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True


def main(arguments: Sequence[str]) -> int:
    quick = "--quick" in arguments
    targets = [int(word) for word in arguments if word != "--quick"] or [80, 90]
    problems = []
    print(f"{'kernel':36} {'sm':>4} {'mma':>5} {'wgmma':>6} {'fma':>5} {'regs':>5} {'spills':>6} {'shared':>7}")
    for case in cases(quick):
        for capability in targets:
            made = compiled(case, capability)
            ptx = made.asm["ptx"]
            found = [line for line in ptx.splitlines() if case.product and re.search(case.product, line)]
            mma = sum("mma.sync" in line for line in found)
            wgmma = sum("wgmma.mma_async" in line for line in found)
            fused = len(re.findall(r"\bfma\.rn\.f32", ptx))
            registers, spilled = resources(made)
            print(
                f"{case.name:36} {capability:4} {mma:5} {wgmma:6} {fused:5} {registers:5} {spilled:6} "
                f"{made.metadata.shared:7}"
            )
            if case.product and not (mma or wgmma):
                problems.append(f"{case.name} for {capability}: no tensor-core product of its types")
            if case.product and capability // 10 == 9 and case.constants.get("M", 0) >= WGMMA_ROWS and not wgmma:
                problems.append(f"{case.name} for {capability}: no wgmma")
            if case.exact and fused:
                problems.append(f"{case.name} for {capability}: {fused} fused multiply-adds")
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def cases(quick: bool) -> list[Case]:
    floats = dict.fromkeys(("x", "residual", "weight", "kept", "summed"), "*bf16")
    sizes = dict.fromkeys(("channels", "outliers", "eight"), "i32") | {"eps": "fp32"}
    rows = floats | sizes | {"permutation": "*i32", "values": "*i8", "scales": "*fp32", "totals": "*i32"}
    bare = rows | dict.fromkeys(("residual", "weight", "kept", "summed", "permutation")) | {"values": "*u8"}
    form = {"HADAMARD": True, "QUANTISE": True, "NIBBLES": False, "GATED": False, "BLOCKS": TILE}
    made = [
        Case("norm + permute + Hadamard + quantise", rows_kernel, rows, form, None),
        Case("quantise to nibbles", rows_kernel, bare, form | {"NIBBLES": True}, None),
    ]
    weight = {"wide": "*i8", "weight": "*i8", "scales": "*bf16", "zeros": "*i8", "bias": "*fp32", "y": "*bf16"}
    weight |= dict.fromkeys(("rows", "outputs", "blocks", "wide_blocks"), "i32")
    plain: dict[str, str | None] = dict.fromkeys(("wide", "zeros", "bias"))
    integers = weight | {"x": "*i8", "row_scales": "*fp32", "row_totals": "*i32"}
    for count in (1, 1024) if quick else (1, 32, 64, 1024):
        shape, options = _tiled(tile(count))
        made.append(Case(f"W4A8, {count} rows", w4a8_kernel, integers | plain, shape, INTEGERS, options))
        if not quick:
            name = f"W4A8, {count} rows, wide, zeros, bias"
            made.append(Case(name, w4a8_kernel, integers, shape, INTEGERS, options))
    for count in (1024,) if quick else (1, 32, 64, 1024):
        shape, options = _tiled(tile(count, floats=True))
        types = weight | plain | {"x": "*bf16"}
        made.append(
            Case(
                f"W4A16, {count} rows", w4a16_kernel, types, shape | {"KIND": tl.bfloat16}, FLOATS, options, exact=False
            )
        )
    return made


def _tiled(shape: tuple[int, int, int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    m, n, warps, stages = shape
    return {"M": m, "N": n}, {"num_warps": warps, "num_stages": stages}


def compiled(case: Case, capability: int) -> Any:
    """The kernel for a GPU that need not be here."""
    signature, constants, attributes = {}, dict(case.constants), {}
    for place, name in enumerate(case.kernel.arg_names):
        kind = case.types.get(name)
        if kind is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
            continue
        signature[name] = kind
        if kind.startswith("*") or name in ("channels", "outputs"):
            attributes[(place,)] = ALIGNED
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {**case.options, "enable_fp_fusion": not case.exact}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(made: Any) -> tuple[int, int]:
    """(registers, bytes of local memory) of a thread, as the assembler has written them down."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text.stdout)
    if found is None:
        raise SystemExit(f"cuobjdump said nothing of registers: {text.stdout!r}")
    return int(found[1]), int(found[2]) + int(found[3])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
