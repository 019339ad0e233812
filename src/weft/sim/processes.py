"""A fleet's replicas in several processes, so that simulating it takes as many cores.

What a replica does depends on others only through the router, which knows what it sent where and what has ended. So
everybody computes up to the next arrival or timer, tells what has ended by then, and the fleet goes on as it does in
one process, with the same result. A process with nothing to do until then is not asked.

What crosses a pipe is msgspec's, of known types. Processes are forked, so that setups need not cross at all.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
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
    """Do this in order: place, advance to `limit`, fail at `now`; and tell the states, if asked to."""

    placed: list[Placed] = []
    limit: float = -math.inf
    failed: list[int] = []
    now: float = 0.0
    states: bool = False


class Told(msgspec.Struct, array_like=True):
    """next_end: when the next step ends. error: why the process cannot go on."""

    ended: list[Ended] = []
    next_end: float = math.inf
    lost: list[Lost] = []
    states: list[State] = []
    error: str | None = None


class Processes:
    """Replicas in `count` processes, each with every count-th of them. As `Replicas`; raises DeviceError when one of
    them dies, or says that it cannot go on."""

    def __init__(self, setups: Sequence[Setup], count: int) -> None:
        context = multiprocessing.get_context("fork")
        self._size = len(setups)
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
        self._next_ends = [math.inf] * count

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def place(self, placed: Placed) -> None:
        self._placed[placed.replica % len(self._pipes)].append(placed)

    def advance(self, limit: float) -> list[Ended]:
        """All that ends up to `limit`."""
        busy = zip(self._placed, self._next_ends, strict=True)
        asked = [number for number, (placed, end) in enumerate(busy) if placed or (end <= limit and end < math.inf)]
        for number in asked:
            self._send(number, Ask(placed=self._placed[number], limit=limit))
            self._placed[number] = []
        ended: list[Ended] = []
        for number in asked:
            ended += self._receive(number).ended
        # What ends in one step stays in its order, as a router's choices depend on it.
        return sorted(ended, key=lambda one: (one.at, one.replica))

    def fail(self, indices: Iterable[int], now: float) -> list[Lost]:
        lost: list[Lost] = []
        for index in indices:
            number = index % len(self._pipes)
            self._send(number, Ask(failed=[index], now=now))
            lost += self._receive(number).lost
        return lost

    def states(self) -> list[State]:
        count = len(self._pipes)
        for number in range(count):
            self._send(number, Ask(states=True))
        found = [self._receive(number).states for number in range(count)]
        own = [len(range(first, self._size, count)) for first in range(count)]
        there = [found[index % count][index // count] for index in range(self._size)]
        return there + [one for states, size in zip(found, own, strict=True) for one in states[size:]]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(CLOSING)
            if process.is_alive():
                process.kill()
                process.join()

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
        self._next_ends[number] = told.next_end
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
        part.place(placed)
    while ended := part.advance(ask.limit):
        told.ended += ended
    if ask.failed:
        told.lost = part.fail(ask.failed, ask.now)
    if ask.states:
        told.states = part.states()
    told.next_end = part.next_end
    return told
