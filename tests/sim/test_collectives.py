"""Joining ranks: laws, and errors that name what there is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import ConfigError
from weft.sim.collectives import all_reduce_seconds, gather_seconds
from weft.sim.hardware import find_link, link_names

LINKS = st.sampled_from(link_names())
RANKS = st.sampled_from([2, 4, 8])
SIZES = st.floats(1, 1e10)


@settings(deadline=None)
@given(LINKS, SIZES)
def test_one_rank_has_nothing_to_join(name: str, size: float) -> None:
    assert all_reduce_seconds(find_link(name), 1, size) == gather_seconds(find_link(name), 1, size) == 0


@settings(deadline=None)
@given(LINKS, RANKS, SIZES, st.floats(1, 4))
def test_more_bytes_never_take_less(name: str, ranks: int, size: float, more: float) -> None:
    link = find_link(name)
    assert all_reduce_seconds(link, ranks, size * more) >= all_reduce_seconds(link, ranks, size) * (1 - 1e-9)


@settings(deadline=None)
@given(LINKS, RANKS, SIZES)
def test_every_rank_receives_what_it_lacks(name: str, ranks: int, size: float) -> None:
    """Each of the others' sums at least once, over its own link: a switch that adds up needs no more."""
    link = find_link(name)
    assert all_reduce_seconds(link, ranks, size) >= size * (ranks - 1) / ranks / link.bandwidth
    assert gather_seconds(link, ranks, size) >= size * (ranks - 1) / ranks / link.bandwidth


@settings(deadline=None)
@given(LINKS, RANKS, SIZES)
def test_without_a_switch_that_adds_up_all_sums_cross_the_links(name: str, ranks: int, size: float) -> None:
    """Everything to everybody, or a part to each and back again: the less of both, at most at the link's bandwidth."""
    link = find_link(name)
    if not link.collective.multicast and not link.large.multicast:
        least = size * min(ranks - 1, 2 * (ranks - 1) / ranks) / link.bandwidth
        assert all_reduce_seconds(link, ranks, size) >= least


@settings(deadline=None)
@given(LINKS, RANKS, SIZES, st.floats(0.1, 1))
def test_a_quantised_gather_saves_of_the_second_phase_only(name: str, ranks: int, size: float, part: float) -> None:
    link = find_link(name)
    whole, less = all_reduce_seconds(link, ranks, size), all_reduce_seconds(link, ranks, size, part)
    assert gather_seconds(link, ranks, 0.0) <= less <= whole
    assert less >= whole / 2, "sums have their 16 bits"


def test_a_quantised_gather_saves_a_quarter_of_the_traffic_with_eight_bits() -> None:
    """Without a switch that adds up, of what a ring carries; where it does, of the rank's own part alone."""
    ring, switch = find_link("nvlink3"), find_link("nvlink4")
    assert all_reduce_seconds(ring, 8, 1e9, 0.5) / all_reduce_seconds(ring, 8, 1e9) == pytest.approx(0.75, rel=0.01)
    within = switch.collective.limit
    assert 0.9 < all_reduce_seconds(switch, 8, within, 0.5) / all_reduce_seconds(switch, 8, within) < 1.0


def test_large_sizes_are_left_to_nccl() -> None:
    vllm, nccl = find_link("nvlink4", "vllm"), find_link("nvlink4", "nccl")
    beyond = 2 * vllm.collective.limit
    assert all_reduce_seconds(vllm, 4, beyond) == all_reduce_seconds(nccl, 4, beyond)
    assert all_reduce_seconds(vllm, 4, 1e4) < all_reduce_seconds(nccl, 4, 1e4)


def test_errors_name_what_there_is() -> None:
    with pytest.raises(ConfigError, match="'nvlink9'; there are nvlink3"):
        find_link("nvlink9")
    with pytest.raises(ConfigError, match="'mpi' on nvlink4; there are vllm"):
        find_link("nvlink4", "mpi")
    with pytest.raises(ConfigError, match="16 ranks on NVLink 4 with NVSwitch: it joins 1 to 8"):
        all_reduce_seconds(find_link("nvlink4"), 16, 1e6)
