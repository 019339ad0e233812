"""What base.py promises, for every device there is: the same tests on the simulated one, the CPU and cuda (interpreted
where there is no GPU)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from weft.config import EngineConfig
from weft.core.plan import Lane, Partition, Plan, Result, Sampling, Slice, Ticket
from weft.core.sampling import SamplingParams
from weft.devices import open_device
from weft.devices.base import Device
from weft.errors import DeviceError

BUILTIN = Path(__file__).resolve().parents[2] / "src" / "weft" / "assets" / "builtin"
GREEDY = SamplingParams(temperature=0.0)
PARTITIONS = ["off"] + ["1:1"] * (len(os.sched_getaffinity(0)) > 1)
DEVICES = ["simulated", "cpu"] + ["cuda"] * (find_spec("triton") is not None)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter


@pytest.fixture(params=[(name, partition) for name in DEVICES for partition in PARTITIONS], ids=":".join)
def device(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Device]:
    name, partition = request.param
    config = EngineConfig(device=name, partition=partition, num_blocks=64, max_model_len=128, max_num_seqs=4)
    opened = open_device(config, tiny_model if name == "cuda" else BUILTIN, lambda phase: None)
    yield opened
    opened.close()


def plan(step: int, lane: Lane, tokens: tuple[int, ...] = (5, 6, 7)) -> Plan:
    """One greedy slice of a sequence of its own."""
    return Plan(step, lane, (Slice(step, 0, tokens, (step,), Sampling(GREEDY, seed=0, position=len(tokens))),))


def collect(device: Device, count: int) -> list[Result]:
    results: list[Result] = []
    while len(results) < count:
        found = device.poll(60.0)
        assert found, "no result within a minute"
        results += found
    return results


def test_capacity_bounds_what_was_asked_for(device: Device) -> None:
    capacity = device.capacity()
    assert (capacity.blocks, capacity.block_size, capacity.max_model_len) == (64, 16, 128)
    assert (capacity.max_tokens, capacity.max_slices, capacity.vocabulary) == (512, 4, 4096)
    assert capacity == device.capacity()
    description = device.describe()
    assert description.device and description.dtype and description.kernels
    assert all(what and size > 0 for what, size in device.memory())


def test_lanes_and_shares_go_together(device: Device) -> None:
    partition = device.partition()
    if partition is None:
        assert device.lanes() == (Lane.MIXED,)
    else:
        assert device.lanes() == (Lane.PREFILL, Lane.DECODE)
        assert partition.prefill >= 1 and partition.decode >= 1
        assert partition.prefill + partition.decode <= device.capacity().shares


def test_each_plan_ends_in_one_result_and_a_lane_keeps_its_order(device: Device) -> None:
    lanes = device.lanes()
    for step in range(1, 21):
        lane = lanes[step % len(lanes)]
        assert device.submit(plan(step, lane)) == Ticket(step, lane)
    results = collect(device, 20)
    assert device.poll(0.0) == []
    assert sorted(result.ticket.step for result in results) == list(range(1, 21))
    for lane in lanes:
        steps = [result.ticket.step for result in results if result.ticket.lane is lane]
        assert steps == sorted(steps)
    assert {result.error for result in results} == {None}
    assert len({result.sampled[0].token for result in results}) == 1  # the same prefix, the same token
    assert all(result.sampled[0].sequence == result.ticket.step and result.seconds >= 0 for result in results)


def test_poll_waits_no_longer_than_it_is_told(device: Device) -> None:
    assert device.poll(0.0) == []
    assert device.poll(0.01) == []


def test_wake_ends_the_poll_under_way_or_the_next(device: Device) -> None:
    device.wake()
    assert device.poll(None) == []
    timer = threading.Timer(0.05, device.wake)
    timer.start()
    assert device.poll(None) == []
    timer.join()


def test_wake_loses_no_result(device: Device) -> None:
    lane = device.lanes()[0]
    for step in range(1, 11):
        device.wake()
        device.submit(plan(step, lane))
        device.wake()
    results: list[Result] = []
    while len(results) < 10:
        results += device.poll(60.0)
    assert [result.ticket.step for result in results] == list(range(1, 11))


def test_a_partition_that_cannot_be_is_refused(device: Device) -> None:
    before = device.partition()
    for shares in ((0, 1), (1, 0), (1, 10**6)):
        with pytest.raises(DeviceError):
            device.set_partition(Partition(*shares))
    assert device.partition() == before


def test_setting_the_partition_in_force_changes_no_result(device: Device) -> None:
    partition = device.partition()
    lane = device.lanes()[-1]
    device.submit(plan(1, lane))
    (first,) = collect(device, 1)
    if partition is not None:
        device.set_partition(partition)
    device.submit(plan(2, lane))
    (second,) = collect(device, 1)
    assert first.sampled[0].token == second.sampled[0].token


def test_close_may_be_called_twice_and_ends_submission(device: Device) -> None:
    device.submit(plan(1, device.lanes()[0]))
    device.close()
    device.close()
    with pytest.raises(DeviceError, match="closed"):
        device.submit(plan(2, device.lanes()[0]))
