"""A progress bar."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Bar:
    """What is done of `total`, and words on it, on standard error when that is a terminal; use it as a context
    manager."""

    def __init__(self, total: float, visible: bool = True) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            BarColumn(),
            TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not (visible and console.is_terminal),
            refresh_per_second=4,  # it takes its time from what it shows
        )
        self._task = self._progress.add_task("", total=total, words="")

    def show(self, done: float, words: str) -> None:
        self._progress.update(self._task, completed=done, words=words)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
