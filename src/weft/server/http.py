"""The HTTP server: uvicorn on a socket that is open already, without its own signal handling and logging."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from weft.server.limits import HEADER_SECONDS, MAX_HEADER_BYTES

if TYPE_CHECKING:
    from starlette.types import ASGIApp

# Bytes that a connection takes in at a time. asyncio's own 256 KiB are allocated anew for each reading, and leave the
# heap in pieces when thousands of connections come and go.
READ_BYTES = 16 * 1024
# Seconds that an idle connection is kept for the next request.
KEEP_ALIVE_SECONDS = 30


class Protocol(H11Protocol):
    """HTTP/1.1 that hangs up on a client who does not get a request's headers done in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(transport, "max_size"):
            transport.max_size = READ_BYTES
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._hang_up)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self._deadline is not None and self.cycle is not before:
            self._deadline.cancel()
            self._deadline = None
        elif self._deadline is None and self._between_requests():
            # The first bytes of another request on a connection that was kept.
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._hang_up)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _hang_up(self) -> None:
        self._deadline = None
        if self._between_requests():
            self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn whose signals run.py handles."""

    def hang_up(self) -> None:
        """End every connection at once: on clients who do not take in what they are sent."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(app: ASGIApp, log_level: str, flush_seconds: float) -> Server:
    """A server for `app`. flush_seconds: what open connections get when it is told to exit."""
    config: dict[str, Any] = {
        "http": Protocol,
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "access_log": log_level == "debug",
        "proxy_headers": False,
        "server_header": False,
        "h11_max_incomplete_event_size": MAX_HEADER_BYTES,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": max(1, round(flush_seconds)),
    }
    return Server(uvicorn.Config(app, **config))
