"""One rank of benchmarks/weave_link.py: a process that is given jobs on its standard input, one JSON line each.

A job is a step of one prompt, in every mode, in turns. The answer: seconds, bytes sent, and what the cost model of weft
would have chosen.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore
from weave_link import (
    FUSED,
    FUSED_GLOO,
    FUSED_QUANTISED,
    NOTHING,
    ONE_SHOT,
    PLAIN,
    QUANTISED,
    REJOINED,
    SPLIT,
    TWO,
    TWO_QUANTISED,
    TWO_REJOINED,
    WOVEN,
    WOVEN_GLOO,
    served,
)

from weft import _native
from weft.core.plan import Slice
from weft.devices.group import STRANDS, WAVES, Chooser, measured_sizes
from weft.kernels.cpu import CpuKernels
from weft.kernels.wire import FusedRows, input_format
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.experts import Mixture
from weft.models.families import parse_config
from weft.models.loader import Dummy, LayerWeights, Weights
from weft.models.measure import measure
from weft.models.ranked import cut_step
from weft.models.rope import Rotary
from weft.models.shard import Part, shard_config
from weft.weave.background import Background
from weft.weave.choice import Costs, Mode
from weft.weave.collective import Collective, Join, Joined
from weft.weave.distributed import AllReduceCollective, DistributedCollective, connect, meet
from weft.weave.native import NativeBackground, NativeCollective
from weft.weave.rows import JoinRows
from weft.weave.sockets import open_sockets
from weft.weave.split import choose_strands
from weft.weave.weaver import Weaver, no_format

RANKS, TIMEOUT, KV_BLOCK = 2, 300.0, 16
ROUNDS_OF_A_SEAM = 2  # one after the other, in an all-reduce of two ranks as well; one-shot has one


class Delayed:
    """A collective over a link with more latency: each seam takes `seconds` longer."""

    def __init__(self, inner: Collective) -> None:
        self.rank, self.ranks, self.owned, self.gather = inner.rank, inner.ranks, inner.owned, inner.gather
        self.start, self.close = inner.start, inner.close
        self.seconds = 0.0
        self._inner = inner

    def finish(self, pending: Any) -> Joined:
        joined = self._inner.finish(pending)
        if self.seconds:
            time.sleep(self.seconds)
        return joined


class Silent:
    """Nothing is exchanged: every rank goes on with its own partial sums, all rows of them. The results are wrong."""

    def __init__(self, rank: int, join_rows: JoinRows) -> None:
        self.rank, self.ranks = rank, RANKS
        self._join_rows = join_rows

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return 0, bounds[-1]

    def start(self, join: Join) -> Join:
        return join

    def finish(self, pending: Join) -> Joined:
        return Joined(*self._join_rows([pending.partial], pending.residual, pending.weight, pending.eps, None))

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [rows] * RANKS

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder of this rank and its KV. formats: how rows travel quantised, if the model's linears take them so."""

    decoder: Decoder
    kv: list[Any]
    quantised: bool


def make_model(raw: dict[str, Any], part: Part, kernels: CpuKernels, precision: str, tokens: int) -> Model:
    """Random weights of this rank's shapes. precision: bf16, w4a8, w4a4, w4ax (one block of channels in 16 has
    activations of 8 bits, the rest of 4), or mixture, which is bf16."""
    whole = parse_config(raw)
    config, quantised = shard_config(whole, part), precision in ("w4a8", "w4a4", "w4ax")
    draw = torch.Generator().manual_seed(part.rank)

    def linear(outputs: int, inputs: int) -> Any:
        if quantised:
            values = torch.randint(-8, 8, (outputs, inputs), generator=draw, dtype=torch.int8)
            scales = torch.full((outputs, inputs // 128), 2.0**-8)
            outliers = inputs // 128 // 16 if precision == "w4ax" else 0
            return kernels.pack_w4ax(values, scales, outlier_blocks=outliers, exact_a4=precision != "w4a8")
        return kernels.pack_linear((torch.rand(outputs, inputs, generator=draw) * 0.07 - 0.035).bfloat16())

    def feed() -> dict[str, Any]:
        """The second stage of a layer."""
        experts = config.experts
        if experts is None:
            return {"gate_up": linear(2 * inner, hidden), "down": linear(hidden, inner)}
        alike = torch.Generator().manual_seed(0)  # ranks must take the same experts
        router = (torch.rand(experts.count, hidden, generator=alike) * 0.07 - 0.035).bfloat16()
        mixture = Mixture(
            experts,
            kernels.pack_linear(router),
            tuple(linear(2 * experts.inner, hidden) for _ in range(experts.count)),
            tuple(linear(hidden, experts.inner) for _ in range(experts.count)),
            linear(1, hidden),
            linear(2 * experts.shared, hidden),
            linear(hidden, experts.shared),
        )
        return {"gate_up": None, "down": None, "mixture": mixture}

    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    layers = tuple(
        LayerWeights(
            input_norm=ones,
            mlp_norm=ones,
            q_norm=None,
            k_norm=None,
            qkv=linear(queries + 2 * keys, hidden),
            output=linear(hidden, queries),
            **feed(),
        )
        for _ in range(config.layers)
    )
    table = Dummy({"e": (config.vocabulary, hidden)}, 1).take(["e"])["e"].bfloat16()
    rotary = Rotary(config.rope, config.head_dim)
    embedding = kernels.pack_embedding(table)
    head = kernels.pack_linear(table[:64])
    weights = Weights(torch.bfloat16, embedding, layers, ones, head, rotary, 0)
    decoder = Decoder(config, weights, kernels, config.context)
    return Model(decoder, decoder.make_kv(-(-tokens // KV_BLOCK), KV_BLOCK), quantised)


@dataclass(frozen=True, slots=True)
class Way:
    """How a step is carried out. quantised: whether rows travel so."""

    collective: Collective
    strands: int = 1
    quantised: bool = False
    rejoin: bool = False


def prompt(tokens: int) -> Slice:
    return Slice(0, 0, tuple(range(tokens)), tuple(range(-(-tokens // KV_BLOCK))))


class Rank:
    """What jobs are carried out with."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self.rank, self.orders = orders["rank"], orders
        core = orders["core"]
        os.sched_setaffinity(0, {core})  # and the threads of gloo
        torch.set_num_threads(1)
        self.kernels = CpuKernels(orders["level"], (core,))
        own = CpuKernels(orders["level"], (core,))
        most, part = orders["tokens"], Part(self.rank, RANKS)
        self.models = {name: make_model(raw, part, self.kernels, name, most) for name, raw in orders["models"].items()}
        store = meet(orders["address"], orders["port"], self.rank, RANKS, timeout=TIMEOUT)

        def group(name: str) -> tuple[Any, int, int]:
            return PrefixStore(name, store), self.rank, RANKS

        reach: dict[str, Any] = {"bind": orders["bind"], "timeout": TIMEOUT}
        self.plain = Delayed(AllReduceCollective(connect(*group(PLAIN), **reach), FusedRows(self.kernels)))
        widest = max(model.decoder.config.hidden_size for model in self.models.values())
        capacity = most * widest * torch.float32.itemsize

        def over_gloo(name: str, kernels: CpuKernels, *, one_round: bool = False) -> Delayed:
            messages = connect(*group(name), **reach)
            return Delayed(DistributedCollective(messages, FusedRows(kernels), capacity=capacity, one_round=one_round))

        self.one_shot = over_gloo(ONE_SHOT, self.kernels, one_round=True)
        self.over_gloo: dict[str, Delayed] = {}
        if orders["gloo"]:
            self.over_gloo = {FUSED_GLOO: over_gloo(FUSED_GLOO, self.kernels), WOVEN_GLOO: over_gloo(WOVEN_GLOO, own)}
        self.fused = Delayed(open_sockets(*group(FUSED), self.kernels, **reach))
        self.behind = _native.DistantSeams(open_sockets(*group(WOVEN), own, **reach).group)
        self.woven = NativeBackground(NativeCollective(self.behind, own), (core,))
        self.gloo_woven = Background(self.over_gloo[WOVEN_GLOO], (core,)) if self.over_gloo else None
        self.silent = Silent(self.rank, FusedRows(self.kernels))
        self.costs: dict[tuple[Any, ...], Costs] = {}  # by link and model

    def modes(self, model: Model) -> dict[str, Way]:
        """By name."""
        most, woven = max(STRANDS), self.woven
        found = {
            PLAIN: Way(self.plain),
            ONE_SHOT: Way(self.one_shot),
            FUSED: Way(self.fused),
            TWO: Way(woven, 2),
            WOVEN: Way(woven, most),
            NOTHING: Way(self.silent),
            SPLIT: Way(self.silent, most),
        }
        if self.gloo_woven is not None:
            found |= {FUSED_GLOO: Way(self.over_gloo[FUSED_GLOO]), WOVEN_GLOO: Way(self.gloo_woven, most)}
        if model.quantised:
            found |= {FUSED_QUANTISED: Way(self.fused, quantised=True), TWO_QUANTISED: Way(woven, 2, quantised=True)}
            found |= {QUANTISED: Way(woven, most, quantised=True)}
        if model.decoder.config.experts is not None:
            found |= {TWO_REJOINED: Way(woven, 2, rejoin=True), REJOINED: Way(woven, most, rejoin=True)}
        return found

    @torch.inference_mode()
    def step(self, model: Model, tokens: int, way: Way) -> torch.Tensor:
        """Of a prompt of so many tokens, the last row is kept."""
        strands = [
            model.decoder.strand(make_batch(own, KV_BLOCK, kept), model.kv)
            for own, kept in cut_step([prompt(tokens)], [tokens - 1], choose_strands([tokens], WAVES, way.strands))
        ]
        formats = self._format if way.quantised else no_format
        weaver = Weaver(way.collective, model.decoder.join, formats, rejoin=way.rejoin)
        return torch.cat(weaver.weave(strands))

    def _format(self, packed: Any) -> Any:
        return input_format(self.kernels, packed)

    def job(self, job: dict[str, Any]) -> dict[str, Any]:
        """Seconds, CPU seconds and bytes by mode, and the mode that the cost model chooses."""
        for delayed in (self.plain, self.fused, self.behind, *self.over_gloo.values()):
            delayed.seconds = ROUNDS_OF_A_SEAM * job["latency"]
        self.one_shot.seconds = job["latency"]
        model, tokens = self.models[job["precision"]], job["tokens"]
        modes = self.modes(model)
        self._compare(model, tokens, modes)
        seconds: dict[str, list[float]] = {name: [] for name in modes}
        cpu: dict[str, list[float]] = {name: [] for name in modes}
        sent: dict[str, int] = {}
        for _ in range(job["rounds"]):
            for name, mode in modes.items():
                self.fused.gather(torch.zeros(1))
                before, used = _sent(self.orders["interface"]), time.process_time()
                begun = time.perf_counter()
                self.step(model, tokens, mode)
                seconds[name].append(time.perf_counter() - begun)
                cpu[name].append(time.process_time() - used)
                sent[name] = _sent(self.orders["interface"]) - before
        return {"seconds": seconds, "cpu": cpu, "sent": sent, "chosen": self._chosen(model, job)}

    def _chosen(self, model: Model, job: dict[str, Any]) -> str:
        """By costs that are measured once for a link and a model, as they are when a rank starts."""
        key = job["mbit"], job["latency"], job["precision"]
        if key not in self.costs:
            collectives: dict[Mode, Collective] = {
                Mode.PLAIN: self.plain,
                Mode.ONE_SHOT: self.one_shot,
                Mode.FUSED: self.fused,
                Mode.WOVEN: self.woven,
            }
            sizes, formats = measured_sizes(self.orders["tokens"]), self._format if model.quantised else no_format
            self.costs[key] = measure(model.decoder, model.kv, KV_BLOCK, collectives, sizes, formats=formats)
        mode, strands = Chooser("auto", self.costs[key])([prompt(job["tokens"])])
        return served(quantised=model.quantised)[mode.value, len(strands)]

    def _compare(self, model: Model, tokens: int, modes: dict[str, Way]) -> None:
        """Also warms up. Raises ArithmeticError where the modes that must have the same bits do not."""
        same = [name for name in modes if name not in (PLAIN, NOTHING, SPLIT)]
        found = {name: self.step(model, tokens, mode) for name, mode in modes.items()}
        for name in same:
            if not torch.equal(found[name], found[FUSED]):
                raise ArithmeticError(f"{name} and {FUSED} do not agree for {tokens} tokens")


def _sent(interface: str) -> int:
    """Bytes that a network interface has sent."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def main() -> None:
    rank = Rank(json.loads(sys.stdin.readline()))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        answer = rank.job(json.loads(line))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
