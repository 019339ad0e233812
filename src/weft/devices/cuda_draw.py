"""Drawing tokens after a launch: on the device where the token is needed there again, on the host where it takes more.

A row is drawn on one side or the other by what its request asks, whatever the other rows ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.core.plan import Sampling, TokenScore
from weft.devices.cuda_forward import send_rows
from weft.devices.cuda_streams import Gpu
from weft.models.sampler import flaw, plain, sample

Drawn = tuple[int, TokenScore | None] | str  # as models/sampler.py has it


@dataclass(frozen=True, slots=True)
class Draw:
    """What was drawn, on its way to the host; good when the stream is there. tokens int64 and peaks float32 [R]: of the
    device. logits: float32 of the rows that the host draws, numbered by `late`."""

    samplings: tuple[Sampling, ...]
    tokens: torch.Tensor
    peaks: torch.Tensor
    late: tuple[int, ...]
    logits: torch.Tensor | None

    def read(self) -> list[Drawn]:
        """One outcome for each row; the stream must have got there."""
        found: list[Drawn] = [
            (token, None) if peak - peak == 0.0 else flaw(peak)
            for token, peak in zip(self.tokens.tolist(), self.peaks.tolist(), strict=True)
        ]
        if self.logits is not None:
            outcomes = sample(self.logits, [self.samplings[row] for row in self.late])
            for row, outcome in zip(self.late, outcomes, strict=True):
                found[row] = outcome
        return found


def start_draw(gpu: Gpu, logits: torch.Tensor, samplings: Sequence[Sampling], drawn: torch.Tensor) -> Draw:
    """Draw after each row of logits, float32 [R, V]; the device's tokens are left in drawn[:R], too."""
    count = len(samplings)
    tokens, peaks = _most_probable(logits)
    drawn[:count].copy_(tokens)
    late = tuple(row for row, sampling in enumerate(samplings) if not plain(sampling) or _scored(sampling))
    rows = None
    if late:
        chosen = logits if len(late) == count else logits[send_rows(gpu, late)]
        rows = fetch(gpu, chosen)
    return Draw(tuple(samplings), fetch(gpu, tokens), fetch(gpu, peaks), late, rows)


def fetch(gpu: Gpu, tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, good when the stream has got there."""
    memory = gpu.staging(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return memory.copy_(tensor, non_blocking=True)


def _most_probable(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(token, its logit) of each row, the lowest id among equals; NaN where there is one."""
    peaks = logits.amax(dim=-1)
    best = (logits == peaks[:, None]).byte().argmax(dim=-1)
    return best, peaks


def _scored(sampling: Sampling) -> bool:
    return sampling.params.logprobs is not None
