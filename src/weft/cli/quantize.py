"""`weft quantize MODEL -o OUT`: a checkpoint with 4-bit weights and block-wise 4- and 8-bit activations.

The work goes on in OUT.partial, which becomes OUT when everything is there. A run that was stopped goes on there when
the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import weft
from weft.bench.plot import picture_problems
from weft.cli.flags import Parser
from weft.config import BUILTIN_MODEL
from weft.errors import CheckpointError, ConfigError

if TYPE_CHECKING:  # torch comes with these
    from weft.comet.calibrate import Model, Progress, Settings, Text
    from weft.comet.checkpoint import FmpqConfig
    from weft.comet.report import Summary

STATE_FILE, REPORT_FILE, CONFIG_FILE = "state.json", "quantization_report.json", "config.json"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
USUAL_LENGTH = 512  # tokens in a calibration sequence
NARROW = 1024  # hidden channels; below, 4 bits beside the layers and in outlier blocks cost more than they save
HELD_OUT_PART = 10  # of a --calibration file, one part in this many is held out


def main(arguments: Sequence[str]) -> int:
    namespace = _parser().read(arguments)
    _check(namespace)
    output: Path = namespace.output
    if output.exists():
        raise ConfigError(f"--output {output} exists; give a new folder, or remove it first")
    work = output.with_name(output.name + ".partial")

    from weft.text.hub import resolve_model

    folder = resolve_model(namespace.model, namespace.revision)
    model = _open_model(folder, namespace.length)
    text = _text(folder, namespace, model)
    settings = _settings(namespace, model.shapes.hidden_size)
    _begin(work, _fingerprint(folder, settings, text))
    with _shown_progress() as tell:
        from weft.comet.calibrate import quantise_model

        config, summary = quantise_model(model, text, settings, work, tell)
    report = _finish(folder, work, output, config, summary, settings)
    _print(report, summary, output)
    if namespace.plot is not None:
        plot(summary, namespace.plot)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "weft quantize",
        "Quantise a model: weights to 4 bits, activations to 4 bits, but 8 in the blocks where 4 would cost most.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"'{BUILTIN_MODEL}', a Hugging Face folder, or a hub id ORG/NAME")
    add("-o", "--output", type=Path, metavar="OUT", help="folder to make; it must not exist yet")
    add("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")
    add("--method", choices=("fmpq", "paper"), default="fmpq", help="paper: 8-bit blocks by magnitude (default: fmpq)")
    add(
        "--outlier-budget",
        type=float,
        metavar="X",
        help="fmpq: largest share of multiply-adds on 8-bit activations, from 0 to 1 (default: 0.1)",
    )
    add(
        "--outlier-threshold",
        type=float,
        metavar="X",
        help="paper: a channel is an outlier above this many times the median magnitude (default: 6)",
    )
    add(
        "--hadamard",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="allow Hadamard transforms inside the 4-bit blocks (default: yes; the paper's method has none)",
    )
    add(
        "--weight-bits-outlier",
        choices=("auto", "4", "8"),
        default="auto",
        help="bits of the weights in 8-bit blocks (default: auto)",
    )
    for flag, what in (("--head-bits", "output layer"), ("--embedding-bits", "embedding")):
        add(
            flag,
            choices=("auto", "4", "8", "16"),
            default="auto",
            help=f"bits of the {what}; 16: as it is (default: auto: 4, but 8 for models narrower than {NARROW})",
        )
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to calibrate on; its last tenth is held out (default: sources of Python's standard library)",
    )
    add("--samples", type=int, default=32, metavar="N", help="calibration sequences (default: 32)")
    add("--length", type=int, metavar="N", help="tokens in each (default: 512, or the model's context if that is less)")
    add("--held-out", type=int, default=16, metavar="N", help="held-out sequences to measure on (default: 16)")
    add("--seed", type=int, default=0, metavar="N", help="of the choice of text (default: 0)")
    add("--plot", type=Path, metavar="FILE", help="draw the report (needs matplotlib)")
    return parser


def _check(namespace: argparse.Namespace) -> None:
    """Raise ConfigError naming every flag that cannot be honoured."""
    problems = []
    if namespace.output is None:
        problems.append("--output is missing: give the folder to make, e.g. -o model-fmpq")
    for flag, value in (("--samples", namespace.samples), ("--held-out", namespace.held_out)):
        if value < 1:
            problems.append(f"{flag} is {value}; it must be at least 1")
    if namespace.length is not None and namespace.length < 2:
        problems.append(f"--length is {namespace.length}; it must be at least 2")
    budget, threshold = namespace.outlier_budget, namespace.outlier_threshold
    if budget is not None and not 0 <= budget <= 1:
        problems.append(f"--outlier-budget is {budget}; it must be from 0 to 1")
    if threshold is not None and not 1 <= threshold < float("inf"):
        problems.append(f"--outlier-threshold is {threshold}; it must be 1 or more")
    if namespace.method == "paper" and budget is not None:
        problems.append("--outlier-budget is for --method fmpq; the paper's method has --outlier-threshold")
    if namespace.method == "fmpq" and threshold is not None:
        problems.append("--outlier-threshold is for --method paper; fmpq has --outlier-budget")
    problems += _plot_problems(namespace.plot)
    if problems:
        raise ConfigError("\n".join(problems))


def _plot_problems(file: Path | None) -> list[str]:
    """What would keep the picture from being drawn, found before the hours of work that come before it."""
    if file is None:
        return []
    problems = picture_problems(file)
    if not file.parent.is_dir():
        problems.append(f"--plot is {file}; there is no folder {file.parent}")
    return problems


def _settings(namespace: argparse.Namespace, hidden_size: int) -> Settings:
    from weft.comet.calibrate import Settings
    from weft.comet.layer import Method
    from weft.comet.weights import Rounding

    paper = namespace.method == "paper"
    given = {"budget": namespace.outlier_budget, "threshold": namespace.outlier_threshold}
    chosen = {name: value for name, value in given.items() if value is not None}
    method = Method(name=namespace.method, hadamard=namespace.hadamard and not paper, **chosen)
    auto = 8 if hidden_size < NARROW else 4
    outliers, head, embedding = (
        auto if bits == "auto" else int(bits)
        for bits in (namespace.weight_bits_outlier, namespace.head_bits, namespace.embedding_bits)
    )
    return Settings(method, Rounding(outliers, compensate=not paper), head, embedding)


def _open_model(folder: Path, length: int | None) -> Model:
    """Raises CheckpointError for a folder that is not a whole float model, ConfigError for too long a --length."""
    from weft.comet.calibrate import Model
    from weft.comet.forward import Rotation
    from weft.models.checkpoint import Checkpoint
    from weft.models.families import read_config
    from weft.models.loader import EMBEDDING, HEAD, NORM, layer_shapes, tensor_shapes
    from weft.models.rope import Rotary

    config = read_config(folder)
    if config.quantization is not None:
        raise CheckpointError(f"{folder} is quantised already; give the checkpoint that it was made from")
    if config.experts is not None:
        raise CheckpointError(
            f"{folder} is a {config.family} with {config.experts.count} experts in each layer, which `weft quantize` "
            "cannot quantise; `weft serve` serves it as it is"
        )
    if length is not None and length > config.context:
        raise ConfigError(f"--length is {length}; the model's context is {config.context} tokens")
    length = min(USUAL_LENGTH, config.context) if length is None else length
    checkpoint = Checkpoint(folder)
    checkpoint.check(tensor_shapes(config), optional=[HEAD] if config.tied else [])
    prefix = "model.layers."

    def layer(index: int) -> dict[str, Any]:
        names = list(layer_shapes(config, index))
        return {name.removeprefix(f"{prefix}{index}."): tensor for name, tensor in checkpoint.take(names).items()}

    return Model(
        shapes=config,
        rotation=Rotation(*Rotary(config.rope, config.head_dim).tables(length)),
        layer=layer,
        rest=lambda: checkpoint.take([name for name in (EMBEDDING, NORM, HEAD) if name in checkpoint]),
        file=lambda name: str(checkpoint.entries[name].file),
    )


def _text(folder: Path, namespace: argparse.Namespace, model: Model) -> Text:
    """As long as the model's rotation, which `_open_model` made for it."""
    import torch

    from weft.comet.calibrate import Text
    from weft.comet.corpus import standard_library, windows
    from weft.text.tokenizer import Tokenizer

    file: Path | None = namespace.calibration
    length, vocabulary = len(model.rotation.cos), model.shapes.vocabulary
    if file is None:
        parts = standard_library()
    else:
        whole = _read(file)
        cut = len(whole) - len(whole) // HELD_OUT_PART
        parts = [whole[:cut]], [whole[cut:]]
    tokenizer = Tokenizer.from_folder(folder)
    rows = []
    for texts, count, what in zip(parts, (namespace.samples, namespace.held_out), ("", "held-out "), strict=True):
        found = windows(texts, tokenizer.encode, count, length, namespace.seed)
        if not found:
            where = "the standard library's sources" if file is None else f"--calibration {file}"
            raise ConfigError(f"{where} gave not even one {what}sequence of {length} tokens; lower --length")
        if (largest := max(map(max, found))) >= vocabulary:
            raise CheckpointError(f"{folder}: the tokenizer made token {largest}; the model has {vocabulary} of them")
        rows.append(torch.tensor(found))
    return Text(rows[0], rows[1])


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--calibration {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--calibration {file} is not UTF-8 text: {error}") from error


def _fingerprint(folder: Path, settings: Settings, text: Text) -> dict[str, Any]:
    """What a half-done folder must have been begun with to be gone on with."""
    files = {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.iterdir())
        if path.suffix in (".safetensors", ".json")
    }
    tokens = hashlib.sha256(text.calibration.numpy().tobytes() + text.held_out.numpy().tobytes()).hexdigest()
    return {"weft": weft.__version__, "files": files, "settings": asdict(settings), "tokens": tokens}


def _begin(work: Path, fingerprint: dict[str, Any]) -> None:
    """Make the work folder, or go on in one that the same command left behind."""
    state = work / STATE_FILE
    if work.exists():
        if not state.is_file():
            raise ConfigError(f"{work} is in the way: weft would work there, and did not make it; remove it")
        if state.read_text() == json.dumps(fingerprint):
            print(f"going on in {work}", file=sys.stderr)
            return
        print(f"{work} was begun with other settings or another model: beginning anew", file=sys.stderr)
        shutil.rmtree(work)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--output: {work} cannot be made: {error.strerror}") from error
    state.write_text(json.dumps(fingerprint))


def _finish(
    folder: Path, work: Path, output: Path, config: FmpqConfig, summary: Summary, settings: Settings
) -> dict[str, Any]:
    """Everything that is not weights, then the name. Returns the report."""
    for pattern in COPIED:
        for path in folder.glob(pattern):
            if path.name != CONFIG_FILE and not path.name.endswith(".index.json"):
                shutil.copyfile(path, work / path.name)
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    raw["quantization_config"] = config.as_json()
    (work / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n")
    sizes = {
        name: sum(path.stat().st_size for path in place.glob("*.safetensors"))
        for name, place in (("float_file_bytes", folder), ("file_bytes", work))
    }
    report = summary.as_json() | {"settings": asdict(settings), "sizes": sizes}
    (work / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    (work / STATE_FILE).unlink()
    work.replace(output)
    return report


def _print(report: dict[str, Any], summary: Summary, output: Path) -> None:
    from weft.comet.report import as_text

    print(as_text(summary))
    before, after = report["sizes"]["float_file_bytes"], report["sizes"]["file_bytes"]
    print(f"files                {after / 1e6:,.1f} MB of {before / 1e6:,.1f} MB ({100 * after / before:.1f} %)")
    print(f"\n{output} is ready; its report is {output / REPORT_FILE}")


@contextmanager
def _shown_progress() -> Iterator[Callable[[Progress], None]]:
    """A bar on standard error when that is a terminal; warnings always."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def tell(progress: Progress) -> None:
            if progress.note:
                console.print(f"warning: {progress.note}", markup=False, highlight=False)
            if progress.phase not in tasks:
                tasks[progress.phase] = bars.add_task(progress.phase, total=progress.total)
            bars.update(tasks[progress.phase], completed=progress.done)

        yield tell


def plot(summary: Summary, file: Path) -> None:
    """Signal to error of each site over the layers, and the share of 8-bit blocks below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True)
    numbers = [layer.index for layer in summary.layers]
    for place, first in enumerate(summary.layers[0].sites):
        rows = [layer.sites[place] for layer in summary.layers]
        upper.plot(numbers, [row.decibels for row in rows], "o-", markersize=3, label=first.site)
        lower.plot(numbers, [100 * row.outlier_blocks / row.blocks for row in rows], "o-", markersize=3)
    upper.plot(numbers, [layer.held_out_decibels for layer in summary.layers], "k--", label="hidden rows, held-out")
    upper.set(ylabel="output over its error, dB")
    upper.legend()
    quality = summary.quality
    title = f"KL {quality.kl:.4f} nats, top-1 flips {100 * quality.flips:.1f} %, {quality.loss_percent:+.2f} % nats"
    upper.set_title(title)
    lower.set(xlabel="layer", ylabel="8-bit blocks, %")
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    pyplot.close(figure)
