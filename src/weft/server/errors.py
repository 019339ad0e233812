"""Errors in OpenAI's shape, {"error": {"message", "type", "param", "code"}}, and the headers that go with them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import msgspec

from weft.errors import QueueFull, Unauthorized, Unavailable, WeftError

if TYPE_CHECKING:
    from starlette.types import Receive, Send

# Seconds that a client should wait before it asks a server again that drains or is not ready.
RETRY_UNAVAILABLE = 1
# Seconds in which the rest of a refused request is thrown away.
LINGER_SECONDS = 5.0


def error_body(error: WeftError) -> dict[str, Any]:
    """The JSON of an error answer."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_headers(error: WeftError) -> dict[str, str]:
    """Retry-After for 429 and 503, WWW-Authenticate for 401."""
    if isinstance(error, QueueFull):
        return {"retry-after": str(error.retry_after)}
    if isinstance(error, Unavailable):
        return {"retry-after": str(RETRY_UNAVAILABLE)}
    if isinstance(error, Unauthorized):
        return {"www-authenticate": "Bearer"}
    return {}


async def send_error(send: Send, error: WeftError) -> None:
    """Answer with `error` from a plain ASGI application that has read the request."""
    await send_json(send, error.status, error_body(error), error_headers(error))


async def refuse(receive: Receive, send: Send, error: WeftError) -> None:
    """Answer with `error` a request whose body was not read, and end the connection.

    What still comes of the body is thrown away, for a while: a connection that is closed on a client who is sending
    looks to him like a broken one, and he does not see the answer.
    """
    body = msgspec.json.encode(error_body(error))
    headers = error_headers(error) | {"connection": "close", "content-length": str(len(body))}
    await _start(send, error.status, headers)
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b""})


async def send_json(send: Send, status: int, body: Any, headers: dict[str, str]) -> None:
    """Answer with JSON from a plain ASGI application."""
    data = msgspec.json.encode(body)
    await _start(send, status, {"content-length": str(len(data)), **headers})
    await send({"type": "http.response.body", "body": data})


async def _start(send: Send, status: int, headers: dict[str, str]) -> None:
    fields = {"content-type": "application/json", **headers}
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
