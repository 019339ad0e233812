"""What a quantisation cost, in numbers: per site, per layer, and for the whole model on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

CHUNK = 256  # rows of logits at a time
EXACT = 300.0  # decibels

Logits = Callable[[torch.Tensor], torch.Tensor]  # hidden rows [R, hidden] -> float32 [R, vocabulary]


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
class EmbeddingRow:
    """bits_per_weight: scales included. decibels: power of the rows of the held-out text over that of their errors."""

    bits_per_weight: float
    decibels: float


@dataclass(frozen=True, slots=True)
class Summary:
    """head: None where the output layer is left as it was."""

    layers: tuple[LayerRow, ...]
    quality: Quality
    head: SiteRow | None
    embedding: EmbeddingRow

    @property
    def outlier_share(self) -> float:
        """Of the multiply-adds that may be done on 4-bit activations (so not of an output layer of 8 bits), those on
        8-bit ones."""
        four = self.head is not None and self.head.bits_per_weight < 8
        return mean(self._rows() + ([self.head] if four and self.head else []), outlier_share)

    @property
    def bits_per_weight(self) -> float:
        """Of the layers' linears, scales included."""
        return mean(self._rows(), lambda row: row.bits_per_weight)

    def _rows(self) -> list[SiteRow]:
        return [row for layer in self.layers for row in layer.sites]

    def as_json(self) -> dict[str, Any]:
        totals = {
            "outlier_share": self.outlier_share,
            "bits_per_weight": self.bits_per_weight,
            "loss_percent": self.quality.loss_percent,
        }
        return {
            "totals": totals | asdict(self.quality),
            "layers": [asdict(layer) for layer in self.layers],
            "head": None if self.head is None else asdict(self.head),
            "embedding": asdict(self.embedding),
        }


def outlier_share(row: SiteRow) -> float:
    return row.outlier_blocks / row.blocks


def mean(rows: Sequence[SiteRow], value: Callable[[SiteRow], float]) -> float:
    """Over the multiply-adds of the rows' sites."""
    return float(sum(value(row) * row.work for row in rows) / sum(row.work for row in rows))


def decibels(signal: torch.Tensor, noisy: torch.Tensor) -> float:
    """Power of `signal` over that of the difference, at most EXACT (JSON has no infinity)."""
    lost = float((signal - noisy).double().square().mean())
    power = float(signal.double().square().mean())
    return EXACT if lost == 0 else min(EXACT, 10 * math.log10(max(power, 1e-300) / lost))


def compare(
    exact: torch.Tensor, coarse: torch.Tensor, exact_logits: Logits, coarse_logits: Logits, tokens: torch.Tensor
) -> Quality:
    """The quality from the last hidden states [S, L, hidden] of both models, and their output layers (with the norms
    before them); tokens [S, L] are what they read."""
    targets = tokens[:, 1:].reshape(-1)
    pairs = [part[:, :-1].reshape(len(targets), -1) for part in (exact, coarse)]
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(targets), CHUNK):
        rows = slice(start, start + CHUNK)
        first = exact_logits(pairs[0][rows]).log_softmax(dim=-1)
        second = coarse_logits(pairs[1][rows]).log_softmax(dim=-1)
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
        bits = f"{mean(layer.sites, lambda row: row.bits_per_weight):.3f}"
        shares = [f"{100 * mean(layer.sites, outlier_share):.1f} %", bits, f"{layer.held_out_decibels:.1f}"]
        lines.append([str(layer.index), *map(_cell, layer.sites), *shares])
    quality = summary.quality
    return "\n".join(
        [
            table(lines),
            "",
            "dB: output over its error, on the calibration text; m/n: blocks of 8 bits of all; h: Hadamard in the rest",
            f"8-bit activations    {100 * summary.outlier_share:.2f} % of multiply-adds",
            f"bits per weight      {summary.bits_per_weight:.3f} in the layers, scales included",
            f"embedding            {_embedding(summary.embedding)}",
            f"output layer         {_head(summary.head)}",
            f"held-out, {quality.tokens} tokens, 4-bit activations where allotted:",
            f"  nats per token     {quality.nats:.4f}, float {quality.float_nats:.4f} ({quality.loss_percent:+.2f} %)",
            f"  KL(float || ours)  {quality.kl:.4f} nats",
            f"  top-1 flips        {100 * quality.flips:.2f} %",
        ]
    )


def _cell(row: SiteRow) -> str:
    return f"{row.decibels:.1f} dB {row.outlier_blocks}/{row.blocks}{'h' if row.hadamard else ' '}"


def _bits(bits: float) -> str:
    return "as it was" if bits == 16 else f"{bits:.3f} bits per weight"


def _embedding(row: EmbeddingRow) -> str:
    return _bits(16) if row.bits_per_weight == 16 else f"{_bits(row.bits_per_weight)}, {row.decibels:.1f} dB"


def _head(row: SiteRow | None) -> str:
    return _bits(16) if row is None else f"{_bits(row.bits_per_weight)}, {_cell(row).strip()}"
