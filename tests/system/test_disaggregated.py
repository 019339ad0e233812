"""PD disaggregation on the CPU, for comparison: weights and KV twice, and the tokens of one mixed lane."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from weft.config import EngineConfig
from weft.core.plan import Lane, Plan, Ticket
from weft.core.request import Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler
from weft.devices import open_device
from weft.errors import ConfigError
from weft.kernels import available
from weft.loop.build import controller, settings
from weft.loop.engine import Engine
from weft.text.tokenizer import Tokenizer

BUILTIN = Path(__file__).resolve().parents[2] / "src" / "weft" / "assets" / "builtin"
KERNELS = available()[0]
TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two devices need two cores")
EXACT = pytest.mark.skipif(KERNELS == "reference", reason="torch's products round differently in another batch")


def config(partition: str, **changes: Any) -> EngineConfig:
    given = {"model": str(BUILTIN), "kernels": KERNELS, "num_blocks": 40, "max_model_len": 256} | changes
    return EngineConfig(**given, partition=partition)


def requests() -> list[Request]:
    tokens = Tokenizer.from_folder(BUILTIN).encode((BUILTIN.parents[1] / "errors.py").read_text())
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=1)
    cuts = ((0, 60), (70, 9), (90, 150), (250, 30), (90, 160), (9, 90))
    return [Request(f"r{number}", tuple(tokens[at : at + size]), params) for number, (at, size) in enumerate(cuts)]


def answers(given: EngineConfig) -> tuple[dict[str, list[Any]], list[Plan], dict[str, int]]:
    """(tokens with their log-probabilities by request, the plans, rows of memory)."""
    device, plans = open_device(given, BUILTIN, lambda phase: None), list[Plan]()
    submit = device.submit

    def logged(plan: Plan) -> Ticket:
        plans.append(plan)
        return submit(plan)

    device.submit = logged  # type: ignore[method-assign]
    scheduler = Scheduler(device.capacity(), device.lanes(), settings(given))
    engine = Engine(device, scheduler, controller=controller(given, device.capacity()))
    try:
        for request in requests():
            engine.submit(request)
        found: dict[str, list[Any]] = {request.id: [] for request in requests()}
        while not engine.idle:
            for event in engine.step(60.0):
                if isinstance(event, TokenOutput):
                    found[event.request].append((event.token, event.score))
                assert not isinstance(event, RequestEnd) or event.error is None
        assert scheduler.pool.held == scheduler.pool.pinned == 0 and scheduler.pool.conserved
        return found, plans, dict(device.memory())
    finally:
        engine.close()


def slices(plans: Sequence[Plan], lane: Lane) -> list[Any]:
    return [piece for plan in plans for piece in plan.slices if plan.lane is lane]


@TWO_CORES
@EXACT
@pytest.mark.parametrize("cache", ["auto", "int4"])
def test_disaggregated_phases_answer_what_one_lane_answers_bit_by_bit(cache: str) -> None:
    wanted, _, memory = answers(config("off", kv_cache_dtype=cache))
    found, plans, twice = answers(config("pd:1:1", kv_cache_dtype=cache))
    assert found == wanted
    assert twice["weights"] == 2 * memory["weights"], "loaded twice"
    copied = [piece for piece in slices(plans, Lane.DECODE) if piece.source]
    assert len(copied) >= len(requests()), "every prompt is handed over, and once more after a preemption"
    assert max(block for piece in slices(plans, Lane.PREFILL) for block in piece.blocks) < 20
    assert min(block for piece in slices(plans, Lane.DECODE) for block in piece.blocks) >= 20


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_pools_that_hold_no_sequence_of_full_length_name_what_would_work(device: str) -> None:
    if device == "cpu" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two devices need two cores")
    small = config("pd:1:3", device=device, num_blocks=40)
    with pytest.raises(ConfigError, match=r"40 KV blocks into 10 and 30.* 256 tokens; --num-blocks 65 would work"):
        open_device(small, BUILTIN, lambda phase: None)
    for changes, decode in (({"num_blocks": 65}, 49), ({"max_model_len": 160}, 30)):
        opened = open_device(config("pd:1:3", device=device, **changes), BUILTIN, lambda phase: None)
        opened.close()
        assert opened.capacity().decode_blocks == decode
        note = f"disaggregated: weights twice, {opened.capacity().blocks - decode} + {decode} KV blocks"
        assert (note in opened.describe().notes) == (device == "cpu")


def test_a_gpu_has_no_disaggregation() -> None:
    with pytest.raises(ConfigError, match="--partition pd:1:1 is for --device cpu and simulated"):
        open_device(config("pd:1:1", device="cuda", kernels="auto"), BUILTIN, lambda phase: None)
