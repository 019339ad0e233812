"""The benchmark's side of a contestant: a process that loads its engine once and then answers one question at a time.

While it is not asked, it waits for input and takes no CPU; so several can be loaded and their runs interleaved.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import environments

FOLDER = Path(__file__).resolve().parent
PATIENCE = 900.0  # seconds for one answer; loading the slowest engine beside others takes minutes


class ContestantError(RuntimeError):
    """A contestant could not do what it was asked."""


class Contestant:
    """name: as in the tables. command: interpreter and arguments; the worker's log goes to `log`.

    variables: of its environment, beside this process's own.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self._file = log.open("w")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._file,
            text=True,
            cwd=FOLDER,
            env={**os.environ, **(variables or {})},
        )
        try:
            greeting = self._answer()
        except BaseException:
            self.close()
            raise
        self.load_seconds = float(greeting["ready"])
        self.engine = str(greeting["engine"])
        self.facts: dict[str, Any] = greeting["facts"]

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
        out = self._process.stdout
        if out is None:
            raise ContestantError(f"{self.name} has no output")
        # Nothing of an answer is in our buffer yet: a question has one answer, of one line.
        if not select.select([out], [], [], PATIENCE)[0]:
            raise ContestantError(f"{self.name} has not answered for {PATIENCE:g} s (see {self.log})")
        line = out.readline()
        if not line:
            raise ContestantError(self._last_words())
        content: dict[str, Any] = json.loads(line)
        if "error" in content:
            raise ContestantError(f"{self.name}: {content['error']} (see {self.log})")
        return content

    def _last_words(self) -> str:
        self._file.flush()
        words = self.log.read_text().strip().splitlines()[-1:]
        return f"{self.name} has ended (see {self.log}): " + (words[0] if words else "without a word")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def weft(model: Path, sequences: int, log: Path, kv: str = "auto", name: str = "weft") -> Contestant:
    """kv: --kv-cache-dtype."""
    return Contestant(name, [sys.executable, "weft_worker.py", str(model), str(sequences), kv], log)


def weft_server(model: Path, sequences: int, log: Path, kv: str, name: str) -> Contestant:
    """weft's own HTTP server, and a client of it, which shares the cores with it."""
    return Contestant(name, [sys.executable, "weft_server_worker.py", str(model), str(sequences), kv], log)


def transformers(python: Path, model: Path, log: Path) -> Contestant:
    return Contestant("transformers", [str(python), "transformers_worker.py", str(model)], log)


def llamacpp(python: Path, gguf: Path, sequences: int, log: Path, name: str = "llama.cpp") -> Contestant:
    return Contestant(name, [str(python), "llamacpp_worker.py", str(gguf), str(sequences)], log)


def openvino(python: Path, folder: Path, sequences: int, log: Path, name: str) -> Contestant:
    return Contestant(name, [str(python), "openvino_worker.py", str(folder), str(sequences)], log)


def vllm(python: Path, folder: Path, sequences: int, log: Path, name: str) -> Contestant:
    """All cores for its threads (its own default leaves one to a server), in one process.

    The variables of OpenMP are those that vLLM sets for the worker processes of its server.
    """
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    variables = {
        "LD_PRELOAD": ":".join(map(str, environments.preloaded(python.parent.parent))),
        "OMP_NUM_THREADS": str(len(cores)),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{','.join(cores)}]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: as many sequences of 1024 tokens as are asked for, and more
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(cores),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Contestant(name, [str(python), "vllm_worker.py", str(folder), str(sequences)], log, variables)


def limits(log: Path) -> Contestant:
    return Contestant("limits", [sys.executable, "limits_worker.py"], log)


def probes(log: Path) -> Contestant:
    return Contestant("probes", [sys.executable, "probes_worker.py"], log)
