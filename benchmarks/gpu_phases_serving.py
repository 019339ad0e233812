"""The last part of gpu_phases.py: an 8B shape of random weights under a Poisson load, by ways to share one GPU.

One device with two lanes serves all contestants in turn, with a scheduler of their own for each run; `auto` keeps what
it has learned. The loop is the engine's without its messages, for which a bare image lacks the package.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gpu_model
import torch

from weft.core.plan import Capacity, Lane, Partition, Plan, Regime, Result, Sampling, Sharing, Slice
from weft.core.request import Event, Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices.base import Description, Device
from weft.devices.cuda import CudaDevice
from weft.devices.cuda_forward import CudaForward
from weft.devices.cuda_lane import CudaLane
from weft.devices.cuda_streams import Gpu
from weft.loop.control import Control
from weft.models.decoder import Decoder
from weft.phases.auto import AutoPolicy
from weft.phases.controller import Controller, FixedPolicy
from weft.phases.forecast import Limits
from weft.phases.observations import Targets

LANES = (Lane.PREFILL, Lane.DECODE)
TTFT_TIMES, TPOT_TIMES = 8.0, 2.0  # of one request alone
POLL = 0.05  # seconds that the loop waits for a result at most
DRAIN = 60.0  # seconds that what was launched may take to end


@dataclass(frozen=True, slots=True)
class Traffic:
    """inputs, outputs: mean tokens, exponentially spread, at least a sixteenth and at most four times as many. rates:
    requests a second, by what the device computes of prompts alone. seconds: in which requests of a run arrive; warmup,
    learning: of the first one of each contestant, and of auto, which does not count."""

    inputs: int = 1024
    outputs: int = 128
    rates: tuple[float, ...] = (0.5, 0.75)
    seconds: float = 8.0
    warmup: float = 3.0
    learning: float = 20.0
    chunks: tuple[int, ...] = (256, 512, 1024, 2048)
    most_tokens: int = 4096
    seats: int = 128


TINY = Traffic(6, 3, (0.5,), 0.5, 0.1, 0.5, (4, 8), 16, 4)


@dataclass(frozen=True, slots=True)
class Shot:
    due: float
    request: Request


@dataclass(slots=True)
class Seen:
    """Of one request, in seconds from its due time: its first token and its last, and how many there were."""

    due: float
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    ended: bool = False

    def meets(self, targets: Targets) -> bool:
        if self.first is None or not self.ended or self.first > targets.ttft:
            return False
        return self.tokens < 2 or (self.last - self.first) / (self.tokens - 1) <= targets.tpot


def measure(gpu: Gpu, raw: dict[str, Any], traffic: Traffic, deadline: float) -> Iterator[dict[str, Any]]:
    """A row for the targets, and for each contestant at each rate."""
    with opened(gpu, gpu_model.plain_model(gpu, raw), traffic) as device:
        targets, capacity = alone(device, traffic)
        yield {
            "part": "serving", "what": "one request alone", "ttft": targets.ttft / TTFT_TIMES,
            "tpot": targets.tpot / TPOT_TIMES, "prompt_tokens_per_second": capacity,
        }  # fmt: skip
        yield recording(gpu, device)
        made = contestants(device.capacity(), targets, traffic)
        for rate in traffic.rates:
            for name, controller in made.items():
                shots = load(traffic, rate * capacity / traffic.inputs, device.capacity(), seed=1)
                before = 0.0
                if rate == traffic.rates[0]:  # graphs are recorded on each share, and auto learns
                    before = traffic.learning if name == "auto" else traffic.warmup
                if time.monotonic() + before + latest(shots, targets) > deadline:
                    yield {"part": "serving", "what": f"no time left for {name}", "rate": rate}
                    return
                if before:
                    warm = load(traffic, rate * capacity / traffic.inputs, device.capacity(), 2, before)
                    serve(device, controller, warm, before)
                yield {
                    "part": "serving",
                    "what": name,
                    "rate": rate,
                    **outcome(device, controller, shots, traffic, targets),
                }


def recording(gpu: Gpu, device: Device) -> dict[str, Any]:
    """What a decode graph takes, in time and in memory, that is recorded anew for a share; or why that is not known."""
    units = device.capacity().shares
    row: dict[str, Any] = {"part": "parts", "what": "decode graph on a new share", "share": max(1, units // 2)}
    device.set_partition(Partition(units, units))
    step(device, 1, 1)  # recorded for the share that the lane has
    device.set_partition(Partition(units, row["share"]))
    step(device, 2, 2)  # moves there, without a graph
    free, _ = gpu.memory()
    result = step(device, 3, 1)
    if result.error is not None:
        return {**row, "error": result.error}
    if not result.moved:
        return {**row, "error": "nothing was recorded anew"}
    return {**row, "seconds": result.moved, "bytes": free - gpu.memory()[0]}


def step(device: Device, number: int, tokens: int) -> Result:
    """Of so many tokens of one sequence, in the decode lane."""
    sampling = Sampling(SamplingParams(temperature=0.0), 0, tokens)
    device.submit(Plan(number, Lane.DECODE, (Slice(0, 0, (1,) * tokens, (0,), sampling),)))
    results = device.poll(gpu_model.PATIENCE)
    if not results:
        raise gpu_model.Stuck(f"a step did not end within {gpu_model.PATIENCE:g} s")
    return results[0]


def outcome(
    device: Device, controller: Controller, shots: Sequence[Shot], traffic: Traffic, targets: Targets
) -> dict[str, Any]:
    """Of a run: who came within its seconds, and who of them was served within both targets, then or later."""
    seen = serve(device, controller, shots, latest(shots, targets))
    met = sum(one.meets(targets) for one in seen)
    return {"requests": len(seen), "met": met, "goodput": met / traffic.seconds}


def claims(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """auto against the best chunk, each at the rate that suits it best."""
    best: dict[str, float] = {}
    for row in rows:
        if "goodput" in row:
            kind = row["what"].split()[0]
            best[kind] = max(best.get(kind, 0.0), row["goodput"])
    if not best.get("chunk") or "auto" not in best:
        return {}
    return {"h200_goodput_vs_best_chunk": best["auto"] / best["chunk"]}


def contestants(capacity: Capacity, targets: Targets, traffic: Traffic) -> dict[str, Controller]:
    whole, units = Partition(capacity.shares, capacity.shares), capacity.shares
    found = {f"chunk {chunk}": Controller(FixedPolicy(Sharing(Regime.MIXED, whole, chunk))) for chunk in traffic.chunks}
    for prefill in sorted({max(1, round(units * part)) for part in (0.35, 0.5, 0.65, 0.8)} - {units}):
        split = Sharing(Regime.SPLIT, Partition(prefill, units - prefill))
        found[f"split {prefill}:{units - prefill}"] = Controller(FixedPolicy(split), lone=True)
    found["overlap"] = Controller(FixedPolicy(Sharing(Regime.SPLIT, whole)))
    policy = AutoPolicy(targets, Limits(units, capacity.max_tokens, capacity.max_slices, capacity.layers))
    found["auto"] = Controller(policy, lone=True)
    return found


def load(traffic: Traffic, rate: float, capacity: Capacity, seed: int, seconds: float | None = None) -> list[Shot]:
    """Poisson arrivals, so many a second."""
    chance, at, shots = random.Random(seed), 0.0, list[Shot]()

    def length(mean: int) -> int:
        return max(1, mean // 16, min(4 * mean, round(chance.expovariate(1.0 / mean))))

    while (at := at + chance.expovariate(rate)) < (seconds or traffic.seconds):
        prompt = tuple(chance.randrange(capacity.vocabulary) for _ in range(length(traffic.inputs)))
        params = SamplingParams(max_tokens=length(traffic.outputs), temperature=0.0, ignore_eos=True)
        shots.append(Shot(at, Request(f"{seed}-{len(shots)}", prompt, params)))
    return shots


def latest(shots: Sequence[Shot], targets: Targets) -> float:
    """When the last of them has to end to be within both targets, so that a run has no need to wait any longer."""
    return max(
        (shot.due + targets.ttft + (shot.request.params.max_tokens - 1) * targets.tpot for shot in shots), default=0.0
    )


def alone(device: Device, traffic: Traffic) -> tuple[Targets, float]:
    """(targets, prompt tokens a second), from requests of mean length, one after another; the first ones compile."""
    capacity, whole = device.capacity(), Partition(device.capacity().shares, device.capacity().shares)
    firsts, paces = [], []
    for number in range(4):
        prompt = tuple(random.Random(number).randrange(capacity.vocabulary) for _ in range(traffic.inputs))
        params = SamplingParams(max_tokens=max(2, traffic.outputs // 4), temperature=0.0, ignore_eos=True)
        controller = Controller(FixedPolicy(Sharing(Regime.MIXED, whole, capacity.max_tokens)))
        (seen,) = serve(device, controller, [Shot(0.0, Request("alone", prompt, params))], DRAIN)
        if seen.first is None or seen.tokens < 2:
            raise gpu_model.Stuck(f"one request alone did not end within {DRAIN:g} s")
        firsts.append(seen.first)
        paces.append((seen.last - seen.first) / (seen.tokens - 1))
    ttft, tpot = min(firsts), min(paces)
    return Targets(TTFT_TIMES * ttft, TPOT_TIMES * tpot), traffic.inputs / ttft


def serve(device: Device, controller: Controller, shots: Sequence[Shot], seconds: float) -> list[Seen]:
    """What became of each request: until all have ended, or so many seconds have passed. Those that have not ended by
    then are given up."""
    capacity = device.capacity()
    settings = SchedulerSettings(capacity.max_slices, capacity.max_tokens, enable_prefix_caching=False)
    scheduler = Scheduler(capacity, device.lanes(), settings)
    began = time.monotonic()
    control = Control(controller, device, scheduler, began)
    seen = {shot.request.id: Seen(shot.due) for shot in shots}
    flying: dict[Lane, Any] = {}

    def note(events: Sequence[Event], now: float) -> None:
        control.noted(list(events), now)
        for event in events:
            one = seen[event.request]
            if isinstance(event, TokenOutput) and event.token is not None:
                one.last = now - began - one.due
                one.first = one.last if one.first is None else one.first
                one.tokens += 1
            elif isinstance(event, RequestEnd):
                one.ended = event.error is None and event.reason.value in ("stop", "length")

    def launch() -> None:
        for lane in scheduler.order():
            now = time.monotonic()
            plan = None if lane in flying else scheduler.schedule(lane, now)
            if plan is not None:
                flying[lane] = plan
                control.launched(plan, now)
                device.submit(plan)

    def land(timeout: float) -> None:
        for result in device.poll(timeout):
            now = time.monotonic()
            note(scheduler.complete(result, now), now)
            control.landed(flying.pop(result.ticket.lane), result, now)

    waiting = list(reversed(shots))
    while (now := time.monotonic()) - began < seconds:
        while waiting and waiting[-1].due <= now - began:
            request = waiting.pop().request
            scheduler.submit(request, now, control.admit(request, now))
            control.arrived(request, now)
        if not waiting and not scheduler.live:
            break
        launch()
        land(min(POLL, max(0.0, waiting[-1].due - (now - began))) if waiting else POLL)
        control.consider(time.monotonic())
    for shot in shots:
        scheduler.abort(shot.request.id, time.monotonic())
    end = time.monotonic() + DRAIN
    while flying:
        if time.monotonic() > end:
            raise gpu_model.Stuck(f"a step did not end within {DRAIN:g} s")
        land(POLL)
    return list(seen.values())


@contextmanager
def opened(gpu: Gpu, model: gpu_model.Model, traffic: Traffic) -> Iterator[CudaDevice]:
    """The model on a device of two lanes."""
    length = 4 * (traffic.inputs + traffic.outputs)
    blocks = -(-length // gpu_model.BLOCK_SIZE)
    pool = max(2 * blocks, traffic.seats * blocks // 2)
    gpu_model.check_room(gpu, model, pool * gpu_model.BLOCK_SIZE)
    decoder = Decoder(model.config, model.weights, model.kernels, length)
    kv = decoder.make_kv(pool, gpu_model.BLOCK_SIZE, model.cache)
    gpu_model.settle(gpu)
    capacity = Capacity(
        pool, gpu_model.BLOCK_SIZE, traffic.most_tokens, traffic.seats, gpu.shares, length, model.config.vocabulary,
        ahead=1,
    )  # fmt: skip
    lanes = {}
    for lane in LANES:
        stream = gpu.lane_stream(lane, gpu.shares)
        forward = CudaForward(
            gpu, stream, decoder, kv, gpu_model.BLOCK_SIZE, max_slices=traffic.seats, graphs=gpu.captures
        )
        lanes[lane] = CudaLane(gpu, stream, decoder, forward, gpu_model.BLOCK_SIZE)
    words = Description(gpu.name, str(torch.bfloat16), model.kernels.name)
    whole = Partition(gpu.shares, gpu.shares)
    device = CudaDevice(capacity, gpu, lanes, description=words, memory=(), partition=whole)
    try:
        yield device
    except gpu_model.Stuck:
        raise  # its threads wait for ever, and `close` would wait for them
    except BaseException:
        device.close()
        raise
    device.close()
