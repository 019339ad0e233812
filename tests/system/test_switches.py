"""The phases switch how they share the CPU, at every step: what comes out is the same to the last bit."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from weft.config import EngineConfig
from weft.core.plan import Lane, Partition, Plan, Regime, Sharing, Ticket
from weft.core.request import Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler
from weft.devices import open_device
from weft.devices.base import Device
from weft.kernels import available
from weft.loop.build import settings
from weft.loop.engine import Engine
from weft.phases.controller import Controller
from weft.phases.observations import Decision, Observation, Queue
from weft.text.tokenizer import Tokenizer

BUILTIN = Path(__file__).resolve().parents[2] / "src" / "weft" / "assets" / "builtin"
KERNELS = available()[0]
LENGTH = 16
pytestmark = [
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two lanes need two cores"),
    pytest.mark.skipif(KERNELS == "reference", reason="torch's products round differently in another batch"),
]


@dataclass(frozen=True, slots=True)
class Restless:
    """Another way of sharing two cores whenever it is asked."""

    regimes: tuple[Regime, ...]

    def start(self) -> int:
        return 0

    def first(self, now: float) -> Decision:
        return Decision(now, Sharing(self.regimes[0], Partition(1, 1), 8), "to begin with")

    def decide(
        self, state: int, seen: tuple[Observation, ...], queue: Queue, now: float
    ) -> tuple[int, Decision | None]:
        rng = random.Random(state)
        partition = Partition(rng.randint(1, 2), rng.randint(1, 2))
        sharing = Sharing(rng.choice(self.regimes), partition, rng.choice([4, 16, 64]))
        return state + 1, Decision(now, sharing, "restless")


class Logged:
    """A device that remembers what it was given."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.plans: list[Plan] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def submit(self, plan: Plan) -> Ticket:
        self.plans.append(plan)
        return self._device.submit(plan)


@contextmanager
def opened(policy: Any) -> Iterator[tuple[Engine, list[Plan]]]:
    config = EngineConfig(
        model=str(BUILTIN),
        kernels=KERNELS,
        partition="off" if policy is None else "1:1",
        num_blocks=400,
        max_num_seqs=8,
        max_num_batched_tokens=96,
    )
    device: Any = Logged(open_device(config, BUILTIN, lambda phase: None))
    scheduler = Scheduler(device.capacity(), device.lanes(), settings(config))
    controller = None if policy is None else Controller(policy, interval=0.0)
    engine = Engine(device, scheduler, controller=controller)
    try:
        yield engine, device.plans
    finally:
        engine.close()


def prompts() -> list[tuple[int, ...]]:
    """Six, of which some are cut by the budget of a step; none begins like another."""
    text = (BUILTIN.parents[1] / "errors.py").read_text()
    tokens = Tokenizer.from_folder(BUILTIN).encode(text)
    return [
        tuple(tokens[at : at + length]) for at, length in ((0, 60), (70, 9), (90, 150), (250, 30), (300, 200), (9, 90))
    ]


def answers(engine: Engine) -> dict[str, list[Any]]:
    """Tokens with their log-probabilities, by request. One more request comes with every other step."""
    params = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True, logprobs=1)
    due = [Request(f"r{number}", prompt, params) for number, prompt in enumerate(prompts())]
    found: dict[str, list[Any]] = {request.id: [] for request in due}
    steps = 0
    while due or not engine.idle:
        if due and steps % 2 == 0:
            engine.submit(due.pop(0))
        steps += 1
        for event in engine.step(60.0):
            if isinstance(event, TokenOutput):
                found[event.request].append((event.token, event.score))
            elif isinstance(event, RequestEnd):
                assert event.error is None
    return found


@pytest.mark.parametrize("regimes", [(Regime.SPLIT,), (Regime.TURNS,), tuple(Regime)], ids=["split", "turns", "all"])
def test_a_switch_at_every_step_changes_no_bit_and_loses_no_step(regimes: tuple[Regime, ...]) -> None:
    with opened(None) as (engine, _):
        wanted = answers(engine)
    with opened(Restless(regimes)) as (engine, plans):
        found = answers(engine)
        stats = engine.stats()
    assert found == wanted
    assert stats.partition_switches >= 20 and (stats.blocks_held, stats.blocks_pinned) == (0, 0)
    decode = next(lane for lane in stats.lanes if lane.lane == "decode")
    if Regime.SPLIT in regimes:
        assert 0 < decode.moves <= decode.steps and 0 < decode.move_seconds < 1.0, "what a switch costs is told"
    # No step is lost: every token of a prompt is computed once, every other one once.
    computed = sum(plan.tokens for plan in plans if plan.last)
    assert computed == sum(map(len, prompts())) + len(prompts()) * (LENGTH - 1) == stats.iteration_tokens
    if regimes != tuple(Regime):
        assert_nobody_is_left_out(plans)
    if Regime.TURNS in regimes and regimes != tuple(Regime):
        assert any(plan.parts > 1 for plan in plans)


def assert_nobody_is_left_out(plans: list[Plan]) -> None:
    """No request stalls longer than one step of its own lane: each decode step has everybody that has begun to decode
    by then and has not ended, and each step of prompts has those that are half done."""
    filling, decode = (
        [{piece.sequence for piece in plan.slices} for plan in plans if plan.lane is lane and plan.last]
        for lane in (Lane.PREFILL, Lane.DECODE)
    )
    for sequence in set().union(*decode):
        present = [number for number, step in enumerate(decode) if sequence in step]
        assert present == list(range(present[0], present[0] + LENGTH - 1))
    cut = 0
    for sequence in set().union(*filling):
        present = [number for number, step in enumerate(filling) if sequence in step]
        assert present == list(range(present[0], present[-1] + 1))
        cut += len(present) > 1
    assert cut >= 2, "there are prompts that take several steps"
