"""From a configuration to an engine: phases, what `Ready` says, and what happens when it goes wrong."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weft.config import EngineConfig
from weft.core.request import Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.errors import CheckpointError, ConfigError, QueueFull
from weft.ipc.messages import Phase
from weft.loop import build
from weft.loop.build import Phases, open_engine
from weft.phases.controller import replay
from weft.phases.observations import Targets
from weft.phases.recording import read


def test_an_engine_on_the_simulated_device_is_ready_and_serves() -> None:
    said: list[str] = []
    config = EngineConfig(device="simulated", num_blocks=50, max_num_seqs=3, max_model_len=200)
    engine, ready = open_engine(config, said.append)
    try:
        assert (ready.model, ready.device) == ("builtin", "simulated")
        assert (ready.blocks, ready.block_size, ready.max_num_seqs, ready.max_model_len) == (50, 16, 3, 200)
        assert ready.vocabulary == 4096
        assert [phase.name for phase in ready.phases] == said
        assert all(phase.seconds >= 0 for phase in ready.phases)
        engine.submit(Request("a", (1, 2, 3), SamplingParams(max_tokens=2)))
        events = []
        while not engine.idle:
            events += engine.step(10.0)
        assert isinstance(events[-1], RequestEnd) and events[-1].generated_tokens == 2
    finally:
        engine.close()


@pytest.mark.parametrize("partition", ["auto", "paper", "60%:80%"])
@pytest.mark.parametrize("device", ["simulated", "cpu"])
def test_an_engine_whose_lanes_overlap_or_change_answers_like_one_with_a_mixed_lane(
    partition: str, device: str
) -> None:
    told = {}
    for one in (partition, "off"):
        settings = {"slo_ttft": 0.02, "slo_tpot": 0.001} if one in ("auto", "paper") else {}
        config = EngineConfig(
            device=device, num_blocks=60, max_num_seqs=4, max_model_len=200, partition=one, **settings
        )
        engine, _ = open_engine(config, lambda phase: None)
        try:
            for number in range(6):
                params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
                try:
                    engine.submit(Request(f"r{number}", tuple(range(number, number + 50)), params))
                except QueueFull:
                    pytest.fail("nothing is known yet that a request could be refused for")
            tokens: dict[str, list[int]] = {}
            while not engine.idle:
                for event in engine.step(10.0):
                    if isinstance(event, TokenOutput) and event.token is not None:
                        tokens.setdefault(event.request, []).append(event.token)
            told[one] = tokens
            stats = engine.stats()
            assert bool(stats.partition_regime) == (one != "off") and stats.iteration_tokens >= 300
        finally:
            engine.close()
    assert told[partition] == told["off"] and len(told["off"]) == 6


@pytest.mark.parametrize("partition", ["auto", "paper"])
def test_what_an_engine_records_is_decided_the_same_again(partition: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    config = EngineConfig(
        device="simulated",
        num_blocks=400,
        max_num_seqs=32,
        max_model_len=200,
        max_num_batched_tokens=96,
        partition=partition,
        partition_record=str(path),
        slo_ttft=1e-6,
        slo_tpot=10.0,
    )
    engine, _ = open_engine(config, lambda phase: None)
    found, number, until = read(path), 0, time.monotonic() + 60.0
    try:
        while all(one.decision is None for one in found.run) and time.monotonic() < until:
            for _ in range(40):
                number += 1
                params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
                with contextlib.suppress(QueueFull):
                    engine.submit(Request(f"r{number}", tuple(range(20)), params))
            while not engine.idle:
                engine.step(10.0)
            found = read(path)
    finally:
        engine.close()
    made = [one.decision for one in found.run]
    assert any(made) and replay(found.policy, found.run) == made
    assert (found.device.chunk, found.device.seats, found.policy.targets) == (96, 32, Targets(1e-6, 10.0))


def test_an_engine_on_the_cpu_says_what_it_is() -> None:
    said: list[str] = []
    config = EngineConfig(kernels="reference", num_blocks=20, max_num_seqs=2, seed=5)
    engine, ready = open_engine(config, said.append)
    engine.close()
    assert (ready.dtype, ready.kernels, ready.vocabulary) == ("bfloat16", "reference", 4096)
    assert ready.max_model_len == 320 and any("320" in note and "2048" in note for note in ready.notes)
    assert [phase.name for phase in ready.phases] == said and said[0] == "find the model" and said[-1] == "KV pool"
    assert {name for name, _ in ready.memory} >= {"weights"}


def test_every_bad_setting_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        open_engine(EngineConfig(block_size=17, max_num_seqs=0, device="abacus"), lambda phase: None)
    for word in ("--block-size is 17", "--max-num-seqs is 0", "--device is 'abacus'"):
        assert word in caught.value.message


def test_a_model_that_is_not_there_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config"):
        open_engine(EngineConfig(model=str(tmp_path)), lambda phase: None)


def test_a_device_is_closed_when_the_engine_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    true_open = build.open_device

    def open_device(*arguments: object) -> object:
        device = true_open(*arguments)  # type: ignore[arg-type]
        close = device.close
        device.close = lambda: (close(), closed.append(True))  # type: ignore[assignment, method-assign]
        return device

    def broken(*arguments: object) -> None:
        raise RuntimeError("no scheduler today")

    monkeypatch.setattr(build, "open_device", open_device)
    monkeypatch.setattr(build, "Scheduler", broken)
    with pytest.raises(RuntimeError, match="today"):
        open_engine(EngineConfig(device="simulated"), lambda phase: None)
    assert closed == [True]


def test_phases_are_timed_from_one_beginning_to_the_next() -> None:
    times = iter([1.0, 4.0, 4.5, 6.0])
    said: list[str] = []
    phases = Phases(said.append, lambda: next(times))
    phases.begin("one")
    phases.begin("two")
    assert phases.end() == (Phase("one", 3.0), Phase("two", 1.5)) == phases.end()
    assert said == ["one", "two"]


def test_the_import_of_torch_is_a_phase_of_its_own() -> None:
    """And nothing before it imports torch, so that its seconds are true."""
    code = (
        "import sys\n"
        "from weft.loop import build\n"
        "from weft.config import EngineConfig\n"
        "assert 'torch' not in sys.modules\n"
        "seen = []\n"
        "def say(phase): seen.append((phase, 'torch' in sys.modules))\n"
        "engine, ready = build.open_engine(EngineConfig(kernels='reference', num_blocks=8), say)\n"
        "engine.close()\n"
        "assert seen[:3] == [('find the model', False), ('import torch', False), ('weights', True)], seen\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
