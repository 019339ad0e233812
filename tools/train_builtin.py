"""Train weft's built-in model on the standard library's sources, and export it as a Hugging Face folder.

    python tools/train_builtin.py                      # what made the committed model: about TOKENS tokens
    python tools/train_builtin.py --resume             # go on from the last checkpoint in --work
    kill -USR1 PID                                     # begin the decay now instead of at its planned step

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
from builtin_data import Document, corpus, encode_stream, tokenizer_config, train_tokenizer
from builtin_model import Llama, Shape, export_folder
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
GENERATION = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
PROBE_TOKENS = 32 * 1024  # held-out tokens that the progress figure uses; tools/eval_builtin.py measures all of them


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of the run. Step s < decay_from is warm-up or constant; the rest is the decay to zero."""

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


def batch_at(stream: np.ndarray, schedule: Schedule, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [sequences, window] of a step: a function of the step alone, so a resumed run sees the same.

    The stream is cut into windows at a random offset and they are visited in random order, once per epoch.
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


def make_optimizers(model: Llama, arguments: argparse.Namespace) -> list[tuple[torch.optim.Optimizer, list[str], float]]:
    """Muon for the matrices, AdamW for the embedding and the norms; each with its parameters' names and peak rate."""
    named = dict(model.named_parameters())
    matrices = [name for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    others = [name for name in named if name not in set(matrices)]
    muon = torch.optim.Muon(
        [named[name] for name in matrices],
        lr=arguments.muon_rate,
        weight_decay=arguments.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [named[name] for name in others], lr=arguments.adamw_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    return [(muon, matrices, arguments.muon_rate), (adamw, others, arguments.adamw_rate)]


def save_checkpoint(
    folder: Path, model: Llama, optimizers: list[tuple[torch.optim.Optimizer, list[str], float]], meta: dict[str, Any]
) -> None:
    """Weights and optimizer state as one safetensors file, the rest as JSON; the old checkpoint stays until replaced."""
    tensors: dict[str, Tensor] = {f"weight|{name}": p.detach().cpu() for name, p in model.named_parameters()}
    for optimizer, names, _ in optimizers:
        for name, parameter in zip(names, optimizer.param_groups[0]["params"], strict=True):
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}|{name}"] = torch.as_tensor(value).detach().cpu()
    save_file(tensors, folder / "checkpoint.new", metadata={"meta": json.dumps(meta)})
    (folder / "checkpoint.new").replace(folder / "checkpoint.safetensors")
    (folder / "checkpoint.json").write_text(json.dumps(meta, indent=2) + "\n")


def load_checkpoint(
    folder: Path, model: Llama, optimizers: list[tuple[torch.optim.Optimizer, list[str], float]]
) -> dict[str, Any]:
    """Restore what save_checkpoint wrote, and return its meta data."""
    tensors = load_file(folder / "checkpoint.safetensors")
    named = dict(model.named_parameters())
    owner = {name: optimizer for optimizer, names, _ in optimizers for name in names}
    for full, value in tensors.items():
        key, name = full.split("|", 1)
        parameter = named[name]
        if key == "weight":
            parameter.data.copy_(value)
        else:
            owner[name].state[parameter][key] = value if key == "step" else value.to(parameter.device)
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


def plot(log: Path, target: Path) -> None:
    """Draw training and held-out loss over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(csv.DictReader(log.open()))
    tokens = [float(row["tokens"]) / 1e6 for row in rows]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    losses = np.array([float(row["loss"]) for row in rows])
    axes.plot(tokens, losses, color="#bbb", linewidth=0.6, label="train, each logged step")
    kernel = np.ones(min(15, len(losses)))
    axes.plot(tokens, np.convolve(losses, kernel, "same") / np.convolve(np.ones_like(losses), kernel, "same"), label="train, mean")
    probes = [(t, float(row["held_out"])) for t, row in zip(tokens, rows, strict=True) if row["held_out"]]
    axes.plot([t for t, _ in probes], [v for _, v in probes], "o-", markersize=3, label="held-out (first 32k tokens)")
    axes.set(xlabel="million tokens", ylabel="nats per token", ylim=(float(losses.min()) - 0.2, 5))
    rates = axes.twinx()
    rates.plot(tokens, [float(row["rate"]) for row in rows], color="tab:green", linestyle=":", linewidth=1)
    rates.set_ylabel("learning rate (dotted)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=90)


def export(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the complete Hugging Face folder."""
    export_folder(model, folder, GENERATION)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(tokenizer_config(model.shape.context), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n")


class DecayRequest:
    """Remembers that SIGUSR1 asked for the decay to begin at the next step."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGUSR1, self._ask)

    def _ask(self, signum: int, frame: object) -> None:
        self.asked = True


def step_once(
    loss_function: Callable[[Tensor, Tensor], Tensor],
    optimizers: list[tuple[torch.optim.Optimizer, list[str], float]],
    inputs: Tensor,
    targets: Tensor,
    scale: float,
) -> Tensor:
    """One optimizer step at `scale` times the peak learning rates; returns the loss."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        loss = loss_function(inputs, targets)
    loss.backward()
    for optimizer, _, peak in optimizers:
        optimizer.param_groups[0]["lr"] = peak * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def train(arguments: argparse.Namespace, documents: tuple[list[Document], list[Document]]) -> None:
    """The run: from the text to the exported folder."""
    device = torch.device(arguments.device)
    tokenizer = train_tokenizer(documents[0])
    stream, held_out = (encode_stream(tokenizer, part) for part in documents)
    print(f"train {len(documents[0])} files, {len(stream):,} tokens; held-out {len(documents[1])}, {len(held_out):,}")
    torch.manual_seed(arguments.seed)
    model = Llama(Shape(layers=arguments.layers, context=arguments.context)).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}, {torch.get_num_threads()} threads")
    if arguments.steps == 0:
        return export(model, tokenizer, arguments.output)
    optimizers = make_optimizers(model, arguments)
    schedule = Schedule(
        arguments.warmup,
        arguments.steps - arguments.decay,
        arguments.decay,
        arguments.short_window,
        arguments.context,
        arguments.batch_tokens,
    )
    arguments.work.mkdir(parents=True, exist_ok=True)
    step, spent = 0, 0.0
    if arguments.resume:
        meta = load_checkpoint(arguments.work, model, optimizers)
        step, spent, schedule = meta["step"], meta["seconds"], Schedule(**meta["schedule"])
        print(f"resumed at step {step}")
    loss_function = torch.compile(model.loss) if arguments.compile else model.loss
    decay_request = DecayRequest()
    log = (arguments.work / "log.csv").open("a" if arguments.resume else "w", newline="")
    writer = csv.writer(log)
    if not arguments.resume:
        writer.writerow(["step", "tokens", "seconds", "loss", "held_out", "rate", "tokens_per_s"])
    mark, mark_step, saved, losses = time.monotonic(), step, time.monotonic(), []
    while step < schedule.steps:
        if decay_request.asked and step < schedule.decay_from:
            schedule = replace(schedule, decay_from=step)
            print(f"decay begins at step {step}", flush=True)
        inputs, targets = batch_at(stream, schedule, step, arguments.seed)
        losses.append(step_once(loss_function, optimizers, inputs.to(device), targets.to(device), schedule.scale(step)))
        step += 1
        if step % arguments.log_every and step != schedule.steps:
            continue
        loss = torch.stack(losses).mean().item()
        now = time.monotonic()
        speed = (step - mark_step) * schedule.batch_tokens / (now - mark)
        spent += now - mark
        probe = step % arguments.probe_every == 0 or step == schedule.steps
        held = held_out_loss(model, held_out, arguments.short_window, device) if probe else None
        rate = arguments.muon_rate * schedule.scale(step - 1)
        eta = (schedule.steps - step) * schedule.batch_tokens / speed / 60
        writer.writerow(
            [step, step * schedule.batch_tokens, round(spent, 1), f"{loss:.4f}", f"{held:.4f}" if held else "", f"{rate:.6f}", round(speed)]
        )
        log.flush()
        shown = f"  held-out {held:.4f}" if held else ""
        print(f"step {step}/{schedule.steps}  loss {loss:.4f}{shown}  lr {rate:.5f}  {speed:,.0f} tok/s  ETA {eta:.1f} min", flush=True)
        if now - saved > arguments.save_every or step == schedule.steps:
            save_checkpoint(arguments.work, model, optimizers, {"step": step, "seconds": spent, "schedule": asdict(schedule)})
            export(model, tokenizer, arguments.output)
            saved = time.monotonic()
        mark, mark_step, losses = time.monotonic(), step, []
    if arguments.plot:
        plot(arguments.work / "log.csv", arguments.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "builtin", help="folder to export to")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "builtin-work", help="checkpoint and log")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's own choice")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=2048, help="window during the decay, in tokens")
    parser.add_argument("--short-window", type=int, default=512, help="window before the decay, in tokens")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=1400, help="all steps; 0 exports untrained weights")
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--decay", type=int, default=400, help="how many of the steps are the decay")
    parser.add_argument("--muon-rate", type=float, default=0.004)
    parser.add_argument("--adamw-rate", type=float, default=0.003)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--log-every", type=int, default=5)
    parser.add_argument("--probe-every", type=int, default=50, help="steps between held-out figures")
    parser.add_argument("--save-every", type=float, default=180, help="seconds between checkpoints")
    parser.add_argument("--plot", type=Path, default=None, help="PNG of the loss curve (needs matplotlib)")
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.batch_tokens % arguments.context or arguments.batch_tokens % arguments.short_window:
        parser.error(f"--batch-tokens {arguments.batch_tokens} must be a multiple of --context and --short-window")
    return arguments


if __name__ == "__main__":
    train(parse(), corpus())
