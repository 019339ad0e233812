"""Scales and rounding against slow versions of the same."""

from __future__ import annotations

import pytest
import torch

from weft.comet.packing import BLOCK
from weft.comet.weights import SHRINKS, Rounding, find_scales, inverse_factor, quantise_weight


def drawn(outputs: int = 12, blocks: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, blocks * BLOCK, generator=generator)
    mixing = torch.randn(blocks * BLOCK, blocks * BLOCK, generator=generator, dtype=torch.float64) / 8
    x = torch.randn(600, blocks * BLOCK, generator=generator, dtype=torch.float64) @ (
        mixing + torch.eye(blocks * BLOCK)
    )
    return weight, x.T @ x / len(x)


def refused(note: str) -> None:
    raise AssertionError(note)


def lost(weight: torch.Tensor, stored: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = (weight - stored).double()
    return float(((difference @ hessian) * difference).sum())


def test_the_scale_that_loses_least_of_all_candidates_is_taken() -> None:
    block, importance = torch.randn(6, BLOCK), torch.rand(BLOCK)
    # One -1 and many just below 1: it pays to clip the -1, and to let the many be -8 by a scale of the other sign.
    block[5] = 0.96
    block[5, 3] = -1
    scales = find_scales(block, importance, 4, search=True)
    for row, scale in zip(block, scales, strict=True):
        extreme = row[row.abs().argmax()]
        errors = {}
        for shrink in SHRINKS:
            for sign in (1, -1):
                candidate = (extreme / -8 * (shrink * sign)).bfloat16().float()
                errors[float(candidate)] = float(
                    (((row / candidate).round().clamp(-8, 7) * candidate - row) ** 2 * importance).sum()
                )
        assert errors[float(scale)] == pytest.approx(min(errors.values()), rel=1e-5)


def test_without_a_search_the_largest_element_is_minus_eight() -> None:
    block = torch.randn(6, BLOCK)
    scale = find_scales(block, torch.ones(BLOCK), 4, search=False)
    largest = block.gather(1, block.abs().argmax(dim=1, keepdim=True))
    assert torch.equal((largest / scale).round(), torch.full((6, 1), -8.0))


def test_scales_are_bfloat16_numbers_and_zero_rows_stay_zero() -> None:
    weight, hessian = drawn()
    weight[3] = 0
    for bits in (4, 8):
        quantised = quantise_weight(weight, None, hessian, 1, Rounding(outlier_bits=bits), refused)
        assert torch.equal(quantised.scales, quantised.scales.bfloat16().float())
        assert not quantised.dequantised()[3].any()
        assert torch.isfinite(quantised.dequantised()).all()


def gptq_one_by_one(weight: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Optimal brain quantisation in a fixed order, with the inverse Hessian of what is left made anew each time."""
    weight, inputs = weight.double().clone(), weight.shape[1]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    for column in range(inputs):
        scale = scales[:, column // BLOCK].double()
        rounded = (weight[:, column] / scale).round().clamp(-8, 7) * scale
        inverse = torch.linalg.inv(damped[column:, column:])
        error = (weight[:, column] - rounded) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
        weight[:, column] = rounded
    return weight


def test_rounding_is_that_of_the_method_done_slowly() -> None:
    weight, hessian = drawn(outputs=5, blocks=1)
    quantised = quantise_weight(weight, None, hessian, 0, Rounding(), refused)
    expected = gptq_one_by_one(weight, quantised.scales, hessian)
    # A weight may lie so near to a half that float32 and float64 round it apart; then those after it differ too.
    same = (quantised.dequantised() - expected).abs() < 1e-4
    assert same.double().mean() > 0.97
    assert lost(weight, quantised.dequantised(), hessian) == pytest.approx(
        lost(weight, expected.float(), hessian), rel=0.02
    )


def test_compensation_and_search_each_lower_the_output_error() -> None:
    weight, hessian = drawn()
    errors = [
        lost(weight, quantise_weight(weight, None, hessian, 0, rounding, refused).dequantised(), hessian)
        for rounding in (Rounding(4, False, False), Rounding(4, False, True), Rounding(4, True, True))
    ]
    assert errors[2] < 0.6 * errors[1] < 0.6 * errors[0]


def test_outlier_blocks_may_have_8_bits() -> None:
    weight, hessian = drawn(blocks=3)
    quantised = quantise_weight(weight, None, hessian, 1, Rounding(8, compensate=False), refused)
    assert quantised.values[:, :BLOCK].abs().amax() == 127
    assert quantised.values[:, BLOCK:].abs().amax() == 8
    error = (weight - quantised.dequantised()).square()
    assert error[:, :BLOCK].mean() < error[:, BLOCK:].mean() / 100


@pytest.mark.parametrize("broken", ["nan", "negative"])
def test_moments_that_are_not_positive_definite_are_told_and_weights_rounded_to_the_nearest(broken: str) -> None:
    weight, hessian = drawn()
    bad = hessian.clone()
    bad[0, 0] = torch.nan if broken == "nan" else -1e6
    notes: list[str] = []
    quantised = quantise_weight(weight, None, bad, 0, Rounding(search=False), notes.append)
    assert len(notes) == 1 and "not positive definite" in notes[0]
    plain = quantise_weight(weight, None, None, 0, Rounding(search=False), refused)
    assert torch.equal(quantised.values, plain.values)


def test_channels_that_never_spoke_do_no_harm() -> None:
    weight, hessian = drawn()
    hessian[7] = 0
    hessian[:, 7] = 0
    quantised = quantise_weight(weight, None, hessian, 0, Rounding(), refused)
    assert torch.isfinite(quantised.dequantised()).all()
    assert inverse_factor(torch.zeros(4, 4, dtype=torch.float64), lambda _: None) is None
