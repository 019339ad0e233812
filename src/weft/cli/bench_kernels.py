"""`weft bench kernels`: how long a model's kernels take on this machine, as a table and a CSV.

`tools/fit_gpu.py` fits the simulator's cost model to the CSV (docs/simulator_model.md).
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.devices.kernel_times import Machine, Timed

MOST = 1 << 20  # of any number that is given
COLUMNS = ("operation", "name", "precision", "m", "n", "k", "share", "shares", "seconds", "least", "greatest")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="builtin", metavar="MODEL", help="whose config.json it is (builtin)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument("--precision", choices=("bf16", "w4a8"), default="bf16", help="of linear layers (bf16)")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "int8", "int4"), default="auto", help="(auto)")
    parser.add_argument("--tokens", default="1,16,128,1024", metavar="N,...", help="rows of a step (1,16,128,1024)")
    parser.add_argument("--sequences", default="1,16", metavar="N,...", help="of decode attention (1,16)")
    parser.add_argument("--contexts", default="512,2048", metavar="N,...", help="of decode attention (512,2048)")
    parser.add_argument("--shares", metavar="N,...", help="units of the device: cores, or groups of SMs (all of them)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each measurement (5)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write one line a measurement, as they come")
    parser.add_argument("--disable-progress", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError, CheckpointError or DeviceError."""
    tokens, sequences, contexts = (
        numbers(f"--{name}", getattr(arguments, name)) for name in ("tokens", "sequences", "contexts")
    )
    if not 1 <= arguments.rounds <= 1000:
        raise ConfigError(f"--rounds is {arguments.rounds}; it must be from 1 to 1000")
    from weft.devices.kernel_times import cases_of, measure
    from weft.kernels import check_heads
    from weft.models.families import read_config
    from weft.text.hub import resolve_model

    model = read_config(resolve_model(arguments.model))
    cases = cases_of(
        model,
        arguments.precision,
        tokens=tokens,
        sequences=sequences,
        contexts=contexts,
        kv=arguments.kv_cache_dtype,
    )
    affinity = os.sched_getaffinity(0)
    machine = _open(arguments.device)
    try:
        if machine.kind == "cpu":
            check_heads(machine.kernels.name, model.head_dim)
        shares = _shares(arguments.shares, machine.shares)
        found = []
        total = len(cases) * len(shares)
        with _Lines(arguments.csv) as lines, _progress(arguments.disable_progress) as progress:
            task = progress.add_task("kernels", total=total)
            for timed in measure(machine, model, cases, shares, arguments.rounds):
                found.append(timed)
                lines.write(timed)
                progress.advance(task)
    finally:
        machine.kernels.close()
        os.sched_setaffinity(0, affinity)
    Console().print(_table(found))
    return 0


def numbers(flag: str, text: str) -> list[int]:
    """Whole numbers from 1 on, from `1,2,3`. Raises ConfigError."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"{flag} is {text!r}; it must be whole numbers with commas between them, as 1,16") from None
    if found[0] < 1 or found[-1] > MOST:
        raise ConfigError(f"{flag} is {text!r}; each number must be from 1 to {MOST}")
    return found


def _shares(text: str | None, most: int) -> list[int]:
    if text is None:
        return [most]
    found = numbers("--shares", text)
    if found[-1] > most:
        raise ConfigError(f"--shares is {text!r}; the device has {most}")
    return found


def _open(device: str) -> Machine:
    from weft.devices.kernel_times import CpuMachine, GpuMachine

    if device == "cuda":
        from weft.devices.cuda_streams import open_gpu
        from weft.kernels.triton import TritonKernels

        gpu = open_gpu()
        gpu.adopt()
        return GpuMachine(gpu, TritonKernels(gpu.device))
    from weft.kernels import open_kernels

    cores = tuple(sorted(os.sched_getaffinity(0)))
    os.sched_setaffinity(0, {cores[0]})  # the kernels' own threads have the others
    return CpuMachine(open_kernels("auto", cores), cores)


class _Lines:
    """The CSV, line by line, so that a run that is stopped leaves what it has."""

    def __init__(self, path: Path | None) -> None:
        self._file = None
        if path is not None:
            try:
                self._file = path.open("w", newline="")
            except OSError as error:
                raise ConfigError(f"--csv {path} cannot be written: {error.strerror}") from error
            self._writer = csv.DictWriter(self._file, COLUMNS)
            self._writer.writeheader()

    def write(self, timed: Timed) -> None:
        if self._file is not None:
            self._writer.writerow(timed.row())
            self._file.flush()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def _progress(hidden: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=hidden or not console.is_terminal)


def _table(found: Sequence[Timed]) -> Table:
    table = Table(box=None)
    table.add_column("operation", no_wrap=True)
    for head in ("shape", "share", "us", "spread", "GFLOP/s"):
        table.add_column(head, justify="right", no_wrap=True)
    for one in found:
        case = one.case
        flops = 2.0 * case.m * case.n * case.k / one.seconds / 1e9
        table.add_row(
            f"{case.name} {case.precision}",
            f"{case.m} x {case.n} x {case.k}",
            f"{one.share}/{one.shares}",
            _microseconds(one.seconds),
            f"{_microseconds(one.least)}..{_microseconds(one.greatest)}",
            f"{flops:.0f}" if case.operation == "gemm" else "",
        )
    return table


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.{1 if seconds < 1e-4 else 0}f}"
