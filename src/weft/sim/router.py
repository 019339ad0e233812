"""Routers: which replica gets a request. They know what they sent where, and what has ended; nothing else."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

from weft.bench.traces import Size
from weft.errors import DeviceError

# Entries for each replica at most, true and untrue ones, before a heap is made anew.
STALE = 16


class Router(Protocol):
    """Over some replicas, by their indices."""

    def has(self, index: int) -> bool:
        """Whether the replica is one of its own."""
        ...

    def choose(self, number: int, size: Size) -> int:
        """The replica for a request, which counts as under way there from now on. Raises DeviceError when all are
        down."""
        ...

    def ended(self, index: int, number: int) -> None:
        """A request is under way there no more."""
        ...

    def down(self, index: int) -> None:
        """A replica gets no requests until it is up, and has then lost what it knew."""
        ...

    def up(self, index: int) -> None: ...


class RoundRobin:
    """One after the other."""

    def __init__(self, indices: Iterable[int]) -> None:
        self._indices = list(indices)
        self._known = frozenset(self._indices)
        self._down: set[int] = set()
        self._next = 0

    def has(self, index: int) -> bool:
        return index in self._known

    def choose(self, number: int, size: Size) -> int:
        del number, size
        for _ in self._indices:
            index = self._indices[self._next]
            self._next = (self._next + 1) % len(self._indices)
            if index not in self._down:
                return index
        raise DeviceError("every replica is down")

    def ended(self, index: int, number: int) -> None:
        """It keeps no count."""

    def down(self, index: int) -> None:
        self._down.add(index)

    def up(self, index: int) -> None:
        self._down.discard(index)


class LeastLoaded:
    """The replica with the fewest tokens of prompts under way; of equals, the one that has been so for longest."""

    def __init__(self, indices: Iterable[int]) -> None:
        self._load: dict[int, int] = dict.fromkeys(indices, 0)
        self._down: set[int] = set()
        self._costs: dict[int, int] = {}  # of requests under way, by number
        # (load, turn, index): the newest turn of a replica is true, others are left until they come up.
        self._order = [(0, turn, index) for turn, index in enumerate(self._load)]
        self._turns = {index: turn for turn, index in enumerate(self._load)}
        self._turn = len(self._order)

    def has(self, index: int) -> bool:
        return index in self._load

    def load(self, index: int) -> int:
        return self._load[index]

    def choose(self, number: int, size: Size) -> int:
        index = self.least()
        self.add(index, number, size.input)
        return index

    def least(self) -> int:
        while self._order:
            _, turn, index = self._order[0]
            if self._turns[index] == turn and index not in self._down:
                return index
            heapq.heappop(self._order)
        raise DeviceError("every replica is down")

    def add(self, index: int, number: int, tokens: int) -> None:
        self._costs[number] = tokens
        self._change(index, tokens)

    def ended(self, index: int, number: int) -> None:
        self._change(index, -self._costs.pop(number))

    def down(self, index: int) -> None:
        self._down.add(index)

    def up(self, index: int) -> None:
        self._down.discard(index)
        self._change(index, 0)

    def _change(self, index: int, tokens: int) -> None:
        self._load[index] += tokens
        self._turn += 1
        self._turns[index] = self._turn
        heapq.heappush(self._order, (self._load[index], self._turn, index))
        if len(self._order) > STALE * len(self._load):
            self._order = [(load, self._turns[one], one) for one, load in self._load.items()]
            heapq.heapify(self._order)


class PrefixAware:
    """Sends a prompt where it has to wait for the least: tokens of prompts under way, and its own ones that the replica
    is not believed to have. The candidates are those that have the longest prefix, and the least loaded one.

    slots: KV slots of a replica, so that what it must have evicted by now is forgotten.
    """

    def __init__(self, indices: Iterable[int], slots: int) -> None:
        self._least = LeastLoaded(indices)
        self._slots = slots
        self._held: dict[int, OrderedDict[int, int]] = {}  # of each replica: names, oldest use first, and their tokens
        self._tokens: dict[int, int] = {}
        self._holders: dict[int, set[int]] = {}
        self._down: set[int] = set()

    def has(self, index: int) -> bool:
        return self._least.has(index)

    def choose(self, number: int, size: Size) -> int:
        holders, depth = self._longest(size)
        best = self._least.least()
        known = self._depth(best, size)
        cost = self._least.load(best) + self._new(size, known)
        for index in sorted(holders - self._down):
            other = self._least.load(index) + self._new(size, depth)
            if other < cost:
                best, cost, known = index, other, depth
        self._least.add(best, number, self._new(size, known))
        self._remember(best, size)
        return best

    def ended(self, index: int, number: int) -> None:
        self._least.ended(index, number)

    def down(self, index: int) -> None:
        self._down.add(index)
        self._least.down(index)
        for name in self._held.pop(index, ()):
            self._forget(index, name)
        self._tokens.pop(index, None)

    def up(self, index: int) -> None:
        self._down.discard(index)
        self._least.up(index)

    def _longest(self, size: Size) -> tuple[set[int], int]:
        """The replicas that have most of the prompt's blocks, from the first one on, and how many these are."""
        found: set[int] = set()
        for depth, name in enumerate(size.hashes):
            here = self._holders.get(name, set())
            both = here & found if depth else set(here)
            if not both:
                return found, depth
            found = both
        return found, len(size.hashes)

    def _depth(self, index: int, size: Size) -> int:
        held = self._held.get(index, OrderedDict())
        for depth, name in enumerate(size.hashes):
            if name not in held:
                return depth
        return len(size.hashes)

    @staticmethod
    def _new(size: Size, depth: int) -> int:
        return max(1, size.input - depth * size.block)

    def _remember(self, index: int, size: Size) -> None:
        held = self._held.setdefault(index, OrderedDict())
        tokens = self._tokens.get(index, 0)
        for name in reversed(size.hashes):  # the beginning of a prompt is the last to be evicted
            if name in held:
                held.move_to_end(name)
            else:
                held[name] = size.block
                tokens += size.block
                self._holders.setdefault(name, set()).add(index)
        while tokens > self._slots and held:
            name, block = held.popitem(last=False)
            tokens -= block
            self._forget(index, name)
        self._tokens[index] = tokens

    def _forget(self, index: int, name: int) -> None:
        holders = self._holders[name]
        holders.discard(index)
        if not holders:
            del self._holders[name]
