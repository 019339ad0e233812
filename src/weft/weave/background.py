"""A communication thread: seams progress while the calling thread computes (tokenweave.md §6)."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from weft.errors import DeviceError
from weft.weave.collective import Collective, Join, Joined


class Queue:
    """A collective whose seams may be started before those ahead of them have ended. They are carried out one at a
    time, in the order of the calls, and are to be finished in this order."""

    def move(self, cores: tuple[int, ...]) -> None:
        """Carry out seams on these cores from now on. No seam may be in flight. Raises DeviceError."""
        raise NotImplementedError


class Background(Queue):
    """Any collective, carried out by one thread of its own, which sleeps while there is nothing to do. Give the
    collective kernels of its own: a call on those that compute waits for what they compute. (Of collectives in C++,
    weave/native.py has one without Python in the thread.)

    cores: where the thread runs (None: where its maker may). What `start` of the collective raises comes from `finish`.
    """

    def __init__(self, collective: Collective, cores: tuple[int, ...] | None = None) -> None:
        self.rank, self.ranks = collective.rank, collective.ranks
        self._collective = collective
        self._thread = ThreadPoolExecutor(1, f"weft-seams-{self.rank}", initializer=_move, initargs=(cores,))

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return self._collective.owned(bounds)

    def start(self, join: Join) -> Future[Joined]:
        return self._thread.submit(self._carry_out, join)

    def finish(self, pending: Future[Joined]) -> Joined:
        return pending.result()

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return self._thread.submit(self._collective.gather, rows).result()

    def move(self, cores: tuple[int, ...]) -> None:
        try:
            self._thread.submit(_move, cores).result()
        except OSError as error:
            raise DeviceError(f"the thread of the seams cannot run on cores {cores}: {error}") from error

    def close(self) -> None:
        """Waits for the seam in flight, which a time-out bounds."""
        self._thread.shutdown()
        self._collective.close()

    @torch.inference_mode()
    def _carry_out(self, join: Join) -> Joined:
        return self._collective.finish(self._collective.start(join))


def _move(cores: tuple[int, ...] | None) -> None:
    if cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
