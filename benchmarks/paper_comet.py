"""COMET's tables (its section 6) beside the same set-ups in weft's simulator, and where 4 bits do not pay.

    python benchmarks/paper_comet.py [--quick] [--json FILE] [--plot FILE] [--doc docs/paper_comet.md]

No GPU is used: every figure of ours is SIMULATED. Times in bf16 were measured on an A100 and fitted; fewer bits are
scaled from them by bytes and by the tensor cores' peaks, so that unpacking, quantising and rescaling cost nothing:
ours are what is left if a kernel loses nothing to them (docs/simulator_model.md).

Kernels: linear layers of Llama-3-8B, Llama-3-70B and Llama-2-13B, three quarters of the products in 4 bits, the mean of
the speed-ups. Throughput: the most output tokens a second on one A100-80 over all batches that its memory holds: all
prompts, then all decode steps; `engine` is the same in weft's engine, with its scheduler, for two models.

kernel_error_percent, throughput_error_percent: mean absolute error against the paper's ratios. w4axkv4_vs_w4a16_*: the
headline. a4_gain_batch_4, a4_gain_batch_256: a decode step of Llama-3-8B with 8-bit activations over one with COMET's
mix on an A100; h100_a4_gain: the most of it anywhere on an H100, which has no 4-bit arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import common
import numpy as np
from paper_common import at_once, figures, finish, markdown, number, parser, setup

from weft.bench.stats import Slo
from weft.bench.traces import Size
from weft.sim.estimate import MEMORY
from weft.sim.gemm import gemm_seconds
from weft.sim.hardware import find_gpu
from weft.sim.models import Linear, find_model
from weft.sim.precision import SCALES, Precision, find_precision
from weft.sim.step import StepCost
from weft.sim.study import Fleet, study

GPU = "a100-80"
KERNEL_MODELS = ("llama-3-8b", "llama-2-13b", "llama-3-70b")
EIGHTS = 0.25  # of the products in the paper's kernel benchmarks
SIZES = {"7-8B": ("llama-2-7b", "llama-3-8b"), "13B": ("llama-2-13b",), "30B": ("llama-30b",),
         "70-72B": ("llama-2-70b", "llama-3-70b", "qwen2.5-72b")}  # fmt: skip
MODELS = tuple(name for names in SIZES.values() for name in names)
LOADS = {"1024/512": (1024, 512), "128/128": (128, 128)}
ENGINE = ("llama-30b", "llama-3-70b")
LIMIT = 256  # sequences in a step, the most of the paper's kernel benchmarks; it does not say which its servers had
STEP_TOKENS = 8192  # of prompts, in one step
PARTS = 8  # of an answer, in each of which a decode step is taken to cost the same
BATCHES = (1, 4, 16, 64, 256)
PROMPT = 2048
CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class Way:
    """A precision and the bits of the KV cache."""

    name: str
    precision: str
    kv: int = 16


TRT = (Way("fp16", "fp16"), Way("w8a8", "w8a8"), Way("w4a16", "w4a16"))
COMET, W4AX, KV4 = Way("w4axkv4", "w4ax", 4), Way("w4ax", "w4ax"), Way("kv4", "w4a16", 4)
QSERVE = Way("w4a8kv4", "w4a8", 4)
WAYS = (*TRT, QSERVE, W4AX, KV4, COMET)


@dataclass(frozen=True, slots=True)
class Best:
    """tokens: output tokens a second; 0 where not one sequence fits in memory. batch: with which it is reached."""

    tokens: float
    batch: int


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    paper = figures("comet")
    rows: list[dict[str, Any]] = []
    tables: dict[str, str] = {}
    for kind, head, made in (
        ("kernels", ("batches, against", "theirs", "ours"), kernels(paper)),
        ("throughput", ("load, model, against", "theirs", "ours", "batch", "its batch"), throughputs(paper)),
        ("engine", ("model, way", "closed form, tokens/s", "engine"), engine(arguments.quick)),
        ("pays", PAYS_HEAD, pays()),
    ):
        table = list(made)
        tables[kind] = markdown(head, [[one["name"], *map(_cell, one["values"])] for one in table])
        print(f"\n{tables[kind]}", flush=True)
        rows += [{"kind": kind, "name": one["name"], "head": head[1:], "values": one["values"]} for one in table]
    if arguments.plot is not None:
        draw(arguments.plot)
    finish(arguments, paper, claims(rows), rows, tables)


def cost(model: str, way: Way, gpu: str = GPU) -> StepCost:
    return StepCost(find_model(model), find_gpu(gpu), find_precision(way.precision, way.kv))


# -- kernels ---------------------------------------------------------------------------------------------------------


def kernel_seconds(precision: Precision, tokens: int, linear: Linear) -> float:
    gpu = find_gpu(GPU)
    part = precision.part(gpu, 1.0, 0.0)
    return float(gemm_seconds(gpu.gemm, part, tokens, linear.n, linear.k, precision.operands).item())


def kernel_speedup(other: str, batches: Sequence[int]) -> float:
    """Of products that are three quarters in 4 bits over those in another precision: mean over shapes and batches."""
    ours = replace(find_precision("w4ax"), inputs=4 + 4 * EIGHTS + SCALES, outliers=EIGHTS)
    shapes = [one for name in KERNEL_MODELS for one in find_model(name).linears() if not one.sampled and one.layers]
    return float(np.mean([
        kernel_seconds(find_precision(other), batch, one) / kernel_seconds(ours, batch, one)
        for batch in batches for one in shapes
    ]))  # fmt: skip


def kernels(paper: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for one in paper["kernels"]:
        for other in ("fp16", "w4a16", "w8a8"):
            name = f"{'/'.join(map(str, one['batches']))}, {other}"
            yield {"name": name, "values": (one[other], kernel_speedup(other, one["batches"]))}
    for batch, theirs in paper["kernels_fp16"].items():
        yield {"name": f"{batch}, fp16", "values": (theirs, kernel_speedup("fp16", [int(batch)]))}
    for batch, theirs in paper["w4a16_fp16"].items():
        ours = kernel_speedup("fp16", [int(batch)]) / kernel_speedup("w4a16", [int(batch)])
        yield {"name": f"{batch}, w4a16 over fp16", "values": (theirs, ours)}


# -- throughput ------------------------------------------------------------------------------------------------------


def rate(one: StepCost, batch: int, read: int, written: int) -> float:
    """Output tokens a second of a batch whose prompts come first and all of whose answers grow together."""
    together = max(1, min(batch, STEP_TOKENS // read))
    prompts = -(-batch // together) * one.whole([read] * together, [0] * together, together)
    contexts = [read + round(written * (part + 0.5) / PARTS) for part in range(PARTS)]
    answers = written / PARTS * sum(one.whole([1] * batch, [context] * batch, batch) for context in contexts)
    return batch * written / (prompts + answers)


@cache
def best(model: str, way: Way, load: str, limit: int = 2**20) -> Best:
    """Over all powers of two that fit, and the most that fits; limit: most sequences in a step."""
    one, (read, written) = cost(model, way), LOADS[load]
    room = MEMORY * one.capacity_bytes - one.weight_bytes
    most = min(limit, int(max(room, 0.0) // (one.kv_bytes_per_token * (read + written))))
    batches = sorted({most, *(2**power for power in range(12) if 2**power <= most)} - {0})
    return max((Best(rate(one, batch, read, written), batch) for batch in batches), key=_tokens, default=Best(0.0, 0))


def _tokens(one: Best) -> float:
    return one.tokens


def best_trt(model: str, load: str) -> Best:
    return max((best(model, way, load) for way in TRT), key=_tokens)


def gain(model: str, way: Way, other: Way, load: str) -> float:
    return best(model, way, load).tokens / best(model, other, load).tokens


def throughputs(paper: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Per model against W4A16 and against the best of the others; then what the paper prints as means."""
    w4a16 = TRT[-1]
    for load in LOADS:
        for model in MODELS:
            ours, other, trt = best(model, COMET, load), best(model, w4a16, load), best_trt(model, load)
            yield {"name": f"{load}, {model}, w4a16",
                   "values": (None, ours.tokens / other.tokens, ours.batch, other.batch)}  # fmt: skip
            yield {"name": f"{load}, {model}, best", "values": (None, ours.tokens / trt.tokens, ours.batch, trt.batch)}
    theirs = {(one["load"], one["against"], one["over"]): one["ratio"] for one in paper["throughput"]}
    for load in LOADS:
        values = [gain(model, COMET, w4a16, load) for model in MODELS]
        yield {"name": f"{load}, mean, w4a16", "values": (theirs[load, "w4a16", "all models"], _mean(values))}
        values = [best(model, COMET, load, LIMIT).tokens / best(model, w4a16, load, LIMIT).tokens for model in MODELS]
        name = f"{load}, mean, w4a16, batches of {LIMIT} at most"
        yield {"name": name, "values": (theirs[load, "w4a16", "all models"], _mean(values))}
    for size, names in SIZES.items():
        found = [best(name, COMET, load).tokens / best_trt(name, load).tokens for name in names for load in LOADS]
        printed = paper["ranges"].get(size) or [theirs["both", "best", names[0]]]
        words = " to ".join(number(value) for value in printed)
        yield {"name": f"both, {size}, best", "values": (words, f"{min(found):.2f} to {max(found):.2f}")}
    both = [(model, load) for model in MODELS for load in LOADS]
    values = [gain(model, COMET, QSERVE, load) for model, load in both]
    yield {"name": "both, mean, w4a8kv4", "values": (theirs["both", "w4a8kv4", "all models"], _mean(values))}
    for way, key in ((W4AX, "w4ax"), (KV4, "kv4"), (COMET, "both")):
        values = [gain(model, way, w4a16, load) for model, load in both]
        yield {"name": f"both, mean, {way.name} over w4a16", "values": (paper["ablation"][key], _mean(values))}
    yield from same_batch(paper)


def same_batch(paper: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Llama-3-8B: at the batch of the best of the others, and at 4."""
    model, (read, written) = paper["same_batch"]["model"], LOADS["1024/512"]
    trt = best_trt(model, "1024/512")
    ours = rate(cost(model, COMET), trt.batch, read, written) / trt.tokens
    yield {"name": f"1024/512, {model}, best at its batch", "values": (paper["same_batch"]["ratio"], ours, trt.batch)}
    four = rate(cost(model, COMET), 4, read, written)
    for way in TRT:
        other = rate(cost(model, way), 4, read, written)
        yield {"name": f"1024/512, {model}, {way.name} at 4", "values": (paper["batch_4"][way.name], four / other, 4)}


def engine(quick: bool) -> Iterator[dict[str, Any]]:
    """Twice the best batch of requests through weft's engine: its scheduler admits, and answers end at all times."""
    read, written = LOADS["1024/512"]
    for model in ENGINE[:1] if quick else ENGINE:
        for way in (TRT[-1], COMET):
            common.say(f"engine, {model}, {way.name}")
            form = best(model, way, "1024/512")
            made = setup(cost(model, way), seats=form.batch, tokens=STEP_TOKENS, longest=read + written)
            totals = study(Fleet(made), at_once([Size(read, written)] * (2 * form.batch)), Slo()).totals
            yield {"name": f"{model}, {way.name}", "values": (form.tokens, totals.output_rate)}


# -- where 4 bits do not pay -----------------------------------------------------------------------------------------

PAYS = ("w4a16", "w8a8", "w4a8", "w4ax")
PAYS_HEAD = ("GPU, step", *(f"{name} over fp16" for name in PAYS), "w4ax over w4a8", "kv4 over kv16")


def pays() -> Iterator[dict[str, Any]]:
    """Steps of Llama-3-8B: how much quicker with fewer bits."""
    for gpu in (GPU, "h100"):
        for batch in (*BATCHES, None):
            work = ([PROMPT], [0], 1) if batch is None else ([1] * batch, [CONTEXT] * batch, batch)

            def seconds(way: Way, gpu: str = gpu, work: Any = work) -> float:
                return cost("llama-3-8b", way, gpu).whole(*work)

            base = seconds(TRT[0])
            found = [base / seconds(Way(name, name)) for name in PAYS]
            last = (seconds(QSERVE) / seconds(COMET), seconds(W4AX) / seconds(COMET))
            words = f"prompt of {PROMPT}" if batch is None else f"decode, batch {batch}"
            yield {"name": f"{gpu}, {words}", "values": (*found, *last)}


# -- report ----------------------------------------------------------------------------------------------------------


def claims(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    def errors(kind: str) -> float:
        both = [one["values"][:2] for one in rows if one["kind"] == kind]
        return 100 * _mean([abs(ours / theirs - 1) for theirs, ours in both if isinstance(theirs, float)])

    by = {one["name"]: one["values"] for one in rows}
    return {
        "kernel_error_percent": errors("kernels"),
        "throughput_error_percent": errors("throughput"),
        "w4axkv4_vs_w4a16_1024_512": by["1024/512, mean, w4a16"][1],
        "w4axkv4_vs_w4a16_128_128": by["128/128, mean, w4a16"][1],
        "a4_gain_batch_4": by[f"{GPU}, decode, batch 4"][4],
        "a4_gain_batch_256": by[f"{GPU}, decode, batch 256"][4],
        "h100_a4_gain": max(values[4] for name, values in by.items() if name.startswith("h100, ")),
        "engine_vs_closed_form": min(one["values"][1] / one["values"][0] for one in rows if one["kind"] == "engine"),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _cell(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return str(value) if isinstance(value, int) else number(value, 2 if value < 100 else 0)


def draw(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels: Any = figure.subplots(1, len(LOADS), sharey=True)
    wide = 0.8 / len(WAYS)
    for axes, load in zip(panels, LOADS, strict=True):
        for at, way in enumerate(WAYS):
            values = [best(model, way, load).tokens / best(model, TRT[-1], load).tokens for model in MODELS]
            axes.bar([place + at * wide for place in range(len(MODELS))], values, wide, label=way.name)
        axes.set_xticks([place + 0.4 for place in range(len(MODELS))], MODELS, rotation=30, fontsize=7)
        axes.set(title=f"{load}, one {GPU.upper()} (simulated)", ylabel="output tokens/s, w4a16 is 1")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
