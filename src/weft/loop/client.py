"""The front end's handle on the engine process: asyncio, no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Self

from weft.config import EngineConfig
from weft.core.request import Event, Request
from weft.ipc.messages import Ready, Stats


class EngineClient:
    """Starts the engine process, hands it requests, and deals its events out to those who wait for them."""

    ready: Ready

    @classmethod
    async def start(cls, config: EngineConfig, *, on_phase: Callable[[str], None] | None = None) -> Self:
        """Start an engine process and wait until it serves. Raises the WeftError that it died of, in its own words."""
        raise NotImplementedError

    def submit(self, request: Request) -> EventStream:
        """Hand a request over; its events come out of the stream."""
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        """End a request early; its RequestEnd still comes. Unknown ids are ignored."""

    async def stats(self) -> Stats:
        """A snapshot of the engine. Raises Unavailable when it is dead."""
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        raise NotImplementedError

    @property
    def dead_reason(self) -> str | None:
        """Why the engine is gone; None while it is alive."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the engine process; open streams raise Unavailable. Idempotent."""


class EventStream(AsyncIterator[Event]):
    """The events of one request, up to and with its RequestEnd.

    Iterating raises what the engine refused the request with (InvalidRequest, QueueFull with its retry_after, ...), and
    Unavailable when the engine died. `aclose` before the end aborts the request in the engine.
    """

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        raise NotImplementedError

    async def aclose(self) -> None: ...
