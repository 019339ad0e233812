"""How long the ranks of a replica take to join what they computed, by size, number of ranks and link.

An all-reduce takes the quickest of: every rank reading everything (one phase), reducing and gathering a part each (two
phases, the traffic of a ring), and the switch adding up (multicast). All times are for 16-bit elements given as bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from weft.errors import ConfigError
from weft.sim.hardware import CollectiveFit, Link


def all_reduce_seconds(link: Link, ranks: int, size: Any, gathered: float = 1.0) -> Any:
    """size: bytes that each rank holds; a number or an array. One rank takes no time. gathered: the part of them that
    the second phase carries, less than 1 where sums are quantised before it. Raises ConfigError for more ranks than the
    link joins."""
    if ranks == 1:
        return size * 0.0
    check_ranks(link, ranks)
    found = _quickest(link.collective, link.bandwidth, ranks, size, gathered)
    limit = link.collective.limit
    if not limit:
        return found
    return np.where(size > limit, _quickest(link.large, link.bandwidth, ranks, size, gathered), found)


def _quickest(fit: CollectiveFit, peak: float, ranks: int, size: Any, gathered: float) -> Any:
    bandwidth = peak * fit.bandwidth
    launch = fit.launch + fit.rank * (ranks - 2)
    both = (1.0 + gathered) * size * (ranks - 1) / ranks
    found = np.minimum(launch + size * (ranks - 1) / bandwidth, launch + fit.second + both / bandwidth)
    if fit.multicast:
        # A rank sends all that it holds and its part of the sums, which is more than it receives.
        switched = size * (ranks + gathered) / ranks / (peak * fit.multicast)
        found = np.minimum(found, launch + fit.second + switched)
    return found


def gather_seconds(link: Link, ranks: int, size: Any) -> Any:
    """All-gather, or reduce-scatter. size: bytes of the whole that each rank ends up with, or begins with."""
    if ranks == 1:
        return size * 0.0
    check_ranks(link, ranks)
    fit = link.collective
    launch = fit.launch + fit.rank * (ranks - 2)
    return launch + size * (ranks - 1) / ranks / (link.bandwidth * fit.bandwidth)


def check_ranks(link: Link, ranks: int) -> None:
    if not 1 <= ranks <= link.ranks:
        raise ConfigError(f"{ranks} ranks on {link.title}: it joins 1 to {link.ranks}")
