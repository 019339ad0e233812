"""One step of a model: from a plan to what it sampled. Every device that computes a real model does this in a lane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from weft.core.plan import Plan, Sampled, Sampling, Slice, TokenScore
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.sampler import sample, score_prompt

# Logits of prompt rows are made in parts of about this size: a prompt chunk times a large vocabulary is too much.
SCORED_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Computed:
    """The fields of a Result that come from the model."""

    sampled: tuple[Sampled, ...]
    prompt_scores: tuple[tuple[int, tuple[TokenScore, ...]], ...]
    failed: tuple[tuple[int, str], ...]


@torch.inference_mode()
def compute(plan: Plan, decoder: Decoder, kv: list[Any], block_size: int) -> Computed:
    """Carry out a plan; a slice whose logits cannot be used fails alone."""
    hidden = decoder.hidden(make_batch(plan.slices, block_size), kv)
    ends = list(accumulate(len(piece.tokens) for piece in plan.slices))
    failed: dict[int, str] = {}
    scored = []
    for piece, end in zip(plan.slices, ends, strict=True):
        if piece.prompt_logprobs is not None:
            scores = _score(decoder, hidden[end - len(piece.tokens) : end], piece, piece.prompt_logprobs)
            if any(math.isnan(score.logprob) for score in scores):
                failed[piece.sequence] = "the model computed NaN or infinite logits for a prompt token"
            else:
                scored.append((piece.sequence, scores))
    sampled = _sample(decoder, hidden, plan.slices, ends, failed)
    return Computed(sampled, tuple(scored), tuple(failed.items()))


def _sample(
    decoder: Decoder, hidden: torch.Tensor, slices: Sequence[Slice], ends: Sequence[int], failed: dict[int, str]
) -> tuple[Sampled, ...]:
    """Draw after the last row of each slice that samples; what cannot be drawn goes to `failed`."""
    rows: list[int] = []
    samplings: list[Sampling] = []
    sequences: list[int] = []
    for piece, end in zip(slices, ends, strict=True):
        if piece.sample is not None and piece.sequence not in failed:
            rows.append(end - 1)
            samplings.append(piece.sample)
            sequences.append(piece.sequence)
    if not rows:
        return ()
    wanted = hidden if len(rows) == len(hidden) else hidden.index_select(0, torch.tensor(rows))
    sampled = []
    for sequence, outcome in zip(sequences, sample(decoder.logits(wanted), samplings), strict=True):
        if isinstance(outcome, str):
            failed[sequence] = outcome
        else:
            sampled.append(Sampled(sequence, *outcome))
    return tuple(sampled)


def _score(decoder: Decoder, hidden: torch.Tensor, piece: Slice, k: int) -> tuple[TokenScore, ...]:
    """Each row scores the token that follows it; the last row of a prompt has none."""
    targets = piece.tokens[1:] if piece.next_token is None else (*piece.tokens[1:], piece.next_token)
    most = max(1, SCORED_BYTES // (4 * decoder.config.vocabulary))
    scores: list[TokenScore] = []
    for at in range(0, len(targets), most):
        part = targets[at : at + most]
        scores += score_prompt(decoder.logits(hidden[at : at + len(part)]), part, k)
    return tuple(scores)
