"""A stream for seams: what they launch goes beside what the lane's stream computes (tokenweave.md §6)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from weft.weave.collective import Collective, Join, Joined

_cuda: Any = torch.cuda  # some of it has no types


class SideStream:
    """Any collective that launches its work and waits for nothing, on a stream of its own. What weave/background.py is
    for a CPU; the host launches both streams.

    A seam begins when all is done that the current stream was given before `start`, and what the current stream is
    given after `finish` begins when the seam has ended. Both are events, so that the two streams can be recorded in one
    graph. Memory that a seam has made is given to another one only after the current stream has read it: each seam
    waits for what came before its start.

    device: where there are no streams, as on a CPU, seams are carried out at once.
    """

    def __init__(self, collective: Collective, device: torch.device) -> None:
        self.rank, self.ranks = collective.rank, collective.ranks
        self._collective = collective
        # Of a higher priority: the few blocks of a seam must not queue behind those of a product.
        self._side = _cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return self._collective.owned(bounds)

    def start(self, join: Join) -> tuple[Join, Joined]:
        """Returns the join as well, whose memory must stay while the seam is under way."""
        with self._aside():
            return join, self._collective.finish(self._collective.start(join))

    def finish(self, pending: tuple[Join, Joined]) -> Joined:
        if self._side is not None:
            _cuda.current_stream(self._side.device).wait_stream(self._side)
        return pending[1]

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return self._collective.gather(rows)

    def close(self) -> None:
        self._collective.close()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        if self._side is None:
            yield
            return
        self._side.wait_stream(_cuda.current_stream(self._side.device))
        with _cuda.stream(self._side):
            yield
