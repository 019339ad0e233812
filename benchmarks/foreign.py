"""What weft's 8-bit activations cost checkpoints that others quantised with 16-bit activations.

    python benchmarks/foreign.py [--quick] [--json FILE]

The built-in model's layers are rounded to the nearest in the formats below and served twice, on the same kernels: as
the quantised checkpoint, and as bfloat16 weights with the values that its integers stand for. Shown is the KL
divergence of the first from the second, in nats for each token of held-out text, beside what the 4 or 8 bits of the
weights cost (the second from the built-in model as it is), and the memory of the weights.

Claim: w4a16_in_a8_added_kl_percent, the first divergence in percent of the second, with weights in groups of 128.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import load_file, save_file

from weft.comet.corpus import standard_library, windows
from weft.comet.packing import pack_nibbles
from weft.core.plan import Slice
from weft.kernels import open_kernels
from weft.kernels.base import Kernels
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.loader import load_weights
from weft.text.hub import resolve_model
from weft.text.tokenizer import Tokenizer

LENGTH, BLOCK = 256, 16
DTYPE = torch.bfloat16
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Format:
    """bits and group (None: per output) of compressed-tensors weights."""

    name: str
    bits: int
    group: int | None


FORMATS = (
    Format("W4A16, groups of 128", 4, 128),
    Format("W4A16, groups of 32", 4, 32),
    Format("W8A16, per output", 8, None),
)


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0]).parse_args()
    source = resolve_model("builtin")
    tokenizer = Tokenizer.from_folder(source)
    text = windows(standard_library()[1], tokenizer.encode, 4 if arguments.quick else 48, LENGTH, seed=0)
    kernels = open_kernels("auto", tuple(sorted(os.sched_getaffinity(0))))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        original, _ = served(source, kernels, text)
        for form in FORMATS:
            quantised, plain = Path(folder) / "quantised", Path(folder) / "plain"
            write(source, quantised, plain, form)
            dequantised, plain_bytes = served(plain, kernels, text)
            found, bytes_ = served(quantised, kernels, text)
            rows.append(
                {
                    "format": form.name,
                    "activations_kl": divergence(dequantised, found),
                    "weights_kl": divergence(original, dequantised),
                    "weight_bytes_ratio": bytes_ / plain_bytes,
                }
            )
    kernels.close()
    print(f"{kernels.name} kernels, {len(text)} sequences of {LENGTH} tokens\n")
    print(
        common.table(
            ["", "KL of 8-bit activations", "KL of the weights' bits", "memory of bfloat16"],
            [
                [
                    row["format"],
                    f"{row['activations_kl']:.5f}",
                    f"{row['weights_kl']:.5f}",
                    f"{row['weight_bytes_ratio']:.1%}",
                ]
                for row in rows
            ],
        )
    )
    print()
    added = 100 * float(rows[0]["activations_kl"]) / float(rows[0]["weights_kl"])
    common.report(
        arguments, {"w4a16_in_a8_added_kl_percent": added}, rows
    )  # nothing here is a time, so other load does not matter


def write(source: Path, quantised: Path, plain: Path, form: Format) -> None:
    """The model of `source` in two folders: in integers, and with the values that they stand for."""
    integers = load_file(source / "model.safetensors")
    floats = dict(integers)
    for name in list(integers):
        module = name.removesuffix(".weight")
        if not module.endswith(PROJECTIONS):
            continue
        values, scales = rounded(integers.pop(name).float(), form)
        packed = pack_nibbles(values) if form.bits == 4 else values
        integers[f"{module}.{'weight_packed' if form.bits == 4 else 'weight'}"] = packed
        integers[f"{module}.weight_scale"] = scales
        floats[name] = (values.unflatten(1, (scales.shape[1], -1)) * scales.float()[..., None]).flatten(1).to(DTYPE)
    config = json.loads((source / "config.json").read_text())
    for folder, tensors, said in (
        (quantised, integers, config | {"quantization_config": described(form)}),
        (plain, floats, config),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(said))


def rounded(weight: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [N, K], bfloat16 [N, K / group]), to the nearest."""
    groups = weight.unflatten(1, (-1, form.group or weight.shape[1]))
    low, high = -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1
    scales = (groups.abs().amax(dim=-1) / (high + 0.5)).to(DTYPE)
    values = (groups / scales.float()[..., None]).round().clamp(low, high)
    return values.to(torch.int8).flatten(1), scales


def described(form: Format) -> dict[str, Any]:
    strategy = "group" if form.group else "channel"
    weights = {"num_bits": form.bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": form.group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if form.bits == 4 else "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }


def served(folder: Path, kernels: Kernels, text: list[list[int]]) -> tuple[torch.Tensor, int]:
    """(log-probabilities [S, LENGTH, vocabulary] by the serving decoder, bytes of the weights)."""
    config = read_config(folder)
    weights = load_weights(folder, config, kernels, DTYPE)
    decoder = Decoder(config, weights, kernels, LENGTH)
    blocks = LENGTH // BLOCK
    kv = decoder.make_kv(blocks, BLOCK)
    logs = []
    for row in text:
        batch = make_batch([Slice(0, 0, tuple(row), tuple(range(blocks)))], BLOCK)
        logs.append(decoder.logits(decoder.hidden(batch, kv)).log_softmax(dim=-1))
    return torch.stack(logs), weights.size


def divergence(of: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence in nats of `found` from `of`, row by row to stay small."""
    return float(sum((a.exp() * (a - b)).sum(dim=-1).mean() for a, b in zip(of, found, strict=True)) / len(of))


if __name__ == "__main__":
    main()
