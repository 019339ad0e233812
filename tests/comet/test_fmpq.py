"""Balance, order and allotment: what each promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.comet import reference
from weft.comet.fmpq import BlockCosts, allot, balance, block_errors, leading, paper_outliers
from weft.comet.packing import BLOCK


def test_scaling_a_channel_up_and_its_column_down_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(50, 256, generator=generator), torch.randn(9, 256, generator=generator)
    strange = torch.exp(2 * torch.randn(256, generator=generator))

    def balanced(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        d = balance(rows.square().mean(dim=0), weight.square().sum(dim=0))
        return rows / d

    ratio = balanced(rows * strange, weight / strange) / balanced(rows, weight)
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-4)


def test_no_other_scaling_gives_a_smaller_bound() -> None:
    generator = torch.Generator().manual_seed(1)
    squares, columns = torch.rand(128, generator=generator) ** 3, torch.rand(128, generator=generator) ** 3

    def bound(d: torch.Tensor) -> float:
        return float((squares / d**2).sum() * (columns * d**2).sum())

    best = bound(balance(squares, columns))
    for _ in range(20):
        assert best <= bound(balance(squares, columns) * torch.exp(0.3 * torch.randn(128, generator=generator)))
    assert best < 0.9 * bound(torch.ones(128))


def test_query_heads_that_share_a_value_head_are_scaled_alike() -> None:
    kv_heads, group, head_dim = 2, 3, 4
    d = balance(torch.rand(24) + 0.1, torch.rand(24) + 0.1, (kv_heads, head_dim)).view(kv_heads, group, head_dim)
    assert torch.equal(d, d[:, :1].expand_as(d))
    assert len(d.unique()) == kv_heads * head_dim


def test_dead_channels_are_let_be() -> None:
    d = balance(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert d[:2].tolist() == [1, 1]
    assert balance(torch.zeros(3), torch.zeros(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("rotated", [False, True])
def test_block_errors_are_the_errors_of_the_outputs(rotated: bool) -> None:
    rows, weight = torch.randn(20, 384), torch.randn(7, 384)
    errors = block_errors(rows, weight, rotated=rotated)
    for block in range(3):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        form = reference.InputForm(BLOCK, None, 0, rotated)
        prepared = reference.prepare(rows[:, part], form)
        stored = reference.quantise_rows(prepared, 0, exact_a4=True).dequantised()
        column = reference.prepare(weight[:, part], form) / (BLOCK if rotated else 1)
        expected = ((stored - prepared) @ column.T).square().sum(dim=1).mean()
        assert float(errors[block]) == pytest.approx(float(expected), rel=1e-3)


costs = st.builds(
    lambda errors, outputs: BlockCosts(tuple(errors), outputs),
    st.lists(st.floats(0, 100), min_size=1, max_size=3),
    st.sampled_from([1, 2, 5]),
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), costs, min_size=1), st.floats(0, 1))
def test_the_allotment_keeps_the_budget_and_comes_near_the_best(sites: dict[str, BlockCosts], budget: float) -> None:
    whole = sum(len(one.nats) * one.outputs for one in sites.values())
    items = [(name, block) for name, one in sites.items() for block in range(len(one.nats))]

    def spent(chosen: set[tuple[str, int]]) -> int:
        return sum(sites[name].outputs for name, _ in chosen)

    def gained(chosen: set[tuple[str, int]]) -> float:
        return sum(sites[name].nats[block] for name, block in chosen)

    ours = {(name, block) for name, blocks in allot(sites, budget).items() for block in blocks}
    limit = budget * whole * (1 + 1e-6)
    assert spent(ours) <= limit
    subsets = itertools.chain.from_iterable(itertools.combinations(items, count) for count in range(len(items) + 1))
    best = max(gained(set(subset)) for subset in subsets if spent(set(subset)) <= limit)
    # Greedy by gain per cost, with the last misfit passed over, falls short by less than the largest single gain.
    largest = max(gained({item}) for item in items)
    assert gained(ours) >= best - largest - 1e-6


def test_the_whole_budget_takes_all_and_none_takes_nothing() -> None:
    sites = {"a": BlockCosts((3.0, 2.0), 5), "b": BlockCosts((1.0,), 7)}
    assert allot(sites, 1.0) == {"a": (0, 1), "b": (0,)}
    assert allot(sites, 0.0) == {"a": (), "b": ()}
    assert allot(sites, 5 / 17) == {"a": (0,), "b": ()}


def test_gains_count_by_what_they_cost() -> None:
    sites = {"dear": BlockCosts((3.0,), 5), "cheap": BlockCosts((2.0, 2.0), 2)}
    assert allot(sites, 5 / 9) == {"dear": (), "cheap": (0, 1)}


def test_chosen_blocks_lead_and_the_others_keep_their_order() -> None:
    order = torch.randperm(4 * BLOCK)
    parts = leading(order, (1, 3)).view(4, BLOCK)
    assert torch.equal(parts, order.view(4, BLOCK)[[1, 3, 0, 2]])


def test_the_papers_outliers_fill_the_first_blocks() -> None:
    largest = torch.ones(384)
    largest[torch.arange(0, 384, 3)] = 50.0
    order, blocks = paper_outliers(largest, threshold=6)
    assert blocks == 1
    assert set(order[:128].tolist()) == set(range(0, 384, 3))
    assert paper_outliers(torch.ones(256), 6)[1] == 0
    largest[1] = 50.0
    assert paper_outliers(largest, 6)[1] == 2
