"""A seam: the point between two compute stages where tensor-parallel ranks must be joined.

A decoder is a generator (a *strand*) that yields a `Seam` and is sent back `(hidden, residual)`. It knows nothing of
ranks or overlap; who drives it decides how a seam is carried out. `run` is the plain driver of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch

from weft.kernels.base import Batch


@dataclass(frozen=True, slots=True)
class Seam:
    """residual := residual + sum over ranks of `partial`; hidden := RMSNorm(residual) * weight.

    partial: [tokens, hidden] this rank's part of the stage's output.
    residual: what the seam before it gave; None at the first seam, where the residual is the sum itself. There
        `partial` is the embedding, the same on every rank, and nothing is summed.
    weight: [hidden] of the norm that follows; eps: its epsilon.
    kept: where the strand goes on with the rows only that this batch keeps: `partial` has these, `residual` still all.
    reader: the packed linear that reads `hidden`, which may be handed to it as that linear wants its input; None where
        others read it as well.
    """

    partial: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    eps: float
    kept: Batch | None = None
    reader: Any = None


Joined = tuple[torch.Tensor, torch.Tensor]
Strand = Generator[Seam, Joined, torch.Tensor]
Driven = Generator[None, None, torch.Tensor]


def run(strand: Strand, join: Callable[[Seam], Joined]) -> torch.Tensor:
    """Drive one strand to its end, carrying out each seam with `join` at once. Returns the strand's value."""
    return finish(drive(strand, join))


def drive(strand: Strand, join: Callable[[Seam], Joined]) -> Driven:
    """Drive one strand, carrying out each seam with `join`; stops before each of them."""
    try:
        seam = next(strand)
        while True:
            yield
            seam = strand.send(join(seam))
    except StopIteration as end:
        value: torch.Tensor = end.value
        return value


def finish(driven: Driven) -> torch.Tensor:
    """Drive a strand to its end from where it is. Returns the strand's value."""
    while True:
        try:
            next(driven)
        except StopIteration as end:
            value: torch.Tensor = end.value
            return value
