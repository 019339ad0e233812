"""The outermost layer: every answer has a request id, and no exception leaves without an answer."""

from __future__ import annotations

import logging
import re
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft.errors import WeftError
from weft.server.errors import send_error

log = logging.getLogger(__name__)
# What a client may choose as the id of its request; anything else gets one of ours.
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:+/=-]{1,128}")


class Envelope:
    """Plain ASGI middleware: X-Request-Id on every answer, the client's own where it sent a sound one; 500 in OpenAI's
    shape for an exception that nobody expected, which is logged with its id and told to nobody else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = request_id(scope)
        started = False

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", name)]}
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception:
            log.exception("request %s failed", name.decode())
            if not started:
                await send_error(send_named, WeftError("an error within the server; its log has the details"))


def request_id(scope: Scope) -> bytes:
    given = [value for name, value in scope["headers"] if name.lower() == b"x-request-id"]
    if len(given) == 1 and REQUEST_ID.fullmatch(given[0]):
        return bytes(given[0])
    return f"req-{secrets.token_hex(12)}".encode()
