"""What a quantisation cost, in numbers: per site, per layer, and for the whole model on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import rms_norm

CHUNK = 256  # rows of logits at a time
EXACT = 300.0  # decibels


@dataclass(frozen=True, slots=True)
class SiteRow:
    """decibels: power of the site's output over that of its error, on the same inputs. work: multiply-adds a token."""

    site: str
    decibels: float
    outlier_blocks: int
    blocks: int
    hadamard: bool
    bits_per_weight: float
    work: int


@dataclass(frozen=True, slots=True)
class LayerRow:
    """held_out_decibels: the hidden rows of the float model over their difference, after this layer."""

    index: int
    sites: tuple[SiteRow, ...]
    held_out_decibels: float


@dataclass(frozen=True, slots=True)
class Quality:
    """On held-out text, the quantised model (4-bit activations) against the float one.

    nats: mean -log p of the next token. kl: mean KL(float || quantised) in nats. flips: share of tokens whose most
    probable successor changed.
    """

    tokens: int
    float_nats: float
    nats: float
    kl: float
    flips: float

    @property
    def loss_percent(self) -> float:
        return 100 * (self.nats / self.float_nats - 1)


@dataclass(frozen=True, slots=True)
class Summary:
    layers: tuple[LayerRow, ...]
    quality: Quality

    @property
    def outlier_share(self) -> float:
        """Of the multiply-adds of the quantised layers, those on 8-bit activations."""
        return self._mean(lambda row: row.outlier_blocks / row.blocks)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantised linear layers, scales included."""
        return self._mean(lambda row: row.bits_per_weight)

    def _mean(self, value: Any) -> float:
        rows = [row for layer in self.layers for row in layer.sites]
        return float(sum(value(row) * row.work for row in rows) / sum(row.work for row in rows))

    def as_json(self) -> dict[str, Any]:
        totals = {
            "outlier_share": self.outlier_share,
            "bits_per_weight": self.bits_per_weight,
            "loss_percent": self.quality.loss_percent,
        }
        return {"totals": totals | asdict(self.quality), "layers": [asdict(layer) for layer in self.layers]}


def decibels(signal: torch.Tensor, noisy: torch.Tensor) -> float:
    """Power of `signal` over that of the difference, at most EXACT (JSON has no infinity)."""
    lost = float((signal - noisy).double().square().mean())
    power = float(signal.double().square().mean())
    return EXACT if lost == 0 else min(EXACT, 10 * math.log10(max(power, 1e-300) / lost))


def compare(
    exact: torch.Tensor, coarse: torch.Tensor, norm: torch.Tensor, head: torch.Tensor, eps: float, tokens: torch.Tensor
) -> Quality:
    """The quality from the last hidden states [S, L, hidden] of both models; tokens [S, L] are what they read."""
    targets = tokens[:, 1:].reshape(-1)
    pairs = [part[:, :-1].reshape(len(targets), -1) for part in (exact, coarse)]
    norm, head = norm.float(), head.float()
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(targets), CHUNK):
        rows = slice(start, start + CHUNK)
        first, second = ((rms_norm(part[rows], norm.shape, norm, eps) @ head.T).log_softmax(dim=-1) for part in pairs)
        wanted = targets[rows, None]
        sums += torch.stack(
            [
                -first.gather(1, wanted).double().sum(),
                -second.gather(1, wanted).double().sum(),
                (first.exp() * (first - second)).double().sum(),
                (first.argmax(dim=1) != second.argmax(dim=1)).double().sum(),
            ]
        )
    return Quality(len(targets), *(sums / len(targets)).tolist())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns in line, the first row above a rule."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_text(summary: Summary) -> str:
    """One line a layer, then the totals."""
    header = ["layer", *(row.site for row in summary.layers[0].sites), "8-bit share", "bits/weight", "held-out dB"]
    lines = [header]
    for layer in summary.layers:
        part = Summary((layer,), summary.quality)
        cells = [
            f"{row.decibels:.1f} dB {row.outlier_blocks}/{row.blocks}{'h' if row.hadamard else ' '}"
            for row in layer.sites
        ]
        shares = [f"{100 * part.outlier_share:.1f} %", f"{part.bits_per_weight:.3f}", f"{layer.held_out_decibels:.1f}"]
        lines.append([str(layer.index), *cells, *shares])
    quality = summary.quality
    return "\n".join(
        [
            table(lines),
            "",
            "dB: output over its error, on the calibration text; m/n: blocks of 8 bits of all; h: Hadamard in the rest",
            f"8-bit activations    {100 * summary.outlier_share:.2f} % of multiply-adds",
            f"bits per weight      {summary.bits_per_weight:.3f} (scales included; embedding and output layer apart)",
            f"held-out, {quality.tokens} tokens, 4-bit activations where allotted:",
            f"  nats per token     {quality.nats:.4f}, float {quality.float_nats:.4f} ({quality.loss_percent:+.2f} %)",
            f"  KL(float || ours)  {quality.kl:.4f} nats",
            f"  top-1 flips        {100 * quality.flips:.2f} %",
        ]
    )
