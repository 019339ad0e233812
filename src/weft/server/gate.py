"""What stands before the application: keys, the state of the server, limits.

A request passes, from the outside in: the envelope, CORS (when origins are allowed; a browser asks before it sends the
key), the keys, the gate, the body's limits, the application. So a stranger's request is refused before its body is
read, and so is one that comes too early or too late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weft.config import ServerConfig
from weft.server.auth import AuthMiddleware
from weft.server.envelope import Envelope
from weft.server.errors import refuse, send_json
from weft.server.state import Health

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

# Paths that tell of the server itself: they are answered in every state, and no drain waits for them.
ALWAYS = frozenset({"/health", "/health/live", "/health/ready", "/metrics", "/version"})


class Gate:
    """Plain ASGI application: the real one once there is one and the server takes requests, and 503 otherwise."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._app: ASGIApp | None = None
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, app: ASGIApp) -> None:
        """From now on there is an application."""
        self._app = app

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return self._running

    async def idle(self) -> None:
        """Until no request is being answered."""
        await self._idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in ALWAYS and self._app is not None:
            await self._app(scope, receive, send)
            return
        problem = self._health.live() if path == "/health/live" else self._health.unavailable
        if problem is not None:
            await refuse(receive, send, problem)
        elif self._app is None:
            await send_json(send, 200, {"status": "live"}, {})
        else:
            await self._count(self._app, scope, receive, send)

    async def _count(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._running += 1
        self._idle.clear()
        try:
            await app(scope, receive, send)
        finally:
            self._running -= 1
            if self._running == 0:
                self._idle.set()


def guard(app: ASGIApp, config: ServerConfig, keys: Sequence[str]) -> ASGIApp:
    """What every request passes first. Without keys everybody may ask."""
    if keys:
        app = AuthMiddleware(app, keys)
    if config.allowed_origins:
        from starlette.middleware.cors import CORSMiddleware

        app = CORSMiddleware(
            app,
            allow_origins=config.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # OpenAI's client for browsers sends ten of its own; there are no cookies to protect
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    return Envelope(app)
