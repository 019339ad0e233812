"""Canonical storage of 4-bit integers, as compressed-tensors' `pack-quantized` has it.

A value v from -8 to 7 is the nibble v + 8. Eight neighbours along the last dimension share one int32 word, the first in
its lowest bits. Every backend repacks from this at load; checkpoints hold nothing else.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

BLOCK = 128  # channels that share a scale; the unit in which activations have 4 or 8 bits
PER_WORD = 8
LOWEST, HIGHEST = -8, 7
SHIFTS = torch.arange(0, 4 * PER_WORD, 4, dtype=torch.int32)


def split(x: torch.Tensor, size: int = BLOCK) -> torch.Tensor:
    """[..., K] -> [..., K / size, size]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """int8 [..., K] with values from -8 to 7 -> int32 [..., ceil(K / 8)]. Missing last nibbles are those of value 0.

    Raises ValueError for another dtype or a value that has no nibble.
    """
    if values.dtype != torch.int8:
        raise ValueError(f"values to pack are {values.dtype}; they must be int8")
    least, most = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
    if least < LOWEST or most > HIGHEST:
        raise ValueError(f"values to pack go from {least} to {most}; a nibble holds {LOWEST} to {HIGHEST}")
    nibbles = pad(values, (0, -values.shape[-1] % PER_WORD)).int() - LOWEST
    # By shifts rather than a view of bytes: a word has the same value on machines of either byte order.
    shifted = split(nibbles, PER_WORD) << SHIFTS
    words = shifted[..., 0]
    for place in range(1, PER_WORD):
        words = words | shifted[..., place]
    return words


def unpack_nibbles(words: torch.Tensor, length: int) -> torch.Tensor:
    """int32 [..., ceil(length / 8)] -> int8 [..., length]: the inverse of `pack_nibbles`."""
    if words.dtype != torch.int32 or words.shape[-1] != -(-length // PER_WORD):
        raise ValueError(
            f"packed values are {words.dtype} {list(words.shape)}; {length} of them need int32 "
            f"[..., {-(-length // PER_WORD)}]"
        )
    nibbles = (words[..., None] >> SHIFTS) & 15
    return (nibbles + LOWEST).to(torch.int8).flatten(-2)[..., :length]
