"""The state of the server, from its first second on: fastapi is not needed to know it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from weft.errors import Unavailable


class State(str, Enum):
    """loading -> ready -> draining; dead from any of them, and final."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(slots=True)
class Health:
    """The state of the server. reason: why, when it is dead. run.py changes it, everybody else reads it."""

    state: State = State.LOADING
    reason: str = ""

    def die(self, reason: str) -> None:
        """The first reason stays."""
        if self.state is not State.DEAD:
            self.state, self.reason = State.DEAD, reason

    @property
    def unavailable(self) -> Unavailable | None:
        """What a new request is told now; None when the server takes it."""
        match self.state:
            case State.READY:
                return None
            case State.LOADING:
                return Unavailable("the model is still loading")
            case State.DRAINING:
                return Unavailable("the server is shutting down")
            case State.DEAD:
                return Unavailable(self.reason)

    def live(self) -> Unavailable | None:
        """Why the process should be replaced; None while it need not."""
        return self.unavailable if self.state is State.DEAD else None
