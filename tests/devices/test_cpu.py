"""The CPU device: the contract of base.py on a tiny random model, cores, the size of the pool."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weft.config import EngineConfig
from weft.core.plan import Capacity, Lane, Partition, Plan, Result, Sampled, Sampling, Slice, Ticket
from weft.core.sampling import SamplingParams
from weft.devices import cpu, open_device, step
from weft.devices.base import Description, Device
from weft.devices.cores import usable_cores
from weft.devices.cpu import CpuDevice, CpuLane, open_cpu, share_out
from weft.devices.memory import Pool, free_memory, size_pool
from weft.devices.pinning import pinned
from weft.errors import CheckpointError, ConfigError, DeviceError
from weft.kernels import REFERENCE, available
from weft.models.families import read_config
from weft.models.loader import EMBEDDING, tensor_shapes
from weft.models.ranked import LanePlace, Ranked

KERNELS = sorted({available()[0], "reference"})
BLOCK = 16
POISON = 96  # the token whose embedding is NaN in the spoilt checkpoint
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two lanes need two cores")
GREEDY = SamplingParams(temperature=0.0, logprobs=3)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights and one embedding of NaN."""
    made = tmp_path_factory.mktemp("tiny")
    (made / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.ones(shape) if name.endswith("norm.weight") else torch.randn(shape, generator=generator) * 0.2
        for name, shape in tensor_shapes(read_config(made)).items()
    }
    tensors[EMBEDDING][POISON] = math.nan
    save_file(tensors, made / "model.safetensors")
    return made


Open = Callable[..., Device]


@pytest.fixture
def open_tiny(folder: Path) -> Iterator[Open]:
    """Opens devices on the tiny checkpoint and closes them after the test."""
    opened: list[Device] = []

    def opener(**settings: Any) -> Device:
        config = EngineConfig(**{"num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64} | settings)
        config.validate()
        opened.append(open_device(config, folder, lambda phase: None))
        return opened[-1]

    yield opener
    for device in opened:
        device.close()


def piece(sequence: int, tokens: list[int], *, start: int = 0, first_block: int = 0, **changes: Any) -> Slice:
    """A slice of a sequence whose blocks follow each other from first_block on; greedy unless said otherwise."""
    end = start + len(tokens)
    blocks = tuple(range(first_block, first_block + -(-end // BLOCK)))
    changes.setdefault("sample", Sampling(GREEDY, seed=0, position=end))
    return Slice(sequence, start, tuple(tokens), blocks, **changes)


def carry_out(device: Device, *plans: Plan) -> list[Result]:
    """Submit the plans and wait for their results, in the order of steps."""
    for plan in plans:
        assert device.submit(plan) == Ticket(plan.step, plan.lane)
    results: list[Result] = []
    while len(results) < len(plans):
        found = device.poll(60.0)
        assert found, "no result within a minute"
        results += found
    return sorted(results, key=lambda result: result.ticket.step)


def one(device: Device, *slices: Slice, lane: Lane = Lane.MIXED, step: int = 1) -> Result:
    (result,) = carry_out(device, Plan(step, lane, slices))
    return result


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_plan_of_a_lane_ends_in_one_result_in_order(open_tiny: Open, kernels: str) -> None:
    device = open_tiny(kernels=kernels)
    for number in range(1, 21):
        device.submit(Plan(number, Lane.MIXED, (piece(number, [number, 5, 9], first_block=number),)))
    seen: list[Result] = []
    while len(seen) < 20:
        seen += device.poll(60.0)
    assert [result.ticket.step for result in seen] == list(range(1, 21))
    for result in seen:
        assert result.error is None and result.failed == () and result.seconds > 0
        (sampled,) = result.sampled
        assert sampled.sequence == result.ticket.step and 0 <= sampled.token < 97
        assert sampled.score is not None and sampled.score.token == sampled.token and len(sampled.score.top) == 3
    assert device.poll(0.0) == []


@pytest.mark.parametrize("kernels", KERNELS)
def test_only_slices_that_sample_get_a_token(open_tiny: Open, kernels: str) -> None:
    device = open_tiny(kernels=kernels)
    result = one(
        device,
        piece(1, [3, 4, 5], sample=None),
        piece(2, [6], first_block=4),
        piece(3, list(range(20)), first_block=8),
        piece(4, [7, 7], first_block=12, sample=None),
    )
    assert [sampled.sequence for sampled in result.sampled] == [2, 3]
    alone = one(device, piece(9, list(range(20)), first_block=20), step=2)
    if kernels == "reference":  # whose matrix product may round differently in another batch
        assert result.sampled[1].token == alone.sampled[0].token
    else:
        assert result.sampled[1]._replace(sequence=9) == alone.sampled[0]


@pytest.mark.parametrize("kernels", KERNELS)
def test_prompt_scores_join_across_chunks(open_tiny: Open, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_tiny(kernels=kernels)
    prompt = [(7 * i) % 90 for i in range(40)]
    whole = one(device, piece(1, prompt, prompt_logprobs=2))
    monkeypatch.setattr(step, "SCORED_BYTES", 4 * 97 * 5)  # five rows at a time
    first = one(device, piece(2, prompt[:23], first_block=8, sample=None, prompt_logprobs=2, next_token=prompt[23]))
    second = one(device, piece(2, prompt[23:], start=23, first_block=8, prompt_logprobs=2))
    ((_, scores),) = whole.prompt_scores
    joined = first.prompt_scores[0][1] + second.prompt_scores[0][1]
    assert [score.token for score in scores] == prompt[1:] == [score.token for score in joined]
    assert [score.logprob for score in joined] == pytest.approx([score.logprob for score in scores], abs=1e-5)
    if kernels != "reference":
        assert joined == scores
    assert first.sampled == () and second.sampled[0].token == whole.sampled[0].token


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_spoilt_row_fails_alone(open_tiny: Open, kernels: str) -> None:
    device = open_tiny(kernels=kernels)
    good = one(device, piece(1, [3, 4, 5]), piece(2, [8, 9], first_block=4))
    mixed = one(
        device,
        piece(1, [3, 4, 5]),
        piece(3, [3, POISON, 5], first_block=8),
        piece(2, [8, 9], first_block=4),
        piece(4, [3, POISON, 5], first_block=12, prompt_logprobs=0),
        step=2,
    )
    assert mixed.error is None
    assert [sampled.token for sampled in mixed.sampled] == [sampled.token for sampled in good.sampled]
    failed = dict(mixed.failed)
    assert set(failed) == {3, 4} and all("NaN" in reason for reason in failed.values())
    assert mixed.prompt_scores == ()


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_step_that_raises_fails_alone(open_tiny: Open, kernels: str) -> None:
    device = open_tiny(kernels=kernels)
    good, no_blocks, still_good = carry_out(
        device,
        Plan(1, Lane.MIXED, (piece(1, [3, 4]),)),
        Plan(2, Lane.MIXED, (Slice(2, 0, (1, 2, 3), ()),)),
        Plan(3, Lane.MIXED, (piece(3, [3, 4]),)),
    )
    assert no_blocks.error is not None and no_blocks.error.startswith("ValueError: ")
    assert good.error is None and still_good.error is None
    assert good.sampled[0].token == still_good.sampled[0].token
    with pytest.raises(DeviceError, match="mixed"):
        device.submit(Plan(4, Lane.DECODE, (piece(1, [3]),)))


# ---------------------------------------------------------------- wake, close


def test_wake_ends_a_poll_under_way_or_else_the_next(open_tiny: Open) -> None:
    device = open_tiny(kernels="reference")
    timer = threading.Timer(0.05, device.wake)
    timer.start()
    assert device.poll(None) == []
    timer.join()
    device.wake()
    assert device.poll(None) == []
    assert device.poll(0.01) == []


def test_close_with_work_in_flight_loses_no_result(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_tiny(kernels="reference")
    started, go_on = threading.Event(), threading.Event()
    compute = step.compute

    def slow(*arguments: Any) -> Any:
        started.set()
        assert go_on.wait(60)
        return compute(*arguments)

    monkeypatch.setattr(cpu, "compute", slow)
    for number in range(1, 6):
        device.submit(Plan(number, Lane.MIXED, (piece(number, [3], first_block=number),)))
    assert started.wait(60)
    closing = threading.Thread(target=device.close)
    closing.start()
    while not device._queues.closing:  # type: ignore[attr-defined]
        pass
    go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    results = device.poll(None)
    assert [result.ticket.step for result in results] == [1, 2, 3, 4, 5]
    assert results[0].error is None
    assert all(result.error == "the device is closed" for result in results[1:])
    assert device.poll(None) == []
    with pytest.raises(DeviceError, match="closed"):
        device.submit(Plan(6, Lane.MIXED, (piece(6, [3]),)))
    device.close()


def test_close_ends_the_threads(open_tiny: Open) -> None:
    before = threading.active_count()
    device = open_tiny(kernels="reference")
    assert threading.active_count() == before + 1
    device.close()
    assert threading.active_count() == before


def test_a_failed_start_leaves_no_kernels_open(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def recording(name: str, cores: tuple[int, ...], **options: Any) -> Any:
        opened.append(SimpleNamespace(name=name, closed=False, close=lambda: setattr(opened[-1], "closed", True)))
        return opened[-1]

    monkeypatch.setattr(cpu, "open_kernels", recording)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError):
        open_cpu(EngineConfig(), tmp_path, lambda phase: None)
    assert [kernels.closed for kernels in opened] == [True]


# ---------------------------------------------------------------- lanes


@TWO_CORES
@pytest.mark.parametrize("kernels", KERNELS)
def test_two_lanes_compute_what_one_computes(open_tiny: Open, kernels: str) -> None:
    prompt = list(range(1, 30))
    mixed = open_tiny(kernels=kernels)
    first = one(mixed, piece(1, prompt))
    token = first.sampled[0].token
    second = one(mixed, piece(1, [token], start=29), step=2)

    lanes = open_tiny(kernels=kernels, partition="1:1")
    assert lanes.lanes() == (Lane.PREFILL, Lane.DECODE) and lanes.partition() == share_out(
        "1:1", lanes.capacity().shares
    )
    again = one(lanes, piece(1, prompt), lane=Lane.PREFILL)
    then = one(lanes, piece(1, [token], start=29), lane=Lane.DECODE, step=2)  # reads what the other lane wrote
    assert again.sampled[0].token == token and then.sampled[0].token == second.sampled[0].token
    if kernels != "reference":
        assert again.sampled == first.sampled and then.sampled == second.sampled


@TWO_CORES
def test_two_lanes_are_busy_at_the_same_time(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lane's step waits for the other's inside the step: lanes that took turns would never meet."""
    device = open_tiny(partition="1:1")
    meeting = threading.Barrier(2, timeout=30)
    compute = step.compute

    def meet(*arguments: Any) -> Any:
        meeting.wait()
        done = compute(*arguments)
        meeting.wait()
        return done

    monkeypatch.setattr(cpu, "compute", meet)
    results = carry_out(
        device,
        Plan(1, Lane.PREFILL, (piece(1, [3, 4, 5]),)),
        Plan(2, Lane.DECODE, (piece(2, [3], first_block=4),)),
    )
    assert [result.error for result in results] == [None, None]


@TWO_CORES
@pytest.mark.parametrize("partition", ["1:1", "off"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_lane_runs_where_its_kernels_expect_it(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch, kernels: str, partition: str
) -> None:
    """The C++ kernels count the lane's thread as the one on their first core; torch's threads inherit its cores."""
    allowed, threads = tuple(sorted(os.sched_getaffinity(0))), torch.get_num_threads()
    one_core, two_cores = {allowed[0]}, {allowed[0], allowed[1]}
    device = open_tiny(partition=partition, cores=f"{allowed[0]},{allowed[1]}", kernels=kernels)
    seen: dict[Lane, Any] = {}
    compute = step.compute

    def look(plan: Plan, *arguments: Any) -> Any:
        seen[plan.lane] = (os.sched_getaffinity(0), torch.get_num_threads())
        return compute(plan, *arguments)

    monkeypatch.setattr(cpu, "compute", look)
    for number, lane in enumerate(device.lanes(), 1):
        assert one(device, piece(1, [3]), lane=lane, step=number).error is None
    if partition == "1:1":
        assert seen == {Lane.PREFILL: (one_core, 1), Lane.DECODE: ({allowed[1]}, 1)}
    else:
        assert seen == {Lane.MIXED: (two_cores, 2) if kernels == "reference" else (one_core, 1)}
    assert os.sched_getaffinity(0) == set(allowed) and torch.get_num_threads() == threads


class FakeLane(CpuLane):
    """A lane that computes nothing and writes down the cores it was on."""

    def __init__(self, cores: tuple[int, ...], seconds: float = 0.0) -> None:
        """seconds: what other cores take."""
        self.seconds = seconds
        kernels: Any = SimpleNamespace(name="none", close=lambda: None, set_cores=self._adopt)
        super().__init__(kernels, None, None, cores)  # type: ignore[arg-type]
        self.adopted = [cores]

    def _adopt(self, cores: tuple[int, ...]) -> None:
        if 13 in cores:
            raise DeviceError("core 13 is not for us")
        time.sleep(self.seconds)
        self.adopted.append(cores)

    def pin(self) -> None:
        """The cores are not real."""

    def run(self, plan: Plan) -> Result:
        return Result(Ticket(plan.step, plan.lane), (Sampled(0, self.cores[0]),))


def fake_device(cores: tuple[int, ...], seconds: float = 0.0) -> tuple[CpuDevice, dict[Lane, FakeLane]]:
    lanes = {Lane.PREFILL: FakeLane(cores[:1], seconds), Lane.DECODE: FakeLane(cores[1:], seconds)}
    device = CpuDevice(
        Capacity(8, BLOCK, 8, 8, len(cores), 64, 97),
        dict(lanes),
        description=Description("cpu", "float32", "none"),
        memory=(),
        cores=cores,
        partition=Partition(1, len(cores) - 1),
    )
    return device, lanes


def test_each_lane_adopts_its_share_at_its_own_next_step() -> None:
    device, lanes = fake_device((4, 5, 6, 7))
    one(device, piece(1, [1]), lane=Lane.PREFILL, step=1)
    device.set_partition(Partition(3, 1))
    assert device.partition() == Partition(3, 1)
    one(device, piece(1, [1]), lane=Lane.PREFILL, step=2)
    assert lanes[Lane.PREFILL].adopted == [(4,), (4, 5, 6)]
    assert lanes[Lane.DECODE].adopted == [(5, 6, 7)]
    one(device, piece(1, [1]), lane=Lane.DECODE, step=3)
    assert lanes[Lane.DECODE].adopted == [(5, 6, 7), (7,)]
    one(device, piece(1, [1]), lane=Lane.DECODE, step=4)
    assert lanes[Lane.DECODE].adopted == [(5, 6, 7), (7,)]
    device.close()


def test_a_result_says_what_it_took_to_adopt_a_new_share() -> None:
    device, _ = fake_device((4, 5, 6, 7), seconds=0.02)
    assert one(device, piece(1, [1]), lane=Lane.PREFILL, step=1).moved == 0.0, "it begins on its share"
    device.set_partition(Partition(3, 1))
    assert one(device, piece(1, [1]), lane=Lane.PREFILL, step=2).moved >= 0.02
    assert one(device, piece(1, [1]), lane=Lane.PREFILL, step=3).moved == 0.0, "it has that share already"
    assert one(device, piece(1, [1]), lane=Lane.DECODE, step=4).moved >= 0.02
    device.close()


@pytest.mark.parametrize("shares", [(0, 4), (4, 0), (5, 2), (-1, 2), (1, 5)])
def test_an_impossible_partition_is_refused_and_changes_nothing(shares: tuple[int, int]) -> None:
    device, _ = fake_device((4, 5, 6, 7))
    with pytest.raises(DeviceError, match="there are 4"):
        device.set_partition(Partition(*shares))
    assert device.partition() == Partition(1, 3)
    device.close()


def test_a_share_that_cannot_be_had_costs_no_step_and_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    device, lanes = fake_device((4, 5, 13, 6))
    lane = lanes[Lane.PREFILL]
    steps = iter(range(1, 99))
    for share, cores in ((3, (4,)), (3, (4,)), (2, (4, 5)), (3, (4, 5)), (1, (4,))):
        device.set_partition(Partition(share, 1))
        found = one(device, piece(1, [1]), lane=Lane.PREFILL, step=next(steps))
        assert found.error is None and found.sampled and lane.cores == lane.adopted[-1] == cores
        assert found.moved > 0 or share in (1, 3)
        assert one(device, piece(1, [1]), lane=Lane.DECODE, step=next(steps)).error is None
    wanted = "lane prefill keeps the share that it has, not cores 4, 5, 13: DeviceError: core 13 is not for us"
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", wanted)]
    device.close()


def test_a_move_that_fails_half_way_is_taken_back() -> None:
    """By the kernels, of whose threads some have moved, and by the thread of the seams."""
    cores, absent = usable_cores(None), (4000,)
    asked: list[tuple[int, ...]] = []
    places: list[LanePlace] = []

    class Kernels:
        name = REFERENCE

        def set_cores(self, wanted: tuple[int, ...]) -> None:
            asked.append(wanted)
            if wanted == absent:
                raise DeviceError("core 4000 is not for us")

    forward: Any = object.__new__(Ranked)
    forward.head, forward.move = None, places.append
    kernels: Any = Kernels()
    lane = CpuLane(kernels, forward, forward, cores)
    with pinned(REFERENCE, cores):
        assert lane.adopt(Lane.MIXED, LanePlace(absent)) == 0.0
    assert asked == [absent, cores] and lane.cores == cores
    assert places == [LanePlace(cores, shared=True)]


def test_a_mixed_lane_has_no_shares(open_tiny: Open) -> None:
    device = open_tiny(kernels="reference")
    assert device.lanes() == (Lane.MIXED,) and device.partition() is None
    with pytest.raises(DeviceError, match="--partition"):
        device.set_partition(Partition(1, 1))


@TWO_CORES
@pytest.mark.parametrize("kernels", KERNELS)
def test_fewer_cores_between_two_steps_keep_the_outputs(open_tiny: Open, kernels: str) -> None:
    device = open_tiny(kernels=kernels)
    prompt = list(range(2, 40))
    whole = [one(device, piece(1, prompt)), one(device, piece(1, [8], start=38), step=2)]
    cores = usable_cores(None)
    moved = [one(device, piece(2, prompt, first_block=8), step=3)]
    device._places[Lane.MIXED] = LanePlace(cores[:1])  # type: ignore[attr-defined]
    moved.append(one(device, piece(2, [8], start=38, first_block=8), step=4))
    for before, after in zip(whole, moved, strict=True):
        assert after.sampled[0].token == before.sampled[0].token
        if kernels != "reference":
            assert after.sampled[0].score == before.sampled[0].score


# ---------------------------------------------------------------- steps that are cut


def in_parts(device: Device, parts: int, *slices: Slice, step: int, between: Callable[[int], None]) -> list[Result]:
    results = []
    for part in range(parts):
        results += carry_out(device, Plan(step + part, Lane.PREFILL, slices, part, parts))
        between(part)
    return results


@TWO_CORES
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_step_in_parts_gives_what_the_whole_gives(open_tiny: Open, kernels: str, parts: int) -> None:
    """Beside steps of the other lane, and on other cores from part to part."""
    device = open_tiny(kernels=kernels, partition="1:1")
    scored = Sampling(SamplingParams(temperature=0.0, logprobs=3), seed=0, position=38)
    prompts = [piece(1, list(range(2, 40)), sample=scored, prompt_logprobs=2), piece(2, [5, 6, 7], first_block=4)]
    other = piece(9, list(range(20, 50)), first_block=20)
    whole = one(device, *prompts, lane=Lane.PREFILL)
    decoded = one(device, other, lane=Lane.DECODE, step=2)

    moved = [
        one._replace(sequence=one.sequence + 2, blocks=tuple(block + 8 for block in one.blocks)) for one in prompts
    ]
    shares = [Partition(2, 2), Partition(1, 1), Partition(2, 1)]

    def between(part: int) -> None:
        device.set_partition(shares[part])
        assert one(device, other, lane=Lane.DECODE, step=100 + part).sampled == decoded.sampled

    results = in_parts(device, parts, *moved, step=10, between=between)
    for early in results[:-1]:
        assert early.error is None and early.seconds > 0
        assert (early.sampled, early.prompt_scores, early.failed) == ((), (), ())
    last = results[-1]
    assert [one.token for one in last.sampled] == [one.token for one in whole.sampled]
    if kernels != "reference":
        assert [one.score for one in last.sampled] == [one.score for one in whole.sampled]
        assert [scores for _, scores in last.prompt_scores] == [scores for _, scores in whole.prompt_scores]
    # The keys and values are there, too: what follows is the same.
    token = whole.sampled[0].token
    after = one(device, piece(1, [token], start=38), lane=Lane.DECODE, step=200)
    again = one(device, piece(3, [token], start=38, first_block=8), lane=Lane.DECODE, step=201)
    assert after.sampled[0].token == again.sampled[0].token
    if kernels != "reference":
        assert after.sampled[0].score == again.sampled[0].score


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_step_that_is_given_up_between_its_parts_leaves_nothing_behind(open_tiny: Open, kernels: str) -> None:
    device = open_tiny(kernels=kernels)
    prompt = piece(1, list(range(2, 40)))
    wanted = one(device, prompt)
    carry_out(device, Plan(2, Lane.MIXED, (piece(2, [9] * 50, first_block=8),), 0, 2))
    again = one(device, prompt._replace(sequence=3, blocks=(20, 21, 22)), step=3)
    assert again.sampled[0].token == wanted.sampled[0].token


# ---------------------------------------------------------------- cores and partitions from flags


@pytest.mark.parametrize(
    "partition, cores, shares",
    [("1:1", 2, (1, 1)), ("3:1", 8, (6, 2)), ("1:9", 4, (1, 3)), ("99:1", 2, (1, 1)), ("1:2", 3, (1, 2))],
)
def test_a_partition_divides_the_cores_in_proportion(partition: str, cores: int, shares: tuple[int, int]) -> None:
    assert share_out(partition, cores) == Partition(*shares)


def test_two_lanes_on_one_core_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--partition is 1:1: two lanes need two cores, and there is 1"):
        share_out("1:1", 1)
    with pytest.raises(ConfigError, match="each of 2 ranks has 1"):
        share_out("1:1", 1, ranks=2)
    assert share_out("off", 1) is None


def test_cores_that_this_process_may_not_use_are_refused() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert usable_cores(None) == tuple(allowed)
    assert usable_cores(str(allowed[-1])) == (allowed[-1],)
    with pytest.raises(ConfigError, match="--cores names core 4000"):
        usable_cores("4000")


# ---------------------------------------------------------------- what the device says of itself


def test_a_device_describes_itself(open_tiny: Open) -> None:
    device = open_tiny(kernels="reference")
    capacity = device.capacity()
    assert capacity == Capacity(64, BLOCK, 64, 8, len(os.sched_getaffinity(0)), 128, 97, layers=2)
    description = device.describe()
    assert (description.dtype, description.kernels) == ("float32", "reference")
    assert any("slow" in note for note in description.notes)
    rows = dict(device.memory())
    # 2 layers x keys and values x 2 heads x 16 channels x 4 bytes
    assert rows["KV pool"] == 1024 * 2 * 2 * 2 * 16 * 4
    assert set(rows) >= {"weights"} and all(size > 0 for size in rows.values())


def test_dummy_weights_need_no_weights_and_follow_the_seed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "bfloat16"}))
    tokens = []
    for seed in (1, 1, 2):
        phases: list[str] = []
        config = EngineConfig(load_format="dummy", seed=seed, num_blocks=8)
        device = open_device(config, tmp_path, phases.append)
        tokens.append([one(device, piece(i, [i, i + 1], first_block=0)).sampled[0] for i in range(6)])
        device.close()
        assert "weights" in phases and len(set(phases)) == len(phases)
    assert tokens[0] == tokens[1] != tokens[2]


# ---------------------------------------------------------------- the size of the pool

MIB = 2**20
TOKEN = 1024  # bytes of KV per token: a block of 16 takes 16 KiB


def sized(free: int = 64 * MIB, context: int = 2048, **settings: Any) -> Pool:
    return size_pool(EngineConfig(**settings), context, TOKEN, free)


def test_the_default_pool_holds_every_sequence_at_full_length() -> None:
    assert sized(free=10**12, max_num_seqs=5) == Pool(5 * 128, 2048)
    assert sized(free=10**12, max_num_seqs=5, max_model_len=100) == Pool(5 * 7, 100)


def test_the_default_pool_takes_a_quarter_of_free_memory_at_most() -> None:
    assert sized(free=64 * MIB) == Pool(16 * MIB // (16 * TOKEN), 2048)


def test_a_pool_below_one_sequence_bounds_the_context_and_says_so() -> None:
    pool = sized(free=4 * MIB)
    assert (pool.blocks, pool.max_model_len) == (64, 1024)
    (note,) = pool.notes
    assert "1024" in note and "2048" in note and "--num-blocks 128" in note and f"{2 * MIB}" in note
    assert sized(num_blocks=3).max_model_len == 48
    assert sized(kv_cache_memory_bytes=5 * 16 * TOKEN + 1) == dataclasses.replace(
        sized(num_blocks=5), blocks=5, max_model_len=80
    )


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"max_model_len": 4096}, ["--max-model-len is 4096", "2048"]),
        ({"max_model_len": 100, "num_blocks": 6}, ["--max-model-len is 100", "96 tokens", "--num-blocks 7"]),
        ({"num_blocks": 5000}, ["--num-blocks is 5000", "64.0 MiB", "at most 4096"]),
        ({"kv_cache_memory_bytes": 1000}, ["--kv-cache-memory-bytes is 1000", "16384"]),
        ({"kv_cache_memory_bytes": 65 * MIB}, ["--kv-cache-memory-bytes", f"{64 * MIB} bytes"]),
        ({"free": 1000}, ["more than a quarter", "--kv-cache-memory-bytes"]),
    ],
)
def test_a_pool_that_cannot_be_names_the_flag_and_what_fits(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        sized(**settings)
    for word in words:
        assert word in caught.value.message


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    1000 kB\n"}


def test_free_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert free_memory(machine(tmp_path, MEMINFO)) == 1000 * 1024


@pytest.mark.parametrize("inner", ["max", "900000"])
def test_free_memory_heeds_every_control_group_above(tmp_path: Path, inner: str) -> None:
    group = "sys/fs/cgroup/outer"
    root = machine(
        tmp_path,
        MEMINFO
        | {
            "proc/self/cgroup": "0::/outer/inner\n",
            f"{group}/inner/memory.max": inner,
            f"{group}/inner/memory.current": "50000",
            f"{group}/memory.max": "800000",
            f"{group}/memory.current": "700000",
            f"{group}/memory.stat": "anon 5\ninactive_file 20000\n",
        },
    )
    assert free_memory(root) == 120000


def test_free_memory_heeds_old_control_groups(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory"
    files = {f"{folder}/memory.limit_in_bytes": "500000", f"{folder}/memory.usage_in_bytes": "480000"}
    assert free_memory(machine(tmp_path, MEMINFO | files)) == 20000


def test_free_memory_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--num-blocks"):
        free_memory(tmp_path)


def test_free_memory_of_this_machine_is_plausible() -> None:
    assert 2**20 < free_memory() < 2**45


@pytest.mark.skipif(available() == ("reference",), reason="there is no C++ extension")
@pytest.mark.parametrize(("size", "fits"), [(8, True), (20, False), (264, False)])
def test_a_size_of_heads_that_the_kernels_do_not_take_is_named_before_any_weight_is_read(
    tmp_path: Path, size: int, fits: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"head_dim": size}))
    config = EngineConfig(model=str(tmp_path), load_format="dummy", num_blocks=8)
    if fits:
        open_cpu(config, tmp_path, lambda _: None).close()
        return
    seen: list[str] = []
    with pytest.raises(CheckpointError, match=f"head_dim is {size}; .* of 8 up to 256, and --kernels reference"):
        open_cpu(config, tmp_path, seen.append)
    assert not seen
    open_cpu(dataclasses.replace(config, kernels="reference"), tmp_path, seen.append).close()
