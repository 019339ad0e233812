"""The contest of benchmarks/phases.py on this machine: servers that take turns at the same loads, piece by piece.

One model after the other. Its servers are loaded once and wait; what the machine can do is measured first, by those
that stay the same, on the part `tune` of the loads: how fast one request alone is (targets are multiples of that), how
many requests/s of each load can be served, and at which part of that rate, for each load, the best of two fixed
policies still has most requests in target. Then each load is served in rounds, at that rate and at others beside it,
with requests that nobody has seen before, by all in turn, in an order that is drawn each time. Those that learn get a
piece first that does not count. There are as many rounds as fit in the time, at least one; from the second on, without
those that are far behind the best by then, at all rates of the load together, and decide no claim.

A claim is about a load at all its rates together: a policy that is chosen in hindsight is chosen for the load.

What was measured is written at once to FILE.pieces, so that a run that was killed goes on with --resume.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import quantised_models
from phases_loads import CHANGING, Load, Mix, Scale, load_all
from phases_servers import PEER, SEATS, UNTUNED, Contestant, ours, peers
from phases_tables import FIXED, Found, Row, against_best, claims, in_order, no_room, pooled, ratios, row, show

import models
from weft.bench.client import Target, first_model
from weft.bench.load import run_load
from weft.bench.stats import Record, Slo, summarise
from weft.bench.traffic import Shot
from weft.models.families import read_config

ALONE, ALONE_OUTPUT = 5, 32  # requests of mean length, one after another; tokens of their answers
PRESSED = 32  # requests at once, to see what the machine can do
# Targets as multiples of one request alone, of its TTFT and of its TPOT: the paper's.
TTFT_TIMES, TPOT_TIMES = 7.5, 10.0
# The rate is looked for with these, in so many tries, until the better one has such a part of its requests in target.
PROBES, TRIES, RATE, FASTER, SLOWER, WANTED = ("chunk 32", "overlap"), 3, 0.7, 1.2, 0.8, (0.65, 0.9)
AGAIN = 3  # times at most that a piece is measured in which others take too much of the CPU, or the machine is slow
# A machine that is a part of a larger one is slower now and then. After each piece so many requests are served alone,
# one after another, of so many tokens; it is slow when they take so many times as long as usual.
PROBE, PROBE_TOKENS, SLOW, USUAL = 3, (64, 12), 1.15, 30
BEHIND = 0.15  # of the requests: who has so many fewer in target than the best is left out of the next round
ROUNDS = 2.0  # that a piece's length is chosen for; those after the first are shorter
ARRIVING = 0.75  # of a piece's time; in the rest those are served that are still there
LONGER = {CHANGING: 1.5}  # pieces of this load have so many times the others' length
PATIENCE = 1.5  # times what a request may take within both targets; after that the client hangs up


@dataclass(frozen=True, slots=True)
class Fitted:
    """How loads are fitted to a model. rates: that each is offered at, times the one that is found for it. part: of the
    time, beside others."""

    azure: Scale
    mooncake: Scale
    mixes: tuple[Mix, ...]
    rates: tuple[float, ...]
    part: float

    @property
    def context(self) -> int:
        return sum(self.azure.longest)


# The rates of the mixes count only beside each other: a load is scaled to what the machine can do.
FITS = {
    "builtin": Fitted(
        Scale(1 / 4, 1 / 4, (900, 120)),
        Scale(1 / 32, 1 / 8, (900, 120)),
        (Mix(4.0, 600, 10), Mix(6.0, 60, 80), Mix(4.0, 600, 10)),
        (0.7, 1.0),
        0.5,
    ),
    "llama-1.1b": Fitted(
        Scale(1 / 16, 1 / 16, (200, 32)),
        Scale(1 / 100, 1 / 32, (200, 32)),
        (Mix(1.0, 150, 4), Mix(2.5, 15, 32), Mix(1.0, 150, 4)),
        (1.0,),
        0.5,
    ),
}
MODELS = tuple(FITS)


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured first. ttft, tpot: of one request alone. rates: of each load, requests/s that can be served.
    parts: those of them that are offered, at the factor 1. seconds: of arrivals in a piece."""

    ttft: float
    tpot: float
    rates: dict[str, float]
    parts: dict[str, float]
    seconds: float = 0.0

    @property
    def slo(self) -> Slo:
        return Slo(TTFT_TIMES * self.ttft, TPOT_TIMES * self.tpot)


class Pieces:
    """What was measured, a JSON object each. path: where they are kept, if anywhere. Raises SystemExit for a file that
    is there and shall not be gone on with."""

    def __init__(self, path: Path | None, resume: bool) -> None:
        self._path = path
        self._all: list[dict[str, Any]] = []
        if path is not None and path.exists():
            if not resume:
                raise SystemExit(f"{path} is of a run that was not ended: give --resume to go on, or remove it")
            for line in path.read_text().splitlines():
                try:
                    self._all.append(json.loads(line))
                except ValueError:  # the last one, which was being written when the run was killed
                    break
            path.write_text("".join(json.dumps(one) + "\n" for one in self._all))

    def add(self, **values: Any) -> None:
        self._all.append(values)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(values) + "\n")

    def find(self, **values: Any) -> list[dict[str, Any]]:
        return [one for one in self._all if all(one.get(key) == value for key, value in values.items())]

    def close(self) -> None:
        """All is told elsewhere by now."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def run(arguments: argparse.Namespace) -> Found:
    watch = common.LoadWatch()
    path = None if arguments.json is None else arguments.json.with_suffix(".pieces")
    pieces = Pieces(path, arguments.resume)
    whole = sum(FITS[model].part for model in arguments.cpu)
    notes = []
    for model in arguments.cpu:
        minutes = (0.7 if arguments.quick else arguments.minutes) * FITS[model].part / whole
        notes += Contest(model, arguments, pieces, 60 * minutes).run()
    rows, targets = [], {}
    for model in arguments.cpu:
        machine = _machine(pieces, model)
        rows += _rows(pieces, model, machine)
        targets[model] = (machine.slo.ttft or 0.0, machine.slo.tpot or 0.0)
        notes += _notes(pieces, model, machine)
    notes += [*no_room(pooled(rows)), *against_best(pooled(rows))]
    if (note := common.load_note(watch)) is not None:
        notes.append(note)
    pieces.close()
    return Found(rows, _claims(rows), notes, targets)


def _machine(pieces: Pieces, model: str) -> Machine:
    return Machine(**pieces.find(model=model, what="machine")[0]["values"])


def _rows(pieces: Pieces, model: str, machine: Machine) -> list[Row]:
    rows = []
    for load, factor in _cells(pieces, model, machine):
        every = pieces.find(model=model, what="piece", load=load, factor=factor)
        for name, kind in dict.fromkeys((one["policy"], one["kind"]) for one in every):
            here = [one for one in every if one["policy"] == name]
            found = summarise(_joined(here), machine.slo)
            rounds = {str(one["round"]): _met(one, machine.slo) for one in here}
            rows.append(row(model, load, factor * machine.parts[load], name, kind, found, None) | {"rounds": rounds})
    return in_order(rows)


def _cells(pieces: Pieces, model: str, machine: Machine) -> list[tuple[str, float]]:
    """The loads, each with the factors of its rate that it was served at."""
    every = pieces.find(model=model, what="piece")
    return [
        (load, factor)
        for load in machine.rates
        for factor in sorted({one["factor"] for one in every if one["load"] == load})
    ]


def _met(piece: dict[str, Any], slo: Slo) -> tuple[int, int]:
    """Requests in target, of how many."""
    count = len(piece["records"])
    return round((summarise(_joined([piece]), slo).attainment or 0.0) * count), count


def _joined(pieces: Sequence[dict[str, Any]]) -> list[Record]:
    """The records of pieces as if one had followed the other."""
    found, start = [], 0.0
    for piece in pieces:
        for due, sent, first, last, ended, *rest in piece["records"]:
            times = [None if value is None else start + value for value in (due, sent, first, last, ended)]
            found.append(Record(*times, rest[0], rest[1], error=rest[2]))  # type: ignore[arg-type]
        start += piece["seconds"]
    return found


def _claims(rows: Sequence[Row]) -> dict[str, float]:
    """Of each load at all its rates together."""
    whole = pooled(rows)
    found = claims(whole)
    for name, other in (("auto_vs_llama_server", PEER), ("auto_vs_chunked_untuned", UNTUNED)):
        known = ratios(whole, lambda one, other=other: one["policy"] == other)  # type: ignore[misc]
        if known:
            found[name] = float(np.median(list(known.values())))
    return found


def beside_chosen(pieces: Pieces, model: str, machine: Machine) -> dict[str, float]:
    """By load, auto against the fixed policy that was best in the other rounds, round by round: what somebody had who
    knew which one is best, but not which one will be lucky. Of several that are equally good, the best in hindsight is
    always ahead of each."""
    found = {}
    for load in machine.rates:
        met: dict[str, dict[int, tuple[int, int]]] = {}  # by policy and round: requests in target, of how many
        for piece in pieces.find(model=model, what="piece", load=load):
            if piece["kind"] in FIXED or piece["kind"] == "auto":
                rounds = met.setdefault(piece["policy"], {})
                before, more = rounds.get(piece["round"], (0, 0)), _met(piece, machine.slo)
                rounds[piece["round"]] = before[0] + more[0], before[1] + more[1]
        auto = met.pop("auto", {})
        ours = theirs = 0.0
        for number, (own, _) in auto.items():
            there = {name: rounds for name, rounds in met.items() if number in rounds and len(rounds) > 1}
            if there:
                ours += own
                theirs += there[max(there, key=lambda name: _elsewhere(there[name], number))][number][0]
        if theirs:
            found[load] = ours / theirs
    return found


def _elsewhere(rounds: dict[int, tuple[int, int]], number: int) -> float:
    """The part in target in all rounds but this one."""
    others = [one for key, one in rounds.items() if key != number]
    return sum(met for met, _ in others) / max(sum(count for _, count in others), 1)


def _notes(pieces: Pieces, model: str, machine: Machine) -> list[str]:
    slo, rounds = machine.slo, len({one["round"] for one in pieces.find(model=model, what="piece")})
    rates = ", ".join(f"{name} {machine.parts[name]:.2f} of {rate:.2f}" for name, rate in machine.rates.items())
    factors = sorted({factor for _, factor in _cells(pieces, model, machine)})
    return [
        f"{model}: one request alone has TTFT {1e3 * machine.ttft:.1f} ms and TPOT {1e3 * machine.tpot:.2f} ms; "
        f"targets TTFT {slo.ttft:.3f} s and TPOT {slo.tpot:.4f} s",
        f"{model}: requests/s that are offered, of those that {UNTUNED} serves at most: {rates}; each "
        f"{', '.join(f'{one:g}' for one in factors)} times; for {machine.seconds:.1f} s in each of {rounds} rounds "
        f"({LONGER[CHANGING]:g} times as long for {CHANGING})",
        f"{model}: auto beside the fixed policy that was best in the other rounds: "
        + ", ".join(f"{load} {ratio:.2f}" for load, ratio in beside_chosen(pieces, model, machine).items()),
    ]


class Contest:
    """Of one model. seconds: that it may take in all, with what earlier runs took."""

    def __init__(self, model: str, arguments: argparse.Namespace, pieces: Pieces, seconds: float) -> None:
        self._began = time.monotonic()
        cache = common.cache_folder(arguments.cache)
        plain = models.builtin() if model == "builtin" else models.random_llama(cache)
        served = plain if model == "builtin" else quantised_models.fmpq(plain, cache)
        self._model, self._pieces, self._seconds = model, pieces, seconds
        self._fitted, self._vocabulary = FITS[model], read_config(plain).vocabulary
        found, self._missing = peers(arguments, cache, plain, model != "builtin", self._fitted.context)
        self._entrants = [*ours(served, self._fitted.context), *found]
        if arguments.only:
            kept = {*arguments.only, UNTUNED}
            self._entrants = [one for one in self._entrants if {one.name, one.kind} & kept]
        self._factors = tuple(arguments.rates or ((1.0,) if arguments.quick else self._fitted.rates))
        every = load_all(arguments.traces, self._fitted.azure, self._fitted.mooncake, self._fitted.mixes)
        self._loads = [load for load in every if not arguments.loads or load.name in arguments.loads]
        self._servers: dict[str, Any] = {}
        self._probes: list[float] = []

    def run(self) -> list[str]:
        """Everything that has not been measured yet; what there is to say of it."""
        spent = sum(one["seconds"] for one in self._pieces.find(model=self._model, what="piece"))
        end = self._began + max(0.0, self._seconds - spent)
        if spent and time.monotonic() + 0.1 * self._seconds > end:
            return self._missing
        with ExitStack() as stack:
            known = self._pieces.find(model=self._model, what="machine")
            fixed = [one for one in self._entrants if not one.learns]
            self._open(stack, fixed, Slo())
            machine = _machine(self._pieces, self._model) if known else asyncio.run(self._measure(end))
            self._open(stack, [one for one in self._entrants if one.learns], machine.slo)
            asyncio.run(self._rounds(machine, end))
        return self._missing

    def _open(self, stack: ExitStack, entrants: Sequence[Contestant], slo: Slo) -> None:
        common.say(f"{self._model}: {len(entrants)} servers start")
        self._servers |= {one.name: stack.enter_context(one.open(slo)) for one in entrants}
        asyncio.run(self._ready([one.name for one in entrants]))

    async def _ready(self, names: Sequence[str]) -> None:
        """All loaded, and each asked twice, so that nothing is done for the first time later."""
        warm = Shot(0.0, tuple(range(16, 80)), 64, 8)
        for name in names:
            await self._servers[name].wait_ready()
            for record in await run_load(await self._target(name), [warm, warm], 1, _ignore):
                if record.error is not None:
                    raise SystemExit(f"{name} failed a warm-up: {record.error}")

    async def _target(self, name: str, timeout: float = 120.0) -> Target:
        address = self._servers[name].address
        extra = {"temperature": 0.0, "ignore_eos": True}
        return Target(address, await first_model(address), extra=extra, timeout=timeout)

    # -- what the machine can do -----------------------------------------------------------------------------------

    async def _measure(self, end: float) -> Machine:
        target = await self._target(UNTUNED)
        some = {load.name: self._some(load) for load in self._loads}
        every = [shot for shots in some.values() for shot in shots]
        mean = float(np.mean([shot.input_tokens for shot in every]))
        usual = sorted(every, key=lambda shot: abs(shot.input_tokens - mean))[:ALONE]
        usual = [replace(shot, due=0.0, output_tokens=ALONE_OUTPUT) for shot in usual]
        alone = await run_load(target, usual, 1, _ignore)
        for record in alone:
            if record.error is not None or record.ttft is None or record.tpot is None:
                raise SystemExit(f"a request alone failed: {record.error}")
        ttft, tpot = (float(np.median([getattr(one, name) for one in alone])) for name in ("ttft", "tpot"))
        rates = {}
        for name, shots in some.items():
            found = summarise(await run_load(target, [replace(one, due=0.0) for one in shots], SEATS, _ignore))
            rates[name] = found.request_throughput
            common.say(f"{self._model}, {name}: {rates[name]:.2f} requests/s at most")
        weights = len(self._entrants) * len(self._factors) * sum(LONGER.get(load.name, 1.0) for load in self._loads)
        seconds = ARRIVING * (end - time.monotonic()) / (ROUNDS * weights)
        machine = Machine(ttft, tpot, rates, {}, max(1.0, 0.72 * seconds))  # less for what comes before the rounds
        machine = replace(machine, parts={load.name: await self._part(load, machine) for load in self._loads})
        self._pieces.add(model=self._model, what="machine", values=asdict(machine))
        return machine

    def _some(self, load: Load) -> list[Shot]:
        """Some of a load's requests, spread over all of it, for it may change."""
        shots = load.shots("tune", 1.0, 120.0, self._vocabulary)
        return shots[:: max(1, len(shots) // PRESSED)][:PRESSED]

    async def _part(self, load: Load, machine: Machine) -> float:
        """The part of what is possible at which the better of two fixed policies has most requests in target."""
        rate, names = RATE, [one.name for one in self._entrants if one.name in PROBES]
        for piece in range(TRIES if names else 0):
            offered, met = replace(machine, parts={load.name: rate}), []
            shots = self._shots(load, offered, "tune", 1 + piece)
            for name in names if shots else ():
                met.append(summarise(await self._serve(name, shots, offered), machine.slo).attainment or 0.0)
            best = max(met, default=0.0)
            common.say(f"{self._model}, {load.name}: {rate:.2f} of what is possible: {best:.0%} in target")
            if WANTED[0] <= best <= WANTED[1] or piece + 1 == TRIES:
                break
            rate *= FASTER if best > WANTED[1] else SLOWER
        return rate

    # -- the rounds ------------------------------------------------------------------------------------------------

    async def _rounds(self, machine: Machine, end: float) -> None:
        places = [(load, factor) for load in self._loads for factor in self._factors]
        total = len(places) * len(self._entrants)
        longest = machine.seconds * sum(LONGER.get(load.name, 1.0) for load, _ in places) / ARRIVING
        common.say(
            f"{self._model}: a round has {total} pieces and takes about {longest * len(self._entrants):.0f} s; there "
            f"are {end - time.monotonic():.0f} s"
        )
        for one in self._entrants:
            if one.learns:
                shots = self._shots(self._loads[-1], machine, "tune", 9)
                await self._serve(one.name, shots, machine)
        turn = 0
        while True:
            began, measured = time.monotonic(), 0
            for number, (load, factor) in enumerate(places):
                there = self._left(load, machine, turn)
                for place in np.random.default_rng([11, turn, number]).permutation(len(there)):
                    measured += await self._piece(there[place], load, factor, machine, turn)
                rate = factor * machine.parts[load.name]
                rows = [one for one in self._so_far(load, machine) if one["rate"] == rate]
                print(f"\n{self._model}, {load.name} at {factor * machine.parts[load.name]:.2f}, {turn + 1} rounds")
                print(show(rows), flush=True)
                common.say(f"{self._model}: {max(0.0, end - time.monotonic()):.0f} s left")
            turn += 1
            next_round = sum(len(self._left(load, machine, turn)) for load, _ in places)
            needed = (time.monotonic() - began) * next_round / max(measured, 1)
            if measured and time.monotonic() + needed > end:
                return

    def _left(self, load: Load, machine: Machine, turn: int) -> list[Contestant]:
        """All in the first round, then those that are not far behind at all rates together."""
        rows = pooled(self._so_far(load, machine)) if turn else []
        return [one for one in self._entrants if not _behind(one.name, rows)]

    def _so_far(self, load: Load, machine: Machine) -> list[Row]:
        return [one for one in _rows(self._pieces, self._model, machine) if one["trace"] == load.name]

    async def _piece(self, one: Contestant, load: Load, factor: float, machine: Machine, turn: int) -> bool:
        """Whether it had to be measured: not if an earlier run has done so."""
        key = {"model": self._model, "what": "piece", "load": load.name, "factor": factor}
        key |= {"round": turn, "policy": one.name}
        if self._pieces.find(**key):
            return False
        for again in range(AGAIN):
            shots = self._shots(load, machine, "report", turn, factor, again)
            if not shots:  # a trace has pauses
                return False
            began, watch = time.monotonic(), common.LoadWatch()
            records = await self._serve(one.name, shots, machine)
            seconds, others = time.monotonic() - began, watch.other_load()[0]
            self._servers[one.name].check_alive()
            if one.name == PEER:
                await self._servers[PEER].settle()
            slow = await self._slow()
            if others <= common.OTHER_LOAD_LIMIT and slow <= SLOW:
                break
            common.say(
                f"{self._model}, {load.name}, {one.name}: others took {others:.0%} of the CPU, and a request alone "
                f"takes {slow:.2f} times as long as usual; once more"
            )
        kept = [
            (r.due, r.sent, r.first, r.last, r.ended, r.input_tokens, r.output_tokens, r.error)
            for r in records
        ]  # fmt: skip
        self._pieces.add(**key, kind=one.kind, seconds=seconds, others=others, slow=slow, records=kept)
        return True

    async def _slow(self) -> float:
        """How many times as long as usual a request alone takes now, or took before the last piece."""
        before = self._probes[-1:]
        rng = np.random.default_rng([7, len(self._probes)])
        prompts = rng.integers(0, self._vocabulary, (PROBE, PROBE_TOKENS[0])).tolist()
        shots = [Shot(0.0, tuple(prompt), PROBE_TOKENS[0], PROBE_TOKENS[1]) for prompt in prompts]
        records = await run_load(await self._target(UNTUNED), shots, 1, _ignore)
        if any(one.error is not None for one in records):
            raise SystemExit(f"a request alone failed: {records[0].error}")
        self._probes.append(min(one.ended - one.sent for one in records))
        return max([*before, self._probes[-1]]) / float(np.median(self._probes[-USUAL:]))

    def _shots(
        self, load: Load, machine: Machine, part: str, turn: int, factor: float | None = None, again: int = 0
    ) -> list[Shot]:
        """So many requests/s of a load for so long: the trace is run faster or slower as a whole. factor: one of the
        contest's, which are served one after the other in every turn; without one there are no others."""
        base = len(load.make(part, 1.0, 120.0)) / 120.0
        seconds = machine.seconds * LONGER.get(load.name, 1.0)
        rate = machine.parts[load.name] * machine.rates[load.name] / base
        if factor is None:
            return load.shots(part, rate, seconds, self._vocabulary, turn)
        number, every = self._factors.index(factor), self._factors
        before = rate * (turn * sum(every) + sum(every[:number]))
        return load.shots(part, factor * rate, seconds, self._vocabulary, turn * len(every) + number, before, again)

    async def _serve(self, name: str, shots: Sequence[Shot], machine: Machine) -> list[Record]:
        slo, longest = machine.slo, self._fitted.azure.longest[1]
        timeout = PATIENCE * ((slo.ttft or 0.0) + longest * (slo.tpot or 0.0))
        return await run_load(await self._target(name, timeout), shots, None, _ignore)


def _behind(name: str, rows: Sequence[Row]) -> bool:
    """Whether a policy is that far behind the best. Those that a claim is about never are, nor is who was not there."""
    found = {one["policy"]: one["attainment"] for one in rows}
    return name not in ("auto", UNTUNED) and name in found and found[name] < max(found.values()) - BEHIND


def _ignore(record: Record) -> None:
    """Nobody is told."""
