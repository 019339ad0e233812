"""Triton: causal paged attention with grouped queries, for prefill, decode and mixed batches, on any TritonKv.

A row's bits are its own: they do not depend on the batch, on the chunk, or on whether prefill or decode computed it.
Positions are cut into splits of a fixed size. Within a split the tiles of keys and values follow one another, softmax
as it goes, all sums in float32; the splits' sums are then added in order, each operation rounded (compiled without
fused multiply-adds). Decode makes the splits in different programs and adds them in a second kernel, prefill makes and
adds them in one program: the same operations on the same numbers. What a row does not see changes nothing: it adds
zero times something, or multiplies by one.

Queries of quantised heads come spread and divided by D, from triton_rotary.py. With codes c, scale s and zero z

    q . k = s (q . c - z sum(q))        sum over tokens of p v = sum (p s) c - sum (p s) z

so that codes go to the tensor cores as they are, integers that 16-bit floats hold exactly.

Nothing here waits for the device: lengths stay there, and a program finds its work by adding up the slices' parts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from weft.kernels.base import Batch
from weft.kernels.triton_kv import TritonKv, gathered_heads, halves, numbers_of
from weft.kernels.triton_numbers import helper, product_kind, rounded
from weft.kernels.triton_tiles import AttentionTile, architecture, attention_tile, processors

_LOG2_E = math.log2(math.e)


@helper
def _tile(
    queries, sums, state, place, stop, position, head, table, keys, values, scale, window,
    BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """`state` after the keys and values of positions `place` [N], of which those from `stop` on are not read."""
    first_query, second_query = queries
    first_sum, second_sum, zero_sum, weight_sum, highest = state
    key_codes, key_numbers = keys
    value_codes, value_numbers = values
    inside = place < stop
    block = tl.load(table + place // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    target = (block * KV_HEADS + head) * BLOCK_SIZE + place % BLOCK_SIZE
    first, second = halves(key_codes, target, inside, D, HALF, BITS, KIND)
    scores = tl.dot(first_query, tl.trans(first), input_precision="ieee")
    scores = tl.dot(second_query, tl.trans(second), scores, input_precision="ieee")
    if BITS < 16:
        step, zero = numbers_of(key_numbers, target, inside, BITS)
        scores = (scores - sums[:, None] * zero[None, :]) * (step * scale)[None, :]
    else:
        scores = scores * scale
    visible = inside[None, :] & (place[None, :] <= position[:, None])
    if WINDOWED:
        visible = visible & (place[None, :] > position[:, None] - window)
    scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen nothing yet
    weights, fade = tl.exp2(scores - base[:, None]), tl.exp2(highest - base)
    scaled = weights
    if BITS < 16:
        step, zero = numbers_of(value_numbers, target, inside, BITS)
        scaled = tl.where(visible, weights * step[None, :], 0.0)  # a NaN that a row does not see is not its own
    factors = rounded(scaled, KIND)
    if BITS < 16:
        # The same rounded factors as in the products, so that codes at their zero give nothing.
        zero_sum = zero_sum * fade + tl.sum(factors.to(tl.float32) * zero[None, :], axis=1)
    first, second = halves(value_codes, target, inside, D, HALF, BITS, KIND)
    first_sum = tl.dot(factors, first, first_sum * fade[:, None], input_precision="ieee")
    second_sum = tl.dot(factors, second, second_sum * fade[:, None], input_precision="ieee")
    weight_sum = weight_sum * fade + tl.sum(weights, axis=1)
    return first_sum, second_sum, zero_sum, weight_sum, higher


@helper
def _nothing(ROWS: tl.constexpr, HALF: tl.constexpr):
    """Sums [ROWS, HALF] of the two halves, sums of zeros and of weights [ROWS], and the highest scores."""
    halves_of_sums = tl.zeros((ROWS, HALF), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    return halves_of_sums, halves_of_sums, sums, sums, tl.full((ROWS,), float("-inf"), tl.float32)


@helper
def _split(
    queries, sums, begin, stop, position, head, table, keys, values, scale, window,
    ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    BITS: tl.constexpr, TOKENS: tl.constexpr, KIND: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The sums over positions [begin, stop): of values, in halves; of weights; and the highest score."""
    state = _nothing(ROWS, HALF)
    for start in range(begin, stop, TOKENS):
        state = _tile(
            queries, sums, state, start + tl.arange(0, TOKENS), stop, position, head, table, keys, values, scale,
            window, BLOCK_SIZE, KV_HEADS, D, HALF, BITS, KIND, WINDOWED,
        )  # fmt: skip
    first, second, zero_sum, weight_sum, highest = state
    return first - zero_sum[:, None], second - zero_sum[:, None], weight_sum, highest


@helper
def _added(run, split):
    """Two splits' sums as one."""
    first, second, weight_sum, highest = run
    first_more, second_more, weight_more, highest_more = split
    higher = tl.maximum(highest, highest_more)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    fade, grow = tl.exp2(highest - base), tl.exp2(highest_more - base)
    return (
        first * fade[:, None] + first_more * grow[:, None],
        second * fade[:, None] + second_more * grow[:, None],
        weight_sum * fade + weight_more * grow,
        higher,
    )


@helper
def _store(out, row, mask, run, signs, ROWS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, LOG: tl.constexpr):
    """The sums divided by those of the weights to `out` [.., D], rows `row` [ROWS]. LOG: of D."""
    first, second, weight_sum, _ = run
    weight_sum = tl.where(weight_sum == 0.0, 1.0, weight_sum)
    first, second = first / weight_sum[:, None], second / weight_sum[:, None]
    if signs is not None:
        first, second = gathered_heads(first, second, signs, ROWS, D, LOG)
    column = tl.arange(0, HALF)[None, :]
    kind = out.dtype.element_ty
    inside = mask[:, None] & (column < D // 2)
    tl.store(out + row[:, None] * D + column, rounded(first, kind), mask=inside)
    tl.store(out + row[:, None] * D + column + D // 2, rounded(second, kind), mask=inside)


@helper
def _queries(q, row, mask, D: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr):
    """(halves [ROWS, HALF] of the queries `row` [ROWS] of q [.., D], the sum of each)."""
    first, second = halves(q, row, mask, D, HALF, 16, KIND)
    return (first, second), tl.sum(first.to(tl.float32), axis=1) + tl.sum(second.to(tl.float32), axis=1)


@triton.jit(do_not_specialize=["slices", "width"])
def prefill_kernel(
    q,  # [T, KV_HEADS * GROUP, D]
    signs, key_codes, key_numbers, value_codes, value_numbers,  # a TritonKv
    starts,  # int32 [S + 1]
    contexts,  # int32 [S]
    tables,  # int32 [S, width]
    out,  # as q
    slices,  # S
    width,
    scale,
    window,  # a token attends to so many positions, its own included
    SLICES: tl.constexpr,  # S or more
    ROWS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    LOG: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, KIND: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS / GROUP tokens of one slice with all queries of one head of keys and values."""
    TILE: tl.constexpr = ROWS // GROUP
    index = tl.arange(0, SLICES)
    length = tl.load(starts + index + 1, mask=index < slices, other=0)
    length -= tl.load(starts + index, mask=index < slices, other=0)
    count = (length + TILE - 1) // TILE
    ends = tl.cumsum(count, axis=0)
    total = tl.sum(count, axis=0)
    if tl.program_id(0) >= total:
        return
    tile = total - 1 - tl.program_id(0)  # the last tokens of a prompt take longest: they begin first
    head = tl.program_id(1)
    piece = tl.sum((ends <= tile).to(tl.int32), axis=0)
    tile -= tl.sum(tl.where(ends <= tile, count, 0), axis=0)
    begin, end = tl.load(starts + piece), tl.load(starts + piece + 1)
    context = tl.load(contexts + piece)
    row = tl.arange(0, ROWS)
    token = tile * TILE + row // GROUP
    mask = (row < TILE * GROUP) & (token < end - begin)
    earliest = context - (end - begin) + tile * TILE
    position = tl.where(mask, context - (end - begin) + token, -1)
    stop = tl.minimum(context, earliest + TILE)
    place = ((begin + token).to(tl.int64) * KV_HEADS + head) * GROUP + row % GROUP
    queries, sums = _queries(q, place, mask, D, HALF, KIND)
    lowest = 0
    if WINDOWED:
        lowest = tl.maximum(earliest - window + 1, 0) // TOKENS * TOKENS
    table = tables + piece.to(tl.int64) * width
    first, second, _, weight_sum, highest = _nothing(ROWS, HALF)
    run = (first, second, weight_sum, highest)
    for split in range(lowest // SPLIT, (stop + SPLIT - 1) // SPLIT):
        made = _split(
            queries, sums, tl.maximum(split * SPLIT, lowest), tl.minimum(split * SPLIT + SPLIT, stop), position, head,
            table, (key_codes, key_numbers), (value_codes, value_numbers), scale, window,
            ROWS, BLOCK_SIZE, KV_HEADS, D, HALF, BITS, TOKENS, KIND, WINDOWED,
        )  # fmt: skip
        run = _added(run, made)
    _store(out, place, mask, run, signs, ROWS, D, HALF, LOG)


@triton.jit(do_not_specialize=["slices", "width", "splits"])
def decode_kernel(
    q,  # [S, KV_HEADS * GROUP, D]: each slice is one row
    key_codes, key_numbers, value_codes, value_numbers,
    contexts, tables,
    sums_out,  # float32 [S, KV_HEADS, splits, GROUP, D]: of each split the sums of values
    marks_out,  # float32 [S, KV_HEADS, splits, 2, GROUP]: the sums of weights, and the highest scores
    slices, width, splits, scale, window,
    SLICES: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr,
    SPLIT: tl.constexpr, KIND: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Splits of all rows and heads, dealt out to as many programs as the GPU runs at once."""
    index = tl.arange(0, SLICES)
    context = tl.load(contexts + index, mask=index < slices, other=0)
    skipped = context * 0
    if WINDOWED:
        skipped = tl.maximum(context - window, 0) // SPLIT
    count = (context + SPLIT - 1) // SPLIT - skipped
    ends = tl.cumsum(count, axis=0)
    total = tl.sum(count, axis=0) * KV_HEADS
    group = tl.arange(0, ROWS)
    mask = group < GROUP
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        head, piece = item % KV_HEADS, item // KV_HEADS
        before = ends <= piece
        sequence = tl.sum(before.to(tl.int32), axis=0)
        split = piece - tl.sum(tl.where(before, count, 0), axis=0)
        end = tl.load(contexts + sequence)
        lowest = 0
        if WINDOWED:
            lowest = tl.maximum(end - window, 0) // TOKENS * TOKENS
            split += lowest // SPLIT
        row = (sequence.to(tl.int64) * KV_HEADS + head) * GROUP + group
        queries, sums = _queries(q, row, mask, D, HALF, KIND)
        first, second, weight_sum, highest = _split(
            queries, sums, tl.maximum(split * SPLIT, lowest), tl.minimum(split * SPLIT + SPLIT, end),
            tl.where(mask, end - 1, -1), head, tables + sequence.to(tl.int64) * width,
            (key_codes, key_numbers), (value_codes, value_numbers), scale, window,
            ROWS, BLOCK_SIZE, KV_HEADS, D, HALF, BITS, TOKENS, KIND, WINDOWED,
        )  # fmt: skip
        place = (sequence.to(tl.int64) * KV_HEADS + head) * splits + split
        column = tl.arange(0, HALF)[None, :]
        at = sums_out + (place * GROUP + group)[:, None] * D + column
        inside = mask[:, None] & (column < D // 2)
        tl.store(at, first, mask=inside)
        tl.store(at + D // 2, second, mask=inside)
        tl.store(marks_out + place * 2 * GROUP + group, weight_sum, mask=mask)
        tl.store(marks_out + place * 2 * GROUP + GROUP + group, highest, mask=mask)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    sums, marks, signs, contexts, out, splits, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, LOG: tl.constexpr,
    SPLIT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The splits of one row and head, in order. HEADS: GROUP or more."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.load(contexts + sequence)
    group, column = tl.arange(0, HEADS), tl.arange(0, HALF)[None, :]
    mask = group < GROUP
    inside = mask[:, None] & (column < D // 2)
    pair = sequence * tl.num_programs(1) + head
    first, second, _, weight_sum, highest = _nothing(HEADS, HALF)
    run = (first, second, weight_sum, highest)
    lowest = 0
    if WINDOWED:
        lowest = tl.maximum(end - window, 0) // SPLIT
    for split in tl.range(lowest, (end + SPLIT - 1) // SPLIT, num_stages=4):  # splits are fetched ahead
        place = pair * splits + split
        at = sums + (place * GROUP + group)[:, None] * D + column
        made = (
            tl.load(at, mask=inside, other=0.0),
            tl.load(at + D // 2, mask=inside, other=0.0),
            tl.load(marks + place * 2 * GROUP + group, mask=mask, other=0.0),
            tl.load(marks + place * 2 * GROUP + GROUP + group, mask=mask, other=float("-inf")),
        )
        run = _added(run, made)
    _store(out, pair * GROUP + group, mask, run, signs, HEADS, D, HALF, LOG)


def attention(
    q: torch.Tensor,
    kv: TritonKv,
    batch: Batch,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int | None = None,
    *,
    tile: AttentionTile | None = None,
) -> torch.Tensor:
    """As Kernels.attention (base.py): [T, heads * D] -> same, q from `rotary_write` on the same KV.

    A batch with as many slices as rows is decode; a row with context 0 is padding, and gets zeros. Buffers of decode
    are as large as the block tables are wide. tile: other than that of this GPU. Raises TypeError, ValueError.
    """
    rows, slices = len(q), len(batch.contexts)
    _check(q, kv, batch, heads, kv_heads, scale, window)
    tile = tile or attention_tile(kv.head_dim, quantised=kv.signs is not None, key=architecture(q.device))
    out = torch.empty_like(q)
    if not rows:
        return out
    group, width = heads // kv_heads, batch.tables.shape[1]
    shape = {"D": kv.head_dim, "HALF": kv.half, "BITS": kv.bits, "GROUP": group, "WINDOWED": window is not None}
    shape |= {
        "KIND": product_kind(q.dtype),
        "TOKENS": tile.tokens,
        "SPLIT": tile.split,
        "KV_HEADS": kv_heads,
        "BLOCK_SIZE": kv.block_size,
    }
    shape |= {"SLICES": slices_of(slices)}
    factor, reach = scale * _LOG2_E, window or 0
    height, warps, stages = tile.decode if rows == slices else tile.prefill
    shape |= {"ROWS": max(height, triton.next_power_of_2(group)), "num_warps": warps, "num_stages": stages}
    layout = {"D": kv.head_dim, "HALF": kv.half, "LOG": kv.head_dim.bit_length() - 1}
    if rows != slices:
        tiles = rows // (shape["ROWS"] // group) + slices  # or fewer
        prefill_kernel[(tiles, kv_heads)](
            q, kv.signs, *kv.tensors, batch.starts, batch.contexts, batch.tables, out, slices, width, factor, reach,
            **shape, LOG=layout["LOG"], enable_fp_fusion=False,
        )  # fmt: skip
        return out
    splits = triton.cdiv(width * kv.block_size, tile.split)
    sums = torch.empty(slices, kv_heads, splits, group, kv.head_dim, dtype=torch.float32, device=q.device)
    marks = torch.empty(slices, kv_heads, splits, 2, group, dtype=torch.float32, device=q.device)
    programs = min(slices * kv_heads * splits, processors(q.device) * tile.programs)
    decode_kernel[(programs,)](
        q, *kv.tensors, batch.contexts, batch.tables, sums, marks, slices, width, splits, factor, reach,
        **shape, enable_fp_fusion=False,
    )  # fmt: skip
    combine_kernel[(slices, kv_heads)](
        sums, marks, kv.signs, batch.contexts, out, splits, reach, **layout, HEADS=triton.next_power_of_2(group),
        GROUP=group, SPLIT=tile.split, WINDOWED=window is not None, num_warps=1 if group < 8 else 4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def slices_of(slices: int) -> int:
    """What the kernels are compiled for: few numbers, for a compiler takes seconds while somebody waits for a token."""
    return max(64, int(triton.next_power_of_2(slices)))


def _check(
    q: torch.Tensor, kv: TritonKv, batch: Batch, heads: int, kv_heads: int, scale: float, window: int | None
) -> None:
    if kv_heads != kv.kv_heads or heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads = } must be a multiple of {kv_heads = }, and the KV has {kv.kv_heads}")
    if q.shape != (len(batch.positions), heads * kv.head_dim) or not q.is_contiguous():
        wanted = [len(batch.positions), heads * kv.head_dim]
        raise ValueError(f"q is {list(q.shape)} {q.stride()}; it must be contiguous {wanted}")
    if kv.signs is None and q.dtype is not kv.keys.codes.dtype:
        raise TypeError(f"q is {q.dtype} and the KV {kv.keys.codes.dtype}; they must be of one type")
    if batch.block_size != kv.block_size:
        raise ValueError(f"the batch has blocks of {batch.block_size} slots, the KV of {kv.block_size}")
    if not scale > 0 or (window is not None and window < 1):
        raise ValueError(f"{scale = } must be over 0, and {window = } at least 1 or None")
