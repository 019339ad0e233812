"""What a controller is told, and what it decides: plain frozen data, so that a run can be recorded and replayed.

Shares are fractions of the device, in (0, 1]. Times are seconds on the engine's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from weft.core.plan import Lane, Sharing, StepLaw


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request came, and was accepted or found no place. tokens: of its prompt."""

    at: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Stepped:
    """A lane finished a step. seconds: of the device, and of what comes before it while the lane has work.

    prompt, output: tokens of prompts, and tokens that follow a sequence's last one, which the step computed.
    context: KV slots that it read. share: of the device, when it began. rival: the part of its time in which the other
    lane computed, too, 0 to 1. parts: turns that it took. read: of the context, what prompts read; pairs: of a token of
    a prompt and a slot that it attends to.
    """

    at: float
    lane: Lane
    seconds: float
    prompt: int
    output: int
    context: int
    share: float
    rival: float = 0.0
    parts: int = 1
    read: int = 0
    pairs: int = 0


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A request got its first token."""

    at: float
    arrived: float

    @property
    def ttft(self) -> float:
        return self.at - self.arrived


@dataclass(frozen=True, slots=True)
class Finished:
    """A request ended well. ttft: to its first token. waited: of that, until its first step.
    tpot: mean seconds between the tokens of a sequence; None for one token. output: tokens of one sequence."""

    at: float
    arrived: float
    ttft: float
    waited: float
    tpot: float | None
    output: int


Observation = Arrived | Stepped | FirstToken | Finished


@dataclass(frozen=True, slots=True)
class Queue:
    """Where the engine stands when it asks.

    waiting: (when it arrived, tokens still to compute) of the sequences without a first token, most urgent first.
    decoding: sequences past it. context: tokens of those, in all. answers: (seconds since the first token, tokens since
    then) of those; not of all, where they are very many.
    """

    waiting: tuple[tuple[float, int], ...] = ()
    decoding: int = 0
    context: int = 0
    answers: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """From now on the device is shared so. reason: one sentence, for the log.

    hold: tokens of prompts that are computed within `within` seconds, those that a first token may take; None: not
    known. A prompt that has waited for so long that nothing is left to compute it in lets those pass that come in the
    next `back` seconds. shed: one that finds so many before it that this is bound to happen is refused. cost: of a
    step, where it is known. ttft, tpot: mean seconds that are predicted; None: not known, or no end in sight.
    """

    at: float
    sharing: Sharing
    reason: str
    hold: int | None = None
    within: float = 0.0
    back: float = 0.0
    shed: bool = False
    cost: StepLaw | None = None
    ttft: float | None = None
    tpot: float | None = None


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds that the first token, and each later one, may take."""

    ttft: float
    tpot: float
