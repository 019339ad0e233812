"""What simulated devices compute: tokens that are a known function, `oracle`, of the whole prefix.

The prefix is read through the blocks: computing a token stores it, and its position, in its KV slot, and what follows a
slice depends on every slot from the sequence's beginning. So a block that is stale, shared by mistake, or not yet
written changes the output at once, and whoever knows the prompt can tell.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from weft.core.plan import Capacity, Lane, Plan, Result, Sampled, Slice, Ticket, TokenScore

WORD = array("i").itemsize
SLOT_BYTES = 2 * WORD
LN2 = math.log(2.0)
NAN = "the logits are not numbers (NaN): simulated fault"


def oracle(tokens: Sequence[int], vocabulary: int, forbidden: Collection[int] = ()) -> int:
    """The token after `tokens`, whatever the temperature and the seed. Raises ValueError when all ids are forbidden."""
    return _draw(blake2b(array("i", tokens).tobytes(), digest_size=8), vocabulary, forbidden)


def continuation(prompt: Sequence[int], count: int, vocabulary: int) -> tuple[int, ...]:
    """The `count` tokens that the simulated device generates after a prompt when nothing stops it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(oracle(tokens, vocabulary))
    return tuple(tokens[len(prompt) :])


def _draw(prefix: blake2b, vocabulary: int, forbidden: Collection[int] = ()) -> int:
    first = int.from_bytes(prefix.digest(), "little") % vocabulary
    if not forbidden:
        return first
    banned = set(forbidden)
    for step in range(vocabulary):
        token = (first + step) % vocabulary
        if token not in banned:
            return token
    raise ValueError(f"all {vocabulary} token ids are forbidden")


def _score(token: int, first: int, k: int, vocabulary: int) -> TokenScore:
    """A distribution for show: the oracle's token has probability 1/2, the ids after it 1/4, 1/8 and so on."""
    rank = (token - first) % vocabulary + 1
    top = tuple(((first + i) % vocabulary, -(i + 1) * LN2) for i in range(min(k, vocabulary)))
    return TokenScore(token, -rank * LN2, rank, top)


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, by `Plan.step` (the scheduler counts from 1).

    slow: seconds more. failed: the step ends in an error. lost: it never ends, nor does any later one of its lane.
    gone: the lane's thread ends at this step. dead: at this step the device dies. nan: (step, sequence) of slices that
    fail alone.
    """

    slow: Mapping[int, float] = field(default_factory=dict)
    failed: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()
    gone: frozenset[int] = frozenset()
    dead: int | None = None
    nan: frozenset[tuple[int, int]] = frozenset()


class Slots:
    """The KV pool: for every slot the token and the position that were written into it; -1: nothing yet."""

    def __init__(self, blocks: int, block_size: int, max_model_len: int) -> None:
        self.block_size = block_size
        self._tokens = array("i", [-1]) * (blocks * block_size)
        self._positions = array("i", [-1]) * (blocks * block_size)
        self._expected = array("i", range(max_model_len)).tobytes()

    def write(self, piece: Slice, whole: bool = True) -> None:
        """whole: all layers; what only some layers have been written to can be read by nobody."""
        size = self.block_size
        for position, token in enumerate(piece.tokens, piece.start):
            slot = piece.blocks[position // size] * size + position % size
            self._tokens[slot] = token
            self._positions[slot] = position if whole else -1

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Whole blocks, as many as the source has."""
        size = self.block_size
        for old, new in zip(source, target, strict=False):
            for values in (self._tokens, self._positions):
                values[new * size : (new + 1) * size] = values[old * size : (old + 1) * size]

    def prefix(self, blocks: Sequence[int], length: int) -> blake2b:
        """A hash over the first `length` slots of a block table: the oracle's, where each holds what it should."""
        tokens, positions = self._read(self._tokens, blocks, length), self._read(self._positions, blocks, length)
        found = blake2b(tokens, digest_size=8)
        if positions != self._expected[: length * WORD]:
            found.update(b"foreign" + positions)
        return found

    def _read(self, values: array[int], blocks: Sequence[int], length: int) -> bytes:
        size = self.block_size
        needed = blocks[: -(-length // size)]
        return b"".join([values[block * size : (block + 1) * size].tobytes() for block in needed])[: length * WORD]

    @property
    def nbytes(self) -> int:
        return SLOT_BYTES * len(self._tokens)


class Executor:
    """Runs plans on the slots: what both devices share."""

    def __init__(self, capacity: Capacity, faults: Faults) -> None:
        self.capacity = capacity
        self.faults = faults
        self.slots = Slots(capacity.blocks, capacity.block_size, capacity.max_model_len)
        self._begun: dict[Lane, Plan] = {}  # the last plan of each lane

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes

    def run(self, plan: Plan, seconds: float) -> Result:
        """Write all slices, then read: as on a real device, where each layer writes the KV before attention reads it.

        A failed step writes, too: what it leaves behind must not be trusted.
        """
        ticket = Ticket(plan.step, plan.lane)
        before, self._begun[plan.lane] = self._begun.get(plan.lane), plan
        if plan.part and (before is None or plan != replace(before, step=plan.step, part=before.part + 1)):
            return Result(ticket, error=f"part {plan.part} of {plan.parts} does not follow the one before it")
        for piece in plan.slices:
            self.slots.copy(piece.source, piece.blocks)
            self.slots.write(piece, whole=plan.last)
        if plan.step in self.faults.failed:
            return Result(ticket, error=f"step {plan.step} failed: simulated fault", seconds=seconds)
        if not plan.last:
            failed = [(piece.sequence, NAN) for piece in plan.slices if (plan.step, piece.sequence) in self.faults.nan]
            return Result(ticket, failed=tuple(failed), seconds=seconds)
        sampled, scores, failed = [], [], []
        for piece in plan.slices:
            if (plan.step, piece.sequence) in self.faults.nan:
                failed.append((piece.sequence, NAN))
                continue
            if piece.prompt_logprobs is not None:
                scores.append((piece.sequence, self._prompt_scores(piece, piece.prompt_logprobs)))
            if piece.sample is not None:
                try:
                    sampled.append(self._sample(piece))
                except ValueError as error:
                    failed.append((piece.sequence, str(error)))
        return Result(ticket, tuple(sampled), tuple(scores), tuple(failed), seconds=seconds)

    def _sample(self, piece: Slice) -> Sampled:
        vocabulary = self.capacity.vocabulary
        prefix = self.slots.prefix(piece.blocks, piece.end)
        forbidden = piece.sample.forbidden if piece.sample is not None else ()
        token = _draw(prefix, vocabulary, forbidden)
        k = piece.sample.params.logprobs if piece.sample is not None else None
        score = None if k is None else _score(token, _draw(prefix, vocabulary), k, vocabulary)
        return Sampled(piece.sequence, token, score)

    def _prompt_scores(self, piece: Slice, k: int) -> tuple[TokenScore, ...]:
        vocabulary = self.capacity.vocabulary
        following = piece.tokens[1:] if piece.next_token is None else (*piece.tokens[1:], piece.next_token)
        return tuple(
            _score(token, _draw(self.slots.prefix(piece.blocks, end), vocabulary), k, vocabulary)
            for end, token in enumerate(following, piece.start + 1)
        )


class Lengths:
    """Draws the same token for every slice and keeps no slots: for runs in which only the number of tokens means
    something, and time is dear. Such requests have no stop ids, and ask for no scores."""

    TOKEN = 0

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.faults = Faults()
        self.nbytes = 0
        self._drawn = _Drawn(4 * capacity.max_slices)

    def run(self, plan: Plan, seconds: float, repeats: int = 1) -> Result:
        ticket = Ticket(plan.step, plan.lane)
        if not plan.last:
            return Result(ticket, seconds=seconds)
        known = self._drawn
        drawn = tuple([known[piece.sequence] for piece in plan.slices if piece.sample is not None])
        if repeats == 1:
            return Result(ticket, drawn, seconds=seconds)
        before = ((self.TOKEN,) * (repeats - 1),) * len(drawn)
        return Result(ticket, drawn, seconds=seconds, repeats=repeats, before=before)


class _Drawn(dict[int, Sampled]):
    """What is drawn for a sequence: always the same, so that it is made once. Of `most` sequences, more than a step
    has, so that those which have ended go some time."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __missing__(self, sequence: int) -> Sampled:
        if len(self) >= self._most:
            self.clear()
        self[sequence] = found = Sampled(sequence, Lengths.TOKEN)
        return found
