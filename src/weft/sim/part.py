"""Replicas of a simulated fleet, and one heap of what happens next on them.

Every replica is an engine of its own with a clock of its own, which is never ahead of the fleet's; what happens next
anywhere is done next. Between two requests that it is given, what a replica does depends on nobody else.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from weft.bench.traces import Size
from weft.core.request import Event, Finish, RequestEnd
from weft.errors import DeviceError, InvalidRequest, QueueFull
from weft.sim.replica import Replica, Setup, State
from weft.sim.traffic import prompt


class Placed(NamedTuple):
    """A request that a replica gets at a time. number: names the request, and makes its prompt. output: tokens that it
    is to generate. done: tokens behind the prompt that the client has got from elsewhere."""

    replica: int
    at: float
    number: int
    size: Size
    output: int
    done: int = 0


class Ended(NamedTuple):
    """A request is under way on a replica no more. first: when its first token came from there, if it did. tokens: that
    it generated there. error: a code; None where it has all its tokens."""

    at: float
    replica: int
    number: int
    first: float | None = None
    tokens: int = 0
    error: str | None = None


class Lost(NamedTuple):
    """A request that was under way on a replica that failed. As in `Ended`."""

    number: int
    first: float | None
    tokens: int


class Replicas(Protocol):
    """What a fleet asks of its replicas, wherever they are."""

    def place(self, placed: Placed) -> None:
        """Give a request to a replica. Its time is no earlier than that of anything before."""
        ...

    def advance(self, limit: float) -> list[Ended]:
        """Let time pass up to `limit`, or to an end: what has ended since it was last asked, in order. Empty when
        nothing more ends until then."""
        ...

    def fail(self, indices: Iterable[int], now: float) -> list[Lost]:
        """Make these replicas anew. What they had under way, by replica and then by urgency."""
        ...

    def states(self, now: float) -> list[State]:
        """Of the replicas, in order, and then of those that failed. now: up to which time has passed."""
        ...

    def close(self) -> None:
        """Nobody will ask again."""
        ...


class Part:
    """In this process. setups: by the replicas' indices."""

    def __init__(self, setups: Mapping[int, Setup]) -> None:
        self.replicas = {index: Replica(setup) for index, setup in setups.items()}
        self._setups = setups
        self._failed: list[Replica] = []
        self._heard: list[Ended] = []
        self._begun: set[int] = set()
        self._foretold: dict[int, list[Ended]] = {}
        self._due = dict.fromkeys(setups, math.inf)
        self._ends: list[tuple[float, int]] = []

    def place(self, placed: Placed) -> None:
        tokens = prompt(placed.size, placed.number) + (0,) * placed.done
        try:
            events = self.replicas[placed.replica].submit(str(placed.number), tokens, placed.output, placed.at)
            self._heard += _ends(placed.at, placed.replica, events)
        except (InvalidRequest, QueueFull) as error:
            self._heard.append(Ended(placed.at, placed.replica, placed.number, error=error.code))
        self._await(placed.replica)  # also where it was refused: what was under way may have been cut

    def advance(self, limit: float) -> list[Ended]:
        while not self._heard and (end := self.next_end) <= limit and end < math.inf:
            index = heapq.heappop(self._ends)[1]
            self._due[index] = math.inf
            self._begun.discard(index)
            ends = _ends(end, index, self.replicas[index].step())
            foretold = self._foretold.pop(index, None)
            if foretold is None:
                self._heard += ends
            elif ends != foretold:
                raise DeviceError(f"replica {index} was to end {foretold}, and ended {ends}: a bug of the simulator")
            self._await(index)
        heard, self._heard = self._heard, []
        return heard

    def foretell(self, limit: float) -> list[Ended]:
        """What ends with steps that began up to `limit` and since it was last asked. `advance` does not tell it again.
        Only for setups where that is certain; see `Setup.least`."""
        found: list[Ended] = []
        for index in sorted(self._begun):
            replica = self.replicas[index]
            if replica.last_begins > limit:
                continue
            self._begun.discard(index)
            at, own = replica.device.next_end, []
            for one in replica.ending():
                first = at if one.live.first_token is None else one.live.first_token
                own.append(Ended(at, index, int(one.name), first, one.max_len - one.prompt_len))
            self._foretold[index] = own
            found += own
        return found

    @property
    def next_begin(self) -> float:
        """When the next step begins that is to be foretold."""
        return min([self.replicas[index].last_begins for index in self._begun], default=math.inf)

    @property
    def room(self) -> int:
        """Requests that every replica's queue takes yet."""
        return min(one.room for one in self.replicas.values())

    def fail(self, indices: Iterable[int], now: float) -> list[Lost]:
        found: list[Lost] = []
        for index in indices:
            self._settle(index, now)
            failed = self.replicas[index]
            for one in failed.under_way():
                found.append(Lost(int(one.name), one.live.first_token, one.generated))
            self._failed.append(failed)
            self._begun.discard(index)
            self._foretold.pop(index, None)
            self.replicas[index] = Replica(self._setups[index], now)
            self._due[index] = math.inf
        return found

    def states(self, now: float) -> list[State]:
        for index in self.replicas:
            self._settle(index, now)
        return [one.state() for one in (*self.replicas.values(), *self._failed)]

    def close(self) -> None:
        """Nothing to free."""

    @property
    def next_end(self) -> float:
        """When the next step ends. An entry of the heap that is not what is due is no longer true."""
        if self._heard:
            return self._heard[0].at
        ends, due = self._ends, self._due
        while ends and due[ends[0][1]] != ends[0][0]:
            heapq.heappop(ends)
        return ends[0][0] if ends else math.inf

    def _settle(self, index: int, now: float) -> None:
        self.replicas[index].settle(now)
        self._await(index)

    def _await(self, index: int) -> None:
        """A replica's next end may have moved."""
        end = self.replicas[index].device.next_end
        if end != self._due[index]:
            self._due[index] = end
            if not self._foretold.get(index):
                self._foretold.pop(index, None)  # another step ends next: that nobody ends was said of the one before
            if end < math.inf:
                self._begun.add(index)
                heapq.heappush(self._ends, (end, index))


def _ends(at: float, index: int, events: list[Event]) -> list[Ended]:
    """Of the events of a replica at a time, those that somebody hears of."""
    return [_ended(at, index, event) for event in events if type(event) is RequestEnd]


def _ended(at: float, index: int, event: RequestEnd) -> Ended:
    error = None if event.reason is Finish.LENGTH else event.code
    return Ended(at, index, int(event.request), event.timing.first_token, event.generated_tokens, error)
