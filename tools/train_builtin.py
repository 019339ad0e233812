"""Train weft's built-in model on the standard library's sources, and export it as a Hugging Face folder.

    python tools/train_builtin.py                # the run that made the committed model, into build/builtin
    python tools/train_builtin.py --resume       # go on from the last checkpoint in --work
    kill -USR1 PID                               # begin the decay now instead of at its planned step

The learning rate is trapezoidal: a short warm-up, a constant stretch, a linear decay to zero. The constant stretch uses
windows of 512 tokens, the decay windows of the model's full context. Checkpoints are safetensors and JSON.
"""

import argparse
import csv
import json
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builtin_data import corpus, encode_stream, tokenizer_config, train_tokenizer
from builtin_model import Llama, Shape, export_folder
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
GENERATION = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.95,
}
PROBE_TOKENS = 32 * 1024  # held-out tokens that the progress figure uses; tools/eval_builtin.py measures all of them
COLUMNS = ("step", "tokens", "seconds", "loss", "held_out", "rate", "tokens_per_s")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps before decay_from are warm-up or constant; `decay` steps to zero follow. Windows and batch in tokens."""

    warmup: int
    decay_from: int
    decay: int
    short_window: int
    long_window: int
    batch_tokens: int

    @property
    def steps(self) -> int:
        return self.decay_from + self.decay

    def scale(self, step: int) -> float:
        """Learning rate of a step as a fraction of the peak."""
        if step >= self.decay_from:
            return max(0.0, 1 - (step - self.decay_from + 1) / self.decay)
        return min(1.0, (step + 1) / self.warmup)

    def window(self, step: int) -> int:
        return self.long_window if step >= self.decay_from else self.short_window


@dataclass(frozen=True, slots=True)
class Group:
    """An optimizer, the names of its parameters in its own order, and its peak learning rate."""

    optimizer: torch.optim.Optimizer
    names: tuple[str, ...]
    peak: float


def batch_at(stream: np.ndarray, schedule: Schedule, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [sequences, window] of a step: a function of the step alone, so a resumed run sees the same.

    The stream is cut into windows at a random offset and they are visited in random order, once per epoch; the decay
    begins a new epoch.
    """
    window = schedule.window(step)
    first_step = schedule.decay_from if step >= schedule.decay_from else 0
    rows = schedule.batch_tokens // window
    per_epoch = (len(stream) - 1 - window) // window
    picked = []
    for index in range((step - first_step) * rows, (step - first_step + 1) * rows):
        generator = np.random.default_rng([seed, first_step, index // per_epoch])
        offset, order = int(generator.integers(window)), generator.permutation(per_epoch)
        begin = offset + int(order[index % per_epoch]) * window
        picked.append(stream[begin : begin + window + 1])
    tokens = torch.from_numpy(np.stack(picked).astype(np.int64))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def make_groups(model: Llama, muon_rate: float, adamw_rate: float, weight_decay: float) -> list[Group]:
    """Muon for the matrices, AdamW for the embedding and the norms."""
    named = dict(model.named_parameters())
    matrices = tuple(name for name, p in named.items() if p.ndim == 2 and "embed" not in name)
    others = tuple(name for name in named if name not in set(matrices))
    muon = torch.optim.Muon(
        [named[name] for name in matrices],
        lr=muon_rate,
        weight_decay=weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW([named[name] for name in others], lr=adamw_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [Group(muon, matrices, muon_rate), Group(adamw, others, adamw_rate)]


def save_checkpoint(folder: Path, model: Llama, groups: list[Group], meta: dict[str, Any]) -> None:
    """Weights, optimizer state and meta data as one safetensors file; the old one stays until the new one is whole."""
    tensors: dict[str, Tensor] = {f"weight|{name}": p.detach().cpu() for name, p in model.named_parameters()}
    for group in groups:
        for name, parameter in zip(group.names, group.optimizer.param_groups[0]["params"], strict=True):
            for key, value in group.optimizer.state[parameter].items():
                tensors[f"{key}|{name}"] = torch.as_tensor(value).detach().cpu()
    save_file(tensors, folder / "checkpoint.new")
    (folder / "checkpoint.new").replace(folder / "checkpoint.safetensors")
    (folder / "checkpoint.json").write_text(json.dumps(meta, indent=2) + "\n")


def load_checkpoint(folder: Path, model: Llama, groups: list[Group]) -> dict[str, Any]:
    """Restore what save_checkpoint wrote, and return its meta data."""
    named = dict(model.named_parameters())
    owner = {name: group.optimizer for group in groups for name in group.names}
    for full, value in load_file(folder / "checkpoint.safetensors").items():
        key, name = full.split("|", 1)
        if key == "weight":
            named[name].data.copy_(value)
        else:
            owner[name].state[named[name]][key] = value if key == "step" else value.to(named[name].device)
    meta: dict[str, Any] = json.loads((folder / "checkpoint.json").read_text())
    return meta


def held_out_loss(model: Llama, stream: np.ndarray, window: int, device: torch.device) -> float:
    """Mean nats per token over the first PROBE_TOKENS held-out tokens, in separate windows: a progress figure."""
    count = min(PROBE_TOKENS, len(stream) - 1) // window
    total = 0.0
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for row in range(count):
            tokens = torch.from_numpy(stream[row * window : (row + 1) * window + 1].astype(np.int64)).to(device)[None]
            total += model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    return total / count


def export(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the complete Hugging Face folder."""
    export_folder(model, folder, GENERATION)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(tokenizer_config(model.shape.context), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n")


def plot(log: Path, target: Path) -> None:
    """Draw training and held-out loss, and the learning rate, over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with log.open() as file:
        rows = list(csv.DictReader(file))
    tokens = np.array([float(row["tokens"]) / 1e6 for row in rows])
    losses = np.array([float(row["loss"]) for row in rows])
    kernel = np.ones(min(15, len(losses)))
    mean = np.convolve(losses, kernel, "same") / np.convolve(np.ones_like(losses), kernel, "same")
    probed = [index for index, row in enumerate(rows) if row["held_out"]]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(tokens, losses, color="#bbb", linewidth=0.6, label="train, as logged")
    axes.plot(tokens, mean, label="train, moving mean")
    axes.plot(tokens[probed], [float(rows[i]["held_out"]) for i in probed], "o-", markersize=3, label="held-out probe")
    axes.set(xlabel="million tokens", ylabel="nats per token", ylim=(float(losses.min()) - 0.2, 5))
    axes.legend()
    rates = axes.twinx()
    rates.plot(tokens, [float(row["rate"]) for row in rows], color="tab:green", linestyle=":", linewidth=1)
    rates.set_ylabel("learning rate (dotted)")
    figure.tight_layout()
    figure.savefig(target, dpi=90)


class Log:
    """The run's CSV file and its printed lines. Knows the seconds that training has taken, over resumptions."""

    def __init__(self, path: Path, step: int, seconds: float) -> None:
        kept = []
        if step:  # rows after the checkpoint belong to steps that will be done again
            with path.open() as file:
                kept = [row for row in csv.reader(file) if row[0] != "step" and int(row[0]) <= step]
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerows([COLUMNS, *kept])
        self.seconds, self._step, self._mark = seconds, step, time.monotonic()
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        self._losses.append(loss)

    def write(self, schedule: Schedule, step: int, rate: float, probe: Callable[[], float] | None) -> None:
        """Close the stretch of steps since the last call; the time that the probe takes is not counted."""
        loss = torch.stack(self._losses).mean().item()
        elapsed = time.monotonic() - self._mark
        self.seconds += elapsed
        speed = (step - self._step) * schedule.batch_tokens / elapsed
        held_out = f"{probe():.4f}" if probe else ""
        tokens = step * schedule.batch_tokens
        self._writer.writerow(
            [step, tokens, f"{self.seconds:.1f}", f"{loss:.4f}", held_out, f"{rate:.6f}", f"{speed:.0f}"]
        )
        self._file.flush()
        minutes = (schedule.steps - step) * schedule.batch_tokens / speed / 60
        shown = f"  held-out {held_out}" if held_out else ""
        progress = f"step {step}/{schedule.steps}  loss {loss:.4f}{shown}  lr {rate:.5f}"
        print(f"{progress}  {speed:,.0f} tokens/s  ETA {minutes:.1f} min", flush=True)
        self._losses, self._step, self._mark = [], step, time.monotonic()

    def resume_clock(self) -> None:
        self._mark = time.monotonic()


def step_once(
    loss_function: Callable[[Tensor, Tensor], Tensor], groups: list[Group], batch: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """One optimizer step at `scale` times the peak learning rates; returns the loss before it."""
    inputs, targets = batch
    with torch.autocast(inputs.device.type, torch.bfloat16):
        loss = loss_function(inputs, targets)
    loss.backward()
    for group in groups:
        group.optimizer.param_groups[0]["lr"] = group.peak * scale
        group.optimizer.step()
        group.optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def train(arguments: argparse.Namespace) -> None:
    """The run: from the text to the exported folder."""
    device = torch.device(arguments.device)
    documents = corpus()
    tokenizer = train_tokenizer(documents[0])
    stream, held_out = (encode_stream(tokenizer, part) for part in documents)
    print(f"train {len(documents[0])} files, {len(stream):,} tokens; held-out {len(documents[1])}, {len(held_out):,}")
    torch.manual_seed(arguments.seed)
    model = Llama(Shape(layers=arguments.layers, context=arguments.context)).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}, {torch.get_num_threads()} threads")
    groups = make_groups(model, arguments.muon_rate, arguments.adamw_rate, arguments.weight_decay)
    schedule, step, seconds = arguments.schedule, 0, 0.0
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.resume:
        meta = load_checkpoint(arguments.work, model, groups)
        step, seconds = meta["step"], meta["seconds"]
        if step > meta["schedule"]["decay_from"]:  # before the decay the command line holds: a run can be lengthened
            schedule = Schedule(**meta["schedule"])
        print(f"resumed at step {step} of {schedule.steps}")
    log = Log(arguments.work / "log.csv", step, seconds)
    loss_function = torch.compile(model.loss, dynamic=False) if arguments.compile else model.loss
    decay_asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: decay_asked.append(number))
    saved = time.monotonic()
    while step < schedule.steps:
        if decay_asked and step < schedule.decay_from:
            schedule = replace(schedule, decay_from=step)
        inputs, targets = batch_at(stream, schedule, step, arguments.seed)
        scale = schedule.scale(step)
        log.add(step_once(loss_function, groups, (inputs.to(device), targets.to(device)), scale))
        step += 1
        last = step == schedule.steps
        if step % arguments.log_every == 0 or last:
            probe = None
            if step % arguments.probe_every == 0 or last:
                probe = lambda: held_out_loss(model, held_out, arguments.short_window, device)  # noqa: E731
            log.write(schedule, step, arguments.muon_rate * scale, probe)
            if time.monotonic() - saved > arguments.save_every or last:
                meta = {"step": step, "seconds": log.seconds, "schedule": asdict(schedule)}
                save_checkpoint(arguments.work, model, groups, meta)
                export(model, tokenizer, arguments.output)
                log.resume_clock()
                saved = time.monotonic()
    if arguments.plot:
        plot(arguments.work / "log.csv", arguments.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "builtin", help="folder to export to")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "builtin-work", help="checkpoint and log")
    parser.add_argument("--plot", type=Path, default=None, help="PNG of the loss curve (needs matplotlib)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's own choice")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=2048, help="window during the decay, in tokens")
    parser.add_argument("--short-window", type=int, default=512, help="window before the decay, in tokens")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4001, help="all optimizer steps")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--decay", type=int, default=1400, help="how many of the steps, the last ones, are the decay")
    parser.add_argument("--muon-rate", type=float, default=0.007, help="peak learning rate of the matrices")
    parser.add_argument("--adamw-rate", type=float, default=0.015, help="peak learning rate of embedding and norms")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the matrices")
    parser.add_argument("--log-every", type=int, default=10, help="steps between printed lines")
    parser.add_argument("--probe-every", type=int, default=100, help="steps between held-out figures")
    parser.add_argument("--save-every", type=float, default=180, help="seconds between checkpoints")
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.batch_tokens % arguments.context or arguments.batch_tokens % arguments.short_window:
        parser.error(f"--batch-tokens {arguments.batch_tokens} must be a multiple of --context and --short-window")
    if not 0 < arguments.decay < arguments.steps:
        parser.error(f"--decay {arguments.decay} must lie between 1 and --steps {arguments.steps} - 1")
    arguments.schedule = Schedule(
        warmup=arguments.warmup,
        decay_from=arguments.steps - arguments.decay,
        decay=arguments.decay,
        short_window=arguments.short_window,
        long_window=arguments.context,
        batch_tokens=arguments.batch_tokens,
    )
    return arguments


if __name__ == "__main__":
    train(parse())
