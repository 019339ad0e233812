"""What gpu.py measures, one function for each kind of row: a dictionary of plain numbers, with its physical limit."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import common
import torch
from gpu_bench import Bench, first_line
from gpu_model import (
    BLOCK_SIZE,
    DoesNotFit,
    Model,
    Sizes,
    answer,
    check_room,
    collect,
    fill,
    free,
    hold,
    opened,
    settle,
)
from gpu_results import Row
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from weft.core.plan import Lane, Plan, Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices.base import Device
from weft.devices.cuda_inputs import layout_of, send
from weft.kernels.triton import TritonKernels
from weft.models.batch import make_batch
from weft.models.families import parse_config

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
JOIN = 4  # steps from one newcomer to the next
PROFILED, SHOWN = 3, 40  # steps of a profile; kernels that it names

# -- the model ---------------------------------------------------------------------------------------------------------


class Decoding:
    """Sequences that go on, a token each a step, as an engine drives them: the next plan is made from the last result.

    Each has blocks of its own, in no order. hold: keeps a device at rest busy for a while. newcomer: tokens of a prompt
    with which, every JOIN steps, a sequence begins in the place of another.
    """

    def __init__(
        self, device: Device, blocks: int, batch: int, start: int, hold: Callable[[], None], newcomer: int = 0
    ) -> None:
        order = list(range(blocks))
        random.Random(1).shuffle(order)
        each = blocks // batch
        self._device = device
        self._hold = hold
        self._tables = [tuple(order[i * each : (i + 1) * each]) for i in range(batch)]
        self._names = list(range(batch))
        self._given: list[tuple[int, ...]] = [(1,)] * batch
        self._positions = [start] * batch
        self._newcomer = newcomer
        self._steps = 0

    def step(self) -> float:
        """Seconds on the device, and of the host where the device waits for its launches."""
        if self._newcomer and self._steps % JOIN == 0:
            self._join()
        slices = tuple(
            Slice(name, at, given, table, Sampling(GREEDY, 0, at + len(given)))
            for name, at, given, table in zip(self._names, self._positions, self._given, self._tables, strict=True)
        )
        self._steps += 1
        result = answer(self._device, Plan(self._steps, Lane.MIXED, slices))
        self._positions = [piece.end for piece in slices]
        self._given = [(sampled.token,) for sampled in result.sampled]
        return result.seconds

    def _join(self) -> None:
        seat = self._steps // JOIN % len(self._names)
        self._names[seat] = len(self._names) + self._steps
        self._positions[seat], self._given[seat] = 0, (1,) * self._newcomer

    def steps(self, count: int) -> float:
        """Seconds of so many steps. One before them finds the device at rest: when the clock starts, and when it stops,
        one step is under way that was not asked for yet."""
        self.step()
        began = time.perf_counter()
        for _ in range(count):
            self.step()
        return time.perf_counter() - began

    def alone(self) -> float:
        """Seconds of a step on the device, none of the host's among them. The device is at rest. The first of two steps
        was computed ahead and has its result; the second is launched by then, and begins after the hold."""
        self._hold()
        self.step()
        return self.step()


def decode_row(bench: Bench, name: str, batch: int, context: int, *, peer: bool = True) -> Row:
    """Tokens each second of so many sequences at `context` tokens. Raises DoesNotFit."""
    sizes, model = bench.sizes, bench.model(name)
    needed = batch * _blocks(sizes, context) * BLOCK_SIZE + sizes.reserve // model.token_bytes
    try:
        check_room(bench.gpu, model, needed)
    except DoesNotFit as error:
        raise DoesNotFit(f"{error}; {largest_batch(bench, model, context)} sequences would fit") from error
    rival = _rival(bench, model, batch, context) if peer else ""
    with _decoding(bench, model, batch, context) as (decoding, warm):
        count = _count(sizes, bench.budget, warm)
        ours, theirs, rival = _rounds(bench, decoding, rival, count)
    seconds = [whole / count for whole, _ in ours]
    alone = [each for _, each in ours]
    row = {
        "kind": "decode",
        "model": name,
        "batch": batch,
        "context": context,
        "steps": count,
        "seconds": common.Figure.of(seconds).as_json(),
        "device_seconds": statistics.median(alone),
        "host_gap": statistics.median(one / max(busy, 1e-9) - 1 for one, busy in zip(seconds, alone, strict=True)),
        "tokens_per_second": batch / statistics.median(seconds),
        **bench.limit(
            model.streamed + batch * context * model.token_bytes,
            batch * (model.layer_operations + model.head_operations),
            model.units,
            model.attention_operations(batch * context),
        ),
    }
    return _beside(bench, row, rival, theirs, seconds)


@contextmanager
def _decoding(
    bench: Bench, model: Model, batch: int, context: int, newcomer: int = 0
) -> Iterator[tuple[Decoding, float]]:
    """Sequences on a device that is warm, and the seconds of a step."""
    each, stream = _blocks(bench.sizes, context), bench.gpu.stream()
    sizes = {"batch": batch, "length": each * BLOCK_SIZE, "blocks": batch * each, "tokens": batch + newcomer}
    with opened(bench.gpu, model, **sizes, stream=stream) as device:
        start = context - bench.sizes.room // 2
        decoding = Decoding(device, batch * each, batch, start, lambda: hold(bench.gpu, stream), newcomer)
        warm = [decoding.step() for _ in range(bench.sizes.warmup)]  # the first of them compiles and records
        yield decoding, warm[-1]


def _blocks(sizes: Sizes, context: int) -> int:
    """Of one sequence."""
    return -(-(context + sizes.room // 2) // BLOCK_SIZE)


def joining_row(bench: Bench, name: str, batch: int, context: int) -> Row:
    """Decode in which every JOIN steps a sequence is replaced by one with a prompt, so that steps are seldom what was
    computed ahead, nor all of them from a graph."""
    sizes, model, newcomer = bench.sizes, bench.model(name), context // 4
    with _decoding(bench, model, batch, context, newcomer) as (decoding, warm):
        decoding.steps(JOIN)
        count = -(-_count(sizes, bench.budget, warm) // JOIN) * JOIN
        seconds = []
        for _ in range(max(1, sizes.rounds // 2)):
            settle(bench.gpu)
            seconds.append(decoding.steps(count) / count)
    row = {
        "kind": "joining",
        "model": name,
        "batch": batch,
        "context": context,
        "newcomer": newcomer,
        "seconds": common.Figure.of(seconds).as_json(),
        "tokens_per_second": batch / statistics.median(seconds),
        **bench.limit(
            model.streamed + batch * context * model.token_bytes,
            batch * (model.layer_operations + model.head_operations) + newcomer / JOIN * model.layer_operations,
            model.units,
            model.attention_operations(batch * context),
        ),
    }
    return _share(row)


def profile_row(bench: Bench, name: str, batch: int | None, context: int) -> Row:
    """What the device does in some decode steps, by the profiler, which slows the host: seconds and calls of each
    kernel, and the time between kernels. batch: None for as many as fit."""
    model = bench.model(name)
    batch = _at_most(bench, model, context) if batch is None else batch
    on_gpu = bench.gpu.device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities):
        pass  # of a graph that is recorded before there was any profiler, it sees no kernels
    with _decoding(bench, model, batch, context) as (decoding, _):
        settle(bench.gpu)
        with profile(activities=activities) as seen:
            decoding.steps(PROFILED)
            settle(bench.gpu)
    spans = spans_of(seen, DeviceType.CUDA if on_gpu else DeviceType.CPU)
    # One step before those that count; each is launched ahead, while the host asks for the one before.
    about = {"kind": "profile", "model": name, "batch": batch, "context": context, "steps": PROFILED + 1}
    return about | account(spans)


def spans_of(seen: profile, wanted: DeviceType) -> list[tuple[float, float, str]]:
    """(start, end, name) in seconds of what was done there."""
    return [
        (event.time_range.start / 1e6, event.time_range.end / 1e6, event.name)
        for event in seen.events() or ()
        if event.device_type == wanted
    ]


def account(spans: Iterable[tuple[float, float, str]]) -> Row:
    """Of (start, end, name) in seconds: where the time went, longest first."""
    seconds: dict[str, float] = {}
    calls: Counter[str] = Counter()
    gaps: list[tuple[float, str, str]] = []
    reached, last = None, ""
    for start, end, name in sorted(spans):
        seconds[name] = seconds.get(name, 0.0) + end - start
        calls[name] += 1
        if reached is not None and start > reached:
            gaps.append((start - reached, last, name))
        if reached is None or end > reached:
            reached, last = end, name
    order = sorted(seconds, key=lambda name: -seconds[name])
    return {
        "busy_seconds": sum(seconds.values()),
        "gap_seconds": sum(gap for gap, _, _ in gaps),
        "kernels": [{"name": name, "seconds": seconds[name], "calls": calls[name]} for name in order[:SHOWN]],
        "other_kernels_seconds": sum(seconds[name] for name in order[SHOWN:]),
        "longest_gaps": [
            {"seconds": gap, "after": after, "before": before} for gap, after, before in sorted(gaps, reverse=True)[:10]
        ],
    }


def largest_row(bench: Bench, name: str, context: int) -> Row:
    """Decode of as many sequences as the device holds."""
    model = bench.model(name)
    return decode_row(bench, name, _at_most(bench, model, context), context, peer=False)


def _at_most(bench: Bench, model: Model, context: int) -> int:
    """As many as fit. Raises DoesNotFit."""
    batch = largest_batch(bench, model, context)
    if batch < 1:
        raise DoesNotFit("not one sequence fits")
    return batch


def largest_batch(bench: Bench, model: Model, context: int) -> int:
    collect(bench.gpu)
    each = _blocks(bench.sizes, context) * BLOCK_SIZE * model.token_bytes
    return max(0, min(bench.sizes.largest, (free(bench.gpu) - bench.sizes.reserve) // each))


def prefill_row(bench: Bench, name: str, tokens: int) -> Row:
    """Seconds from a plan with a whole prompt to its first token."""
    model, vocabulary = bench.model(name), bench.model(name).config.vocabulary
    blocks = tuple(range(-(-tokens // BLOCK_SIZE)))
    chance, rival = random.Random(tokens), bench.peer(model)
    ours, busy, theirs = [], [], []
    with opened(bench.gpu, model, batch=1, length=tokens, blocks=len(blocks), tokens=tokens) as device:
        deadline = None
        for step in range(bench.sizes.rounds + 1):
            prompt = [chance.randrange(vocabulary) for _ in range(tokens)]
            piece = Slice(step, 0, tuple(prompt), blocks, Sampling(GREEDY, 0, tokens))
            settle(bench.gpu)
            began = time.perf_counter()
            result = answer(device, Plan(step, Lane.MIXED, (piece,)))
            whole = time.perf_counter() - began
            other, rival = _guarded(bench, rival, lambda peer, prompt=prompt: peer.prefill(prompt))
            if step:  # the first one compiles
                ours.append(whole)
                busy.append(result.seconds)
                theirs += [] if other is None else [other]
            deadline = deadline or time.monotonic() + bench.budget
            if ours and time.monotonic() > deadline:
                break
    row = {
        "kind": "prefill",
        "model": name,
        "tokens": tokens,
        "seconds": common.Figure.of(ours).as_json(),
        "device_seconds": statistics.median(busy),
        "tokens_per_second": tokens / statistics.median(ours),
        **bench.limit(
            model.streamed + tokens * model.token_bytes,
            tokens * model.layer_operations + model.head_operations,
            model.units,
            model.attention_operations(tokens * (tokens + 1) / 2),
        ),
    }
    return _beside(bench, row, rival, theirs, ours)


def attention_row(bench: Bench, cache: str, batch: int, context: int) -> Row:
    """One layer's decode attention by itself, call after call from a graph."""
    gpu, config = bench.gpu, parse_config(bench.sizes.raw)
    kernels = TritonKernels(gpu.device)
    each = -(-context // BLOCK_SIZE)
    token = kernels.attend.token_bytes(config.kv_heads, config.head_dim, torch.bfloat16, cache)
    needed = batch * each * BLOCK_SIZE * token + bench.sizes.reserve // 4
    if needed > free(gpu):
        raise DoesNotFit(f"it takes {needed / 2**30:.1f} GiB, and {free(gpu) / 2**30:.1f} are free")
    kv = kernels.make_kv(batch * each, BLOCK_SIZE, config.kv_heads, config.head_dim, torch.bfloat16, cache)
    fill(kv)
    order = list(range(batch * each))
    random.Random(2).shuffle(order)
    slices = [Slice(i, context - 1, (0,), tuple(order[i * each : (i + 1) * each])) for i in range(batch)]
    on_host = make_batch(slices, BLOCK_SIZE)
    inputs = layout_of(on_host).inputs(send(gpu, on_host, None), BLOCK_SIZE, whole=True).batch
    q = torch.randn(batch, config.heads * config.head_dim, device=gpu.device).bfloat16()
    settle(gpu)

    @torch.inference_mode()
    def calls() -> None:
        for _ in range(bench.sizes.calls):
            kernels.attention(q, kv, inputs, config.heads, config.kv_heads, config.head_dim**-0.5)

    replay = gpu.stream().capture(calls)
    seconds = [whole / bench.sizes.calls for whole in bench.timed(replay, bench.sizes.rounds)]
    moved = batch * context * token
    operations = 4.0 * config.heads * config.head_dim * batch * context
    row = {
        "kind": "attention",
        "cache": cache,
        "batch": batch,
        "context": context,
        "seconds": common.Figure.of(seconds).as_json(),
        **bench.limit(moved, operations, "bf16"),
    }
    if gpu.device.type == "cuda":  # a part of what moves may come from there, where it is not much less
        row["l2_bytes"] = torch.cuda.get_device_properties(gpu.device).L2_cache_size
    return _share(row)


# -- transformers, and what a row is beside ----------------------------------------------------------------------------


def _rival(bench: Bench, model: Model, batch: int, context: int) -> Any:
    """transformers' sequences, or why there are none."""
    peer = bench.peer(model)
    if isinstance(peer, str):
        return peer
    length = context + bench.sizes.room // 2
    needed = (2 * batch * length + 4 * batch * length // model.config.layers) * model.token_bytes  # both caches, copies
    room = free(bench.gpu)
    if needed + bench.sizes.reserve > room:
        return f"no room beside weft's keys and values: {needed / 2**30:.1f} GiB for both, {room / 2**30:.1f} are free"
    found, reason = _guarded(bench, peer, lambda one: one.decoding(batch, context - bench.sizes.room // 2))
    return reason if found is None else found


def _guarded(bench: Bench, peer: Any, work: Callable[[Any], Any]) -> tuple[Any, Any]:
    """(what `work` gives, the peer); or (None, why the peer is out), where it fails: our own row goes on."""
    if isinstance(peer, str):
        return None, peer
    try:
        return work(peer), peer
    except Exception as error:
        reason = first_line(error)
    collect(bench.gpu)
    return None, reason


def _count(sizes: Sizes, budget: float, seconds: float) -> int:
    """Steps of a round: as many as fit in the row's time, and in the room of the sequences."""
    room = (sizes.room - sizes.warmup) // sizes.rounds - 3
    return max(1, min(room, sizes.steps, int(budget / 4 / sizes.rounds / max(seconds, 1e-6))))


def _rounds(
    bench: Bench, decoding: Decoding, rival: Any, count: int
) -> tuple[list[tuple[float, float]], list[float], Any]:
    """Each takes its turn, as often as the row's time allows: (our seconds, those of one step on the device alone),
    theirs a step, and the rival, or why it is out by now."""
    ours, theirs = [], []
    if not isinstance(rival, str):
        _, rival = _guarded(bench, rival, lambda one: one.steps(1))
    deadline = time.monotonic() + bench.budget
    for _ in range(bench.sizes.rounds):
        settle(bench.gpu)
        whole = decoding.steps(count)
        settle(bench.gpu)
        ours.append((whole, decoding.alone()))
        few = max(1, count // 4)
        other, rival = _guarded(bench, rival, lambda one, few=few: one.steps(few) / few)
        theirs += [] if other is None else [other]
        if time.monotonic() > deadline:
            break
    return ours, theirs, rival


def _beside(bench: Bench, row: Row, rival: Any, theirs: Sequence[float], ours: Sequence[float]) -> Row:
    """The row with what its time is of the limit's, and with transformers' time."""
    if theirs:
        row["transformers_seconds"] = common.Figure.of(theirs).as_json()
        row["transformers_difference"] = bench.difference
        row["times_transformers"] = statistics.median(their / our for our, their in zip(ours, theirs, strict=False))
    elif rival:
        row["transformers"] = rival
    return _share(row)


def _share(row: Row) -> Row:
    if "limit_seconds" in row:
        row["of_limit"] = row["limit_seconds"] / max(row["seconds"]["median"], 1e-9)
    return row
