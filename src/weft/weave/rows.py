"""What an owner does with its rows at a seam: sum, residual, norm, and the form in which they travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from weft.weave.collective import Join, Joined, Quantise

Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]

# (parts of all ranks in their order, each [n, H]; residual [n, H], updated in place; weight; eps; format) ->
# (rows as they travel: [n, H], or uint8 [n, row_bytes] with a format; residual)
JoinRows = Callable[
    [Sequence[torch.Tensor], torch.Tensor, torch.Tensor, float, Quantise | None],
    tuple[torch.Tensor, torch.Tensor],
]


def plain(norm: Norm) -> JoinRows:
    """In plain torch, with some `Kernels.rms_norm`. kernels/wire.py has the same bits in one pass."""

    def join(
        parts: Sequence[torch.Tensor],
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        quantise: Quantise | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        residual.copy_(total + residual.float())
        hidden = norm(residual, weight, eps)
        return hidden if quantise is None else quantise.encode(hidden), residual

    return join


def arrived(wire: torch.Tensor, join: Join, residual: torch.Tensor) -> Joined:
    """What a rank is given once the rows of all have come: [T, H], or uint8 [T, row_bytes]."""
    hidden = wire if join.quantise is None else join.quantise.decode(wire, join.weight.dtype)
    return Joined(hidden, residual)
