"""What every benchmark needs: flags, the machine, other load, medians with their spread, and the JSON of claims.

The JSON is {"claims": {name: number}, "rows": [...], "machine": {...}, "commit": "..."}. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
OTHER_LOAD_LIMIT = 0.05  # of all cores; more than that is said beside the results
LEVEL_FLAGS = {
    "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"},
    "avx2": {"avx2", "fma"},
    "portable": set[str](),
}
TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni")
_TICK = os.sysconf("SC_CLK_TCK")


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks share."""
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)
    made.add_argument("--quick", action="store_true", help="a shorter form that fits in 60 seconds")
    made.add_argument("--json", type=Path, metavar="FILE", help="write claims, rows, machine and commit")
    made.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (needs matplotlib)")
    return made


def cache_folder(given: Path | None) -> Path:
    """Where environments and models made for benchmarks are kept: --cache, or weft-bench in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (given or base / "weft-bench").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, Any]:
    """What the figures were taken on. level, cpu_flags: of the CPU's name nobody can tell what it can do."""
    said = _lines("/proc/cpuinfo")
    cpu = next((line.split(":")[1].strip() for line in said if line.startswith("model name")), "?")
    flags = frozenset(next((line.split(":")[1].split() for line in said if line.startswith("flags")), []))
    memory = next((int(line.split()[1]) // 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": cpu,
        "level": level(flags),
        "cpu_flags": [flag for flag in TELLING_FLAGS if flag in flags],
        "cores": cores(),
        "memory_mib": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def level(flags: Collection[str]) -> str:
    """The best level of weft's C++ kernels (csrc/levels.cpp) for a CPU with these flags."""
    return next(name for name, wanted in LEVEL_FLAGS.items() if wanted <= set(flags))


def commit() -> str:
    """The commit of this checkout, with "+" when a tracked file differs from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass(frozen=True, slots=True)
class Figure:
    """Median, least and greatest of some values."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        if not values:
            return cls(math.nan, math.nan, math.nan, 0)
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        if not self.count:
            return "-"
        digits = max(0, 2 - math.floor(math.log10(abs(self.median)))) if self.median else 0
        digits = min(digits, 3)
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}..{self.high:.{digits}f}]"

    def as_json(self) -> dict[str, Any]:
        return {"median": self.median, "low": self.low, "high": self.high, "count": self.count}


def process_tree(root: int) -> list[int]:
    """root and its descendants that are alive."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (stat := _stat(int(entry.name))) is not None:
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found, pending = [], [root]
    while pending:
        pid = pending.pop()
        found.append(pid)
        pending += children.get(pid, [])
    return found


def cpu_seconds(root: int) -> float:
    """CPU time of a process tree: of the living, and of ended children that their parents have waited for."""
    total = 0
    for pid in process_tree(root):
        stat = _stat(pid)
        if stat is not None:
            total += sum(int(ticks) for ticks in stat[11:15])
    return total / _TICK


def resident_bytes(pid: int) -> int:
    """Resident memory of one process; 0 when it has ended."""
    for line in _lines(f"/proc/{pid}/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def simulating_bytes() -> int:
    """Resident memory of this process and of those that it has forked."""
    return sum(
        resident_bytes(pid) for pid in (os.getpid(), *(one.pid or 0 for one in multiprocessing.active_children()))
    )


def simulating_seconds() -> float:
    """CPU time of this process and of those that it has forked and that have ended."""
    return sum(os.times()[:4])


class LoadWatch:
    """How much of the CPUs others took since it was made: everything but the tree of this process."""

    def __init__(self) -> None:
        self._start = self._now()

    def other_load(self) -> tuple[float, float]:
        """(share of all cores taken by other processes, share that the hypervisor took)."""
        wall, busy, stolen, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        whole = max(wall, 1e-9) * (os.cpu_count() or 1)
        return max(0.0, busy - own) / whole, stolen / whole

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        first = next(line for line in _lines("/proc/stat") if line.startswith("cpu "))
        user, nice, system, _, _, irq, softirq, stolen = (int(part) / _TICK for part in first.split()[1:9])
        return time.monotonic(), user + nice + system + irq + softirq, stolen, cpu_seconds(os.getpid())


def load_note(watch: LoadWatch) -> str | None:
    """A sentence for the report when the machine was not quiet."""
    other, stolen = watch.other_load()
    if other <= OTHER_LOAD_LIMIT and stolen <= OTHER_LOAD_LIMIT:
        return None
    return (
        f"NOT QUIET: other processes took {other:.1%} and the hypervisor {stolen:.1%} of the CPU during this run; "
        f"figures of a run above {OTHER_LOAD_LIMIT:.0%} are not to be quoted"
    )


def say(words: str) -> None:
    """A line on standard error, so that a long run shows that it lives."""
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns; the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in ([*zip(row, widths, strict=True)] for row in cells)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def report(
    arguments: argparse.Namespace,
    claims: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
) -> None:
    """Print notes and claims, and write the JSON where it was asked for."""
    for note in notes:
        print(note)
    for name, value in claims.items():
        print(f"{name} = {value:.3f}")
    write_json(arguments, claims, rows, notes)


def write_json(
    arguments: argparse.Namespace,
    claims: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write the JSON where it was asked for: all of it or, when killed, none. Also for what a long run has so far.

    more: further keys, or other values for these."""
    if arguments.json is None:
        return
    content = {
        "claims": dict(claims),
        "rows": list(rows),
        "notes": list(notes),
        "quick": arguments.quick,
        "machine": machine(),
        "commit": commit(),
        # Of paths the names only: where this machine has its files is of no use to anybody else.
        "command": [Path(word).name if "/" in word else word for word in sys.argv],
        **(more or {}),
    }
    unfinished = arguments.json.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")
    unfinished.replace(arguments.json)


def _plain(content: Any) -> Any:
    """JSON's own types only; NaN as null."""
    if isinstance(content, Figure):
        return _plain(content.as_json())
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content if isinstance(content, int | float | str | bool | None) else str(content)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command name, which may itself contain spaces; None when it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
