"""A rank's step as one program in C++ (kernels/program.py), seams included: for steps of few tokens, whose calls take
longer from Python than in the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from weft.core.plan import Slice
from weft.errors import RankLost
from weft.kernels.base import Kernels
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.weave.seam import Joined, Seam, run

if TYPE_CHECKING:
    from weft.kernels.cpu import CpuKernels
    from weft.kernels.program import Program
    from weft.weave.native import NativeCollective

TOKENS = 64  # the most of a step; from there on the kernels take nearly all of the time


class RankedProgram:
    """Fused steps of one rank; the bits are those of the calls that were recorded."""

    def __init__(self, program: Program, most: int) -> None:
        self._program = program
        self._most = most

    def takes(self, tokens: int, rows: int) -> bool:
        """Whether a step of so many tokens, so many of them wanted, is one for it."""
        return tokens <= self._most and rows > 0

    def run(self, slices: Sequence[Slice], rows: Sequence[int]) -> torch.Tensor:
        """This rank's part of the logits after each of these rows, [R, V / ranks] of float32; valid until the next run.
        All ranks must call it alike. Raises RankLost; ValueError as `Program.run`."""
        try:
            self._program.run(slices, rows)
        except RuntimeError as error:
            raise RankLost(str(error)) from error
        return torch.from_numpy(self._program.logits())

    def layers(self, slices: Sequence[Slice], rows: Sequence[int]) -> float:
        """A run, and the seconds of its layers and their seams: from after the embedding's norm to the last seam."""
        from weft.kernels.record import MakeAndQuantise, Meet, Norm

        before = self._program.timings()
        self._program.timed = True
        try:
            self.run(slices, rows)
        finally:
            self._program.timed = False
        after = self._program.timings()
        kinds = [type(operation) for operation, _ in after]
        norm = next(at for at, kind in enumerate(kinds) if kind in (Norm, MakeAndQuantise))
        last = max(at for at, kind in enumerate(kinds) if kind is Meet)
        inside = slice(norm + 1, last + 1)
        return sum(seconds for _, seconds in after[inside]) - sum(seconds for _, seconds in before[inside])


def record_ranked(
    decoder: Decoder, kernels: CpuKernels, collective: NativeCollective, kv: list[Any], block_size: int, most: int
) -> RankedProgram:
    """decoder: this rank's, on these kernels. most: tokens of a step, no more than `TOKENS` of which it will take. All
    ranks must call this together. Raises RankLost where their seams differ."""
    from weft.kernels.program import Program
    from weft.kernels.record import Meet, Recorder

    recorder = Recorder()
    recording = decoder.on(cast(Kernels, recorder))

    def join(seam: Seam) -> Joined:
        partial, residual = cast(Any, seam.partial), cast(Any, seam.residual)
        if residual is None:  # as in weave/weaver.py; the norm comes last, so that what reads it can be joined to it
            own = recorder.own_rows(collective.group, partial)
            return cast(Joined, (recorder.rms_norm(partial, seam.weight, seam.eps), own))
        return cast(Joined, recorder.meet(collective.group, partial, residual, seam.weight, seam.eps))

    anything = make_batch([Slice(0, 0, (0,), (0,))], block_size)  # values stand for what is in it
    logits: Any = recording.logits(run(recording.strand(anything, kv), join))
    seams = [seam for seam in recorder.operations if isinstance(seam, Meet)]
    collective.compare(tuple((seam.x.dtype, seam.x.columns, seam.eps) for seam in seams))
    most = min(most, TOKENS)
    program = Program(kernels, recorder.operations, logits, max_tokens=most, max_slices=most)
    return RankedProgram(program, most)
