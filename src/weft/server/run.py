"""`weft serve`: one front end, one engine process, and their lives from the first import to the last answer.

    loading ──engine ready──▶ ready ──signal──▶ draining ──nothing runs, or time is up──▶ end
       └─────────── engine dies ──▶ dead ──what can be said is said──▶ end, with the engine's own words,
                                                     or loading again (--engine-restarts)

The port is listened on first, so that a port in use is said at once. The engine process is started before anything
slow is imported here, so that both load at the same time.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
import time
from collections.abc import Coroutine
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from weft import log as logs
from weft.config import EngineConfig, ServerConfig
from weft.errors import WeftError
from weft.ipc.messages import Phase
from weft.loop.client import SHUTDOWN_SECONDS, EngineClient, Launched, launch
from weft.server.auth import load_keys
from weft.server.listen import is_local, listen, url
from weft.server.state import Health, State
from weft.text.hub import resolve_model

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp

    from weft.server.gate import Gate

T = TypeVar("T")
log = logging.getLogger(__name__)
# Seconds that answers get to reach their clients once their requests have ended.
FLUSH_SECONDS = 2.0
# Seconds that the engine gets to end by itself after a second signal.
HURRY_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Setup:
    """What is known before anything runs. folder: the model's. begun: when its start began; None: with the process."""

    engine: EngineConfig
    server: ServerConfig
    keys: tuple[str, ...]
    listener: socket.socket
    folder: Path
    launched: Launched
    begun: float | None


class EngineDied(Exception):
    """While it served. error: what of, in its own words."""

    def __init__(self, error: WeftError) -> None:
        super().__init__(error.message)
        self.error = error


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Serve until a signal ends it. Returns 0 when every request was answered, 1 when some had to be aborted.

    Raises ConfigError for what cannot be honoured, CheckpointError, and whatever the engine died of in its own words.
    """
    engine.validate()
    server.validate()
    logs.set_up(server.log_level)
    keys = load_keys(server.api_key, server.api_key_file)
    with closing(listen(server.host, server.port, server.write_timeout)) as listener:
        if not keys and not is_local(listener):
            log.warning("%s is open to every machine that reaches it; --api-key KEY would close it", url(listener))
        folder = resolve_model(engine.model, engine.revision)
        left, begun = server.engine_restarts, None
        while True:
            launched = launch(engine, log_level=server.log_level)
            # The HTTP server closes its socket at its end; who calls before the next one is there waits in the line.
            own = listener.dup() if left else listener
            try:
                return asyncio.run(_run(Setup(engine, server, keys, own, folder, launched, begun)))
            except EngineDied as died:
                if not left:
                    raise died.error from None
                left, begun = left - 1, time.monotonic()
                log.error("%s", died.error.message)
                log.warning("the engine is started again; --engine-restarts allows %d more", left)
            finally:
                launched.end()


async def _run(setup: Setup) -> int:
    signals = Signals()
    from weft.server.gate import Gate, guard  # uvicorn is slow to import, and the engine process is on its way now
    from weft.server.http import make_server

    health = Health()
    gate = Gate(health)
    http = make_server(guard(gate, setup.server, setup.keys), setup.server.log_level, FLUSH_SECONDS)
    serving = asyncio.create_task(http.serve(sockets=[setup.listener]))
    client = EngineClient(setup.launched, lambda phase: log.info("starting: %s", phase))
    try:
        started = await _unless(signals.first, _start(setup, client, health))
        if started is None:
            return 0
        app, phases = started
        gate.open(app)
        health.state = State.READY
        _announce(setup, client, phases)
        gc.freeze()  # what is there now stays: no collection shall go through all of it while clients wait
        await asyncio.wait((signals.first, client.death, serving), return_when=asyncio.FIRST_COMPLETED)
        if signals.first.done():
            await _drain(setup, client, health, gate, signals)
        return await _end(client, health, gate, signals)
    finally:
        if gate.running:
            http.hang_up()
        await client.close()
        http.should_exit = True
        await serving


async def _start(setup: Setup, client: EngineClient, health: Health) -> tuple[ASGIApp, list[Phase]]:
    """The application, once the engine serves. Raises what either of the two cannot go on for, whichever is first."""
    ready = asyncio.ensure_future(client.wait_ready())
    app = asyncio.ensure_future(asyncio.to_thread(_make_app, setup, client, health))
    try:
        await asyncio.gather(ready, app)
        return app.result()
    finally:
        ready.cancel()


def _make_app(setup: Setup, client: EngineClient, health: Health) -> tuple[ASGIApp, list[Phase]]:
    """The application, and the seconds that it took."""
    watch = _Stopwatch()
    from weft.server.app import ServerContext, create_app
    from weft.server.limits import BodyLimitMiddleware
    from weft.server.metrics import Metrics
    from weft.text.chat import ChatTemplate
    from weft.text.generation import GenerationDefaults
    from weft.text.tokenizer import Tokenizer

    watch.lap("server imports")
    folder, file = setup.folder, setup.server.chat_template
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.from_folder(folder) if file is None else ChatTemplate.from_file(file, folder)
    defaults = GenerationDefaults.from_folder(folder, tokenizer.eos_ids)
    watch.lap("tokenizer and template")
    names = setup.server.served_model_name or (setup.engine.model,)
    metrics = Metrics(names[0], client.stats)
    app = create_app(ServerContext(client, tokenizer, template, defaults, names, setup.server, metrics, health))
    watch.lap("routes")
    return BodyLimitMiddleware(app, setup.server.max_body_bytes), watch.phases


def _announce(setup: Setup, client: EngineClient, phases: list[Phase]) -> None:
    from weft.server.startup import exec_time, show

    begun = exec_time() if setup.begun is None else setup.begun
    launched, ready = setup.launched.started, client.ready
    front_end = [Phase("python, flags, model folder", launched - begun), *phases]
    engine = [Phase("python", (client.first_word or launched) - launched), *ready.phases]
    show(sys.stdout, ready, engine, front_end, time.monotonic() - begun, url(setup.listener))


async def _drain(setup: Setup, client: EngineClient, health: Health, gate: Gate, signals: Signals) -> None:
    """Take no new requests, and wait for those that run: as long as is allowed, or until a second signal."""
    health.state = State.DRAINING
    seconds = setup.server.shutdown_timeout
    log.info(
        "shutting down; running requests (%d) get %g seconds; a second signal ends them at once", gate.running, seconds
    )
    idle = asyncio.ensure_future(gate.idle())
    await asyncio.wait((idle, signals.second, client.death), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    idle.cancel()


async def _end(client: EngineClient, health: Health, gate: Gate, signals: Signals) -> int:
    """The exit code of a server that has drained. Raises what the engine died of, once its clients know: EngineDied
    where nobody had told the server to end."""
    death = client.death.result() if client.death.done() else None
    left = gate.running
    if death is not None or not signals.first.done():
        health.die(client.dead_reason or "the HTTP server has ended")
    elif left:
        log.warning("%d requests are aborted", left)
        await client.close("the server is shutting down", HURRY_SECONDS if signals.second.done() else SHUTDOWN_SECONDS)
    try:
        await asyncio.wait_for(gate.idle(), FLUSH_SECONDS)
    except TimeoutError:
        log.warning("%d answers could not be sent to their end: their clients do not take them", gate.running)
    if death is not None:
        raise death if signals.first.done() else EngineDied(death)
    if not signals.first.done():
        raise WeftError("the HTTP server has ended by itself")
    return 1 if left else 0


async def _unless(stop: asyncio.Future[None], work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if `stop` is done before."""
    task = asyncio.ensure_future(work)
    await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.wait((task,))
    return None


class Signals:
    """SIGTERM and SIGINT: `first` is done once one came, `second` once another did."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.second: asyncio.Future[None] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on)

    def _on(self) -> None:
        future = self.second if self.first.done() else self.first
        if not future.done():
            future.set_result(None)


class _Stopwatch:
    """Phases, one after the other."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.phases.append(Phase(name, now - self._last))
        self._last = now
