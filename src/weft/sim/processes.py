"""A fleet's replicas in several processes, so that simulating it takes as many cores.

What a replica does depends on others only through the router, which knows what it sent where and what has ended. So
everybody computes up to the next arrival or timer, tells what has ended by then, and the fleet goes on as it does in
one process, with the same result. A process with nothing to do until then is not asked.

To be asked at every arrival is to wait for the slowest every time. Where it is certain, as soon as a step begins, which
requests it ends, nobody is asked again until a step that has not begun yet could have ended: that is, for as long as a
step takes at least (the lookahead of Chandy and Misra, "Distributed simulation", 1979). The router goes on with what
is foretold, and what it sends in that time is given to the replicas together.

What crosses a pipe is msgspec's, of known types. Processes are forked, so that setups need not cross at all.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NoReturn

import msgspec

from weft.errors import DeviceError, WeftError
from weft.sim.part import Ended, Lost, Part, Placed
from weft.sim.replica import Setup, State

CLOSING = 5.0  # seconds that a process has to end by itself


class Ask(msgspec.Struct, array_like=True):
    """Do this in order: place, each at its time, advance to `limit`, fail at `now`; and tell the states at `now`, if
    asked to. foretell: tell what ends with the steps that are under way then."""

    placed: list[Placed] = []
    limit: float = -math.inf
    foretell: bool = False
    failed: list[int] = []
    now: float = 0.0
    states: bool = False


class Told(msgspec.Struct, array_like=True):
    """ended: what was not foretold before. due: when it has something to tell next. room: requests that every queue
    takes yet. error: why the process cannot go on."""

    ended: list[Ended] = []
    foretold: list[Ended] = []
    due: float = math.inf
    room: int = 0
    lost: list[Lost] = []
    states: list[State] = []
    error: str | None = None


class Processes:
    """Replicas in `count` processes, each with every count-th of them. As `Replicas`; raises DeviceError when one of
    them dies, or says that it cannot go on."""

    def __init__(self, setups: Sequence[Setup], count: int) -> None:
        context = multiprocessing.get_context("fork")
        self._setups = setups
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Told).decode
        self._pipes: list[Connection] = []
        self._processes = []
        for first in range(count):
            ours, theirs = context.Pipe()
            part = {index: setups[index] for index in range(first, len(setups), count)}
            process = context.Process(target=_serve, args=(theirs, part, [*self._pipes, ours]), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._placed: list[list[Placed]] = [[] for _ in range(count)]
        self._dues = [math.inf] * count
        self._rooms = [0] * count
        # All that ends before `known` is among `ends`, in order, or was told. Nobody is asked about it.
        self._ahead = min(setup.least for setup in setups)
        self._known = -math.inf
        self._ends: deque[Ended] = deque()

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def place(self, placed: Placed) -> None:
        number = placed.replica % len(self._pipes)
        if not self._setups[placed.replica].takes(placed.size.input + placed.done, self._rooms[number]):
            self._known = -math.inf  # it may end at once
        self._rooms[number] -= 1
        self._placed[number].append(placed)

    def advance(self, limit: float) -> list[Ended]:
        """All that ends up to `limit`."""
        if limit >= self._known:
            self._ask(limit)
        ended = []
        while self._ends and self._ends[0].at <= limit:
            ended.append(self._ends.popleft())
        return ended

    def fail(self, indices: Iterable[int], now: float) -> list[Lost]:
        self._ask(now)
        gone, lost = list(indices), []
        for index in gone:
            number = index % len(self._pipes)
            self._send(number, Ask(failed=[index], now=now))
            lost += self._receive(number).lost
        self._ends = deque(one for one in self._ends if one.replica not in gone)
        return lost

    def states(self, now: float) -> list[State]:
        self._ask(now)
        count = len(self._pipes)
        for number in range(count):
            self._send(number, Ask(states=True, now=now))
        found = [self._receive(number).states for number in range(count)]
        own = [len(range(first, len(self._setups), count)) for first in range(count)]
        there = [found[index % count][index // count] for index in range(len(self._setups))]
        return there + [one for states, size in zip(found, own, strict=True) for one in states[size:]]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(CLOSING)
            if process.is_alive():
                process.kill()
                process.join()

    def _ask(self, limit: float) -> None:
        """Have everybody compute up to `limit`."""
        busy = zip(self._placed, self._dues, strict=True)
        asked = [number for number, (placed, due) in enumerate(busy) if placed or (due <= limit and due < math.inf)]
        for number in asked:
            self._send(number, Ask(placed=self._placed[number], limit=limit, foretell=self._ahead > 0))
            self._placed[number] = []
        ends = list(self._ends)
        for number in asked:
            told = self._receive(number)
            if told.ended and told.ended[0].at < self._known:
                raise DeviceError(f"{told.ended[0]} was not foretold: a bug of the simulator")
            ends += told.ended + told.foretold
        # What ends in one step stays in its order, as a router's choices depend on it.
        self._ends = deque(sorted(ends, key=lambda one: (one.at, one.replica)))
        self._known = limit + self._ahead

    def _send(self, number: int, ask: Ask) -> None:
        try:
            self._pipes[number].send_bytes(self._encode(ask))
        except OSError as error:
            raise self._gone(number) from error

    def _receive(self, number: int) -> Told:
        try:
            told: Told = self._decode(self._pipes[number].recv_bytes())
        except (EOFError, OSError) as error:
            raise self._gone(number) from error
        if told.error is not None:
            raise DeviceError(told.error)
        self._dues[number], self._rooms[number] = told.due, told.room
        return told

    def _gone(self, number: int) -> DeviceError:
        self._processes[number].join(CLOSING)
        return DeviceError(f"process {number} of the simulation died, exit code {self._processes[number].exitcode}")


def _serve(pipe: Connection, setups: dict[int, Setup], others: list[Connection]) -> None:
    """One process, until its pipe is closed. others: ends of pipes that were forked along, and are not its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that asks decides
    for other in others:
        other.close()
    with suppress(EOFError, ConnectionError):  # nobody asks any more, or waits for the answer
        _answer_all(pipe, Part(setups))


def _answer_all(pipe: Connection, part: Part) -> NoReturn:
    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(Ask).decode
    while True:
        ask = decode(pipe.recv_bytes())
        try:
            told = _answer(part, ask)
        except WeftError as error:
            told = Told(error=error.message)
        pipe.send_bytes(encode(told))


def _answer(part: Part, ask: Ask) -> Told:
    told = Told()
    for placed in ask.placed:
        _advance(part, placed.at, told)
        part.place(placed)
    _advance(part, ask.limit, told)
    if ask.foretell:
        told.foretold = part.foretell(ask.limit)
    if ask.failed:
        told.lost = part.fail(ask.failed, ask.now)
    if ask.states:
        told.states = part.states(ask.now)
    told.due, told.room = min(part.next_end, part.next_begin), part.room
    return told


def _advance(part: Part, limit: float, told: Told) -> None:
    while ended := part.advance(limit):
        told.ended += ended
