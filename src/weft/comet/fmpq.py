"""What is decided before any weight is rounded: for each site of a layer, how its input is scaled, ordered and split.

Let c_k be the length of the weight's column k and s_k the root mean square of input channel k. t_k = s_k c_k is what
the channel carries; it does not change when the channel is scaled up and the column down. Three steps, each exact in
the real numbers:

1. *Balance*: channel k is divided by d_k = sqrt(s_k / c_k), its column multiplied. Errors of 4-bit activations and of
   4-bit weights, spread evenly over a block, are least for exactly these d (Cauchy-Schwarz, for both alike). They are
   folded into what makes the input: the norm's gain, the rows of up_proj, the rows of v_proj. So they cost nothing.
2. *Order*: channels by falling t_k, so that the outlier channels fill as few blocks as possible.
3. *Split*: which blocks keep 8 bits is decided for all sites of the model at once (`allot`), by the nats that 4 bits in
   a block cost in the end (sensitivity.py) for each multiply-add that the block takes.

The paper's own method is here too: no balance, channels by falling magnitude, and 8 bits for every block that holds a
channel whose largest magnitude exceeds `threshold` times the median.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from weft.comet import reference
from weft.comet.hadamard import hadamard
from weft.comet.packing import BLOCK, split

LARGEST_BALANCE = 2.0**12  # either way: beyond, a channel is dead rather than quiet


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of one site's input over the calibration tokens: mean squares and largest magnitudes of each channel, float32
    [K], and a sample of rows [R, K]."""

    squares: torch.Tensor
    largest: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class BlockCosts:
    """One site, as the allotment sees it. nats: what each block costs with 4 bits, where with 8 it would cost next to
    nothing; outputs: rows of the site's joined weight."""

    nats: tuple[float, ...]
    outputs: int


def balance(squares: torch.Tensor, columns: torch.Tensor, shared: tuple[int, int] | None = None) -> torch.Tensor:
    """d [K] from mean squares and squared column lengths, both [K].

    shared: (kv_heads, head_dim) where the input is the mixed values: the query heads that share a value head are scaled
    alike, since the scaling is the value head's.
    """
    count = len(squares)
    if shared is not None:
        kv_heads, head_dim = shared
        squares = squares.view(kv_heads, -1, head_dim).mean(dim=1).flatten()
        columns = columns.view(kv_heads, -1, head_dim).sum(dim=1).flatten()
    alive = (squares > 0) & (columns > 0)
    if not bool(alive.any()):
        return torch.ones(count)
    d = torch.where(alive, squares / torch.where(alive, columns, 1.0), 1.0).pow(0.25)
    d = torch.where(alive, d / d[alive].log().mean().exp(), 1.0).clamp(1 / LARGEST_BALANCE, LARGEST_BALANCE)
    if shared is not None:
        kv_heads, head_dim = shared
        d = d.view(kv_heads, 1, head_dim).expand(kv_heads, count // (kv_heads * head_dim), head_dim).flatten()
    return d


def block_errors(rows: torch.Tensor, weight: torch.Tensor, *, rotated: bool) -> torch.Tensor:
    """Mean squared output error [K / 128] that each block of rows [R, K] causes when it is quantised to 4 bits.

    weight [N, K]. rotated: both are transformed first.
    """
    if rotated:
        rows, weight = hadamard(rows, BLOCK), hadamard(weight, BLOCK) / BLOCK
    columns = split(weight).transpose(0, 1)  # [B, N, 128]
    lost = split(rows - reference.quantise_rows(rows, 0, exact_a4=True).dequantised()).transpose(0, 1)
    return ((lost @ (columns.transpose(1, 2) @ columns)) * lost).sum(dim=-1).mean(dim=-1)


def allot(sites: Mapping[str, BlockCosts], budget: float) -> dict[str, tuple[int, ...]]:
    """Which blocks of each site keep 8 bits: the most nats for each multiply-add first, while the budget lasts.

    budget: the share of all multiply-adds of the model that may be done on 8-bit activations. A block that no longer
    fits is passed over, and cheaper ones are still looked at.
    """
    whole = sum(len(costs.nats) * costs.outputs for costs in sites.values())
    left = budget * whole
    heap = [
        (-nats / costs.outputs, name, block)
        for name, costs in sites.items()
        for block, nats in enumerate(costs.nats)
        if nats > 0
    ]
    heapq.heapify(heap)
    chosen: dict[str, list[int]] = {name: [] for name in sites}
    while heap:
        _, name, block = heapq.heappop(heap)
        if sites[name].outputs <= left * (1 + 1e-9):
            left -= sites[name].outputs
            chosen[name].append(block)
    return {name: tuple(sorted(blocks)) for name, blocks in chosen.items()}


def leading(order: torch.Tensor, chosen: Sequence[int]) -> torch.Tensor:
    """The channel order [K] with the chosen blocks moved to the front; the others keep their order."""
    blocks = split(order)
    rest = [block for block in range(len(blocks)) if block not in set(chosen)]
    return blocks[[*chosen, *rest]].flatten()


def paper_outliers(largest: torch.Tensor, threshold: float) -> tuple[torch.Tensor, int]:
    """The paper's order [K] and number of 8-bit blocks: channels by falling magnitude, outliers by the median."""
    order = largest.argsort(descending=True, stable=True)
    outliers = int((largest > threshold * largest.median()).sum())
    return order, -(-outliers // BLOCK)
