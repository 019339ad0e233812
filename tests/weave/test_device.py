"""Collectives of devices over gloo, ranks as threads: against those of one process, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed
from tests.weave.local import Threads

from weft.errors import RankLost
from weft.kernels.reference import ReferenceKernels
from weft.weave.choice import Mode
from weft.weave.collective import Collective, Join, Joined
from weft.weave.device import DeviceCollective, open_group
from weft.weave.late import Late
from weft.weave.rows import plain
from weft.weave.streams import SideStream

EPS, SIZE = 1e-5, 24
CPU = torch.device("cpu")
KERNELS = ReferenceKernels((0,))
JOIN = plain(KERNELS.rms_norm)
Run = Callable[[Collective], Any]


def join_parts(
    parts: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return JOIN(list(parts), residual, weight, eps, None)


@contextmanager
def group(ranks: int, mode: Mode, *, timeout: float = 20.0) -> Iterator[list[DeviceCollective]]:
    store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]

    def one(rank: int) -> DeviceCollective:
        joined = open_group(store, rank, ranks, device=CPU, timeout=timeout)
        return DeviceCollective(joined, rank, ranks, join_parts, mode, explain=lambda: "somebody is late")

    with ThreadPoolExecutor(ranks) as pool:
        made = list(pool.map(one, range(ranks)))
    try:
        yield made
    finally:
        for collective in made:
            collective.close()


def on_all(collectives: list[Any], run: Run) -> list[Any]:
    with ThreadPoolExecutor(len(collectives)) as pool:
        return list(pool.map(run, collectives))


def inputs(seed: int, bounds: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(bounds[-1], SIZE, generator=chance).to(dtype)


def seams(bounds: tuple[int, ...], dtype: torch.dtype) -> Run:
    """One after the other; hidden rows and the residual of the rows that a rank keeps."""
    weight = (1 + torch.randn(SIZE, generator=torch.Generator().manual_seed(99)) / 8).to(dtype)

    def run(collective: Collective) -> list[torch.Tensor]:
        residual, found = inputs(77, bounds, dtype)[slice(*collective.owned(bounds))].clone(), []
        for seam in range(2):
            partial = inputs(10 * seam + collective.rank, bounds, dtype)
            join = Join(partial, residual, weight, EPS, bounds)
            joined: Joined = collective.finish(collective.start(join))
            residual = joined.residual
            found += [joined.hidden.clone(), residual.clone()]
        return found

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bounds", [(0, 4, 8), (0, 3, 4), (0, 0, 3), (0, 2, 4, 6), (0, 1, 1, 5)])
@pytest.mark.parametrize("mode", [Mode.FUSED, Mode.ONE_SHOT, Mode.PLAIN])
def test_seams_are_those_of_one_process(mode: Mode, bounds: tuple[int, ...], dtype: torch.dtype) -> None:
    ranks = len(bounds) - 1
    truth = on_all(Threads(ranks, JOIN).collectives(), seams(bounds, dtype))
    with group(ranks, mode) as collectives:
        found = on_all([SideStream(one, CPU) for one in collectives], seams(bounds, dtype))
        assert on_all(collectives, lambda one: one.owned(bounds)) == [
            (bounds[rank], bounds[rank + 1]) if mode is Mode.FUSED else (0, bounds[-1]) for rank in range(ranks)
        ]
    exact = mode is not Mode.PLAIN or (dtype is torch.float32 and ranks == 2)  # its own order, and it rounds the sum
    for rank, values in enumerate(found):
        for which, value in enumerate(values):
            assert torch.equal(value, found[0][which]) or (which % 2 and mode is Mode.FUSED), "ranks differ"
            first, end = (0, bounds[-1]) if mode is Mode.FUSED else (bounds[rank], bounds[rank + 1])
            expected = truth[rank][which]
            value = value if which % 2 == 0 or mode is Mode.FUSED else value[first:end]
            if exact:
                assert torch.equal(value, expected)
            else:
                far = 1e-2 if dtype is torch.float32 else 0.1  # each of two sums is rounded once for each rank
                torch.testing.assert_close(value, expected, rtol=4 * torch.finfo(dtype).eps, atol=far)


def test_tensors_of_all_ranks_in_their_order() -> None:
    with group(3, Mode.PLAIN) as collectives:
        for parts in on_all(collectives, lambda one: one.gather(torch.full((2, 3), float(one.rank)))):
            assert [part[0, 0].item() for part in parts] == [0.0, 1.0, 2.0] and parts[0].shape == (2, 3)


def test_a_rank_that_does_not_come_is_explained() -> None:
    with group(2, Mode.FUSED, timeout=0.3) as collectives:
        with pytest.raises(RankLost, match=r"somebody is late \(.*"):
            collectives[0].gather(torch.zeros(1, 1))
        with pytest.raises(RankLost, match="rank 0 has left"):
            collectives[0].gather(torch.zeros(1, 1))


def test_what_cannot_be_joined_is_refused() -> None:
    with group(2, Mode.FUSED) as (first, _):
        with pytest.raises(ValueError, match="bounds are"):
            first.start(Join(*torch.zeros(2, 2, SIZE), torch.ones(SIZE), EPS, (0, 2)))
        with pytest.raises(ValueError, match="on a stream of its own"):
            DeviceCollective(None, 0, 2, join_parts, Mode.WOVEN, explain=str)


class Store:
    """One that holds what it was told; silent: nobody answers."""

    def __init__(self, *keys: str, silent: bool = False) -> None:
        self.keys = set(keys)
        self.silent = silent

    def set(self, key: str, _value: str) -> None:
        self.keys.add(key)

    def wait(self, keys: list[str], _timeout: timedelta) -> None:
        if self.silent or not self.keys.issuperset(keys):
            raise RuntimeError("timed out")


class Event:
    """Reached after so many looks."""

    def __init__(self, looks: int = 10**9) -> None:
        self.looks = looks

    def reached(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        assert self.looks < 0


@pytest.mark.parametrize(
    ("store", "words"),
    [
        (Store(), "rank 0 and 2 did not come"),
        (Store("rank 2 waits"), "rank 0 did not come"),
        (Store("rank 0 waits", "rank 2 waits"), "another rank did not come"),
        (Store(silent=True), "rank 0 did not come"),
    ],
)
def test_who_is_late_is_who_does_not_say_that_he_waits(store: Store, words: str) -> None:
    Late(store, 1, 3, 60.0).wait(Event(3), lambda: 0)
    assert "rank 1 waits" not in store.keys
    with pytest.raises(RankLost, match=f"^{words} within 0.01 s"):
        Late(store, 1, 3, 0.01).wait(Event(), lambda: 0)


def test_a_kernel_says_whom_it_has_missed() -> None:
    with pytest.raises(RankLost, match="rank 2 did not come within 5 s"):
        Late(Store(), 0, 3, 5.0).wait(Event(1), lambda: 3)
