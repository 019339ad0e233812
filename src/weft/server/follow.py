"""The jobs of one call while the engine works on them: their events in rounds, whatever arrived together at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

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
    inflow = Inflow(context, jobs)
    try:
        left = len(jobs)
        while left:
            changed: Changed = {}
            for number, event in await inflow.take(silence):
                job = jobs[number]
                if job.apply(event):  # its last open sequence met a stop string
                    context.client.abort(job.request.id)
                if isinstance(event, RequestEnd):
                    _check(job, event)
                    left -= 1
                    changed.update(((number, index), None) for index in range(len(job.sequences)))
                else:
                    changed[number, getattr(event, "index", 0)] = None
            yield changed
    finally:
        await inflow.close()


class Inflow:
    """Merges the event streams of several requests. Owns them: `close` aborts those that have not ended."""

    def __init__(self, context: ServerContext, jobs: Sequence[Job]) -> None:
        self._context = context
        self._ready: list[tuple[int, Event]] = []
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._pumps = [asyncio.create_task(self._pump(number, job)) for number, job in enumerate(jobs)]

    async def take(self, silence: float | None) -> list[tuple[int, Event]]:
        """All that has arrived, after waiting for something; empty after `silence` seconds. Raises what a request was
        refused with, once everything that came before is taken."""
        if not self._ready and self._error is None:
            try:
                async with asyncio.timeout(silence):
                    await self._changed.wait()
            except TimeoutError:
                return []
        self._changed.clear()
        if self._error is not None and not self._ready:
            raise self._error
        ready, self._ready = self._ready, []
        return ready

    async def close(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _pump(self, number: int, job: Job) -> None:
        """Move the events of one request; all that are there without a pause in between."""
        watch = self._context.metrics.watch(job.request)
        try:
            stream = self._context.client.submit(job.request)
            try:
                async for event in stream:
                    watch.event(event)
                    self._ready.append((number, event))
                    self._changed.set()
            finally:
                await stream.aclose()
        except asyncio.CancelledError:
            watch.abandoned()
            raise
        except Exception as error:  # whatever it is, the one who takes must hear of it
            if isinstance(error, WeftError):
                watch.error(error)
            self._error = self._error or error
            self._changed.set()


def _check(job: Job, end: RequestEnd) -> None:
    """Raises what the client is told when a job did not end as it asked."""
    if end.reason is Finish.ERROR:
        raise by_code(end.code)(end.error or "the engine failed")
    if any(sequence.finish is Finish.ABORT for sequence in job.sequences):  # and not by its own stop string
        raise Unavailable("the request was aborted, because the server ends")
