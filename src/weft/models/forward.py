"""A step of a decoder, by the best means its kernels have: as a program in C++, or call by call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from weft.core.plan import Slice
from weft.kernels import LEVELS
from weft.kernels.base import Kernels
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.sampler import best_of_rows

Logits = npt.NDArray[np.float32]


class Forward(Protocol):
    """The forward pass of one lane. What it returns is valid until its next run."""

    def run(self, slices: Sequence[Slice], rows: Sequence[int]) -> Sequence[tuple[int, float]]:
        """Compute a step: the keys and values of its tokens are in the KV then. Of each of these rows of it the most
        probable token that follows, and its logit: the lowest id among equals, NaN where there is one.

        Raises ValueError for slices that reach outside of the KV.
        """
        ...

    def logits(self) -> Logits:
        """Of the last run, float32 [R, V]: the sums as they are, not rounded to the model's precision."""
        ...

    def hidden(self) -> torch.Tensor:
        """The hidden rows of all tokens of the last run after the final norm, [T, hidden]."""
        ...


class Plain:
    """Call by call."""

    def __init__(self, decoder: Decoder, kv: list[Any], block_size: int) -> None:
        self._decoder = decoder
        self._kv = kv
        self._block_size = block_size
        self._hidden = torch.empty(0)
        self._logits: Logits = np.empty((0, 0), np.float32)

    @torch.inference_mode()
    def run(self, slices: Sequence[Slice], rows: Sequence[int]) -> Sequence[tuple[int, float]]:
        self._hidden = self._decoder.hidden(make_batch(slices, self._block_size), self._kv)
        wanted = self._hidden[list(rows)]
        self._logits = self._decoder.logits(wanted).to("cpu", torch.float32).numpy()
        return best_of_rows(self._logits)

    def logits(self) -> Logits:
        return self._logits

    def hidden(self) -> torch.Tensor:
        return self._hidden


def open_forward(
    decoder: Decoder, kernels: Kernels, kv: list[Any], block_size: int, *, max_tokens: int, max_slices: int
) -> Forward:
    """kernels: the decoder's own; block_size: of the KV. max_tokens, max_slices: of a step."""
    if kernels.name not in LEVELS:
        return Plain(decoder, kv, block_size)
    from weft.kernels.cpu import CpuKernels
    from weft.kernels.program import Program
    from weft.kernels.record import Recorder

    recorder = Recorder()
    recording = decoder.on(cast(Kernels, recorder))
    anything = make_batch([Slice(0, 0, (0,), (0,))], block_size)  # values stand for what is in it
    hidden: Any = recording.hidden(anything, kv)
    logits: Any = recording.logits(cast(Any, recorder.take(hidden)))
    return Program(
        cast(CpuKernels, kernels), recorder.operations, hidden, logits, max_tokens=max_tokens, max_slices=max_slices
    )
