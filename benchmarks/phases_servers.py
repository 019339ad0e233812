"""Who takes part in the contest of benchmarks/phases.py on this machine: servers, one process each."""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import common
import peer_models
from serving import READY_SECONDS, STOP_SECONDS, Server, ServerError, free_port

from weft.bench.client import fetch
from weft.bench.stats import Slo
from weft.bench.wire import Address, WireError

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
import llama_server
from environments import interpreter

SEATS = 32
CHUNKS = (32, 64, 128, 512)
UNTUNED = "chunk 512"
# A server that takes less of a core than this has nothing to do; it is looked at so often.
SETTLED, SETTLE_SECONDS = 0.05, 0.4
PEER = "llama-server"


@dataclass(frozen=True, slots=True)
class Contestant:
    """open: starts the server, given the targets. learns: from what it serves, and has to be given the targets."""

    name: str
    kind: str
    open: Callable[[Slo], Any]
    learns: bool = False


class LlamaServer:
    """llama.cpp's server, with continuous batching over as many slots as weft has seats."""

    def __init__(self, program: Path, gguf: Path, context: int) -> None:
        self.address = Address("127.0.0.1", free_port(), tls=False, base="")
        self._log = tempfile.NamedTemporaryFile("w+", prefix="llama-server-", suffix=".log")  # noqa: SIM115
        sizes = ["-np", str(SEATS), "-c", str(SEATS * context), "-t", str(common.cores()), "-fa", "on"]
        place = ["--host", self.address.host, "--port", str(self.address.port)]
        command = [str(program), "-m", str(gguf), *sizes, *place]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def check_alive(self) -> None:
        if self._process.poll() is not None:
            raise ServerError(f"llama-server ended:\n{Path(self._log.name).read_text()[-1500:]}")

    async def wait_ready(self) -> None:
        end = time.perf_counter() + READY_SECONDS
        while time.perf_counter() < end:
            self.check_alive()
            try:
                status, _ = await fetch(self.address, "/health")
            except (OSError, WireError):
                status = 0
            if status == 200:
                return
            await asyncio.sleep(0.1)
        raise ServerError(f"llama-server was not ready after {READY_SECONDS:g} s")

    async def settle(self) -> None:
        """Until it computes no more for clients that have hung up, which would be at the cost of who comes next."""
        before = -SETTLED
        while (now := common.cpu_seconds(self._process.pid)) - before > SETTLED * SETTLE_SECONDS:
            before = now
            await asyncio.sleep(SETTLE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def ours(model: Path, context: int) -> list[Contestant]:
    """Every policy as flags of weft serve."""
    usual = [str(model), "--max-model-len", str(context), "--max-num-seqs", str(SEATS), "--log-level", "warning"]

    def made(name: str, partition: str, chunk: int = 512, learns: bool = False) -> Contestant:
        flags = [*usual, "--partition", partition, "--max-num-batched-tokens", str(chunk)]

        def start(slo: Slo) -> Server:
            wanted = ["--slo-ttft", f"{slo.ttft}", "--slo-tpot", f"{slo.tpot}"] if learns else []
            return Server([*flags, *wanted])

        return Contestant(name, name.split()[0], start, learns)

    cores = common.cores()
    return [
        *(made(f"chunk {chunk}", "off", chunk) for chunk in CHUNKS),
        *(made(f"split {units}:{cores - units}", f"{units}:{cores - units}") for units in _units(cores)),
        made("overlap", "100%:100%"),
        made("turns 1:1", "turns:1:1"),
        *([made("pd 1:1", "pd:1:1")] if cores > 1 else []),
        made("paper", "paper", learns=True),
        made("auto", "auto", learns=True),
    ]


def _units(cores: int) -> list[int]:
    """Cores of the prefill lane: all static splits, or four where there are more."""
    if cores < 2:
        return []
    return sorted({max(1, min(cores - 1, round(cores * part))) for part in (0.25, 0.5, 0.67, 0.75)})


def peers(
    arguments: argparse.Namespace, cache: Path, plain: Path, quantised: bool, context: int
) -> tuple[list[Contestant], list[str]]:
    """llama.cpp's server, on the same weights in BF16 or in its own 4 bits; or why it is not there."""
    server, python = arguments.llama_server or llama_server.program(cache), interpreter("llamacpp", cache)
    for file in (server, python):
        if not file.exists():
            return [], [f"NO {PEER}: {file.name} is not there; benchmarks/peers/llama_server.py builds it"]
    weights = peer_models.gguf_with_words(plain, python, cache, "q4_0" if quantised else None)
    return [Contestant(PEER, "peer", lambda _: LlamaServer(server, weights, context))], []
