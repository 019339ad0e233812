"""What a rank measures at start-up: every number by a clock that only moves where it is told to."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weft.models.measure import Place, measure
from weft.weave.choice import Costs, Curve, Mode
from weft.weave.collective import Join, Joined
from weft.weave.seam import Joined as Sent
from weft.weave.seam import Seam, Shared, Strand

SIZES = [1, 16, 50]
ATTEND, FEED, NORM, LAYERS = 3.0, 5.0, 100.0, 7  # seconds of a token, of a token, and of a rank's own norm
SEAMS = {Mode.PLAIN: 1.0, Mode.FUSED: 0.5, Mode.ONE_SHOT: 0.25}  # seconds of a token
ROW = 2.0  # seconds of a token's quantisation, where rows travel so


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class FakeDecoder:
    """Its first runs are cold: they take twice as long."""

    def __init__(self, clock: Clock, *, mixed: bool = False) -> None:
        self.config = SimpleNamespace(layers=LAYERS, vocabulary=7, experts="some" if mixed else None)
        self._clock = clock
        self._runs = 0
        self._mixed = mixed
        self.kinds: set[int] = set()

    def strand(self, batch: Any, kv: list[Any]) -> Strand:
        cold = 2 if self._runs == 0 else 1
        self._runs += 1
        self.kinds = set(batch.tokens.tolist())
        rows, weight = torch.zeros(len(batch.tokens), 4), torch.ones(4)

        def feed(given: torch.Tensor) -> torch.Tensor:
            self._clock.now += cold * FEED * len(given)
            return given

        _, residual = yield Seam(rows, None, weight, 1e-5)
        self._clock.now += cold * ATTEND * len(rows)
        _, residual = yield Seam(rows, residual, weight, 1e-5)
        rows = (yield Shared(rows, feed)) if self._mixed else feed(rows)
        yield Seam(rows, residual, weight, 1e-5, reader="the next layer's weight")
        return rows

    def join(self, seam: Seam) -> Sent:
        self._clock.now += NORM
        return seam.partial, seam.partial


class FakeCollective:
    """A group of one, whose seams take so many seconds of a token. drag: None where `finish` does all the work; else
    they go beside the caller, and both take longer by this part of the shorter one."""

    rank, ranks = 0, 1

    def __init__(self, clock: Clock, seconds: float, drag: float | None = None) -> None:
        self._clock = clock
        self._seconds = seconds
        self._drag = drag
        self.formats: list[Any] = []

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return bounds[0], bounds[1]

    def start(self, join: Join) -> tuple[float, Join]:
        self.formats.append(join.quantise)
        return self._clock.now, join

    def finish(self, pending: tuple[float, Join]) -> Joined:
        begun, join = pending
        seam = (self._seconds + (ROW if join.quantise else 0.0)) * len(join.partial)
        beside = self._clock.now - begun
        if self._drag is None:
            self._clock.now += seam
        else:
            self._clock.now = begun + max(seam, beside) + self._drag * min(seam, beside)
        return Joined(join.partial, join.partial)

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        self._clock.now += 1000.0
        return [rows]

    def close(self) -> None:
        pass


class FakeProgram:
    """Of steps up to 16 tokens."""

    def takes(self, tokens: int, rows: int) -> bool:
        return tokens <= 16 and rows == tokens

    def layers(self, slices: list[Any], rows: range) -> float:
        (piece,) = slices
        assert [*rows] == [*range(len(piece.tokens))]
        return LAYERS * (40.0 + len(rows))


def measured(
    drag: float | None = None, *, mixed: bool = False, **more: Any
) -> tuple[Costs, dict[Mode, FakeCollective]]:
    clock = Clock()
    collectives = {mode: FakeCollective(clock, seconds) for mode, seconds in SEAMS.items()}
    if drag is not None:
        collectives[Mode.WOVEN] = FakeCollective(clock, SEAMS[Mode.FUSED], drag)
    decoder: Any = FakeDecoder(clock, mixed=mixed)
    place = Place(torch.device("cpu"), lambda batch: batch, clock)
    costs = measure(decoder, [], 16, collectives, SIZES, place, **more)
    assert decoder.kinds == set(range(7)), "experts see tokens of every kind"
    return costs, collectives


def points(each: float, sizes: list[int] = SIZES, floor: float = 0.0) -> Curve:
    return Curve(tuple((tokens, floor + each * tokens) for tokens in sizes))


@pytest.mark.parametrize("mixed", [False, True])
def test_each_stage_and_the_seam_of_each_mode_have_their_own_times(mixed: bool) -> None:
    """Neither the rank's own norm nor the meeting before a seam is part of what it stands beside. Experts, which
    strands could share, are a stage like any other."""
    costs, _ = measured(mixed=mixed)
    seams = {mode: points(seconds) for mode, seconds in SEAMS.items()}
    assert costs == Costs(LAYERS, points(ATTEND), points(FEED), seams, None, mixed=mixed)


@pytest.mark.parametrize("drag", [0.0, 0.25, 1.0])
def test_the_drag_is_what_both_take_longer(drag: float) -> None:
    assert measured(drag)[0].drag == pytest.approx(drag)


def test_seams_are_measured_as_they_are_served() -> None:
    """With rows in the form of the linear that reads them, in every mode, also beside a stage."""
    asked: list[Any] = []

    def form(packed: Any) -> Any:
        asked.append(packed)
        return "its input"

    costs, collectives = measured(0.5, formats=form)
    assert set(asked) == {"the next layer's weight"}
    assert all(set(one.formats) == {"its input"} for one in collectives.values())
    assert costs.seams == {mode: points(seconds + ROW) for mode, seconds in SEAMS.items()}


def test_small_fused_steps_are_measured_as_the_program_that_they_are() -> None:
    costs, _ = measured(0.5, program=FakeProgram())
    assert costs.program == points(1.0, [1, 16], floor=40.0) and costs.drag == pytest.approx(0.5)
    assert costs.seconds(Mode.FUSED, (16,)) == LAYERS * 56.0
    assert costs.seconds(Mode.FUSED, (17,)) == pytest.approx(LAYERS * 17 * (ATTEND + FEED + 2 * SEAMS[Mode.FUSED]))
    assert costs.seconds(Mode.PLAIN, (16,)) == pytest.approx(LAYERS * 16 * (ATTEND + FEED + 2 * SEAMS[Mode.PLAIN]))
