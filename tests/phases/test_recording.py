"""Recorded runs: read back bit by bit, decided the same again, and what weft doctor says of them."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from weft.cli import doctor
from weft.core.plan import Capacity, Partition, Sharing
from weft.core.request import Request
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices.cost import CostModel
from weft.devices.virtual import VirtualDevice
from weft.errors import ConfigError
from weft.loop.engine import Engine
from weft.phases.auto import AutoPolicy
from weft.phases.controller import Asked, Controller, replay
from weft.phases.forecast import Limits
from weft.phases.observations import Targets
from weft.phases.paper import PaperPolicy
from weft.phases.recording import Recorder, observer, read
from weft.phases.review import review

SHARES = 12
CAPACITY = Capacity(2048, 16, 1024, 64, SHARES, 4096, 512)
COST = CostModel(fixed=1e-3, per_token=85e-6, per_context=65e-9, weights=8e-3, saturation=0.5, contention=0.2)
TARGETS = Targets(ttft=1.0, tpot=0.03)
AUTO = AutoPolicy(TARGETS, Limits(SHARES, 1024, 64))
PAPER = PaperPolicy(TARGETS, SHARES, window=20)


def serve(policy: AutoPolicy | PaperPolicy, record: Callable[[Asked], None], seconds: float = 12.0) -> None:
    """A Poisson load of 6 requests/s in virtual time, from a fixed seed."""
    device = VirtualDevice(CAPACITY, Partition(SHARES, SHARES), cost=COST)
    scheduler = Scheduler(CAPACITY, device.lanes(), SchedulerSettings(64, 1024, 10**6, enable_prefix_caching=False))
    controller = Controller(policy, lone=True, record=record)
    engine = Engine(device, scheduler, device.clock, step_timeout=None, controller=controller)
    rng, due, number = random.Random(4), 0.0, 0
    while device.clock() < seconds or not engine.idle:
        if due <= device.clock() + 1e-9 and due < seconds:
            prompt = tuple(rng.randrange(512) for _ in range(rng.randint(400, 1600)))
            engine.submit(Request(str(number), prompt, SamplingParams(max_tokens=rng.randint(20, 90), ignore_eos=True)))
            due, number = due + rng.expovariate(6.0), number + 1
        engine.step(max(0.0, due - device.clock()) if due < seconds else 1.0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Asked]]:
    path, run = tmp_path_factory.mktemp("recording") / "run.jsonl", list[Asked]()
    recorder = Recorder(path, AUTO, AUTO.device)

    def both(asked: Asked) -> None:
        run.append(asked)
        recorder(asked)

    serve(AUTO, both)
    return path, run


def test_what_is_read_is_what_was_recorded_and_decides_the_same_again(recorded: tuple[Path, list[Asked]]) -> None:
    path, run = recorded
    found = read(path)
    assert found.policy == AUTO and list(found.run) == run
    made = [one.decision for one in run]
    assert sum(one is not None for one in made) >= 2, "there is something to replay"
    assert replay(found.policy, found.run) == made


@pytest.mark.parametrize(
    "policy",
    [
        AutoPolicy(Targets(0.7, 0.05), Limits(7, 96, 5, 3), shed=True, dwell=1.5, refit=2.0, trial=0.4),
        PaperPolicy(Targets(0.7, 0.05), 7, window=20, percentile=0.8, step=4, most_steps=2, floor=60, tpot_margin=1.3),
    ],
)
def test_every_constant_of_a_policy_is_kept(policy: AutoPolicy | PaperPolicy, tmp_path: Path) -> None:
    assert not [one.name for one in fields(policy) if getattr(policy, one.name) == one.default], "each is another"
    Recorder(tmp_path / "run.jsonl", policy, Limits(7, 96, 5, 3))
    found = read(tmp_path / "run.jsonl")
    assert found.policy == policy and found.device == Limits(7, 96, 5, 3) and found.run == ()


def test_a_run_with_constants_of_its_own_is_replayed_with_them(tmp_path: Path) -> None:
    policy = replace(AUTO, targets=Targets(0.5, 0.03), dwell=1.5, trial=2.0)
    serve(policy, Recorder(tmp_path / "run.jsonl", policy, AUTO.device))
    found = read(tmp_path / "run.jsonl")
    made = [one.decision for one in found.run]
    assert replay(found.policy, found.run) == made != replay(replace(policy, dwell=0.5, trial=1.0), found.run)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "paper.jsonl"
    serve(PAPER, Recorder(path, PAPER, AUTO.device))
    return path


def test_a_run_of_the_papers_policy_is_replayed_to_the_same_decisions(papers: Path) -> None:
    found = read(papers)
    made = [one.decision for one in found.run]
    assert found.policy == PAPER and sum(one is not None for one in made) >= 2, "there is something to replay"
    assert replay(found.policy, found.run) == made
    assert replay(PaperPolicy(TARGETS, SHARES), found.run) != made, "with the window of the code, nothing is decided"


def test_what_the_papers_policy_saw_teaches_the_law_with_the_device_and_the_shares_of_the_run(papers: Path) -> None:
    found = read(papers)
    assert observer(found) == AutoPolicy(TARGETS, AUTO.device)
    shared = {one.decision.sharing.partition.prefill for one in found.run if one.decision is not None} | {SHARES}
    steps = review(found).steps
    assert steps is not None and set(steps.shares) >= {one / SHARES for one in shared if one < SHARES}
    seen: list[Sharing] = []

    class Watching(AutoPolicy):
        def decide(self, state: Any, *rest: Any) -> Any:
            seen.append(state.sharing)
            return super().decide(state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weft.phases.review.observer", lambda recording: Watching(TARGETS, recording.device))
        review(found)
    in_force = [PAPER.first(0.0).sharing]
    for one in found.run[:-1]:
        in_force.append(in_force[-1] if one.decision is None else one.decision.sharing)
    assert seen == in_force, "and not as auto would have shared it"


def test_doctor_shows_a_run_of_the_papers_policy_too(
    papers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "phases.png"
    assert doctor.main(["--phases", str(papers), "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "--partition paper" in text and "decides the same again" in text and "percent" in text
    assert "step times, from" in text and picture.stat().st_size > 5000
    assert doctor.main(["--phases", str(papers), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["policy"] == "paper" and found["prediction"]["decode"]["count"] > 100


def test_doctor_shows_a_run_without_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "run.jsonl", tmp_path / "phases.png"
    Recorder(path, PAPER, AUTO.device)
    assert doctor.main(["--phases", str(path), "--plot", str(picture)]) == 0 and picture.exists()
    assert "there was no model before the run ended" in capsys.readouterr().out


def test_a_full_file_ends_with_a_whole_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(tmp_path / "run.jsonl", AUTO, AUTO.device, most=20_000)
    with caplog.at_level(logging.WARNING, "weft.partition"):
        serve(AUTO, recorder, 5.0)
    text = (tmp_path / "run.jsonl").read_text()
    assert len(text) <= 20_000 and text.endswith("\n") and len(read(tmp_path / "run.jsonl").run) > 3
    assert [one.message for one in caplog.records if "recorded no more" in one.message] != []


def test_a_line_that_was_cut_off_is_left_out_and_a_broken_one_is_named(
    recorded: tuple[Path, list[Asked]], tmp_path: Path
) -> None:
    lines = recorded[0].read_text().splitlines(keepends=True)
    path = tmp_path / "run.jsonl"
    path.write_text("".join(lines[:4]) + lines[4][:30])
    assert len(read(path).run) == 3
    for broken, words in (
        ([], "is empty"),
        (["{}\n"], "line 1"),
        ([lines[0].replace('"auto"', '"other"')], "'other' is not known"),
        ([lines[0], "{\n"], "line 2"),
        ([*lines[:2], '{"now": 1}\n'], "line 3"),
        ([*lines[:2], lines[2].replace('"seen":[', '"seen":[["strange",1],', 1)], "line 3"),
    ):
        path.write_text("".join(broken))
        with pytest.raises(ConfigError, match=words):
            read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "absent")
    with pytest.raises(ConfigError, match="--partition-record"):
        Recorder(tmp_path / "absent" / "run.jsonl", AUTO, AUTO.device)


def test_doctor_shows_the_law_of_the_device_and_how_well_it_was_predicted(
    recorded: tuple[Path, list[Asked]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "phases.png"
    assert doctor.main(["--phases", str(recorded[0]), "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "decides the same again" in text and "step times, from" in text
    assert picture.stat().st_size > 5000
    assert doctor.main(["--phases", str(recorded[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["replay_is_the_same"] and found["questions"] == len(recorded[1])
    assert found["step_model"]["token"] == pytest.approx(COST.per_token, rel=0.15)
    assert found["prediction"]["decode"]["median"] < 0.1 and found["prediction"]["decode"]["count"] > 100
    assert found["step_model"]["contention"] is None, "a lane beside the other one never had the share of one alone"
    assert "not told, for no share was seen both with the other lane and without" in text


def test_doctor_says_so_when_the_decisions_are_not_the_same(
    recorded: tuple[Path, list[Asked]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(recorded[0].read_text().replace('"reason":"', '"reason":"not ', 1))
    assert doctor.main(["--phases", str(path)]) == 1
    assert "decides OTHERWISE" in capsys.readouterr().out
