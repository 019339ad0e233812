"""The engine process: `python -m weft.loop.worker`, started by loop/launch.py.

Its main thread owns the engine. A second thread waits for messages, and for the end of the parent, so that an idle
process sleeps in the kernel and a new request wakes it at once.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic

import msgspec
import zmq

from weft import log as logs
from weft.config import EngineConfig
from weft.core.request import Event, PromptScores, Request, RequestEnd, TokenOutput
from weft.errors import DeviceError, QueueFull, WeftError
from weft.ipc.channel import FROM_ENGINE, LINGER_SECONDS, TO_ENGINE, Message, Receiver, Sender
from weft.ipc.messages import (
    Abort,
    AskStats,
    Died,
    FromEngine,
    Phase,
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
from weft.loop.launch import Orders

if TYPE_CHECKING:
    from weft.loop.engine import Engine

OpenEngine = Callable[[EngineConfig, Callable[[str], None]], tuple["Engine", Ready]]
IMPORTS = "engine imports"
log = logging.getLogger(__name__)


def main(open_engine: OpenEngine | None = None) -> int:
    """Read the orders, open the engine and serve until told to end. open_engine: loop/build.py's, by default.

    Returns the exit code: 0 when told to end, 1 after a `Died`.
    """
    # The parent decides when to end, also when a terminal or a service manager signals the whole group of processes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=Orders)
    logs.set_up(orders.log_level)
    folder = Path(orders.folder)
    inbox: Inbox[ToEngine] = Inbox(folder, sys.stdin.buffer, TO_ENGINE, ToEngine)
    sender: Sender[FromEngine] = Sender(folder, FROM_ENGINE)
    engine: Engine | None = None
    try:
        engine, ready = _open(orders.config, open_engine, sender)
        inbox.wake = engine.wake
        gc.freeze()  # what is there now stays: no collection shall go through all of it while requests wait
        sender.send(ready)
        serve(engine, inbox, sender)
        return 0
    except Exception as error:  # the one place where the engine dies
        # The parent shows the words. Where they come from is of use when it is a fault of ours.
        level = logging.DEBUG if isinstance(error, WeftError) else logging.ERROR
        log.log(level, "the engine died", exc_info=True)
        sender.send(died(error))
        return 1
    finally:
        if engine is not None:
            engine.close()
        inbox.close()
        sender.close(LINGER_SECONDS)


def _open(config: EngineConfig, open_engine: OpenEngine | None, sender: Sender[FromEngine]) -> tuple[Engine, Ready]:
    """The engine, and the `Ready` with the seconds of the imports as its first phase."""

    def say(phase: str) -> None:
        sender.send(Starting(phase))

    started = time.monotonic()
    if open_engine is None:
        say(IMPORTS)
        from weft.loop import build  # torch comes with it

        open_engine = build.open_engine
    phase = Phase(IMPORTS, time.monotonic() - started)
    engine, ready = open_engine(config, say)
    return engine, msgspec.structs.replace(ready, phases=(phase, *ready.phases))


def serve(engine: Engine, inbox: Inbox[ToEngine], sender: Sender[FromEngine]) -> None:
    """Until a Shutdown comes. Whatever a message or a step brings is sent before the next step begins.

    Raises DeviceError when the device died; the requests' ends have been sent then.
    """
    while True:
        for message in inbox.take():
            if isinstance(message, Shutdown):
                return
            answer = _handle(engine, message)
            if answer is not None:
                sender.send(answer)
        for batch in batches(engine.step(None)):
            sender.send(batch)
        if engine.dead is not None:
            raise DeviceError(engine.dead)


def _handle(engine: Engine, message: Submit | Abort | Stop | AskStats) -> Refused | Stats | None:
    if isinstance(message, Submit):
        return _submit(engine, message.request)
    if isinstance(message, Abort):
        engine.abort(message.request)
        return None
    if isinstance(message, Stop):
        engine.stop(message.request, message.index)
        return None
    return engine.stats()


def _submit(engine: Engine, request: Request) -> Refused | None:
    try:
        engine.submit(request)
    except WeftError as error:
        retry_after = error.retry_after if isinstance(error, QueueFull) else None
        return Refused(request.id, error.message, error.code or "", error.param, retry_after)
    except Exception as error:  # a request that finds a fault of ours must not end the others
        log.exception("request %s was refused because of a fault of weft", request.id)
        engine.abort(request.id)
        return Refused(request.id, f"internal error: {type(error).__name__}", "")
    return None


def batches(events: Sequence[Event]) -> Iterator[Tokens]:
    """The events of one round: prompt scores, which can be megabytes, each by themselves; then all the rest."""
    for event in events:
        if isinstance(event, PromptScores):
            yield Tokens(scores=(event,))
    outputs = tuple(event for event in events if isinstance(event, TokenOutput))
    ends = tuple(event for event in events if isinstance(event, RequestEnd))
    if outputs or ends:
        yield Tokens(outputs=outputs, ends=ends)


def died(error: Exception) -> Died:
    """The error in its own words, as the front end will show them."""
    if isinstance(error, WeftError):
        words, code = error.message, error.code
    else:
        words, code = ": ".join(filter(None, (type(error).__name__, str(error)))), None
    return Died(words.encode(errors="backslashreplace").decode(), code)


class Inbox(Generic[Message]):
    """Messages for this process, taken in by a thread of its own. The thread ends the process when `lifeline` ends.

    name, union: as of the Receiver.
    """

    def __init__(self, folder: Path, lifeline: BinaryIO, name: str, union: Any) -> None:
        self._folder = folder
        self._lifeline = lifeline
        self._receiver: Receiver[Message] = Receiver(folder, name, union)
        self._arrived: deque[Message | Exception] = deque()
        self._stop, self._stopper = os.pipe()
        self._thread = threading.Thread(target=self._run, name="inbox", daemon=True)
        self.wake: Callable[[], None] = lambda: None
        self.tidy: Callable[[], None] = lambda: None  # called before the process is ended
        self._thread.start()

    def take(self) -> Iterator[Message]:
        """What has arrived. `wake` is called after each arrival. Raises what the thread died of."""
        while self._arrived:
            message = self._arrived.popleft()
            if isinstance(message, Exception):
                raise message
            yield message

    def close(self) -> None:
        """End the thread."""
        os.close(self._stopper)
        self._thread.join()
        os.close(self._stop)

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._receiver.socket, self._lifeline.fileno(), self._stop):
            poller.register(source, zmq.POLLIN)
        try:
            while self._stop not in (ready := dict(poller.poll())):
                if self._lifeline.fileno() in ready and not os.read(self._lifeline.fileno(), 4096):
                    self._end()
                while (message := self._receiver.take()) is not None:
                    self._arrived.append(message)
                    self.wake()
        except Exception as error:  # without this thread the engine is deaf: the main thread shall die of it
            self._arrived.append(error)
            self.wake()
        finally:
            self._receiver.close()

    def _end(self) -> None:
        """The parent is gone, so nobody waits for anything, and nobody else will tidy up."""
        self.tidy()
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
