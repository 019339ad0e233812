"""The simulated contest of benchmarks/phases.py: the real engine and controllers on devices in virtual time.

Every figure made here is SIMULATED: it compares policies under one cost model, and is no promise for any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from phases_loads import Mix, Scale

from weft.bench.stats import Record, Slo
from weft.bench.traces import Row
from weft.config import EngineConfig
from weft.core.plan import Capacity
from weft.devices.cost import CostModel
from weft.sim.replica import Setup
from weft.sim.run import Transfer
from weft.sim.study import Fleet, study
from weft.sim.traffic import VOCABULARY


@dataclass(frozen=True, slots=True)
class Device:
    """A device that exists on paper only, and what is asked of it. slots: of KV. chunks, splits, turns: of the policies
    that stay the same; splits in shares of the prefill lane. link: bytes of a slot, and bytes/s from one such device to
    another."""

    cost: CostModel
    slots: int
    layers: int
    shares: int
    seats: int
    tokens: int
    longest: tuple[int, int]
    targets: Slo
    azure: Scale
    mooncake: Scale
    mixes: tuple[Mix, ...]
    chunks: tuple[int, ...]
    splits: tuple[int, ...]
    turns: tuple[tuple[int, int], ...]
    link: tuple[float, float]


_LONG = (7000, 1000)
_SHORT = (200, 32)
DEVICES = {
    # A model of 8 billion 16-bit weights on an accelerator of 2 TB/s and some 190 usable TFLOP/s; half of its cores
    # fill the memory's bandwidth. The TTFT target is some 8 times, the TPOT target twice, what one request alone takes.
    "accelerator": Device(
        cost=CostModel(fixed=1e-3, per_token=85e-6, per_context=65e-9, weights=8e-3, saturation=0.5, contention=0.2),
        slots=2**18,
        layers=32,
        shares=12,
        seats=128,
        tokens=2048,
        longest=_LONG,
        targets=Slo(1.0, 0.025),
        azure=Scale(1.0, 1.0, _LONG),
        mooncake=Scale(1 / 8, 1 / 2, _LONG, 1.4),  # prompts of 1600 tokens, half of which others have computed before
        mixes=(Mix(4.0, 2000, 40), Mix(8.0, 150, 300), Mix(4.0, 2000, 40)),
        chunks=(128, 256, 512, 1024, 2048),
        splits=tuple(range(1, 12)),
        turns=((1, 1), (3, 1)),
        link=(131072, 300e9),
    ),
    # About what a Llama of 1.1 billion 4-bit weights takes on two cores; targets as on the CPU, 7.5 and 10 times.
    "two cores": Device(
        cost=CostModel(fixed=0.5e-3, per_token=2.6e-3, per_context=3e-6, weights=6e-3, contention=0.1),
        slots=32 * sum(_SHORT),
        layers=22,
        shares=2,
        seats=32,
        tokens=512,
        longest=_SHORT,
        targets=Slo(1.5, 0.1),
        azure=Scale(1 / 16, 1 / 16, _SHORT, 0.85),
        mooncake=Scale(1 / 100, 1 / 32, _SHORT, 1.4),
        mixes=(Mix(2.0, 150, 4), Mix(5.0, 15, 32), Mix(2.0, 150, 4)),
        chunks=(32, 64, 128, 512),
        splits=(1,),
        turns=((1, 1),),
        link=(10000, 1e9),
    ),
}


@dataclass(frozen=True, slots=True)
class Contestant:
    """kind: chunk, split, overlap, turns, pd, paper or auto. devices: two for PD disaggregation, a whole one for each
    phase, so that twice as many requests are its share."""

    name: str
    kind: str
    fleet: Fleet

    @property
    def devices(self) -> int:
        return self.fleet.count


def contestants(device: Device) -> list[Contestant]:
    """Every policy as the flags of weft serve."""
    most = sum(device.longest)
    capacity = Capacity(
        blocks=device.slots // 16,
        block_size=16,
        max_tokens=device.tokens,
        max_slices=device.seats,
        shares=device.shares,
        max_model_len=most,
        vocabulary=VOCABULARY,
        layers=device.layers,
    )

    def made(name: str, partition: str, tokens: int = device.tokens, **more: Any) -> Contestant:
        config = EngineConfig(
            partition=partition,
            max_model_len=most,
            max_num_seqs=device.seats,
            max_num_batched_tokens=tokens,
            max_num_queued_reqs=10**6,
            **more,
        )
        config.validate()
        setup = Setup(config, replace(capacity, max_tokens=tokens), device.cost)
        return Contestant(name, name.split()[0], Fleet(setup))

    targets = {"slo_ttft": device.targets.ttft, "slo_tpot": device.targets.tpot}
    found = [made(f"chunk {chunk}", "off", chunk) for chunk in device.chunks]
    splits = [f"{units}:{device.shares - units}" for units in device.splits]
    found += [made(f"split {split}", split) for split in splits]
    found += [made("overlap", "100%:100%")]
    found += [made(f"turns {prefill}:{decode}", f"turns:{prefill}:{decode}") for prefill, decode in device.turns]
    apart = made("pd 1:1", "off")
    fleet = Fleet(apart.fleet.setup, count=2, prefill=1, transfer=Transfer(*device.link))
    found += [replace(apart, fleet=fleet)]
    found += [made(name, name, **targets) for name in ("paper", "auto")]
    return found


def serve(one: Contestant, rows: Sequence[Row], targets: Slo, caching: bool) -> tuple[list[Record], int]:
    """One record for each request, in the order in which they ended, and how often the shares changed."""
    setup = one.fleet.setup
    setup = replace(setup, config=replace(setup.config, enable_prefix_caching=caching))
    records: list[Record] = []
    outcome = study(replace(one.fleet, setup=setup), rows, targets, on_end=records.append)
    return records, outcome.switches
