"""What `weft serve` says when it starts: where the time went, where the memory went, and the address."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from weft.ipc.messages import Phase, Ready

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human_bytes(count: int) -> str:
    """1536 as '1.5 KiB'."""
    size, unit = float(count), UNITS[0]
    for unit in UNITS:
        if size < 1024 or unit == UNITS[-1]:
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def exec_time() -> float:
    """When this process began, on time.monotonic's clock and to a hundredth of a second: before any of our code ran."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def show(
    out: TextIO, ready: Ready, engine: Sequence[Phase], front_end: Sequence[Phase], total: float, address: str
) -> None:
    """Print the tables, and the address as the last line.

    engine, front_end: the phases of each process. total: seconds from exec to now.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(file=out, highlight=False, markup=False, soft_wrap=True)
    phases = Table("phase", "process", "seconds", title="Start-up", title_justify="left")
    phases.columns[2].justify = "right"
    for process, rows in (("front end", front_end), ("engine", engine)):
        for phase in rows:
            phases.add_row(phase.name, process, f"{phase.seconds:.2f}")
    phases.add_section()
    phases.add_row("exec to ready", "both, side by side", f"{total:.2f}")
    memory = Table("what", "bytes", "", title="Memory", title_justify="left")
    memory.columns[1].justify = memory.columns[2].justify = "right"
    for name, count in ready.memory:
        memory.add_row(name, f"{count:,}", human_bytes(count))
    console.print(phases)
    console.print(memory)
    tokens = ready.blocks * ready.block_size
    console.print(f"model {ready.model} on {ready.device}, {ready.dtype}, kernels {ready.kernels}")
    console.print(
        f"KV pool: {ready.blocks} blocks of {ready.block_size} = {tokens:,} tokens = "
        f"{tokens / ready.max_model_len:.1f} sequences of the longest length, {ready.max_model_len:,}"
    )
    for note in ready.notes:
        console.print(f"note: {note}")
    console.print(address)
    out.flush()
