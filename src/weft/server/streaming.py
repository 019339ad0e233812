"""The answer to one call, sent as it is made: whole or as server-sent events, given up when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from weft.errors import StepFailed, WeftError
from weft.server.calls import Call
from weft.server.choices import Choice, choices_of, usage
from weft.server.context import ServerContext
from weft.server.errors import error_body, send_error
from weft.server.follow import Changed, follow
from weft.server.forms import KEEP_ALIVE, Form, encode

log = logging.getLogger(__name__)
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that collects events would defeat them
]


class Answer(Response):
    """Runs a call and sends what comes of it.

    The status is not sent before the engine's first word, so that a refusal is an answer of its own status even to a
    client that asked for a stream. When the client goes away, its requests are aborted at once.
    """

    def __init__(self, context: ServerContext, call: Call, form: Form) -> None:
        super().__init__()
        self._context = context
        self._call = call
        self._form = form
        self._started = False
        self._choices = choices_of(call, context.tokenizer)

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work(send))
        gone = asyncio.create_task(_gone(receive))
        start, outcome = time.monotonic(), "cancelled"
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            outcome = work.result() if work.done() else "the client went away"
        finally:
            for task in (work, gone):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            self._log(outcome, time.monotonic() - start)

    async def _work(self, send: Send) -> str:
        """Returns how it ended, for the log."""
        try:
            await (self._stream(send) if self._call.stream else self._whole(send))
        except WeftError as error:
            await self._fail(send, error)
            return f"{error.code}: {error.message}"
        except Exception:
            log.exception("%s failed", self._call.id)
            await self._fail(send, StepFailed("an error within the server; its log has the details"))
            return "internal error"
        return "done"

    async def _whole(self, send: Send) -> None:
        async with aclosing(follow(self._context, self._call.jobs, None)) as rounds:
            async for _ in rounds:
                pass
        pieces = [piece for choice in self._choices if (piece := choice.news()) is not None]
        body = self._form.whole(pieces)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        silence = self._context.config.sse_keep_alive or None
        opened: set[int] = set()
        async with aclosing(follow(self._context, self._call.jobs, silence)) as rounds:
            async for changed in rounds:
                data = self._round(changed, opened) if changed else KEEP_ALIVE
                if data:
                    await self._send(send, data)
        await self._send(send, self._form.end(), more=False)

    def _round(self, changed: Changed, opened: set[int]) -> bytes:
        """The events that one round of the engine makes."""
        events = []
        for number, index in changed:
            if number not in opened:
                opened.add(number)
                events.append(self._form.opening(number))
            piece = self._choice(number, index).news()
            if piece is not None:
                events.append(self._form.chunk(piece))
        return b"".join(events)

    def _choice(self, number: int, index: int) -> Choice:
        return self._choices[number * self._call.n + index]

    async def _send(self, send: Send, data: bytes, more: bool = True) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _fail(self, send: Send, error: WeftError) -> None:
        """An answer of the error's own status, or within a stream an error event, which ends it."""
        if not self._started:
            await send_error(send, error)
            return
        await self._send(send, b"data: %b\n\n" % encode(error_body(error)), more=False)

    def _log(self, outcome: str, seconds: float) -> None:
        counts = usage(self._call)
        # The engine logs the end of every request; this is the front end's view of it.
        log.debug(
            "%s: %d prompt tokens, %d generated, %.3f s, %s",
            self._call.id,
            counts["prompt_tokens"],
            counts["completion_tokens"],
            seconds,
            outcome,
        )


async def _gone(receive: Receive) -> None:
    """Until the client has disconnected."""
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return
