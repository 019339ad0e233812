"""Compile the seam's kernels (kernels/triton_seam.py) ahead of time, without a GPU, and look at what came of them.

    python tools/check_seam.py [CAPABILITY ...]        by default 80 90 100

Prints a table, and fails unless the form for a switch has its multimem instructions (one load of a sum and one store to
all, of 16 bytes a thread) in the PTX and in the machine code, no kernel spills registers, and each that meets others
waits with system-wide acquire and release.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import check_triton
import triton
import triton.language as tl

from weft.kernels.triton_seam import GATHERED, gather_kernel, parts_kernel, seam_kernel, warps

RANKS, SIZE = 8, 8192
SUMS, STORES = r"multimem\.ld_reduce\.\S*\.v4\.bf16x2", r"multimem\.st\.\S*\.v4\.bf16x2"
# Of the machine code: what ld_reduce becomes, and a store to a multicast address.
MACHINE = r"\bLDGMC\b"


def main(arguments: Sequence[str]) -> int:
    problems = []
    print(f"{'seam':12} {'sm':>4} {'sums':>5} {'stores':>6} {'LDGMC':>6} {'regs':>5} {'spills':>6} {'shared':>7}")
    for capability in [int(word) for word in arguments] or [80, 90, 100]:
        for name in ("peers", "multicast", "gather", "parts"):
            if name != "multicast" or capability >= 90:
                problems += _check(capability, name)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def _check(capability: int, name: str) -> list[str]:
    multicast = name == "multicast"
    made = check_triton.compiled(_case(name), capability)
    ptx, code = made.asm["ptx"], machine_code(made)
    sums, stores = (len(re.findall(pattern, ptx)) for pattern in (SUMS, STORES))
    loads = len(re.findall(MACHINE, code))
    registers, spilled = check_triton.resources(made)
    print(
        f"{name:12} {capability:4} {sums:5} {stores:6} {loads:6} {registers:5} {spilled:6} {made.metadata.shared:7}",
        flush=True,
    )
    problems = []
    # 16 bytes of a row for each of the threads, or for some of them in turn.
    if multicast and not (sums and stores and loads):
        problems.append(f"{capability}: {sums} sums, {stores} stores and {loads} LDGMC; each must be there")
    if not multicast and (sums or stores):
        problems.append(f"{name} for {capability}: multimem instructions")
    for word in ("acquire", "release") if name != "parts" else ():
        if not re.search(rf"\.sys\.{word}\b", ptx):
            problems.append(f"{name} for {capability}: no system-wide {word}")
    if spilled:
        problems.append(f"{name} for {capability}: {spilled} bytes of registers spilled")
    return problems


def _case(name: str) -> check_triton.Case:
    types = dict.fromkeys(("partials", "outs", "signals", "places"), "*i64")
    types |= dict.fromkeys(("residual", "weight", "parts", "out"), "*bf16")
    types |= dict.fromkeys(("epochs", "failed", "source"), "*i32") | {"eps": "fp32"}
    types |= dict.fromkeys(("rank", "first", "end", "channels", "spins", "count", "room"), "i32")
    constants: dict[str, Any] = {"RANKS": RANKS, "PARTS": RANKS, "SIZE": SIZE, "KIND": tl.bfloat16}
    constants |= {"MULTICAST": name == "multicast"}
    if name == "gather":
        return check_triton.Case(name, gather_kernel, types, constants | {"SIZE": GATHERED}, None, {"num_warps": 8})
    kernel = parts_kernel if name == "parts" else seam_kernel
    return check_triton.Case(name, kernel, types, constants, None, {"num_warps": warps(SIZE)}, exact=False)


def machine_code(made: Any) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
