"""One step of a model: from a plan to what it sampled. Every device that computes a real model does this in a lane."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch

from weft.core.plan import Plan, Sampled, Slice, TokenScore
from weft.core.slices import made
from weft.models.families import ModelConfig
from weft.models.forward import Forward
from weft.models.sampler import draw, score_prompt

# Logits of prompt rows are made in parts of about this size: a prompt chunk times a large vocabulary is too much.
SCORED_BYTES = 32 * 2**20

PromptScores = tuple[tuple[int, tuple[TokenScore, ...]], ...]


class Head(Protocol):
    """A decoder's output layer; of several ranks, that of all of them together."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def logits(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """[R, hidden] -> float32 [R, vocabulary]."""
        ...


class Computed(NamedTuple):
    """The fields of a Result that come from the model."""

    sampled: tuple[Sampled, ...]
    prompt_scores: PromptScores
    failed: tuple[tuple[int, str], ...]


def compute(plan: Plan, head: Head, forward: Forward) -> Computed:
    """Carry out a plan; a slice whose logits cannot be used fails alone. head: of the same decoder.

    There is nothing to tell of a part of a step before the last one.
    """
    drawing, rows, end, whole = [], [], 0, False
    for piece in plan.slices:
        end += len(piece.tokens)
        if piece.sample is not None:
            drawing.append(piece)
            rows.append(end - 1)
        if piece.prompt_logprobs is not None:
            whole = True
    best = forward.run(plan.slices, rows, whole=whole, part=plan.part, parts=plan.parts)
    if not plan.last:
        return Computed((), (), ())
    scored, failed = score_prompts(plan.slices, head, forward.hidden) if whole else ((), {})
    sampled = _sample(forward, best, drawing, failed)
    return Computed(sampled, scored, tuple(failed.items()))


def score_prompts(
    slices: Sequence[Slice], head: Head, hidden: Callable[[], torch.Tensor]
) -> tuple[PromptScores, dict[int, str]]:
    """The scores of the slices that ask for them, and why others have none. hidden: the rows of the whole step, asked
    for where there is something to score."""
    scored: list[tuple[int, tuple[TokenScore, ...]]] = []
    failed: dict[int, str] = {}
    ends = accumulate([len(piece.tokens) for piece in slices])
    for piece, end in zip(slices, ends, strict=True):
        if piece.prompt_logprobs is not None:
            scores = _score(head, hidden()[end - len(piece.tokens) : end], piece, piece.prompt_logprobs)
            if any(math.isnan(score.logprob) for score in scores):
                failed[piece.sequence] = "the model computed NaN or infinite logits for a prompt token"
            else:
                scored.append((piece.sequence, scores))
    return tuple(scored), failed


def _sample(
    forward: Forward, best: Sequence[tuple[int, float]], slices: Sequence[Slice], failed: dict[int, str]
) -> tuple[Sampled, ...]:
    """Draw after each slice, unless it has failed; what cannot be drawn goes to `failed`."""
    outcomes = draw(best, forward.logits, [piece.sample for piece in slices if piece.sample is not None])
    sampled = []
    for piece, outcome in zip(slices, outcomes, strict=True):
        sequence = piece.sequence
        if sequence in failed:
            continue
        if isinstance(outcome, str):
            failed[sequence] = outcome
        else:
            sampled.append(made(Sampled, (sequence, *outcome)))
    return tuple(sampled)


@torch.inference_mode()
def _score(head: Head, hidden: torch.Tensor, piece: Slice, k: int) -> tuple[TokenScore, ...]:
    """Each row scores the token that follows it; the last row of a prompt has none."""
    targets = piece.tokens[1:] if piece.next_token is None else (*piece.tokens[1:], piece.next_token)
    most = max(1, SCORED_BYTES // (4 * head.config.vocabulary))
    scores: list[TokenScore] = []
    for at in range(0, len(targets), most):
        part = targets[at : at + most]
        scores += score_prompt(head.logits(hidden[at : at + len(part)]), part, k)
    return tuple(scores)
