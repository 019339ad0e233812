"""What 4 bits cost: the built-in model, and versions of it with injected outliers, under ten ways to quantise.

    python benchmarks/accuracy.py [--quick] [--json FILE] [--plot FILE]

Every version computes what the built-in model computes (this is checked first) but has outliers where large models
have them (outliers.py). Bits per byte, KL and top-1 flips are against the float32 model of the same version, on text
held out from the model's training and from calibration. Activations of 4 bits are exact here, in every method that has
them. "KV4" are keys and values of 4 bits for each token and head, asymmetrically; in weft's own method as its KV cache
stores them (src/weft/kernels/kv.py). The output layer and the embedding are left as they are, but in the last row. Bits
per weight are those of the layers, scales included.

    W8A8            weights 8 bits per output, activations 8 bits per token, both to the nearest
    W4A16           weights 4 bits in groups of 128, GPTQ
    W4A4 naive      weights as above but to the nearest, activations 4 bits per token
    W4A8KV4         weights as W4A16, activations 8 bits per token
    FMPQ paper      the paper's method (its threshold chosen so that its 8-bit share is nearest to the 16 % it reports),
                    weights to the nearest after a search for the scales; and the same with GPTQ
    FMPQ weft       `weft quantize` with its defaults for narrow models, with and without KV4: weights of 8 bits in the
                    blocks that keep 8-bit activations, of 4 bits elsewhere
    ... W4          the same with 4-bit weights everywhere, as wide models have them
    ... all 4-bit   and with the output layer and the embedding in 4 bits, out of the same budget of 8-bit blocks

Claims: the worst over all versions, but `naive_w4a4_loss_percent`, which is the least over the injected ones.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import torch
from outliers import EMBEDDING, HEAD, INJECTIONS, NORM, Tensors
from torch.nn.functional import linear

from weft.comet.calibrate import Model, Progress, Settings, Text, quantise_model, quantised_linears, through
from weft.comet.checkpoint import FmpqConfig, read_layer
from weft.comet.corpus import standard_library, windows
from weft.comet.fmpq import paper_outliers
from weft.comet.forward import SITES, KeysValues, Linears, Rotation, joined, plain_linears, run_layer
from weft.comet.layer import Method
from weft.comet.outer import Outer, as_it_was, read_embedding, read_head
from weft.comet.packing import BLOCK
from weft.comet.watch import Watch
from weft.comet.weights import Rounding, quantise_weight
from weft.comet.work import shard
from weft.kernels import kv
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
OURS = "FMPQ weft W4AxKV4"


@dataclass(frozen=True, slots=True)
class Version:
    """The built-in model, or one with outliers: tensors, and the log-probabilities of its float32 form."""

    name: str
    model: Model
    logs: torch.Tensor  # [S, L, vocabulary]


@dataclass(frozen=True, slots=True)
class Layers:
    """What a method made: for each layer its norms and linears, what it does to keys and values, and what stands around
    the layers where that is not the model's own."""

    parts: list[tuple[Any, Linears]]
    keys_values: KeysValues | None
    outlier_share: float
    bits_per_weight: float
    outer: Outer | None = None


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0]).parse_args()
    folder = resolve_model("builtin")
    config = read_config(folder)
    checkpoint = Checkpoint(folder)
    tensors = {name: tensor.float() for name, tensor in checkpoint.take(list(checkpoint.entries)).items()}
    text, sizes = read_text(folder, (4, 4) if arguments.quick else (32, 32))
    with torch.no_grad():
        wanted = [None, "all of them"] if arguments.quick else [None, *INJECTIONS]
        rows = []
        for version in make_versions(tensors, config, text, wanted):
            began = time.monotonic()
            for method, made in all_methods(version.model, text, arguments.quick):
                row = {"version": version.name, "method": method, "outlier_share": made.outlier_share}
                row["bits_per_weight"] = made.bits_per_weight
                rows.append(row | measure(version, made, text.held_out, sizes))
                print(f"{version.name}, {method}: {time.monotonic() - began:.0f} s", flush=True)
                began = time.monotonic()
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
    outer, found = layers.outer or as_it_was(model.rest()), []
    logits = outer.logits(model.shapes.eps)
    for row in tokens:
        hidden = outer.embed(row[None])
        for index, (norms, linears) in enumerate(layers.parts):
            window = model.shapes.windows[index]
            hidden = run_layer(hidden, norms, model.shapes, window, model.rotation, linears, layers.keys_values)
        found.append(logits(hidden[0]).log_softmax(dim=-1))
    return torch.stack(found)


# The methods: from a model and text to layers.


def all_methods(model: Model, text: Text, quick: bool) -> Iterator[tuple[str, Layers]]:
    """One after the other, in the order of the table. Those that share their weights are made together."""
    yield "FP32", exact(model)
    if not quick:
        yield "W8A8", plain(model, Weights(8), activation_bits=8)
        four = rounded_weights(model, Weights(4, text.calibration))
        yield "W4A16", with_activations(model, four, None, None)
        yield "W4A8KV4", with_activations(model, four, 8, kv4)
    yield "W4A4 naive", plain(model, Weights(4), activation_bits=4)
    threshold = papers_threshold(model, text)
    for name, gptq in (("FMPQ paper W4AxKV4", False), ("FMPQ paper + GPTQ W4AxKV4", True)):
        if not (quick and gptq):
            method = Method(name="paper", hadamard=False, threshold=threshold)
            yield name, fmpq(model, text, Settings(method, Rounding(compensate=gptq)), kv4)
    ours = fmpq(model, text, Settings(Method(), Rounding(outlier_bits=8)), cached_kv4)
    if not quick:
        yield "FMPQ weft W4Ax", replace(ours, keys_values=None)
    yield OURS, ours
    if not quick:
        yield f"{OURS}, W4", fmpq(model, text, Settings(Method(), Rounding()), cached_kv4)
        yield f"{OURS}, all 4-bit", fmpq(model, text, Settings(Method(), Rounding(), 4, 4), cached_kv4)


def exact(model: Model) -> Layers:
    layers = [model.layer(index) for index in range(model.shapes.layers)]
    return Layers([(tensors, plain_linears(tensors)) for tensors in layers], None, 0.0, 32.0)


@dataclass(frozen=True, slots=True)
class Weights:
    """How `plain` rounds weights: to the nearest, or by GPTQ on calibration tokens (4 bits, groups of 128)."""

    bits: int
    calibration: torch.Tensor | None = None


def plain(model: Model, weights: Weights, activation_bits: int) -> Layers:
    """Every linear alike, nothing scaled or moved."""
    made = with_activations(model, rounded_weights(model, weights), activation_bits, None)
    return replace(made, bits_per_weight=8.0) if weights.bits == 8 else made


def with_activations(
    model: Model, rounded: list[dict[str, torch.Tensor]], bits: int | None, keys_values: KeysValues | None
) -> Layers:
    parts: list[tuple[Any, Linears]] = [
        (model.layer(index), per_token(weights, bits)) for index, weights in enumerate(rounded)
    ]
    return Layers(parts, keys_values, 1.0 if bits == 8 else 0.0, 4 + 16 / BLOCK)


def rounded_weights(model: Model, weights: Weights) -> list[dict[str, torch.Tensor]]:
    """The weights of each layer's sites."""
    layers = []
    tokens = weights.calibration
    hidden = None if tokens is None else as_it_was(model.rest()).embed(tokens)
    for index in range(model.shapes.layers):
        tensors = model.layer(index)
        moments: dict[str, torch.Tensor] = {}
        if hidden is not None:
            through(hidden, tensors, model, index, watching(plain_linears(tensors), moments))
        rounded = {site: rounded_weight(joined(tensors, site)[0], weights, moments.get(site)) for site in SITES}
        if hidden is not None:
            hidden = through(hidden, tensors, model, index, per_token(rounded, None))
        layers.append(rounded)
    return layers


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


def papers_threshold(model: Model, text: Text) -> float:
    """The threshold with which the paper's share of 8-bit blocks is nearest to the one that it reports."""
    tokens = text.calibration
    hidden = as_it_was(model.rest()).embed(tokens)
    largest = []  # (of the site's channels, outputs)
    for index in range(model.shapes.layers):
        tensors = model.layer(index)
        watch = Watch(plain_linears(tensors), tokens.numel())
        hidden = through(hidden, tensors, model, index, watch)
        largest += [(seen.largest, len(joined(tensors, site)[0])) for site, seen in watch.statistics().items()]
    whole = sum(len(channels) * outputs for channels, outputs in largest)

    def share(threshold: float) -> float:
        return sum(paper_outliers(each, threshold)[1] * BLOCK * outputs for each, outputs in largest) / whole

    return min(THRESHOLDS, key=lambda threshold: abs(share(threshold) - PAPER_SHARE))


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
        outer = read_outer(held, config, model, shard(work, model.shapes.layers, model.shapes.layers))
    parts = [(layer.norms, quantised_linears(layer)) for layer in layers]
    return Layers(parts, keys_values, summary.outlier_share, summary.bits_per_weight, outer)


def read_outer(held: Checkpoint, config: FmpqConfig, model: Model, path: Path) -> Outer | None:
    """Embedding, norm and output layer where they are quantised, both of them."""
    if config.head is None:
        return None
    names = [name for name in held.entries if not name.startswith("model.layers.")]
    tensors = {name: tensor.clone() for name, tensor in held.take(names).items()}
    embedding, head = (read(tensors, config, model.shapes, path) for read in (read_embedding, read_head))
    return Outer(embedding, tensors[NORM], head)


def _warnings(progress: Progress) -> None:
    if progress.note:
        print(progress.note)


def kv4(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both to 4 bits, one scale and zero for each token and head."""
    return asymmetric4(keys), asymmetric4(values)


def cached_kv4(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What weft's KV cache of 4 bits gives back."""
    keys, values = (kv.gather(kv.dequantise(*kv.quantise(kv.spread(x), 4), 4)) for x in (keys, values))
    return keys, values


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
                f"{row['bits_per_weight']:.2f}",
            )
            for row in rows
            if row["version"] == version
        ]
        head = [
            "method",
            "bits per byte",
            "loss %, 95 % of resamples",
            "KL, nats",
            "top-1 flips %",
            "8-bit MACs %",
            "bits/weight",
        ]
        print(common.table(head, lines))
    print()


def claims(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    loss = {(row["version"], row["method"]): row["loss_percent"] for row in rows}
    versions = list(dict.fromkeys(row["version"] for row in rows))
    ours, theirs = OURS, "FMPQ paper W4AxKV4"
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
    axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
