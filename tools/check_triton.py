"""Compile the Triton kernels ahead of time, without a GPU, and look for the tensor-core instructions in their PTX.

    python tools/check_triton.py [--quick] [--only=WORDS] [CAPABILITY ...]     by default 80 90 100; also 86 89 103 120

--quick leaves out tiles of other sizes, --only kernels that do not have these words in their line. Prints a table, and
fails unless every product has products of its own kind in each form: of 8-bit integers for W4A8, of 16-bit floats for
the others; `wgmma` on capability 9 where the tile is high enough. And no W4A8 kernel, none that normalises or quantises
and none whose rows have their own bits may hold a fused multiply-add of floats. Nor may a kernel be one of several for
counts that change from step to step.
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

from weft.kernels.triton_attention import combine_kernel, decode_kernel, prefill_kernel
from weft.kernels.triton_linear import linear_kernel
from weft.kernels.triton_matmul import w4a8_kernel, w4a16_kernel
from weft.kernels.triton_norm import gate_kernel, norm_kernel
from weft.kernels.triton_quantise import rows_kernel
from weft.kernels.triton_rotary import rotary_kernel
from weft.kernels.triton_sample import draw_kernel, edit_kernel, peak_kernel, race_kernel, score_kernel
from weft.kernels.triton_tiles import (
    ACTIVATION,
    ANY,
    ATTENTION_QUANTISED_HIGH,
    LINEAR,
    NORM,
    QUANTISE,
    ROTARY,
    SAMPLE,
    SAMPLE_PARTS,
    W4A8,
    W4A16,
    ProductTile,
    attention_tile,
    key_of,
)

INTEGERS, FLOATS = r"\bs8\.s8|\.s32\.s8\.s8", r"\.f32\.bf16\.bf16"
WGMMA_ROWS = 64  # the least height of a tile for wgmma
# KiB of shared memory that a program may have.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
COUNTS = {"rows", "slices", "width", "splits", "tokens", "k"}  # that change from step to step
SPILLS = {128: 216, 256: 1008}  # of attention by channels of a head: what is held beside the loop
# Pointers are 16-byte aligned and row lengths multiples of 16, as torch's are.
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Case:
    """One kernel in one form: the types of its arguments (None: absent), and its compile-time constants.

    exact: no fused multiply-adds. rows: kernels of one such name must compute a row in the same way, so that its bits
    are the same. spills: bytes of registers that may be.
    """

    name: str
    kernel: Any
    types: Mapping[str, str | None]
    constants: dict[str, Any]
    product: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    rows: str | None = None
    spills: int = 0


def main(arguments: Sequence[str]) -> int:
    quick = "--quick" in arguments
    words = next((word.removeprefix("--only=") for word in arguments if word.startswith("--only=")), "")
    targets = [int(word) for word in arguments if not word.startswith("--")] or [80, 90, 100]
    unknown = [capability for capability in targets if capability not in SHARED]
    if unknown:
        raise SystemExit(f"check_triton.py: capability {unknown[0]}: there are {', '.join(map(str, SHARED))}")
    problems = []
    print(f"{'kernel':36} {'sm':>4} {'mma':>5} {'wgmma':>6} {'tcgen':>6} {'fma':>5} {'regs':>5}", end=" ")
    print(f"{'spills':>6} {'shared':>7}")
    for capability in targets:
        layouts: dict[str, set[str]] = {}  # by what computes the same rows
        for case in (case for case in cases(quick, capability) if words in case.name):
            made = compiled(case, capability)
            problems += _problems(case, capability, made)
            if case.rows is not None:
                layouts.setdefault(case.rows, set()).add(layout_of(made))
        for name, found in layouts.items():
            if len(found) != 1:
                problems.append(f"{name} for {capability}: rows are computed in {len(found)} ways: {sorted(found)}")
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def _problems(case: Case, capability: int, made: Any) -> list[str]:
    """What is wrong with a compiled kernel, whose line of the table is printed."""
    ptx = made.asm["ptx"]
    found = [line for line in ptx.splitlines() if case.product and re.search(case.product, line)]
    mma, wgmma = (sum(word in line for line in found) for word in ("mma.sync", "wgmma.mma_async"))
    tcgen = ptx.count("tcgen05.mma.") if case.product else 0  # its types are numbers in a descriptor
    fused = len(re.findall(r"\bfma\.rn\.f(?:32|64)", ptx))
    registers, spilled = resources(made)
    print(
        f"{case.name:36} {capability:4} {mma:5} {wgmma:6} {tcgen:6} {fused:5} {registers:5} {spilled:6} "
        f"{made.metadata.shared:7}",
        flush=True,
    )
    problems = []
    if case.product and not (mma or wgmma or tcgen):
        problems.append(f"{case.name} for {capability}: no tensor-core product of its types")
    if case.product and capability // 10 == 9 and case.constants.get("M", 0) >= WGMMA_ROWS and not wgmma:
        problems.append(f"{case.name} for {capability}: no wgmma")
    for parameter in case.kernel.params:
        counts = parameter.name in COUNTS and case.types.get(parameter.name) == "i32"  # others are pointers
        if counts and not parameter.do_not_specialize:
            problems.append(f"{case.name}: Triton compiles it again for {parameter.name} of 1 and multiples of 16")
    if case.exact and fused:
        problems.append(f"{case.name} for {capability}: {fused} fused multiply-adds")
    if made.metadata.shared > SHARED[capability] * 1024:
        problems.append(f"{case.name} for {capability}: {made.metadata.shared} bytes of shared memory")
    if spilled > case.spills:
        problems.append(f"{case.name} for {capability}: {spilled} bytes of registers spilled, {case.spills} were")
    return problems


def layout_of(made: Any) -> str:
    """How a kernel lays out a row: of its products the instruction, and that no row is cut between warps; of its norm
    what each thread sums."""
    text = made.asm["ttgir"]
    shapes = re.findall(
        r"nvidia_mma<\{(versionMajor = \d+).*?warpsPerCTA = \[\d+, (\d+)\], (instrShape = [^}]*)\}", text
    )
    memory = re.findall(r"tensor_memory_encoding<blockM = (\d+)", text)
    named = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    sums = {named[name] for name in re.findall(r"\(tensor<1x\d+xf32, (#\w+)>\) -> tensor<1xf32", text)}
    return ", ".join(sorted({" ".join(shape) for shape in shapes} | {f"blockM = {rows}" for rows in memory} | sums))


def cases(quick: bool, capability: int) -> list[Case]:
    key = key_of(capability // 10)
    products = _product_cases(quick, key) + _linear_cases(quick, key)
    return _row_cases(key) + products + _attention_cases(quick, key) + _sample_cases(key)


def _row_cases(key: int) -> list[Case]:
    types: dict[str, str | None] = dict.fromkeys(("x", "residual", "weight"), "*bf16")
    types |= {"permutation": "*i32", "values": "*i8", "scales": "*fp32", "totals": "*i32"}
    types |= {"outliers": "i32", "eight": "i32", "eps": "fp32"}
    bare = types | dict.fromkeys(("residual", "weight", "permutation")) | {"values": "*u8"}
    gated = types | dict.fromkeys(("residual", "weight"))
    floats = types | dict.fromkeys(("scales", "totals")) | {"values": "*bf16"}
    blocks, few = QUANTISE[key]
    form = {"K": 4096, "SIZE": 4096, "HADAMARD": True, "QUANTISE": True, "NIBBLES": False, "GATED": False}
    form |= {"BLOCKS": blocks}
    norm = {"x": "*bf16", "residual": "*bf16", "weight": "*bf16", "out": "*bf16", "rows": "i32", "eps": "fp32"}
    gate = {"gate_up": "*bf16", "out": "*bf16", "rows": "i32", "columns": "i32"}
    high, warps = NORM[key]
    tall, wide, gate_warps = ACTIVATION[key]
    whole, sums = {"D": 4096, "SIZE": 4096, "ROWS": high}, "norms"
    tile, options = {"ROWS": tall, "COLUMNS": wide}, {"num_warps": warps}
    few_options, inner = {"num_warps": few}, {"K": 14336, "SIZE": 16384, "GATED": True}
    return [
        Case("norm + permute + Hadamard + quantise", rows_kernel, types, form, None, options, rows=sums),
        Case("norm + permute + Hadamard", rows_kernel, floats, form | {"QUANTISE": False}, None, options, rows=sums),
        Case("quantise to nibbles", rows_kernel, bare, form | {"NIBBLES": True}, None, few_options),
        Case("activation + permute + quantise", rows_kernel, gated, form | inner, None, few_options),
        Case("residual + norm", norm_kernel, norm, whole, None, options, rows=sums),
        Case("gated activation", gate_kernel, gate, tile, None, {"num_warps": gate_warps}),
    ]


def _product_cases(quick: bool, key: int) -> list[Case]:
    weight = {"wide": "*i8", "weight": "*i8", "scales": "*bf16", "zeros": "*i8", "bias": "*fp32", "y": "*bf16"}
    weight |= dict.fromkeys(("rows", "outputs", "blocks", "wide_blocks"), "i32")
    plain: dict[str, str | None] = dict.fromkeys(("wide", "zeros", "bias"))
    integers = weight | {"x": "*i8", "row_scales": "*fp32", "row_totals": "*i32"}
    made = []
    table = W4A8[key]
    for one in (table[0], table[-1]) if quick else table:
        shape, options = _tiled(one)
        name = f"W4A8, {_most(one)}"
        made.append(Case(name, w4a8_kernel, integers | plain, shape, INTEGERS, options, spills=32))
        if not quick:
            made.append(Case(f"{name}, all", w4a8_kernel, integers, shape, INTEGERS, options, spills=32))
    table = W4A16[key]
    for one in table[-1:] if quick else table:
        shape, options = _tiled(one)
        types = weight | plain | {"x": "*bf16"}
        constants = shape | {"KIND": tl.bfloat16}
        made.append(Case(f"W4A16, {_most(one)}", w4a16_kernel, types, constants, FLOATS, options, exact=False))
    return made


def _most(one: ProductTile) -> str:
    """What a tile is for."""
    rows, outputs = one.most
    return ("more rows" if rows == ANY else f"{rows} rows") + ("" if outputs == ANY else f", {outputs} outputs")


def _linear_cases(quick: bool, key: int) -> list[Case]:
    chosen = LINEAR[key]
    types: dict[str, str | None] = dict.fromkeys(("x", "weight", "bias", "y"), "*bf16")
    types |= dict.fromkeys(("rows", "outputs", "channels"), "i32")
    made = []
    for height, warps, stages in sorted({chosen.low, chosen.high}):
        shape = {"M": height, "N": chosen.columns, "K": chosen.channels, "KIND": tl.bfloat16}
        options = {"num_warps": warps, "num_stages": stages}
        forms = (("", types | {"bias": None}), (", wide, bias", types | {"y": "*fp32"}))
        for words, given in forms[:1] if quick else forms:
            name = f"BF16, {height} rows{words}"
            made.append(
                Case(name, linear_kernel, given, shape, FLOATS, options, rows="plain products in BF16", spills=8)
            )
    return made


def _attention_cases(quick: bool, key: int) -> list[Case]:
    types: dict[str, str | None] = dict.fromkeys(("q", "qkv", "out", "q_norm", "k_norm"), "*bf16")
    types |= dict.fromkeys(("cos", "sin", "sums_out", "marks_out", "sums", "marks"), "*fp32")
    types |= dict.fromkeys(("starts", "contexts", "tables", "positions"), "*i32") | {"slots": "*i64"}
    types |= dict.fromkeys(("slices", "width", "splits", "window", "tokens", "heads", "kv_heads", "block_size"), "i32")
    types |= {"scale": "fp32", "eps": "fp32"}
    made = []
    sorts = [(16, "BF16", 128), (4, "KV4", 128), (16, "BF16, 256", 256), (8, "KV8", 128), (4, "KV4, 256", 256)]
    if key in ATTENTION_QUANTISED_HIGH:
        sorts.append((4, "KV4, high", 128))
    for bits, name, channels in sorts[:3] if quick else sorts:
        given = types | _kv_types(bits)
        chosen = attention_tile(channels, quantised=bits < 16, key=key)
        if name.endswith("high"):
            chosen = ATTENTION_QUANTISED_HIGH[key]
        head = {"D": channels, "HALF": channels // 2, "LOG": channels.bit_length() - 1, "BITS": bits}
        shape = {**head, "GROUP": 4, "BLOCK_SIZE": 16, "KV_HEADS": 8, "SLICES": 64, "TOKENS": chosen.tokens}
        shape |= {"SPLIT": chosen.split, "KIND": tl.bfloat16, "WINDOWED": False}
        for kind, kernel in (("prefill", prefill_kernel), ("decode", decode_kernel)):
            rows, *sizes = getattr(chosen, kind)
            options = dict(zip(("num_warps", "num_stages"), sizes, strict=True))
            constants = shape | {"ROWS": rows}
            made.append(
                Case(
                    f"attention, {kind}, {name}",
                    kernel,
                    given,
                    constants,
                    FLOATS,
                    options,
                    rows=f"attention on {name}",
                    spills=SPILLS[channels],
                )
            )
        if name.endswith("high"):
            continue
        combine = {**head, "HEADS": 4, "GROUP": 4, "SPLIT": chosen.split, "WINDOWED": False}
        made.append(Case(f"attention, combine, {name}", combine_kernel, given, combine, None, {"num_warps": 1}))
        high, warps = ROTARY[key]
        rotary = {**head, "ROWS": high}
        made.append(Case(f"norm + rotate + write {name}", rotary_kernel, given, rotary, None, {"num_warps": warps}))
    return made


def _kv_types(bits: int) -> dict[str, str | None]:
    quantised = bits < 16
    types: dict[str, str | None] = {"signs": "*fp32" if quantised else None}
    for part in ("key", "value"):
        types[f"{part}_codes"] = "*u8" if quantised else "*bf16"
        types[f"{part}_numbers"] = "*i32" if quantised else None
    return types


def _sample_cases(key: int) -> list[Case]:
    chunk, digits, warps = SAMPLE[key]
    types = dict.fromkeys(("logits", "temperatures", "min_ps", "peaks", "biases", "logprobs", "top_logprobs"), "*fp32")
    types |= dict.fromkeys(("repetition", "frequency", "presence"), "*fp32") | {"top_ps": "*fp64"}
    types |= dict.fromkeys(("seeds", "positions", "tokens"), "*i64") | {"vocabulary": "i32", "k": "i32"}
    types |= dict.fromkeys(("top_ks", "starts", "ids", "counts", "ranks", "top_tokens"), "*i32")
    types |= {"part_peaks": "*fp32", "part_speeds": "*fp32", "part_tokens": "*i32", "part_winners": "*i32"}
    part, part_warps = SAMPLE_PARTS[key]
    parts, few = {"PART": part, "PARTS": 64}, {"num_warps": part_warps}
    shape, options = {"CHUNK": chunk, "DIGITS": digits, **parts}, {"num_warps": warps}
    greedy = types | dict.fromkeys(("seeds", "positions", "temperatures", "top_ks", "top_ps", "min_ps"))
    greedy |= dict.fromkeys(("part_speeds", "part_winners"))
    return [
        Case("peaks of parts", peak_kernel, types, parts, None, few),
        Case("draw in parts", race_kernel, types, parts, None, few),
        Case("draw", draw_kernel, types, shape, None, options),
        Case("draw, all greedy", draw_kernel, greedy, shape, None, options),
        Case("penalties", edit_kernel, types, {"EDITS": 256}, None, {"num_warps": 4}),
        Case("scores", score_kernel, types, {"CHUNK": chunk}, None, options, exact=False),
    ]


def _tiled(one: ProductTile) -> tuple[dict[str, Any], dict[str, Any]]:
    rows, columns = one.size
    return {"M": rows, "N": columns}, {"num_warps": one.warps, "num_stages": one.stages}


def compiled(case: Case, capability: int) -> Any:
    """The kernel for a GPU that need not be here."""
    signature, constants, attributes = {}, {k: v for k, v in case.constants.items() if k in case.kernel.arg_names}, {}
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
