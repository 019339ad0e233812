"""The forward pass of one tensor-parallel rank: strands of the rank's decoder, joined with those of the other ranks.

All ranks are given the same steps and decide alike how to carry them out: by the step, and by what they agreed upon
when they started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from weft.core.plan import Slice
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.families import ModelConfig
from weft.models.ranked_program import RankedProgram
from weft.models.sampler import best_of_rows
from weft.weave.choice import Mode
from weft.weave.collective import Collective, Quantise
from weft.weave.split import divide
from weft.weave.weaver import Weaver, no_format

Logits = npt.NDArray[np.float32]


# Of a step's slices: how to carry it out, and how many tokens each strand has.
Choice = Callable[[Sequence[Slice]], tuple[Mode, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class LanePlace:
    """Where a lane computes. shared: whether another lane may run on some of its cores, too."""

    cores: tuple[int, ...]
    shared: bool = False

    def __str__(self) -> str:
        return f"core{'s' if len(self.cores) > 1 else ''} {', '.join(map(str, self.cores))}"


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer of all ranks together, in the place of the decoder's: all of them must call it alike."""

    config: ModelConfig
    logits: Callable[[torch.Tensor], torch.Tensor]


class Ranked:
    """A `Forward` (see forward.py) of a rank. It computes call by call, but for the steps that a program takes.

    collectives: the group, by mode; one for the seams of each mode that `choose` may give. The output layer's parts are
    gathered by that of the step. program: of fused steps, by the collective of these. move: puts the collectives where
    the lane is from now on. close: ends them.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: list[Any],
        block_size: int,
        collectives: Mapping[Mode, Collective],
        choose: Choice,
        formats: Callable[[Any], Quantise | None] = no_format,
        program: RankedProgram | None = None,
        move: Callable[[LanePlace], None] = lambda _place: None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.move = move
        self.close = close
        self.head = Head(decoder.config, self._all_logits)
        self._decoder = decoder
        self._kv = kv
        self._block_size = block_size
        self._collectives = collectives
        self.choose = choose
        self._formats = formats
        self._program = program
        self._gather = next(iter(collectives.values())).gather
        self._hidden = torch.empty(0)
        self._logits: Logits = np.empty((0, 0), np.float32)

    @torch.inference_mode()
    def run(
        self, slices: Sequence[Slice], rows: Sequence[int], *, whole: bool = False, part: int = 0, parts: int = 1
    ) -> Sequence[tuple[int, float]]:
        if (part, parts) != (0, 1):
            raise ValueError(f"part {part} of {parts}: a step of several ranks is not cut")
        mode, lengths = self.choose(slices)
        collective = self._collectives[mode.seams]
        self._gather = collective.gather
        program = self._program
        if mode is Mode.FUSED and not whole and program is not None and program.takes(sum(lengths), len(rows)):
            self._logits = self._together(program.run(slices, rows)).numpy()
            return best_of_rows(self._logits)
        strands = [
            self._decoder.strand(make_batch(own, self._block_size, None if whole else kept), self._kv)
            for own, kept in cut_step(slices, rows, lengths)
        ]
        weaver = Weaver(collective, self._decoder.join, self._formats, rejoin=mode is Mode.REJOINED)
        self._hidden = torch.cat(weaver.weave(strands))
        wanted = self._hidden[list(rows)] if whole else self._hidden
        self._logits = self._all_logits(wanted).numpy()
        return best_of_rows(self._logits)

    def logits(self) -> Logits:
        return self._logits

    def hidden(self) -> torch.Tensor:
        return self._hidden

    @torch.inference_mode()
    def _all_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if not len(hidden):
            return torch.empty((0, self.head.config.vocabulary))
        return self._together(self._decoder.logits(hidden))

    def _together(self, logits: torch.Tensor) -> torch.Tensor:
        """Of this rank's part of the vocabulary -> of the whole."""
        # The last ranks' parts are filled up with rows of zeros, which come last.
        return torch.cat(self._gather(logits), dim=1)[:, : self.head.config.vocabulary].contiguous()


def cut_step(
    slices: Sequence[Slice], rows: Sequence[int], lengths: Sequence[int]
) -> list[tuple[Sequence[Slice], list[int]]]:
    """The slices of each strand, which have so many tokens, and which of its rows are wanted."""
    strands: list[tuple[Sequence[Slice], list[int]]] = []
    rest, begin = slices, 0
    for length in lengths:
        end = begin + length
        first, rest = divide(rest, length)
        strands.append((first, [row - begin for row in rows if begin <= row < end]))
        begin = end
    return strands
