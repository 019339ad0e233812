"""Collectives between processes and threads against ten lines of torch, bit for bit: shapes, cuts, formats, delays, and
what becomes of the others when a rank dies, hangs or does something else."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.weave.local import Alone, Threads

from weft.errors import DeviceError, RankLost
from weft.ipc.ranks import new_name
from weft.kernels import REFERENCE, available
from weft.kernels.quantised import quantise_rows, unpack_rows
from weft.weave import rows
from weft.weave.background import Background
from weft.weave.collective import Join

BACKENDS = ("shm", "gloo", "sockets")
GROUPS = ("shm-2", "shm-3", "shm-4", "gloo-2", "gloo-3", "gloo-4", "sockets-2", "sockets-4", "one_round-3")
ONE_ROUND = {"one_round": True}
FOLDER = Path(__file__).parent
many = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def rank_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One process that has imported everything, and what makes it fork ranks."""
    if available() == (REFERENCE,):
        pytest.skip("the C++ extension is not built")
    ours, theirs = socket.socketpair()
    script = FOLDER / "ranks.py"
    forker = subprocess.Popen([sys.executable, script, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    make = runpy.run_path(str(FOLDER / "rank_processes.py"))["RankProcesses"]
    processes = make(ours, tmp_path_factory.mktemp("groups"), runpy.run_path(str(script)))
    yield processes
    processes.close()
    assert forker.wait(20) == 0


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    from weft.kernels.cpu import CpuKernels

    made = CpuKernels(available()[0], (0,))
    yield made
    made.close()


@pytest.fixture(scope="module", params=GROUPS)
def group(request: pytest.FixtureRequest, rank_processes: Any) -> Any:
    """One group of processes for many cases. The slots are so small that messages take several chunks."""
    backend, ranks = request.param.split("-")
    processes = rank_processes.fork(int(ranks))
    options = {"shm": {"slot_bytes": 16384, "spin": False}, "one_round": ONE_ROUND}.get(backend, {})
    rank_processes.open(processes, backend, **options)
    return processes


def truth(case: dict[str, Any], made: dict[str, Any], kernels: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(what every rank gets, the residual of all rows)."""
    ranks = len(case["bounds"]) - 1
    total = made["make_partial"](case, 0).float()
    for rank in range(1, ranks):
        total = total + made["make_partial"](case, rank).float()
    total = total + made["make_residual"](case).float()
    residual = total.to(made["DTYPES"][case["dtype"]])
    hidden = kernels.rms_norm(residual, made["make_weight"](case), 1e-5)
    form = made["make_format"](case, kernels)
    if form is None:
        return [hidden], residual
    return list(unpack_rows(quantise_rows(kernels.native, hidden, form.packed), len(hidden))), residual


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, but all NaN are one."""
    if found.shape != expected.shape or found.dtype is not expected.dtype:
        return False
    bits = {2: torch.int16, 4: torch.int32}.get(found.element_size()) if found.is_floating_point() else found.dtype
    return bool(((found.view(bits) == expected.view(bits)) | (found.isnan() & expected.isnan())).all())


def check(cases: list[dict[str, Any]], answers: list[list[torch.Tensor]], made: dict[str, Any], kernels: Any) -> None:
    for case in cases:
        hidden, residual = truth(case, made, kernels)
        for rank, answer in enumerate(answers):
            got = [answer.pop(0) for _ in range(len(hidden) + 1)]
            assert all(same(*pair) for pair in zip(got, hidden, strict=False)), (case, rank)
            whole = len(got[-1]) == len(residual)  # where every rank keeps all
            own = slice(None) if whole else slice(*case["bounds"][rank : rank + 2])
            assert same(got[-1], residual[own]), (case, rank)


def run(processes: list[Any], cases: list[dict[str, Any]], made: dict[str, Any], kernels: Any) -> None:
    for process in processes:
        process.send("join", cases=cases)
    check(cases, [process.receive() for process in processes], made, kernels)


@st.composite
def seams(draw: Any, ranks: int) -> dict[str, Any]:
    form = draw(st.none() | st.tuples(st.integers(0, 2), st.booleans(), st.booleans(), st.booleans()))
    size = draw(st.sampled_from([256, 384, 1152]) if form else st.sampled_from([1, 7, 16, 40, 100, 128, 515]))
    tokens = draw(st.integers(0, 40))
    inner = sorted(draw(st.lists(st.integers(0, tokens), min_size=ranks - 1, max_size=ranks - 1)))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    return {
        "seed": draw(st.integers(0, 2**20)),
        "size": size,
        "bounds": [0, *inner, tokens],
        "dtype": dtype,
        "part_dtype": draw(st.sampled_from([dtype, "float32"])),
        "format": form,
        "poison": draw(st.lists(st.integers(0, tokens - 1), max_size=3)) if tokens else [],
    }


@many
@given(data=st.data())
def test_seams_are_as_defined_on_all_ranks(data: Any, group: Any, rank_processes: Any, kernels: Any) -> None:
    """T that the ranks do not divide, T = 0, empty shards, rows of NaN: several seams one after the other."""
    cases = data.draw(st.lists(seams(len(group)), min_size=1, max_size=3))
    run(group, cases, rank_processes.script, kernels)


def test_corner_cases(group: Any, rank_processes: Any, kernels: Any) -> None:
    """No row, one row, all rows with one rank; the same with formats."""
    ranks = len(group)
    every = [[0] * (ranks + 1), [0] * ranks + [1], [0, *[1] * ranks], [0] * ranks + [37], [0, *[37] * ranks]]
    cases = [
        {"seed": number, "size": 256, "bounds": bounds, "dtype": "bfloat16", "format": form}
        for number, bounds in enumerate(every)
        for form in (None, [1, True, True, True])
    ]
    run(group, cases, rank_processes.script, kernels)


def test_late_ranks_change_nothing(group: Any, rank_processes: Any, kernels: Any) -> None:
    """Each rank in turn is late before it starts and before it finishes, while the others run ahead."""
    ranks, cases = len(group), []
    for number in range(3 * ranks):
        bounds = [0, *(11 * (rank + 1) + number for rank in range(ranks))]
        late = {str(number % ranks): [0.01, 0] if number % 2 else [0, 0.01]}
        cases.append({"seed": number, "size": 512, "bounds": bounds, "dtype": "bfloat16", "delays": late})
    run(group, cases, rank_processes.script, kernels)


def test_gather_gives_every_tensor_to_all(group: Any, rank_processes: Any) -> None:
    for seed, shape in enumerate([[5, 33], [0, 8], [3, 7000]]):
        for process in group:
            process.send("gather", seed=seed, shape=shape)
        expected = [rank_processes.script["random"](seed + rank, *shape) for rank in range(len(group))]
        for process in group:
            found = process.receive()
            assert len(found) == len(expected) and all(map(torch.equal, found, expected))


TIMEOUT = 2.0  # seconds; on a machine that is busy, ranks need more than one to find each other
SMALL = {"seed": 1, "size": 64, "bounds": [0, 3, 5, 9], "dtype": "bfloat16"}
LARGE = {**SMALL, "size": 1 << 18, "bounds": [0, 8, 16, 24]}  # of which a connection holds a part


@pytest.fixture(params=[*BACKENDS, "one_round", "all_reduce"])
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


def patient(rank_processes: Any, backend: str, timeout: float) -> Any:
    """Three ranks that wait for one another for so many seconds, after a seam that went well."""
    processes = rank_processes.fork(3)
    rank_processes.open(processes, backend, timeout=timeout, **(ONE_ROUND if backend == "one_round" else {}))
    for process in processes:
        process.send("join", cases=[SMALL])
    assert len({tuple(process.receive()[0].float().flatten().tolist()) for process in processes}) == 1
    return processes


@pytest.fixture
def three(backend: str, rank_processes: Any) -> Any:
    return patient(rank_processes, backend, TIMEOUT)


def failure(process: Any) -> str:
    with pytest.raises(Exception) as raised:
        process.receive()
    return str(raised.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_named(three: Any, number: int) -> None:
    """The others get an error within the time-out, and again when they try once more. Nothing waits for ever."""
    three[1].signal(number)
    for process in (three[0], three[2]):
        process.send("join", cases=[SMALL])
    for process in (three[0], three[2]):
        message = failure(process)
        assert message.startswith("RankLost: seam 2: ") and "rank 1" in message, message
        assert number == signal.SIGKILL or f"did not come within {TIMEOUT:g} s" in message, message
        assert process.seconds < TIMEOUT + 1 + 1  # the time-out, and what all_reduce takes to find who it is
        process.send("join", cases=[SMALL])
        assert "RankLost: seam 2" in failure(process) and process.seconds < 0.5


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("case", [SMALL, LARGE], ids=["small", "large"])
def test_a_rank_that_dies_is_named_by_those_that_cannot_see_it(
    backend: str, first: int, case: dict[str, Any], rank_processes: Any
) -> None:
    """The first may only see that the second has left, which came once the other was dead."""
    processes = patient(rank_processes, backend, 2 * TIMEOUT)
    processes[first].send("join", cases=[case])
    time.sleep(0.3)
    processes[1].signal(signal.SIGKILL)
    time.sleep(0.1)
    processes[2 - first].send("join", cases=[case])
    for process in (processes[0], processes[2]):
        message = failure(process)
        assert message.startswith("RankLost: seam 2: ") and "rank 1" in message, message


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("late", [0, 2])
def test_a_rank_that_dies_between_the_rounds_is_named(backend: str, late: int, rank_processes: Any) -> None:
    """It has given its part; who is late may find that the third has left because of it."""
    processes = patient(rank_processes, backend, 2 * TIMEOUT)
    for process in processes:
        process.send("join", cases=[LARGE | {"delays": {"1": [0, 60], str(late): [0, 1.0]}}])
    time.sleep(0.8)
    processes[1].signal(signal.SIGKILL)
    for process in (processes[0], processes[2]):
        message = failure(process)
        assert message.startswith("RankLost: seam 2: ") and "rank 1" in message, message


def test_a_dead_rank_is_noticed_before_the_time_out(rank_processes: Any) -> None:
    processes = rank_processes.fork(2)
    rank_processes.open(processes, "shm", timeout=30.0)
    processes[0].send("join", cases=[{**SMALL, "bounds": [0, 3, 9]}])
    processes[1].signal(signal.SIGKILL)
    assert f"rank 1 (process {processes[1].pid}) has ended" in failure(processes[0])
    assert processes[0].seconds < 5


@pytest.mark.parametrize("backend", ["shm", "sockets"])
def test_ranks_that_are_paused_together_go_on(backend: str, rank_processes: Any, kernels: Any) -> None:
    """For longer than they wait for one another, in the middle of a seam."""
    processes = patient(rank_processes, backend, TIMEOUT)
    case = SMALL | {"delays": {"1": [0.5, 0]}}
    for process in processes:
        process.send("join", cases=[case])
    time.sleep(0.3)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            process.signal(number)
            time.sleep(0.1)
        time.sleep(TIMEOUT if number == signal.SIGSTOP else 0)
    check([case], [process.receive() for process in processes], rank_processes.script, kernels)
    assert processes[0].seconds > TIMEOUT


def test_a_rank_that_leaves_is_named(three: Any) -> None:
    three[2].send("close")
    three[2].receive()
    for process in three[:2]:
        process.send("join", cases=[SMALL])
    assert all("rank 2" in failure(process) for process in three[:2])


@pytest.mark.parametrize(
    "other",
    [{"bounds": [0, 3, 5, 8]}, {"bounds": [0, 2, 5, 9]}, {"size": 32}, {"part_dtype": "float32"}],
)
def test_other_plans_are_an_error_everywhere(three: Any, other: dict[str, Any]) -> None:
    for rank, process in enumerate(three):
        process.send("join", cases=[SMALL | other if rank == 1 else SMALL])
    messages = [failure(process) for process in three]
    # Over gloo, a rank that is late may only see that another has left: because of the plan, but it cannot know.
    assert all("another plan" in message or "has ended or left" in message for message in messages), messages
    assert any("another plan" in message for message in messages), messages


def test_the_first_seam_after_a_gather_is_compared_before_anybody_waits(three: Any) -> None:
    """It is the first in which the ranks meet in a step; that of the embedding exchanges nothing."""
    for process in three:
        process.send("gather", seed=1, shape=[3, 64])
    for process in three:
        process.receive()
    for rank, process in enumerate(three):
        process.send("join", cases=[SMALL | {"size": 32} if rank == 1 else SMALL])
    messages = [failure(process) for process in three]
    assert any("another plan" in message for message in messages), messages
    assert all(process.seconds < 0.9 * TIMEOUT for process in three)


def test_a_gather_is_no_seam(three: Any) -> None:
    three[0].send("gather", seed=1, shape=[3, 64])
    for process in three[1:]:
        process.send("join", cases=[SMALL])
    assert all("RankLost: seam 2" in failure(process) for process in three)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_communication_thread_changes_nothing(backend: str, rank_processes: Any, kernels: Any) -> None:
    processes = rank_processes.fork(2)
    rank_processes.open(processes, backend, background=True)
    cases = [{"seed": seed, "size": 384, "bounds": [0, 2 * seed, 3 * seed], "dtype": "bfloat16"} for seed in range(8)]
    run(processes, cases, rank_processes.script, kernels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_seams_wait_for_their_turn_in_a_communication_thread(backend: str, rank_processes: Any, kernels: Any) -> None:
    """A gather may follow once all are finished."""
    processes = rank_processes.fork(2)
    rank_processes.open(processes, backend, background=True)
    cases = [
        {"seed": seed, "size": 384, "bounds": [0, 2 * seed, 5 * seed], "dtype": "bfloat16", "format": form}
        for seed, form in enumerate([None, [1, True, True, True], None, None, [1, True, False, False], None])
    ]
    for process in processes:
        process.send("ahead", cases=cases)
    check(cases, [process.receive() for process in processes], rank_processes.script, kernels)
    for process in processes:
        process.send("gather", seed=1, shape=[2, 3])
    assert all(len(process.receive()) == 2 for process in processes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_waits_for_a_communication_thread_is_told_of_a_lost_rank(backend: str, rank_processes: Any) -> None:
    processes = rank_processes.fork(2)
    rank_processes.open(processes, backend, background=True, timeout=TIMEOUT)
    processes[1].signal(signal.SIGKILL)
    processes[0].send("ahead", cases=[{**SMALL, "bounds": [0, 3, 9]}] * 3)
    message = failure(processes[0])
    assert message.startswith("RankLost: seam 1: rank 1 ") and processes[0].seconds < TIMEOUT + 3, message
    processes[0].send("close")
    processes[0].receive()


def test_plain_torch_gives_the_same_bits(rank_processes: Any, kernels: Any) -> None:
    processes = rank_processes.fork(2)
    rank_processes.open(processes, "gloo", fused=False)
    cases = [
        {"seed": 1, "size": 384, "bounds": [0, 4, 9], "dtype": "bfloat16", "format": [1, True, True, True]},
        {"seed": 2, "size": 70, "bounds": [0, 9, 9], "dtype": "float32"},
    ]
    run(processes, cases, rank_processes.script, kernels)


def test_the_plain_baseline_is_close(rank_processes: Any, kernels: Any) -> None:
    """All ranks keep the whole residual, and sums are rounded once more."""
    processes = rank_processes.fork(2)
    rank_processes.open(processes, "all_reduce")
    case = {"seed": 1, "size": 384, "bounds": [0, 4, 9], "dtype": "float32"}
    hidden, residual = truth(case, rank_processes.script, kernels)
    for process in processes:
        process.send("join", cases=[case])
    for process in processes:
        torch.testing.assert_close(process.receive(), [*hidden, residual])


@pytest.mark.parametrize("late", [(), (0,), (1, 2)])
def test_threads_are_ranks(late: tuple[int, ...], rank_processes: Any, kernels: Any) -> None:
    made = rank_processes.script

    def pause(rank: int, seam: int, stage: str) -> None:
        time.sleep(0.002 * (rank in late and seam % 3 == 0))

    ranks = Threads(3, rows.plain(kernels.rms_norm), pause=pause).collectives()
    cases = [{"seed": s, "size": 256, "bounds": [0, s, s + 3, s + 4], "dtype": "bfloat16"} for s in range(6)]
    answers: list[list[torch.Tensor]] = [[] for _ in ranks]

    def drive(collective: Any) -> None:
        for case in cases:
            join = made["make_join"](case, collective.rank, collective.owned(tuple(case["bounds"])), kernels)
            joined = collective.finish(collective.start(join))
            answers[collective.rank] += [joined.hidden, joined.residual]
        answers[collective.rank].append(torch.cat(collective.gather(torch.tensor([collective.rank]))))

    threads = [threading.Thread(target=drive, args=(collective,)) for collective in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(cases, answers, made, kernels)
    assert all(answer[0].tolist() == [0, 1, 2] for answer in answers)


def test_a_thread_that_does_not_come_is_named(kernels: Any, rank_processes: Any) -> None:
    first, second = Threads(2, rows.plain(kernels.rms_norm), timeout=0.1).collectives()
    join = rank_processes.script["make_join"]({**SMALL, "bounds": [0, 4, 9]}, 0, (0, 4), kernels)
    with pytest.raises(RankLost, match="rank 1 did not come"):
        first.finish(first.start(join))
    second.close()
    with pytest.raises(RankLost, match="rank 1 has left"):
        first.gather(torch.zeros(1))


def test_one_rank_is_add_rms_norm(rank_processes: Any, kernels: Any) -> None:
    case = {**SMALL, "bounds": [0, 9]}
    join = rank_processes.script["make_join"](case, 0, (0, 9), kernels)
    hidden, residual = kernels.add_rms_norm(join.partial, join.residual.clone(), join.weight, join.eps)
    alone = Background(Alone(rows.plain(kernels.rms_norm)))
    joined = alone.finish(alone.start(join))
    alone.close()
    assert same(joined.hidden, hidden) and same(joined.residual, residual)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"bounds": [0, 5, 4, 9]}, "ascending from 0 to 9"),
        ({"bounds": [0, 4, 9]}, "3 ranks need 4 numbers"),
        ({"bounds": [0, 4, 5, 8]}, "ascending from 0 to 9"),
    ],
)
def test_bad_bounds_are_refused_before_anything_is_sent(change: Any, error: str, kernels: Any) -> None:
    join = Join(torch.zeros(9, 8), torch.zeros(0, 8), torch.ones(8), 1e-5, tuple(change["bounds"]))
    with pytest.raises(ValueError, match=error):
        Threads(3, rows.plain(kernels.rms_norm)).collectives()[0].start(join)


def test_a_residual_of_other_rows_is_refused(kernels: Any) -> None:
    join = Join(torch.zeros(9, 8), torch.zeros(9, 8), torch.ones(8), 1e-5, (0, 4, 9))
    with pytest.raises(ValueError, match="rank 1 keeps rows 4 to 9"):
        Threads(2, rows.plain(kernels.rms_norm)).collectives()[1].start(join)


class TestMeeting:
    """How ranks of one host find one another, here with one of them."""

    @pytest.fixture
    def name(self) -> Iterator[str]:
        made = new_name()
        yield made
        assert not Path("/dev/shm", made).exists()

    def test_a_group_of_one_leaves_no_name(self, name: str, kernels: Any, rank_processes: Any) -> None:
        from weft.weave.shm import ShmCollective

        case = {**SMALL, "bounds": [0, 9]}
        collective = ShmCollective(name, 0, 1, kernels, timeout=1.0)
        assert not Path("/dev/shm", name).exists()
        join = rank_processes.script["make_join"](case, 0, (0, 9), kernels)
        hidden, residual = truth(case, rank_processes.script, kernels)
        joined = collective.finish(collective.start(join))
        assert same(joined.hidden, hidden[0]) and same(joined.residual, residual)
        collective.close()
        collective.close()
        with pytest.raises(RankLost, match="rank 0 has left its group"):
            collective.gather(torch.zeros(1))

    def test_a_rank_that_does_not_attach_is_named(self, name: str, kernels: Any) -> None:
        from weft.weave.shm import ShmCollective

        with pytest.raises(DeviceError, match=r"rank 1 did not attach within 0\.1 s"):
            ShmCollective(name, 0, 2, kernels, timeout=0.1)
        with pytest.raises(DeviceError, match=r"rank 0 did not make .* within 0\.1 s"):
            ShmCollective(name, 1, 2, kernels, timeout=0.1)

    def test_a_name_that_is_taken_stays_its_owners(self, name: str, kernels: Any) -> None:
        from weft.weave.shm import ShmCollective

        taken = Path("/dev/shm", name)
        taken.write_bytes(b"")
        taken.chmod(0o644)
        for rank, error in ((0, "File exists"), (1, "open to others")):
            with pytest.raises(DeviceError, match=error):
                ShmCollective(name, rank, 2, kernels, timeout=0.1)
        taken.chmod(0o600)
        taken.write_bytes(b"x" * 100)
        with pytest.raises(DeviceError, match="has 100 bytes, not the"):
            ShmCollective(name, 1, 2, kernels, timeout=0.1)
        taken.unlink()

    def test_a_row_that_fits_no_slot_is_refused(self, name: str, kernels: Any) -> None:
        from weft.weave.shm import ShmCollective

        collective = ShmCollective(name, 0, 1, kernels, timeout=1.0, slot_bytes=4096)
        with pytest.raises(ValueError, match="a row of 8192 bytes does not fit into slots of 4096"):
            collective.start(Join(*torch.zeros(2, 1, 2048), torch.ones(2048), 1e-5, (0, 1)))
        collective.close()


def test_ranks_meet_at_one_address() -> None:
    from weft.weave.distributed import meet

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DeviceError, match=f"rank 0 cannot meet the others at 127.0.0.1:{port}"):
            meet("127.0.0.1", port, 0, 2, timeout=1.0)
    first = meet("127.0.0.1", port, 0, 2, timeout=5.0)
    second = meet("127.0.0.1", port, 1, 2, timeout=5.0)
    second.set("who", "rank 1")
    assert first.get("who") == b"rank 1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=1)


class TestCalls:
    """How ranks that are joined by sockets find one another."""

    def test_a_stranger_is_sent_away(self, tmp_path: Path, kernels: Any) -> None:
        from weft.weave.sockets import open_sockets

        stores = [dist.FileStore(str(tmp_path / "store"), 2) for _ in range(2)]
        opened: list[Any] = []
        first = threading.Thread(target=lambda: opened.append(open_sockets(stores[0], 0, 2, kernels, timeout=10.0)))
        first.start()
        token, port, _ = stores[1].get("0").decode().split()
        for hello in (b"", bytes(20), bytes.fromhex(token) + (7).to_bytes(4, "little")):
            with socket.create_connection(("127.0.0.1", int(port))) as stranger:
                stranger.sendall(hello)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b""
        second = open_sockets(stores[1], 1, 2, kernels, timeout=10.0)
        first.join()
        assert [collective.rank for collective in (*opened, second)] == [0, 1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)))
        for collective in (*opened, second):
            collective.close()
            collective.close()

    def test_no_connection_is_paced(self, tmp_path: Path, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither that of who calls nor that of who is called, whatever the system would take."""
        from weft.weave import sockets

        if b"bbr" not in Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_bytes().split():
            pytest.skip("this kernel has no bbr")
        plain, seen = socket.socket, []

        class Paced(socket.socket):
            def __init__(self, *given: Any, **more: Any) -> None:
                super().__init__(*given, **more)
                if not more.get("fileno"):
                    self.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")

            def detach(self) -> int:
                seen.append(control(self))
                return super().detach()

        def control(link: socket.socket) -> bytes:
            return link.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")

        monkeypatch.setattr(socket, "socket", Paced)
        stores = [dist.FileStore(str(tmp_path / "store"), 2) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            both = pool.map(lambda rank: sockets.open_sockets(stores[rank], rank, 2, kernels, timeout=10.0), (0, 1))
            for collective in both:
                collective.close()
        assert len(seen) == 2 and set(seen) <= {b"cubic", b"reno"}
        with plain() as other:  # one that does not pace is left as it is
            other.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
            sockets.without_pacing(other)
            assert control(other) == b"reno"

    def test_a_rank_that_does_not_call_is_named(self, tmp_path: Path, kernels: Any) -> None:
        from weft.weave.sockets import open_sockets

        store = dist.FileStore(str(tmp_path / "store"), 3)
        with pytest.raises(DeviceError, match=r"rank 0 cannot join .*: rank 1 did not call within 0\.1 s"):
            open_sockets(store, 0, 3, kernels, timeout=0.1)

    def test_an_address_that_is_not_here(self, tmp_path: Path, kernels: Any) -> None:
        from weft.weave.sockets import open_sockets

        with pytest.raises(DeviceError, match=r"from 192\.0\.2\.1"):
            open_sockets(dist.FileStore(str(tmp_path / "store"), 2), 0, 2, kernels, bind="192.0.2.1", timeout=0.1)


def test_more_than_the_capacity_is_refused_before_it_is_sent(kernels: Any) -> None:
    """Gloo would end the process of the rank that it is sent to."""
    from weft.weave.distributed import DistributedCollective
    from weft.weave.messages import Messages

    collective = DistributedCollective(Messages(None, 0, 2, 1.0), rows.plain(kernels.rms_norm), capacity=1024)
    with pytest.raises(ValueError, match="1280 bytes for one rank are more than the capacity of 1024"):
        collective.start(Join(torch.zeros(9, 64), torch.zeros(4, 64), torch.ones(64), 1e-5, (0, 4, 9)))


def test_a_communication_thread_stays_on_its_cores(kernels: Any) -> None:
    core = max(os.sched_getaffinity(0))
    seen: list[set[int]] = []

    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        seen.append(os.sched_getaffinity(0))
        return kernels.rms_norm(x, weight, eps)

    background = Background(Alone(rows.plain(norm)), (core,))
    background.finish(background.start(Join(*torch.zeros(2, 2, 8), torch.ones(8), 1e-5, (0, 2))))
    background.close()
    assert seen == [{core}]


@pytest.fixture
def lonely(kernels: Any) -> Iterator[Any]:
    """A group of one rank, with a communication thread in C++ on the last core."""
    if available() == (REFERENCE,):
        pytest.skip("the C++ extension is not built")
    from weft import _native
    from weft.weave.native import NativeBackground, NativeCollective

    collective = NativeBackground(
        NativeCollective(_native.Links(0, [-1], 1.0), kernels), (max(os.sched_getaffinity(0)),)
    )
    yield collective
    collective.close()


def test_distant_seams_take_longer_and_are_the_same_otherwise(kernels: Any) -> None:
    if available() == (REFERENCE,):
        pytest.skip("the C++ extension is not built")
    from weft import _native
    from weft.weave.native import NativeBackground, NativeCollective

    distant = _native.DistantSeams(_native.Links(0, [-1], 1.0))
    collective = NativeBackground(NativeCollective(distant, kernels))
    x, weight = torch.randn(3, 8), torch.ones(8)
    found, took = [], []
    for seconds in (0.0, 0.2):
        distant.seconds = seconds
        begun = time.monotonic()
        pending = collective.start(Join(x, torch.zeros(3, 8), weight, 1e-5, (0, 3)))
        started = time.monotonic() - begun
        found.append(collective.finish(pending).hidden)
        took.append((started, time.monotonic() - begun))
    collective.close()
    assert took[1][0] < 0.2 <= took[1][1], "who starts a seam does not wait"
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], torch.nn.functional.rms_norm(x, (8,), weight, 1e-5), atol=1e-5)


def test_a_communication_thread_in_cpp_stays_on_its_cores(lonely: Any) -> None:
    names = {int(task.name): (task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    (thread,) = (task for task, name in names.items() if name == "weft-seams-0")
    assert os.sched_getaffinity(thread) == {max(os.sched_getaffinity(0))}
    lonely.close()
    assert not Path(f"/proc/self/task/{thread}").exists()


def test_seams_are_finished_in_the_order_in_which_they_were_started(lonely: Any) -> None:
    parts = [torch.full((2, 8), float(each)) for each in range(1, 4)]
    joins = [Join(part, torch.zeros(2, 8), torch.ones(8), 1e-5, (0, 2)) for part in parts]
    first, second, third = (lonely.start(join) for join in joins)
    with pytest.raises(ValueError, match="in the order"):
        lonely.finish(second)
    with pytest.raises(ValueError, match="a seam is in flight"):
        lonely.gather(torch.zeros(1))
    assert [lonely.finish(each).residual[0, 0].item() for each in (first, second, third)] == [1, 2, 3]
    with pytest.raises(ValueError, match="in the order"):
        lonely.finish(third)
    assert lonely.gather(torch.ones(2))[0].tolist() == [1, 1]
    lonely.close()
    with pytest.raises(RankLost, match="rank 0 has left its group"):
        lonely.start(joins[0])


def test_a_core_that_is_not_there_is_refused(kernels: Any) -> None:
    if available() == (REFERENCE,):
        pytest.skip("the C++ extension is not built")
    from weft import _native
    from weft.weave.native import NativeBackground, NativeCollective

    with pytest.raises(ValueError, match="core 1000"):
        NativeBackground(NativeCollective(_native.Links(0, [-1], 1.0), kernels), (1000,))
