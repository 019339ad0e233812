"""Ranks as one device: around processes of a simulated device (stub_rank.py), with faults in rank 1."""

from __future__ import annotations

import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.loop.steps import collect, plan

from weft.config import EngineConfig
from weft.core.plan import Lane, Partition, Plan, Result, Sampled, Ticket
from weft.devices.cores import cores_of_rank, kernels_of, least_kernels
from weft.devices.simulated import continuation
from weft.errors import CheckpointError, ConfigError, DeviceError, RankLost
from weft.ipc.ranks import Done
from weft.loop.rank import digest
from weft.loop.ranks import FAIL_SECONDS, GRACE_SECONDS, RankedDevice, Votes, open_ranks

SCRIPT = Path(__file__).with_name("stub_rank.py")
stub = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@contextmanager
def ranks(
    model: str = "good",
    count: int = 2,
    timeout: float = 20.0,
    said: list[str] | None = None,
    load_timeout: float = 600.0,
) -> Iterator[RankedDevice]:
    config = EngineConfig(tensor_parallel_size=count, rank_timeout=timeout, rank_load_timeout=load_timeout)
    say = (lambda _phase: None) if said is None else said.append
    device = open_ranks(config, Path(model), say, (sys.executable, str(SCRIPT)))
    try:
        yield device
    finally:
        device.close()


def test_ranks_are_one_device() -> None:
    said: list[str] = []
    with ranks(count=3, said=said) as device:
        assert said == ["phase of rank 0"]
        assert device.capacity().blocks == 40  # what fits on all
        assert device.lanes() == (Lane.MIXED,) and device.partition() is None
        assert "3 ranks" in device.describe().device
        assert all(size > 0 for _, size in device.memory())
        for step in range(1, 30):
            assert device.submit(plan(step, 100 + step)) == Ticket(step, Lane.MIXED)
        results = collect(device, 29)
        assert [result.ticket.step for result in results] == list(range(1, 30))
        for result in results:
            (sampled,) = result.sampled
            assert (sampled.token,) == continuation([100 + sampled.sequence, 8, 9], 1, 4096)
        device.wake()
        assert device.poll(None) == [] and device.poll(0.0) == []
        with pytest.raises(DeviceError, match="one mixed lane"):
            device.set_partition(Partition(1, 1))
        with pytest.raises(DeviceError, match="lane decode"):
            device.submit(Plan(99, Lane.DECODE, ()))
    device.close()
    with pytest.raises(DeviceError, match="closed"):
        device.submit(plan(1, 100))
    assert device.poll(None) == []


def test_all_ranks_are_told_of_new_shares() -> None:
    """One that kept its own would sample another token here, and so be lost."""
    with ranks("two lanes") as device:
        assert device.partition() == Partition(1, 3)
        for step, shares in enumerate((Partition(1, 3), Partition(3, 1), Partition(4, 4)), 1):
            device.set_partition(shares)
            assert device.partition() == shares
            device.submit(plan(step, stub.SHARES, Lane.PREFILL))
            (result,) = collect(device, 1)
            assert [one.token for one in result.sampled] == [shares.prefill]
        for wrong in (Partition(0, 4), Partition(2, 5), Partition(5, 1)):
            with pytest.raises(DeviceError, match="a rank has 4"):
                device.set_partition(wrong)
        device.submit(plan(9, stub.SHARES, Lane.PREFILL))
        assert [one.token for one in collect(device, 1)[0].sampled] == [4]


def test_a_step_that_fails_on_all_ranks_fails_alone() -> None:
    with ranks() as device:
        device.submit(plan(1, stub.ALL_FAIL))
        device.submit(plan(2, 100))
        first, second = collect(device, 2)
        assert first.error == "rank 0 stumbled" and second.error is None


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("KILLED", "rank 1 was killed by SIGKILL"),
        ("HANGS", "rank 1 did not end step 2 within 0.5 s of the others"),
        ("FAILS", "rank 1 failed in step 2: rank 1 stumbled"),
        ("OTHER_TOKENS", "rank 1 sampled other tokens in step 2 than rank 0"),
        ("RAISES", "rank 0: seam 9: rank 1 did not come within 1 s"),
    ],
)
def test_a_rank_that_is_lost_ends_the_device_in_words(fault: str, words: str) -> None:
    with ranks(timeout=0.5) as device:
        device.submit(plan(1, 100))
        collect(device, 1)
        device.submit(plan(2, getattr(stub, fault)))
        begun = time.monotonic()
        with pytest.raises(RankLost, match=words):
            collect(device, 1)
        with pytest.raises(RankLost, match=words):
            device.poll(0.0)
        with pytest.raises(RankLost, match=words):
            device.submit(plan(3, 100))
        device.close()
        assert time.monotonic() - begun < 5


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("broken", CheckpointError, "rank 1: model.safetensors is cut short"),
        ("gone", DeviceError, "rank 1 ended with exit code 7 before it served"),
    ],
)
def test_a_rank_that_cannot_start(model: str, kind: type[Exception], words: str) -> None:
    before = open_files()
    with pytest.raises(kind, match=words), ranks(model):
        pass
    assert open_files() <= before


def test_nothing_is_left_of_ranks_that_wait_for_one_that_has_ended() -> None:
    with pytest.raises(DeviceError, match="rank 1 ended with exit code 7 before it served"), ranks("meets"):
        pass
    assert not shared()


def shared() -> list[Path]:
    return list(Path("/dev/shm").glob("weft-*-stub"))


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


PARENT = """
import sys
from pathlib import Path
from weft.config import EngineConfig
from weft.loop.ranks import open_ranks
device = open_ranks(EngineConfig(tensor_parallel_size=2), Path(sys.argv[1]), lambda _: None, sys.argv[2:])
print("open", flush=True)
sys.stdin.read()
"""


def parent_of(model: str) -> subprocess.Popen[bytes]:
    command, pipe = [sys.executable, "-c", PARENT, model, sys.executable, str(SCRIPT)], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe)


def test_nothing_is_left_of_ranks_that_wait_for_one_another_and_lose_their_parent() -> None:
    with parent_of("waits") as parent:
        until(lambda: bool(shared()))
        parent.kill()
    until(lambda: not shared())


def test_a_rank_that_is_stopped_ends_with_its_parent() -> None:
    with parent_of("good") as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"open\n"
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        first, second = [os.pidfd_open(int(child)) for child in children]
        signal.pidfd_send_signal(second, signal.SIGSTOP)
        parent.kill()
    try:
        for process in (first, second):
            assert select.select([process], [], [], 20)[0] == [process]
    finally:
        for process in (first, second):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            os.close(process)


def test_a_rank_that_has_ended_before_it_is_told_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(subprocess, "Popen", Ended)
    before = open_files()
    with pytest.raises(DeviceError, match=r"rank . ended with exit code 1 before it served"):
        open_ranks(EngineConfig(tensor_parallel_size=2), Path("good"), lambda _: None, ("false",))
    assert open_files() <= before


def test_a_rank_that_others_wait_for_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with ranks("slow", timeout=0.3):
        assert "rank 1 still loads its part of the model; the others have theirs" in caplog.text


def test_a_rank_that_does_not_load_is_lost() -> None:
    begun = time.monotonic()
    words = "rank 1 did not load its part of the model within 0.4 s of another rank; --rank-load-timeout allows"
    with pytest.raises(RankLost, match=words), ranks("stuck", load_timeout=0.4):
        pass
    assert time.monotonic() - begun < 30  # it would sleep for a minute


def test_kernels_that_differ_are_named() -> None:
    if kernels_of(EngineConfig()) not in ("portable", "reference"):
        words = "--kernels auto comes to .* on rank 0, portable on rank 1, .* --kernels portable would work"
        with pytest.raises(ConfigError, match=words), ranks("other kernels"):
            pass
    assert least_kernels(["avx2", "avx512", "portable"]) == "portable"
    assert least_kernels(["avx2", "reference"]) == "reference"
    assert kernels_of(EngineConfig(device="cuda")) == "cuda"


def test_no_process_and_no_kernels() -> None:
    with pytest.raises(DeviceError, match="rank 0 cannot be started"):
        open_ranks(EngineConfig(tensor_parallel_size=2), Path("x"), lambda _: None, ("/nowhere/python",))
    with pytest.raises(ConfigError, match="--cores names core 4000"):
        open_ranks(EngineConfig(tensor_parallel_size=2, cores="4000"), Path("x"), lambda _: None)


def done(rank: int, step: int, digest: int = 1, error: str | None = None) -> Done:
    result = Result(Ticket(step, Lane.MIXED), error=error) if rank == 0 or error is not None else None
    return Done(rank, step, 0, digest, result)


def test_votes_are_counted_by_step() -> None:
    votes = Votes(2, timeout=3.0)
    assert votes.patience(0.0) is None
    assert votes.add(done(1, 1), 10.0) is None and votes.add(done(1, 2), 11.0) is None
    assert votes.patience(11.0) == 10.0 + 3.0 + GRACE_SECONDS - 11.0
    first = done(0, 1)
    assert votes.add(first, 12.0) == first.result
    votes.check(11.0 + 3.0)
    with pytest.raises(RankLost, match="rank 0 did not end step 2 within 3 s"):
        votes.check(11.0 + 3.0 + GRACE_SECONDS)


def test_a_rank_that_fails_alone_is_not_waited_for_so_long() -> None:
    votes = Votes(3, timeout=30.0)
    votes.add(done(0, 5, error="out of memory"), 1.0)
    assert votes.cause() == "rank 0 failed in step 5: out of memory"
    votes.check(1.0)
    with pytest.raises(RankLost, match="rank 0 failed in step 5: out of memory"):
        votes.check(1.0 + FAIL_SECONDS)


def test_no_rank_is_to_blame_while_nothing_runs() -> None:
    votes = Votes(2, timeout=3.0)
    votes.add(done(1, 1), 10.0)
    votes.forgive(60.0)
    votes.check(10.0 + 60.0 + 3.0)
    with pytest.raises(RankLost, match="rank 0 did not end step 1 within 3 s"):
        votes.check(10.0 + 60.0 + 3.0 + GRACE_SECONDS)


def test_the_digest_is_of_tokens_and_failures() -> None:
    ticket = Ticket(1, Lane.MIXED)
    one = Result(ticket, (Sampled(1, 7), Sampled(2, 8)))
    assert digest(one) == digest(Result(ticket, one.sampled, seconds=3.0))
    others = [
        Result(ticket, (Sampled(1, 7), Sampled(2, 9))),
        Result(ticket, (Sampled(1, 7),), failed=((2, "NaN"),)),
        Result(ticket, error="x"),
        Result(ticket),
    ]
    assert len({digest(result) for result in (one, *others)}) == 5


def test_cores_are_divided() -> None:
    assert [cores_of_rank((0, 1, 2, 5, 6), rank, 2) for rank in range(2)] == [(0, 1), (2, 5, 6)]
    assert [cores_of_rank((3, 4), rank, 3) for rank in range(3)] == [(3,), (4,), (3,)]
