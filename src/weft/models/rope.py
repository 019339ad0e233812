"""Rotary position embedding: from a `Rope` to the cos and sin tables that the kernels index by position."""

from __future__ import annotations

import math

import torch

from weft.models.families import Rope, yarn_scale


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[torch.Tensor, float]:
    """(radians per position, float32 [head_dim / 2]; factor on cos and sin).

    In float32 and in the order of operations that transformers uses: checkpoints were trained with exactly these
    numbers, and at position 8000 a difference in the last bit is already 5e-4 radians.
    """
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain = 1.0 / powers
    match rope.kind:
        case "linear":
            return plain / rope.factor, 1.0
        case "llama3":
            return _llama3(plain, rope), 1.0
        case "yarn":
            factor = yarn_scale(rope.factor) if rope.attention_factor is None else rope.attention_factor
            return _yarn(powers, rope, head_dim), factor
        case _:  # dynamic stretches only beyond the model's context, and weft refuses sequences that long
            return plain, 1.0


def _llama3(plain: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Short wavelengths stay, long ones are stretched by the factor, those between are blended."""
    long, short = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    wavelengths = 2 * math.pi / plain
    scaled = torch.where(wavelengths > long, plain / rope.factor, plain)
    blend = (rope.original_context / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * scaled / rope.factor + blend * scaled
    between = (wavelengths >= short) & (wavelengths <= long)
    return torch.where(between, blended, scaled)


def _yarn(powers: torch.Tensor, rope: Rope, head_dim: int) -> torch.Tensor:
    """Dimensions that turn more than beta_fast times in the trained context stay, those under beta_slow stretch."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep


class Rotary:
    """The tables of one model: made once for the longest length asked for, and shared by its decoders."""

    def __init__(self, rope: Rope, head_dim: int) -> None:
        self._frequencies, self._factor = inverse_frequencies(rope, head_dim)
        self._cos = self._sin = torch.empty(0, head_dim // 2)
        self._device = torch.device("cpu")

    def move(self, device: torch.device) -> None:
        """Make the tables there from now on."""
        self._device = device
        self._cos, self._sin = self._cos.to(device), self._sin.to(device)

    def tables(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [length, head_dim / 2] each.

        Angles are float32 products, as in training; their cos and sin are taken in float64 and rounded, so that the
        tables do not depend on the machine's vector mathematics.
        """
        if length > len(self._cos):
            angles = (torch.arange(length, dtype=torch.float32)[:, None] * self._frequencies).double()
            self._cos = (angles.cos() * self._factor).float().to(self._device)
            self._sin = (angles.sin() * self._factor).float().to(self._device)
        return self._cos[:length], self._sin[:length]
