"""One sequence, one answer on a real GPU: whatever the batch, the chunks, the cache, the preemptions, the lanes.

tests/system/test_equality.py says the same through the engine, which needs packages that a bare image lacks; here the
scheduler drives the device. With quantised linears, and with --batch-invariant, every product is weft's own, and a
row's bits are its own: log-probabilities are compared exactly. cuBLAS, which multiplies plain weights otherwise, may
sum another number of rows in another order, so with it the tokens are compared, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from weft.config import EngineConfig
from weft.core.plan import TokenScore
from weft.core.request import Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices import open_device
from weft.devices.base import Device

LENGTH = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
PROMPTS = [tuple((7 * i + 13 * place) % 4096 for place in range(length)) for i, length in enumerate((5, 40, 70, 1, 33))]


@dataclass(frozen=True)
class Case:
    """model: a fixture. exact: whether log-probabilities are compared, too. host: tokens are drawn by the host, for
    their log-probabilities; otherwise by the device, which computes ahead. flags: that are given."""

    model: str
    dtype: str
    cache: str
    exact: bool = True
    host: bool = False
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join((self.model, self.dtype, self.cache, str(self.host), *self.flags))

    @property
    def greedy(self) -> SamplingParams:
        return replace(GREEDY, logprobs=2 if self.host else None)


UNPROMISED = Case("tiny_model", "bfloat16", "auto", host=True)
CASES = [
    Case("quantised_model", "bfloat16", "bf16", host=True),
    Case("quantised_model", "bfloat16", "bf16"),
    Case("quantised_model", "bfloat16", "int4", host=True),
    Case("quantised_model", "bfloat16", "int8"),
    Case("tiny_model", "float32", "auto", exact=False),
    Case("tiny_model", "bfloat16", "auto", host=True, flags=("batch_invariant",)),
    Case("tiny_model", "bfloat16", "int4", flags=("batch_invariant",)),
    Case("quantised_model", "bfloat16", "auto", host=True, flags=("batch_invariant", "w4a16")),
    UNPROMISED,  # shows what --batch-invariant is for
]
XFAIL = pytest.mark.xfail(reason="cuBLAS may sum another number of rows in another order")


def marked(case: Case) -> Any:
    own_worker = pytest.mark.xdist_group(case.name)  # its device is opened once
    return pytest.param(case, marks=[own_worker, XFAIL] if case is UNPROMISED else own_worker)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore | None] = field(default_factory=list)
    end: RequestEnd | None = None


class Driver:
    """A scheduler and its device, as the engine's loop drives them."""

    def __init__(self, device: Device, **settings: Any) -> None:
        self.device = device
        given = {"max_num_seqs": 8, "max_num_batched_tokens": 512} | settings
        self.scheduler = Scheduler(device.capacity(), device.lanes(), SchedulerSettings(**given))
        self._now = 0  # in steps

    def answers(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, *, preempt: bool = False
    ) -> list[Answer]:
        """All at once. preempt: every third step sends somebody back to the queue."""
        found = [Answer() for _ in prompts]
        for number, prompt in enumerate(prompts):
            self.scheduler.submit(Request(str(number), prompt, params), self._now)
        while self.scheduler.live:
            self._now += 1
            if preempt and self._now % 3 == 0:
                self.scheduler.preempt(str(self._now // 3 % len(prompts)))
            for lane in self.scheduler.order():
                plan = self.scheduler.schedule(lane, self._now)
                if plan is not None:
                    self.device.submit(plan)
            results = self.device.poll(120.0)
            assert results, "no result within two minutes"
            for result in results:
                assert result.error is None, result.error
                for event in self.scheduler.complete(result, self._now):
                    self._note(found[int(event.request)], event)
        return found

    @staticmethod
    def _note(answer: Answer, event: Any) -> None:
        if isinstance(event, TokenOutput):
            assert event.token is not None, event
            answer.tokens.append(event.token)
            answer.scores.append(event.score)
        elif isinstance(event, RequestEnd):
            assert event.error is None, event
            answer.end = event

    def one_by_one(self, params: SamplingParams) -> list[Answer]:
        return [self.answers([prompt], params)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module", params=map(marked, CASES), ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def folder(case: Case, tiny_model: Path, quantised_model: Path) -> Path:
    return tiny_model if case.model == "tiny_model" else quantised_model


@contextmanager
def opened(case: Case, folder: Path, **settings: Any) -> Iterator[Device]:
    given = {"num_blocks": 200, "max_num_seqs": 8, "max_model_len": 512} | dict.fromkeys(case.flags, True) | settings
    device = open_device(
        EngineConfig(device="cuda", dtype=case.dtype, kv_cache_dtype=case.cache, **given), folder, lambda phase: None
    )
    try:
        yield device
    finally:
        device.close()


@pytest.fixture(scope="module")
def device(case: Case, folder: Path) -> Iterator[Device]:
    with opened(case, folder) as device:
        yield device


@pytest.fixture(scope="module")
def expected(case: Case, device: Device) -> list[Answer]:
    """Each prompt alone, whole, nothing cached."""
    return Driver(device, enable_prefix_caching=False).one_by_one(case.greedy)


def same(case: Case, found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    if case.exact:
        assert [one.scores for one in found] == [one.scores for one in expected]  # floats, exactly


def test_answers_differ(expected: list[Answer]) -> None:
    assert len({tuple(one.tokens) for one in expected}) == len(PROMPTS)


def test_companions_change_nothing(case: Case, device: Device, expected: list[Answer]) -> None:
    driver = Driver(device, enable_prefix_caching=False)
    same(case, driver.answers(PROMPTS, case.greedy), expected)
    same(case, driver.answers(PROMPTS[::-1], case.greedy), expected[::-1])


def test_prefix_hits_change_nothing(case: Case, device: Device, expected: list[Answer]) -> None:
    driver = Driver(device)
    same(case, driver.one_by_one(case.greedy), expected)
    again = driver.answers(PROMPTS, case.greedy)
    same(case, again, expected)
    assert again[2].end is not None and again[2].end.cached_tokens >= 64
    assert driver.scheduler.running.prefix_hits > 0


@pytest.mark.parametrize("budget", [7, 33])
def test_chunk_boundaries_change_nothing(case: Case, device: Device, expected: list[Answer], budget: int) -> None:
    driver = Driver(device, max_num_batched_tokens=budget, max_num_seqs=4)
    same(case, driver.answers(PROMPTS, case.greedy), expected)


@pytest.mark.parametrize("caching", [False, True])
def test_preemption_changes_nothing(case: Case, device: Device, expected: list[Answer], caching: bool) -> None:
    """Who comes back has prefill compute again what decode computed before, or finds a part of it."""
    driver = Driver(device, enable_prefix_caching=caching)
    same(case, driver.answers(PROMPTS, case.greedy, preempt=True), expected)
    assert driver.scheduler.running.preemptions > 1


def test_two_lanes_change_nothing(case: Case, folder: Path, expected: list[Answer]) -> None:
    with opened(case, folder, partition="1:1") as device:
        for settings in ({}, {"max_num_batched_tokens": 16}):
            same(case, Driver(device, **settings).answers(PROMPTS, case.greedy), expected)
