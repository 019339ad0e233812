"""A step of a decoder, by the best means its kernels have: as a program in C++, or call by call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from weft.core.plan import Slice
from weft.kernels import LEVELS
from weft.kernels.base import Kernels
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.sampler import best_of_rows
from weft.weave.seam import Driven, drive, finish

if TYPE_CHECKING:
    from weft.kernels.program import Program

Logits = npt.NDArray[np.float32]


class Forward(Protocol):
    """The forward pass of one lane. What it returns is valid until its next run."""

    def run(
        self, slices: Sequence[Slice], rows: Sequence[int], *, whole: bool = False, part: int = 0, parts: int = 1
    ) -> Sequence[tuple[int, float]]:
        """Compute a step: the keys and values of its tokens are in the KV then. Of each of these rows of it the most
        probable token that follows, and its logit: the lowest id among equals, NaN where there is one.

        whole: every row is wanted after the last layer, not only these, and `hidden` has them.

        part, parts: just this part of the layers, as in `Plan`, with all else the same each time. Nothing comes out
        before the last one.

        Raises ValueError for slices that reach outside of the KV.
        """
        ...

    def logits(self) -> Logits:
        """Of the last run, float32 [R, V]: the sums as they are, not rounded to the model's precision."""
        ...

    def hidden(self) -> torch.Tensor:
        """The hidden rows of all tokens of the last run, which was a whole one, after the final norm: [T, hidden]."""
        ...


class Plain:
    """Call by call."""

    def __init__(self, decoder: Decoder, kv: list[Any], block_size: int) -> None:
        self._decoder = decoder
        self._kv = kv
        self._block_size = block_size
        self._seams = 1 + 2 * decoder.config.layers
        self._driven: Driven | None = None  # a step that is cut, from one part to the next
        self._hidden = torch.empty(0)
        self._logits: Logits = np.empty((0, 0), np.float32)

    @torch.inference_mode()
    def run(
        self, slices: Sequence[Slice], rows: Sequence[int], *, whole: bool = False, part: int = 0, parts: int = 1
    ) -> Sequence[tuple[int, float]]:
        if part == 0:
            batch = make_batch(slices, self._block_size, None if whole else rows)
            self._driven = drive(self._decoder.strand(batch, self._kv), self._decoder.join)
        elif self._driven is None:
            raise ValueError(f"part {part} of a step that was not begun")
        if part + 1 < parts:
            for _ in range(self._seams * part // parts, self._seams * (part + 1) // parts):
                next(self._driven)
            return []
        self._hidden, self._driven = finish(self._driven), None
        wanted = self._hidden[list(rows)] if whole else self._hidden
        self._logits = self._decoder.logits(wanted).to("cpu", torch.float32).numpy()
        return best_of_rows(self._logits)

    def logits(self) -> Logits:
        return self._logits

    def hidden(self) -> torch.Tensor:
        return self._hidden


class Recorded:
    """As a program; the rare step that is wanted whole (to score a prompt), call by call. The results are the same."""

    def __init__(self, program: Program, plain: Plain) -> None:
        self.program = program
        self.plain = plain
        self._latest: Program | Plain = program

    def run(
        self, slices: Sequence[Slice], rows: Sequence[int], *, whole: bool = False, part: int = 0, parts: int = 1
    ) -> Sequence[tuple[int, float]]:
        if whole:
            self._latest = self.plain
            return self.plain.run(slices, rows, whole=True, part=part, parts=parts)
        self._latest = self.program
        return self.program.run(slices, rows, part, parts)

    def logits(self) -> Logits:
        return self._latest.logits()

    def hidden(self) -> torch.Tensor:
        return self.plain.hidden()


def open_forward(
    decoder: Decoder, kernels: Kernels, kv: list[Any], block_size: int, *, max_tokens: int, max_slices: int
) -> Forward:
    """kernels: the decoder's own; block_size: of the KV. max_tokens, max_slices: of a step.

    A model with experts is computed call by call: a program has the same operations in each step, and which experts
    compute depends on what the rows are.
    """
    plain = Plain(decoder, kv, block_size)
    if kernels.name not in LEVELS or decoder.config.experts is not None:
        return plain
    from weft.kernels.cpu import CpuKernels
    from weft.kernels.program import Program
    from weft.kernels.record import Recorder

    recorder = Recorder()
    recording = decoder.on(cast(Kernels, recorder))
    anything = make_batch([Slice(0, 0, (0,), (0,))], block_size)  # values stand for what is in it
    logits: Any = recording.logits(recording.hidden(anything, kv))
    program = Program(
        cast(CpuKernels, kernels), recorder.operations, logits, max_tokens=max_tokens, max_slices=max_slices
    )
    return Recorded(program, plain)
