"""Tickets in flight, and the frees that wait for them.

A sequence that is computed keeps the blocks of its slice alive by owning them. One that gives them up while its ticket
is in flight (abort, preemption, error) leaves them to the ticket: they are pinned until it lands (rule 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from weft.core.blocks import BlockPool
from weft.core.plan import Lane, Plan, Slice, Ticket
from weft.core.sequence import Sequence


class UnknownTicket(LookupError):
    """A result for a ticket that is not in flight: of another engine, or delivered twice."""


@dataclass(slots=True, eq=False)
class Flight:
    """One ticket. members: the sequences of the plan's slices, in order. orphans: tables left to it. lost: nobody waits
    for it any more."""

    plan: Plan
    members: tuple[Sequence, ...]
    orphans: list[tuple[int, ...]] = field(default_factory=list)
    lost: bool = False


class InFlight:
    """At most one ticket per lane."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._lanes: dict[Lane, Flight] = {}

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._lanes.values())

    def busy(self, lane: Lane) -> bool:
        return lane in self._lanes

    def launch(self, plan: Plan, members: tuple[Sequence, ...]) -> None:
        flight = self._lanes[plan.lane] = Flight(plan, members)
        for sequence in members:
            sequence.flight = flight

    def leave(self, sequence: Sequence) -> None:
        """The sequence is about to give up its table: what a ticket still names of it stays pinned until that lands."""
        if sequence.flight is not None:
            self._pool.pin(sequence.table)
            sequence.flight.orphans.append(sequence.table)
            sequence.flight = None

    def plan(self, ticket: Ticket) -> Plan:
        """The plan of a ticket in flight. Raises UnknownTicket."""
        return self._flight(ticket).plan

    def land(self, ticket: Ticket) -> list[tuple[Slice, Sequence]]:
        """End the ticket, free what was left to it, and give the slices whose sequences still want them.

        Raises UnknownTicket, with nothing changed.
        """
        flight = self._flight(ticket)
        del self._lanes[ticket.lane]
        # Aborted and preempted members have left this flight, and may be in a later one.
        wanted = [
            (piece, sequence)
            for piece, sequence in zip(flight.plan.slices, flight.members, strict=True)
            if sequence.flight is flight
        ]
        for _, sequence in wanted:
            sequence.flight = None
        for table in flight.orphans:
            self._pool.unpin(table)
        return wanted

    def reset(self, landed: Ticket | None) -> None:
        """After a broken invariant: each flight keeps all that its plan names, but for one that has just landed."""
        if landed is not None:
            self._lanes.pop(landed.lane, None)
        for flight in self:
            flight.orphans = [piece.blocks for piece in flight.plan.slices]
            for sequence in flight.members:
                sequence.flight = None

    def _flight(self, ticket: Ticket) -> Flight:
        flight = self._lanes.get(ticket.lane)
        if flight is None or flight.plan.step != ticket.step:
            raise UnknownTicket(f"step {ticket.step} of lane {ticket.lane.value} is not in flight")
        return flight
