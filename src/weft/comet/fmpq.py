"""What is decided before any weight is rounded: for each site of a layer, how its input is scaled, ordered and split.

Let c_k be the length of the weight's column k and s_k the root mean square of input channel k. t_k = s_k c_k is what
the channel carries; it does not change when the channel is scaled up and the column down. Three steps, each exact in
the real numbers:

1. *Balance*: channel k is divided by d_k = sqrt(s_k / c_k), its column multiplied. Errors of 4-bit activations and of
   4-bit weights, spread evenly over a block, are least for exactly these d (Cauchy-Schwarz, for both alike). They are
   folded into what makes the input: the norm's gain, the rows of up_proj, the rows of v_proj. So they cost nothing.
2. *Order*: channels by falling t_k, so that the outlier channels fill as few blocks as possible.
3. *Split*: which blocks keep 8 bits is decided for all sites of the model at once (`allot`), by the output error that a
   block of 4 bits causes, E‖(x_b - Q4(x_b)) W_b‖², for each multiply-add that it takes. Outputs of different sites are
   not comparable; so the errors of a site are put in proportion to what 4 bits in all its blocks do to the hidden rows
   that leave the layer, relative to these (`site_weights` in calibrate.py measures it).

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
    """One site, as the allotment sees it. errors4, errors8: what each block costs with 4 and with 8 bits, in a unit
    that all sites of the model share; outputs: rows of the site's joined weight."""

    errors4: tuple[float, ...]
    errors8: tuple[float, ...]
    outputs: int

    def in_unit(self, whole: float) -> BlockCosts:
        """The same costs, scaled so that 4 bits in all blocks cost `whole`."""
        factor = whole / max(sum(self.errors4), 1e-30)
        scaled = [tuple(error * factor for error in errors) for errors in (self.errors4, self.errors8)]
        return BlockCosts(scaled[0], scaled[1], self.outputs)


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


def block_errors(rows: torch.Tensor, weight: torch.Tensor, *, bits: int, rotated: bool) -> torch.Tensor:
    """Mean squared output error [K / 128] that each block of rows [R, K] causes when it is quantised to `bits`.

    weight [N, K]. rotated: both are transformed first.
    """
    if rotated:
        rows, weight = hadamard(rows, BLOCK), hadamard(weight, BLOCK) / BLOCK
    columns = split(weight).transpose(0, 1)  # [B, N, 128]
    eight_bit_blocks = columns.shape[0] if bits == 8 else 0
    lost = split(rows - reference.quantise_rows(rows, eight_bit_blocks, exact_a4=True).dequantised()).transpose(0, 1)
    return ((lost @ (columns.transpose(1, 2) @ columns)) * lost).sum(dim=-1).mean(dim=-1)


def allot(sites: Mapping[str, BlockCosts], budget: float) -> dict[str, tuple[int, ...]]:
    """Which blocks of each site keep 8 bits: the largest gain for each multiply-add first, while the budget lasts.

    budget: the share of all multiply-adds of the model that may be done on 8-bit activations. A block that no longer
    fits is passed over, and cheaper ones are still looked at.
    """
    whole = sum(len(costs.errors4) * costs.outputs for costs in sites.values())
    left = budget * whole
    heap = [
        (-(four - eight) / costs.outputs, name, block)
        for name, costs in sites.items()
        for block, (four, eight) in enumerate(zip(costs.errors4, costs.errors8, strict=True))
        if four > eight
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
