"""Which sequences wait, prefill and decode, and the blocks that they hold.

Order: everything goes by `Sequence.rank`, which changes once at most, before it runs. The most urgent waiting sequence
starts first and nobody passes it for want of blocks; a sequence takes blocks only from less urgent ones. So the most
urgent sequence is never preempted and always advances, then the next one, and no two sequences can preempt each other
for ever.
"""

from __future__ import annotations

from weft.core.blocks import BlockPool
from weft.core.inflight import InFlight
from weft.core.plan import Ticket
from weft.core.prefix import PrefixCache
from weft.core.sequence import Line, Sequence, State


class Running:
    """Moves sequences between the lines, and blocks with them. most: sequences that may run (not wait) at one time.

    caching: whether blocks enter the prefix cache, whose secret key is `key`. ahead, decode_blocks: see `Capacity`.
    """

    def __init__(
        self,
        blocks: int,
        block_size: int,
        most: int,
        caching: bool,
        key: bytes,
        ahead: int = 0,
        decode_blocks: int = 0,
    ) -> None:
        self.block_size = block_size
        self.ahead = ahead
        self.apart = decode_blocks > 0
        self.most = most
        self.caching = caching
        self.prefix = PrefixCache(block_size, key)
        self.pool = BlockPool(blocks, self.prefix.forget, decode_blocks)
        self.inflight = InFlight(self.pool)
        self.waiting, self.prefilling, self.decoding = Line(), Line(), Line()
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    def __len__(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def start(self, sequence: Sequence, steps: int = 1) -> bool:
        """WAITING to PREFILL, with blocks for all its tokens; False, and nothing done, when seats or blocks lack.

        steps: those that decode is likely to take while this prompt is computed. The blocks that it grows into by then
        are left to it: otherwise it would preempt the prompt while a ticket computes it, and stand still until that
        ticket gives the blocks back.
        """
        if len(self) >= self.most:
            return False
        hits = self._match(sequence)
        needed = -(-len(sequence.tokens) // self.block_size) - len(hits)
        # Where decode has a pool of its own, nobody who runs grows in this one.
        reserve = self._growth(steps) + 1 if len(self) and not self.apart else 0
        if self.pool.available - self.pool.idle(hits) < needed + reserve:
            return False
        self.pool.share(hits)
        sequence.table = (*hits, *self.pool.take(needed))
        sequence.computed = len(hits) * self.block_size
        sequence.published = len(hits)
        if self.caching:
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += sequence.computed
        self._move(sequence, State.PREFILL)
        return True

    def decode(self, sequence: Sequence) -> None:
        """PREFILL to DECODE: another list, the same blocks. Where decode has a pool of its own, they are handed over
        when that has room."""
        self._move(sequence, State.DECODE)

    def hand_over(self, sequence: Sequence) -> tuple[int, ...] | None:
        """Give a sequence that is to decode blocks of the decode phase's pool. Its old table, pinned for the ticket
        that copies it; None, and nothing done, when there is no room.

        As in `start`, those who run there keep a block for their next growth. When nobody does, the pool is empty, and
        holds any sequence.
        """
        needed = -(-len(sequence.tokens) // self.block_size)
        if self.pool.decode_available < needed + self._growth(1):
            return None
        old, sequence.table = sequence.table, self.pool.take_decode(needed)
        self.pool.pin(old)
        self.pool.release(old)
        return old

    def grow(self, sequence: Sequence) -> bool:
        """Make room for its last token, at the cost of less urgent sequences; False when it cannot be computed now.

        It may then have been preempted itself: when only more urgent sequences have blocks.
        """
        room = len(sequence.table) * self.block_size
        if len(sequence.tokens) + self.ahead <= room:
            return True
        if len(sequence.tokens) <= room:
            self._grow_ahead(sequence, room)
            return True
        while not (self.pool.decode_available if self.apart else self.pool.available):
            # Blocks may be on their way back: the other lane's ticket brings them.
            if any(self.pool.in_decode(table) is self.apart for table in self.inflight.returning()):
                return False
            victim = self._least_urgent()
            self.preempt(victim)
            if victim is sequence:
                return False
        sequence.table += self.pool.take_decode(1) if self.apart else self.pool.take(1)
        return True

    def written(self, sequences: list[Sequence]) -> None:
        """All their tokens but the last were computed, one after the other while nothing else happened: blocks for all
        of them, which are free (see repeats.py)."""
        size, full = self.block_size, []
        for index, sequence in enumerate(sequences):
            length = len(sequence.tokens)
            missing = -(-length // size) - len(sequence.table)
            if missing > 0:
                sequence.table += self.pool.take(missing)
            sequence.computed = length - 1
            if self.caching and sequence.computed // size > sequence.published:
                full += [(end - length, index) for end in range((sequence.published + 1) * size, length, size)]
        # The prefix cache keeps one of two equal blocks: the one that was full first.
        for _, index in sorted(full):
            self.publish(sequences[index])

    def _grow_ahead(self, sequence: Sequence, room: int) -> None:
        """Make room behind its last token too, unless it ends there anyway or somebody else would pay for it."""
        goes_on = room + 1 < sequence.max_len
        if goes_on and self.pool.available > self._growth(1):
            sequence.table += self.pool.take(1)

    def preempt(self, sequence: Sequence) -> None:
        """PREFILL or DECODE to WAITING. Its full blocks stay findable, so that a resume is mostly hits."""
        self._give_up(sequence)
        self._move(sequence, State.WAITING)
        sequence.live.preemptions += 1
        self.preemptions += 1
        if sequence.scores_due:
            sequence.live.scores.clear()

    def end(self, sequence: Sequence) -> None:
        """Any state to ENDED."""
        self._give_up(sequence)
        self._move(sequence, State.ENDED)

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits."""
        self.waiting.add(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Offer what complete tickets have written, block by full block, to the prefix cache (rule 1)."""
        full = sequence.computed // self.block_size
        if not self.caching or full == sequence.published or self.pool.in_decode(sequence.table):
            return
        self.prefix.extend(sequence.digests, sequence.tokens, sequence.live.request.cache_salt)
        for index in range(sequence.published, full):
            block = sequence.table[index]
            if self.prefix.insert(sequence.digests, index, sequence.tokens, block):
                self.pool.publish(block)
        sequence.published = full

    def reset(self, landed: Ticket | None) -> None:
        """After a broken invariant: nobody has any block but the tickets in flight. The sequences are lost."""
        for line in (self.waiting, self.prefilling, self.decoding):
            for sequence in line:
                sequence.state = State.ENDED
                sequence.table = ()
            line.clear()
        self.prefix.clear()
        self.inflight.reset(landed)
        self.pool.reset(table for flight in self.inflight for table in flight.orphans)

    def _match(self, sequence: Sequence) -> list[int]:
        # Scores of the prompt need every row, so whoever has to deliver them takes no hits.
        if not self.caching or sequence.scores_due:
            return []
        self.prefix.extend(sequence.digests, sequence.tokens, sequence.live.request.cache_salt)
        return self.prefix.match(sequence.digests, sequence.tokens)

    def _growth(self, steps: int) -> int:
        """Blocks that those who run grow into within so many steps. At least one each, for the next growth: without it
        whoever starts now would be preempted as soon as somebody decodes."""
        total = 0
        for line in (self.prefilling, self.decoding):
            for sequence in line:
                if self.apart and not self.pool.in_decode(sequence.table):
                    continue
                end = min(len(sequence.tokens) + steps, sequence.max_len)
                total += max(1, -(-end // self.block_size) - len(sequence.table))
        return total

    def _least_urgent(self) -> Sequence:
        """Of those that run, where the asker grows. Asked for on behalf of one that decodes, so there is one."""
        if self.apart:
            return max((one for one in self.decoding if self.pool.in_decode(one.table)), key=lambda one: one.rank)
        lasts = [line.last for line in (self.prefilling, self.decoding)]
        return max((last for last in lasts if last is not None), key=lambda last: last.rank)

    def _give_up(self, sequence: Sequence) -> None:
        self.inflight.leave(sequence)
        self.pool.release(sequence.table)
        sequence.table = ()
        sequence.computed = 0
        sequence.published = 0

    def _move(self, sequence: Sequence, state: State) -> None:
        lines = {State.WAITING: self.waiting, State.PREFILL: self.prefilling, State.DECODE: self.decoding}
        lines[sequence.state].remove(sequence)
        sequence.state = state
        if state is not State.ENDED:
            lines[state].add(sequence)
