"""The state of a live request and of its sequences."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from typing import TYPE_CHECKING

from weft.core.plan import TokenScore
from weft.core.request import Finish, Request
from weft.core.sampling import SamplingParams

if TYPE_CHECKING:
    from weft.core.inflight import Flight

# Waiting this long is worth one level of priority.
AGEING_SECONDS = 10.0


def urgency(priority: int, arrived: float) -> float:
    """Smaller is served first. Ageing, `priority - waited / AGEING_SECONDS`, orders two requests the same way at every
    moment, so the order can be a constant: nothing is ever sorted again, and nobody overtakes by being preempted."""
    return priority * AGEING_SECONDS + arrived


class State(Enum):
    """Where a sequence is.

                 start: blocks for all its tokens       last token computed, one drawn
    ─▶ WAITING ───────────────────────────────▶ PREFILL ──────────────────────────────▶ DECODE
          ▲                                        │                                       │
          └────────── preempt: gives up its blocks, is computed again ─────────────────────┘

    and from each of them ─▶ ENDED, by a stop id, a length, an abort or an error.
    """

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Live:
    """A request that was accepted and has not ended.

    number: in order of arrival. max_len: tokens at which a sequence ends with LENGTH. stop_ids: ids that end one.
    open: the indices of its sequences that have not ended. parked: siblings are not made before the first sequence has
    prefilled the prompt that they share. scores: of the prompt, while they are gathered. back: seconds by which its
    place in the queue is later than its arrival. generated: tokens of the sequences that have ended.
    """

    request: Request
    number: int
    arrived: float
    seed: int
    max_len: int
    stop_ids: frozenset[int]
    forbidden: tuple[int, ...]
    open: set[int]
    sequences: list[Sequence] = field(default_factory=list)
    parked: bool = False
    scores: list[TokenScore] = field(default_factory=list)
    scores_due: bool = False
    back: float = 0.0
    scheduled: float | None = None
    first_token: float | None = None
    prefilled: bool = False
    cached_tokens: int = 0
    generated: int = 0
    preemptions: int = 0
    reason: Finish = Finish.STOP


@dataclass(slots=True, eq=False)
class Sequence:
    """One continuation of a request.

    tokens: prompt and output. computed: how many of them have their KV in the blocks of `table`, by complete tickets.
    digests: the prefix cache's, for the full blocks. published: full blocks that were offered to the prefix cache.
    rank: its place in every line; see `Scheduler.put_back`. flight: the ticket that computes a slice of it now.

    name, max_len, stop_ids, told: its request's. plain: the request's parameters, where these, the seed and the
    position are all that a draw needs; None where it needs to know the tokens, too. These are looked at for every
    token, and a fleet of simulated engines is larger than the processor's caches, so they are here and not two
    references away.
    """

    id: int
    live: Live
    index: int
    seed: int
    tokens: list[int]
    prompt_len: int
    rank: tuple[float, int, int]
    name: str
    max_len: int
    stop_ids: frozenset[int]
    told: bool
    plain: SamplingParams | None
    state: State = State.WAITING
    computed: int = 0
    table: tuple[int, ...] = ()
    digests: list[bytes] = field(default_factory=list)
    published: int = 0
    flight: Flight | None = None

    @property
    def generated(self) -> int:
        """Tokens of its output so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def scores_due(self) -> bool:
        """Whether it has to score the prompt; the request's first sequence does that, once."""
        return self.live.scores_due and self.index == 0


_rank = attrgetter("rank")


class Line:
    """Sequences, most urgent first."""

    def __init__(self) -> None:
        self._items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    @property
    def first(self) -> Sequence | None:
        return self._items[0] if self._items else None

    @property
    def last(self) -> Sequence | None:
        return self._items[-1] if self._items else None

    def add(self, sequence: Sequence) -> None:
        insort(self._items, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        at = bisect_left(self._items, sequence.rank, key=_rank)
        if at == len(self._items) or self._items[at] is not sequence:
            raise LookupError(f"sequence {sequence.id} is not in the line it should be in")
        del self._items[at]

    def clear(self) -> None:
        self._items.clear()
