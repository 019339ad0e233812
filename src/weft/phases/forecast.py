"""What a way of sharing the device would do to the requests: predicted TTFT, TPOT and misses. Pure functions.

Two parts: the requests that wait now, one after the other at the speed at which prompts would be computed; and those
that are likely to arrive within the horizon, by queueing theory (M/M/1's tail, with the mean of the TTFT model where
there is one, so that burstiness enters through what was observed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weft.core.plan import Partition, Regime, Sharing
from weft.phases.latency import StepModel, TtftModel
from weft.phases.observations import Queue, Targets

# How far around a prediction the truth lies, in logarithms: a target that is just met counts as half missed.
SPREAD = 0.12
# Seconds over which misses are counted.
HORIZON = 10.0
# A request that decodes now has part of its tokens behind it.
UNDER_WAY = 0.5


@dataclass(frozen=True, slots=True)
class Load:
    """What comes in. rate: requests/s. prompts: tokens of recent ones. output: mean tokens of an answer."""

    rate: float
    prompts: tuple[int, ...]
    output: float

    @property
    def prompt(self) -> float:
        return sum(self.prompts) / len(self.prompts) if self.prompts else 0.0


@dataclass(frozen=True, slots=True)
class Outlook:
    """What one way of sharing would do. misses: requests within the horizon; part: of all there are then. score: the
    misses, and a little for what is far from its targets.

    late, slow: parts of the requests that miss the TTFT and the TPOT target. speed: tokens of prompts per second.
    """

    sharing: Sharing
    score: float
    misses: float
    part: float
    late: float
    slow: float
    ttft: float
    tpot: float
    speed: float


@dataclass(frozen=True, slots=True)
class Device:
    """What the forecast knows of the device. shares: units. chunk: most tokens in a step. seats: most sequences."""

    shares: int
    chunk: int
    seats: int


def outlook(
    sharing: Sharing,
    steps: StepModel,
    ttft: TtftModel | None,
    load: Load,
    queue: Queue,
    targets: Targets,
    device: Device,
    now: float,
) -> Outlook:
    """The forecast for one way of sharing."""
    incoming = load.rate * load.prompt
    backlog = float(sum(tokens for _, tokens in queue.waiting))
    batch = float(max(queue.decoding, 1))
    context = queue.context / max(queue.decoding, 1) or load.prompt
    tpot, speed = 0.0, 0.0
    for _ in range(3):  # a slower TPOT makes the batch larger, which makes TPOT slower
        busy, idle, speed = _pace(sharing, steps, batch, batch * context, load.prompt, device)
        # Of the time in which an answer is generated, the part beside prefill.
        life = min(HORIZON, max(load.output * (tpot or busy), 0.2))
        pressed = min(1.0, incoming / speed + backlog / (speed * life))
        # So many tokens fall into either part of the time, which is why this is a harmonic mean.
        tpot = 1.0 / (pressed / busy + (1.0 - pressed) / idle)
        # Who begins to decode: no more than arrive and wait, and no faster than prompts are computed.
        begin = min(load.rate + len(queue.waiting) / life, speed / max(load.prompt, 1.0))
        settled = min(float(device.seats), begin * load.output * tpot)
        batch = max(1.0, 0.5 * (queue.decoding + settled))
    slow = _over(tpot, targets.tpot)
    known, waits = _known(queue, speed, targets.ttft, now)
    late, mean = _arriving(steps, ttft, load, incoming, speed, targets.ttft, device)
    coming = load.rate * HORIZON
    misses = sum(1.0 - (1.0 - one) * (1.0 - slow) for one in known)
    misses += coming * (1.0 - (1.0 - late) * (1.0 - slow)) + UNDER_WAY * queue.decoding * slow
    requests = coming + len(known) + UNDER_WAY * queue.decoding
    all_late = (sum(known) + coming * late) / max(coming + len(known), 1e-9)
    ttft_mean = max(mean, waits)
    slack = min(ttft_mean / targets.ttft, 10.0) + min(tpot / targets.tpot, 10.0)
    part = misses / max(requests, 1e-9)
    return Outlook(sharing, misses + 0.02 * requests * slack, misses, part, all_late, slow, ttft_mean, tpot, speed)


def _pace(
    sharing: Sharing, steps: StepModel, batch: float, slots: float, prompt: float, device: Device
) -> tuple[float, float, float]:
    """(TPOT beside prefill, TPOT without, tokens of prompts per second beside decode)."""
    alone = steps.predict(batch, slots, 1.0)
    chunk = float(min(sharing.chunk or device.chunk, device.chunk))
    if sharing.regime is Regime.MIXED:
        chunk = min(chunk, max(1.0, device.chunk - batch))
        step = steps.predict(batch + chunk, slots + prompt, 1.0)
        return step, alone, chunk / step
    x, y = sharing.partition.prefill / device.shares, sharing.partition.decode / device.shares
    if sharing.regime is Regime.TURNS:
        part = x / (x + y)
        return alone / (1.0 - part), alone, chunk / steps.predict(chunk, prompt, 1.0) * part
    over = max(1.0, x + y)
    return steps.predict(batch, slots, y / over, 1.0), alone, chunk / steps.predict(chunk, prompt, x / over, 1.0)


def _known(queue: Queue, speed: float, target: float, now: float) -> tuple[list[float], float]:
    """(probability to be late of each that waits, mean seconds to their first token)."""
    found, total, ahead = [], 0.0, 0
    for arrived, tokens in queue.waiting:
        ahead += tokens
        seconds = now - arrived + ahead / speed
        total += seconds
        found.append(_over(seconds, target))
    return found, total / len(found) if found else 0.0


def _arriving(
    steps: StepModel,
    ttft: TtftModel | None,
    load: Load,
    incoming: float,
    speed: float,
    target: float,
    device: Device,
) -> tuple[float, float]:
    """(part of those to come that will be late, their mean TTFT)."""
    if not load.prompts or load.rate <= 0:
        return 0.0, 0.0
    used = incoming / speed
    if used >= 0.98:
        return 1.0, math.inf
    service = load.prompt / speed
    mean = service / (1.0 - used)
    if ttft is not None:
        whole = device.chunk / steps.predict(device.chunk, load.prompt, 1.0)
        # However it is shared, what counts is the part of the whole device's speed that prompts get.
        mean = min(max(ttft.predict(min(1.0, speed / whole), incoming / whole), service), 1e6)
    wait = max(mean - service, 1e-6)
    late = sum(_waits_longer(target - tokens / speed, used, wait) for tokens in load.prompts) / len(load.prompts)
    return late, mean


def _waits_longer(seconds: float, used: float, mean: float) -> float:
    """The M/M/1 queue: nobody waits with probability 1 - used; those who do wait an exponential time."""
    return 1.0 if seconds <= 0 else used * math.exp(-used * seconds / mean)


def _over(predicted: float, target: float) -> float:
    """The probability that something predicted so comes out above the target."""
    if predicted <= 0:
        return 0.0
    if math.isinf(predicted):
        return 1.0
    return 0.5 * (1.0 + math.erf(math.log(predicted / target) / (SPREAD * math.sqrt(2.0))))


def candidates(
    steps: StepModel, targets: Targets, queue: Queue, load: Load, device: Device, weight: float = 0.0
) -> Sequence[Sharing]:
    """Every way of sharing worth a forecast: chunks that fill the TPOT target to some part, turns, splits, overlap."""
    whole = Partition(device.shares, device.shares)
    batch, slots = max(queue.decoding, 1), float(queue.context)
    found = [
        Sharing(Regime.MIXED, whole, chunk, weight) for chunk in _chunks(steps, targets, batch, slots, load, device)
    ]
    turn = max(1, device.chunk // 2)
    for prefill in (1, 2, 3, 4, 5, 6, 7):
        found.append(Sharing(Regime.TURNS, Partition(prefill, 8 - prefill), turn, weight))
    if device.shares > 1:
        units = sorted({max(1, min(device.shares - 1, round(device.shares * part / 12))) for part in range(1, 12)})
        found += [Sharing(Regime.SPLIT, Partition(unit, device.shares - unit), None, weight) for unit in units]
        found.append(Sharing(Regime.SPLIT, whole, None, weight))
    return found


def _chunks(steps: StepModel, targets: Targets, batch: float, slots: float, load: Load, device: Device) -> list[int]:
    """Chunks with which a mixed step takes 0.6, 0.8 and 0.95 of the TPOT target, and as much as fits."""
    room = max(1, device.chunk - int(batch))
    found = {room}
    token = steps.predict(1.0, 0.0, 1.0) - steps.predict(0.0, 0.0, 1.0)
    for part in (0.6, 0.8, 0.95):
        left = targets.tpot * part - steps.predict(batch, slots + load.prompt, 1.0)
        if token > 0 and left > 0:
            found.add(max(1, min(room, int(left / token))))
    # Even where decode alone misses its target, prompts must advance.
    found.add(max(1, min(room, 16)))
    return sorted(found)
