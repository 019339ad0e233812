"""How long attention takes: blocks of query rows in prompts, bytes of keys and values in decoding sequences.

What a step asks of it is summed up in a `Work`, which does not depend on the model's heads, so that a step costs a few
operations for each slice. The formulas use plain operators only: they work on numbers and on arrays of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from weft.sim.hardware import AttentionFit, Part

ROWS = 128  # query rows of a block
DIAGONAL = 32  # positions that a block of a prompt computes beyond those it may see, on average
COMBINED = 128  # longer sequences are split among several blocks
BALANCE = 2.0  # exponent that joins the longest sequence with all of them


@dataclass(frozen=True, slots=True)
class Heads:
    """Of one rank. heads: query heads. kv_heads: those with keys of their own. key, value: elements of one key and one
    value as they are multiplied. slot: elements that the cache keeps for a position and kv head. kv_bits: bits of each.
    latent: multi-head latent attention (MLA), whose one kv head in the cache is read by all heads; prompts multiply
    with keys and values that are unpacked from it for each head.
    """

    heads: Any
    kv_heads: Any
    key: int
    value: int
    slot: int
    kv_bits: float = 16
    latent: bool = False

    @property
    def group(self) -> Any:
        """Query heads that read the same keys."""
        return self.heads / self.kv_heads

    def together(self, packed: bool) -> Any:
        """Query heads that a block of a prompt takes rows of."""
        return self.group if packed and not self.latent else 1.0


@dataclass(slots=True)
class Work:
    """What the slices of a step ask for, summed.

    pairs: (query row, key) pairs of prompts, blocks filled up. blocks: of rows of one head, or of a group of heads
    where they are packed. rows, prior: query rows of prompts, and positions that were there before them. longest:
    positions of the longest prompt. tallest: blocks of the one with most of them. sequences, slots, longest_decode: of
    those with one row.
    """

    pairs: Any = 0.0
    blocks: Any = 0.0
    rows: Any = 0.0
    prior: Any = 0.0
    longest: Any = 0.0
    tallest: Any = 0.0
    sequences: Any = 0.0
    slots: Any = 0.0
    longest_decode: Any = 0.0


def work_of(rows: Sequence[int], before: Sequence[int], group: float) -> Work:
    """Of sequences with so many query rows each, after so many positions before. group: query heads that a block takes
    rows of."""
    if sum(rows) == len(rows):
        return _decoding(before)
    alone = [known for count, known in zip(rows, before, strict=True) if count == 1]
    work = _decoding(alone)
    for count, known in zip(rows, before, strict=True):
        if count > 1:
            blocks = math.ceil(count * group / ROWS)
            work.blocks += blocks
            work.pairs += blocks * ROWS / group * (known + count / 2 + DIAGONAL)
            work.rows += count
            work.prior += known
            work.longest = max(work.longest, known + count)
            work.tallest = max(work.tallest, blocks)
    return work


def _decoding(before: Sequence[int]) -> Work:
    count = len(before)
    return Work(sequences=count, slots=sum(before) + count, longest_decode=max(before) + 1) if count else Work()


def attention_seconds(fit: AttentionFit, part: Part, heads: Heads, work: Work) -> Any:
    """Of one layer. Zero work takes the launch alone."""
    group = heads.together(fit.packed)
    bandwidth = fit.dram * part.bandwidth
    slot = heads.kv_heads * heads.slot * (heads.kv_bits / 8)
    prompts = _prompts_seconds(fit, part, heads, work, slot)

    beside = (work.rows > 0) * (work.sequences > 0) * (not heads.latent)
    memory = work.slots * slot / bandwidth * (1.0 + beside * (fit.beside - 1.0))
    # Beside prompts, decoding sequences go through the prompts' kernel: blocks of single heads, as many as the tallest.
    taken = heads.kv_heads + beside * (heads.heads / group - heads.kv_heads)
    started = work.sequences * taken / part.sms * fit.block
    decode = _norm(memory, started, fit.decode_overlap)
    grouped = heads.group > 1
    position = fit.alone + grouped * (fit.position - fit.alone)
    decode = _norm(decode, position * work.longest_decode, BALANCE)
    extra = (work.longest_decode > COMBINED) * fit.combine
    extra = extra + beside * work.sequences * (work.tallest - 1) * heads.heads / group / part.sms * fit.empty
    extra = extra + (work.sequences > 1) * grouped * (heads.kv_heads > 1) * fit.regroup
    return fit.launch + prompts + decode + extra


def decoding_seconds(fit: AttentionFit, part: Part, heads: Heads) -> Callable[[int, int, int], float]:
    """`attention_seconds` for steps that only decode, as most steps of a run do: what is the same for all of them is
    computed once, what is left gives the same to the last bit. The function takes `sequences`, `slots` and
    `longest_decode` of a Work."""
    slot = heads.kv_heads * heads.slot * (heads.kv_bits / 8)
    bandwidth = fit.dram * part.bandwidth
    position = fit.alone + (heads.group > 1) * (fit.position - fit.alone)
    regroup = (heads.group > 1) * (heads.kv_heads > 1) * fit.regroup

    def seconds(sequences: int, slots: int, longest: int) -> float:
        started = sequences * heads.kv_heads / part.sms * fit.block
        decode = _norm(slots * slot / bandwidth, started, fit.decode_overlap)
        decode = _norm(decode, position * longest, BALANCE)
        extra = fit.combine if longest > COMBINED else 0.0
        return float(fit.launch + decode + (extra + regroup if sequences > 1 else extra))

    return seconds


def _prompts_seconds(fit: AttentionFit, part: Part, heads: Heads, work: Work, slot: Any) -> Any:
    """slot: bytes that the cache keeps for a position."""
    row_flops = 2.0 * (heads.key + heads.value)
    math_ = part.sm_flops * fit.math
    compute = work.pairs * row_flops * heads.heads / (part.sms * math_)
    blocks = work.blocks * heads.heads / heads.together(fit.packed) / part.sms * fit.tile
    streams = work.rows * (heads.heads * (heads.key + heads.value) * 2.0 + slot) + work.prior * slot
    chain = (work.rows > 0) * fit.tile + row_flops * ROWS * work.longest / math_ * fit.chain
    return _norm(compute + streams / (fit.dram * part.bandwidth) + blocks, chain, fit.overlap)


def _norm(one: Any, other: Any, exponent: float) -> Any:
    return (one**exponent + other**exponent) ** (1.0 / exponent)
