"""From a float model to a quantised one, layer after layer: never more than one layer of weights in memory.

    pass 1   the calibration text through the float layers; each layer's plan (scalings, orders, block costs) is kept
    then     the 8-bit blocks are allotted over the whole model
    pass 2   the text through the layers again: a layer is put into its plan's form, its inputs are seen as the layers
             before it, already quantised, make them; its weights are rounded, and the text goes on through the result

What is done lies in the work folder, one file a layer: a run that was stopped goes on where it was, and ends with the
same bytes. The held-out text goes along in pass 2, through the float and the quantised layers side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from weft.comet import reference
from weft.comet.checkpoint import (
    FmpqConfig,
    QuantisedLayer,
    QuantisedSite,
    check_divisible,
    layer_tensors,
    read_layer,
    site_shapes,
)
from weft.comet.fmpq import Statistics, allot
from weft.comet.forward import SITES, Linears, Rotation, Shapes, Tensors, plain_linears, run_layer
from weft.comet.layer import LayerPlan, Method, PreparedLayer, PreparedSite, plan_layer, prepare_layer
from weft.comet.report import LayerRow, SiteRow, Summary, compare, decibels
from weft.comet.weights import Rounding, quantise_weight
from weft.comet.work import load_layer, load_plan, save_layer, save_plan, save_whole, shard, write_index

CHUNK = 4096  # tokens that go through a layer at a time
KEPT_ROWS = 2048  # of each input, for the errors of its blocks
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

Chosen = Mapping[str, tuple[int, ...]]  # for each site of a layer, the blocks that keep 8 bits


@dataclass(frozen=True, slots=True)
class Model:
    """What is quantised. layer(n): the tensors of layer n by their names below model.layers.n. rest(): the embedding,
    the last norm and, unless it is the embedding, the output layer, by their full names. file(name): for errors."""

    shapes: Shapes
    rotation: Rotation
    layer: Callable[[int], Tensors]
    rest: Callable[[], Tensors]
    file: Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, int64 [sequences, length]: to calibrate on, and to measure on."""

    calibration: torch.Tensor
    held_out: torch.Tensor


@dataclass(frozen=True, slots=True)
class Settings:
    method: Method
    rounding: Rounding


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` layers of a pass are finished. note: a warning, or nothing."""

    phase: str
    done: int
    total: int
    note: str = ""


Tell = Callable[[Progress], None]


def quantise_model(model: Model, text: Text, settings: Settings, work: Path, tell: Tell) -> tuple[FmpqConfig, Summary]:
    """Quantise into `work`: shards and their index. Raises CheckpointError for inputs that blocks do not divide."""
    for site, (rows, columns) in site_shapes(model.shapes).items():
        name = f"model.layers.0.{next(iter(rows))}.weight"
        check_divisible(columns, model.file(name), f"{name} ({site})")
    with torch.inference_mode():
        plans = make_plans(model, text.calibration, settings.method, work, tell)
        chosen = choose(plans, settings.method)
        config = FmpqConfig(
            outlier_weight_bits=settings.rounding.outlier_bits,
            outlier_blocks={site: tuple(len(blocks[site]) for blocks in chosen) for site in SITES},
            hadamard={site: tuple(plan.sites[site].hadamard for plan in plans) for site in SITES},
        )
        summary = quantise_layers(model, text, settings, plans, chosen, config, work, tell)
    write_index(work, model.shapes.layers)
    return config, summary


def make_plans(model: Model, tokens: torch.Tensor, method: Method, work: Path, tell: Tell) -> list[LayerPlan]:
    """Pass 1."""
    phase, layers = "looking at the layers", model.shapes.layers
    plans: list[LayerPlan] = []
    hidden = embed(model, tokens)
    for index in range(layers):
        tell(Progress(phase, index, layers))
        tensors, path = model.layer(index), work / f"plan-{index:05}.safetensors"
        if path.exists():
            plans.append(load_plan(path))
            hidden = through(hidden, tensors, model, index, plain_linears(tensors))
            continue
        watch = Watch(plain_linears(tensors), tokens.numel())
        after = through(hidden, tensors, model, index, watch)
        plan = plan_layer(tensors, watch.statistics(), model.shapes, method)
        few = slice(0, max(1, CHUNK // hidden.shape[1]))
        plans.append(weighed(plan, tensors, model, index, hidden[few], after[few]))
        hidden = after
        save_plan(path, plans[-1])
    tell(Progress(phase, layers, layers))
    return plans


def weighed(
    plan: LayerPlan, tensors: Tensors, model: Model, index: int, before: torch.Tensor, after: torch.Tensor
) -> LayerPlan:
    """The plan with its sites' costs in one unit: the squared error that 4 bits at the site, and at no other, leave in
    the rows after the layer, over the square of the row. before, after: rows [S, L, hidden] around the float layer."""
    prepared = prepare_layer(tensors, plan, dict.fromkeys(SITES, ()), model.shapes)
    costs = {}
    for site, cost in plan.costs.items():
        found = through(before, prepared.norms, model, index, coarse_at(prepared, site))
        lost = (found - after).square().sum(dim=-1) / after.square().sum(dim=-1).clamp_min(1e-30)
        costs[site] = cost.in_unit(float(lost.mean()))
    return replace(plan, costs=costs)


def choose(plans: list[LayerPlan], method: Method) -> list[Chosen]:
    """Which blocks keep 8 bits, for each layer."""
    if method.name == "paper":
        return [{site: tuple(range(plan.blocks[site])) for site in SITES} for plan in plans]
    costs = {f"{index}.{site}": cost for index, plan in enumerate(plans) for site, cost in plan.costs.items()}
    allotted = allot(costs, method.budget)
    return [{site: allotted[f"{index}.{site}"] for site in SITES} for index in range(len(plans))]


def quantise_layers(
    model: Model,
    text: Text,
    settings: Settings,
    plans: list[LayerPlan],
    chosen: list[Chosen],
    config: FmpqConfig,
    work: Path,
    tell: Tell,
) -> Summary:
    """Pass 2."""
    phase, shapes = "quantising", model.shapes
    rows: list[LayerRow] = []
    hidden, exact = embed(model, text.calibration), embed(model, text.held_out)
    coarse = exact
    for index, (plan, blocks) in enumerate(zip(plans, chosen, strict=True)):
        tell(Progress(phase, index, shapes.layers))
        tensors, path = model.layer(index), shard(work, index, shapes.layers)
        exact = through(exact, tensors, model, index, plain_linears(tensors))
        if path.exists():
            stored, row = load_layer(path, index)
            layer = read_layer(stored, config, shapes, index, path)
            coarse = through(coarse, layer.norms, model, index, quantised_linears(layer))
        else:
            warn = _warner(tell, phase, index, shapes.layers)
            layer, site_rows = quantise_layer(
                prepare_layer(tensors, plan, blocks, shapes), hidden, model, index, settings.rounding, warn
            )
            coarse = through(coarse, layer.norms, model, index, quantised_linears(layer))
            row = LayerRow(index, site_rows, decibels(exact, coarse))
            save_layer(path, index, layer_tensors(layer, shapes, config.outlier_weight_bits), row)
        rows.append(row)
        hidden = through(hidden, layer.norms, model, index, quantised_linears(layer))
    rest = dict(model.rest())
    save_whole(shard(work, shapes.layers, shapes.layers), rest, {"format": "pt"})
    head = rest.get(HEAD, rest[EMBEDDING])
    quality = compare(exact, coarse, rest[NORM], head, shapes.eps, text.held_out)
    tell(Progress(phase, shapes.layers, shapes.layers))
    return Summary(tuple(rows), quality)


def quantise_layer(
    prepared: PreparedLayer,
    hidden: torch.Tensor,
    model: Model,
    index: int,
    rounding: Rounding,
    warn: Callable[[str, str], None],
) -> tuple[QuantisedLayer, tuple[SiteRow, ...]]:
    """Round one prepared layer on the inputs that `hidden` gives it."""
    moments = Moments(prepared, hidden.shape[0] * hidden.shape[1])
    through(hidden, prepared.norms, model, index, moments)
    sites, rows = {}, []
    for site, one in prepared.sites.items():
        quantised = quantise_weight(
            one.weight,
            one.bias,
            moments.hessian(site),
            one.form.outlier_blocks,
            rounding,
            partial(warn, site),
        )
        sites[site] = QuantisedSite(one.form, quantised)
        rows.append(site_row(site, one, sites[site], moments.rows(site), rounding))
    return QuantisedLayer(sites, prepared.norms), tuple(rows)


def site_row(
    site: str, prepared: PreparedSite, quantised: QuantisedSite, rows: torch.Tensor, rounding: Rounding
) -> SiteRow:
    """The report's numbers of one site; rows [R, K]: some of its inputs, prepared."""
    form = quantised.form
    wanted = linear(rows, prepared.weight)
    coarse = reference.quantise_rows(rows, form.outlier_blocks, exact_a4=True).dequantised()
    share = form.outlier_blocks / form.blocks
    scale_bits = 16 / (form.channels / form.blocks)
    return SiteRow(
        site=site,
        decibels=decibels(wanted, linear(coarse, quantised.linear.dequantised())),
        outlier_blocks=form.outlier_blocks,
        blocks=form.blocks,
        hadamard=form.hadamard,
        bits_per_weight=4 + (rounding.outlier_bits - 4) * share + scale_bits,
        work=prepared.weight.numel(),
    )


def coarse_at(prepared: PreparedLayer, coarse: str) -> Linears:
    """The prepared float layer, with 4-bit activations at one site."""

    def apply(site: str, x: torch.Tensor) -> torch.Tensor:
        one = prepared.sites[site]
        x = reference.prepare(x, one.form)
        if site == coarse:
            x = reference.quantise_rows(x, one.form.outlier_blocks, exact_a4=True).dequantised()
        return linear(x, one.weight, one.bias)

    return apply


class Watch:
    """Linears that note what a plan is made from: mean squares and largest magnitudes, and some of the rows."""

    def __init__(self, linears: Linears, tokens: int) -> None:
        self._linears = linears
        self._tokens = tokens
        self._step = max(1, tokens // KEPT_ROWS)
        self._squares: dict[str, torch.Tensor] = {}
        self._largest: dict[str, torch.Tensor] = {}
        self._rows: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        squares, largest = x.double().square().sum(dim=0), x.abs().amax(dim=0)
        self._squares[site] = self._squares[site] + squares if site in self._squares else squares
        self._largest[site] = torch.maximum(self._largest[site], largest) if site in self._largest else largest
        self._rows[site].append(x[:: self._step].clone())
        return self._linears(site, x)

    def statistics(self) -> dict[str, Statistics]:
        return {
            site: Statistics(
                (self._squares[site] / self._tokens).float(), self._largest[site], torch.cat(self._rows[site])
            )
            for site in SITES
        }


class Moments:
    """Linears of a prepared layer, in float, that note the second moments of their prepared inputs and some rows."""

    def __init__(self, prepared: PreparedLayer, tokens: int) -> None:
        self._sites = prepared.sites
        self._tokens = tokens
        self._step = max(1, tokens // KEPT_ROWS)
        self._sums: dict[str, torch.Tensor] = {}
        self._rows: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        one = self._sites[site]
        x = reference.prepare(x, one.form)
        product = (x.T @ x).double()
        self._sums[site] = self._sums[site] + product if site in self._sums else product
        self._rows[site].append(x[:: self._step].clone())
        return linear(x, one.weight, one.bias)

    def hessian(self, site: str) -> torch.Tensor:
        """float64 [K, K]: the mean of x xᵀ."""
        return self._sums[site] / self._tokens

    def rows(self, site: str) -> torch.Tensor:
        return torch.cat(self._rows[site])


def quantised_linears(layer: QuantisedLayer, *, exact_a4: bool = True) -> Linears:
    """The W4Ax linears in float32 arithmetic on the dequantised numbers: what the reference computes, to rounding."""
    weights = {site: one.linear.dequantised() for site, one in layer.sites.items()}

    def apply(site: str, x: torch.Tensor) -> torch.Tensor:
        form, bias = layer.sites[site].form, layer.sites[site].linear.bias
        rows = reference.quantise_rows(reference.prepare(x, form), form.outlier_blocks, exact_a4=exact_a4)
        return linear(rows.dequantised(), weights[site], bias)

    return apply


def embed(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [S, L, hidden]."""
    return torch.nn.functional.embedding(tokens, model.rest()[EMBEDDING]).float()


def through(hidden: torch.Tensor, tensors: Tensors, model: Model, index: int, linears: Linears) -> torch.Tensor:
    """[S, L, hidden] through layer `index`, a few sequences at a time."""
    step = max(1, CHUNK // hidden.shape[1])
    window = model.shapes.windows[index]
    out = torch.empty_like(hidden)
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        out[part] = run_layer(hidden[part], tensors, model.shapes, window, model.rotation, linears)
    return out


def _warner(tell: Tell, phase: str, index: int, layers: int) -> Callable[[str, str], None]:
    return lambda site, note: tell(Progress(phase, index, layers, f"layer {index}, {site}: {note}"))
