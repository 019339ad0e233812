"""A step of a decoder, by the best means its kernels have: as a program in C++, or call by call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from weft.core.plan import Slice
from weft.kernels import LEVELS
from weft.kernels.base import Batch, Kernels
from weft.models.batch import make_batch
from weft.models.decoder import Decoder

Logits = npt.NDArray[np.float32]


class Forward(Protocol):
    """The forward pass of one lane. What it returns is valid until its next run."""

    def run(self, batch: Batch, rows: Sequence[int]) -> Logits:
        """Compute a step: the keys and values of its tokens are in the KV then. The logits after these rows of it,
        float32 [R, V]. Raises ValueError for a batch that reaches outside of the KV."""
        ...

    def hidden(self) -> torch.Tensor:
        """The hidden rows of all tokens of the last run after the final norm, [T, hidden]."""
        ...


class Plain:
    """Call by call."""

    def __init__(self, decoder: Decoder, kv: list[Any]) -> None:
        self._decoder = decoder
        self._kv = kv
        self._hidden = torch.empty(0)

    def run(self, batch: Batch, rows: Sequence[int]) -> Logits:
        self._hidden = self._decoder.hidden(batch, self._kv)
        wanted = self._hidden[list(rows)]
        logits: Logits = self._decoder.logits(wanted).to("cpu", torch.float32).numpy()
        return logits

    def hidden(self) -> torch.Tensor:
        return self._hidden


def open_forward(decoder: Decoder, kernels: Kernels, kv: list[Any], *, max_tokens: int, max_slices: int) -> Forward:
    """kernels: the decoder's own. max_tokens, max_slices: of a step."""
    if kernels.name not in LEVELS:
        return Plain(decoder, kv)
    from weft.kernels.cpu import CpuKernels
    from weft.kernels.program import Program
    from weft.kernels.record import Recorder

    recorder = Recorder()
    recording = decoder.on(cast(Kernels, recorder))
    anything = make_batch([Slice(0, 0, (0,), (0,))], kv[0].block_size)  # values stand for what is in it
    hidden: Any = recording.hidden(anything, kv)
    logits: Any = recording.logits(cast(Any, recorder.take(hidden)))
    return Program(
        cast(CpuKernels, kernels), recorder.operations, hidden, logits, max_tokens=max_tokens, max_slices=max_slices
    )
