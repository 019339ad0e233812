"""What a recorded run tells of the latency models: the last fit, and how well each fit predicted what came after it.

A prediction is made with the model that was in force before the observation came in, so that it is no fit of what it is
compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from weft.core.plan import Lane
from weft.phases.auto import AutoState
from weft.phases.controller import replay
from weft.phases.latency import StepModel, TtftModel
from weft.phases.observations import Decision, Stepped
from weft.phases.recording import Recording, observer


@dataclass(frozen=True, slots=True)
class Pair:
    """what: prefill, decode, mixed (steps) or TTFT. share: of the device. Seconds."""

    what: str
    share: float
    predicted: float
    observed: float

    @property
    def error(self) -> float:
        """Relative to the observation."""
        return abs(self.predicted - self.observed) / self.observed


@dataclass(frozen=True, slots=True)
class Review:
    """asked: questions. decisions: those that were recorded. same: whether a replay makes the same ones.
    steps, ttft: the last fits, if there are any."""

    asked: int
    seconds: float
    decisions: tuple[Decision, ...]
    same: bool
    steps: StepModel | None
    ttft: TtftModel | None
    pairs: tuple[Pair, ...]

    def kinds(self) -> dict[str, list[Pair]]:
        """The pairs by what they are of, in a fixed order."""
        found: dict[str, list[Pair]] = {}
        for name in ("prefill", "decode", "mixed", "TTFT"):
            here = [one for one in self.pairs if one.what == name]
            if here:
                found[name] = here
        return found


def review(recording: Recording) -> Review:
    """Replays the run, with auto's eyes where another policy decided."""
    watcher, pairs = observer(recording), list[Pair]()
    state = watcher.start()
    watched = watcher is not recording.policy  # then the device is shared as the other one has decided
    sharing, since = recording.policy.first(0.0).sharing, 0.0
    for asked in recording.run:
        if watched:
            state = replace(state, sharing=sharing, since=since, trial=False, overload=False)
        before = state
        state, _ = watcher.decide(state, asked.seen, asked.queue, asked.now)
        if asked.decision is not None:
            sharing, since = asked.decision.sharing, asked.now
        pairs += _steps(before, [one for one in asked.seen if isinstance(one, Stepped)])
        pairs += _firsts(before, state)
    made = [one.decision for one in recording.run]
    return Review(
        asked=len(recording.run),
        seconds=recording.run[-1].now - recording.run[0].now if recording.run else 0.0,
        decisions=tuple(one for one in made if one is not None),
        same=replay(recording.policy, recording.run) == made,
        steps=state.model,
        ttft=state.ttft,
        pairs=tuple(pairs),
    )


def _steps(before: AutoState, seen: list[Stepped]) -> list[Pair]:
    if before.model is None:
        return []
    return [
        Pair(
            _what(one),
            one.share,
            before.model.of_step(one),
            one.seconds,
        )
        for one in seen
        if one.seconds > 0 and (one.prompt + one.output)
    ]


def _what(step: Stepped) -> str:
    if step.prompt and step.output:
        return Lane.MIXED.value
    return Lane.PREFILL.value if step.prompt else Lane.DECODE.value


def _firsts(before: AutoState, after: AutoState) -> list[Pair]:
    """Of the samples that have come in."""
    if before.ttft is None:
        return []
    # What is known may have been moved in time (auto.rested), and is not new for it.
    known = {(one.share, one.load, one.seconds) for one in before.firsts}
    new = [one for one in after.firsts if (one.share, one.load, one.seconds) not in known]
    predicted = [(one, before.ttft.predict(one.share, one.load)) for one in new]
    return [
        Pair("TTFT", one.share, seconds, one.seconds)
        for one, seconds in predicted
        if np.isfinite(seconds) and one.seconds > 0
    ]
