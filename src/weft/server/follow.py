"""The jobs of one call while the engine works on them: their events in rounds, whatever arrived together at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from weft.core.request import Event, Finish, RequestEnd
from weft.errors import Unavailable, WeftError, by_code
from weft.jobs import Job
from weft.server.context import ServerContext

# Sequences that a round changed: (number of the job, index in it).
Changed = dict[tuple[int, int], None]


async def follow(context: ServerContext, jobs: Sequence[Job], silence: float | None) -> AsyncGenerator[Changed, None]:
    """Submit the jobs and apply their events until all have ended; yields what each round changed.

    silence: after so many seconds without an event it yields an empty round; None waits for ever. Raises the WeftError
    that the engine refused or ended a job with. Close it: what has not ended is then aborted in the engine.
    """
    inflow = Inflow(context, jobs, silence)
    try:
        left = len(jobs)
        while left:
            changed: Changed = {}
            for number, event in await inflow.take():
                job = jobs[number]
                stopped = job.apply(event)
                if stopped is not None:
                    context.client.stop(job.request.id, stopped)
                if isinstance(event, RequestEnd):
                    inflow.ended(number, _as_told(job, event))
                    _check(job, event)
                    left -= 1
                    changed.update(((number, index), None) for index in range(len(job.sequences)))
                else:
                    changed[number, getattr(event, "index", 0)] = None
            yield changed
    finally:
        await inflow.close()


class Inflow:
    """Merges the event streams of several requests. Owns them: `close` aborts those that have not ended.

    silence: seconds; None for no matter how long. Its timer is set once a while, rather than once an event.
    """

    def __init__(self, context: ServerContext, jobs: Sequence[Job], silence: float | None) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._ready: list[tuple[int, Event]] = []
        self._error: Exception | None = None
        self._silent = False
        self._last = self._loop.time()
        self._waiter: asyncio.Future[None] | None = None
        self._timer = None if silence is None else self._loop.call_later(silence, self._listen, silence)
        self._watches = {number: context.metrics.watch(job.request) for number, job in enumerate(jobs)}
        self._pumps = [asyncio.create_task(self._pump(number, job)) for number, job in enumerate(jobs)]

    async def take(self) -> list[tuple[int, Event]]:
        """All that has arrived, after waiting for something; empty after a time of silence. Raises what a request was
        refused with, once everything that came before is taken."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self._silent:
                self._silent = False
                return []
            self._waiter = self._loop.create_future()
            await self._waiter
        ready, self._ready, self._silent = self._ready, [], False
        return ready

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for watch in self._watches.values():
            watch.abandoned()
        self._watches.clear()

    def ended(self, number: int, end: RequestEnd) -> None:
        """A job has taken in its end."""
        self._watches.pop(number).event(end)

    def _listen(self, silence: float) -> None:
        """The timer: has it been silent for that long?"""
        quiet = self._loop.time() - self._last
        if quiet >= silence:
            quiet, self._last, self._silent = 0.0, self._loop.time(), True
            self._wake()
        self._timer = self._loop.call_later(silence - quiet, self._listen, silence)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _pump(self, number: int, job: Job) -> None:
        """Move the events of one request; all that are there without a pause in between."""
        watch = self._watches[number]
        try:
            stream = self._context.client.submit(job.request)
            try:
                async for event in stream:
                    if not isinstance(event, RequestEnd):  # see `ended`
                        watch.event(event)
                    self._ready.append((number, event))
                    self._last = self._loop.time()
                    self._wake()
            finally:
                await stream.aclose()
        except Exception as error:  # whatever it is, the one who takes must hear of it
            self._watches.pop(number, None)
            if isinstance(error, WeftError):
                watch.error(error)
            self._error = self._error or error
            self._wake()


def _as_told(job: Job, end: RequestEnd) -> RequestEnd:
    """The end as the client hears of it. The engine may have gone on to a sequence's length before it was told of the
    stop string."""
    told = job.sequences[0].finish
    return end if end.reason is Finish.ERROR or told is None else replace(end, reason=told)


def _check(job: Job, end: RequestEnd) -> None:
    """Raises what the client is told when a job did not end as it asked."""
    if end.reason is Finish.ERROR:
        raise by_code(end.code)(end.error or "the engine failed")
    if any(sequence.finish is Finish.ABORT for sequence in job.sequences):  # and not by its own stop string
        raise Unavailable("the request was aborted, because the server ends")
