"""Where a step is cut into strands, and who owns which rows: pure functions of what every rank knows alike.

Kernels work in waves: tiles up to a full wave cost as much as the full one, so that two halves may take a wave more
than the whole (tokenweave.md §3). A cut is allowed where they do not:

    waves(prefix) + waves(suffix) <= waves(whole)

A core computes one tile of rows at a time, so that waves(n) = ceil(n / rows): with n = q * rows + s, 0 < s <= rows,
these are the cuts from p * rows + s to p * rows + rows for every p. A GPU has a tile for each SM at a time, of as many
as the product has rows and columns, and no cut may suit all four products of a layer. There a few waves more are
allowed, and the fewest are taken that can be had near an even cut; the cost model knows what parts cost, and decides
whether to cut.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from weft.core.plan import Slice

TOLERANCE = 0.1  # of a step's tokens: how far from an even cut it is worth looking for another


@dataclass(frozen=True, slots=True)
class Waves:
    """What the products of a layer take for a step, in the time that one tile takes for each unit of its depth.

    rows: of a tile. units: tiles that are computed at a time. products: how many tiles lie side by side in a product,
    and its depth. slack: what two parts may take more than the whole, as a part of that. Raises ValueError for none.
    """

    rows: int
    units: int = 1
    products: tuple[tuple[int, int], ...] = ((1, 1),)
    slack: float = 0.0

    def __post_init__(self) -> None:
        if min(self.rows, self.units, *(min(one) for one in self.products)) < 1 or not 0 <= self.slack < 1:
            raise ValueError(f"{self}: a wave has rows, units and products, and the slack is from 0 to less than 1")

    def __call__(self, tokens: int) -> int:
        tiles = -(-tokens // self.rows)
        return sum(-(-tiles * beside // self.units) * depth for beside, depth in self.products)


def choose_strands(lengths: Sequence[int], waves: Waves, count: int, tolerance: float = TOLERANCE) -> tuple[int, ...]:
    """How many of the tokens of slices with these lengths each strand gets: `count` strands, or fewer where no cut is
    allowed. Raises ValueError as `choose_cut`."""
    left, strands = list(lengths), []
    for parts in range(count, 1, -1):
        cut = choose_cut(left, waves, tolerance, parts)
        if cut == sum(left):
            break
        strands.append(cut)
        left = _without(left, cut)
    return (*strands, sum(left))


def choose_cut(lengths: Sequence[int], waves: Waves, tolerance: float = TOLERANCE, parts: int = 2) -> int:
    """How many of the tokens of slices with these lengths the first strand of so many parts gets; all of them where no
    cut is allowed.

    Of those that take the fewest waves: the cut between two slices that is nearest to an even part, if there is one
    within the tolerance (so that no prompt is divided, whose second part would read the KV of the first again); else
    the one nearest to it. Raises ValueError for impossible arguments.
    """
    total = sum(lengths)
    if parts < 2 or not 0 <= tolerance <= 1 or min(lengths, default=0) < 1:
        raise ValueError(
            f"{lengths = }, {parts = } and {tolerance = }: slices have tokens, there are two parts or more, and a "
            "tolerance is from 0 to 1"
        )
    whole = waves(total)
    best, least = total, int(whole * waves.slack) + 1  # waves more than the whole
    for cut in _candidates(lengths, total, waves.rows, tolerance, parts):
        more = max(0, waves(cut) + waves(total - cut) - whole)
        if more < least:
            best, least = cut, more
        if more == 0:
            break
    return best


def divide(slices: Sequence[Slice], at: int) -> tuple[tuple[Slice, ...], tuple[Slice, ...]]:
    """The slices of the first `at` tokens and those of the rest, which may be none.

    A slice that lies across the cut becomes two: the second one reads the keys and values that the first one writes.
    Only the second one samples. Raises ValueError for a cut that leaves nothing to the first strand.
    """
    if not 0 < at <= sum(len(piece.tokens) for piece in slices):
        raise ValueError(f"{at = }; it must be from 1 to the step's tokens")
    first: list[Slice] = []
    rest: list[Slice] = []
    left = at
    for piece in slices:
        count = len(piece.tokens)
        if left >= count:
            first.append(piece)
        elif left > 0:
            head, tail = piece.tokens[:left], piece.tokens[left:]
            first.append(piece._replace(tokens=head, sample=None, next_token=tail[0]))
            rest.append(piece._replace(start=piece.start + left, tokens=tail))
        else:
            rest.append(piece)
        left -= count
    return tuple(first), tuple(rest)


def even_bounds(rows: int, ranks: int) -> tuple[int, ...]:
    """Rank r owns rows bounds[r] to bounds[r + 1]; no two ranks differ by more than one row."""
    return tuple(rank * rows // ranks for rank in range(ranks + 1))


def kept_bounds(bounds: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
    """The bounds once only the rows `kept`, in ascending order, go on: each stays with the rank that has its residual.

    Raises ValueError for rows in another order, or that are not there.
    """
    if any(low >= high for low, high in pairwise(kept)):
        raise ValueError("the rows to keep must be in ascending order, each of them once")
    if kept and not 0 <= kept[0] <= kept[-1] < bounds[-1]:
        raise ValueError(f"rows {kept[0]} to {kept[-1]} are to be kept; there are {bounds[-1]}")
    return tuple(bisect_left(kept, bound) for bound in bounds)


def _candidates(lengths: Sequence[int], total: int, rows: int, tolerance: float, parts: int) -> Iterator[int]:
    """Cuts that may be the best, the better first where they take as many waves: between slices within the tolerance;
    then an even one, and around it those that leave one side whole tiles. (Rows beyond a whole tile cost a tile, so
    that no cut between these takes fewer waves.) Two tiles further than the tolerance: a short step has few."""

    def off(cut: int) -> tuple[int, int]:
        return abs(parts * cut - total), cut  # the distance from an even part, times their number

    between = [end for end in accumulate(lengths) if end < total and off(end)[0] <= parts * tolerance * total]
    yield from sorted(between, key=off)
    even = (2 * total + parts - 1) // (2 * parts)  # to the nearest, halves down
    reach = 2 + int(tolerance * total / rows)
    tile, rest = even // rows, total % rows
    edges = [(tile + away) * rows + ahead for away in range(-reach, reach + 1) for ahead in {0, rest}]
    yield from sorted((cut for cut in {even, *edges} if 0 < cut < total), key=off)


def _without(lengths: Sequence[int], cut: int) -> list[int]:
    """The lengths of what is left of slices after their first `cut` tokens."""
    ends = [end - cut for end in accumulate(lengths) if end > cut]
    return [end - begin for begin, end in pairwise([0, *ends])]
