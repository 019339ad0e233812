"""Errors in OpenAI's shape, {"error": {"message", "type", "param", "code"}}, and the headers that go with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from weft.errors import QueueFull, Unauthorized, Unavailable, WeftError

if TYPE_CHECKING:
    from starlette.types import Send

# Seconds that a client should wait before it asks a server again that drains or is not ready.
RETRY_UNAVAILABLE = 1


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


async def send_error(send: Send, error: WeftError, *, close: bool = False) -> None:
    """Answer with `error` from a plain ASGI application. close: end the connection after it (its body is unread)."""
    await send_json(
        send, error.status, error_body(error), error_headers(error) | ({"connection": "close"} if close else {})
    )


async def send_json(send: Send, status: int, body: Any, headers: dict[str, str]) -> None:
    """Answer with JSON from a plain ASGI application."""
    data = msgspec.json.encode(body)
    fields = {"content-type": "application/json", "content-length": str(len(data)), **headers}
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": data})
