"""A lane of the CPU or of a GPU fails, hangs, or its thread ends: its requests end with an error, and everybody else is
served."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
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
CPU = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(KERNELS == "reference", reason="torch's products round differently in another batch"),
)
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"))
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of the interpreter
    # That a thread ends with an exception is what some of these are about.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


class Trap:
    """Stands before the model. It springs once: in the prefill lane at a long prompt, in the decode lane at the fifth
    token after a short one. A lane of a GPU has a second thread, which waits for what the first has launched."""

    def __init__(self, kind: str, lane: Lane | None) -> None:
        self.kind, self.lane = kind, lane
        self.sprung, self.go_on = threading.Event(), threading.Event()

    def set(self, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
        if device == "cpu":
            compute = cpu.compute
            monkeypatch.setattr(cpu, "compute", lambda plan, *given: self._spring(plan) or compute(plan, *given))
            return
        from weft.devices.cuda_lane import CudaLane, Pending

        if self.kind == "second ends":
            finish = Pending.finish
            monkeypatch.setattr(Pending, "finish", lambda pending: self._spring(pending.plan) or finish(pending))
            return
        name = "_start" if self.kind == "fails" else "start"  # what the former raises is a step's failure
        start = getattr(CudaLane, name)

        def spring(lane: CudaLane, plan: Plan, *given: Any, **named: Any) -> Any:
            self._spring(plan)
            return start(lane, plan, *given, **named)

        monkeypatch.setattr(CudaLane, name, spring)

    def _spring(self, plan: Plan) -> None:
        at = plan.tokens > SHORT if self.lane is Lane.PREFILL else plan.slices[0].start == SHORT + 4
        if plan.lane is self.lane and at and not self.sprung.is_set():
            self.sprung.set()
            if self.kind == "fails":
                raise RuntimeError("a kernel stumbles")
            if self.kind.endswith("ends"):
                raise SystemExit("the thread was told to go")
            assert self.go_on.wait(60.0)


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


@dataclass(frozen=True, slots=True)
class Served:
    """A device and its model."""

    device: str
    model: Path


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch, by: Served, partition: str, trap: Trap | None = None) -> Iterator[Client]:
    config = EngineConfig(
        model=str(by.model),
        device=by.device,
        partition=partition,
        num_blocks=BLOCKS,
        enable_prefix_caching=False,
    )
    if by.device == "cpu":  # both lanes on one core: nothing here is about speed
        config = replace(config, kernels=KERNELS, cores=str(min(os.sched_getaffinity(0))))
    else:
        config = replace(config, load_format="dummy")
    if trap is not None:
        trap.set(monkeypatch, by.device)
    device, clock = open_device(config, by.model, lambda phase: None), [0.0]
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
    cuts = {"short": (0, SHORT, 16), "long": (50, LONG, 6), "later": (200, SHORT, 8), "last": (300, LONG, 8)}
    return {name: (tuple(tokens[at : at + length]), count) for name, (at, length, count) in cuts.items()}


@pytest.fixture(scope="module", params=[CPU, CUDA])
def by(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    if request.param == "cpu":
        return Served("cpu", BUILTIN)
    folder = tmp_path_factory.mktemp("one-layer")  # interpreted kernels take their time
    shape = json.loads((tiny_model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 1}))
    return Served("cuda", folder)


@pytest.fixture(scope="module")
def right(by: Served) -> dict[str, list[int]]:
    """What one mixed lane answers."""
    with pytest.MonkeyPatch.context() as monkeypatch, served(monkeypatch, by, "off") as client:
        for name, (prompt, count) in prompts().items():
            client.ask(name, prompt, count)
        client.until_ended(*prompts())
        return client.tokens


@pytest.mark.parametrize("partition", ["100%:100%", "turns:1:1"])
@pytest.mark.parametrize("lane", [Lane.PREFILL, Lane.DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("kind", ["fails", "hangs", "ends", "second ends"])
def test_a_lane_that_fails_ends_its_requests_and_the_other_goes_on(
    monkeypatch: pytest.MonkeyPatch, by: Served, right: dict[str, list[int]], kind: str, lane: Lane, partition: str
) -> None:
    if by.device == "cpu" and kind == "second ends":
        pytest.skip("a lane of the CPU has one thread")
    if by.device == "cuda" and partition == "turns:1:1":
        pytest.skip("turns are the scheduler's, whatever the device")
    trap, asked = Trap(kind, lane), prompts()
    victim, spared = ("long", "short") if lane is Lane.PREFILL else ("short", "long")
    with served(monkeypatch, by, partition, trap) as client:
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
    monkeypatch: pytest.MonkeyPatch, by: Served, caplog: pytest.LogCaptureFixture
) -> None:
    trap, asked = Trap("ends", Lane.PREFILL), prompts()
    with served(monkeypatch, by, "100%:100%", trap) as client:
        client.ask("long", *asked["long"])
        client.until_ended("long")  # the clock stands still: no time-out has any part in it
        wanted = "the thread of lane prefill has ended: SystemExit: the thread was told to go"
        assert client.ends["long"].error == wanted and f"{wanted}; the other lane does its work" in caplog.text
        device = client.engine._device
        device.submit(Plan(999, Lane.PREFILL, ()))
        (result,) = device.poll(60.0)
        assert (result.ticket.step, result.error, result.gone) == (999, wanted, True)


def test_when_the_threads_of_all_lanes_have_ended_the_device_is_dead(
    monkeypatch: pytest.MonkeyPatch, by: Served
) -> None:
    with served(monkeypatch, by, "off", Trap("ends", Lane.MIXED)) as client:
        for name in ("short", "later"):
            client.ask(name, *prompts()[name])
        client.until_ended("short", "later")
        assert client.engine.dead is not None and "the thread of lane mixed has ended" in client.engine.dead
        assert client.engine.stats().blocks_free == BLOCKS
