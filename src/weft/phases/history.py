"""What `--partition auto` remembers of the past, and for how long. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from weft.phases.observations import Arrived, Stepped

# Kept: steps of one share and size, and in all; arrivals.
STEPS_EACH, STEPS_MOST, ARRIVALS = 12, 240, 48
# Steps of one kind that are kept are so far apart: a thousand of a moment would tell of that moment only.
SPACING = 0.05
# Arrivals are kept for so many seconds; all of the last ones, since some that come at once are no rate yet.
RATE_SECONDS, RATE_LEAST = 20.0, 1.0
# Tokens of an answer, before there was one.
UNKNOWN_OUTPUT = 100.0


def kept(before: Iterable[Stepped], new: Iterable[Stepped]) -> tuple[Stepped, ...]:
    """Steps of each share and size, so that what is known of one share outlives a long stay at another, and that what
    is known of small steps and of large ones is of some time, not of one moment."""
    groups: dict[tuple[float, int, int], list[Stepped]] = {}
    for one in before:
        groups.setdefault(_kind(one), []).append(one)
    for one in new:
        group = groups.setdefault(_kind(one), [])
        if not group or one.at >= group[-1].at + SPACING:
            group.append(one)
    newest = [one for group in groups.values() for one in group[-STEPS_EACH:]]
    newest.sort(key=lambda one: one.at)
    return tuple(newest[-STEPS_MOST:])


def _kind(one: Stepped) -> tuple[float, int, int]:
    """The share, and the sizes of both parts to a factor of two."""
    return round(one.share, 2), one.prompt.bit_length(), one.output.bit_length()


def recent(arrivals: Sequence[Arrived], now: float) -> list[Arrived]:
    """Those that tell how often requests come now: the last few, and all of the last moment, where it has more."""
    moment = sum(now - one.at <= RATE_LEAST for one in arrivals)
    return [one for one in arrivals[-max(ARRIVALS, moment) :] if now - one.at <= RATE_SECONDS]


def rate(arrivals: Sequence[Arrived], now: float) -> float:
    """Requests/s of those that are kept."""
    return (len(arrivals) - 1) / max(now - arrivals[0].at, RATE_LEAST) if arrivals else 0.0


def likely_output(ended: Sequence[int], under_way: Sequence[int]) -> float:
    """Mean tokens of an answer: of those that ended, and of those that are longer than these already. Answers that get
    longer show in the one long before they show in the other."""
    usual = sum(ended) / len(ended) if ended else UNKNOWN_OUTPUT
    longer = [one for one in under_way if one > usual]
    return (usual * len(ended) + sum(longer)) / (len(ended) + len(longer)) if ended or longer else usual
