"""Parts of a GPU's SMs, against a stand-in for the driver (conftest.py)."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import pytest

from weft.core.plan import Lane
from weft.devices.cuda_green import GreenSms, load_driver
from weft.devices.cuda_streams import SharedStream
from weft.errors import DeviceError

SMS, UNIT = 132, 8


def sms(driver: Any, stream: int) -> set[int]:
    first, count = ctypes.c_uint(), ctypes.c_uint()
    driver.sms_of(ctypes.c_void_p(stream), ctypes.byref(first), ctypes.byref(count))
    return set(range(first.value, first.value + count.value))


def test_shares_that_fit_beside_each_other_have_no_sm_in_common(driver: Any) -> None:
    green = GreenSms(0, driver, (9, 0))
    assert (green.sms, green.unit, green.units) == (SMS, UNIT, 16)
    parts = {
        (lane, share): sms(driver, green.stream(lane, share))
        for lane in (Lane.PREFILL, Lane.DECODE)
        for share in range(1, 17)
    }
    for (lane, share), part in parts.items():
        assert len(part) == green.count(lane, share) >= UNIT * share
        assert len(part) < UNIT * (share + 1)
    for share in range(1, 16):
        prefill, decode = parts[Lane.PREFILL, share], parts[Lane.DECODE, 16 - share]
        assert prefill.isdisjoint(decode) and len(prefill | decode) == SMS, "nothing lies idle"
        assert parts[Lane.PREFILL, share] < parts[Lane.PREFILL, share + 1]
        assert not parts[Lane.PREFILL, share + 1].isdisjoint(decode), "shares of more than the whole overlap"
    assert parts[Lane.PREFILL, 16] == parts[Lane.DECODE, 16] == set(range(SMS))


@pytest.mark.parametrize(("groups", "units"), [(16, 16), (15, 16), (14, 15), (9, 10)])
def test_there_are_no_more_units_than_the_driver_can_make(driver: Any, groups: int, units: int) -> None:
    """What is left when all groups are taken is the decode lane's."""
    driver.set_groups(groups)
    try:
        green = GreenSms(0, driver, (9, 0))
        assert green.units == units
        for share in range(1, units):
            prefill = sms(driver, green.stream(Lane.PREFILL, share))
            decode = sms(driver, green.stream(Lane.DECODE, units - share))
            assert len(prefill) == UNIT * share and len(prefill | decode) == SMS and prefill.isdisjoint(decode)
    finally:
        driver.set_groups(16)


def test_a_cut_that_the_driver_refuses_is_found_at_the_start(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GreenSms, "_groups", lambda _self: 16)
    driver.set_groups(12)
    try:
        with pytest.raises(DeviceError, match="cuDevSmResourceSplitByCount failed"):
            GreenSms(0, driver, (9, 0))
    finally:
        driver.set_groups(16)


def test_what_the_driver_refuses_is_an_error_with_its_name(driver: Any) -> None:
    with pytest.raises(DeviceError, match=r"cuDeviceGetDevResource failed: CUDA_ERROR_INVALID_DEVICE \(101\)"):
        GreenSms(3, driver, (9, 0))
    green = GreenSms(0, driver, (9, 0))
    for share in (0, 17):
        with pytest.raises(DeviceError, match=f"a share of {share} units of SMs; there are 16"):
            green.stream(Lane.DECODE, share)


def test_a_driver_without_green_contexts_is_told_from_one_with(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        cuDeviceGetDevResource = None

    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Old())
    with pytest.raises(DeviceError, match="no green contexts"):
        load_driver()


class Told:
    """A stream that writes down what it is told."""

    def __init__(self, share: int, log: list[Any]) -> None:
        self.share, self.log = share, log

    def mark(self) -> int:
        return self.share

    def follow(self, event: int) -> None:
        self.log.append(("follow", self.share, event))

    def capture(self, work: Any) -> Any:
        self.log.append(("capture", self.share))
        return lambda: self.log.append(("replay", self.share))


def test_a_graph_is_recorded_once_for_each_share_it_is_replayed_on() -> None:
    log: list[Any] = []
    stream = SharedStream(lambda share: Told(share, log), 2)  # type: ignore[arg-type, return-value]
    replay = stream.capture(lambda: None)
    for share in (2, 5, 5, 2, 5):
        stream.move(share)
        replay()
    told = [("capture", 2), ("replay", 2), ("follow", 5, 2), ("capture", 5), ("replay", 5), ("replay", 5)]
    assert log == [*told, ("follow", 2, 5), ("replay", 2), ("follow", 5, 2), ("replay", 5)]


def test_a_stream_says_what_moves_took_with_what_they_had_recorded_anew() -> None:
    class Slow(Told):
        def __init__(self, share: int) -> None:
            super().__init__(share, [])
            time.sleep(0.02)

        def capture(self, work: Any) -> Any:
            time.sleep(0.02)
            return super().capture(work)

    stream = SharedStream(Slow, 2)  # type: ignore[arg-type, return-value]
    replay = stream.capture(lambda: None)
    assert stream.moved() == 0.0, "what a first share takes is no move"
    stream.move(5)
    assert stream.moved() >= 0.02
    replay()
    assert stream.moved() >= 0.02
    replay()
    stream.move(5)
    assert stream.moved() == 0.0


def test_a_share_that_cannot_be_had_changes_nothing() -> None:
    def make(share: int) -> Any:
        if share > 3:
            raise DeviceError("no such share")
        return Told(share, [])

    stream = SharedStream(make, 2)
    with pytest.raises(DeviceError, match="no such share"):
        stream.move(4)
    assert stream.mark() == 2
