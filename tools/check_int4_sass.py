"""Compile the CUDA kernels and read their machine code: are the products of 4 bits there, and do registers suffice?

    python tools/check_int4_sass.py [CAPABILITY ...]        by default 80 89

Prints a table, and fails unless every W4Ax kernel multiplies on INT4 units (IMMA.16864 with S4 and U4 operands, all
four variants, and no other tensor-core product), copies asynchronously to shared memory, and keeps clear of local
memory (a spilled register). On a capability without INT4 units, 90 for one, it fails: nvcc emulates the products there.

Needs nvcc, and cuobjdump with nvdisasm: from the CUDA toolkit, or from triton's wheel.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "csrc/cuda/w4ax.cu"
PRODUCTS = {f"IMMA.16864.{rows}.{weights}" for rows in ("S4", "U4") for weights in ("S4", "U4")}


@dataclass(frozen=True)
class Kernel:
    """What one kernel is made of. opcodes: how often each occurs, with its modifiers."""

    name: str
    registers: int
    stack: int
    opcodes: Counter[str]

    def count(self, *starts: str) -> int:
        return sum(count for opcode, count in self.opcodes.items() if opcode.startswith(starts))

    def problems(self) -> list[str]:
        found = []
        products = {re.sub(r"\.SAT$", "", opcode) for opcode in self.opcodes if "MMA" in opcode}
        if "w4ax_kernel" in self.name and products != PRODUCTS:
            found.append(f"tensor-core products are {sorted(products)}, not {sorted(PRODUCTS)}")
        if "w4ax_kernel" in self.name and not self.count("LDGSTS"):
            found.append("no asynchronous copies")
        if self.stack or self.count("STL", "LDL"):
            found.append(f"{self.stack} bytes of local memory, {self.count('STL', 'LDL')} accesses")
        return found


def main(arguments: Sequence[str]) -> int:
    failed = False
    print(f"{'kernel':56} {'sm':>4} {'registers':>9} {'local':>6} {'INT4':>5} {'LDSM':>5} {'LDGSTS':>6} {'all':>6}")
    for capability in arguments or ("80", "89"):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "w4ax.cubin"
            flags = [f"-arch=sm_{capability}", "-std=c++17", "-O3", "-cubin", "-o", str(cubin)]
            subprocess.run([tool("nvcc"), *flags, str(SOURCE)], check=True)
            for kernel in kernels(cubin):
                print(
                    f"{kernel.name:56} {capability:>4} {kernel.registers:9} {kernel.stack:6} "
                    f"{kernel.count('IMMA.16864'):5} {kernel.count('LDSM'):5} {kernel.count('LDGSTS'):6} "
                    f"{kernel.opcodes.total():6}"
                )
                for problem in kernel.problems():
                    failed = True
                    print(f"FAILED: {kernel.name} for {capability}: {problem}")
    return int(failed)


def kernels(cubin: Path) -> Iterator[Kernel]:
    """Everything in a file that nvcc has compiled."""
    usage = output("cuobjdump", "--dump-resource-usage", str(cubin))
    resources = {
        name: (int(registers), int(stack))
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    }
    # A function's listing goes up to the next one; an instruction is "/*0040*/  @P0 OPCODE.MODIFIER operands ;".
    parts = re.split(r"^\s*Function : (\S+)$", output("cuobjdump", "--dump-sass", str(cubin)), flags=re.MULTILINE)
    for name, listing in zip(parts[1::2], parts[2::2], strict=True):
        opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", listing))
        yield Kernel(readable(name), *resources[name], opcodes)


def readable(name: str) -> str:
    """The mangled names of these kernels, as they stand in the source."""
    found = re.search(r"w4ax_kernelINS0_5ShapeILi(\d+)ELi(\d+)EEELb(\d)E", name)
    if found is None:
        return re.sub(r"^_ZN4weft4cuda\d+(\w+)ENS0_.*$", r"\1", name)
    return f"w4ax_kernel<Shape<{found[1]}, {found[2]}>, {'general' if found[3] == '1' else 'plain'}>"


def output(name: str, *arguments: str) -> str:
    path = Path(tool(name))
    environment = {"PATH": f"{path.parent}:/usr/bin:/bin"}  # cuobjdump calls nvdisasm
    return subprocess.run([path, *arguments], env=environment, capture_output=True, text=True, check=True).stdout


def tool(name: str) -> str:
    """A program of the CUDA toolkit; triton's wheel has some of them, too."""
    if (found := shutil.which(name)) is not None:
        return found
    try:
        import triton
    except ModuleNotFoundError:
        triton = None
    if triton is not None:
        path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        if path.exists():
            return str(path)
    raise SystemExit(
        f"{name} was not found, on PATH or in triton's wheel: install a CUDA toolkit, or pip install triton"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
