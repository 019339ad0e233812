"""How large and how slow a request may be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from weft.server import errors
from weft.server import http as http_module
from weft.server.http import make_server
from weft.server.limits import BodyLimitMiddleware
from weft.server.listen import listen

LIMIT = 1000
SECONDS = 10.0


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "LINGER_SECONDS", 0.5)


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
    """Status, JSON and how many of the messages were taken before the answer."""
    waiting = list(messages)
    sent: list[Message] = []
    taken: list[int] = []

    async def receive() -> Message:
        if not waiting:
            await asyncio.sleep(3600)
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)
        taken.append(len(messages) - len(waiting))

    await app({"type": "http", "path": "/", "method": "POST", "headers": list(headers)}, receive, send)
    if not sent:
        return None, None, len(messages)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    status = sent[0]["status"]
    return status, body if status == 200 else json.loads(body), taken[0]


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


async def test_a_chunked_body_without_an_end_is_answered_all_the_same() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0)
            yield b"x" * 100

    inside = Inside()
    transport = httpx.ASGITransport(app=BodyLimitMiddleware(inside, LIMIT))
    async with httpx.AsyncClient(transport=transport, base_url="http://weft") as http:
        response = await http.post("/v1/completions", content=endless())
    assert (response.status_code, inside.bodies) == (413, [])


async def test_what_is_no_http_request_passes() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    await BodyLimitMiddleware(app, LIMIT)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == ["lifespan"]


@asynccontextmanager
async def server(inside: Any, write_timeout: float = 0.0) -> AsyncIterator[int]:
    """The port of the HTTP server as weft runs it, around the body limit and an application."""
    listener = listen("127.0.0.1", 0, write_timeout)
    http = make_server(BodyLimitMiddleware(inside, LIMIT, seconds=0.3), "info", 1.0)
    task = asyncio.create_task(http.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        http.should_exit = True
        await task


async def talk(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Everything that the server says to these pieces until it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def write() -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    writing = asyncio.create_task(write())
    heard = b""
    try:
        async with asyncio.timeout(SECONDS):
            while data := await reader.read(65536):
                heard += data
    except ConnectionError:
        heard += b" reset"
    await asyncio.gather(writing, return_exceptions=True)
    writer.close()
    return heard


POST = b"POST /v1/completions HTTP/1.1\r\nHost: weft\r\nConnection: close\r\n"


async def test_on_a_socket_large_and_slow_bodies_are_refused_and_the_connection_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside = Inside()
    async with server(inside) as port:
        monkeypatch.setattr(errors, "LINGER_SECONDS", SECONDS)  # as long as it takes on a busy machine
        assert b" 200 " in await talk(port, POST + b"Content-Length: 3\r\n\r\nabc")
        # A client that sends all before it reads sees the answer too.
        large = await talk(port, POST + b"Content-Length: 33554432\r\n\r\n", b"x" * 2**25)
        chunk = b"190\r\n" + b"x" * 400 + b"\r\n"
        chunked = await talk(port, POST + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 3, b"0\r\n\r\n")
        for answer in (large, chunked):
            assert b" 413 " in answer and b"body_too_large" in answer and not answer.endswith(b"reset")
        monkeypatch.setattr(errors, "LINGER_SECONDS", 0.5)
        assert b" 408 " in await talk(port, POST + b"Content-Length: 300\r\n\r\n", *[b"x"] * 10, pause=0.05)
    assert inside.bodies == [b"abc"]


async def test_a_client_that_dawdles_over_its_headers_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "HEADER_SECONDS", 0.2)
    async with server(Inside()) as port:
        assert await talk(port) in (b"", b" reset")  # not a word
        assert await talk(port, *[b"GET / HT", b"TP/1.1\r\n", *[b"X-A: b\r\n"] * 50], pause=0.02) in (b"", b" reset")
        # The same on a connection that has been used.
        whole = b"POST / HTTP/1.1\r\nHost: weft\r\nContent-Length: 0\r\n\r\n"
        answer = await talk(port, whole, *[b"GET / HTTP/1.1\r\n", *[b"X-A: b\r\n"] * 50], pause=0.02)
        assert answer.count(b"HTTP/1.1 ") <= 1


async def test_a_request_that_takes_long_to_answer_is_not_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.5)
        await Inside()(scope, receive, send)

    monkeypatch.setattr(http_module, "HEADER_SECONDS", 0.1)
    async with server(slow) as port:
        assert b" 200 " in await talk(port, POST + b"Content-Length: 3\r\n\r\nabc")
        # Two requests at once: the second is answered after the first.
        twice = b"POST / HTTP/1.1\r\nHost: weft\r\nContent-Length: 0\r\n\r\n" + POST + b"Content-Length: 0\r\n\r\n"
        assert (await talk(port, twice)).count(b" 200 ") == 2


async def test_headers_beyond_the_limit_are_refused() -> None:
    async with server(Inside()) as port:
        answer = await talk(port, POST, *[b"X-" + b"a" * 9000 + b": b\r\n"] * 20)
        assert b" 400 " in answer or b" 431 " in answer or answer.endswith(b"reset")


class Endless:
    """Answers with bytes until the client has gone. ended: set then."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self.write(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        writing.cancel()
        self.ended.set()

    async def write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
            await asyncio.sleep(0)


async def test_a_client_that_takes_in_nothing_is_hung_up_on_in_time() -> None:
    for seconds, hung_up in ((0.5, True), (0.0, False)):
        endless = Endless()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
            async with server(endless, write_timeout=seconds) as port:
                client.connect(("127.0.0.1", port))
                client.sendall(b"GET / HTTP/1.1\r\nHost: weft\r\n\r\n")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(endless.ended.wait(), 60 if hung_up else 1)
                assert endless.ended.is_set() is hung_up
                client.close()
