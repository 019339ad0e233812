"""Sends one request and times its stream. Whatever goes wrong becomes the record's `error`; nothing is lost.

A connection carries one request, opened when it is sent: TTFT contains the opening.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from weft.bench.stats import Record
from weft.bench.traffic import Shot
from weft.bench.wire import Address, EventParser, ResponseParser, WireError, authorization, error_words, request_bytes

READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """The server and how it is asked. chat: /v1/chat/completions instead of /v1/completions. extra: further fields of
    every request body. timeout: seconds for one whole request."""

    address: Address
    model: str
    chat: bool = False
    api_key: str | None = None
    timeout: float = 600.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"


def payload(target: Target, shot: Shot) -> dict[str, Any]:
    """The body of a streamed request."""
    body: dict[str, Any] = {"model": target.model, "max_tokens": shot.output_tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if target.chat:
        body["messages"] = [{"role": "user", "content": shot.prompt}]
    else:
        body["prompt"] = shot.prompt
    return {**body, **target.extra}


async def send(target: Target, shot: Shot, clock: Callable[[], float], stream: Stream | None = None) -> Record:
    """Send a request and read its stream to the end. clock: seconds since the start of the run.

    stream: a new one that takes in what comes, for callers that want more than the record says.
    """
    stream = Stream() if stream is None else stream
    raw = request_bytes(
        target.address, "POST", target.path, json.dumps(payload(target, shot)).encode(), authorization(target.api_key)
    )
    sent = clock()
    error: str | None = None
    try:
        async with asyncio.timeout(target.timeout):
            await _exchange(target.address, raw, stream, clock)
    except TimeoutError:
        error = f"no end within {target.timeout:g} s"
    except OSError as problem:
        error = f"connection: {problem.strerror or problem}"
    except WireError as problem:
        error = problem.message
    return Record(
        due=shot.due,
        sent=sent,
        first=stream.first,
        last=stream.last,
        ended=clock(),
        input_tokens=shot.input_tokens if stream.prompt_tokens is None else stream.prompt_tokens,
        output_tokens=stream.chunks if stream.completion_tokens is None else stream.completion_tokens,
        gaps=tuple(stream.gaps),
        error=error,
    )


@dataclass(slots=True)
class Stream:
    """What a stream of completion chunks has shown so far. tokens: its ids, where the request had return_token_ids."""

    first: float | None = None
    last: float | None = None
    gaps: list[float] = field(default_factory=list)
    chunks: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finished: bool = False
    tokens: list[int] = field(default_factory=list)

    def see(self, event: bytes, now: float) -> None:
        """Take in one event that arrived at `now`. Raises WireError for an error event and for what is no chunk."""
        if event.strip() == b"[DONE]":
            return
        try:
            chunk = json.loads(event)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            raise WireError(f"this is no completion chunk: {event[:80]!r}")
        if chunk.get("error") is not None:
            raise WireError(f"error in the stream: {error_words(event)}")
        for choice in chunk.get("choices") or ():
            if not isinstance(choice, dict):
                raise WireError(f"this is no completion chunk: {event[:80]!r}")
            if _text(choice):
                self._mark(now)
            self.tokens += choice.get("token_ids") or ()
            if choice.get("finish_reason"):
                self.finished = True
                # A stream whose tokens have no text (special ones, halves of a character) begins where it ends.
                self.first = now if self.first is None else self.first
                self.last = now if self.last is None else self.last
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens = _count(usage, "prompt_tokens")
            self.completion_tokens = _count(usage, "completion_tokens")

    def _mark(self, now: float) -> None:
        self.chunks += 1
        if self.last is not None:
            self.gaps.append(now - self.last)
        self.first = now if self.first is None else self.first
        self.last = now


async def _exchange(address: Address, raw: bytes, stream: Stream, clock: Callable[[], float]) -> None:
    parser, events = ResponseParser(), EventParser()
    async with connection(address) as (reader, writer):
        writer.write(raw)
        while not parser.done:
            data = await reader.read(READ_BYTES)
            now = clock()
            if data:
                parser.feed(data)
            else:
                parser.close()
            if parser.status == 200:
                for event in events.feed(parser.take()):
                    stream.see(event, now)
    if parser.status != 200:
        raise WireError(f"HTTP {parser.status}: {error_words(parser.take())}")
    if not stream.finished:
        raise WireError("the stream ended without a finish_reason")


async def fetch(
    address: Address,
    path: str,
    api_key: str | None = None,
    body: Mapping[str, Any] | None = None,
    timeout: float = 30.0,
) -> tuple[int, bytes]:
    """Status and body of a GET, or of a POST where a body is given. Raises OSError, TimeoutError or WireError."""
    data = b"" if body is None else json.dumps(body).encode()
    parser = ResponseParser()
    async with asyncio.timeout(timeout), connection(address) as (reader, writer):
        writer.write(request_bytes(address, "GET" if body is None else "POST", path, data, authorization(api_key)))
        while not parser.done:
            read = await reader.read(READ_BYTES)
            if read:
                parser.feed(read)
            else:
                parser.close()
    return parser.status or 0, parser.take()


async def first_model(address: Address, api_key: str | None = None) -> str:
    """The first model that the server lists. Raises WireError with the reason when there is none."""
    try:
        status, body = await fetch(address, "/v1/models", api_key)
    except OSError as error:  # TimeoutError is one as well
        raise WireError(f"no server answers at {address.netloc}: {error.strerror or error or 'timed out'}") from error
    if status != 200:
        raise WireError(f"{address.netloc}/v1/models answers HTTP {status}: {error_words(body)}")
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise WireError(f"{address.netloc} lists no models; name one with --model") from error


@asynccontextmanager
async def connection(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is closed at the end."""
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=address.tls or None)
    try:
        yield reader, writer
    finally:
        writer.close()


def _text(choice: Mapping[str, Any]) -> bool:
    """Whether a choice of a chunk carries output."""
    delta = choice.get("delta")
    parts = delta if isinstance(delta, dict) else {}
    return bool(choice.get("text") or any(parts.get(name) for name in ("content", "reasoning_content", "tool_calls")))


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if type(value) is int else None
