"""The simulated contest of benchmarks/phases.py: the real engine and controllers on the virtual device.

Every figure made here is SIMULATED: it compares policies under one cost model, and is no promise for any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from phases_loads import Mix, Scale

from weft.bench.stats import Record
from weft.bench.traffic import Shot
from weft.core.plan import Capacity, Partition, Regime, Sharing
from weft.core.request import Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices.cost import CostModel
from weft.devices.virtual import VirtualDevice
from weft.errors import QueueFull
from weft.loop.engine import Engine
from weft.phases.auto import AutoPolicy
from weft.phases.controller import Asked, Controller, FixedPolicy, Policy
from weft.phases.forecast import TURNS_A_STEP
from weft.phases.forecast import Device as Forecast
from weft.phases.observations import Targets
from weft.phases.paper import PaperPolicy

# A model of 8 billion 16-bit weights on an accelerator of 2 TB/s and some 190 usable TFLOP/s; half of its cores fill
# the memory's bandwidth.
COST = CostModel(fixed=1e-3, per_token=85e-6, per_context=65e-9, weights=8e-3, saturation=0.5, contention=0.2)
# A slot of KV, 131 kB, goes from one device to another at 300 GB/s.
LINK = 0.44e-6
SHARES = 12
CAPACITY = Capacity(
    blocks=4096,
    block_size=64,
    max_tokens=2048,
    max_slices=256,
    shares=SHARES,
    max_model_len=8192,
    vocabulary=512,
    layers=32,
)
# Of one request alone: some 8 times its TTFT, and twice its TPOT. Tighter than the paper's 10 times for TPOT.
TARGETS = Targets(ttft=1.0, tpot=0.025)
CHUNKS = (64, 128, 256, 512, 1024, 2048)
LONE = ("split 6:6", "split 7:5", "split 8:4")
# Seconds that a second of a prompt's own computing time puts it back, for the fixed policies that order the queue.
ORDER = 4.0

LONGEST = (7000, 1000)
AZURE = Scale(1.0, 1.0, LONGEST, 1.0)
MOONCAKE = Scale(1 / 8, 1 / 2, LONGEST, 1.4)  # prompts of 1600 tokens, half of which others have computed before
MIXES = (Mix(4.0, 2000, 40), Mix(8.0, 150, 300), Mix(4.0, 2000, 40))


@dataclass(frozen=True, slots=True)
class Contestant:
    """policy: makes the policy anew for each run. lone: whether a lane alone gets the whole device.
    kind: chunk, split, overlap, pd, paper or auto; fixed ones that go beyond the paper's are `turns`, `lone` and
    `ordered`. devices: two for PD disaggregation, a whole one for each phase, so that twice as many requests are its
    share."""

    name: str
    kind: str
    policy: Callable[[], Policy]
    lone: bool = False
    devices: int = 1


def contestants() -> list[Contestant]:
    whole = Partition(SHARES, SHARES)
    splits = [Partition(unit, SHARES - unit) for unit in range(2, SHARES - 1)]
    ways = {f"chunk {chunk}": Sharing(Regime.MIXED, whole, chunk) for chunk in CHUNKS}
    ways |= {f"split {one.prefill}:{one.decode}": Sharing(Regime.SPLIT, one) for one in splits}
    ways |= {"overlap": Sharing(Regime.SPLIT, whole)}
    found = [Contestant(name, name.split()[0], partial(FixedPolicy, way)) for name, way in ways.items()]
    # A split that lets a lane alone have the whole device, which the paper's caps do not.
    found += [Contestant(f"{name} lone", "lone", partial(FixedPolicy, ways[name]), lone=True) for name in LONE]
    found.append(Contestant("pd 1:1", "pd", partial(FixedPolicy, ways["overlap"]), devices=2))
    turn = CAPACITY.max_tokens // TURNS_A_STEP
    for parts in (Partition(1, 1), Partition(2, 1), Partition(3, 1)):
        way = Sharing(Regime.TURNS, parts, turn)
        found.append(Contestant(f"turns {parts.prefill}:{parts.decode}", "turns", partial(FixedPolicy, way)))
    weight = ORDER * COST.per_token
    for name in ("chunk 128", "chunk 256", "chunk 512", *LONE, "overlap"):
        way = Sharing(ways[name].regime, ways[name].partition, ways[name].chunk, weight)
        found.append(Contestant(f"{name} shortest first", "ordered", partial(FixedPolicy, way), lone=True))
    found.append(Contestant("paper", "paper", partial(PaperPolicy, TARGETS, SHARES)))
    device = Forecast(SHARES, CAPACITY.max_tokens, CAPACITY.max_slices, CAPACITY.layers)
    found.append(Contestant("auto", "auto", partial(AutoPolicy, TARGETS, device), lone=True))
    return found


def serve(
    one: Contestant, shots: Sequence[Shot], caching: bool, record: Callable[[Asked], None] | None = None
) -> tuple[list[Record], int]:
    """One record for each request, and how often the shares changed. In virtual time."""
    capacity, cost = CAPACITY, COST
    if one.devices == 2:  # the same memory on each, and one copy of the weights, as without disaggregation
        capacity = replace(capacity, blocks=2 * capacity.blocks, decode_blocks=capacity.blocks)
        cost = replace(cost, per_copied=LINK)
    device = VirtualDevice(capacity, Partition(SHARES, SHARES), cost=cost)
    given = SchedulerSettings(
        capacity.max_slices, capacity.max_tokens, max_num_queued_reqs=10**6, enable_prefix_caching=caching
    )
    scheduler = Scheduler(capacity, device.lanes(), given, key=b"phases")
    controller = Controller(one.policy(), lone=one.lone, record=record)
    engine = Engine(device, scheduler, device.clock, step_timeout=None, controller=controller)
    times: dict[str, list[float]] = {}
    records: dict[str, Record] = {}
    at = 0
    while at < len(shots) or not engine.idle:
        now = device.clock()
        while at < len(shots) and shots[at].due <= now + 1e-9:
            _submit(engine, str(at), shots[at], records)
            at += 1
        left = max(shots[at].due - now, 0.0) if at < len(shots) else None
        for event in engine.step(left):
            if isinstance(event, TokenOutput) and event.token is not None:
                times.setdefault(event.request, []).append(device.clock())
            elif isinstance(event, RequestEnd):
                shot = shots[int(event.request)]
                seen = times.pop(event.request, [])
                records[event.request] = Record(
                    shot.due, shot.due, seen[0] if seen else None, seen[-1] if seen else None, device.clock(),
                    shot.input_tokens, len(seen), error=event.error,
                )  # fmt: skip
    return [records[str(index)] for index in range(len(shots))], engine.stats().partition_switches


def _submit(engine: Engine, name: str, shot: Shot, records: dict[str, Record]) -> None:
    params = SamplingParams(max_tokens=shot.output_tokens, ignore_eos=True)
    prompt = tuple(token for token in shot.prompt if isinstance(token, int))
    try:
        engine.submit(Request(name, prompt, params))
    except QueueFull as error:
        records[name] = Record(shot.due, shot.due, None, None, shot.due, shot.input_tokens, 0, error=error.message)
