"""Where a rank's seams are carried out, and whether who waits for others keeps a core busy: a device of one rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from weft.config import EngineConfig
from weft.core.plan import Lane, Partition, Plan, Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices.cores import share_cores, usable_cores
from weft.devices.cpu import CpuDevice, open_cpu
from weft.devices.group import Group, may_spin
from weft.errors import DeviceError
from weft.kernels import LEVELS, available
from weft.weave.choice import Mode

pytestmark = [
    pytest.mark.skipif(available()[0] not in LEVELS, reason="the C++ extension is not built"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two lanes need two cores"),
]
BUILTIN = Path(__file__).resolve().parents[2] / "src" / "weft" / "assets" / "builtin"
GREEDY = SamplingParams(temperature=0.0)
Open = Callable[..., CpuDevice]


def test_who_waits_for_ranks_keeps_no_core_busy_that_others_want() -> None:
    spinning = {
        (mode, crowded, shared)
        for mode in Mode
        for crowded in (False, True)
        for shared in (False, True)
        if may_spin(mode, crowded=crowded, shared=shared)
    }
    assert spinning == {(mode, False, False) for mode in (Mode.PLAIN, Mode.ONE_SHOT, Mode.FUSED)}


def test_lanes_share_cores_where_they_overlap() -> None:
    assert share_cores((0, 1), [(1, 2)]) and share_cores((0, 1), [(5,), (1, 0)])
    assert not share_cores((0, 1), [(2, 3)]) and not share_cores((0, 1), [])


@pytest.fixture
def open_one() -> Iterator[Open]:
    """A device that is the only rank of its group, on two cores."""
    from weft.ipc.ranks import new_name

    opened: list[CpuDevice] = []

    def opener(weave: str, partition: str, *, crowded: bool = False) -> CpuDevice:
        config = EngineConfig(
            weave=weave,
            collective="shm",
            partition=partition,
            cores=",".join(map(str, usable_cores(None)[:2])),
            num_blocks=8,
            max_num_seqs=2,
            max_num_batched_tokens=32,
        )
        group = Group(0, 1, 1, new_name(), "", None, "", 5.0, crowded, lambda blocks: blocks)
        opened.append(open_cpu(config, BUILTIN, lambda _phase: None, group))
        return opened[-1]

    yield opener
    for device in opened:
        device.close()


@pytest.fixture
def spins(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """The seconds that a group of shared memory was told to look before it sleeps, one after the other, by lane and
    mode."""
    from weft import _native
    from weft.weave import shm

    told: dict[str, list[float]] = {}
    make: Any = _native.SeamGroup

    class Watched(make):  # type: ignore[misc]
        def __init__(self, path: str, *arguments: Any) -> None:
            super().__init__(path, *arguments)
            self.told = told.setdefault("-".join(path.split("-")[2:]), [])
            self.told.append(make.spin.__get__(self))

        @property
        def spin(self) -> float:
            return self.told[-1]

        @spin.setter
        def spin(self, seconds: float) -> None:
            make.spin.__set__(self, seconds)
            self.told.append(make.spin.__get__(self))

    monkeypatch.setattr(shm._native, "SeamGroup", Watched)
    return told


def step(device: CpuDevice, lane: Lane, number: int) -> None:
    prompt = tuple(range(1, 9))
    block = (int(lane is Lane.DECODE),)
    device.submit(Plan(number, lane, (Slice(number, 0, prompt, block, Sampling(GREEDY, 0, len(prompt))),)))
    (result,) = device.poll(20.0)
    assert result.error is None


def seam_threads() -> list[set[int]]:
    """The cores of each communication thread."""
    return [
        os.sched_getaffinity(int(task.name))
        for task in Path("/proc/self/task").iterdir()
        if (task / "comm").read_text().startswith("weft-seams")
    ]


@pytest.mark.parametrize(
    ("weave", "partition", "crowded", "modes"),
    [
        ("fused", "off", False, {"mixed-fused": True}),
        ("fused", "off", True, {"mixed-fused": False}),
        ("woven", "off", False, {"mixed-woven": False}),
        ("auto", "off", False, {"mixed-fused": True, "mixed-woven": False}),
        ("fused", "50%:50%", False, {"prefill-fused": True, "decode-fused": True}),
        ("fused", "100%:100%", False, {"prefill-fused": False, "decode-fused": False}),
    ],
)
def test_what_a_rank_begins_with(
    open_one: Open, spins: dict[str, list[float]], weave: str, partition: str, crowded: bool, modes: dict[str, bool]
) -> None:
    from weft.weave.shm import SPIN

    open_one(weave, partition, crowded=crowded)
    assert spins == {name: [SPIN if spinning else 0.0] for name, spinning in modes.items()}


def test_a_lane_spins_no_more_once_the_other_has_its_cores(open_one: Open, spins: dict[str, list[float]]) -> None:
    """Also a lane whose own cores stay what they are."""
    from weft.weave.shm import SPIN

    device, number = open_one("fused", "50%:50%"), 0
    for partition, seconds in ((Partition(1, 1), SPIN), (Partition(2, 1), 0.0), (Partition(1, 1), SPIN)):
        device.set_partition(partition)
        for lane in Lane.PREFILL, Lane.DECODE:
            number += 1
            step(device, lane, number)
            assert spins[f"{lane.value}-fused"][-1] == seconds


@pytest.mark.parametrize("partition", ["off", "50%:50%"])
def test_woven_seams_always_sleep(open_one: Open, spins: dict[str, list[float]], partition: str) -> None:
    device = open_one("woven", partition)
    for number, lane in enumerate(device.lanes(), 1):
        step(device, lane, number)
        assert set(spins[f"{lane.value}-woven"]) == {0.0}


def test_the_thread_of_the_seams_goes_with_its_lane(open_one: Open) -> None:
    first, last = usable_cores(None)[:2]
    device = open_one("woven", "50%:50%")
    step(device, Lane.PREFILL, 1)
    step(device, Lane.DECODE, 2)
    assert sorted(map(min, seam_threads())) == [first, last]
    device.set_partition(Partition(2, 1))
    assert sorted(map(min, seam_threads())) == [first, last], "a share is adopted with a step"
    step(device, Lane.PREFILL, 3)
    assert seam_threads() == [{last}] * 2
    device.set_partition(Partition(1, 2))
    step(device, Lane.PREFILL, 4)
    step(device, Lane.DECODE, 5)
    assert sorted(map(min, seam_threads())) == [first, last]
    device.close()
    assert seam_threads() == []


def test_a_thread_of_seams_cannot_be_put_on_any_core() -> None:
    from tests.weave.local import Alone

    from weft import _native
    from weft.kernels.cpu import CpuKernels
    from weft.weave.background import Background
    from weft.weave.native import NativeBackground, NativeCollective
    from weft.weave.rows import plain

    core = usable_cores(None)[-1]
    kernels = CpuKernels(available()[0], (core,))
    native = NativeBackground(NativeCollective(_native.Links(0, [-1], 1.0), kernels))
    for background in native, Background(Alone(plain(kernels.rms_norm))):
        background.move((core,))
        with pytest.raises(DeviceError, match=r"cores \(1000,\)"):
            background.move((1000,))
        background.close()
    with pytest.raises(DeviceError, match="has ended"):
        native.move((core,))
    kernels.close()
