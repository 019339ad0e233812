"""Contestants in turn, round after round, with the machine's limits probed between turns; who fails drops out."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
from serve_cpu import FIRST_ID, Case

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from contestant import Contestant, ContestantError

from weft.devices.memory import free_memory

STEADY = 0.8  # least ratio of a limit's lowest and highest value around two turns that are compared
ENOUGH = 3  # steady rounds of a pair, where the others are left out
GIB = 2**30
WARM_INPUT, WARM_OUTPUT = 64, 4
BEST = "the best peer"
OURS = "weft"
MOST_WORDS = 300  # of a failure; the logs have all


@dataclass(frozen=True, slots=True)
class Entrant:
    """Who takes part in which cases. need: GiB of memory that must be free before it is loaded.

    open: may raise ContestantError, OSError or subprocess.SubprocessError where it cannot be had.
    """

    name: str
    cases: tuple[str, ...]
    need: float
    open: Callable[[], Contestant]


@dataclass(frozen=True, slots=True)
class Question:
    """A case, asked `repeats` times in a turn (the median counts), of ids below `vocabulary`."""

    case: Case
    vocabulary: int
    repeats: int = 1

    def prompts(self, rng: np.random.Generator, length: int | None = None) -> list[list[int]]:
        shape = (self.case.prompts, length or self.case.input)
        drawn: list[list[int]] = rng.integers(FIRST_ID, self.vocabulary, shape).tolist()
        return drawn


@dataclass(slots=True)
class Turn:
    """One case of one round. rates: tokens/s by contestant; probes: just before and just after each of them."""

    rates: dict[str, float] = field(default_factory=dict)
    probes: dict[str, tuple[dict[str, float], dict[str, float]]] = field(default_factory=dict)

    def steady(self, *names: str) -> bool:
        """Whether the machine's limits were the same for these contestants, within a fifth."""
        seen = [probe for name in names for probe in self.probes[name]]
        ranges = [[probe[limit] for probe in seen] for limit in ("bandwidth", "integers")]
        return all(min(values) >= STEADY * max(values) for values in ranges)


@dataclass(slots=True)
class Contest:
    """loaded: entrants with their processes. failed: why others are not there, or no longer."""

    probes: Contestant
    loaded: list[tuple[Entrant, Contestant]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def load(self, entrants: Sequence[Entrant], stack: ExitStack) -> None:
        for entrant in entrants:
            free = free_memory() / GIB
            if free < entrant.need:
                self._fail(entrant, f"needs about {entrant.need:g} GiB of memory, and {free:.1f} are free")
                continue
            common.say(f"loading {entrant.name} ({', '.join(entrant.cases)})")
            try:
                self.loaded.append((entrant, stack.enter_context(entrant.open())))
            except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
                self._fail(entrant, str(error))

    def warm_up(self, questions: Sequence[Question], rng: np.random.Generator) -> None:
        """First touches, lazy set-up, thread pools: a short form of every case."""
        for question in questions:
            prompts = question.prompts(rng, min(question.case.input, WARM_INPUT))
            for entrant, one in self._of(question.case):
                self._ask(entrant, one, prompts, min(question.case.output, WARM_OUTPUT))

    def turn(self, question: Question, rng: np.random.Generator, number: int) -> Turn:
        """Everybody answers the same prompts; `number` says who begins."""
        case, there = question.case, self._of(question.case)
        turn, before = Turn(), self.probes.ask("run")
        asked = [question.prompts(rng) for _ in range(question.repeats)]
        first = number % max(1, len(there))
        for entrant, one in there[first:] + there[:first]:
            answers = []
            for prompts in asked:
                answers.append(self._ask(entrant, one, prompts, case.output))
                if answers[-1] is None:
                    break
            else:
                turn.rates[entrant.name] = statistics.median(case.rate(answer) for answer in answers if answer)
            after = self.probes.ask("run")
            turn.probes[entrant.name] = (before, after)
            before = after
        return turn

    def _of(self, case: Case) -> list[tuple[Entrant, Contestant]]:
        return [pair for pair in self.loaded if case.name in pair[0].cases]

    def _ask(self, entrant: Entrant, one: Contestant, prompts: list[list[int]], output: int) -> dict[str, Any] | None:
        """The answer; None when the contestant has failed, which ends its part in the contest."""
        try:
            answer = one.ask("run", prompts=prompts, output=output)
            check_lengths(answer, len(prompts), output)
        except ContestantError as error:
            self.loaded = [pair for pair in self.loaded if pair[1] is not one]
            self._fail(entrant, str(error))
            return None
        return answer

    def _fail(self, entrant: Entrant, why: str) -> None:
        common.say(f"{entrant.name} failed: {why}")
        self.failed[entrant.name] = why if len(why) <= MOST_WORDS else f"{why[:MOST_WORDS]}..."


def check_lengths(answer: dict[str, Any], prompts: int, output: int) -> None:
    """Raise ContestantError for an answer that is not `output` tokens for each prompt."""
    lengths = answer["lengths"] if "lengths" in answer else [len(tokens) for tokens in answer["tokens"]]
    if lengths != [output] * prompts:
        raise ContestantError(f"answered with {lengths} tokens instead of {prompts} times {output}")


def figures(turns: Sequence[Turn]) -> dict[str, common.Figure]:
    """Tokens/s by contestant."""
    names = dict.fromkeys(name for turn in turns for name in turn.rates)
    return {name: common.Figure.of([turn.rates[name] for turn in turns if name in turn.rates]) for name in names}


@dataclass(frozen=True, slots=True)
class Ratio:
    """weft's rate over a peer's. rounds: in which both answered; steady: how many of these count for their probes."""

    figure: common.Figure
    rounds: int
    steady: int


def ratios(turns: Sequence[Turn]) -> dict[str, Ratio]:
    """By peer, of the rounds' own ratios: of the steady ones where they are enough, else of all."""
    found = {}
    for name in dict.fromkeys(name for turn in turns for name in turn.rates if name != OURS):
        both = [turn for turn in turns if name in turn.rates and OURS in turn.rates]
        steady = [turn for turn in both if turn.steady(OURS, name)]
        counted = steady if len(steady) >= ENOUGH else both
        figure = common.Figure.of([turn.rates[OURS] / turn.rates[name] for turn in counted])
        found[name] = Ratio(figure, len(both), len(steady))
    return found


def best_peer(turns: Sequence[Turn]) -> str | None:
    """The peer with the highest median."""
    medians = {name: figure.median for name, figure in figures(turns).items() if name != OURS}
    return max(medians, key=lambda name: medians[name]) if medians else None


def claims(wanted: dict[str, tuple[str, str]], turns: dict[str, list[Turn]]) -> dict[str, float]:
    """wanted: claim -> (case, peer or BEST). A claim whose case or peer is not there is left out."""
    found = {}
    for claim, (case, peer) in wanted.items():
        counted = turns.get(case, [])
        name = best_peer(counted) if peer == BEST else peer
        if name is not None and name in (against := ratios(counted)):
            found[claim] = against[name].figure.median
    return found


def rounds(
    contest: Contest, questions: Sequence[Question], rng: np.random.Generator, count: int, deadline: float
) -> tuple[dict[str, list[Turn]], int]:
    """Turns by case, and how many rounds were made: none begins that would end after `deadline` (time.monotonic)."""
    turns: dict[str, list[Turn]] = {question.case.name: [] for question in questions}
    length, done = 0.0, 0
    while done < count and (done == 0 or time.monotonic() + length < deadline):
        start = time.monotonic()
        for number, question in enumerate(questions):
            turn = contest.turn(question, rng, done + number)
            turns[question.case.name].append(turn)
            rates = ", ".join(f"{name} {rate:.1f}" for name, rate in turn.rates.items())
            common.say(f"round {done + 1}, {question.case.name}: {rates}")
        done += 1
        length = time.monotonic() - start
    return turns, done
