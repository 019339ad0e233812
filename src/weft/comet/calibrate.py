"""From a float model to a quantised one, layer after layer: never more than one layer of weights in memory.

    pass 1   the calibration text through the float layers; each layer's plan (scalings, orders) is kept, and at the end
             that of the output layer; some hidden rows before each layer go to a file
    back     from the last layer to the first, gradients tell what 4 bits would cost in each block of the plans; with
             this the 8-bit blocks are allotted over the whole model
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
    HeadForm,
    QuantisedLayer,
    QuantisedSite,
    check_divisible,
    layer_tensors,
    read_layer,
    site_shapes,
)
from weft.comet.fmpq import BlockCosts, allot
from weft.comet.forward import SITES, Linears, Rotation, Shapes, Tensors, plain_linears, run_layer
from weft.comet.layer import (
    LayerPlan,
    Method,
    PreparedLayer,
    PreparedSite,
    as_planned,
    plan_layer,
    prepare_layer,
)
from weft.comet.outer import (
    EMBEDDING,
    HEAD_SITE,
    Outer,
    as_it_was,
    float_head,
    outer_tensors,
    plan_head,
    prepare_head,
    quantise_embedding,
)
from weft.comet.packing import BLOCK
from weft.comet.report import EmbeddingRow, LayerRow, SiteRow, Summary, compare, decibels
from weft.comet.sensitivity import TOKENS, Pulled, block_costs, last_gradients, pull_back
from weft.comet.watch import Moments, Watch, every
from weft.comet.weights import Rounding, quantise_weight
from weft.comet.work import (
    load_layer,
    load_plan,
    save_layer,
    save_plan,
    save_rows,
    save_whole,
    shard,
    take_rows,
    write_index,
)

CHUNK = 4096  # tokens that go through a layer at a time

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
    """head_bits and embedding_bits: 4 or 8; 16 leaves the output layer, or the embedding, as it is."""

    method: Method
    rounding: Rounding
    head_bits: int = 16
    embedding_bits: int = 16


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` layers of a pass are finished. note: a warning, or nothing."""

    phase: str
    done: int
    total: int
    note: str = ""


Tell = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One quantisation: what goes in, where the files go, and who is told."""

    model: Model
    text: Text
    settings: Settings
    work: Path
    tell: Tell

    def warn(self, phase: str, index: int) -> Callable[[str, str], None]:
        total = self.model.shapes.layers
        return lambda site, note: self.tell(Progress(phase, index, total, f"layer {index}, {site}: {note}"))


def quantise_model(model: Model, text: Text, settings: Settings, work: Path, tell: Tell) -> tuple[FmpqConfig, Summary]:
    """Quantise into `work`: shards and their index. Raises CheckpointError for inputs that blocks do not divide."""
    for site, (rows, columns) in site_shapes(model.shapes).items():
        name = f"model.layers.0.{next(iter(rows))}.weight"
        check_divisible(columns, model.file(name), f"{name} ({site})")
    job = Job(model, text, settings, work, tell)
    with torch.no_grad():
        plans = make_plans(job)
        chosen = choose(plans, settings.method)
        config = make_config(settings, plans, chosen, model.shapes)
        summary = quantise_layers(job, plans, chosen, config)
    write_index(work, model.shapes.layers)
    return config, summary


def make_plans(job: Job) -> list[LayerPlan]:
    """Pass 1: a plan for each layer, and one more for an output layer of 4 bits."""
    phase, model, method = "looking at the layers", job.model, job.settings.method
    layers = model.shapes.layers
    plans: list[LayerPlan] = []
    hidden = as_it_was(model.rest()).embed(job.text.calibration)
    few = slice(0, max(1, TOKENS // hidden.shape[1]))
    for index in range(layers):
        job.tell(Progress(phase, index, layers))
        if method.name != "paper":
            save_rows(rows_file(job.work, index), hidden[few])
        plan, hidden = make_plan(job, index, hidden)
        plans.append(plan)
    if job.settings.head_bits == 4:
        plans.append(plan_head(model.rest(), hidden, model.shapes.eps, method))
    job.tell(Progress(phase, layers, layers))
    return plans if method.name == "paper" else weighed(job, plans, hidden[few])


def make_plan(job: Job, index: int, hidden: torch.Tensor) -> tuple[LayerPlan, torch.Tensor]:
    """The plan of one layer, from its file if that is there, and the hidden rows after it."""
    tensors, path, tokens = job.model.layer(index), plan_file(job.work, index), job.text.calibration.numel()
    if path.exists():
        return load_plan(path), through(hidden, tensors, job.model, index, plain_linears(tensors))
    watch = Watch(plain_linears(tensors), tokens)
    hidden = through(hidden, tensors, job.model, index, watch)
    plan = plan_layer(tensors, watch.statistics(), job.model.shapes, job.settings.method)
    save_plan(path, plan)
    return plan, hidden


def weighed(job: Job, plans: list[LayerPlan], last: torch.Tensor) -> list[LayerPlan]:
    """The plans with the costs of their blocks. last: hidden rows [S, L, hidden] after all layers; those before each
    layer are in the files that `make_plans` left."""
    phase, model = "weighing the blocks", job.model
    shapes, outer, head = model.shapes, as_it_was(model.rest()), float_head(model.rest())
    gradients, pulled = last_gradients(last, lambda rows: outer.normalised(rows, shapes.eps), head)
    found = list(plans)
    if job.settings.head_bits == 4:
        found[-1] = with_costs(plans[-1], {HEAD_SITE: pulled}, {HEAD_SITE: len(head)}, shapes)
    outputs = {site: sum(rows.values()) for site, (rows, _) in site_shapes(shapes).items()}
    for index in reversed(range(shapes.layers)):
        job.tell(Progress(phase, shapes.layers - 1 - index, shapes.layers))
        sites, gradients = pull_back_layer(model, index, take_rows(rows_file(job.work, index)), gradients)
        found[index] = with_costs(plans[index], sites, outputs, shapes)
    job.tell(Progress(phase, shapes.layers, shapes.layers))
    return found


def pull_back_layer(
    model: Model, index: int, hidden: torch.Tensor, gradients: torch.Tensor
) -> tuple[Pulled, torch.Tensor]:
    """`pull_back` through layer `index`. hidden: before it; gradients: after it."""
    tensors, window = model.layer(index), model.shapes.windows[index]

    def run(rows: torch.Tensor, linears: Linears) -> torch.Tensor:
        return run_layer(rows, tensors, model.shapes, window, model.rotation, linears)

    return pull_back(tensors, run, hidden, gradients)


def with_costs(plan: LayerPlan, pulled: Pulled, outputs: Mapping[str, int], shapes: Shapes) -> LayerPlan:
    costs = {}
    for site, (x, p) in pulled.items():
        heads = shapes.head_dim if site == "output" and plan.value_transform else None
        nats = block_costs(*as_planned(x, p, plan.sites[site], heads))
        costs[site] = BlockCosts(tuple(nats.tolist()), outputs[site])
    return replace(plan, costs=costs)


def make_config(settings: Settings, plans: list[LayerPlan], chosen: list[Chosen], shapes: Shapes) -> FmpqConfig:
    """What config.json says of all this."""
    layers = range(shapes.layers)
    head = None
    if settings.head_bits == 8:
        head = HeadForm(8, shapes.hidden_size // BLOCK, hadamard=False)
    elif settings.head_bits == 4:
        head = HeadForm(4, len(chosen[-1][HEAD_SITE]), plans[-1].sites[HEAD_SITE].hadamard)
    return FmpqConfig(
        outlier_weight_bits=settings.rounding.outlier_bits,
        outlier_blocks={site: tuple(len(chosen[index][site]) for index in layers) for site in SITES},
        hadamard={site: tuple(plans[index].sites[site].hadamard for index in layers) for site in SITES},
        head=head,
        embedding_bits=settings.embedding_bits,
    )


def choose(plans: list[LayerPlan], method: Method) -> list[Chosen]:
    """Which blocks keep 8 bits, for each plan."""
    if method.name == "paper":
        return [{site: tuple(range(plan.blocks[site])) for site in plan.sites} for plan in plans]
    costs = {f"{index}.{site}": cost for index, plan in enumerate(plans) for site, cost in plan.costs.items()}
    allotted = allot(costs, method.budget)
    return [{site: allotted[f"{index}.{site}"] for site in plan.sites} for index, plan in enumerate(plans)]


@dataclass(frozen=True, slots=True)
class Texts:
    """Hidden rows [S, L, hidden] before a layer in pass 2: of both texts through the quantised layers, and of the
    held-out text through the float ones (`exact`)."""

    calibration: torch.Tensor
    held_out: torch.Tensor
    exact: torch.Tensor


def pass_layer(
    job: Job, index: int, at: Texts, plan: LayerPlan, chosen: Chosen, config: FmpqConfig
) -> tuple[LayerRow, Texts]:
    """One layer of pass 2: quantised, or read where it was quantised before; and the texts after it."""
    model = job.model
    shapes = model.shapes
    tensors, path = model.layer(index), shard(job.work, index, shapes.layers)
    exact = through(at.exact, tensors, model, index, plain_linears(tensors))
    if path.exists():
        stored, row = load_layer(path, index)
        layer = read_layer(stored, config, shapes, index, path)
        linears = quantised_linears(layer)
        held_out = through(at.held_out, layer.norms, model, index, linears)
    else:
        prepared = prepare_layer(tensors, plan, chosen, shapes)
        warn = job.warn("quantising", index)
        layer, site_rows = quantise_layer(prepared, at.calibration, model, index, job.settings.rounding, warn)
        linears = quantised_linears(layer)
        held_out = through(at.held_out, layer.norms, model, index, linears)
        row = LayerRow(index, site_rows, decibels(exact, held_out))
        save_layer(path, index, layer_tensors(layer, config, shapes), row)
    return row, Texts(through(at.calibration, layer.norms, model, index, linears), held_out, exact)


def quantise_layers(job: Job, plans: list[LayerPlan], chosen: list[Chosen], config: FmpqConfig) -> Summary:
    """Pass 2."""
    phase, model, text = "quantising", job.model, job.text
    shapes, float_rest = model.shapes, as_it_was(model.rest())
    rows: list[LayerRow] = []
    start = replace(float_rest, embedding=quantise_embedding(model.rest()[EMBEDDING], job.settings.embedding_bits))
    at = Texts(start.embed(text.calibration), start.embed(text.held_out), float_rest.embed(text.held_out))
    for index in range(shapes.layers):
        job.tell(Progress(phase, index, shapes.layers))
        row, at = pass_layer(job, index, at, plans[index], chosen[index], config)
        rows.append(row)
    whole, head = (start, None) if config.head is None else quantise_head(job, start, plans, chosen, at.calibration)
    tensors = outer_tensors(whole, config, tied=float_rest.head is float_rest.embedding)
    save_whole(shard(job.work, shapes.layers, shapes.layers), tensors, {"format": "pt"})
    quality = compare(at.exact, at.held_out, float_rest.logits(shapes.eps), whole.logits(shapes.eps), text.held_out)
    job.tell(Progress(phase, shapes.layers, shapes.layers))
    return Summary(tuple(rows), quality, head, embedding_row(float_rest, whole, config, text.held_out))


def quantise_head(
    job: Job, outer: Outer, plans: list[LayerPlan], chosen: list[Chosen], hidden: torch.Tensor
) -> tuple[Outer, SiteRow]:
    """The output layer, rounded on the hidden rows [S, L, hidden] that leave the last quantised layer."""
    layers, settings = job.model.shapes.layers, job.settings
    plan, blocks = (plans[layers], chosen[layers][HEAD_SITE]) if settings.head_bits == 4 else (None, ())
    prepared, norm = prepare_head(job.model.rest(), plan, blocks)
    x = reference.prepare(replace(outer, norm=norm).normalised(hidden, job.model.shapes.eps), prepared.form)
    x = x.flatten(0, 1)
    rounding = replace(settings.rounding, outlier_bits=8) if plan is None else settings.rounding
    hessian = (x.T @ x).double() / len(x)
    site = round_site(prepared, hessian, rounding, partial(job.warn("quantising", layers), HEAD_SITE))
    return replace(outer, norm=norm, head=site), site_row(HEAD_SITE, prepared, site, x[:: every(len(x))], rounding)


def embedding_row(exact: Outer, coarse: Outer, config: FmpqConfig, tokens: torch.Tensor) -> EmbeddingRow:
    bits = config.embedding_bits
    return EmbeddingRow(16 if bits == 16 else bits + 16 / BLOCK, decibels(exact.embed(tokens), coarse.embed(tokens)))


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
        sites[site] = round_site(one, moments.hessian(site), rounding, partial(warn, site))
        rows.append(site_row(site, one, sites[site], moments.rows(site), rounding))
    return QuantisedLayer(sites, prepared.norms), tuple(rows)


def round_site(
    prepared: PreparedSite, hessian: torch.Tensor, rounding: Rounding, warn: Callable[[str], None]
) -> QuantisedSite:
    form = prepared.form
    weight = quantise_weight(prepared.weight, prepared.bias, hessian, form.outlier_blocks, rounding, warn)
    return QuantisedSite(form, weight)


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


def quantised_linears(layer: QuantisedLayer, *, exact_a4: bool = True) -> Linears:
    """The W4Ax linears in float32 arithmetic on the dequantised numbers: what the reference computes, to rounding."""
    weights = {site: one.linear.dequantised() for site, one in layer.sites.items()}

    def apply(site: str, x: torch.Tensor) -> torch.Tensor:
        form, bias = layer.sites[site].form, layer.sites[site].linear.bias
        rows = reference.quantise_rows(reference.prepare(x, form), form.outlier_blocks, exact_a4=exact_a4)
        return linear(rows.dequantised(), weights[site], bias)

    return apply


def plan_file(work: Path, index: int) -> Path:
    return work / f"plan-{index:05}.safetensors"


def rows_file(work: Path, index: int) -> Path:
    return work / f"rows-{index:05}.safetensors"


def through(hidden: torch.Tensor, tensors: Tensors, model: Model, index: int, linears: Linears) -> torch.Tensor:
    """[S, L, hidden] through layer `index`, a few sequences at a time."""
    step = max(1, CHUNK // hidden.shape[1])
    window = model.shapes.windows[index]
    out = torch.empty_like(hidden)
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        out[part] = run_layer(hidden[part], tensors, model.shapes, window, model.rotation, linears)
    return out
