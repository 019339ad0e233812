"""How large and how slow a body may be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from weft.server.limits import BodyLimitMiddleware

LIMIT = 1000


class Inside:
    """An application that reads its body, and notes it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})


async def ask(
    app: BodyLimitMiddleware, messages: Sequence[Message], headers: Sequence[tuple[bytes, bytes]] = ()
) -> tuple[int | None, Any, int]:
    """Status, JSON and how many of the messages were taken."""
    waiting = list(messages)
    sent: list[Message] = []

    async def receive() -> Message:
        if not waiting:
            await asyncio.sleep(3600)
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "http", "path": "/", "method": "POST", "headers": list(headers)}, receive, send)
    if not sent:
        return None, None, len(messages) - len(waiting)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    status = sent[0]["status"]
    return status, body if status == 200 else json.loads(body), len(messages) - len(waiting)


def parts(*pieces: bytes) -> list[Message]:
    last = len(pieces) - 1
    return [{"type": "http.request", "body": piece, "more_body": i < last} for i, piece in enumerate(pieces)]


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.binary(max_size=500), min_size=1, max_size=6), declared=st.booleans())
def test_a_body_within_the_limit_arrives_whole_and_a_larger_one_gets_413(pieces: list[bytes], declared: bool) -> None:
    inside = Inside()
    body = b"".join(pieces)
    headers = [(b"content-length", str(len(body)).encode())] if declared else []
    status, answer, taken = asyncio.run(ask(BodyLimitMiddleware(inside, LIMIT), parts(*pieces), headers))
    if len(body) <= LIMIT:
        assert (status, inside.bodies) == (200, [body])
    else:
        assert (status, inside.bodies) == (413, [])
        assert answer["error"]["code"] == "body_too_large" and str(LIMIT) in answer["error"]["message"]
        assert taken == 0 or not declared


async def test_what_is_declared_too_large_is_refused_unread_and_the_connection_closed() -> None:
    for length in (b"1001", b"9" * 19, b"9" * 5000):
        status, _, taken = await ask(BodyLimitMiddleware(Inside(), LIMIT), parts(b"x"), [(b"content-length", length)])
        assert (status, taken) == (413, 0)


async def test_a_body_larger_than_it_was_declared_is_counted() -> None:
    headers = [(b"Content-Length", b"5")]
    status, _, taken = await ask(BodyLimitMiddleware(Inside(), LIMIT), parts(b"x" * 600, b"x" * 600, b"x"), headers)
    assert (status, taken) == (413, 2)


@pytest.mark.parametrize("length", [b"", b"-1", b"1e3", b"0x10", b"5, 5", b"\xff"])
async def test_a_length_that_is_no_number_is_the_clients_error(length: bytes) -> None:
    status, answer, _ = await ask(BodyLimitMiddleware(Inside(), LIMIT), parts(b"x"), [(b"content-length", length)])
    assert status == 400 and "Content-Length" in answer["error"]["message"]


async def test_a_body_that_does_not_end_is_given_up_on() -> None:
    inside = Inside()
    messages: list[Message] = [{"type": "http.request", "body": b"x", "more_body": True}]
    status, answer, _ = await ask(BodyLimitMiddleware(inside, LIMIT, seconds=0.05), messages)
    assert (status, inside.bodies) == (408, [])
    assert answer["error"]["type"] == "invalid_request_error"


async def test_a_client_that_goes_away_in_the_middle_is_not_answered() -> None:
    inside = Inside()
    messages: list[Message] = [
        {"type": "http.request", "body": b"x", "more_body": True},
        {"type": "http.disconnect"},
    ]
    assert (await ask(BodyLimitMiddleware(inside, LIMIT), messages))[0] is None
    assert inside.bodies == []


async def test_after_the_body_the_application_hears_of_the_disconnect() -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([(await receive())["type"], (await receive())["type"]])

    await ask(BodyLimitMiddleware(app, LIMIT), [*parts(b"a", b"b"), {"type": "http.disconnect"}])
    assert heard == ["http.request", "http.disconnect"]


async def test_chunked_bodies_are_counted_too() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            sent.append(1)
            yield b"x" * 100

    sent: list[int] = []
    transport = httpx.ASGITransport(app=BodyLimitMiddleware(Inside(), LIMIT))
    async with httpx.AsyncClient(transport=transport, base_url="http://weft") as http:
        response = await http.post("/v1/completions", content=endless())
    assert response.status_code == 413 and len(sent) < 20


async def test_what_is_no_http_request_passes() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    await BodyLimitMiddleware(app, LIMIT)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == ["lifespan"]
