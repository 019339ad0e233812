"""What all rows of gpu.py need: the models, one in memory at a time, transformers, and the device's own limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import common
import torch
from gpu_model import Model, Sizes, collect, plain_model, quantised_model, quantised_weights, settle
from gpu_peer import Peer
from gpu_results import Row

from weft.devices.cuda_streams import Gpu
from weft.kernels.triton import TritonKernels
from weft.models.loader import Weights

INVARIANT = "BF16 batch-invariant"


@dataclass
class Bench:
    """limits: bytes or operations a second, by name, as far as they were measured. budget: seconds that a row may take
    once it is warm. One model at a time is in memory; `peer` is for BF16, or the reason why there is none ("" for the
    other forms, which it has not); difference: of the last peer (gpu_peer.py)."""

    gpu: Gpu
    sizes: Sizes
    budget: float
    limits: dict[str, float] = field(default_factory=dict)
    difference: float | None = None
    _models: dict[str, Model] = field(default_factory=dict)
    _quantised: Weights | None = None
    _peer: Peer | str | None = None

    def model(self, name: str) -> Model:
        if name in self._models:
            return self._models[name]
        raw = self.sizes.raw
        if name == "BF16":
            self._models, self._quantised = {}, None
            collect(self.gpu)
            self._models = {name: plain_model(self.gpu, raw)}
        elif name == INVARIANT:
            kernels = TritonKernels(self.gpu.device, invariant=True)
            self._models[name] = replace(self.model("BF16"), name=name, kernels=kernels)
        else:
            self._models = {name: model for name, model in self._models.items() if model.weights is self._quantised}
            self._peer = self._peer if isinstance(self._peer, str) else None
            collect(self.gpu)
            if self._quantised is None:
                self._quantised = quantised_weights(self.gpu, raw)
            self._models[name] = quantised_model(self.gpu, raw, self._quantised, sixteen=name == "W4A16")
        return self._models[name]

    def peer(self, model: Model) -> Peer | str:
        if model.name != "BF16":
            return ""
        if self._peer is None:
            try:
                self._peer = Peer(self.gpu, model, self.sizes.raw)
                self.difference = self._peer.difference
            except Exception as error:  # whatever is wrong with it, weft's own rows are to be had
                self._peer = first_line(error)
        return self._peer

    def limit(self, moved: float, operations: float, units: str, others: float = 0.0) -> Row:
        """The least seconds for so many bytes and operations on these units; others: operations on BF16 units."""
        if not {"copy", "bf16", units} <= self.limits.keys():
            return {"limit": "not measured"}
        memory = moved / self.limits["copy"]
        arithmetic = operations / self.limits[units] + others / self.limits["bf16"]
        return {
            "bytes": moved,
            "operations": operations + others,
            "limit": "bandwidth" if memory >= arithmetic else "arithmetic",
            "limit_seconds": max(memory, arithmetic),
        }

    def timed(self, work: Callable[[], Any], count: int) -> list[float]:
        """Seconds of each of `count` runs on the device, after one that does not count."""
        stream, found = self.gpu.stream(), []
        with stream.use(), torch.inference_mode():
            work()
            for _ in range(count):
                began = stream.mark()
                work()
                found.append((began, stream.mark()))
        stream.check()
        return [done.seconds_since(began) for began, done in found]


# -- the device's own limits -------------------------------------------------------------------------------------------


def copy_row(bench: Bench) -> Row:
    """Bytes read and written each second by a copy within the device."""
    source = torch.randint(0, 255, (bench.sizes.copied,), dtype=torch.uint8, device=bench.gpu.device)
    target = torch.empty_like(source)
    settle(bench.gpu)
    rates = [
        2 * len(source) / max(seconds, 1e-9) for seconds in bench.timed(lambda: target.copy_(source), bench.sizes.calls)
    ]
    return {"rate": max(rates), "spread": common.Figure.of(rates).as_json()}


def product_row(bench: Bench, units: str) -> Row:
    """Operations each second of a large square product."""
    size, device = bench.sizes.matmul, bench.gpu.device
    if units == "bf16":
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        work = partial(torch.matmul, a, b.T)
    else:
        a, b = (torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
        work = partial(torch._int_mm, a, b.T)
    settle(bench.gpu)
    rates = [2.0 * size**3 / max(seconds, 1e-9) for seconds in bench.timed(work, 2 * bench.sizes.calls)]
    return {"rate": max(rates), "spread": common.Figure.of(rates).as_json()}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
