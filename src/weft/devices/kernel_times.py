"""How long the kernels of a model take on this machine, by shape and by share of the device.

What is measured is what a step calls: the linear layers, attention of decode and of prefill, and the norms. Each call
meets weights (or keys and values) that are in no cache, as in a model whose layers come one after another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from weft.core.plan import Lane, Slice
from weft.devices.cuda_inputs import layout_of, send
from weft.devices.cuda_streams import Gpu
from weft.errors import ConfigError
from weft.kernels.base import Kernels
from weft.models.batch import make_batch
from weft.models.families import ModelConfig

BLOCK_SIZE = 16
GROUP = 128  # channels that share a scale
PRECISIONS = ("bf16", "w4a8")
COLD_BYTES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}  # more than the caches of either hold
LEAST_SECONDS = 2e-3  # of one measurement: clocks are coarse
Launch = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One call. operation: gemm [m, k] times [k, n]; attention of m sequences, which compute n tokens each, over k
    positions (those tokens included); norm of m rows of n channels. precision: of weights and activations, or of keys
    and values."""

    operation: str
    name: str
    precision: str
    m: int
    n: int
    k: int


@dataclass(frozen=True, slots=True)
class Timed:
    """share: units of the device, of `shares`. seconds of one call: the median, the least and the greatest."""

    case: Case
    share: int
    shares: int
    seconds: float
    least: float
    greatest: float

    def row(self) -> dict[str, Any]:
        return asdict(self.case) | {
            name: getattr(self, name) for name in ("share", "shares", "seconds", "least", "greatest")
        }


class Machine(Protocol):
    """What runs the calls. kind: cpu or cuda. shares: units of the device."""

    kind: str
    kernels: Kernels
    device: torch.device
    shares: int

    def move(self, share: int) -> None:
        """Compute on so many units from now on."""
        ...

    def place(self, slices: Sequence[Slice]) -> Any:
        """The batch of these slices, where the kernels want it."""
        ...

    def seconds(self, launch: Launch, count: int) -> float:
        """Of one of `count` calls in a row."""
        ...


class CpuMachine:
    kind = "cpu"

    def __init__(self, kernels: Kernels, cores: tuple[int, ...]) -> None:
        self.kernels = kernels
        self.device = torch.device("cpu")
        self.shares = len(cores)
        self._cores = cores

    def move(self, share: int) -> None:
        self.kernels.set_cores(self._cores[:share])

    def place(self, slices: Sequence[Slice]) -> Any:
        return make_batch(slices, BLOCK_SIZE)

    def seconds(self, launch: Launch, count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            launch()
        return (time.perf_counter() - began) / count


class GpuMachine:
    """Shares are units of SMs, where the driver can divide them."""

    kind = "cuda"

    def __init__(self, gpu: Gpu, kernels: Kernels) -> None:
        self.kernels = kernels
        self.device = gpu.device
        self.shares = 1 if gpu.undivided is not None else gpu.shares
        self._gpu = gpu
        self._stream = gpu.lane_stream(Lane.PREFILL, gpu.shares)

    def move(self, share: int) -> None:
        if self.shares > 1:
            self._stream.move(share)

    def place(self, slices: Sequence[Slice]) -> Any:
        batch = make_batch(slices, BLOCK_SIZE)
        return layout_of(batch).inputs(send(self._gpu, batch, None), BLOCK_SIZE, whole=True).batch

    def seconds(self, launch: Launch, count: int) -> float:
        with self._stream.use():
            began = self._stream.mark()
            for _ in range(count):
                launch()
            ended = self._stream.mark()
        ended.wait()
        return ended.seconds_since(began) / count


def cases_of(
    model: ModelConfig,
    precision: str,
    *,
    tokens: Sequence[int],
    sequences: Sequence[int],
    contexts: Sequence[int],
    kv: str = "auto",
) -> list[Case]:
    """The calls of a step of this model. tokens: rows of a step; sequences, contexts: of attention. Of a layer with
    experts gate_up and down are those of one, with so many rows of its own.

    Raises ConfigError for widths that the precision cannot have.
    """
    width, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.heads * model.head_dim, 2 * model.kv_heads * model.head_dim
    layers = {
        "qkv": (queries + keys, width),
        "o": (width, queries),
        "gate_up": (2 * inner, width),
        "down": (width, inner),
        "head": (model.vocabulary, width),
    }
    if model.experts is not None:
        layers["router"] = (model.experts.count, width)
        if shared := model.experts.shared:
            layers |= {"shared_gate_up": (2 * shared, width), "shared_down": (width, shared), "shared_gate": (1, width)}
    for name, (_, k) in layers.items():
        if precision == "w4a8" and k % GROUP:
            raise ConfigError(f"--precision w4a8 needs inputs that are multiples of {GROUP}; {name} has {k}")
    found = [Case("gemm", name, precision, m, n, k) for name, (n, k) in layers.items() for m in tokens]
    found += [Case("norm", "norm", "bf16", m, width, 0) for m in tokens]
    found += [Case("attention", "decode", kv, count, 1, length) for count in sequences for length in contexts]
    found += [Case("attention", "prefill", kv, 1, count, count) for count in tokens if count > 1]
    return found


def measure(
    machine: Machine, model: ModelConfig, cases: Iterable[Case], shares: Sequence[int], rounds: int
) -> Iterator[Timed]:
    """Each case on each share, as they come."""
    with torch.inference_mode():
        for case in cases:
            launch = prepare(machine, model, case)
            launch()  # compiled, and memory is there
            for share in shares:
                machine.move(share)
                once = machine.seconds(launch, 1)
                count = max(1, min(1000, int(LEAST_SECONDS / max(once, 1e-9))))
                taken = [machine.seconds(launch, count) for _ in range(rounds)]
                yield Timed(case, share, machine.shares, statistics.median(taken), min(taken), max(taken))
            machine.move(machine.shares)


def prepare(machine: Machine, model: ModelConfig, case: Case) -> Launch:
    """The call, on random values that are in no cache."""
    make = {"gemm": _gemm, "norm": _norm, "attention": _attention}[case.operation]
    return make(machine, model, case)


def _gemm(machine: Machine, _model: ModelConfig, case: Case) -> Launch:
    size = case.n * case.k * (1 if case.precision == "w4a8" else 4) // 2
    packed = [_weight(machine, case) for _ in range(_copies(machine, size))]
    x = torch.randn(case.m, case.k, device=machine.device).bfloat16()
    return _in_turn(packed, lambda weight: machine.kernels.linear(x, weight))


def _weight(machine: Machine, case: Case) -> Any:
    if case.precision == "bf16":
        return machine.kernels.pack_linear(torch.randn(case.n, case.k).bfloat16())
    values = torch.randint(-8, 8, (case.n, case.k), dtype=torch.int8)
    scales = (torch.rand(case.n, case.k // GROUP) + 0.5).bfloat16().float()
    return machine.kernels.pack_w4ax(values, scales)


def _norm(machine: Machine, model: ModelConfig, case: Case) -> Launch:
    weight = torch.ones(case.n, device=machine.device).bfloat16()
    x, residual = (torch.randn(case.m, case.n, device=machine.device).bfloat16() for _ in range(2))

    def launch() -> None:
        machine.kernels.add_rms_norm(x, residual, weight, model.eps)

    return launch


def _attention(machine: Machine, model: ModelConfig, case: Case) -> Launch:
    each = -(-case.k // BLOCK_SIZE)
    bits = {"int8": 8, "int4": 4}.get(case.precision, 16)
    size = 2 * case.m * each * BLOCK_SIZE * model.kv_heads * model.head_dim * bits // 8
    make = machine.kernels.make_kv
    caches = [
        make(case.m * each, BLOCK_SIZE, model.kv_heads, model.head_dim, torch.bfloat16, case.precision)
        for _ in range(_copies(machine, size))
    ]
    blocks = [tuple(range(i * each, (i + 1) * each)) for i in range(case.m)]
    batch = machine.place([Slice(i, case.k - case.n, (0,) * case.n, table) for i, table in enumerate(blocks)])
    q = torch.randn(case.m * case.n, model.heads * model.head_dim, device=machine.device).bfloat16()
    scale = model.head_dim**-0.5
    return _in_turn(
        caches, lambda kv: machine.kernels.attention(q, kv, batch, model.heads, model.kv_heads, scale, None)
    )


def _copies(machine: Machine, size: int) -> int:
    """So many that each has left the caches when its turn comes again."""
    return max(1, min(64, -(-COLD_BYTES[machine.kind] // max(size, 1))))


def _in_turn(things: Sequence[Any], call: Callable[[Any], object]) -> Launch:
    at = 0

    def launch() -> None:
        nonlocal at
        call(things[at])
        at = (at + 1) % len(things)

    return launch
