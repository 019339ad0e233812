"""The contest of benchmarks/phases.py on this machine: servers, one process each, that take turns at the same loads.

All are loaded once and wait; the order in which they are asked rotates from load to load. Rates and targets follow from
what the machine can do at the time: the server with chunks of 512 is measured first, alone and under pressure.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import common
import numpy as np
import peer_models
import quantised_models
from phases_loads import CHANGING, Load, Mix, Scale, changing, recorded
from phases_tables import Row, claims, draw, no_room, ratios, row, show
from serving import READY_SECONDS, STOP_SECONDS, Server, ServerError, free_port

import models
from weft.bench.client import Target, fetch, first_model
from weft.bench.load import run_load
from weft.bench.stats import Record, Slo, summarise
from weft.bench.traffic import Shot
from weft.bench.wire import Address, WireError
from weft.models.families import read_config

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
import llama_server
from environments import interpreter

MODELS = ("builtin", "llama-1.1b")
SEATS = 32
UNTUNED = "chunk 512"
PEER = "llama-server"
RATES = {False: (0.6, 0.9), True: (0.8,)}  # of what the machine can do; with --quick
ALONE, ALONE_OUTPUT = 5, 32  # requests of mean length, one after another; tokens of their answers
PRESSED = 40  # at once, at most
# Targets as multiples of one request alone, of its TTFT and of its TPOT: the paper's.
TTFT_TIMES, TPOT_TIMES = 7.5, 10.0
# Of a cell's time, the part in which requests arrive; the rest is for those that are still there.
ARRIVING = 0.7
PATIENCE = 1.0  # cells' times that a request may take, before it counts as failed


@dataclass(frozen=True, slots=True)
class Fitted:
    """How loads are fitted to a model. output: most tokens of an answer; context: of both."""

    azure: Scale
    mooncake: Scale
    mixes: tuple[Mix, ...]
    loads: tuple[str, ...]

    @property
    def context(self) -> int:
        return sum(self.azure.longest)


def _scales(input: float, output: float, longest: tuple[int, int]) -> tuple[Scale, Scale]:
    return Scale(input, output, longest, 1.0), Scale(input / 8, output / 2, longest, 1.0)


# The rates of the mixes are relative: all are scaled to what the machine can do.
FITS = {
    "builtin": Fitted(*_scales(1 / 4, 1 / 4, (900, 120)), (Mix(4.0, 600, 10), Mix(4.0, 60, 80), Mix(4.0, 600, 10)), ()),
    "llama-1.1b": Fitted(
        *_scales(1 / 8, 1 / 8, (400, 48)),
        (Mix(1.0, 300, 6), Mix(1.0, 30, 40), Mix(1.0, 300, 6)),
        ("azure2023_conv", CHANGING),
    ),
}


class Served(Protocol):
    """What takes part: a server process."""

    address: Address

    async def wait_ready(self) -> None: ...

    def check_alive(self) -> None: ...


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


@dataclass(frozen=True, slots=True)
class Contestant:
    """open: starts the server, given the targets."""

    name: str
    kind: str
    open: Callable[[Slo], Any]


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured first. ttft, tpot: of one request alone. rates: of each load, requests/s that it can serve."""

    ttft: float
    tpot: float
    rates: dict[str, float]

    @property
    def slo(self) -> Slo:
        return Slo(TTFT_TIMES * self.ttft, TPOT_TIMES * self.tpot)


def main(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    watch = common.LoadWatch()
    cache = common.cache_folder(arguments.cache)
    plain = models.builtin() if arguments.cpu == "builtin" else models.random_llama(cache)
    served = plain if arguments.cpu == "builtin" else quantised_models.fmpq(plain, cache)
    fitted, vocabulary = FITS[arguments.cpu], read_config(plain).vocabulary
    found, notes = _peer(arguments, cache, plain, fitted.context)
    entrants = [*_ours(served, fitted.context), *found]
    if arguments.only:
        entrants = [one for one in entrants if {one.name, one.kind} & set(arguments.only)]
    chosen = _loads(arguments, fitted)
    untuned = next(one for one in _ours(served, fitted.context) if one.name == UNTUNED)
    machine = asyncio.run(_measure(untuned, chosen, vocabulary))
    rates = tuple(arguments.rates or RATES[arguments.quick])
    with ExitStack() as stack:
        servers = {one.name: stack.enter_context(one.open(machine.slo)) for one in entrants}
        asyncio.run(_ready(servers, vocabulary))
        left = 60 * (0.7 if arguments.quick else arguments.minutes) - (time.monotonic() - started)
        cell = max(2.0, left / (len(chosen) * len(rates) * len(entrants)))
        rows = asyncio.run(_contest(entrants, servers, chosen, rates, machine, cell, vocabulary))
    notes += _notes(arguments, machine, cell) + no_room(rows)
    if (note := common.load_note(watch)) is not None:
        notes.append(note)
    if arguments.plot is not None:
        draw(rows, arguments.plot, f"CPU, {arguments.cpu}", (machine.slo.ttft or 0.0, machine.slo.tpot or 0.0))
    common.report(arguments, _claims(rows), rows, notes)


def _ours(model: Path, context: int) -> list[Contestant]:
    """Every policy as flags of weft serve."""
    usual = [str(model), "--max-model-len", str(context), "--max-num-seqs", str(SEATS), "--log-level", "warning"]

    def made(name: str, kind: str, partition: str, chunk: int = 512, targets: bool = False) -> Contestant:
        flags = [*usual, "--partition", partition, "--max-num-batched-tokens", str(chunk)]

        def start(slo: Slo) -> Server:
            wanted = ["--slo-ttft", f"{slo.ttft}", "--slo-tpot", f"{slo.tpot}"] if targets else []
            return Server([*flags, *wanted])

        return Contestant(name, kind, start)

    return [
        *(made(f"chunk {chunk}", "chunk", "off", chunk) for chunk in (64, 128, 256, 512)),
        *(made(f"split {p}:{common.cores() - p}", "split", f"{p}:{common.cores() - p}") for p in _units()),
        made("overlap", "overlap", "100%:100%"),
        made("turns 1:1", "turns", "turns:1:1"),
        *([made("pd 1:1", "pd", "pd:1:1")] if common.cores() > 1 else []),
        made("paper", "paper", "paper", targets=True),
        made("auto", "auto", "auto", targets=True),
    ]


def _units() -> list[int]:
    """Cores of the prefill lane: all static splits, or four where there are more."""
    cores = common.cores()
    return (
        sorted({max(1, min(cores - 1, round(cores * part))) for part in (0.25, 0.5, 0.67, 0.75)}) if cores > 1 else []
    )


def _peer(arguments: argparse.Namespace, cache: Path, plain: Path, context: int) -> tuple[list[Contestant], list[str]]:
    """llama.cpp's server, on the same weights in BF16 or in its own 4 bits; or why it is not there."""
    server, python = arguments.llama_server or llama_server.program(cache), interpreter("llamacpp", cache)
    for file in (server, python):
        if not file.exists():
            return [], [f"NO {PEER}: {file.name} is not there; benchmarks/peers/llama_server.py builds it"]
    kind = None if arguments.cpu == "builtin" else "q4_0"
    weights = peer_models.gguf_with_words(plain, python, cache, kind)
    return [Contestant(PEER, "peer", lambda _: LlamaServer(server, weights, context))], []


def _loads(arguments: argparse.Namespace, fitted: Fitted) -> list[Load]:
    found = []
    for path in arguments.traces:
        load = recorded(path, fitted.azure)
        found.append(recorded(path, fitted.mooncake) if load.caching else load)
    found.append(changing(fitted.mixes))
    names = arguments.loads or fitted.loads
    return [load for load in found if not names or load.name in names]


# -- what the machine can do -----------------------------------------------------------------------------------------


async def _measure(untuned: Contestant, chosen: Sequence[Load], vocabulary: int) -> Machine:
    """One request alone, and each load's requests all at once."""
    with untuned.open(Slo()) as server:
        await server.wait_ready()
        target = await _target(server)
        whole = {load.name: _some(load, vocabulary) for load in chosen}
        every = [shot for shots in whole.values() for shot in shots]
        mean = float(np.mean([shot.input_tokens for shot in every]))
        usual = min(every, key=lambda shot: abs(shot.input_tokens - mean))
        middle = [replace(usual, due=0.0, output_tokens=ALONE_OUTPUT)]
        await run_load(target, middle, 1, _ignore)
        singles = [(await run_load(target, middle, 1, _ignore))[0] for _ in range(ALONE)]
        rates = {}
        for name, shots in whole.items():
            found = summarise(await run_load(target, [replace(one, due=0.0) for one in shots], SEATS, _ignore))
            rates[name] = found.request_throughput
            common.say(
                f"{name}: {found.request_throughput:.2f} requests/s at most, {found.output_throughput:.0f} tokens/s"
            )
    for record in singles:
        if record.error is not None or record.ttft is None or record.tpot is None:
            raise SystemExit(f"a request alone failed: {record.error}")
    ttfts, tpots = [one.ttft for one in singles if one.ttft], [one.tpot for one in singles if one.tpot]
    return Machine(float(np.median(ttfts)), float(np.median(tpots)), rates)


def _some(load: Load, vocabulary: int) -> list[Shot]:
    """Some of a load's requests, of the part that nothing is shown of; spread over all of it, for it may change."""
    shots = load.make("tune", 1.0, 120.0, vocabulary)
    return shots[:: max(1, len(shots) // PRESSED)][:PRESSED]


async def _target(server: Served, timeout: float = 120.0) -> Target:
    name = await first_model(server.address)
    return Target(server.address, name, extra={"temperature": 0.0, "ignore_eos": True}, timeout=timeout)


def _ignore(record: Record) -> None:
    """Nobody is told."""


async def _ready(servers: dict[str, Any], vocabulary: int) -> None:
    """All loaded, and each asked twice, so that nothing is done for the first time later."""
    for name, server in servers.items():
        await server.wait_ready()
        target = await _target(server)
        warm = Shot(0.0, tuple(range(16, min(vocabulary, 80))), min(vocabulary, 80) - 16, 8)
        for record in await run_load(target, [warm, warm], 1, _ignore):
            if record.error is not None:
                raise SystemExit(f"{name} failed a warm-up: {record.error}")


# -- the contest -----------------------------------------------------------------------------------------------------


async def _contest(
    entrants: Sequence[Contestant],
    servers: dict[str, Any],
    chosen: Sequence[Load],
    rates: Sequence[float],
    machine: Machine,
    cell: float,
    vocabulary: int,
) -> list[Row]:
    rows: list[Row] = []
    for number, load in enumerate(chosen):
        for rate in rates:
            shots = _shots(load, rate * machine.rates[load.name], ARRIVING * cell, vocabulary)
            here = []
            turn = (number * len(rates) + len(rows)) % len(entrants)
            for one in [*entrants[turn:], *entrants[:turn]]:
                common.say(f"{load.name} at {rate:g}: {len(shots)} requests, {one.name}")
                target = await _target(servers[one.name], PATIENCE * cell)
                records = await run_load(target, shots, None, _ignore)
                servers[one.name].check_alive()
                found = summarise(records, machine.slo)
                here.append(row("cpu", load.name, rate, one.name, one.kind, found, None))
            here.sort(key=lambda one: [entrant.name for entrant in entrants].index(one["policy"]))
            wanted = rate * machine.rates[load.name]
            print(f"\n{load.name}, {rate:g} of what is possible: {len(shots)} requests, {wanted:.2f}/s")
            print(show(here), flush=True)
            rows += here
    return rows


def _shots(load: Load, rate: float, seconds: float, vocabulary: int) -> list[Shot]:
    """So many requests/s of a load for so long: the trace is run faster or slower as a whole."""
    base = len(load.make("report", 1.0, 120.0, vocabulary)) / 120.0
    return load.make("report", rate / base, seconds, vocabulary)


def _claims(rows: Sequence[Row]) -> dict[str, float]:
    found = claims(rows)
    for name, other in (("auto_vs_llama_server", PEER), ("auto_vs_chunked_untuned", UNTUNED)):
        known = ratios(rows, lambda one, other=other: one["policy"] == other)  # type: ignore[misc]
        if known:
            found[name] = float(np.median(list(known.values())))
    return found


def _notes(arguments: argparse.Namespace, machine: Machine, cell: float) -> list[str]:
    slo = machine.slo
    return [
        f"{arguments.cpu}: one request alone has TTFT {1e3 * machine.ttft:.1f} ms and TPOT {1e3 * machine.tpot:.2f} ms",
        f"targets: TTFT {slo.ttft:.3f} s and TPOT {slo.tpot:.4f} s",
        "requests/s that chunks of 512 serve at most: "
        + ", ".join(f"{name} {rate:.2f}" for name, rate in machine.rates.items()),
        f"{ARRIVING * cell:.1f} s of arrivals for each policy, load and rate; auto_vs_llama_server and "
        "auto_vs_chunked_untuned are medians over loads and rates, the others the least",
    ]
