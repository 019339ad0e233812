"""Which rank does not come, where none can be seen waiting: ranks on GPUs wait inside of kernels and libraries.

Whoever has waited for too long says so in the store in which the ranks have met, and looks who says the same. A rank
that says nothing is the one that is waited for: it hangs, or is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

from weft.errors import RankLost

GRACE = 1.0  # seconds that the others have to say that they wait, too
PAUSE = 50e-6  # seconds between two looks at a device


class Event(Protocol):
    """A point in a device's work (devices/cuda_streams.py)."""

    def reached(self) -> bool: ...

    def wait(self) -> None: ...


class Late:
    """What one rank knows of the others. Not thread-safe.

    store: of torch.distributed; rank 0 has it in its process. timeout: seconds that ranks wait for one another.
    """

    def __init__(self, store: Any, rank: int, ranks: int, timeout: float) -> None:
        self._store = store
        self._rank = rank
        self._ranks = ranks
        self._timeout = timeout

    def explain(self) -> str:
        """Who is late, in words; takes up to `GRACE` seconds."""
        missing = self._missing()
        who = f"rank {' and '.join(map(str, missing))}" if missing else "another rank"
        return f"{who} did not come within {self._timeout:g} s, or has ended"

    def wait(self, event: Event, failed: Callable[[], int]) -> None:
        """Until the device has reached the event, whose work waits for other ranks. failed: of a device that has got
        there, the rank that a kernel has missed, plus 1; 0 if none. Raises RankLost, and what `event.wait` raises."""
        end = time.monotonic() + self._timeout
        while not event.reached():
            if time.monotonic() > end:
                raise RankLost(self.explain())
            time.sleep(PAUSE)
        event.wait()
        if missed := failed():
            raise RankLost(f"rank {missed - 1} did not come within {self._timeout:g} s")

    def _missing(self) -> list[int]:
        end = time.monotonic() + GRACE
        try:
            self._store.set(_key(self._rank), "")
            self._store.wait([_key(self._rank)], timedelta(seconds=GRACE))
        except RuntimeError:  # nobody answers where the store is
            return [0] if self._rank else []
        return [rank for rank in range(self._ranks) if rank != self._rank and not self._says(rank, end)]

    def _says(self, rank: int, end: float) -> bool:
        try:
            self._store.wait([_key(rank)], timedelta(seconds=max(0.01, end - time.monotonic())))
        except RuntimeError:
            return False
        return True


def _key(rank: int) -> str:
    return f"rank {rank} waits"
