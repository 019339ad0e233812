"""How much a client may send, and how slowly.

run.py wraps the application in `BodyLimitMiddleware`, inside the authentication: a stranger's body is never read.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from weft.errors import BodyTooLarge, BodyTooSlow, InvalidRequest, WeftError
from weft.server.errors import refuse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Seconds that a client has for sending a whole body.
BODY_SECONDS = 60.0
# Bytes of request line and headers, and seconds for sending them.
MAX_HEADER_BYTES = 64 * 2**10
HEADER_SECONDS = 30.0


class BodyLimitMiddleware:
    """Plain ASGI middleware: reads the whole body, at most `limit` bytes within `seconds`, before the application runs.

    413 for a longer one, at once when Content-Length says so, otherwise as soon as the bytes exceed it; 408 for a
    slower one. The application finds the body complete, and its later `receive` calls wait for the disconnect.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float = BODY_SECONDS) -> None:
        self._app = app
        self._limit = limit
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_declared(scope)
            body = await self._read(receive)
        except WeftError as error:
            await refuse(receive, send, error)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _check_declared(self, scope: Scope) -> None:
        for name, value in scope["headers"]:
            if name.lower() != b"content-length":
                continue
            if not value.isdigit():
                raise InvalidRequest("the Content-Length header is not a number")
            # A number of more digits is larger without being read: int() refuses thousands of them.
            if len(value) > 19 or int(value) > self._limit:
                raise self._too_large()

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None when the client went away."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._limit:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise BodyTooSlow(f"the body was not complete after {self._seconds:g} seconds") from None

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than {self._limit} bytes, the most that this server takes")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out the body once and then what comes after it."""
    pending = [body]

    async def replay() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay
