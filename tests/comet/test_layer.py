"""A prepared layer computes what the layer computed, whatever the plan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from weft.comet import reference
from weft.comet.calibrate import through
from weft.comet.fmpq import block_errors
from weft.comet.forward import SITES, Linears, plain_linears
from weft.comet.layer import (
    Method,
    PreparedLayer,
    as_planned,
    key_scaling,
    plan_layer,
    prepare_layer,
    storable,
)
from weft.comet.outer import as_it_was
from weft.comet.packing import BLOCK
from weft.comet.watch import Watch

from .conftest import FAMILIES, make_model, tiny_config


def exactly(prepared: PreparedLayer) -> Linears:
    """The prepared layer's linears in float."""

    def apply(site: str, x: torch.Tensor) -> torch.Tensor:
        one = prepared.sites[site]
        return linear(reference.prepare(x, one.form), one.weight, one.bias)

    return apply


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.booleans(), st.data())
def test_any_split_of_any_family_preserves_the_layer(family: str, rotated: bool, data: st.DataObject) -> None:
    _, config = tiny_config(family)
    model = make_model(config)
    tensors = model.layer(0)
    tokens = torch.randint(0, config.vocabulary, (2, 11), generator=torch.Generator().manual_seed(3))
    before = as_it_was(model.rest()).embed(tokens)
    watch = Watch(plain_linears(tensors), tokens.numel())
    after = through(before, tensors, model, 0, watch)
    plan = plan_layer(tensors, watch.statistics(), config, Method(hadamard=rotated))
    assert plan.value_transform == rotated
    chosen = {
        site: tuple(sorted(data.draw(st.sets(st.integers(0, len(plan.sites[site].order) // BLOCK - 1)))))
        for site in SITES
    }
    prepared = prepare_layer(tensors, plan, chosen, config)
    found = through(before, prepared.norms, model, 0, exactly(prepared))
    assert torch.allclose(found, after, rtol=1e-3, atol=1e-3 * float(after.abs().mean()))
    for site, one in prepared.sites.items():
        assert one.form.outlier_blocks == len(chosen[site])


def test_balance_takes_outliers_out_of_the_inputs() -> None:
    _, config = tiny_config()
    model = make_model(config)
    tensors = model.layer(0)
    tokens = torch.randint(0, config.vocabulary, (4, 32), generator=torch.Generator().manual_seed(3))
    watch = Watch(plain_linears(tensors), tokens.numel())
    through(as_it_was(model.rest()).embed(tokens), tensors, model, 0, watch)
    statistics = watch.statistics()
    plan = plan_layer(tensors, statistics, config, Method())
    for site in ("attention", "mlp"):
        spread = statistics[site].squares.sqrt()
        balanced = spread / plan.sites[site].scaling
        assert spread.max() / spread.median() > 10
        assert balanced.max() / balanced.median() < 6


def test_a_plan_orders_by_what_channels_carry() -> None:
    _, config = tiny_config()
    model = make_model(config)
    tensors = model.layer(0)
    tokens = torch.randint(0, config.vocabulary, (4, 32), generator=torch.Generator().manual_seed(3))
    watch = Watch(plain_linears(tensors), tokens.numel())
    through(as_it_was(model.rest()).embed(tokens), tensors, model, 0, watch)
    statistics = watch.statistics()
    plan = plan_layer(tensors, statistics, config, Method()).sites["down"]
    carried = statistics["down"].squares * tensors["mlp.down_proj.weight"].square().sum(dim=0)
    assert (carried[plan.order].diff() <= 0).all()
    x, weight = as_planned(statistics["down"].rows, tensors["mlp.down_proj.weight"], plan)
    errors = block_errors(x, weight, rotated=False)
    assert errors[0] > 4 * errors[1]
    assert torch.allclose(x @ weight.T, statistics["down"].rows @ tensors["mlp.down_proj.weight"].T, atol=1e-3)


def test_the_papers_plan_only_permutes() -> None:
    _, config = tiny_config()
    model = make_model(config)
    tensors = model.layer(0)
    tokens = torch.randint(0, config.vocabulary, (4, 32), generator=torch.Generator().manual_seed(3))
    watch = Watch(plain_linears(tensors), tokens.numel())
    before = as_it_was(model.rest()).embed(tokens)
    after = through(before, tensors, model, 0, watch)
    plan = plan_layer(tensors, watch.statistics(), config, Method(name="paper"))
    assert plan.blocks["mlp"] == 1
    prepared = prepare_layer(tensors, plan, {site: tuple(range(count)) for site, count in plan.blocks.items()}, config)
    assert all(torch.equal(prepared.norms[name], tensors[name]) for name in prepared.norms)
    assert not any(one.form.hadamard for one in prepared.sites.values())
    found = through(before, prepared.norms, model, 0, exactly(prepared))
    assert torch.allclose(found, after, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_balanced_gains_lose_nothing_in_their_own_dtype(dtype: torch.dtype) -> None:
    norm = torch.randn(BLOCK).to(dtype)
    norm[3] = 0
    wanted = torch.exp(torch.randn(BLOCK))
    scaling = storable(norm, wanted)
    stored = norm.float() / scaling
    assert torch.allclose(stored.to(dtype).float(), stored, rtol=1e-6)
    assert torch.allclose(scaling[norm != 0], wanted[norm != 0], rtol=0.01)
    assert scaling[3] == 1


def test_keys_and_queries_are_scaled_towards_each_other() -> None:
    _, config = tiny_config("biased llama")
    model = make_model(config)
    tensors = dict(model.layer(0))
    head_dim = config.head_dim
    weight = tensors["self_attn.k_proj.weight"].clone()
    weight[[3, 3 + head_dim // 2]] *= 30  # a rotated pair of the first key head
    tensors["self_attn.k_proj.weight"] = weight
    rows = torch.randn(200, config.hidden_size, generator=torch.Generator().manual_seed(0))
    scaling = key_scaling(tensors, rows, config).view(config.kv_heads, head_dim)
    assert torch.equal(scaling[:, : head_dim // 2], scaling[:, head_dim // 2 :])
    assert scaling[0, 3] > 3 * scaling[0].median()
    assert scaling[1].max() < 3 * scaling[1].median()
