from __future__ import annotations

import hashlib
import json
import math
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import weft
from weft.config import EngineConfig
from weft.core.plan import Capacity, Lane, Partition, Plan, Result, Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices.base import Device
from weft.devices.cost import CostModel
from weft.devices.simulated import Faults, ManualDevice, SimulatedDevice, continuation, open_simulated, oracle
from weft.devices.virtual import VirtualDevice
from weft.errors import CheckpointError, ConfigError, DeviceError

BUILTIN = Path(weft.__file__).parent / "assets" / "builtin"
CAPACITY = Capacity(blocks=8, block_size=4, max_tokens=64, max_slices=8, shares=4, max_model_len=32, vocabulary=50)
TOKENS = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)


def sampling(position: int, **given: Any) -> Sampling:
    forbidden = given.pop("forbidden", ())
    return Sampling(SamplingParams(**given), seed=1, position=position, forbidden=forbidden)


def piece(start: int, end: int, blocks: tuple[int, ...] = (5, 2, 7), sequence: int = 0, **given: Any) -> Slice:
    return Slice(sequence, start, TOKENS[start:end], blocks, sampling(end, **given))


def plan(step: int, *slices: Slice, lane: Lane = Lane.MIXED) -> Plan:
    return Plan(step, lane, slices)


def run(device: ManualDevice, *plans: Plan) -> Result:
    """The result of the last plan."""
    result = None
    for one in plans:
        device.submit(one)
        assert device.run(one.lane)
        (result,) = device.poll(0.0)
    assert result is not None
    return result


# -- the oracle ------------------------------------------------------------------------------------------------------


def test_the_oracle_is_a_hash_of_the_whole_prefix() -> None:
    data = struct.pack(f"={len(TOKENS)}i", *TOKENS)
    assert oracle(TOKENS, 50) == int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") % 50
    others = [(*TOKENS[:i], 7, *TOKENS[i + 1 :]) for i in range(len(TOKENS))]
    assert len({oracle(other, 2**30) for other in [TOKENS, TOKENS[:-1], *others]}) == len(others) + 2


def test_a_client_can_tell_what_will_be_generated() -> None:
    tokens = list(TOKENS)
    for token in continuation(TOKENS, 20, 50):
        assert token == oracle(tokens, 50)
        tokens.append(token)


def test_forbidden_ids_are_never_drawn() -> None:
    first = oracle(TOKENS, 50)
    assert oracle(TOKENS, 50, {first}) == (first + 1) % 50
    assert oracle(TOKENS, 50, set(range(50)) - {7}) == 7
    with pytest.raises(ValueError, match="all 50 token ids"):
        oracle(TOKENS, 50, range(50))


# -- reading through the blocks --------------------------------------------------------------------------------------


def test_the_token_depends_on_every_slot_and_not_on_where_the_blocks_are() -> None:
    for blocks in ((0, 1, 2), (7, 3, 5)):
        device = ManualDevice(CAPACITY)
        result = run(device, plan(1, piece(0, 6, blocks)), plan(2, piece(6, 10, blocks)))
        assert result.sampled[0].token == oracle(TOKENS, 50)


@pytest.mark.parametrize(
    "harm",
    [
        Slice(9, 5, (9,), (5, 6, 7)),  # block 6 instead of 2: writes somewhere else, so not harm
        Slice(9, 0, (8,), (5,)),  # another token at position 0
        Slice(9, 4, (5,), (0, 5)),  # the token of position 4, in the slot of position 0
        Slice(9, 2, (8, 1, 1, 1), (7, 2)),  # the tail of one, the head of the next
    ],
)
def test_a_block_that_another_sequence_wrote_changes_the_output(harm: Slice) -> None:
    device = ManualDevice(CAPACITY)
    result = run(device, plan(1, piece(0, 8)), plan(2, harm), plan(3, piece(8, 9)))
    harmed = set(harm.blocks[harm.start // 4 :]) & {5, 2}
    assert (result.sampled[0].token != oracle(TOKENS[:9], 50)) == bool(harmed)


def test_a_block_that_was_not_written_changes_the_output() -> None:
    tokens = {run(ManualDevice(CAPACITY), plan(1, piece(start, 10))).sampled[0].token for start in (4, 8, 9)}
    assert oracle(TOKENS, 50) not in tokens


def test_the_right_token_at_the_wrong_position_changes_the_output() -> None:
    device = ManualDevice(CAPACITY)
    same = Slice(0, 0, (1, 1, 1, 1), (0,))
    moved = Slice(0, 4, (1, 1, 1, 1), (3, 1), sampling(8))
    assert run(device, plan(1, same), plan(2, moved)).sampled[0].token != oracle((1,) * 8, 50)  # block 3 is empty
    shared = moved._replace(start=8, tokens=(1,), blocks=(0, 0, 2), sample=sampling(9))
    assert run(device, plan(3, same), plan(4, shared)).sampled[0].token != oracle((1,) * 9, 50)


def test_a_plan_reads_when_it_runs_not_when_it_is_submitted() -> None:
    device = ManualDevice(CAPACITY, (Lane.PREFILL, Lane.DECODE))
    run(device, plan(1, piece(0, 8), lane=Lane.PREFILL))
    device.submit(plan(2, piece(8, 9), lane=Lane.DECODE))
    device.submit(plan(3, Slice(9, 0, (8,), (5,)), lane=Lane.PREFILL))
    assert device.run(Lane.PREFILL) and device.run(Lane.DECODE) and not device.run(Lane.DECODE)
    assert device.poll(0.0)[1].sampled[0].token != oracle(TOKENS[:9], 50)
    with pytest.raises(DeviceError, match="nothing was run"):
        device.poll(None)


# -- what a slice asks for -------------------------------------------------------------------------------------------


def test_a_slice_without_sampling_draws_nothing_and_stop_ids_are_not_drawn() -> None:
    first = oracle(TOKENS, 50)
    silent = piece(0, 10, (0, 1, 2), 1)._replace(sample=None)
    stopped = piece(0, 10, (3, 4, 5), 2, forbidden=(first,))
    result = run(ManualDevice(CAPACITY), plan(1, silent, stopped))
    assert [(one.sequence, one.token, one.score) for one in result.sampled] == [(2, (first + 1) % 50, None)]


def test_when_every_id_is_forbidden_the_slice_fails_alone() -> None:
    result = run(
        ManualDevice(CAPACITY), plan(1, piece(0, 10, (0, 1, 2), 1, forbidden=tuple(range(50))), piece(0, 4, (3,), 2))
    )
    assert [one.sequence for one in result.sampled] == [2] and result.failed[0][0] == 1 and result.error is None


@pytest.mark.parametrize("k", [0, 3])
def test_scores_are_a_distribution_around_the_drawn_token(k: int) -> None:
    (one,) = run(ManualDevice(CAPACITY), plan(1, piece(0, 10, logprobs=k))).sampled
    assert one.score is not None and (one.score.token, one.score.rank) == (one.token, 1)
    assert one.score.logprob == pytest.approx(math.log(0.5)) and len(one.score.top) == k
    assert sorted(one.score.top, key=lambda pair: -pair[1]) == list(one.score.top)
    assert sum(math.exp(logprob) for _, logprob in one.score.top) <= 1


def test_prompt_scores_are_of_the_tokens_that_follow_each_row() -> None:
    device = ManualDevice(CAPACITY)
    first = Slice(0, 0, TOKENS[:6], (5, 2, 7), None, prompt_logprobs=2, next_token=TOKENS[6])
    last = Slice(0, 6, TOKENS[6:], (5, 2, 7), sampling(10), prompt_logprobs=2)
    scores = [*run(device, plan(1, first)).prompt_scores[0][1], *run(device, plan(2, last)).prompt_scores[0][1]]
    assert [score.token for score in scores] == list(TOKENS[1:])
    for end, score in enumerate(scores, 1):
        best = oracle(TOKENS[:end], 50)
        assert score.top[0][0] == best and score.rank == (TOKENS[end] - best) % 50 + 1
        assert score.logprob == pytest.approx(-score.rank * math.log(2))


# -- faults ----------------------------------------------------------------------------------------------------------


def test_a_failed_step_and_a_slice_with_nan() -> None:
    device = ManualDevice(CAPACITY, faults=Faults(failed=frozenset({1}), nan=frozenset({(2, 7)})))
    failed = run(device, plan(1, piece(0, 4)))
    assert failed.error is not None and "step 1" in failed.error and failed.sampled == ()
    result = run(device, plan(2, piece(0, 4, (0,), 7), piece(0, 4, (1,), 8)))
    assert result.error is None and [one.sequence for one in result.sampled] == [8]
    assert result.failed[0][0] == 7 and "NaN" in result.failed[0][1]


# -- real time -------------------------------------------------------------------------------------------------------


@pytest.fixture
def devices() -> Iterator[Any]:
    opened: list[SimulatedDevice] = []

    def make(*given: Any, **named: Any) -> SimulatedDevice:
        opened.append(SimulatedDevice(*given, **named))
        return opened[-1]

    yield make
    for device in opened:
        device.close()
        device.close()


def collect(device: Device, count: int) -> list[Result]:
    found: list[Result] = []
    while len(found) < count:
        found += device.poll(10.0)
    return found


def test_it_is_a_device(devices: Any) -> None:
    device: Device = devices(CAPACITY)
    manual: Device = ManualDevice(CAPACITY)
    for one in (device, manual):
        assert one.capacity() == CAPACITY and one.lanes() == (Lane.MIXED,) and one.partition() is None
        assert one.describe().device == "simulated"
        one.wake()
        with pytest.raises(DeviceError):
            one.set_partition(Partition(1, 1))
    assert device.memory() == manual.memory() == (("KV pool (simulated)", 8 * 4 * 8),)
    manual.close()


def test_the_plans_of_a_lane_run_in_order_and_lanes_run_side_by_side(devices: Any) -> None:
    device = devices(CAPACITY, Partition(2, 2), faults=Faults(slow={1: 3600.0}))
    device.submit(plan(1, piece(0, 4, (0,)), lane=Lane.PREFILL))
    device.submit(plan(2, piece(0, 4, (1,)), lane=Lane.PREFILL))
    for step in range(3, 6):
        device.submit(plan(step, piece(0, 4, (2,)), lane=Lane.DECODE))
    assert [result.ticket.step for result in collect(device, 3)] == [3, 4, 5], "the slow lane holds nobody up"
    assert device.poll(0.0) == [] and device.poll(0.01) == []


def test_a_wake_ends_a_poll_under_way_and_the_next_one(devices: Any) -> None:
    device = devices(CAPACITY)
    device.wake()
    assert device.poll(None) == []
    timer = threading.Timer(0.05, device.wake)
    timer.start()
    assert device.poll(None) == []
    timer.join()


def test_a_lost_step_never_ends_and_does_not_keep_the_device_from_closing(devices: Any) -> None:
    device = devices(CAPACITY, faults=Faults(lost=frozenset({1})))
    device.submit(plan(1, piece(0, 4)))
    device.submit(plan(2, piece(0, 4)))
    assert device.poll(0.05) == []
    device.close()
    assert [result.error for result in device.poll(None)] == ["the device is closed"] * 2
    with pytest.raises(DeviceError, match="closed"):
        device.submit(plan(3, piece(0, 4)))


def test_a_dead_device_ends_what_it_has_and_takes_nothing_more(devices: Any) -> None:
    device = devices(CAPACITY, faults=Faults(dead=2))
    for step in (1, 2, 3):
        device.submit(plan(step, piece(0, 4)))
    results = collect(device, 3)
    assert [result.error is None for result in results] == [True, False, False]
    with pytest.raises(DeviceError, match="died at step 2"):
        device.poll(None)
    with pytest.raises(DeviceError, match="died at step 2"):
        device.submit(plan(4, piece(0, 4)))


def test_a_partition_is_adopted_at_a_lanes_next_step(devices: Any) -> None:
    device = devices(CAPACITY, Partition(2, 2), cost=CostModel(fixed=0.001, per_token=0.001))
    seconds = []
    for step, partition in enumerate((Partition(2, 2), Partition(1, 3), Partition(3, 1)), 1):
        device.set_partition(partition)
        assert device.partition() == partition
        device.submit(plan(step, piece(0, 3), lane=Lane.PREFILL))
        seconds.append(collect(device, 1)[0].seconds)
    assert seconds == pytest.approx([0.001 + 0.003 * 4 / share for share in (2, 1, 3)])
    for wrong in (Partition(0, 4), Partition(4, 0), Partition(5, 2), Partition(1, 5)):
        with pytest.raises(DeviceError, match="there are 4"):
            device.set_partition(wrong)


def test_the_cost_model_counts_tokens_and_context() -> None:
    step = plan(1, piece(0, 4, (0,)), piece(8, 10))
    assert CostModel().seconds(step) == 0.0
    assert CostModel(fixed=1.0, per_token=10.0, per_context=100.0).seconds(step) == 1 + 60 + 1400
    assert CostModel(fixed=1.0, per_token=10.0).seconds(step, 0.5) == 1 + 120


# -- opening ---------------------------------------------------------------------------------------------------------


def opened(folder: Path, **given: Any) -> SimulatedDevice:
    phases: list[str] = []
    device = open_simulated(EngineConfig(device="simulated", **given), folder, phases.append)
    device.close()
    assert phases
    return device


def test_it_takes_vocabulary_and_context_from_the_built_in_model() -> None:
    shape = json.loads((BUILTIN / "config.json").read_text())
    capacity = opened(BUILTIN).capacity()
    assert (capacity.vocabulary, capacity.max_model_len) == (shape["vocab_size"], shape["max_position_embeddings"])
    assert capacity.blocks * capacity.block_size == 64 * capacity.max_model_len
    assert (capacity.max_tokens, capacity.max_slices, capacity.shares) == (512, 64, 1)


def test_it_honours_the_settings() -> None:
    device = opened(BUILTIN, num_blocks=7, block_size=32, max_model_len=100, partition="3:1", max_num_seqs=5)
    capacity = device.capacity()
    assert (capacity.blocks, capacity.block_size, capacity.max_model_len, capacity.max_slices) == (7, 32, 100, 5)
    assert device.lanes() == (Lane.PREFILL, Lane.DECODE) and device.partition() == Partition(3, 1)
    assert capacity.shares == 4
    assert opened(BUILTIN, kv_cache_memory_bytes=8 * 16 * 5).capacity().blocks == 5
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes is 8"):
        opened(BUILTIN, kv_cache_memory_bytes=8)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"vocab_size": "many"}'])
def test_a_folder_that_does_not_tell_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        opened(tmp_path)


def test_a_folder_with_a_config_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 77}')
    assert opened(tmp_path).capacity().vocabulary == 77


# -- lanes side by side ----------------------------------------------------------------------------------------------


def test_memory_saturates_arithmetic_does_not_and_a_rival_costs_what_it_takes() -> None:
    step = plan(1, piece(0, 4, (0,)))  # 4 tokens, 4 slots
    cost = CostModel(fixed=1.0, per_token=10.0, per_context=1.0, weights=6.0, saturation=0.5, contention=0.4)
    assert cost.seconds(step) == 1 + 40 + 10
    assert cost.seconds(step, 0.5) == 1 + 80 + 10, "half of the device has all of the bandwidth"
    assert cost.seconds(step, 0.25) == 1 + 160 + 20
    assert cost.seconds(step, 0.5, 0.5) == pytest.approx(1 + 80 + 10 * 1.2)
    # Both want the whole device: each gets half of the cores while both compute.
    assert cost.seconds(step, 1.0, 1.0) == pytest.approx(1 + 80 + 10 * 1.4)


def test_lanes_that_overlap_shrink_only_while_both_compute(devices: Any) -> None:
    device = devices(CAPACITY, Partition(4, 4), cost=CostModel(per_token=0.01))
    device.submit(plan(1, piece(0, 8, (0, 1)), lane=Lane.PREFILL))
    device.submit(plan(2, piece(0, 2, (2,)), lane=Lane.DECODE))
    seconds = {result.ticket.step: result.seconds for result in collect(device, 2)}
    assert sorted(seconds.values()) in (
        [pytest.approx(0.02), pytest.approx(0.16)],
        [pytest.approx(0.04), pytest.approx(0.08)],
    )
    device.submit(plan(3, piece(0, 2, (2,)), lane=Lane.DECODE))
    assert collect(device, 1)[0].seconds == pytest.approx(0.02)


def test_a_lane_whose_thread_has_ended_says_so_of_every_plan_and_the_other_goes_on(devices: Any) -> None:
    device = devices(CAPACITY, Partition(2, 2), faults=Faults(gone=frozenset({1})))
    for step in (1, 3):
        device.submit(plan(step, piece(0, 4, (0,)), lane=Lane.PREFILL))
    device.submit(plan(2, piece(0, 4, (1,)), lane=Lane.DECODE))
    results = {result.ticket.step: result for result in collect(device, 3)}
    device.submit(plan(4, piece(0, 4, (0,)), lane=Lane.PREFILL))
    (results[4],) = collect(device, 1)
    assert {step for step, result in results.items() if result.gone} == {1, 3, 4} and results[2].error is None
    assert results[4].error == "the thread of lane prefill has ended: RuntimeError: simulated fault"


# -- virtual time ----------------------------------------------------------------------------------------------------


def virtual(**given: Any) -> VirtualDevice:
    return VirtualDevice(CAPACITY, Partition(2, 2), cost=CostModel(per_token=1.0, contention=0.0), **given)


def test_virtual_time_passes_in_polls_and_only_as_far_as_the_next_result() -> None:
    device: Device = virtual()
    device.submit(plan(1, piece(0, 4, (0,)), lane=Lane.PREFILL))  # 8 seconds on half of the device
    device.submit(plan(2, piece(0, 1, (1,)), lane=Lane.DECODE))  # 2 seconds
    assert device.poll(1.5) == [] and device.clock() == 1.5  # type: ignore[attr-defined]
    assert [result.ticket.step for result in device.poll(None)] == [2] and device.clock() == 2.0  # type: ignore[attr-defined]
    (late,) = device.poll(100.0)
    assert late.seconds == pytest.approx(8.0) and device.clock() == pytest.approx(8.0)  # type: ignore[attr-defined]
    assert device.poll(1.0) == []
    with pytest.raises(DeviceError, match="no time can pass"):
        device.poll(None)
    device.wake()
    assert device.poll(None) == []


def test_a_rival_counts_for_just_the_time_in_which_it_computes() -> None:
    device = VirtualDevice(CAPACITY, Partition(4, 4), cost=CostModel(per_token=1.0))
    device.submit(plan(1, piece(0, 8, (0, 1)), lane=Lane.PREFILL))
    assert device.poll(3.0) == []  # alone: 3 of 8 seconds done
    device.submit(plan(2, piece(0, 1, (2,)), lane=Lane.DECODE))
    # Side by side both take twice as long: 2 seconds for the one token, in which the other does 1 of its 8.
    assert [(one.ticket.step, one.seconds) for one in device.poll(None)] == [(2, pytest.approx(2.0))]
    assert [(one.ticket.step, one.seconds) for one in device.poll(None)] == [(1, pytest.approx(9.0))]


def test_in_virtual_time_a_step_keeps_the_share_that_it_began_with_and_lanes_keep_their_order() -> None:
    device = virtual()
    for step in (1, 2):
        device.submit(plan(step, piece(0, 2, (0,)), lane=Lane.PREFILL))
    device.set_partition(Partition(4, 1))
    assert device.partition() == Partition(4, 1)
    assert [(one.ticket.step, one.seconds) for one in device.poll(None)] == [(1, pytest.approx(4.0))]
    assert [(one.ticket.step, one.seconds) for one in device.poll(None)] == [(2, pytest.approx(2.0))]
    with pytest.raises(DeviceError, match="there are 4"):
        device.set_partition(Partition(5, 1))
