"""Tiles of the Triton kernels by shape and architecture: data, so that nothing is tuned at start-up.

Rows are keyed by architecture: 80 (also 86, 89 and 120), 90, 100, and 0 for the interpreter, which likes few and large
programs.

What a row's bits depend on is never chosen by the number of rows: TOKENS and SPLIT of attention, the tile of a norm.
A tile of W4A8 changes nothing: each output is summed in one program, block after block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

INTERPRETER = 0


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """tokens: of keys and values that a program reads at once. split: positions whose sums are made on their own, and
    then added in order; both decide over a row's bits. prefill, decode: (rows, warps, stages) of a program; rows are
    queries of one head of keys and values. programs: of decode on each multiprocessor."""

    tokens: int
    split: int
    prefill: tuple[int, int, int]
    decode: tuple[int, int, int]
    programs: int


# Stages on 90: keys and values are found by the block table, which is loaded a stage before them. With three or four
# stages the compiler fetches a tile when the one before it is done, and nothing is on its way while it computes; with
# five the next one is. Two programs of decode still fit on a multiprocessor: 2 * (115200 + 1024) of 233472 bytes.
# In decode most of the 64 rows are empty. In 16 bits that costs nothing: a token and head is 512 bytes, 25 cycles of a
# multiprocessor's share of the memory, and 8 of its tensor cores. With the instruction and the layout of prefill a
# row's bits are the same there.
ATTENTION = {
    INTERPRETER: AttentionTile(256, 512, (64, 4, 1), (64, 4, 1), 1),
    80: AttentionTile(64, 512, (128, 8, 2), (64, 4, 3), 2),
    90: AttentionTile(64, 512, (128, 8, 5), (64, 4, 5), 2),
    100: AttentionTile(64, 512, (128, 8, 3), (128, 8, 3), 1),
}
# The same for 8 and 4 bits, whose scales and zeros want registers, too: on 80 prompts spill least with one stage.
# A token and head in 4 bits is 136 bytes, 6.6 cycles of memory; empty rows would take more than that (docs/
# kernels_gpu.md has the numbers). So decode has 16 rows, one warp and `mma.sync`, and prefill on 90 as well, for the
# bits: `wgmma` has 64 rows at least. One warp takes a long split too long, hence 256.
ATTENTION_QUANTISED = {
    INTERPRETER: ATTENTION[INTERPRETER],
    80: AttentionTile(32, 256, (128, 8, 1), (16, 1, 3), 8),
    90: AttentionTile(32, 256, (16, 1, 5), (16, 1, 5), 8),
    100: AttentionTile(32, 512, (128, 8, 3), (128, 8, 3), 1),
}
# By `wgmma`, which is better for long prompts; for a GPU to measure beside the others (`tile` of `attention`).
ATTENTION_QUANTISED_HIGH = {90: AttentionTile(32, 256, (128, 8, 5), (64, 4, 5), 2)}
# Heads of more than 128 channels. On 80 a tile must have as many rows as half a head has channels:
# otherwise the compiler cuts rows between warps, in decode but not in prefill, and sums weights in another order. And
# 86, 89 and 120 have 99 KiB for it.
ATTENTION_WIDE = {
    INTERPRETER: ATTENTION[INTERPRETER],
    80: AttentionTile(32, 512, (128, 8, 2), (128, 8, 2), 1),
    90: AttentionTile(32, 512, (128, 8, 3), (64, 4, 3), 2),
    100: AttentionTile(32, 512, (128, 8, 3), (128, 8, 3), 1),
}
# With fewer bits one stage spills least on 80.
ATTENTION_WIDE_QUANTISED = ATTENTION_WIDE | {80: AttentionTile(32, 512, (128, 8, 1), (128, 8, 1), 1)}


def attention_tile(head_dim: int, *, quantised: bool, key: int) -> AttentionTile:
    """key: of the architecture, as in the tables."""
    if head_dim > 128:
        return (ATTENTION_WIDE_QUANTISED if quantised else ATTENTION_WIDE)[key]
    return (ATTENTION_QUANTISED if quantised else ATTENTION)[key]


@dataclass(frozen=True, slots=True)
class LinearTile:
    """columns, channels: outputs of a program, and the step in which it sums over the input. They, and the instruction
    that comes of them, decide over an output's bits. low, high: (rows, warps, stages) for up to so many rows as `low`
    has, and for more."""

    columns: int
    channels: int
    low: tuple[int, int, int]
    high: tuple[int, int, int]

    def of(self, rows: int) -> tuple[int, int, int]:
        return self.low if rows <= self.low[0] else self.high


# Plain products for --batch-invariant. In sm_100's tensor memory a tile of 64 rows lies in another way than one of 128.
LINEAR = {
    INTERPRETER: LinearTile(256, 256, (64, 4, 1), (64, 4, 1)),
    80: LinearTile(128, 64, (64, 4, 3), (128, 8, 3)),
    90: LinearTile(128, 64, (64, 4, 4), (128, 8, 4)),
    100: LinearTile(128, 64, (128, 8, 4), (128, 8, 4)),
}


@dataclass(frozen=True, slots=True)
class ProductTile:
    """A tile of a product with 4-bit weights, for up to so many rows and outputs of the whole (`most`). size: rows and
    columns of a program."""

    most: tuple[int, int]
    size: tuple[int, int]
    warps: int
    stages: int


ANY = 2**31
# Products with 4-bit weights: of a table the first tile holds that is for as many rows and outputs. Few rows and few
# outputs take narrow tiles, so that more of the GPU reads weights: 4096 outputs have 128 programs up to 64 rows, 6144
# have 192, 96 and 96. Each reads all of its rows, too, which are most of what 64 rows of a narrow tile load; so 6144
# outputs take 64 columns there, and not 32 twice. benchmarks/w4ax_tune.py measures what else would do; these numbers
# are from before any GPU was there.
_FEW_ROWS = (
    ProductTile((16, 8192), (16, 32), 4, 4),
    ProductTile((16, ANY), (16, 64), 4, 4),
    ProductTile((32, 4096), (32, 32), 4, 4),
    ProductTile((32, ANY), (32, 64), 4, 4),
    ProductTile((64, 4096), (64, 32), 4, 4),
    ProductTile((64, 8192), (64, 64), 4, 4),
    ProductTile((64, ANY), (64, 128), 8, 3),
)
_INTEGERS = (*_FEW_ROWS, ProductTile((ANY, ANY), (128, 128), 8, 3))
_FLOATS = (*_FEW_ROWS, ProductTile((ANY, ANY), (128, 64), 8, 3))
W4A8 = dict.fromkeys((INTERPRETER, 80, 90, 100), _INTEGERS)
W4A16 = dict.fromkeys((INTERPRETER, 80, 90, 100), _FLOATS)
# (rows of a program, warps): rotation and KV write of one head.
ROTARY = {INTERPRETER: (512, 1), 80: (8, 2), 90: (8, 2), 100: (8, 2)}
# (rows, warps): RMSNorm; a program has whole rows. On a GPU it has one: the form that quantises sums in the same order.
NORM = {INTERPRETER: (64, 1), 80: (1, 8), 90: (1, 8), 100: (1, 8)}
# (rows, columns, warps): the gated activation.
ACTIVATION = {INTERPRETER: (64, 1024, 1), 80: (1, 2048, 8), 90: (1, 2048, 8), 100: (1, 2048, 8)}
# (blocks of 128 channels that a program quantises at once, warps); behind a norm it has the norm's warps.
QUANTISE = {INTERPRETER: (8, 1), 80: (8, 4), 90: (8, 4), 100: (8, 4)}
# (logits of a row that a program reads at once, bits of a threshold that a pass finds, warps): sampling.
SAMPLE = {INTERPRETER: (4096, 5, 1), 80: (2048, 2, 16), 90: (2048, 2, 16), 100: (2048, 2, 16)}
# (logits of a row that a program has, warps): what sampling does by part of the vocabulary, of 128256 tokens in 63.
SAMPLE_PARTS = {INTERPRETER: (4096, 1), 80: (2048, 4), 90: (2048, 4), 100: (2048, 4)}


@cache
def architecture(device: torch.device) -> int:
    """The key of the tables for a device. Raises ValueError for a GPU that is too old."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"{device} has compute capability {major}.{minor}; the Triton kernels need 8.0 or higher")
    return key_of(major)


def key_of(major: int) -> int:
    """Of the tables, for GPUs of this major compute capability: the first is 8."""
    return {9: 90, 10: 100}.get(major, 80)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
