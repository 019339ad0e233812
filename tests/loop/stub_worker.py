"""An engine process around a stub: `python stub_worker.py`. What it does depends on the model's name and the prompt."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from weft.config import EngineConfig
from weft.core.plan import TokenScore
from weft.core.request import Event, Finish, PromptScores, Request, RequestEnd, Timing, TokenOutput
from weft.errors import CheckpointError, InvalidRequest, QueueFull
from weft.ipc.messages import LaneStats, Phase, Ready, Stats
from weft.loop.worker import main

# First tokens of a prompt, and what becomes of the request.
ECHO, FOREVER, FULL, BAD, CRASH, FAULT, KILL, DEAD, SLOW = range(9)
CLOSED = 5  # exit code, once a dead engine was closed


class StubEngine:
    """Echoes the rest of each prompt, one token a round."""

    def __init__(self) -> None:
        self.dead: str | None = None
        self._woken = threading.Event()
        self._open: dict[str, list[int]] = {}
        self._ends: list[Event] = []
        self._started = time.monotonic()

    def submit(self, request: Request) -> None:
        kind = request.prompt[0]
        if kind == FULL:
            raise QueueFull("the queue is full: 3 requests wait", retry_after=7)
        if kind == BAD:
            raise InvalidRequest("temperature is 9; use less", param="temperature")
        if kind == FAULT:
            raise ZeroDivisionError("a fault")
        if kind == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        self._open[request.id] = list(request.prompt)

    def abort(self, request_id: str) -> None:
        if self._open.pop(request_id, None) is not None:
            self._ends.append(_end(request_id, Finish.ABORT))

    def stop(self, request_id: str, index: int) -> None:
        if self._open.pop(request_id, None) is not None:
            self._ends += [TokenOutput(request_id, index, None, finish=Finish.STOP), _end(request_id, Finish.STOP)]

    def step(self, timeout: float | None) -> list[Event]:
        events, self._ends = self._ends, []
        if not self._open and not events:
            self._woken.wait(timeout)
            self._woken.clear()
            return []
        for name, tokens in list(self._open.items()):
            if tokens[0] == CRASH:
                raise RuntimeError("the stub fell over")
            if tokens[0] == DEAD:
                self.dead = "the stub's device burnt out"
                del self._open[name]
                events.append(_end(name, Finish.ERROR, self.dead))
            elif tokens[0] == FOREVER:
                time.sleep(0.001)
                events.append(TokenOutput(name, 0, 7))
            elif len(tokens) == 1:
                events.append(PromptScores(name, (TokenScore(1, -0.5, 1),)))
                events.append(_end(name, Finish.STOP))
                del self._open[name]
            else:
                if tokens[0] == SLOW:
                    time.sleep(0.1)
                events.append(TokenOutput(name, 0, tokens.pop(1)))
        return events

    def wake(self) -> None:
        self._woken.set()

    def stats(self) -> Stats:
        lanes = (LaneStats("prefill", 1, 0.5, 10, 100, 0), LaneStats("decode", 3, 0.25, 20, 20, len(self._open)))
        return Stats(len(self._open), 0, 90, 6, 4, 0, 2, 11, 5, 100, 50, time.monotonic() - self._started, lanes)

    def close(self) -> None:
        if self.dead is not None:
            time.sleep(0.3)  # as for ranks that have to be ended
            os._exit(CLOSED)


def _end(name: str, reason: Finish, error: str | None = None) -> RequestEnd:
    return RequestEnd(name, reason, 3, 0, 2, Timing(0.0, 0.1, 0.2, 0.3), error)


def open_stub(config: EngineConfig, say: Callable[[str], None]) -> tuple[StubEngine, Ready]:
    say("weights")
    match config.model:
        case "broken":
            raise CheckpointError("model.safetensors is missing\nfrom the folder")
        case "odd":
            raise KeyError("hidden_size")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exits":
            os._exit(3)
        case "slow":
            time.sleep(600)
    say("KV")
    phases = (Phase("weights", 0.25), Phase("KV", 0.125))
    memory = (("weights", 3 * 2**30), ("KV pool", 512))
    return StubEngine(), Ready(
        config.model, "stub", "float32", "none", 1024, 512, 100, 16, 8, phases, memory, notes=("a stub is fast",)
    )


if __name__ == "__main__":
    sys.exit(main(open_stub))  # type: ignore[arg-type]
