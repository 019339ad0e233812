"""Triton: a seam between ranks on several GPUs in one kernel: reduce-scatter by rows, residual, RMSNorm, all-gather.

As in TokenWeave (tokenweave.md §4): each rank sums, keeps and normalises its own rows, and writes them to all ranks, on
2 to 8 thread blocks, so that a half of a step's tokens can be joined beside the other half's products. A row stays in
registers from the sum to the store; buffers in and out are different, so nobody overwrites what another still reads.

Two ways to reach the others, behind one kernel:
    peers      loads from and stores to each rank's memory; the sum is float32, in the order of ranks
    multicast  NVSwitch adds and copies (multimem, sm_90): one load of a sum, one store to all. Its order is the
               switch's, and the sum of bfloat16 is accumulated in float32 and rounded

A block announces itself at its counterparts of all ranks, and waits for them, before the first read and after the last
write. Each block counts the seams (epochs): no flag is ever cleared, and a graph can be replayed. A count goes on after
its largest number with its smallest, so that only differences mean anything. A wait has an end, after which `failed`
names the rank that did not come. All ranks must have the same number of blocks and make the same seams: nothing here
sees to that, but the hosts compare what they would launch when they meet (weave/handshake.py).

`gather_rows` is the same without a sum, for the logits of each rank's part of the vocabulary. `join_parts` is what an
owner does alone, once a library has brought the others' partial sums.

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
GATHERED = 4096  # numbers that a thread block takes at a time
Joined = tuple[torch.Tensor, torch.Tensor]
LOAD_SUM = tl.constexpr("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {$0, $1, $2, $3}, [$4];")
STORE_ALL = tl.constexpr("multimem.st.relaxed.sys.global.v4.bf16x2 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;")


@helper
def _meet(signals, failed, phase, epoch, rank, spins, RANKS: tl.constexpr):
    """All blocks of this number have come here, or `failed` says which rank has not, and then nobody waits any more.
    Signals of a rank: int32 [2, RANKS, blocks], the epoch at which each of the others' blocks was seen."""
    spins = tl.where(tl.load(failed, volatile=True) == 0, spins, 0)
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
        while (epoch - seen > 0) & (spun < spins):
            seen = tl.atomic_add(place, 0, sem="acquire", scope="sys")
            spun += 1
        if epoch - seen > 0:
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


@helper
def _joined(total, kept, mask, gain, channels, eps, KIND: tl.constexpr):
    """The normalised row of the model's type; the residual at `kept` is brought up to date."""
    total = rounded(total + tl.load(kept, mask=mask, other=0.0).to(tl.float32), KIND)
    tl.store(kept, total, mask=mask)
    total = total.to(tl.float32)
    factor = tl.rsqrt(tl.sum(total * total, axis=0) / channels + eps)
    return rounded(total * factor * gain, KIND)


@triton.jit(do_not_specialize=["rank", "first", "end", "spins"])
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
    MULTICAST: tl.constexpr,
):
    epoch = tl.load(epochs + tl.program_id(0)) + 1
    _meet(signals, failed, 0, epoch, rank, spins, RANKS)
    column = tl.arange(0, SIZE)
    mask = column < channels
    channels = tl.cast(channels, tl.int64)
    gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    for row in range(first + tl.program_id(0), end, tl.num_programs(0)):
        if MULTICAST:
            total = _summed_by_switch(partials, row, channels, SIZE)
        else:
            total = _summed(partials, row, column, mask, channels, RANKS, KIND)
        kept = residual + (row - first) * channels + column
        hidden = _joined(total, kept, mask, gain, channels, eps, KIND)
        if MULTICAST:
            _store_by_switch(outs, row, channels, hidden, SIZE)
        else:
            for other in tl.static_range(RANKS):
                theirs = _rows_of(outs, other, KIND)
                tl.store(theirs + row * channels + column, hidden, mask=mask)
    _meet(signals, failed, 1, epoch, rank, spins, RANKS)
    tl.store(epochs + tl.program_id(0), epoch)


@triton.jit(do_not_specialize=["rank", "count", "spins"])
def gather_kernel(
    places,  # int64 [RANKS]: the addresses of all ranks' int32 [RANKS, room]
    signals,  # as seam_kernel has them, and so are epochs and failed
    epochs,
    failed,
    source,  # int32 [count], or more
    rank,
    count,
    room,
    spins,
    RANKS: tl.constexpr,
    SIZE: tl.constexpr,
):
    epoch = tl.load(epochs + tl.program_id(0)) + 1
    _meet(signals, failed, 0, epoch, rank, spins, RANKS)
    for start in range(tl.program_id(0) * SIZE, count, tl.num_programs(0) * SIZE):
        at = start + tl.arange(0, SIZE)
        values = tl.load(source + at, mask=at < count, other=0)
        for other in tl.static_range(RANKS):
            tl.store(_rows_of(places, other, tl.int32) + rank * room + at, values, mask=at < count)
    _meet(signals, failed, 1, epoch, rank, spins, RANKS)
    tl.store(epochs + tl.program_id(0), epoch)


@triton.jit(do_not_specialize=["count"])
def parts_kernel(
    parts,  # [PARTS, count, H]
    residual,  # [count, H]
    weight,  # [H]
    out,  # [count, H]
    count,
    channels,
    eps,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    mask = column < channels
    total = tl.zeros((SIZE,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + (part * count + row) * channels + column, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    hidden = _joined(total, residual + row * channels + column, mask, gain, channels, eps, KIND)
    tl.store(out + row * channels + column, hidden, mask=mask)


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
    spins: int = SPINS,
) -> None:
    """This rank's part in a seam, launched on the current stream. residual [own, H]: of rows[0] to rows[1], updated in
    place. Raises TypeError, ValueError."""
    size = len(weight)
    _check(residual, weight, rows[1] - rows[0])
    # A switch adds whole vectors of bfloat16.
    switch = reach.multicast is not None and residual.dtype is torch.bfloat16 and size & size - 1 == 0 and size >= 8
    partials, outs = reach.partials, reach.outs
    if switch and reach.multicast is not None:
        partials, outs = reach.multicast[:1], reach.multicast[1:]
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
        MULTICAST=switch,
        num_warps=warps(triton.next_power_of_2(size)),
    )


def gather_rows(reach: Reach, places: torch.Tensor, source: torch.Tensor, room: int, *, spins: int = SPINS) -> None:
    """Give this rank's int32 [n] to all ranks, launched on the current stream. places: int64 addresses of all ranks'
    int32 [ranks, room], 16 bytes apart; rank r's numbers come to the first n of row r. Raises TypeError, ValueError."""
    if source.dtype is not torch.int32 or source.dim() != 1 or not source.is_contiguous():
        raise TypeError(f"what is gathered must be contiguous int32 [n], not {source.dtype} {list(source.shape)}")
    if len(source) > room:
        raise ValueError(f"{len(source)} numbers are to be gathered; there is room for {room} of each rank")
    gather_kernel[(len(reach.epochs),)](
        places,
        reach.signals,
        reach.epochs,
        reach.failed,
        source,
        reach.rank,
        len(source),
        room,
        spins,
        RANKS=reach.ranks,
        SIZE=GATHERED,
        num_warps=8,
    )


def join_parts(parts: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Joined:
    """The sum of parts [W, n, H] in float32 and in their order, the residual and the norm, launched on the current
    stream: (hidden [n, H], residual [n, H]). residual: updated in place. The bits are those of `join_rows` over peers.
    Raises TypeError, ValueError."""
    count, size = parts.shape[1:]
    _check(residual, weight, count)
    if parts.dtype not in KINDS or not parts.is_contiguous():
        raise TypeError(f"parts are {parts.dtype} {list(parts.shape)} {parts.stride()}; they must be contiguous floats")
    hidden = weight.new_empty((count, size))
    if count:
        wide = triton.next_power_of_2(size)
        parts_kernel[(count,)](
            parts,
            residual,
            weight,
            hidden,
            count,
            size,
            eps,
            PARTS=len(parts),
            SIZE=wide,
            KIND=KINDS[residual.dtype],
            num_warps=warps(wide),
        )
    return hidden, residual


def _check(residual: torch.Tensor, weight: torch.Tensor, count: int) -> None:
    if residual.dtype not in KINDS or weight.dtype is not residual.dtype:
        raise TypeError(
            f"the residual is {residual.dtype} and the norm's weight {weight.dtype}; they must be one float"
        )
    if residual.shape != (count, len(weight)) or not residual.is_contiguous():
        raise ValueError(f"the residual is {list(residual.shape)}; it must be contiguous {[count, len(weight)]}")


def warps(size: int) -> int:
    """For rows of so many channels, a power of two."""
    return max(1, min(32, size // (32 * VECTOR)))
