"""The front end's handle on the engine process: asyncio, no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Self

from weft.config import EngineConfig
from weft.core.request import Event, Request, RequestEnd
from weft.errors import InvalidRequest, QueueFull, Unavailable, WeftError, by_code
from weft.ipc.channel import FROM_ENGINE, TO_ENGINE, Receiver, Sender
from weft.ipc.messages import (
    Abort,
    AskStats,
    Died,
    FromEngine,
    Ready,
    Refused,
    Shutdown,
    Starting,
    Stats,
    Stop,
    Submit,
    ToEngine,
    Tokens,
)
from weft.loop.launch import Launched, launch

__all__ = ["EngineClient", "EventStream", "Launched", "launch"]

log = logging.getLogger(__name__)
# Seconds in which the last words of an engine process that has ended may still arrive.
LAST_WORDS_SECONDS = 0.5
# Seconds that an engine process gets to end after a Shutdown.
SHUTDOWN_SECONDS = 5.0


class EngineClient:
    """Hands requests to an engine process, and deals its events out to those who wait for them.

    ready: what the engine said of itself when it began to serve. death: done once the engine is gone, with the error.
    first_word: time.monotonic() when the process was first heard of. All of it belongs to one event loop.
    """

    def __init__(self, launched: Launched, on_phase: Callable[[str], None] | None = None) -> None:
        """Take over a process that has just been launched; `start` is the way to wait until it serves as well."""
        self.launched = launched
        self._loop = asyncio.get_running_loop()
        self._on_phase = on_phase
        self.first_word: float | None = None
        self._started: asyncio.Future[Ready] = self._loop.create_future()
        self.death: asyncio.Future[WeftError] = self._loop.create_future()
        self._streams: dict[str, EventStream] = {}
        self._asking: list[asyncio.Future[Stats]] = []
        self._exited = asyncio.Event()
        self._died = False  # in its own words
        self._sender: Sender[ToEngine] = Sender(launched.folder, TO_ENGINE)
        self._receiver: Receiver[FromEngine] = Receiver(launched.folder, FROM_ENGINE, FromEngine)
        self._loop.add_reader(self._receiver.fileno(), self._receive)
        self._loop.call_soon(self._receive)  # the descriptor tells only of what comes after a first look
        threading.Thread(target=self._watch, name="engine exit", daemon=True).start()

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        on_phase: Callable[[str], None] | None = None,
        launched: Launched | None = None,
    ) -> Self:
        """Start an engine process and wait until it serves. Raises the WeftError that it died of, in its own words.

        on_phase: called with the name of each phase of the start-up as it begins.
        launched: a process that `launch` has started before, instead of one for `config`.
        """
        client = cls(launched or launch(config), on_phase)
        try:
            await client.wait_ready()
        except BaseException:
            await client.close()
            raise
        return client

    async def wait_ready(self) -> Ready:
        """Until the engine serves. Raises the WeftError that it died of."""
        await asyncio.wait((self._started, self.death), return_when=asyncio.FIRST_COMPLETED)
        if self.death.done():
            raise self.death.result()
        return self.ready

    @property
    def ready(self) -> Ready:
        """Raises Unavailable while the engine has not said it."""
        if not self._started.done():
            raise Unavailable("the engine is not ready")
        return self._started.result()

    @property
    def alive(self) -> bool:
        return not self.death.done()

    @property
    def dead_reason(self) -> str | None:
        """Why the engine is gone; None while it is alive."""
        return self.death.result().message if self.death.done() else None

    def submit(self, request: Request) -> EventStream:
        """Hand a request over; its events come out of the stream. Raises InvalidRequest for what cannot be sent."""
        if request.id in self._streams:
            raise InvalidRequest(f"a request with the id {request.id!r} is under way")
        stream = EventStream(self, request.id)
        if self.death.done():
            stream.fail(self._unavailable())
            return stream
        try:
            self._sender.send(Submit(request))
        except ValueError as error:
            raise InvalidRequest(f"the request cannot be handed to the engine: {error}") from error
        self._streams[request.id] = stream
        return stream

    def abort(self, request_id: str) -> None:
        """End a request early; its RequestEnd still comes. Unknown ids are ignored."""
        if request_id in self._streams and self.alive:
            self._sender.send(Abort(request_id))

    def stop(self, request_id: str, index: int) -> None:
        """End one sequence of a request, whose text holds a stop string. Unknown ids are ignored."""
        if request_id in self._streams and self.alive:
            self._sender.send(Stop(request_id, index))

    async def stats(self) -> Stats:
        """A snapshot of the engine. Raises Unavailable when it is dead."""
        if self.death.done():
            raise self._unavailable()
        future: asyncio.Future[Stats] = self._loop.create_future()
        self._asking.append(future)
        self._sender.send(AskStats())
        return await future

    async def close(self, reason: str = "it was shut down", seconds: float = SHUTDOWN_SECONDS) -> None:
        """End the engine process; open streams raise Unavailable with this reason, at once. Idempotent.

        seconds: how long it may take to end by itself.
        """
        serves = self.alive and self._started.done()
        self._die(Unavailable(reason))
        if serves:
            self._sender.send(Shutdown())
        if serves or self._died:  # it ends by itself, and what it has started with it
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._exited.wait(), seconds)
        await asyncio.to_thread(self.launched.end)
        self._disconnect()

    def _receive(self) -> None:
        """Deal out everything that has come."""
        while not self._receiver.closed and (message := self._receiver.take()) is not None:
            self._take(message)

    def _take(self, message: FromEngine) -> None:
        if self.first_word is None:
            self.first_word = time.monotonic()
        match message:
            case Tokens(outputs, scores, ends):
                events: tuple[Event, ...] = (*scores, *outputs, *ends)
                for event in events:
                    self._deliver(event)
            case Refused(request):
                if (stream := self._streams.pop(request, None)) is not None:
                    stream.fail(_refusal(message))
            case Stats():
                asking, self._asking = self._asking, []
                for future in asking:
                    if not future.done():
                        future.set_result(message)
            case Starting(phase):
                if self._on_phase is not None:
                    self._on_phase(phase)
            case Ready():
                if not self._started.done():
                    self._started.set_result(message)
            case Died(error, code):
                self._died = True
                self._die(by_code(code)(error))

    def _deliver(self, event: Event) -> None:
        """An id is taken until its RequestEnd has come, also when its stream was closed before."""
        stream = self._streams.get(event.request)
        if stream is None:
            if self.alive:
                log.warning("an event of request %s, which is not under way", event.request)
            return
        if isinstance(event, RequestEnd):
            del self._streams[event.request]
        stream.put(event)

    def _watch(self) -> None:
        """A thread that waits for the end of the process."""
        words = self.launched.wait()
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so nobody wants to know
            self._loop.call_soon_threadsafe(self._on_exit, words)

    def _on_exit(self, words: str) -> None:
        self._exited.set()
        # A Died that it sent may still be on its way.
        error = WeftError(f"the engine process {words}")
        self._loop.call_later(LAST_WORDS_SECONDS, self._die, error)

    def _die(self, error: WeftError) -> None:
        """The first reason stays. Everybody who waits for something learns of it."""
        if self.death.done():
            return
        self.death.set_result(error)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(self._unavailable())
        for future in self._asking:
            if not future.done():
                future.set_exception(self._unavailable())
        self._asking = []

    def _unavailable(self) -> Unavailable:
        return Unavailable(f"the engine is gone: {self.dead_reason}")

    def _disconnect(self) -> None:
        if not self._receiver.closed:
            self._loop.remove_reader(self._receiver.fileno())
            self._receiver.close()
            self._sender.close()


class EventStream(AsyncIterator[Event]):
    """The events of one request, up to and with its RequestEnd.

    Iterating raises what the engine refused the request with (InvalidRequest, QueueFull with its retry_after, ...), and
    Unavailable when the engine died. `aclose` before the end aborts the request in the engine.
    """

    def __init__(self, client: EngineClient, request: str) -> None:
        self._client = client
        self._request = request
        self._events: deque[Event] = deque()
        self._error: WeftError | None = None
        self._ended = False
        self._changed = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()

    async def aclose(self) -> None:
        if not self._ended:
            self._client.abort(self._request)
            self._ended = True
            self._changed.set()
        self._events.clear()

    def put(self, event: Event) -> None:
        """For the client: the next event. After `aclose` nobody wants it."""
        if not self._ended:
            self._events.append(event)
            self._ended = isinstance(event, RequestEnd)
            self._changed.set()

    def fail(self, error: WeftError) -> None:
        """For the client: nothing more will come, because of this."""
        self._error = error
        self._ended = True
        self._changed.set()


def _refusal(refused: Refused) -> WeftError:
    kind = by_code(refused.code)
    if issubclass(kind, QueueFull):
        return kind(refused.error, retry_after=refused.retry_after or 1)
    return kind(refused.error, param=refused.param)
