"""The report's figures against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, rms_norm

from weft.comet.report import EXACT, compare, decibels


def test_quality_is_that_of_both_models_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    exact, noise = torch.randn(3, 200, 16, generator=generator), torch.randn(3, 200, 16, generator=generator)
    coarse = exact + 0.5 * noise
    norm, head = torch.rand(16, generator=generator), torch.randn(40, 16, generator=generator)
    tokens = torch.randint(0, 40, (3, 200), generator=generator)

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(rows, (16,), norm, 1e-5) @ head.T

    quality = compare(exact, coarse, logits, logits, tokens)
    first, second = ((rms_norm(hidden, (16,), norm, 1e-5) @ head.T)[:, :-1].flatten(0, 1) for hidden in (exact, coarse))
    targets = tokens[:, 1:].flatten()
    assert quality.tokens == 3 * 199
    assert quality.float_nats == pytest.approx(float(cross_entropy(first, targets)), rel=1e-5)
    assert quality.nats == pytest.approx(float(cross_entropy(second, targets)), rel=1e-5)
    # kl_div(input, target) is KL(target || input)
    logs = [logits.log_softmax(dim=-1) for logits in (second, first)]
    assert quality.kl == pytest.approx(float(kl_div(*logs, reduction="batchmean", log_target=True)), rel=1e-4)
    assert quality.flips == pytest.approx(float((first.argmax(-1) != second.argmax(-1)).double().mean()))
    assert quality.loss_percent == pytest.approx(100 * (quality.nats / quality.float_nats - 1))


def test_decibels_are_of_power_and_end_somewhere() -> None:
    signal = torch.randn(1000)
    assert decibels(signal, signal * 1.1) == pytest.approx(20, abs=1e-3)
    assert decibels(signal, signal) == EXACT
    assert math.isfinite(decibels(torch.zeros(3), torch.ones(3)))
