"""The block pool: who may use which block of KV slots. The one owner of every block of a device.

A block is in exactly one state:

    free     nobody's, and nothing worth finding in it
    cached   nobody's, but the prefix cache can find it; evicted, oldest first, when free ones run out
    held     one or more sequences own it
    pinned   no sequence owns it any more, but a ticket in flight still names it: not to be reused (rule 2)

Invariant: free + cached + held + pinned == total.

Under PD disaggregation, for comparison, the last blocks are a pool of their own for the decode phase. They are in the
same states, but for `cached`: the prefix cache is the prefill phase's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class PoolError(RuntimeError):
    """The pool was asked for something that would break its invariant: always a bug of the caller."""


class BlockPool:
    """`total` blocks, named 0 .. total - 1. `forget` is told of each block whose content is about to be evicted.
    decode: how many of them, the last ones, are the decode phase's own; 0: one pool for both phases."""

    def __init__(self, total: int, forget: Callable[[int], None], decode: int = 0) -> None:
        self.total = total
        self._border = total - decode
        self._forget = forget
        self._owners = [0] * total
        self._pins = [0] * total
        self._findable = bytearray(total)
        # A stack: the block that was freed last is reused first, while its memory is still in the processor's caches.
        self._free = list(range(self._border - 1, -1, -1))
        self._decode_free = list(range(total - 1, self._border - 1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._held = 0
        self._pinned = 0

    @property
    def free(self) -> int:
        return len(self._free) + len(self._decode_free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def held(self) -> int:
        return self._held

    @property
    def pinned(self) -> int:
        return self._pinned

    @property
    def available(self) -> int:
        """Blocks that `take` can give now."""
        return len(self._free) + len(self._cached)

    @property
    def decode_available(self) -> int:
        """Blocks that `take_decode` can give now."""
        return len(self._decode_free)

    @property
    def conserved(self) -> bool:
        """Whether the invariant holds, by the counters alone: cheap enough to ask after every step."""
        free = len(self._free) + len(self._decode_free)
        return free + len(self._cached) + self._held + self._pinned == self.total

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of the blocks are cached, so that sharing them takes them out of `available`."""
        return sum(block in self._cached for block in blocks)

    def take(self, count: int) -> tuple[int, ...]:
        """`count` blocks for one owner; free ones first, then the cached ones that nobody used for longest."""
        if count > self.available:
            raise PoolError(f"{count} blocks were taken, {self.available} of {self.total} are available")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._findable[block] = False
                self._forget(block)
            self._owners[block] = 1
            taken.append(block)
        self._held += count
        return tuple(taken)

    def take_decode(self, count: int) -> tuple[int, ...]:
        """`count` blocks of the decode phase's pool for one owner."""
        if count > len(self._decode_free):
            raise PoolError(f"{count} decode blocks were taken, {len(self._decode_free)} are available")
        taken = tuple(self._decode_free.pop() for _ in range(count))
        for block in taken:
            self._owners[block] = 1
        self._held += count
        return taken

    def in_decode(self, table: tuple[int, ...]) -> bool:
        """Whether a table is in the decode phase's own pool. No table is in both."""
        return bool(table) and table[0] >= self._border

    def share(self, blocks: Iterable[int]) -> None:
        """Give blocks that the prefix cache found one more owner."""
        for block in blocks:
            if not self._findable[block]:
                raise PoolError(f"block {block} is shared, and cannot be found by anybody")
            if not self._owners[block]:
                if self._pins[block]:
                    self._pinned -= 1
                else:
                    del self._cached[block]
                self._held += 1
            self._owners[block] += 1

    def release(self, blocks: tuple[int, ...]) -> None:
        """Drop one owner of each block. The end of a table is released first, so that its beginning, which more
        prompts share, is evicted last."""
        for block in reversed(blocks):
            if not self._owners[block]:
                raise PoolError(f"block {block} is released, and has no owner")
            self._owners[block] -= 1
            if not self._owners[block]:
                self._held -= 1
                if self._pins[block]:
                    self._pinned += 1
                else:
                    self._retire(block)

    def pin(self, blocks: tuple[int, ...]) -> None:
        """Keep blocks from being reused until `unpin`, whatever their owners do. They must be held now."""
        for block in blocks:
            if not self._owners[block]:
                raise PoolError(f"block {block} is pinned, and has no owner")
            self._pins[block] += 1

    def unpin(self, blocks: tuple[int, ...]) -> None:
        for block in reversed(blocks):
            if not self._pins[block]:
                raise PoolError(f"block {block} is unpinned, and has no pin")
            self._pins[block] -= 1
            if not self._pins[block] and not self._owners[block]:
                self._pinned -= 1
                self._retire(block)

    def publish(self, block: int) -> None:
        """From now on the prefix cache can find the block: it is cached, not freed, when its last owner goes."""
        if not self._owners[block] or block >= self._border:
            raise PoolError(f"block {block} is published, and has no owner or is not the prefill phase's")
        self._findable[block] = True

    def reset(self, pinned: Iterable[tuple[int, ...]]) -> None:
        """Start anew after a broken invariant: only what tickets in flight name stays out of reach."""
        self._owners = [0] * self.total
        self._pins = [0] * self.total
        self._findable = bytearray(self.total)
        for table in pinned:
            for block in table:
                self._pins[block] += 1
        free = [block for block in range(self.total - 1, -1, -1) if not self._pins[block]]
        self._free = [block for block in free if block < self._border]
        self._decode_free = [block for block in free if block >= self._border]
        self._cached.clear()
        self._held = 0
        self._pinned = self.total - self.free

    def check(self) -> None:
        """Raise PoolError unless every block is in exactly one state and the counters say so. Slow: for tests."""
        states: dict[int, list[str]] = {block: [] for block in range(self.total)}
        for block in (*self._free, *self._decode_free):
            states[block].append("free")
        for block in self._cached:
            states[block].append("cached")
        for block in range(self.total):
            if self._owners[block] > 0:
                states[block].append("held")
            elif self._pins[block] > 0:
                states[block].append("pinned")
        wrong = {block: found for block, found in states.items() if len(found) != 1}
        counts = [sum(found == [name] for found in states.values()) for name in ("free", "cached", "held", "pinned")]
        counted = [self.free, self.cached, self.held, self.pinned]
        unfindable = [block for block in self._cached if not self._findable[block]]
        lost = [block for block in self._free if self._findable[block]]
        lost += [block for block in (*self._free, *self._cached) if block >= self._border]
        lost += [block for block in self._decode_free if block < self._border]
        if wrong or unfindable or lost or counts != counted or min(self._owners + self._pins, default=0) < 0:
            raise PoolError(f"{wrong = }, {unfindable = }, {lost = }, {counts = }, {counted = }")

    def _retire(self, block: int) -> None:
        if self._findable[block]:
            self._cached[block] = None
        elif block >= self._border:
            self._decode_free.append(block)
        else:
            self._free.append(block)
