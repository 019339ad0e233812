"""Drawing tokens after a launch, whatever their requests ask: on the device, where the next launch takes them from.

What was drawn comes to the host for those who wait for it, and so do scores. Only the scores of a prompt's own tokens
are made on the host, from all logits of the prompt (step.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.core.plan import Sampling, TokenScore
from weft.devices.cuda_inputs import fetch, send_tensors
from weft.devices.cuda_streams import Gpu
from weft.kernels.sample_parameters import parameters_of
from weft.kernels.triton_sample import Drawn, Scores, sample
from weft.models.sampler import FORBIDDEN, flaw

Outcome = tuple[int, TokenScore | None] | str  # as models/sampler.py has it


@dataclass(frozen=True, slots=True)
class Draw:
    """What was drawn, on its way to the host: `found` is good when the stream is there."""

    samplings: tuple[Sampling, ...]
    found: Drawn

    def read(self) -> list[Outcome]:
        """One outcome for each row; the stream must have got there."""
        tokens, peaks = self.found.tokens.tolist(), self.found.peaks.tolist()
        left = peaks if self.found.left is None else self.found.left.tolist()
        return [
            flaw(peak) if not math.isfinite(peak) else FORBIDDEN if not math.isfinite(rest) else (token, score)
            for token, peak, rest, score in zip(tokens, peaks, left, self._scores(tokens), strict=True)
        ]

    def _scores(self, tokens: Sequence[int]) -> list[TokenScore | None]:
        if self.found.scores is None:
            return [None] * len(tokens)
        logprobs, ranks, others, their_logprobs = (part.tolist() for part in self.found.scores)
        tops = [tuple(zip(*row, strict=True)) for row in zip(others, their_logprobs, strict=True)]
        asked = [sampling.params.logprobs for sampling in self.samplings]
        return [
            None if k is None else TokenScore(token, logprob, rank, top[:k])
            for k, token, logprob, rank, top in zip(asked, tokens, logprobs, ranks, tops, strict=True)
        ]


def start_draw(gpu: Gpu, logits: torch.Tensor, samplings: Sequence[Sampling], drawn: torch.Tensor) -> Draw:
    """Draw after each row of logits, float32 [R, V]; the tokens are left in drawn[:R] of the device, too."""
    parameters = parameters_of(samplings, logits.shape[1]).moved(lambda tensors: send_tensors(gpu, tensors))
    found = sample(logits, parameters)
    drawn[: len(samplings)].copy_(found.tokens)
    return Draw(
        tuple(samplings),
        Drawn(
            fetch(gpu, found.tokens),
            fetch(gpu, found.peaks),
            None if found.left is None else fetch(gpu, found.left),
            None if found.scores is None else Scores(*(fetch(gpu, part) for part in found.scores)),
        ),
    )
