"""The threads of a lane: they come and go with its cores, sleep when there is no work, and never change a result."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.errors import DeviceError

CORES = tuple(sorted(os.sched_getaffinity(0)))


def workers() -> set[int]:
    """Thread ids of all the lanes' workers in this process."""
    tasks = Path("/proc/self/task")
    return {int(task.name) for task in tasks.iterdir() if (task / "comm").read_text().startswith("weft-")}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def of_status(thread: int, key: str) -> str:
    lines = Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(key))


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(20, 96, generator=made), torch.randn(320, 96, generator=made)


@pytest.fixture
def make(best_level: str) -> Iterator[Callable[..., Any]]:
    """Opens kernels, and closes them at the end of the test."""
    from weft.kernels.cpu import CpuKernels

    opened = []

    def open_one(*cores: int) -> Any:
        opened.append(CpuKernels(best_level, cores))
        return opened[-1]

    yield open_one
    for kernels in opened:
        kernels.close()


def test_a_lane_has_one_worker_for_every_core_but_the_first(make: Callable[..., Any]) -> None:
    before = workers()
    kernels = make(CORES[0], CORES[-1], CORES[0])
    until(lambda: len(workers() - before) == 2)
    pinned = sorted(tuple(os.sched_getaffinity(thread)) for thread in workers() - before)
    assert pinned == sorted([(CORES[-1],), (CORES[0],)])
    assert kernels.native.threads == 3


def test_opening_a_lane_leaves_the_caller_where_it_is(make: Callable[..., Any]) -> None:
    before = os.sched_getaffinity(0)
    kernels = make(CORES[0], CORES[-1])
    x, weight = problem(0)
    kernels.linear(x, kernels.pack_linear(weight))
    assert os.sched_getaffinity(0) == before


def test_new_cores_change_the_workers_and_not_the_result(make: Callable[..., Any]) -> None:
    before, (x, weight) = workers(), problem(1)
    kernels = make(CORES[0])
    packed = kernels.pack_linear(weight)
    expected = kernels.linear(x, packed)
    for count in (2, 1, 5, 3, 1, 4):
        kernels.set_cores(tuple(CORES[i % len(CORES)] for i in range(count)))
        assert torch.equal(kernels.linear(x, packed), expected)
        until(lambda wanted=count - 1: len(workers() - before) == wanted)  # type: ignore[misc]
        assert kernels.native.threads == count


def test_workers_without_work_sleep(make: Callable[..., Any]) -> None:
    before, (x, weight) = workers(), problem(2)
    kernels = make(CORES[0], CORES[-1], CORES[-1])
    packed = kernels.pack_linear(weight)
    for _ in range(10):
        kernels.linear(x, packed)
    mine = workers() - before
    until(lambda: all(of_status(thread, "State").startswith("S") for thread in mine))

    def switches() -> list[int]:
        return [
            sum(int(of_status(thread, f"{kind}_ctxt")) for kind in ("voluntary", "nonvoluntary")) for thread in mine
        ]

    # A sleeping thread is not scheduled at all: it neither spins nor wakes up now and then to look.
    at_first = switches()
    time.sleep(0.2)
    assert switches() == at_first

    def each_ran_again() -> bool:
        kernels.linear(x, packed)
        return all(now > then for now, then in zip(switches(), at_first, strict=True))

    until(each_ran_again)


def test_close_ends_the_workers_and_may_be_repeated(make: Callable[..., Any]) -> None:
    before, (x, weight) = workers(), problem(3)
    kernels, other = make(CORES[0], CORES[-1]), make(CORES[0])
    packed = kernels.pack_linear(weight)
    expected = kernels.linear(x, packed)
    kernels.close()
    kernels.close()
    until(lambda: workers() == before)
    with pytest.raises(RuntimeError, match="closed"):
        kernels.linear(x, packed)
    # What one lane packed is used by the other.
    assert torch.equal(other.linear(x, packed), expected)


def test_many_lanes_compute_side_by_side(make: Callable[..., Any]) -> None:
    lanes = [make(CORES[0], CORES[-1]) for _ in range(4)]
    problems = [problem(10 + i) for i in range(4)]
    packed = [lane.pack_linear(weight) for lane, (_, weight) in zip(lanes, problems, strict=True)]
    expected = [lanes[0].linear(x, p) for (x, _), p in zip(problems, packed, strict=True)]

    def work(i: int) -> bool:
        return all(torch.equal(lanes[i].linear(problems[i][0], packed[i]), expected[i]) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_the_caller_sleeps_until_a_late_worker_is_done(make: Callable[..., Any]) -> None:
    # Six workers on one core with items of some milliseconds: at the end, one of them holds an item while another has
    # the core, for longer than the caller spins.
    kernels = make(*(CORES[-1:] * 7))
    x, weight = torch.ones(120, 12000), torch.ones(64 * 9, 12000)
    packed = kernels.pack_linear(weight)
    for _ in range(10):
        assert (kernels.linear(x, packed) == 12000).all()


def test_calls_from_many_threads_wait_for_one_another(make: Callable[..., Any]) -> None:
    kernels, (x, weight) = make(CORES[0], CORES[-1]), problem(20)
    packed = kernels.pack_linear(weight)
    expected = kernels.linear(x, packed)

    def work(i: int) -> bool:
        if i == 0:
            for n in range(60):
                kernels.set_cores(tuple(CORES[j % len(CORES)] for j in range(1 + n % 3)))
            return True
        return all(torch.equal(kernels.linear(x, packed), expected) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_impossible_cores_are_refused_and_leave_nothing_behind(make: Callable[..., Any]) -> None:
    before = workers()
    with pytest.raises(DeviceError, match="between 1 and 1024 cores"):
        make()
    for core in (1023, 4095, -1):
        with pytest.raises(DeviceError, match=f"core {core}"):
            make(CORES[0], core)
    until(lambda: workers() == before)
    kernels, (x, weight) = make(CORES[0]), problem(30)
    with pytest.raises(DeviceError, match="core 1023"):
        kernels.set_cores((CORES[0], 1023))
    assert kernels.linear(x, kernels.pack_linear(weight)).shape == (20, 320)  # still works


def test_memory_is_zeroed_aligned_and_given_back(make: Callable[..., Any]) -> None:
    from weft import _native

    kernels = make(CORES[0], CORES[-1])
    for size in (1, 4097, 5 * 2**20 + 123):
        memory = _native.Memory(size, kernels.native)
        assert memory.bytes == size and memory.address % 64 == 0
        memory.release()
        memory.release()
        assert memory.address == 0 and memory.bytes == 0
    with pytest.raises(MemoryError):
        _native.Memory(2**62, kernels.native)
