"""Steps for devices of ranks, and their results."""

from __future__ import annotations

from weft.core.plan import Lane, Plan, Result, Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices.base import Device

GREEDY = SamplingParams(temperature=0.0)


def plan(step: int, first: int, lane: Lane = Lane.MIXED) -> Plan:
    """Of one prompt, which begins with this token."""
    tokens = (first, 8, 9)
    return Plan(step, lane, (Slice(step, 0, tokens, (step,), Sampling(GREEDY, seed=0, position=3)),))


def collect(device: Device, count: int) -> list[Result]:
    results: list[Result] = []
    while len(results) < count:
        results += device.poll(20.0)
    return results
