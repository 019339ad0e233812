"""Keys and values in 8 and 4 bits: the reference against plain statements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.kernels import kv

rows = st.builds(
    lambda seed, size, power: (
        torch.randn(4, size, generator=torch.Generator().manual_seed(seed)) * 2.0 ** torch.tensor(power)
    ),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([8, 64, 72, 80, 128, 256]),
    power=st.sampled_from([-40.0, 0.0, 100.0]),
)


@settings(max_examples=50, deadline=None)
@given(x=rows, bits=st.sampled_from([4, 8]), shift=st.sampled_from([-3.0, 0.0, 3.0]))
def test_what_comes_back_is_within_half_a_step(x: torch.Tensor, bits: int, shift: float) -> None:
    x = x + shift * x.std()
    back = kv.dequantise(*kv.quantise(x, bits), bits)
    low, high = x.amin(dim=-1, keepdim=True).clamp(max=0), x.amax(dim=-1, keepdim=True).clamp(min=0)
    # half a step, half of the zero's step, and 2^-9 of the range because the step is a bfloat16
    step = (high - low) / (2**bits - 1)
    allowed = step * (0.5 + 0.5 / kv.STEPS[bits]) + (high - low) * 2.0**-9
    assert ((back - x).abs() <= allowed * 1.01).all()


@pytest.mark.parametrize("size", [8, 16, 32, 64, 80, 128, 256])
def test_spreading_keeps_scores_and_is_undone(size: int) -> None:
    q, k = torch.randn(2, 7, size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(kv.gather(kv.spread(k)), k, atol=1e-5)
    scores = kv.spread(q) @ kv.spread(k).T / (size if kv.spreads(size) else 1)
    assert torch.allclose(scores, q @ k.T, atol=1e-4)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_an_outlier_becomes_a_little_of_every_channel_and_so_does_one_that_was_spread_by_a_checkpoint(
    size: int,
) -> None:
    assert (kv.spread(torch.eye(size)).abs() == 1).all()
    rows_of_a_hadamard_matrix = kv.spread(torch.eye(size)) * kv.spread(torch.eye(size))[:1]
    assert (kv.spread(rows_of_a_hadamard_matrix).abs() <= 2 * size**0.5).all()


def test_what_is_not_finite_becomes_nan_and_nothing_stays_nothing() -> None:
    x = torch.ones(5, 64)
    x[0, 3], x[1, 5], x[2], x[3] = torch.nan, -torch.inf, 0.0, 1e-38
    codes, scale, zero = kv.quantise(x, 4)
    assert scale.isnan().tolist() == [True, True, False, False, False]
    assert not codes[:4].any() and not zero.any() and scale[2] == 0 and scale[3] == 0
    assert kv.dequantise(codes, scale, zero, 4)[4].tolist() == pytest.approx([1.0] * 64, rel=0.005)


def test_int4_takes_less_than_28_hundredths_of_bfloat16() -> None:
    for size, most in ((64, 0.28), (128, 0.27)):
        ratio = kv.token_bytes(4, size, torch.bfloat16, "int4") / kv.token_bytes(4, size, torch.bfloat16, "bf16")
        assert ratio <= most


def test_a_cache_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="bf16 needs activations of bfloat16, and they are float32"):
        kv.bits_of("bf16", torch.float32)
    with pytest.raises(ValueError, match="no KV cache of 'int2'; what would work: auto, bf16, int8, int4"):
        kv.bits_of("int2", torch.float32)
