"""Lanes that have another share at every step: what comes out is the same to the last bit, and no step is lost.

tests/system/test_switches.py says the same of the CPU, through the engine, which needs packages that a bare image
lacks. Without a GPU kernels are interpreted, on a smaller model: then nothing is divided, but lanes go from stream to
stream all the same.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is no GPU here, and kernels are not interpreted", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from weft.config import EngineConfig
from weft.core.plan import Lane, Partition, Plan, Result, Ticket, TokenScore
from weft.core.request import Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices import cuda_streams, open_device
from weft.devices.base import Device

GPU = torch.cuda.is_available()
STREAM = cuda_streams.TorchStream if GPU else cuda_streams.Immediate
LENGTHS = (5, 40, 70, 1, 33, 90) if GPU else (5, 20, 1)
LENGTH = 24 if GPU else 5  # of an answer
SEATS, BUDGET = 8, 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True, logprobs=1)
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
PROMPTS = [tuple((7 * i + 13 * place) % 4096 for place in range(length)) for i, length in enumerate(LENGTHS)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter


@dataclass
class Run:
    """What came out, by request, and what was asked of the device."""

    answers: dict[str, list[tuple[int | None, TokenScore | None]]]
    plans: list[Plan] = field(default_factory=list)
    moves: int = 0


def serve(device: Device, chance: random.Random | None) -> Run:
    """All prompts, one more with every other step. chance: draws other shares before each step. Both lanes' steps are
    awaited before the next ones, so that plans do not depend on how fast a lane is."""
    settings = SchedulerSettings(SEATS, BUDGET, enable_prefix_caching=False)
    scheduler = Scheduler(device.capacity(), device.lanes(), settings)
    units = device.capacity().shares
    due = [Request(str(number), prompt, GREEDY) for number, prompt in enumerate(PROMPTS)]
    run, now = Run({request.id: [] for request in due}), 0
    while due or scheduler.live:
        now += 1
        if due and now % 2:
            scheduler.submit(due.pop(0), now)
        waiting: list[Ticket] = []
        landed: list[Result] = []
        for lane in scheduler.order():
            plan = scheduler.schedule(lane, now)
            if plan is not None:
                if chance is not None:
                    device.set_partition(Partition(chance.randint(1, units), chance.randint(1, units)))
                run.plans.append(plan)
                waiting.append(device.submit(plan))
        while waiting:
            results = device.poll(120.0)
            assert results, "no result within two minutes"
            for result in results:
                waiting.remove(result.ticket)
            landed += results
        for result in sorted(landed, key=lambda one: one.ticket.step):
            assert result.error is None, result.error
            run.moves += result.moved > 0
            for event in scheduler.complete(result, now):
                if isinstance(event, TokenOutput):
                    run.answers[event.request].append((event.token, event.score))
                elif isinstance(event, RequestEnd):
                    assert event.error is None, event
    return run


@pytest.fixture
def given(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The flags for a model. On a GPU one whose products are all weft's own."""
    if GPU:
        return {"model": str(request.getfixturevalue("quantised_model")), "dtype": "bfloat16"}
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(TINY | small))
    return {"model": str(tmp_path), "load_format": "dummy"}


def test_other_shares_at_every_step_change_no_bit_and_lose_no_step(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: Counter[int] = Counter()
    capture = STREAM.capture

    def counted(stream: Any, work: Any) -> Any:
        recorded[id(stream)] += 1
        return capture(stream, work)

    config = EngineConfig(
        device="cuda",
        partition="1:1",
        num_blocks=100,
        max_model_len=128,
        max_num_seqs=SEATS,
        max_num_batched_tokens=BUDGET,
        **given,
    )
    device = open_device(config, Path(config.model), lambda phase: None)
    try:
        if GPU and any("shares are not enforced" in note for note in device.describe().notes):
            pytest.skip("this GPU cannot be divided")
        monkeypatch.setattr(STREAM, "capture", counted)
        still = serve(device, None)
        buckets = sum(recorded.values())
        restless = serve(device, random.Random(7))
    finally:
        device.close()
    assert still.moves == 0 and restless.moves >= len(restless.plans) // 2
    assert restless.plans == still.plans
    assert restless.answers == still.answers  # tokens and log-probabilities, exactly
    for run in (still, restless):
        # No step is lost: every token of a prompt is computed once, every other one once.
        assert sum(plan.tokens for plan in run.plans) == sum(LENGTHS) + len(LENGTHS) * (LENGTH - 1)
        # No request stalls longer than one step of its own lane: each decode step has everybody who decodes by then.
        steps = [{piece.sequence for piece in plan.slices} for plan in run.plans if plan.lane is Lane.DECODE]
        for sequence in set().union(*steps):
            present = [number for number, step in enumerate(steps) if sequence in step]
            assert present == list(range(present[0], present[0] + LENGTH - 1))
    assert buckets > 0 and len(recorded) >= 3, "graphs are recorded on each share that decode has had"
    assert max(recorded.values()) <= 4, "once there: 1, 2, 4 and 8 rows"
