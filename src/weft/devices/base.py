"""The contract of a device: it executes plans, lane by lane, and reports results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from weft.core.plan import Capacity, Lane, Partition, Plan, Result, Ticket


@dataclass(frozen=True, slots=True)
class Description:
    """What a device is, for people: its name, the precision it computes in, its kernels, and what they should know."""

    device: str
    dtype: str
    kernels: str
    notes: tuple[str, ...] = ()


class Device(Protocol):
    """Executes plans. One thread (the engine loop) calls everything but `wake`.

    Every submitted plan ends in exactly one Result, also when the step fails or the device dies (`error` is set). Those
    of a lane whose thread has ended say so, too (`gone`).
    """

    def capacity(self) -> Capacity:
        """What the device offers; constant."""
        ...

    def describe(self) -> Description:
        """What the start-up table says of it."""
        ...

    def lanes(self) -> tuple[Lane, ...]:
        """The lanes this device was opened with: (MIXED,) or (PREFILL, DECODE)."""
        ...

    def submit(self, plan: Plan) -> Ticket:
        """Queue a plan on its lane and return at once. The plans of one lane run in order, lanes run side by side."""
        ...

    def poll(self, timeout: float | None) -> list[Result]:
        """Results that are ready, oldest first; waits up to `timeout` seconds (None: for ever) for the first one.

        Returns an empty list on time-out, or when `wake` was called.
        """
        ...

    def wake(self) -> None:
        """Make a `poll` under way (or else the next one) return at once. May be called from any thread."""
        ...

    def partition(self) -> Partition | None:
        """The shares now in force; None for one mixed lane."""
        ...

    def set_partition(self, partition: Partition) -> None:
        """Change the lanes' shares; each lane adopts its own at its next step. Raises DeviceError when impossible."""
        ...

    def memory(self) -> tuple[tuple[str, int], ...]:
        """(what, bytes) rows for the start-up table: weights, KV, and so on."""
        ...

    def close(self) -> None:
        """Stop the lanes and free everything; idempotent."""
        ...
