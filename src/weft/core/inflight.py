"""Tickets in flight, and the frees that wait for them.

A sequence that is computed keeps the blocks of its slice alive by owning them. One that gives them up while its ticket
is in flight (abort, preemption, error) leaves them to the ticket: they are pinned until it lands (rule 2). A step that
is cut into parts is one flight with one ticket after the other: between two of them it is paused, and lands with the
last one, or when nobody wants it any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from weft.core.blocks import BlockPool
from weft.core.plan import Lane, Plan, Slice, Ticket
from weft.core.sequence import Sequence


class UnknownTicket(LookupError):
    """A result for a ticket that is not in flight: of another engine, or delivered twice."""


@dataclass(slots=True, eq=False)
class Flight:
    """One step. plan: of the part that is under way, or was the last one. members: the sequences of its slices, in
    order. orphans: tables left to it. lost: nobody waits for it any more. paused: between two parts, so there is no
    ticket. seconds: of the parts that have ended."""

    plan: Plan
    members: tuple[Sequence, ...]
    orphans: list[tuple[int, ...]] = field(default_factory=list)
    lost: bool = False
    paused: bool = False
    seconds: float = 0.0

    @property
    def wanted(self) -> list[tuple[Slice, Sequence]]:
        """The slices whose sequences wait for them. Others were aborted or preempted, and may be in a later flight."""
        return [pair for pair in zip(self.plan.slices, self.members, strict=True) if pair[1].flight is self]


class InFlight:
    """At most one step per lane."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._lanes: dict[Lane, Flight] = {}

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._lanes.values())

    def busy(self, lane: Lane) -> bool:
        """Whether the lane has a ticket."""
        return lane in self._lanes and not self._lanes[lane].paused

    def paused(self, lane: Lane) -> bool:
        """Whether the lane is in the middle of a step, and waits for its next part."""
        return lane in self._lanes and self._lanes[lane].paused

    def launch(self, plan: Plan, members: tuple[Sequence, ...], left: list[tuple[int, ...]] | None = None) -> None:
        """left: tables, pinned already, that only this step reads from now on."""
        flight = self._lanes[plan.lane] = Flight(plan, members, left or [])
        for sequence in members:
            sequence.flight = flight

    def leave(self, sequence: Sequence) -> None:
        """The sequence is about to give up its table: what a ticket still names of it stays pinned until that lands."""
        if sequence.flight is not None:
            flight, sequence.flight = sequence.flight, None
            self._pool.pin(sequence.table)
            flight.orphans.append(sequence.table)
            if flight.paused and not flight.wanted:
                self._end(flight)

    def returning(self) -> Iterator[tuple[int, ...]]:
        """Tables that come back when their ticket lands; of a step that is lost nobody knows when, if ever."""
        return (table for flight in self if not flight.lost for table in flight.orphans)

    def flight(self, ticket: Ticket) -> Flight:
        """The flight of a ticket. Raises UnknownTicket."""
        flight = self._lanes.get(ticket.lane)
        if flight is None or flight.paused or flight.plan.step != ticket.step:
            raise UnknownTicket(f"step {ticket.step} of lane {ticket.lane.value} is not in flight")
        return flight

    def pause(self, flight: Flight) -> bool:
        """A part has ended. False when it was the last one that anybody wants."""
        flight.paused = not flight.plan.last and bool(flight.wanted)
        return flight.paused

    def resume(self, lane: Lane, step: int) -> Plan:
        """The next part of the lane's step, in flight."""
        flight = self._lanes[lane]
        flight.paused = False
        flight.plan = replace(flight.plan, step=step, part=flight.plan.part + 1)
        return flight.plan

    def land(self, ticket: Ticket) -> list[tuple[Slice, Sequence]]:
        """End the step, free what was left to it, and give the slices whose sequences still want them.

        Raises UnknownTicket, with nothing changed.
        """
        flight = self.flight(ticket)
        wanted = flight.wanted
        for _, sequence in wanted:
            sequence.flight = None
        self._end(flight)
        return wanted

    def reset(self, landed: Ticket | None) -> None:
        """After a broken invariant: each flight keeps all that its plan names, but for one that has just landed."""
        self._lanes = {
            lane: flight
            for lane, flight in self._lanes.items()
            if not flight.paused and (landed is None or landed.lane is not lane)
        }
        for flight in self:
            flight.orphans = [table for piece in flight.plan.slices for table in (piece.blocks, piece.source) if table]
            for sequence in flight.members:
                sequence.flight = None

    def _end(self, flight: Flight) -> None:
        del self._lanes[flight.plan.lane]
        for table in flight.orphans:
            self._pool.unpin(table)
