"""The benchmark's side of a contestant: a process that loads its engine once and then answers one question at a time.

While it is not asked, it waits for input and takes no CPU; so several can be loaded and their runs interleaved.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FOLDER = Path(__file__).resolve().parent


class ContestantError(RuntimeError):
    """A contestant could not do what it was asked."""


class Contestant:
    """name: as in the tables. command: interpreter and arguments; the worker's log goes to `log`."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self.log = log
        self._file = log.open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._file, text=True, cwd=FOLDER
        )
        try:
            greeting = self._answer()
        except BaseException:
            self.close()
            raise
        self.load_seconds = float(greeting["ready"])
        self.engine = str(greeting["engine"])

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, op: str, **question: Any) -> dict[str, Any]:
        """See workerloop.py for the questions. Raises ContestantError with the reason."""
        if self._process.stdin is None:
            raise ContestantError(f"{self.name} has no input")
        try:
            self._process.stdin.write(json.dumps({"op": op, **question}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContestantError(self._last_words()) from None
        return self._answer()

    def close(self) -> None:
        """End the process: by the end of its input, or by force after ten seconds."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._file.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise ContestantError(self._last_words())
        content: dict[str, Any] = json.loads(line)
        if "error" in content:
            raise ContestantError(f"{self.name}: {content['error']} (see {self.log})")
        return content

    def _last_words(self) -> str:
        self._file.flush()
        words = self.log.read_text().strip().splitlines()[-3:]
        return f"{self.name} has ended: " + (" / ".join(words) or "without a word") + f" (see {self.log})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def weft(model: Path, sequences: int, log: Path) -> Contestant:
    return Contestant("weft", [sys.executable, "weft_worker.py", str(model), str(sequences)], log)


def transformers(python: Path, model: Path, log: Path) -> Contestant:
    return Contestant("transformers", [str(python), "transformers_worker.py", str(model)], log)


def llamacpp(python: Path, gguf: Path, sequences: int, log: Path) -> Contestant:
    return Contestant("llama.cpp", [str(python), "llamacpp_worker.py", str(gguf), str(sequences)], log)


def limits(log: Path) -> Contestant:
    return Contestant("limits", [sys.executable, "limits_worker.py"], log)
