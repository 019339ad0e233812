"""What a layer and its seams cost here, measured when a rank starts, so that it can be known whether to weave.

All ranks measure at the same time, each seam together, and go by the slowest of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft.core.plan import Slice
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.weave.choice import Costs, Curve, Mode, slowest
from weft.weave.collective import Collective, Join
from weft.weave.seam import Seam
from weft.weave.split import even_bounds

REPEATS = 3


@dataclass(frozen=True, slots=True)
class _Stages:
    """Seconds of a layer's stages, and the seam after the second, at one number of tokens."""

    attend: float
    feed: float
    seam: Seam


@torch.inference_mode()
def measure(
    decoder: Decoder,
    kv: list[Any],
    block_size: int,
    collectives: Mapping[Mode, Collective],
    sizes: Sequence[int],
) -> Costs:
    """The costs by numbers of tokens in ascending order, the same on all ranks, which must call this together.

    Overwrites the keys and values in the first blocks of the first layer.
    """
    numbers: list[float] = []
    alone = [mode for mode in collectives if mode is not Mode.WOVEN]
    for tokens in sizes:
        stages = _measure_stages(decoder, kv, block_size, tokens)
        numbers += [stages.attend, stages.feed]
        numbers += [_measure_seam(collectives[mode], stages.seam) for mode in alone]
    drags = []
    if Mode.WOVEN in collectives:
        drags = [_measure_drag(decoder, kv, block_size, collectives[Mode.WOVEN], sizes[-1])]
    everywhere = collectives[Mode.FUSED].gather(torch.tensor([numbers + drags], dtype=torch.float64))
    agreed = slowest([values[0].tolist() for values in everywhere])
    width = len(numbers) // len(sizes)
    curves = [
        Curve(tuple((tokens, agreed[width * at + column]) for at, tokens in enumerate(sizes)))
        for column in range(width)
    ]
    attend, feed, *seams = curves
    return Costs(
        layers=decoder.config.layers,
        attend=attend,
        feed=feed,
        seams=dict(zip(alone, seams, strict=True)),
        drag=agreed[-1] if drags else None,
    )


def _measure_stages(decoder: Decoder, kv: list[Any], block_size: int, tokens: int) -> _Stages:
    """The best of some runs of the first layer."""
    attend, feed = [], []
    for _ in range(REPEATS):
        strand = decoder.strand(_batch(tokens, block_size), kv)
        seam = next(strand)
        begun = time.perf_counter()
        seam = strand.send(decoder.join(seam))
        attended = time.perf_counter()
        joined = decoder.join(seam)
        again = time.perf_counter()
        seam = strand.send(joined)
        feed.append(time.perf_counter() - again)
        attend.append(attended - begun)
        strand.close()
    return _Stages(min(attend), min(feed), seam)


def _measure_seam(collective: Collective, seam: Seam) -> float:
    """The best of some seams, each begun by all ranks together."""
    took = []
    for _ in range(REPEATS):
        join = _join(collective, seam)
        _meet(collective)
        begun = time.perf_counter()
        collective.finish(collective.start(join))
        took.append(time.perf_counter() - begun)
    return min(took)


def _measure_drag(decoder: Decoder, kv: list[Any], block_size: int, collective: Collective, tokens: int) -> float:
    """How much a seam beside a stage of half a step costs, of the shorter of the two (weave/choice.py)."""
    stages = _measure_stages(decoder, kv, block_size, -(-tokens // 2))
    alone = _measure_seam(collective, stages.seam)
    took = []
    for _ in range(REPEATS):
        strand = decoder.strand(_batch(-(-tokens // 2), block_size), kv)
        joined = decoder.join(next(strand))
        join = _join(collective, stages.seam)
        _meet(collective)
        begun = time.perf_counter()
        pending = collective.start(join)
        strand.send(joined)
        collective.finish(pending)
        took.append(time.perf_counter() - begun)
        strand.close()
    both = sorted((stages.attend, alone))
    return min(1.0, max(0.0, (min(took) - both[1]) / both[0]))


def _batch(tokens: int, block_size: int) -> Any:
    blocks = tuple(range(-(-tokens // block_size)))
    return make_batch([Slice(0, 0, (0,) * tokens, blocks)], block_size)


def _join(collective: Collective, seam: Seam) -> Join:
    bounds = even_bounds(len(seam.partial), collective.ranks)
    first, end = collective.owned(bounds)
    residual = torch.zeros((end - first, seam.partial.shape[1]), dtype=seam.weight.dtype)
    return Join(seam.partial, residual, seam.weight, seam.eps, bounds)


def _meet(collective: Collective) -> None:
    collective.gather(torch.zeros((1, 1)))
