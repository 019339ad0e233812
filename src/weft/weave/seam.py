"""A seam: the point between two compute stages where tensor-parallel ranks must be joined.

A decoder is a generator (a *strand*) that yields a `Seam` and is sent back `(hidden, residual)`. It knows nothing of
ranks or overlap; who drives it decides how a seam is carried out. `run` is the plain driver of one rank.

On the way to a seam it may yield a `Shared` operator, which strands can have computed for all of their rows at once.
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
    residual: what the seam before it gave; None at the first seam, where `partial` is the embedding: the same on every
        rank, so that nothing is summed, and it is the residual itself.
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


@dataclass(frozen=True, slots=True)
class Shared:
    """operator(rows), which the strand is sent back.

    Of operators that cost much however few rows there are, as that of a mixture does, which reads all experts that any
    row takes: halves of a step would read most of them twice.

    rows: [tokens, hidden] of this strand. operator: any rows -> as many [rows, hidden], each of them by itself; so a
    row becomes the same, bit for bit, with others beside it or without.
    """

    rows: torch.Tensor
    operator: Callable[[torch.Tensor], torch.Tensor]


Joined = tuple[torch.Tensor, torch.Tensor]
# Is sent what its last stop gives: `Joined` of a seam, a tensor of an operator, None at the start.
Strand = Generator[Seam | Shared, Any, torch.Tensor]
Driven = Generator[None, None, torch.Tensor]


def run(strand: Strand, join: Callable[[Seam], Joined]) -> torch.Tensor:
    """Drive one strand to its end, carrying out each seam with `join` at once. Returns the strand's value."""
    return finish(drive(strand, join))


def onward(strand: Strand, joined: Joined | None = None) -> Seam:
    """Go on to the next seam, with each operator on the way for this strand alone. joined: what the last seam gave;
    None at the start. Raises StopIteration with the strand's value at its end."""
    stop = strand.send(joined)
    while isinstance(stop, Shared):
        stop = strand.send(stop.operator(stop.rows))
    return stop


def drive(strand: Strand, join: Callable[[Seam], Joined]) -> Driven:
    """Drive one strand, carrying out each seam with `join`; stops before each of them."""
    try:
        seam = onward(strand)
        while True:
            yield
            seam = onward(strand, join(seam))
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
