"""Triton: a seam between ranks on several GPUs in one kernel: reduce-scatter by rows, residual, RMSNorm, all-gather.

As in TokenWeave (tokenweave.md §4): each rank sums, keeps and normalises its own rows, and writes them to all ranks, on
2 to 8 thread blocks, so that a half of a step's tokens can be joined beside the other half's products. A row stays in
registers from the sum to the store; buffers in and out are different, so nobody overwrites what another still reads.

Two ways to reach the others, behind one kernel:
    peers      loads from and stores to each rank's memory; the sum is float32, in the order of ranks
    multicast  NVSwitch adds and copies (multimem, sm_90): one load of a sum, one store to all. Its order is the
               switch's, and the sum of bfloat16 is accumulated in float32 and rounded

A block announces itself at its counterparts of all ranks, and waits for them, before the first read and after the last
write. Each block counts the seams (epochs): they only grow, so no flag is ever cleared, and a graph can be replayed. A
wait has an end, after which `failed` names the rank that did not come. All ranks must have the same number of blocks
and make the same seams: the host's handshake sees to that.

Importing this module needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from weft.kernels.triton_numbers import KINDS, helper, rounded

BLOCKS = 8  # thread blocks of a seam: TokenWeave's 2 to 8
VECTOR = 8  # channels of a row that a thread holds: 16 bytes of bfloat16
SPINS = 1 << 24  # of a wait: about ten seconds
LOAD_SUM = tl.constexpr("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {$0, $1, $2, $3}, [$4];")
STORE_ALL = tl.constexpr("multimem.st.relaxed.sys.global.v4.bf16x2 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;")


@helper
def _meet(signals, failed, phase, epoch, rank, spins, RANKS: tl.constexpr):
    """All blocks of this number have come here, or `failed` says which rank has not. Signals of a rank: int32
    [2, RANKS, blocks], the epoch at which each of the others' blocks was seen."""
    tl.debug_barrier()  # one thread speaks for all, and for what they have stored
    block, blocks = tl.program_id(0), tl.num_programs(0)
    for other in tl.static_range(RANKS):
        theirs = tl.load(signals + other).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(theirs + (phase * RANKS + rank) * blocks + block, epoch, sem="release", scope="sys")
    ours = tl.load(signals + rank).to(tl.pointer_type(tl.int32))
    for other in tl.static_range(RANKS):
        place = ours + (phase * RANKS + other) * blocks + block
        seen = tl.atomic_add(place, 0, sem="acquire", scope="sys")
        spun = 0
        while (seen < epoch) & (spun < spins):
            seen = tl.atomic_add(place, 0, sem="acquire", scope="sys")
            spun += 1
        if seen < epoch:
            tl.atomic_xchg(failed, other + 1)


@helper
def _rows_of(addresses, rank, KIND: tl.constexpr):
    """Where a rank's rows begin; torch's memory is aligned."""
    return tl.multiple_of(tl.load(addresses + rank).to(tl.pointer_type(KIND)), 16)


@helper
def _summed(partials, row, column, mask, channels, RANKS: tl.constexpr, KIND: tl.constexpr):
    """float32: the row's sum over the ranks, in their order."""
    total = tl.zeros(column.shape, tl.float32)
    for other in tl.static_range(RANKS):
        theirs = _rows_of(partials, other, KIND)
        total += tl.load(theirs + row * channels + column, mask=mask, other=0.0).to(tl.float32)
    return total


@helper
def _summed_by_switch(partials, row, channels, SIZE: tl.constexpr):
    """The same by one load: eight bfloat16 for each thread and address. `partials` has the multicast address."""
    address = tl.load(partials) + (row * channels + tl.arange(0, SIZE // 8) * 8) * 2
    a, b, c, d = tl.inline_asm_elementwise(
        LOAD_SUM, "=r,=r,=r,=r,l", [address], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
    )
    pairs = tl.join(tl.join(a, c), tl.join(b, d))  # [SIZE / 8, 2, 2]: in the order of memory
    low = (pairs << 16).to(tl.float32, bitcast=True)
    high = (pairs & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), (SIZE,))


@helper
def _store_by_switch(outs, row, channels, hidden, SIZE: tl.constexpr):
    """hidden bfloat16 [SIZE] to all ranks by one store."""
    address = tl.load(outs) + (row * channels + tl.arange(0, SIZE // 8) * 8) * 2
    low, high = tl.split(tl.reshape(hidden.to(tl.int16, bitcast=True), (SIZE // 8, 2, 2, 2)))
    pairs = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    even, odd = tl.split(pairs)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    tl.inline_asm_elementwise(STORE_ALL, "=r,l,r,r,r,r", [address, a, b, c, d], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def seam_kernel(
    partials,  # int64 [RANKS]: the addresses of all ranks' [T, H]; [1], that of all at once, where MULTICAST
    outs,  # int64 [RANKS] or [1]: of all ranks' [T, H]
    signals,  # int64 [RANKS]: of all ranks' int32 [2, RANKS, blocks]
    epochs,  # int32 [blocks]: seams so far, as each of this rank's blocks has counted them
    residual,  # [own, H]
    weight,  # [H]
    failed,  # int32 [1]
    rank,
    first,  # this rank owns rows first to end
    end,
    channels,  # H
    spins,
    eps,
    RANKS: tl.constexpr,
    SIZE: tl.constexpr,  # H or more; H where MULTICAST
    KIND: tl.constexpr,  # of partials, residual and hidden rows
    BEGIN: tl.constexpr,  # there is no residual yet: the sum becomes it
    REPLICATED: tl.constexpr,  # partials are the same on all ranks: nothing is summed
    MULTICAST: tl.constexpr,
):
    epoch = tl.load(epochs + tl.program_id(0)) + 1
    _meet(signals, failed, 0, epoch, rank, spins, RANKS)
    column = tl.arange(0, SIZE)
    mask = column < channels
    channels = tl.cast(channels, tl.int64)
    gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    for row in range(first + tl.program_id(0), end, tl.num_programs(0)):
        if REPLICATED:
            ours = _rows_of(partials, rank, KIND)
            total = tl.load(ours + row * channels + column, mask=mask, other=0.0).to(tl.float32)
        elif MULTICAST:
            total = _summed_by_switch(partials, row, channels, SIZE)
        else:
            total = _summed(partials, row, column, mask, channels, RANKS, KIND)
        kept = residual + (row - first) * channels + column
        if not BEGIN:
            total += tl.load(kept, mask=mask, other=0.0).to(tl.float32)
        total = rounded(total, KIND)
        tl.store(kept, total, mask=mask)
        total = total.to(tl.float32)
        factor = tl.rsqrt(tl.sum(total * total, axis=0) / channels + eps)
        hidden = rounded(total * factor * gain, KIND)
        if MULTICAST:
            _store_by_switch(outs, row, channels, hidden, SIZE)
        else:
            for other in tl.static_range(RANKS):
                theirs = _rows_of(outs, other, KIND)
                tl.store(theirs + row * channels + column, hidden, mask=mask)
    _meet(signals, failed, 1, epoch, rank, spins, RANKS)
    tl.store(epochs + tl.program_id(0), epoch)


@dataclass(frozen=True, slots=True)
class Reach:
    """How a rank reaches the others, on its own GPU. partials, outs, signals: int64 addresses of each rank's buffers,
    as `seam_kernel` has them. epochs: int32, zeros at first, one for each thread block, as many on all ranks. failed:
    int32 [1], zero at first; the rank that did not come, plus 1. multicast: int64 [2], the addresses of all partials
    and of all outs at once; None without a switch."""

    rank: int
    partials: torch.Tensor
    outs: torch.Tensor
    signals: torch.Tensor
    epochs: torch.Tensor
    failed: torch.Tensor
    multicast: torch.Tensor | None = None

    @property
    def ranks(self) -> int:
        return len(self.partials)


def signals_of(ranks: int, blocks: int = BLOCKS) -> int:
    """int32 that a rank's signals take."""
    return 2 * ranks * blocks


def join_rows(
    reach: Reach,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    rows: tuple[int, int],
    *,
    begin: bool = False,
    replicated: bool = False,
    spins: int = SPINS,
) -> None:
    """This rank's part in a seam, launched on the current stream. residual [own, H]: of rows[0] to rows[1], updated in
    place; begin: what is in it does not count; replicated: partials are the same on all ranks, and are not summed.
    Raises TypeError, ValueError."""
    size = len(weight)
    if residual.dtype not in KINDS or weight.dtype is not residual.dtype:
        raise TypeError(
            f"the residual is {residual.dtype} and the norm's weight {weight.dtype}; they must be one float"
        )
    if residual.shape != (rows[1] - rows[0], size) or not residual.is_contiguous():
        raise ValueError(f"the residual is {list(residual.shape)}; it must be contiguous {[rows[1] - rows[0], size]}")
    # A switch adds whole vectors of bfloat16, and knows no row that is the same everywhere.
    switch = reach.multicast is not None and residual.dtype is torch.bfloat16 and size & size - 1 == 0 and size >= 8
    partials, outs = reach.partials, reach.outs
    if switch and reach.multicast is not None and not replicated:
        partials, outs = reach.multicast[:1], reach.multicast[1:]
    else:
        switch = False
    seam_kernel[(len(reach.epochs),)](
        partials,
        outs,
        reach.signals,
        reach.epochs,
        residual,
        weight,
        reach.failed,
        reach.rank,
        *rows,
        size,
        spins,
        eps,
        RANKS=reach.ranks,
        SIZE=triton.next_power_of_2(size),
        KIND=KINDS[residual.dtype],
        BEGIN=begin,
        REPLICATED=replicated,
        MULTICAST=switch,
        num_warps=warps(triton.next_power_of_2(size)),
    )


def warps(size: int) -> int:
    """For rows of so many channels, a power of two."""
    return max(1, min(32, size // (32 * VECTOR)))
