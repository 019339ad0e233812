"""How long a step of a model takes on a GPU, or on several that split it: the cost that simulated devices go by.

A step is asked for millions of times. Everything that depends on the number of tokens alone is computed once for each
number and kept; what is left are a few sums over the slices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from weft.core.plan import Plan
from weft.devices.cost import one_by_one
from weft.errors import ConfigError
from weft.sim.attention import Heads, attention_seconds, decoding_seconds, work_of
from weft.sim.collectives import all_reduce_seconds, check_ranks, gather_seconds
from weft.sim.gemm import gemm_seconds
from weft.sim.hardware import Gpu, Link, Part, PointwiseFit
from weft.sim.models import Experts, Linear, Model
from weft.sim.moe import moe_seconds
from weft.sim.precision import Precision

CUT = 2e-5  # seconds to begin a part of a step that is cut
# SMs that a woven step gives to its collectives (TokenWeave, section 6: 2 to 8 blocks, each on an SM of its own).
WEAVE_SMS = 8
# What TokenWeave's products lose beside its collectives, and what starting and joining a woven half takes: from the
# difference between its table of a layer's times and the model without them (Llama-3-70B on 8 H100; section 8).
WEAVE_SLOWER = 1.05
WEAVE_START = 5e-6
ATTENTION = frozenset({"qkv", "qkv_down", "q_up", "kv_up", "o"})


class Tokens(NamedTuple):
    """Seconds that go with a number of tokens, of all layers. attention, mlp: their products. norms: both. rest:
    rotation and gate. joins: all all-reduces."""

    attention: float
    mlp: float
    norms: float
    rest: float
    joins: float


class Ways(NamedTuple):
    """Seconds of the same step by how its ranks are joined. plain: all-reduces, and every rank norms all tokens. fused:
    one kernel, and every rank norms its part. woven: that in two halves, also where it takes longer. silent: plain
    without the time of its all-reduces, which no device can do; for comparison."""

    plain: float
    fused: float
    woven: float
    silent: float


class Stages(NamedTuple):
    """Seconds of one layer. attend, feed: up to its two seams, on tokens of one prompt. join: an all-reduce of these
    tokens. norm: of all of them on one rank."""

    attend: float
    feed: float
    join: float
    norm: float


@dataclass(frozen=True, slots=True)
class Kept:
    """What was computed for one share and rival. decoding: see decoding_seconds. tokens, outputs: by number of tokens
    and of samples."""

    share: float
    rival: float
    part: Part
    heads: Heads
    decoding: Callable[[int, int, int], float]
    tokens: dict[int, Tokens] = field(default_factory=dict)
    outputs: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepCost:
    """As devices.cost.CostModel, from shapes and hardware.

    ranks: that split every layer (tensor parallel), joined by `link`, which may be left out for one. fused: all-reduce,
    norm and residual are one kernel, and every rank norms its part of the tokens (TokenWeave, section 5); the gather
    carries what the products take, quantised where they do so in fewer than 16 bits. weave: also, the tokens go in two
    halves, one of which is computed while the other is joined, wherever that is quicker (section 6). Raises ConfigError
    for what cannot be.
    """

    model: Model
    gpu: Gpu
    precision: Precision
    ranks: int = 1
    link: Link | None = None
    weave: bool = False
    fused: bool = False
    _kept: dict[tuple[float, float], Kept] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        self.precision.part(self.gpu, 1.0, 0.0)
        if self.ranks < 1 or self.model.heads % self.ranks:
            raise ConfigError(
                f"ranks is {self.ranks}; it must divide the {self.model.heads} heads of {self.model.name}"
            )
        if self.ranks > 1 and self.link is None:
            raise ConfigError(f"{self.ranks} ranks need a link")
        if self.link is not None:
            check_ranks(self.link, self.ranks)

    # -- memory ------------------------------------------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> float:
        """Memory of all ranks together."""
        return self.gpu.memory * self.ranks

    @property
    def weight_bytes(self) -> float:
        """Of all ranks together."""
        linear = self.model.parameters(self.ranks) * self.precision.weights / 8
        return self.ranks * (linear + self.model.embeddings(self.ranks) * 2)

    @property
    def kv_bytes_per_token(self) -> float:
        """Of all ranks together: more ranks than kv heads keep copies."""
        return self.ranks * self.model.layers * self.model.slots(self.ranks) * self.precision.kv / 8

    @property
    def caveats(self) -> tuple[str, ...]:
        """What of this was not measured, or may be wrong, for people to read."""
        found = [] if self.model.caveat is None else [self.model.caveat]
        if not self.gpu.calibrated:
            found.append(f"{self.gpu.title} is uncalibrated: {self.gpu.note}")
        if self.link is not None and self.ranks > 1 and not self.link.calibrated:
            found.append(f"{self.link.title} is uncalibrated: {self.link.source}")
        if self.precision.arithmetic != "bf16" or self.precision.weights < 16:
            found.append(f"{self.precision.name} is scaled from measurements in bf16 by peaks and bytes")
        return tuple(found)

    # -- time --------------------------------------------------------------------------------------------------------

    def seconds(self, plan: Plan, share: float = 1.0, rival: float = 0.0) -> float:
        """share: the lane's part of the device, in (0, 1]. rival: that of a lane which computes beside it, or 0.
        A part of a step that is cut takes its part of the time, and begins anew."""
        slices = plan.slices
        rows = [len(piece.tokens) for piece in slices]
        before = [piece.start for piece in slices]
        samples = sum([piece.sample is not None for piece in slices])
        whole = self.whole(rows, before, samples, share, rival)
        return whole if plan.parts == 1 else whole / plan.parts + CUT

    def repeated(self, plan: Plan) -> list[float]:
        """Of each of the times that a step which only decodes is carried out: as `seconds`, to the last bit."""
        if self.model.window is not None:
            return one_by_one(self.seconds, plan)
        kept, count, known = self._of(1.0, 0.0), len(plan.slices), [piece.start for piece in plan.slices]
        slots, longest = sum(known) + count, max(known) + 1
        return [self._decode(kept, count, slots + count * n, longest + n, count) for n in range(plan.repeats)]

    def whole(self, rows: list[int], before: list[int], samples: int, share: float = 1.0, rival: float = 0.0) -> float:
        """Of a step that computes so many tokens of each of some sequences, after those before, and draws `samples`."""
        tokens, count = sum(rows), len(rows)
        kept, model = self._of(share, rival), self.model
        if model.window is not None:
            before = [min(known, model.window) for known in before]
        if tokens == count > 0:
            return self._decode(kept, count, sum(before) + count, max(before) + 1, samples)
        fit = self.gpu.attention
        work = work_of(rows, before, kept.heads.together(fit.packed))
        return self._step(tokens, model.layers * attention_seconds(fit, kept.part, kept.heads, work), samples, kept)

    def ways(self, tokens: int) -> Ways:
        """Of a step with one prompt of at least two tokens, whatever `fused` and `weave` say; but gathers carry what
        they do with these."""
        alone = self._of(1.0, 0.0)
        attention = self._attention(tokens, alone)
        whole = self._tokens(tokens, alone)
        computed = whole.attention + whole.mlp + whole.rest + attention
        rest = self.gpu.host.step + self.gpu.host.sequence + self._output(1, alone)
        fused = computed + whole.joins + whole.norms / self.ranks
        woven = self._woven(tokens, attention, alone)
        silent = computed + whole.norms
        return Ways(rest + silent + whole.joins, rest + fused, rest + woven, rest + silent)

    def stages(self, tokens: int) -> Stages:
        """Of a prompt, as weft.models.measure has them of a real layer."""
        alone, layers = self._of(1.0, 0.0), self.model.layers
        whole = self._tokens(tokens, alone)
        attend = whole.attention + whole.rest + self._attention(tokens, alone)
        return Stages(*(one / layers for one in (attend, whole.mlp, whole.joins / 2, whole.norms / 2)))

    def woven_pair(self, stage: float, seam: float) -> float:
        """Seconds of a stage of one half and a seam of the other, side by side, given those of each alone."""
        return max(self._slower(1.0) * stage, seam) + WEAVE_START

    def _decode(self, kept: Kept, count: int, slots: int, longest: int, samples: int) -> float:
        """Of a step of `count` sequences that decode, see decoding_seconds."""
        return self._step(count, self.model.layers * kept.decoding(count, slots, longest), samples, kept)

    def _step(self, tokens: int, attention: float, samples: int, kept: Kept) -> float:
        """attention: in all layers."""
        host = self.gpu.host
        layers = self._layers(tokens, attention, kept)
        return host.step + host.sequence * samples + layers + self._output(samples, kept)

    def _attention(self, tokens: int, kept: Kept) -> float:
        """Of one prompt, in all layers."""
        work = work_of([tokens], [0], kept.heads.together(self.gpu.attention.packed))
        return float(self.model.layers * attention_seconds(self.gpu.attention, kept.part, kept.heads, work))

    def _layers(self, tokens: int, attention: float, kept: Kept) -> float:
        whole = self._tokens(tokens, kept)
        computed = whole.attention + whole.mlp + whole.rest + attention
        if self.ranks == 1 or not (self.fused or self.weave):
            return computed + whole.norms + whole.joins
        fused = computed + whole.joins + whole.norms / self.ranks
        if not self.weave or tokens < 2:
            return fused
        return min(fused, self._woven(tokens, attention, kept))

    def _woven(self, tokens: int, attention: float, kept: Kept) -> float:
        """Of both halves; each join lies under the products of the other half. Half of the joins go with each block."""
        half = self._tokens(-(-tokens // 2), kept)
        slower = self._slower(kept.share)
        joins = half.joins + half.norms / self.ranks
        first = slower * (2 * (half.attention + half.rest) + attention)
        started = 4 * self.model.layers * WEAVE_START
        return max(first, joins) + max(slower * 2 * half.mlp, joins) + started

    def _slower(self, share: float) -> float:
        """How much longer a stage takes beside a seam."""
        return WEAVE_SLOWER / (1.0 - min(0.5, WEAVE_SMS / (self.gpu.sms * share)))

    def _of(self, share: float, rival: float) -> Kept:
        found = self._kept.get((share, rival))
        if found is None:
            part, heads = self.gpu.part(share, rival), self.model.prompt_heads(self.ranks, self.precision.kv)
            found = Kept(share, rival, part, heads, decoding_seconds(self.gpu.attention, part, heads))
            self._kept[share, rival] = found
        return found

    def _tokens(self, tokens: int, kept: Kept) -> Tokens:
        found = kept.tokens.get(tokens)
        if found is None:
            found = kept.tokens[tokens] = self._compute(tokens, kept)
        return found

    def _compute(self, tokens: int, kept: Kept) -> Tokens:
        model, ranks, plain, heads = self.model, self.ranks, kept.part, kept.heads
        part = self.precision.part(self.gpu, kept.share, kept.rival)
        linears = [each for each in model.linears() if not each.sampled and each.layers and each.n and each.k]
        taken = self._products(linears, tokens, part)
        attention = sum(seconds for each, seconds in zip(linears, taken, strict=True) if each.name in ATTENTION)
        mlp = sum(taken) - attention
        wide = model.intermediate * (model.layers if model.experts is None else model.experts.dense_layers)
        if model.experts is not None:
            mlp += self._experts(model.experts, tokens, part)
            wide += model.experts.shared * (model.layers - model.experts.dense_layers)
        hidden = 2.0 * tokens * model.hidden  # bytes
        fit = self.gpu.pointwise
        norms = 2 * model.layers * pointwise_seconds(fit, plain, 4 * hidden)
        rotated = 4.0 * tokens * (heads.heads + heads.kv_heads) * heads.key
        rest = 2 * model.layers * fit.launch + (model.layers * rotated + 6.0 * tokens * wide / ranks) / (
            fit.dram * plain.bandwidth
        )
        gathered = min(16.0, self.precision.inputs) / 16 if self.fused or self.weave else 1.0
        joins = 0.0
        if self.link is not None:
            joins = 2 * model.layers * float(all_reduce_seconds(self.link, ranks, hidden, gathered))
        return Tokens(float(attention), float(mlp), norms, rest, joins)

    def _products(self, linears: list[Linear], rows: int, part: Part) -> list[float]:
        sizes = np.array([each.on(self.ranks) for each in linears], dtype=np.float64)
        counts = np.array([each.layers for each in linears])
        one = gemm_seconds(self.gpu.gemm, part, rows, sizes[:, 0], sizes[:, 1], self.precision.operands)
        return [float(seconds) for seconds in one * counts]

    def _experts(self, experts: Experts, tokens: int, part: Part) -> float:
        wide = -(-experts.intermediate // self.ranks)
        shape = self.model.hidden, wide, experts.count, experts.chosen
        one = moe_seconds(self.gpu.moe, part, tokens, *shape, self.precision.operands)
        return float(one) * (self.model.layers - experts.dense_layers)

    def _output(self, samples: int, kept: Kept) -> float:
        """The last product, in 16 bits, and the gathering of its results."""
        if not samples:
            return 0.0
        found = kept.outputs.get(samples)
        if found is None:
            (linear,) = [each for each in self.model.linears() if each.sampled]
            n, k = linear.on(self.ranks)
            found = gemm_seconds(self.gpu.gemm, kept.part, samples, n, k).item()
            if self.link is not None:
                found += float(gather_seconds(self.link, self.ranks, 2.0 * samples * linear.n))
            kept.outputs[samples] = found
        return found


def pointwise_seconds(fit: PointwiseFit, part: Part, moved: float) -> float:
    """moved: bytes read and written."""
    return fit.launch + moved / (fit.dram * part.bandwidth)
