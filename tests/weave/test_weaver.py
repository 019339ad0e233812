"""The weaver by itself: whose turn it is, one seam in flight, and what happens when a stage or a seam fails."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch

from weft.errors import RankLost
from weft.kernels.base import Batch
from weft.weave.background import Background
from weft.weave.collective import Collective, Join, Joined
from weft.weave.seam import Joined as Sent
from weft.weave.seam import Seam, Shared, Strand, onward
from weft.weave.weaver import Weaver


class Counting:
    """A group of one that counts what is in flight. broken: the seam at which it fails."""

    rank, ranks = 0, 1

    def __init__(self, broken: int = -1) -> None:
        self.flying = 0
        self.begun = 0
        self.broken = broken

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return bounds[0], bounds[1]

    def start(self, join: Join) -> Join:
        self.flying += 1
        self.begun += 1
        assert self.flying == 1
        return join

    def finish(self, pending: Join) -> Joined:
        self.flying -= 1
        if self.begun == self.broken:
            raise RankLost("rank 1 has left")
        return Joined(pending.partial, pending.partial)

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [rows]

    def close(self) -> None:
        pass


def begin(seam: Seam) -> Sent:
    return seam.partial, seam.partial


def strand(name: str, stages: int, seen: list[str], fails: int = -1) -> Strand:
    residual: torch.Tensor | None = None
    for stage in range(stages):
        seen.append(f"{name}{stage}")
        if stage == fails:
            raise ZeroDivisionError(name)
        _, residual = yield Seam(torch.ones(2, 4), residual, torch.ones(4), 0.0)
    return torch.full((1,), float(stages))


def test_strands_take_turns_and_the_first_is_a_stage_ahead() -> None:
    """Nobody waits at a first seam, so that a stage goes on after it."""
    seen: list[str] = []
    group: Collective = Counting()
    values = Weaver(group, begin).weave([strand("a", 3, seen), strand("b", 3, seen)])
    assert seen == ["a0", "a1", "b0", "b1", "a2", "b2"] and [int(value) for value in values] == [3, 3]
    assert [int(value) for value in Weaver(group, begin).weave([strand("a", 2, seen)])] == [2]


class Held(Counting):
    """No seam ends before the third has been asked for."""

    def __init__(self, asked: threading.Event) -> None:
        super().__init__()
        self.asked = asked

    def finish(self, pending: Join) -> Joined:
        assert self.asked.wait(10)
        return super().finish(pending)


def test_seams_wait_for_one_another_in_a_communication_thread() -> None:
    """Three strands: the first seam may be on its way until its strand wants to go on. One at a time is carried out."""
    seen: list[str] = []
    asked = threading.Event()

    def begins() -> Strand:
        asked.set()
        return (yield from strand("c", 3, seen))

    background = Background(Held(asked))
    try:
        values = Weaver(background, begin).weave([strand("a", 3, seen), strand("b", 3, seen), begins()])
    finally:
        background.close()
    assert seen == ["a0", "a1", "b0", "b1", "c0", "c1", "a2", "b2", "c2"]
    assert [int(value) for value in values] == [3, 3, 3]


def test_a_stage_that_fails_waits_for_all_seams_in_flight() -> None:
    group, seen = Counting(), list[str]()
    background = Background(group)
    try:
        with pytest.raises(ZeroDivisionError, match="c"):
            Weaver(background, begin).weave([strand(each, 3, seen, 0 if each == "c" else -1) for each in "abc"])
        assert group.begun == 2 and group.flying == 0
    finally:
        background.close()


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_stage_that_fails_leaves_no_seam_in_flight(name: str) -> None:
    group, seen = Counting(), list[str]()
    with pytest.raises(ZeroDivisionError, match=name):
        Weaver(group, begin).weave([strand(each, 3, seen, 2 if each == name else -1) for each in "ab"])
    assert group.begun > 1
    assert group.flying == 0


def test_a_seam_that_fails_ends_the_step() -> None:
    group = Counting(broken=3)
    with pytest.raises(RankLost, match="rank 1 has left"):
        Weaver(group, begin).weave([strand("a", 3, []), strand("b", 3, [])])
    assert group.flying == 0


def test_kept_rows_must_be_in_order() -> None:
    batch = Batch(*[torch.empty(0)] * 6, block_size=16, kept=torch.tensor([1, 0]))

    def backwards() -> Strand:
        _, residual = yield Seam(torch.ones(2, 4), None, torch.ones(4), 0.0)
        hidden, _ = yield Seam(torch.ones(2, 4), residual, torch.ones(4), 0.0, kept=batch)
        return hidden

    with pytest.raises(ValueError, match="ascending"):
        Weaver(Counting(), begin).weave([backwards()])


class Second(Counting):
    """Rank 1 of two, which keeps the joins."""

    rank, ranks = 1, 2

    def __init__(self) -> None:
        super().__init__()
        self.joins: list[Join] = []

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return bounds[1], bounds[2]

    def start(self, join: Join) -> Join:
        self.joins.append(join)
        return super().start(join)

    def finish(self, pending: Join) -> Joined:
        self.flying -= 1
        first, end = self.owned(pending.bounds)
        return Joined(pending.partial, pending.partial[first:end].contiguous())


@pytest.mark.parametrize("all_rows", [False, True])
def test_nothing_is_exchanged_at_a_first_seam(all_rows: bool) -> None:
    """A rank normalises all rows itself, as one rank does, for the linear that reads them. It keeps its own rows, or
    all where every rank does: in memory of their own, since they are updated in place. Nobody keeps the others'."""
    made: list[weakref.ref[torch.Tensor]] = []

    class Keeping(Second):
        def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
            return (0, bounds[-1]) if all_rows else super().owned(bounds)

    def embedded() -> torch.Tensor:
        rows = torch.arange(5.0)[:, None].expand(5, 4).contiguous()
        made.append(weakref.ref(rows))
        return rows

    def norm(seam: Seam) -> Sent:
        assert (seam.reader, seam.eps) == ("the first linear", 0.5)
        return seam.partial + 100, seam.partial

    def one_layer() -> Strand:
        hidden, residual = yield Seam(embedded(), None, torch.ones(4), 0.5, reader="the first linear")
        assert made[-1]() is None
        assert torch.equal(hidden[:, 0], torch.arange(100.0, 105.0))
        for _ in range(2):
            _, residual = yield Seam(torch.zeros(5, 4), residual, torch.ones(4), 0.5)
        return hidden

    group = Keeping()
    Weaver(group, norm).weave([one_layer(), one_layer()])
    assert [join.bounds for join in group.joins] == [(0, 2, 5)] * 4, "two of each strand"
    own = torch.arange(5.0)[0 if all_rows else 2 :]
    for join in group.joins[:2]:
        assert torch.equal(join.residual[:, 0], own) and join.residual.is_contiguous()
        assert join.residual.untyped_storage().nbytes() == join.residual.nbytes, "no more memory than for these"


class Unread(torch.Tensor):
    """Rows on a device that nobody should wait for."""

    def tolist(self) -> list[int]:
        raise AssertionError("somebody waits for the device")


@pytest.mark.parametrize("known", [False, True])
def test_kept_rows_stay_with_their_owner_and_may_be_known(known: bool) -> None:
    kept = torch.tensor([1, 3])
    if known:
        kept = kept.as_subclass(Unread)
    batch = Batch(*[torch.empty(0)] * 6, block_size=16, kept=kept)

    def two_of_four() -> Strand:
        rows = torch.arange(4.0)[:, None].expand(4, 4).contiguous()
        _, residual = yield Seam(rows, None, torch.ones(4), 0.0)
        hidden, _ = yield Seam(rows[[1, 3]], residual, torch.ones(4), 0.0, kept=batch)
        return hidden

    group = Second()
    Weaver(group, begin).weave([two_of_four()], [[1, 3]] if known else None)
    last = group.joins[-1]
    assert last.bounds == (0, 1, 2) and last.residual is not None
    assert torch.equal(last.residual.as_subclass(torch.Tensor), torch.full((1, 4), 3.0))


def mixing(name: str, rows: int, seen: list[str], group: Counting) -> Strand:
    """Two layers: a stage of its own, then an operator that can be shared, which takes the number of its rows."""

    def operator(all_rows: torch.Tensor) -> torch.Tensor:
        seen.append(f"{len(all_rows)} rows, {group.flying} in flight")
        return all_rows * 2

    hidden, residual = yield Seam(torch.full((rows, 4), float(ord(name))), None, torch.ones(4), 0.0)
    for layer in range(2):
        seen.append(f"{name}{layer}")
        hidden, residual = yield Seam(hidden + 1, residual, torch.ones(4), 0.0)
        partial = yield Shared(hidden, operator)
        hidden, residual = yield Seam(partial, residual, torch.ones(4), 0.0)
    return hidden


def test_strands_rejoin_where_an_operator_is_shared() -> None:
    """It is computed once for all rows, when all seams before it have come, and each strand gets its own rows back."""
    values = {}
    for rejoin in (False, True):
        group, seen = Counting(), list[str]()
        strands = [mixing("a", 2, seen, group), mixing("b", 3, seen, group), mixing("c", 0, seen, group)]
        values[rejoin] = Weaver(group, begin, rejoin=rejoin).weave(strands)
        if rejoin:
            assert seen == ["a0", "b0", "c0", "5 rows, 0 in flight", "a1", "b1", "c1", "5 rows, 0 in flight"]
        else:
            assert [each.split(",")[0] for each in seen if "rows" in each] == ["2 rows", "3 rows", "0 rows"] * 2
    assert [len(value) for value in values[True]] == [2, 3, 0]
    assert all(torch.equal(*pair) for pair in zip(values[False], values[True], strict=True))
    assert values[True][1][0, 0] == 2 * (2 * (ord("b") + 1) + 1)


def test_a_strand_alone_computes_what_it_could_share() -> None:
    seen: list[str] = []
    strand = mixing("a", 2, seen, Counting())
    seam = onward(strand)
    with pytest.raises(StopIteration) as end:
        while True:
            seam = onward(strand, (seam.partial, seam.partial))
    alone = Weaver(Counting(), begin, rejoin=True).weave([mixing("a", 2, [], Counting())])
    assert torch.equal(end.value.value, alone[0]) and seen[1] == "2 rows, 0 in flight"


def test_an_operator_that_fails_leaves_no_seam_in_flight() -> None:
    group = Counting()
    background = Background(group)

    def fails(_rows: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("experts")

    def strand_of_it() -> Strand:
        hidden, residual = yield Seam(torch.ones(2, 4), None, torch.ones(4), 0.0)
        hidden, _ = yield Seam(hidden, residual, torch.ones(4), 0.0)
        return (yield Shared(hidden, fails))

    try:
        for rejoin in (False, True):
            with pytest.raises(ZeroDivisionError, match="experts"):
                Weaver(background, begin, rejoin=rejoin).weave([strand_of_it(), strand_of_it()])
            assert group.flying == 0
    finally:
        background.close()
