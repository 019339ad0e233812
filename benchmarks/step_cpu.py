"""What a decode step of a small model costs beyond its kernels, and a step as one program against one call by call.

    python benchmarks/step_cpu.py [--quick] [--json FILE] [--plot FILE] [--level LEVEL]

The model has 8 layers and 25 million random weights in BF16 (hidden 384, vocabulary 16384). A device is given one
decode step after another, each sequence at 128 tokens, greedy. A step's time is that from `submit` until `poll` has the
result; the program takes the time of every kernel as it goes, in the same steps, and what is left is Python, queues
and dispatch. The device that computes call by call takes turns with it, batch by batch of steps.

* step_overhead_us: the time of a step with one sequence less that of its kernels, microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch

from weft.core.plan import Capacity, Lane, Plan, Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices.base import Description
from weft.devices.cpu import CpuDevice, CpuLane
from weft.kernels import open_kernels, resolve
from weft.kernels.program import Program
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.forward import Plain, open_forward
from weft.models.loader import load_weights

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "vocab_size": 16384,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
SEQUENCES, CONTEXT, BLOCK = (1, 4, 16, 64), 128, 16
ROUNDS, QUICK_ROUNDS = 21, 7
STEPS = 20  # in a row, of one device; the median of them counts


@dataclass(frozen=True)
class Round:
    """Microseconds of a step: whole, within the kernels, and whole on the device that computes call by call."""

    whole: float
    kernels: float
    plain: float

    @property
    def overhead(self) -> float:
        return self.whole - self.kernels


def main() -> None:
    arguments = _arguments()
    level, _ = resolve(arguments.level)
    watch = common.LoadWatch()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SMALL))
        program, device = open_device(Path(folder), level, plain=False)
        _, plain = open_device(Path(folder), level, plain=True)
    try:
        rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
        measured = {count: [_round(program, device, plain, count) for _ in range(rounds)] for count in SEQUENCES}
    finally:
        device.close()
        plain.close()
    rows = [_row(count, found) for count, found in measured.items()]
    print(f"{level} kernels, bfloat16, {common.cores()} threads; microseconds of a decode step\n")
    print(
        common.table(["sequences", "step", "of it kernels", "overhead", "call by call"], [_cells(row) for row in rows])
    )
    print()
    if arguments.plot is not None:
        _plot(arguments, rows)
    note = common.load_note(watch)
    common.report(arguments, {"step_overhead_us": rows[0]["overhead"].median}, rows, [note] if note else [])


def _arguments() -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--level", default="auto", choices=("auto", "avx512", "avx2", "portable"))
    return parser.parse_args()


def open_device(folder: Path, level: str, *, plain: bool) -> tuple[Program | None, CpuDevice]:
    """The device on all cores, and its program unless it computes call by call."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    kernels = open_kernels(level, cores)
    config = read_config(folder)
    weights = load_weights(folder, config, kernels, torch.bfloat16, dummy_seed=0)
    decoder = Decoder(config, weights, kernels, config.context)
    most = max(SEQUENCES)
    blocks = most * (CONTEXT // BLOCK + 1)
    kv = decoder.make_kv(blocks, BLOCK)
    program = None
    if plain:
        lane = CpuLane(kernels, decoder, Plain(decoder, kv, BLOCK), cores)
    else:
        forward = open_forward(decoder, kernels, kv, BLOCK, max_tokens=most, max_slices=most)
        program = forward.program
        program.timed = True
        lane = CpuLane(kernels, decoder, forward, cores)
    device = CpuDevice(
        Capacity(blocks, BLOCK, most, most, len(cores), config.context, config.vocabulary),
        {Lane.MIXED: lane},
        description=Description("cpu", "bfloat16", level),
        memory=(),
        cores=cores,
        partition=None,
    )
    return program, device


def decode_plan(count: int) -> Plan:
    """One token of each of `count` sequences."""
    width = CONTEXT // BLOCK + 1
    sampling = Sampling(SamplingParams(temperature=0.0), 0, CONTEXT + 1)
    slices = (
        Slice(number, CONTEXT, (number,), tuple(range(number * width, (number + 1) * width)), sampling)
        for number in range(count)
    )
    return Plan(1, Lane.MIXED, tuple(slices))


def _round(program: Program, device: CpuDevice, plain: CpuDevice, count: int) -> Round:
    plan = decode_plan(count)
    _step(device, plan)
    whole, kernels = [], []
    for _ in range(STEPS):
        before = sum(program.seconds().values())
        whole.append(_seconds(lambda: _step(device, plan)))
        kernels.append(sum(program.seconds().values()) - before)
    # The median of differences, and so of one step each.
    overhead = statistics.median(one - inside for one, inside in zip(whole, kernels, strict=True))
    _step(plain, plan)
    other = statistics.median(_seconds(lambda: _step(plain, plan)) for _ in range(STEPS))
    step = statistics.median(whole)
    return Round(step * 1e6, (step - overhead) * 1e6, other * 1e6)


def _step(device: CpuDevice, plan: Plan) -> None:
    device.submit(plan)
    (result,) = device.poll(None)
    if result.error is not None or result.failed:
        raise RuntimeError(result.error or result.failed)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _row(count: int, rounds: list[Round]) -> dict[str, Any]:
    def figure(name: str) -> common.Figure:
        return common.Figure.of([getattr(one, name) for one in rounds])

    return {"sequences": count, **{name: figure(name) for name in ("whole", "kernels", "overhead", "plain")}}


def _cells(row: dict[str, Any]) -> list[str]:
    return [str(row[name]) for name in ("sequences", "whole", "kernels", "overhead", "plain")]


def _plot(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure as Picture

    picture = Picture(layout="constrained")
    axes = picture.subplots()
    count = [row["sequences"] for row in rows]
    for name, label in (("plain", "call by call"), ("whole", "program"), ("kernels", "of it kernels")):
        axes.plot(count, [row[name].median for row in rows], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="sequences", ylabel="microseconds of a decode step")
    axes.legend()
    picture.savefig(arguments.plot)


if __name__ == "__main__":
    main()
