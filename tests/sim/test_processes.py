"""A fleet in several processes is the fleet in one."""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.bench.stats import Record, Slo
from weft.bench.traces import Row, Size
from weft.core.plan import Plan
from weft.errors import ConfigError, DeviceError
from weft.sim.part import Part, Placed
from weft.sim.processes import Ask, Processes
from weft.sim.replica import Setup
from weft.sim.run import Transfer
from weft.sim.study import Failure, Fleet, Outcome, study

Make = Callable[..., Setup]

# Many at the same moment, and names that meet, so that every choice of a router could be another one.
loads = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.003, 0.05]),
        st.builds(
            lambda read, written, names: Size(read, written, tuple(names), 16),
            st.integers(1, 600),
            st.integers(1, 40),
            st.lists(st.integers(0, 2), max_size=4),
        ),
    ),
    min_size=1,
    max_size=40,
)


def rows_of(gaps: list[tuple[float, Size]]) -> list[Row]:
    at, rows = 0.0, []
    for gap, size in gaps:
        at += gap
        rows.append((at, size))
    return rows


def served(fleet: Fleet, rows: list[Row], processes: int) -> tuple[Outcome, list[Record]]:
    records: list[Record] = []
    outcome = study(fleet, rows, Slo(1.0, 0.1), seconds=1.0, looks=5, processes=processes, on_end=records.append)
    return outcome, records


@settings(max_examples=25, deadline=None)
@given(
    load=loads,
    router=st.sampled_from(["round-robin", "least-loaded", "prefix-aware"]),
    partition=st.sampled_from(["off", "3:1", "auto"]),
    count=st.integers(2, 5),
    processes=st.integers(2, 4),
    fails=st.none() | st.floats(0.0, 0.5),
)
def test_the_result_is_the_same(
    setup: Make,
    load: list[tuple[float, Size]],
    router: str,
    partition: str,
    count: int,
    processes: int,
    fails: float | None,
) -> None:
    failures = () if fails is None else (Failure(fails, count - 1, 0.2),)
    made = setup(partition=partition, blocks=40, max_num_seqs=4, max_num_queued_reqs=6)
    fleet = Fleet(made, count, router, failures)
    one, ours = served(fleet, rows_of(load), 1)
    several, theirs = served(fleet, rows_of(load), processes)
    assert theirs == ours and len(ours) == len(load)
    for name in ("steps", "step_tokens", "preemptions", "cached", "switches", "retried"):
        assert getattr(several, name) == getattr(one, name), name
    assert several.timeline.running == one.timeline.running and several.timeline.kv == one.timeline.kv
    assert several.totals.ttft == pytest.approx(one.totals.ttft, nan_ok=True)


@pytest.mark.parametrize(("partition", "often"), [("off", False), ("3:1", True)])
def test_nobody_is_asked_before_a_step_that_has_not_begun_could_have_ended(
    setup: Make, monkeypatch: pytest.MonkeyPatch, partition: str, often: bool
) -> None:
    asked: list[float] = []
    ask = Processes._ask

    def counted(self: Processes, limit: float) -> None:
        asked.append(limit)
        ask(self, limit)

    monkeypatch.setattr(Processes, "_ask", counted)
    made = setup(partition=partition)
    rows = [(0.0005 * number, Size(20, 12)) for number in range(400)]
    study(Fleet(made, 6, "least-loaded"), rows, Slo(1.0, 0.1), processes=2)
    times = [one for one in asked if 0 < one < math.inf]
    if often:
        assert made.least == 0.0 and len(times) >= len(rows) - 1
    else:
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert min(gaps) >= made.least >= 0.004 and len(times) < len(rows) / 5


class Broken(NamedTuple):
    """A cost that is less with more tokens."""

    def seconds(self, plan: Plan, share: float = 1.0, rival: float = 0.0) -> float:
        del share, rival
        return 0.1 if plan.tokens == 1 else 0.001


def test_what_ends_and_was_not_foretold_is_not_passed_over(setup: Make) -> None:
    rows = [(0.0004 * number, Size(20, 1)) for number in range(50)]
    with pytest.raises(DeviceError, match="was not foretold: a bug of the simulator"):
        served(Fleet(setup(cost=Broken()), 2), rows, 2)


def test_a_step_that_has_ended_before_anybody_asked_is_not_foretold(setup: Make) -> None:
    part = Part({0: setup()})
    part.place(Placed(0, 0.0, 5, Size(20, 1), 1))
    assert [one.number for one in part.advance(1.0)] == [5]
    assert part.foretell(math.inf) == []
    part.place(Placed(0, 1.0, 6, Size(20, 1), 1))
    assert [one.number for one in part.advance(2.0)] == [6]


def test_what_was_foretold_and_does_not_end_is_not_passed_over(setup: Make) -> None:
    part = Part({0: setup()})
    part.place(Placed(0, 0.0, 5, Size(20, 1), 1))
    (ended,) = part.foretell(math.inf)
    assert (ended.number, ended.at, ended.first, ended.tokens) == (5, part.next_end, part.next_end, 1)
    part.replicas[0].engine.abort("5")
    with pytest.raises(DeviceError, match=r"replica 0 was to end .*number=5.* a bug of the simulator"):
        part.advance(math.inf)


def test_what_was_foretold_of_a_replica_that_fails_does_not_end(setup: Make) -> None:
    with closing(Processes([setup()] * 2, 2)) as replicas:
        for number in range(2):
            replicas.place(Placed(number, 0.0, number, Size(20, 1), 1))
        assert replicas.advance(0.001) == []
        assert [one.number for one in replicas.fail([0], 0.001)] == [0]
        assert [one.number for one in replicas.advance(1.0)] == [1]


@given(tokens=st.integers(1, 700), room=st.integers(0, 3), waiting=st.integers(0, 3))
def test_what_a_replica_takes_for_certain_it_does_not_refuse(setup: Make, tokens: int, room: int, waiting: int) -> None:
    made = setup(max_num_queued_reqs=waiting + room)
    part = Part({0: made})
    for _ in range(waiting):
        part.replicas[0].scheduler.admission.enter(1)
    takes = made.takes(tokens, part.room)
    part.place(Placed(0, 0.0, 9, Size(tokens, 1), 1))
    refused = any(one.error is not None for one in part.advance(0.0))
    assert takes is (tokens < 512 and room > 0) and not (takes and refused)


def test_a_process_that_dies_ends_the_simulation(setup: Make) -> None:
    replicas = Processes([setup()] * 3, 2)
    try:
        replicas.place(Placed(0, 0.0, 1, Size(20, 30), 30))
        replicas.place(Placed(1, 0.0, 2, Size(20, 3), 3))
        assert [one.number for one in replicas.advance(math.inf)] == [2, 1]
        os.kill(replicas.pids[1], signal.SIGKILL)
        replicas.place(Placed(1, 5.0, 3, Size(20, 3), 3))
        with pytest.raises(DeviceError, match=r"process 1 of the simulation died, exit code -9"):
            replicas.advance(math.inf)
    finally:
        replicas.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in replicas.pids)


def test_a_process_whose_fleet_is_gone_ends_without_a_word(setup: Make, capfd: pytest.CaptureFixture[str]) -> None:
    replicas = Processes([setup()] * 2, 2)
    for number in range(2):
        replicas.place(Placed(number, 0.0, number, Size(20, 40_000), 200))
    for number, pipe in enumerate(replicas._pipes):
        replicas._send(number, Ask(placed=replicas._placed[number], limit=math.inf))
        pipe.close()  # as if the fleet had been killed while they compute
    for process in replicas._processes:
        process.join(10.0)
    assert [process.exitcode for process in replicas._processes] == [0, 0]
    assert capfd.readouterr().err == ""


def test_phases_on_replicas_of_their_own_stay_in_one_process(setup: Make) -> None:
    fleet = Fleet(setup(), 3, prefill=1, transfer=Transfer(1.0, 1e9))
    with pytest.raises(ConfigError, match="--prefill-replicas does not go with --processes"):
        served(fleet, [(0.0, Size(5, 5))], 2)
