"""What a layer and its seams cost here, measured when a rank starts, so that it can be known whether to weave.

All ranks measure at the same time, each seam together, and go by the slowest of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft.core.plan import Slice
from weft.kernels.base import Batch
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.ranked_program import RankedProgram
from weft.weave.choice import Costs, Curve, Mode, slowest
from weft.weave.collective import Collective, Join, Quantise
from weft.weave.seam import Seam, onward
from weft.weave.split import even_bounds
from weft.weave.weaver import no_format

REPEATS = 3


@dataclass(frozen=True, slots=True)
class Place:
    """Where what is measured is computed. move: a batch of the host's to there. clock: seconds, once all that was
    launched is done."""

    device: torch.device
    move: Callable[[Batch], Batch]
    clock: Callable[[], float]


HOST = Place(torch.device("cpu"), lambda batch: batch, time.perf_counter)


@dataclass(frozen=True, slots=True)
class _Stages:
    """Seconds of a layer's stages, and the seam after the second, at one number of tokens."""

    attend: float
    feed: float
    seam: Seam


@torch.inference_mode()
def measure(
    decoder: Decoder,
    kv: list[Any],
    block_size: int,
    collectives: Mapping[Mode, Collective],
    sizes: Sequence[int],
    place: Place = HOST,
    formats: Callable[[Any], Quantise | None] = no_format,
    program: RankedProgram | None = None,
) -> Costs:
    """The costs by numbers of tokens in ascending order, the same on all ranks, which must call this together.

    formats, program: those that steps will be carried out with. Overwrites keys and values in the first blocks.
    """
    meter = _Meter(decoder, kv, block_size, place, formats)
    numbers: list[float] = []
    alone = [mode for mode in collectives if mode is not Mode.WOVEN]
    for tokens in sizes:
        stages = meter.stages(tokens)
        numbers += [stages.attend, stages.feed]
        numbers += [meter.seam(collectives[mode], stages.seam) for mode in alone]
    fused, programs, drags = collectives[Mode.FUSED], [], []
    if program is not None:
        programs = [meter.program(fused, program, tokens) for tokens in sizes if program.takes(tokens, tokens)]
    if Mode.WOVEN in collectives:
        drags = [meter.drag(collectives[Mode.WOVEN], sizes[-1])]
    given = torch.tensor([numbers + programs + drags], dtype=torch.float64, device=place.device)
    everywhere = fused.gather(given)
    agreed = slowest([values[0].tolist() for values in everywhere])
    programs = agreed[len(numbers) : len(numbers) + len(programs)]
    width = len(numbers) // len(sizes)
    curves = [
        Curve(tuple((tokens, agreed[width * at + column]) for at, tokens in enumerate(sizes)))
        for column in range(width)
    ]
    attend, feed, *seams = curves
    return Costs(
        layers=decoder.config.layers,
        attend=attend,
        feed=feed,
        seams=dict(zip(alone, seams, strict=True)),
        drag=agreed[-1] if drags else None,
        program=Curve(tuple(zip(sizes, programs, strict=False))) if programs else None,
        mixed=decoder.config.experts is not None,
    )


class _Meter:
    """Times parts of a decoder's first layer, on keys and values that do not matter."""

    def __init__(
        self,
        decoder: Decoder,
        kv: list[Any],
        block_size: int,
        place: Place,
        formats: Callable[[Any], Quantise | None],
    ) -> None:
        self._decoder = decoder
        self._kv = kv
        self._block_size = block_size
        self._place = place
        self._formats = formats

    def stages(self, tokens: int) -> _Stages:
        """The best of some runs."""
        attend: list[float] = []
        feed: list[float] = []
        clock, join = self._place.clock, self._decoder.join
        for _ in range(REPEATS):
            strand = self._decoder.strand(self._batch(tokens), self._kv)
            seam = onward(strand)
            for took in (attend, feed):
                joined = join(seam)
                begun = clock()
                seam = onward(strand, joined)
                took.append(clock() - begun)
            strand.close()
        return _Stages(min(attend), min(feed), seam)

    def seam(self, collective: Collective, seam: Seam) -> float:
        """The best of some seams, each begun by all ranks together."""
        took = []
        for _ in range(REPEATS):
            join = self._join(collective, seam)
            self._meet(collective)
            begun = self._place.clock()
            collective.finish(collective.start(join))
            took.append(self._place.clock() - begun)
        return min(took)

    def drag(self, collective: Collective, tokens: int) -> float:
        """How much a seam beside a stage of half a step costs, of the shorter of the two (weave/choice.py)."""
        stages = self.stages(-(-tokens // 2))
        alone = self.seam(collective, stages.seam)
        took = []
        for _ in range(REPEATS):
            strand = self._decoder.strand(self._batch(-(-tokens // 2)), self._kv)
            joined = self._decoder.join(onward(strand))
            join = self._join(collective, stages.seam)
            self._meet(collective)
            begun = self._place.clock()
            pending = collective.start(join)
            onward(strand, joined)
            collective.finish(pending)
            took.append(self._place.clock() - begun)
            strand.close()
        both = sorted((stages.attend, alone))
        return min(1.0, max(0.0, (min(took) - both[1]) / both[0]))

    def program(self, collective: Collective, program: RankedProgram, tokens: int) -> float:
        """A layer and its seams in a fused step that is one program, of which all rows are wanted: the best of some."""
        took = []
        for _ in range(REPEATS):
            self._meet(collective)
            took.append(program.layers([self._slice(tokens)], range(tokens)))
        return min(took) / self._decoder.config.layers

    def _slice(self, tokens: int) -> Slice:
        """Of all kinds of tokens: of one kind all rows would take the same experts."""
        kinds = self._decoder.config.vocabulary
        ids = tuple(position % kinds for position in range(tokens))
        return Slice(0, 0, ids, tuple(range(-(-tokens // self._block_size))))

    def _batch(self, tokens: int) -> Batch:
        return self._place.move(make_batch([self._slice(tokens)], self._block_size))

    def _meet(self, collective: Collective) -> None:
        collective.gather(torch.zeros((1, 1), device=self._place.device))

    def _join(self, collective: Collective, seam: Seam) -> Join:
        bounds = even_bounds(len(seam.partial), collective.ranks)
        first, end = collective.owned(bounds)
        residual = seam.weight.new_zeros((end - first, seam.partial.shape[1]))
        quantise = None if seam.reader is None else self._formats(seam.reader)
        return Join(seam.partial, residual, seam.weight, seam.eps, bounds, quantise=quantise)
