"""What 4 bits cost in a block: the estimate from gradients against the KL divergence that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from weft.comet import reference
from weft.comet.calibrate import Job, Model, Settings, Text, make_plans, through
from weft.comet.forward import SITES, Linears, Tensors, plain_linears, run_layer
from weft.comet.layer import LayerPlan, Method
from weft.comet.outer import HEAD_SITE, as_it_was, float_head
from weft.comet.sensitivity import Pulled, block_costs, last_gradients, pull_back
from weft.comet.weights import Rounding

TOKENS = torch.randint(0, 50, (8, 40), generator=torch.Generator().manual_seed(5))


def planned(model: Model, folder: Path) -> list[LayerPlan]:
    settings = Settings(Method(), Rounding(), head_bits=4)
    with torch.no_grad():
        return make_plans(Job(model, Text(TOKENS, TOKENS[:1]), settings, folder, lambda _: None))


def logs_of(model: Model, changed: Callable[[int, Linears], Linears]) -> torch.Tensor:
    outer = as_it_was(model.rest())
    hidden = outer.embed(TOKENS)
    for index in range(model.shapes.layers):
        tensors = model.layer(index)
        hidden = through(hidden, tensors, model, index, changed(index, plain_linears(tensors)))
    return (outer.normalised(hidden, model.shapes.eps) @ float_head(model.rest()).T).log_softmax(dim=-1)


def pulled_of(model: Model) -> Pulled:
    """x and p of the first layer."""
    outer, shapes = as_it_was(model.rest()), model.shapes
    kept = [outer.embed(TOKENS)]
    for index in range(shapes.layers):
        tensors = model.layer(index)
        kept.append(through(kept[-1], tensors, model, index, plain_linears(tensors)))
    head = float_head(model.rest())
    gradients, _ = last_gradients(kept[-1], lambda rows: outer.normalised(rows, shapes.eps), head)
    for index in reversed(range(shapes.layers)):
        tensors = model.layer(index)

        def run(hidden: torch.Tensor, linears: Linears, tensors: Tensors = tensors, index: int = index) -> torch.Tensor:
            return run_layer(hidden, tensors, shapes, shapes.windows[index], model.rotation, linears)

        pulled, gradients = pull_back(tensors, run, kept[index], gradients)
    return pulled


@pytest.mark.parametrize("site", [*SITES])
def test_pulled_back_gradients_tell_what_small_errors_do_to_the_drawn_tokens(
    model_of: Callable[..., Model], site: str
) -> None:
    model = model_of()
    generator = torch.Generator().manual_seed(1)
    errors: dict[str, torch.Tensor] = {}

    def changed(index: int, plain: Linears) -> Linears:
        def apply(at: str, x: torch.Tensor) -> torch.Tensor:
            if (index, at) != (0, site):
                return plain(at, x)
            errors[site] = 1e-3 * x.abs().mean() * torch.randn(x.shape, generator=generator)
            return plain(at, x + errors[site])

        return apply

    exact, found = logs_of(model, lambda _, plain: plain), logs_of(model, changed)
    draws = torch.Generator().manual_seed(0)  # as the gradients have them
    drawn = torch.stack([torch.multinomial(logs.exp(), 1, generator=draws) for logs in exact])
    change = (found - exact).gather(2, drawn).double().sum(dim=(1, 2))
    _, p = pulled_of(model)[site]
    estimate = (p * errors[site]).double().sum(dim=-1).view(len(TOKENS), -1).sum(dim=1)
    assert torch.allclose(estimate, change, rtol=0.05, atol=0.02 * float(change.abs().max()))


def test_block_costs_are_those_of_4_bit_errors() -> None:
    x, p = torch.randn(50, 256), torch.randn(50, 256)
    lost = x - reference.quantise_rows(x, 0, exact_a4=True).dequantised()
    expected = [float((p * lost)[:, part].sum(dim=1).square().mean() / 2) for part in (slice(128), slice(128, 256))]
    assert block_costs(x, p).tolist() == pytest.approx(expected, rel=1e-4)


def test_gradients_of_the_head_are_those_of_its_input() -> None:
    # With a norm that does nothing, both gradients of log p(y) are W (onehot - p).
    hidden, head = torch.randn(2, 9, 16), torch.randn(40, 16)
    gradients, (x, pulled) = last_gradients(hidden, lambda rows: rows * 1.0, head)
    assert torch.equal(x, hidden.flatten(0, 1))
    assert torch.allclose(gradients.flatten(0, 1), pulled)
    p = (x @ head.T).softmax(dim=-1)
    candidates = (torch.eye(40) - p[:, None]) @ head  # [R, y, D]
    assert ((candidates - pulled[:, None]).abs().amax(dim=-1).amin(dim=-1) < 1e-4).all()


def test_a_silent_site_costs_nothing(tmp_path: Path, model_of: Callable[..., Model]) -> None:
    model = model_of()
    model.layer(1)["mlp.down_proj.weight"][:] = 0  # type: ignore[index]
    plans = planned(model, tmp_path)
    assert sum(plans[1].costs["mlp"].nats) == 0
    assert sum(plans[0].costs["mlp"].nats) > 0
    assert len(plans[2].costs[HEAD_SITE].nats) == 1
