"""A lane of the CPU fails, hangs, or its thread ends: its requests end with an error, and everybody else is served."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from weft.config import EngineConfig
from weft.core.plan import Lane, Plan
from weft.core.request import Finish, Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler
from weft.devices import cpu, open_device
from weft.kernels import available
from weft.loop.build import controller, settings
from weft.loop.engine import Engine
from weft.text.tokenizer import Tokenizer

BUILTIN = Path(__file__).resolve().parents[2] / "src" / "weft" / "assets" / "builtin"
KERNELS = available()[0]
BLOCKS = 64
TIMEOUT = 100.0  # on the test's own clock
LONG, SHORT = 120, 12  # tokens of prompts; longer ones are the victims of a trap in the prefill lane
pytestmark = [
    pytest.mark.skipif(KERNELS == "reference", reason="torch's products round differently in another batch"),
    # That a thread ends with an exception is what some of these are about.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


class Trap:
    """Stands before the model. It springs once: in the prefill lane at a long prompt, in the decode lane at the fifth
    token after a short one."""

    def __init__(self, kind: str, lane: Lane | None) -> None:
        self.kind, self.lane = kind, lane
        self.sprung, self.go_on = threading.Event(), threading.Event()
        self._compute = cpu.compute

    def compute(self, plan: Plan, decoder: Any, forward: Any) -> Any:
        at = plan.tokens > SHORT if self.lane is Lane.PREFILL else plan.slices[0].start == SHORT + 4
        if plan.lane is self.lane and at and not self.sprung.is_set():
            self.sprung.set()
            if self.kind == "fails":
                raise RuntimeError("a kernel stumbles")
            if self.kind == "ends":
                raise SystemExit("the thread was told to go")
            assert self.go_on.wait(60.0)
        return self._compute(plan, decoder, forward)


class Client:
    """An engine with a clock that stands still unless it is told to go on, and what it has said of each request."""

    def __init__(self, engine: Engine, clock: list[float]) -> None:
        self.engine, self.clock = engine, clock
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, RequestEnd] = {}

    def ask(self, name: str, prompt: tuple[int, ...], count: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        self.engine.submit(Request(name, prompt, params))

    def hear(self, seconds: float) -> None:
        for event in self.engine.step(seconds):
            if isinstance(event, TokenOutput) and event.token is not None:
                self.tokens.setdefault(event.request, []).append(event.token)
            elif isinstance(event, RequestEnd):
                assert event.request not in self.ends, "a request ends once"
                self.ends[event.request] = event

    def time_out(self) -> None:
        """The steps that are in flight take too long."""
        self.clock[0] += TIMEOUT + 1.0
        self.hear(0.0)

    def until_ended(self, *names: str) -> None:
        while not set(names) <= set(self.ends):
            self.hear(60.0)


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch, partition: str, trap: Trap | None = None) -> Iterator[Client]:
    config = EngineConfig(
        model=str(BUILTIN),
        kernels=KERNELS,
        partition=partition,
        num_blocks=BLOCKS,
        enable_prefix_caching=False,
        cores=str(min(os.sched_getaffinity(0))),  # both lanes on one: nothing here is about speed
    )
    if trap is not None:
        monkeypatch.setattr(cpu, "compute", trap.compute)
    device, clock = open_device(config, BUILTIN, lambda phase: None), [0.0]
    scheduler = Scheduler(device.capacity(), device.lanes(), settings(config))
    engine = Engine(
        device, scheduler, lambda: clock[0], step_timeout=TIMEOUT, controller=controller(config, device.capacity())
    )
    try:
        yield Client(engine, clock)
    finally:
        if trap is not None:
            trap.go_on.set()
        engine.close()


def prompts() -> dict[str, tuple[tuple[int, ...], int]]:
    """(prompt, tokens of the answer) of each request."""
    tokens = Tokenizer.from_folder(BUILTIN).encode((BUILTIN.parents[1] / "errors.py").read_text())
    cuts = {"short": (0, SHORT, 30), "long": (50, LONG, 6), "later": (200, SHORT, 8), "last": (300, LONG, 8)}
    return {name: (tuple(tokens[at : at + length]), count) for name, (at, length, count) in cuts.items()}


@pytest.fixture(scope="module")
def right() -> dict[str, list[int]]:
    """What one mixed lane answers."""
    with pytest.MonkeyPatch.context() as monkeypatch, served(monkeypatch, "off") as client:
        for name, (prompt, count) in prompts().items():
            client.ask(name, prompt, count)
        client.until_ended(*prompts())
        return client.tokens


@pytest.mark.parametrize("partition", ["100%:100%", "turns:1:1"])
@pytest.mark.parametrize("lane", [Lane.PREFILL, Lane.DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("kind", ["fails", "hangs", "ends"])
def test_a_lane_that_fails_ends_its_requests_and_the_other_goes_on(
    monkeypatch: pytest.MonkeyPatch, right: dict[str, list[int]], kind: str, lane: Lane, partition: str
) -> None:
    trap, asked = Trap(kind, lane), prompts()
    victim, spared = ("long", "short") if lane is Lane.PREFILL else ("short", "long")
    with served(monkeypatch, partition, trap) as client:
        client.ask("short", *asked["short"])
        while not (trap.sprung.is_set() if lane is Lane.DECODE else "short" in client.tokens):
            client.hear(0.05)
        client.ask("long", *asked["long"])
        while not trap.sprung.is_set():
            client.hear(0.05)
        if kind == "hangs":
            # First its requests are given up, then the lane. Where lanes take turns, everybody waits for the former.
            if partition == "turns:1:1":
                client.time_out()
            while not (spared in client.ends if lane is Lane.PREFILL else spared in client.tokens):
                client.hear(0.05)
            for _ in range(1 if partition == "turns:1:1" else 2):
                client.time_out()
        client.until_ended(victim, spared)
        assert client.ends[victim].code == "step_failed" and victim not in client.ends[victim].error  # type: ignore[operator]
        assert client.tokens.get(victim, []) == right[victim][: len(client.tokens.get(victim, []))]
        assert client.ends[spared].reason is Finish.LENGTH and client.tokens[spared] == right[spared]
        # Whatever has become of the lane, requests are served.
        for name in ("later", "last"):
            client.ask(name, *asked[name])
        client.until_ended("later", "last")
        assert {name: client.tokens[name] for name in ("later", "last")} == {
            name: right[name] for name in ("later", "last")
        }
        stats = client.engine.stats()
        assert client.engine.dead is None and stats.blocks_held == 0
        assert stats.blocks_free + stats.blocks_pinned == BLOCKS and (stats.blocks_pinned > 0) == (kind == "hangs")
        if kind == "hangs":  # it answers after all: its blocks come back, and it is asked again
            trap.go_on.set()
            while client.engine.stats().blocks_pinned:
                client.hear(0.05)
            assert client.engine.stats().blocks_free == BLOCKS
            client.ask("again", *asked["last"])
            client.until_ended("again")
            assert client.tokens["again"] == right["last"]


def test_a_lane_whose_thread_has_ended_says_so_at_once_and_for_every_later_plan(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trap, asked = Trap("ends", Lane.PREFILL), prompts()
    with served(monkeypatch, "100%:100%", trap) as client:
        client.ask("long", *asked["long"])
        client.until_ended("long")  # the clock stands still: no time-out has any part in it
        wanted = "the thread of lane prefill has ended: SystemExit: the thread was told to go"
        assert client.ends["long"].error == wanted and f"{wanted}; the other lane does its work" in caplog.text
        device = client.engine._device
        device.submit(Plan(999, Lane.PREFILL, ()))
        (result,) = device.poll(60.0)
        assert (result.ticket.step, result.error, result.gone) == (999, wanted, True)


def test_when_the_threads_of_all_lanes_have_ended_the_device_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(monkeypatch, "off", Trap("ends", Lane.MIXED)) as client:
        for name in ("short", "later"):
            client.ask(name, *prompts()[name])
        client.until_ended("short", "later")
        assert client.engine.dead is not None and "the thread of lane mixed has ended" in client.engine.dead
        assert client.engine.stats().blocks_free == BLOCKS
