"""The controller: gathers what the engine observes, asks a policy now and then, and can record both for a replay.

A policy is a pure function, (state, observations, queue, now) -> (state, decision): no clock, no chance. So a recorded
run decides the same again, and a changed policy can be tried on what was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from weft.core.plan import Sharing
from weft.phases.observations import Decision, Observation, Queue


class Policy(Protocol):
    """Decides how two lanes share a device. Its state is frozen data of its own."""

    def start(self) -> Any:
        """The state before anything was seen."""
        ...

    def first(self, now: float) -> Decision:
        """How to begin."""
        ...

    def decide(
        self, state: Any, seen: tuple[Observation, ...], queue: Queue, now: float
    ) -> tuple[Any, Decision | None]:
        """What to change, if anything. seen: since the last call."""
        ...


@dataclass(frozen=True, slots=True)
class FixedPolicy:
    """One way of sharing for good: what the others are compared with."""

    sharing: Sharing

    def start(self) -> None:
        return None

    def first(self, now: float) -> Decision:
        return Decision(now, self.sharing, "fixed")

    def decide(
        self, state: None, seen: tuple[Observation, ...], queue: Queue, now: float
    ) -> tuple[None, Decision | None]:
        del seen, queue, now
        return state, None


@dataclass(frozen=True, slots=True)
class Asked:
    """One call of a policy, as recorded."""

    seen: tuple[Observation, ...]
    queue: Queue
    now: float
    decision: Decision | None


class Controller:
    """interval: seconds between two questions to the policy. lone: whether a lane gets the whole device while the
    other one has nothing to do. record: told of every question, if given."""

    def __init__(
        self,
        policy: Policy,
        *,
        interval: float = 0.25,
        lone: bool = False,
        record: Callable[[Asked], None] | None = None,
    ) -> None:
        self.lone = lone
        self._policy = policy
        self._interval = interval
        self._record = record
        self._state = policy.start()
        self._seen: list[Observation] = []
        self._next = 0.0

    def first(self, now: float) -> Decision:
        """How to begin. The first question comes an interval later."""
        self._next = now + self._interval
        return self._policy.first(now)

    def tell(self, observation: Observation) -> None:
        self._seen.append(observation)

    def due(self, now: float) -> bool:
        """Whether it is time to ask. Cheap: one comparison."""
        return now >= self._next

    def ask(self, queue: Queue, now: float) -> Decision | None:
        """What to change now, if anything."""
        self._next = now + self._interval
        seen, self._seen = tuple(self._seen), []
        self._state, decision = self._policy.decide(self._state, seen, queue, now)
        if self._record is not None:
            self._record(Asked(seen, queue, now, decision))
        return decision


def replay(policy: Policy, run: Iterable[Asked]) -> list[Decision | None]:
    """What a policy decides on a recorded run."""
    state, decisions = policy.start(), []
    for asked in run:
        state, decision = policy.decide(state, asked.seen, asked.queue, asked.now)
        decisions.append(decision)
    return decisions
