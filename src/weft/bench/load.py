"""Sends many requests: each when it is due (open loop), or as soon as one of N places is free (closed loop)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

from weft.bench.client import Target, send
from weft.bench.stats import Record
from weft.bench.traffic import Shot


async def run_load(
    target: Target, shots: Sequence[Shot], max_concurrency: int | None, on_end: Callable[[Record], None]
) -> list[Record]:
    """One record for each shot, in the order of the shots.

    A shot is sent when it is due, or later, when max_concurrency requests are under way then. All due at 0 with a
    max_concurrency is the closed loop. on_end is called with each record as its request ends.
    """
    gate: AbstractAsyncContextManager[object] = (
        nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    )
    start = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - start

    async def one(shot: Shot) -> Record:
        async with gate:
            record = await send(target, shot, clock)
        on_end(record)
        return record

    tasks = []
    async with asyncio.TaskGroup() as group:
        for shot in shots:
            wait = shot.due - clock()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(group.create_task(one(shot)))
    return [task.result() for task in tasks]
