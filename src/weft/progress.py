"""The progress bar of the offline API."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressBar:
    """Requests done and tokens/s, on standard error when that is a terminal; use it as a context manager."""

    def __init__(self, total: int, visible: bool = True) -> None:
        rate = TextColumn("{task.fields[tokens]} tokens, {task.fields[rate]:.1f} tokens/s")
        console = Console(stderr=True)
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            rate,
            TimeElapsedColumn(),
            console=console,
            disable=not (visible and console.is_terminal),
        )
        self._task = self._progress.add_task("", total=total, tokens=0, rate=0.0)
        self._start = time.monotonic()

    def show(self, finished: int, tokens: int) -> None:
        rate = tokens / max(time.monotonic() - self._start, 1e-9)
        self._progress.update(self._task, completed=finished, tokens=tokens, rate=rate)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
