"""One layer's plan, from its statistics, and the layer's weights as the plan wants them; nothing is rounded yet.

Where a site's scaling and order end up:

    attention, mlp   scaling in the norm's gain; order applied to the norm's output as it is quantised
    output           scaling in the rows of v_proj (the query heads that share a value head are scaled alike), where
                     also a Hadamard transform of each head is hidden; whole heads are put in order when quantised
    keys             scaled in the rows of k_proj, and back in those of q_proj: for a 4-bit KV cache
    down             scaling in the rows of up_proj, order in the rows of gate_proj and up_proj: free
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear

from weft.comet.fmpq import BlockCosts, Statistics, balance, block_errors, leading, paper_outliers
from weft.comet.forward import INPUT_NORM, MLP_NORM, Q_NORM, SITES, Shapes, Tensors, joined
from weft.comet.hadamard import hadamard
from weft.comet.packing import BLOCK
from weft.comet.reference import InputForm, rotate

Q_PROJ, K_PROJ, V_PROJ, O_PROJ = (f"self_attn.{letter}_proj" for letter in "qkvo")
GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
NORMS = {"attention": INPUT_NORM, "mlp": MLP_NORM}


@dataclass(frozen=True, slots=True)
class Method:
    """name: fmpq or paper. threshold: of the paper's method, times the median. hadamard: whether it may be used."""

    name: str = "fmpq"
    budget: float = 0.1
    hadamard: bool = True
    threshold: float = 6.0


@dataclass(frozen=True, slots=True)
class SitePlan:
    """scaling: d, by which the input's channels are divided, float32 [K] in the model's order. order: int64 [K], of the
    scaled channels. hadamard: the blocks of 4 bits are transformed as they are quantised."""

    scaling: torch.Tensor
    order: torch.Tensor
    hadamard: bool


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """sites: by name. value_transform: v_proj and o_proj hide a Hadamard transform of each head. key_scaling: by which
    k_proj's outputs are divided, and q_proj's multiplied, float32 [kv_heads * head_dim]. costs: for `allot`; blocks: of
    the paper's method, which needs no allotment."""

    sites: dict[str, SitePlan]
    value_transform: bool
    key_scaling: torch.Tensor
    costs: dict[str, BlockCosts]
    blocks: dict[str, int]


@dataclass(frozen=True, slots=True)
class PreparedSite:
    """A site whose weight [N, K] is in the order of the prepared input, float32; `form.permutation` is None where the
    order is hidden in the weights before it."""

    form: InputForm
    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PreparedLayer:
    """sites by name, and the layer's other tensors (norms), changed so that the whole computes what it did."""

    sites: dict[str, PreparedSite]
    norms: dict[str, torch.Tensor]


def plan_layer(tensors: Tensors, statistics: Mapping[str, Statistics], shapes: Shapes, method: Method) -> LayerPlan:
    """Decide scalings, orders and transforms of one layer; the split into 4 and 8 bits comes later, for all layers."""
    if method.name == "paper":
        return _paper_plan(statistics, shapes, method)
    hides = method.hadamard and _power_of_two(shapes.head_dim)
    sites = {}
    for site in SITES:
        seen, (weight, _) = statistics[site], joined(tensors, site)
        if site in NORMS:
            scaling = storable_balance(tensors[NORMS[site]], seen.squares, weight)
        else:
            shared = (shapes.kv_heads, shapes.head_dim) if site == "output" else None
            scaling = balance(seen.squares, weight.square().sum(dim=0), shared)
        sites[site] = plan_site(seen, weight, scaling, method, shapes.head_dim if site == "output" and hides else None)
    return LayerPlan(sites, hides, key_scaling(tensors, statistics["attention"].rows, shapes), {}, {})


def plan_site(
    seen: Statistics, weight: torch.Tensor, scaling: torch.Tensor, method: Method, heads: int | None = None
) -> SitePlan:
    """Order and transform of one site with weight [N, K].

    heads: the size of heads that a Hadamard transform is hidden in already, after which the channels of a head are all
    alike: only whole heads can be put in order, and no other transform is needed.
    """
    carried = seen.squares * weight.square().sum(dim=0)
    if heads is not None:
        carried = carried.view(-1, heads).mean(dim=1).repeat_interleave(heads)
    plan = SitePlan(scaling, carried.argsort(descending=True, stable=True), hadamard=False)
    if not method.hadamard or heads is not None:
        return plan
    rows, weight = as_planned(seen.rows, weight, plan)
    losses = [block_errors(rows, weight, rotated=rotated).sum() for rotated in (False, True)]
    return replace(plan, hadamard=bool(losses[1] < losses[0]))


def as_planned(
    x: torch.Tensor, weight: torch.Tensor, plan: SitePlan, heads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [R, K] in the plan's form without outlier blocks; what multiplies them [N, K], so that products stay."""
    x, weight = x / plan.scaling, weight * plan.scaling
    if heads is not None:
        x, weight = hadamard(x, heads), hadamard(weight, heads) / heads
    x, weight = x[:, plan.order], weight[:, plan.order]
    return (hadamard(x, BLOCK), hadamard(weight, BLOCK) / BLOCK) if plan.hadamard else (x, weight)


def key_scaling(tensors: Tensors, rows: torch.Tensor, shapes: Shapes) -> torch.Tensor:
    """What keys are divided by and queries multiplied, so that 4-bit keys lose least: as `balance`, with keys for the
    input and queries for the weight. Both members of a rotated pair, and all query heads of a key head, are scaled
    alike. Ones where q and k are normalised after their projections."""
    kv_heads, head_dim = shapes.kv_heads, shapes.head_dim
    if Q_NORM in tensors:
        return torch.ones(kv_heads * head_dim)
    weight, bias = joined(tensors, "attention")
    squares = linear(rows, weight, bias).square().mean(dim=0).view(-1, 2, head_dim // 2).mean(dim=1)
    queries = squares[: shapes.heads].view(kv_heads, -1, head_dim // 2).mean(dim=1)
    keys = squares[shapes.heads : shapes.heads + kv_heads]
    by_head = [balance(key, query) for key, query in zip(keys, queries, strict=True)]
    return torch.stack(by_head)[:, None].expand(-1, 2, -1).flatten()


def storable_balance(norm: torch.Tensor, squares: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The balance of what a norm makes, for the weight [N, K] that reads it, as the norm's gain can hold it."""
    return storable(norm, balance(squares, weight.square().sum(dim=0)))


def storable(norm: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
    """The scaling nearest to `scaling` with which the norm's gain, divided by it, is a number of the gain's own dtype:
    so that a bfloat16 checkpoint loses nothing by it."""
    gain = norm.float()
    stored = (gain / scaling).to(norm.dtype).float()
    usable = (stored != 0) & torch.isfinite(stored)
    return torch.where(usable, gain / stored, 1.0)


def _paper_plan(statistics: Mapping[str, Statistics], shapes: Shapes, method: Method) -> LayerPlan:
    planned = {site: paper_site(statistics[site], method) for site in SITES}
    sites = {site: plan for site, (plan, _) in planned.items()}
    blocks = {site: count for site, (_, count) in planned.items()}
    return LayerPlan(sites, False, torch.ones(shapes.kv_heads * shapes.head_dim), {}, blocks)


def paper_site(seen: Statistics, method: Method) -> tuple[SitePlan, int]:
    """The paper's order of one site, nothing scaled, and how many blocks keep 8 bits."""
    order, blocks = paper_outliers(seen.largest, method.threshold)
    return SitePlan(torch.ones_like(seen.largest), order, hadamard=False), blocks


def prepare_layer(
    tensors: Tensors, plan: LayerPlan, chosen: Mapping[str, tuple[int, ...]], shapes: Shapes
) -> PreparedLayer:
    """The layer in the plan's form. chosen: the blocks (in the plan's order) of each site that keep 8 bits."""
    new = {name: tensor.float().clone() for name, tensor in tensors.items()}
    orders = {site: leading(plan.sites[site].order, chosen[site]) for site in SITES}
    for site, norm in NORMS.items():
        new[norm] /= plan.sites[site].scaling
        for name in SITES[site]:
            new[f"{name}.weight"] *= plan.sites[site].scaling
    _scale_keys(new, plan.key_scaling, shapes)
    _scale_values(new, plan.sites["output"].scaling, plan.value_transform, shapes)
    _scale_and_order_inner(new, plan.sites["down"].scaling, orders["down"])
    sites = {}
    for site in SITES:
        order = None if site == "down" else orders[site]
        sites[site] = prepare_site(*joined(new, site), order, len(chosen[site]), plan.sites[site].hadamard)
    norms = {name: new[name].to(tensor.dtype) for name, tensor in tensors.items() if name.endswith("norm.weight")}
    return PreparedLayer(sites, norms)


def prepare_site(
    weight: torch.Tensor, bias: torch.Tensor | None, order: torch.Tensor | None, outlier_blocks: int, transform: bool
) -> PreparedSite:
    """A scaled weight [N, K] in the order [K] of the prepared input, None where it is in it already."""
    permutation = None if order is None else order.int()
    form = InputForm(weight.shape[1], permutation, outlier_blocks, transform)
    return PreparedSite(form, prepare_weight(weight if order is None else weight[:, order], form), bias)


def prepare_weight(weight: torch.Tensor, form: InputForm) -> torch.Tensor:
    """[N, K] in the order of the form -> what undoes the form's transform of the input."""
    rotated = rotate(weight, form)
    if not form.hadamard:
        return rotated
    kept = form.outlier_blocks * BLOCK
    return torch.cat((rotated[:, :kept], rotated[:, kept:] / BLOCK), dim=1)


def _scale_keys(new: dict[str, torch.Tensor], scaling: torch.Tensor, shapes: Shapes) -> None:
    queries = scaling.view(shapes.kv_heads, 1, -1).expand(-1, shapes.heads // shapes.kv_heads, -1).flatten()
    for name, factor in ((Q_PROJ, queries), (K_PROJ, 1 / scaling)):
        new[f"{name}.weight"] = new[f"{name}.weight"] * factor[:, None]
        if f"{name}.bias" in new:
            new[f"{name}.bias"] = new[f"{name}.bias"] * factor


def _scale_values(new: dict[str, torch.Tensor], scaling: torch.Tensor, transform: bool, shapes: Shapes) -> None:
    """Divide value channels in v_proj, multiply the columns of o_proj, and hide each head's transform in both."""
    head_dim = shapes.head_dim
    by_head = scaling.view(shapes.kv_heads, -1, head_dim)[:, 0]  # the same for all query heads of a value head
    rows = by_head.reshape(-1)
    value, output = f"{V_PROJ}.weight", f"{O_PROJ}.weight"
    new[value] = new[value] / rows[:, None]
    new[output] = new[output] * scaling
    bias = f"{V_PROJ}.bias"
    if bias in new:
        new[bias] = new[bias] / rows
    if transform:
        new[value] = hadamard(new[value].T, head_dim).T.contiguous()
        new[output] = hadamard(new[output], head_dim) / head_dim
        if bias in new:
            new[bias] = hadamard(new[bias], head_dim)


def _scale_and_order_inner(new: dict[str, torch.Tensor], scaling: torch.Tensor, order: torch.Tensor) -> None:
    new[f"{UP}.weight"] = new[f"{UP}.weight"] / scaling[:, None]
    new[f"{DOWN}.weight"] = (new[f"{DOWN}.weight"] * scaling)[:, order]
    if f"{UP}.bias" in new:
        new[f"{UP}.bias"] = new[f"{UP}.bias"] / scaling
    for name in (f"{GATE}.weight", f"{UP}.weight", f"{GATE}.bias", f"{UP}.bias"):
        if name in new:
            new[name] = new[name][order]


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
