"""Where a step is cut into strands, and who owns which rows: pure functions of what every rank knows alike.

Kernels work in waves: rows up to a full wave cost as much as the full one, so that two halves may take a wave more than
the whole (tokenweave.md §3). A cut is allowed where they do not:

    waves(prefix) + waves(suffix) <= waves(whole)        waves(n) = ceil(n / wave)

With T = Q * wave + s, 0 < s <= wave, these are the cuts from q * wave + s to q * wave + wave for every q: all of them
where a wave is one row, only multiples of the wave where it divides T, and none within a step of a single wave.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

from weft.core.plan import Slice

TOLERANCE = 0.1  # of a step's tokens: how far from the middle a cut between two slices is worth more than even strands


def waves(tokens: int, wave: int) -> int:
    return -(-tokens // wave)


def choose_strands(lengths: Sequence[int], wave: int, count: int, tolerance: float = TOLERANCE) -> tuple[int, ...]:
    """How many of the tokens of slices with these lengths each strand gets: `count` strands, or fewer where no cut is
    allowed. Raises ValueError as `choose_cut`."""
    left, strands = list(lengths), []
    for parts in range(count, 1, -1):
        cut = choose_cut(left, wave, tolerance, parts)
        if cut == sum(left):
            break
        strands.append(cut)
        left = _without(left, cut)
    return (*strands, sum(left))


def choose_cut(lengths: Sequence[int], wave: int, tolerance: float = TOLERANCE, parts: int = 2) -> int:
    """How many of the tokens of slices with these lengths the first strand of so many parts gets; all of them where no
    cut is allowed.

    The cut between two slices that is nearest to an even part, if one is allowed within the tolerance (so that no
    prompt is divided, whose second part would read the KV of the first again); else the allowed one nearest to it.
    wave: rows that the kernels compute at a time. Raises ValueError for impossible arguments.
    """
    total = sum(lengths)
    if wave < 1 or parts < 2 or not 0 <= tolerance <= 1 or min(lengths, default=0) < 1:
        raise ValueError(
            f"{lengths = }, {wave = }, {parts = } and {tolerance = }: slices have tokens, a wave has rows, there are "
            "two parts or more, and a tolerance is from 0 to 1"
        )
    between = [end for end in accumulate(lengths) if end < total and _allowed(end, total, wave)]
    nearest = min(between, key=lambda end: (_off(end, total, parts), end), default=0)
    if nearest and _off(nearest, total, parts) <= parts * tolerance * total:
        return nearest
    return _nearest_allowed(total, wave, parts)


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


def _allowed(cut: int, total: int, wave: int) -> bool:
    return waves(cut, wave) + waves(total - cut, wave) <= waves(total, wave)


def _off(cut: int, total: int, parts: int) -> int:
    """The distance from an even part, times their number."""
    return abs(parts * cut - total)


def _nearest_allowed(total: int, wave: int, parts: int) -> int:
    rest = total - (waves(total, wave) - 1) * wave
    even = (2 * total + parts - 1) // (2 * parts)  # to the nearest, halves down
    begin = (even - 1) // wave * wave  # of the wave that row `even - 1` is in
    candidates = [
        min(max(even, start + rest), start + wave) for start in (begin - wave, begin, begin + wave) if start >= 0
    ]
    inside = [cut for cut in candidates if 0 < cut < total and _allowed(cut, total, wave)]
    return min(inside, key=lambda cut: (_off(cut, total, parts), cut), default=total)


def _without(lengths: Sequence[int], cut: int) -> list[int]:
    """The lengths of what is left of slices after their first `cut` tokens."""
    ends = [end - cut for end in accumulate(lengths) if end > cut]
    return [end - begin for begin, end in pairwise([0, *ends])]
