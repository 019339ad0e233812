"""What 4 bits cost: the built-in model, and versions of it with injected outliers, under eight ways to quantise.

    python benchmarks/accuracy.py [--quick] [--json FILE] [--plot FILE]

Every version computes what the built-in model computes (this is checked first) but has outliers where large models
have them (outliers.py). Bits per byte, KL and top-1 flips are against the float32 model of the same version, on text
held out from the model's training and from calibration. Activations of 4 bits are exact here, in every method that has
them; the keys and values of "KV4" are rounded to 4 bits for each token and head, asymmetrically.

    W8A8            weights 8 bits per output, activations 8 bits per token, both to the nearest
    W4A16           weights 4 bits in groups of 128, GPTQ
    W4A4 naive      weights as above but to the nearest, activations 4 bits per token
    W4A8KV4         weights as W4A16, activations 8 bits per token
    FMPQ paper      the paper's method (its threshold chosen so that its 8-bit share is nearest to the 16 % it reports),
                    weights to the nearest after a search for the scales; and the same with GPTQ
    FMPQ weft       `weft quantize` with its defaults, with and without KV4

Claims: the worst over all versions, but `naive_w4a4_loss_percent`, which is the least over the injected ones.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from outliers import EMBEDDING, HEAD, INJECTIONS, NORM, Tensors
from torch.nn.functional import linear, rms_norm

from weft.comet.calibrate import (
    Job,
    Model,
    Progress,
    Settings,
    Text,
    make_plans,
    quantise_model,
    quantised_linears,
    through,
)
from weft.comet.checkpoint import read_layer
from weft.comet.corpus import standard_library, windows
from weft.comet.forward import SITES, KeysValues, Linears, Rotation, joined, plain_linears, run_layer
from weft.comet.hadamard import hadamard
from weft.comet.layer import Method
from weft.comet.packing import BLOCK
from weft.comet.weights import Rounding, quantise_weight
from weft.comet.work import shard
from weft.models.checkpoint import Checkpoint
from weft.models.families import ModelConfig, read_config
from weft.models.rope import Rotary
from weft.text.hub import resolve_model
from weft.text.tokenizer import Tokenizer

LENGTH = 512
PAPER_SHARE = 0.16
THRESHOLDS = (2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 20.0, 40.0)
RESAMPLES = 1000
PRESERVED_KL = 1e-6


@dataclass(frozen=True, slots=True)
class Version:
    """The built-in model, or one with outliers: tensors, and the log-probabilities of its float32 form."""

    name: str
    model: Model
    logs: torch.Tensor  # [S, L, vocabulary]


@dataclass(frozen=True, slots=True)
class Layers:
    """What a method made: for each layer its norms and linears, and what it does to keys and values."""

    parts: list[tuple[Any, Linears]]
    keys_values: KeysValues | None
    outlier_share: float


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0]).parse_args()
    folder = resolve_model("builtin")
    config = read_config(folder)
    checkpoint = Checkpoint(folder)
    tensors = {name: tensor.float() for name, tensor in checkpoint.take(list(checkpoint.entries)).items()}
    text, sizes = read_text(folder, (4, 4) if arguments.quick else (32, 48))
    with torch.inference_mode():
        wanted = [None, "all of them"] if arguments.quick else [None, *INJECTIONS]
        rows = []
        for version in make_versions(tensors, config, text, wanted):
            for method, build in methods(arguments.quick).items():
                began = time.monotonic()
                made = build(version.model, text)
                row = {"version": version.name, "method": method, "outlier_share": made.outlier_share}
                rows.append(row | measure(version, made, text.held_out, sizes))
                print(f"{version.name}, {method}: {time.monotonic() - began:.0f} s", flush=True)
    show(rows)
    if arguments.plot is not None:
        draw(rows, arguments.plot)
    common.report(arguments, claims(rows), rows)  # nothing here is a time, so other load does not matter


def read_text(folder: Path, counts: tuple[int, int]) -> tuple[Text, torch.Tensor]:
    """Token ids, and the UTF-8 bytes that each held-out sequence's scored tokens stand for."""
    tokenizer = Tokenizer.from_folder(folder)
    calibration, held_out = (
        windows(texts, tokenizer.encode, count, LENGTH, seed=0)
        for texts, count in zip(standard_library(), counts, strict=True)
    )
    sizes = [len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in held_out]
    return Text(torch.tensor(calibration), torch.tensor(held_out)), torch.tensor(sizes, dtype=torch.float64)


def make_versions(tensors: Tensors, config: ModelConfig, text: Text, names: Sequence[str | None]) -> Iterator[Version]:
    """The versions one after the other, each checked to compute what the built-in model (None) computes."""
    rotation = Rotation(*Rotary(config.rope, config.head_dim).tables(LENGTH))
    plain = as_model(tensors, config, rotation)
    residual = rows_of_the_residual(plain, text.calibration[:8])
    logs = log_probabilities(plain, exact(plain), text.held_out)
    for name in names:
        if name is None:
            yield Version("built-in", plain, logs)
            continue
        injected = INJECTIONS[name](tensors, config, torch.Generator().manual_seed(1), residual)
        model = as_model(injected, config, rotation)
        found = log_probabilities(model, exact(model), text.held_out)
        drift = float((logs.exp() * (logs - found)).sum(dim=-1).mean())
        if not abs(drift) < PRESERVED_KL:
            raise SystemExit(f"the injection {name!r} changed the model: KL {drift:.2e}")
        yield Version(name, model, found)


def as_model(tensors: Tensors, config: ModelConfig, rotation: Rotation) -> Model:
    def layer(index: int) -> Tensors:
        prefix = f"model.layers.{index}."
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    rest = {name: tensors[name] for name in (EMBEDDING, NORM, HEAD) if name in tensors}
    return Model(config, rotation, layer, lambda: rest, lambda name: name)


def rows_of_the_residual(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """Residual rows after every layer, each scaled to length one so that late layers do not outweigh early ones."""
    hidden = torch.nn.functional.embedding(tokens, model.rest()[EMBEDDING])
    rows = []
    for index in range(model.shapes.layers):
        tensors = model.layer(index)
        hidden = through(hidden, tensors, model, index, plain_linears(tensors))
        rows.append(torch.nn.functional.normalize(hidden.flatten(0, 1), dim=-1))
    return torch.cat(rows)


def log_probabilities(model: Model, layers: Layers, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [S, L, vocabulary]."""
    rest, found = model.rest(), []
    for row in tokens[:, None]:
        hidden = torch.nn.functional.embedding(row, rest[EMBEDDING])
        for index, (norms, linears) in enumerate(layers.parts):
            window = model.shapes.windows[index]
            hidden = run_layer(hidden, norms, model.shapes, window, model.rotation, linears, layers.keys_values)
        hidden = rms_norm(hidden, hidden.shape[-1:], rest[NORM], model.shapes.eps)
        found.append(linear(hidden, rest.get(HEAD, rest[EMBEDDING])).log_softmax(dim=-1))
    return torch.cat(found)


# The methods: from a model and text to layers.

Build = Callable[[Model, Text], Layers]


def methods(quick: bool) -> dict[str, Build]:
    every: dict[str, Build] = {
        "FP32": lambda model, _: exact(model),
        "W8A8": lambda model, _: plain(model, Weights(8), activation_bits=8),
        "W4A16": lambda model, text: plain(model, Weights(4, text.calibration)),
        "W4A4 naive": lambda model, _: plain(model, Weights(4), activation_bits=4),
        "W4A8KV4": lambda model, text: plain(model, Weights(4, text.calibration), activation_bits=8, keys_values=kv4),
        "FMPQ paper W4AxKV4": lambda model, text: fmpq(model, text, paper(model, text, gptq=False), kv4),
        "FMPQ paper + GPTQ W4AxKV4": lambda model, text: fmpq(model, text, paper(model, text, gptq=True), kv4),
        "FMPQ weft W4Ax": lambda model, text: fmpq(model, text, Settings(Method(), Rounding()), None),
        "FMPQ weft W4AxKV4": lambda model, text: fmpq(model, text, Settings(Method(), Rounding()), rotated_kv4),
    }
    kept = ("FP32", "W4A4 naive", "FMPQ paper W4AxKV4", "FMPQ weft W4AxKV4")
    return {name: build for name, build in every.items() if not quick or name in kept}


def exact(model: Model) -> Layers:
    layers = [model.layer(index) for index in range(model.shapes.layers)]
    return Layers([(tensors, plain_linears(tensors)) for tensors in layers], None, 0.0)


@dataclass(frozen=True, slots=True)
class Weights:
    """How `plain` rounds weights: to the nearest, or by GPTQ on calibration tokens (4 bits, groups of 128)."""

    bits: int
    calibration: torch.Tensor | None = None


def plain(
    model: Model, weights: Weights, activation_bits: int | None = None, keys_values: KeysValues | None = None
) -> Layers:
    """Every linear alike, nothing scaled or moved."""
    parts: list[tuple[Any, Linears]] = []
    tokens = weights.calibration
    hidden = None if tokens is None else torch.nn.functional.embedding(tokens, model.rest()[EMBEDDING])
    for index in range(model.shapes.layers):
        tensors = model.layer(index)
        moments: dict[str, torch.Tensor] = {}
        if hidden is not None:
            through(hidden, tensors, model, index, watching(plain_linears(tensors), moments))
        rounded = {site: rounded_weight(joined(tensors, site)[0], weights, moments.get(site)) for site in SITES}
        linears = per_token(rounded, activation_bits)
        if hidden is not None:
            hidden = through(hidden, tensors, model, index, linears)
        parts.append((tensors, linears))
    return Layers(parts, keys_values, 1.0 if activation_bits == 8 else 0.0)


def watching(linears: Linears, moments: dict[str, torch.Tensor]) -> Linears:
    def apply(site: str, x: torch.Tensor) -> torch.Tensor:
        moments[site] = moments.get(site, 0) + (x.T @ x).double()
        return linears(site, x)

    return apply


def rounded_weight(weight: torch.Tensor, weights: Weights, moments: torch.Tensor | None) -> torch.Tensor:
    if weights.bits == 8:
        return symmetric(weight, 127)
    rounding = Rounding(compensate=moments is not None, search=moments is not None)
    return quantise_weight(weight, None, moments, 0, rounding, print).dequantised()


def per_token(weights: dict[str, torch.Tensor], bits: int | None) -> Linears:
    def apply(site: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x if bits is None else symmetric(x, 2 ** (bits - 1) - 1), weights[site])

    return apply


def symmetric(x: torch.Tensor, levels: int) -> torch.Tensor:
    """Rows rounded to `levels` steps either way, one scale for each."""
    scale = x.abs().amax(dim=-1, keepdim=True) / levels
    return torch.where(scale > 0, (x / scale).round() * scale, 0.0)


def paper(model: Model, text: Text, *, gptq: bool) -> Settings:
    """The paper's settings, with the threshold whose 8-bit share is nearest to the one that the paper reports."""
    found: list[tuple[float, float]] = []
    for threshold in THRESHOLDS:
        with tempfile.TemporaryDirectory() as work:
            method = Method(name="paper", threshold=threshold)
            plans = make_plans(
                Job(model, Text(text.calibration[:4], text.held_out), Settings(method, Rounding()), Path(work), _quiet)
            )
        work_of = {site: joined(model.layer(0), site)[0].shape for site in SITES}
        eight = sum(plan.blocks[site] * BLOCK * work_of[site][0] for plan in plans for site in SITES)
        whole = len(plans) * sum(math.prod(shape) for shape in work_of.values())
        found.append((abs(eight / whole - PAPER_SHARE), threshold))
    return Settings(Method(name="paper", hadamard=False, threshold=min(found)[1]), Rounding(compensate=gptq))


def fmpq(model: Model, text: Text, settings: Settings, keys_values: KeysValues | None) -> Layers:
    """As `weft quantize` does it, through the files that it writes."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        few = Text(text.calibration, text.held_out[:1])
        config, summary = quantise_model(model, few, settings, work, _warnings)
        layers = []
        for index in range(model.shapes.layers):
            path = shard(work, index, model.shapes.layers)
            prefix = f"model.layers.{index}."
            held = Checkpoint(work)
            tensors = held.take([entry for entry in held.entries if entry.startswith(prefix)])
            short = {entry.removeprefix(prefix): tensor.clone() for entry, tensor in tensors.items()}
            layers.append(read_layer(short, config, model.shapes, index, path))
    return Layers([(layer.norms, quantised_linears(layer)) for layer in layers], keys_values, summary.outlier_share)


def _warnings(progress: Progress) -> None:
    if progress.note:
        print(progress.note)


def _quiet(_: Progress) -> None:
    pass


def kv4(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both to 4 bits, one scale and zero for each token and head."""
    return asymmetric4(keys), asymmetric4(values)


def rotated_kv4(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kv4`, with a Hadamard transform of each key head, which the queries would share; the values' own is in the
    weights already."""
    size = keys.shape[-1]
    return hadamard(asymmetric4(hadamard(keys, size)), size) / size, asymmetric4(values)


def asymmetric4(x: torch.Tensor) -> torch.Tensor:
    low = x.amin(dim=-1, keepdim=True)
    scale = ((x.amax(dim=-1, keepdim=True) - low) / 15).clamp_min(1e-20)
    return ((x - low) / scale).round().clamp(0, 15) * scale + low


# Measuring and showing.


def measure(version: Version, layers: Layers, tokens: torch.Tensor, sizes: torch.Tensor) -> dict[str, float]:
    logs = log_probabilities(version.model, layers, tokens)
    targets = tokens[:, 1:, None]
    nats, float_nats = (-each[:, :-1].gather(2, targets).double().sum(dim=(1, 2)) for each in (logs, version.logs))
    low, high = bootstrap(nats, float_nats)
    first, second = version.logs[:, :-1], logs[:, :-1]
    return {
        "bits_per_byte": float(nats.sum() / sizes.sum()) / math.log(2),
        "loss_percent": 100 * (float(nats.sum() / float_nats.sum()) - 1),
        "loss_low": low,
        "loss_high": high,
        "kl": float((first.exp() * (first - second)).sum(dim=-1).mean()),
        "flips": float((first.argmax(dim=-1) != second.argmax(dim=-1)).double().mean()),
    }


def bootstrap(nats: torch.Tensor, float_nats: torch.Tensor) -> tuple[float, float]:
    """The middle 95 % of the loss in percent, over sequences drawn with replacement, the same for both models."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(nats), (RESAMPLES, len(nats)), generator=generator)
    losses = (100 * (nats[drawn].sum(dim=1) / float_nats[drawn].sum(dim=1) - 1)).sort().values
    return float(losses[RESAMPLES // 40]), float(losses[-RESAMPLES // 40])


def show(rows: Sequence[dict[str, Any]]) -> None:
    for version in dict.fromkeys(row["version"] for row in rows):
        print(f"\n{version}")
        lines = [
            (
                row["method"],
                f"{row['bits_per_byte']:.4f}",
                f"{row['loss_percent']:+.2f} [{row['loss_low']:+.2f}..{row['loss_high']:+.2f}]",
                f"{row['kl']:.4f}",
                f"{100 * row['flips']:.1f}",
                f"{100 * row['outlier_share']:.1f}",
            )
            for row in rows
            if row["version"] == version
        ]
        head = ["method", "bits per byte", "loss %, 95 % of resamples", "KL, nats", "top-1 flips %", "8-bit MACs %"]
        print(common.table(head, lines))
    print()


def claims(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    loss = {(row["version"], row["method"]): row["loss_percent"] for row in rows}
    versions = list(dict.fromkeys(row["version"] for row in rows))
    ours, theirs = "FMPQ weft W4AxKV4", "FMPQ paper W4AxKV4"
    shares = [row["outlier_share"] for row in rows if row["method"] == ours]
    return {
        "fmpq_bpb_loss_percent": max(loss[version, ours] for version in versions),
        "fmpq_builtin_bpb_loss_percent": loss["built-in", ours],
        "fmpq_outlier_mac_percent": 100 * max(shares),
        "fmpq_of_paper_loss": max(loss[version, ours] / loss[version, theirs] for version in versions),
        "naive_w4a4_loss_percent": min(loss[version, "W4A4 naive"] for version in versions[1:]),
    }


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    versions = list(dict.fromkeys(row["version"] for row in rows))
    names = [name for name in dict.fromkeys(row["method"] for row in rows) if name != "FP32"]
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    for place, name in enumerate(names):
        losses = [max(row["loss_percent"], 0.01) for row in rows if row["method"] == name]
        axes.bar(
            [x + 0.8 * (place / len(names)) - 0.4 for x in range(len(versions))], losses, 0.8 / len(names), label=name
        )
    axes.set(ylabel="loss of bits per byte, %", yscale="log", xticks=range(len(versions)), xticklabels=versions)
    axes.axhline(1.5, color="black", linestyle=":", linewidth=1)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
