"""What a way of sharing the device would do to the requests: predicted TTFT, TPOT and misses. Pure functions.

Two parts: the requests that wait now, one after the other at the speed at which prompts would be computed; and those
that are likely to arrive within the horizon, by queueing theory (an exponential tail, with the TTFT model's mean where
there is one, so that burstiness enters through what was observed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weft.core.plan import Partition, Regime, Sharing, StepLaw
from weft.core.planner import PROMPTS_LEAST
from weft.phases.latency import MARGIN, StepModel, TtftModel
from weft.phases.observations import Queue, Targets

# How far around a prediction the truth lies, in logarithms: a target that is just met counts as half missed. It is so
# much at least, and so many times the error of the step law; of a mean over the steps of an answer, by so much less as
# their errors make up for each other (what they have in common the law follows, see `latency.drift`).
SPREAD, SPREAD_ERRORS = 0.12, 1.5
# The same of an answer whose steps are as long as it has time for: what one takes too long the next makes up for, so
# that only the last one's error counts.
SPREAD_PACED = 0.04
# Seconds over which misses are counted.
HORIZON = 10.0
# Moments within the horizon at which those who arrive are looked at, and sizes of prompts that stand for all.
MOMENTS = (0.02, 0.08, 0.2, 0.5, 0.9)
SIZES = 8
# A turn has the work of such a part of the largest step.
TURNS_A_STEP = 8
# Parts of the TPOT target that answers get in mixed steps.
FILLS = (0.8, 0.95)
# Tokens of prompts in a step where decode alone takes too long.
ADVANCE = 16
# Where prompts take no more than this part of the device's time, and one of them such a part of the TTFT target, steps
# may be as large as the device takes them: answers are held up by few prompts, and a long one need not miss its target
# for the sake of a few tokens.
RARE, LONG = 0.5, 0.25
# Splits that are looked at: all of a device that has no more units, as GPUs do.
SPLITS = 16


@dataclass(frozen=True, slots=True)
class Load:
    """What comes in. rate: requests/s. prompts: tokens of recent ones. output: mean tokens of an answer."""

    rate: float
    prompts: tuple[int, ...]
    output: float

    @property
    def prompt(self) -> float:
        return sum(self.prompts) / len(self.prompts) if self.prompts else 0.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """A few prompts that stand for all: evenly from the shortest to the longest."""
        ordered, count = sorted(self.prompts), len(self.prompts)
        return tuple(ordered[int((i + 0.5) * count / SIZES)] for i in range(SIZES)) if count > SIZES else self.prompts


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
class Limits:
    """What the forecast knows of the device. shares: units. chunk: most tokens in a step. seats: most sequences.
    layers: most parts of a step."""

    shares: int
    chunk: int
    seats: int
    layers: int = 1


def outlook(
    sharing: Sharing,
    steps: StepModel,
    ttft: TtftModel | None,
    load: Load,
    queue: Queue,
    targets: Targets,
    device: Limits,
    now: float,
) -> Outlook:
    """The forecast for one way of sharing."""
    incoming = load.rate * load.prompt
    backlog = float(sum(tokens for _, tokens in queue.waiting))
    batch = float(max(queue.decoding, 1))
    context = queue.context / max(queue.decoding, 1) or load.prompt
    tpot, speed = 0.0, 0.0
    active = 1.0  # the part of the time in which somebody decodes; otherwise prompts have the whole device
    for _ in range(3):  # a slower TPOT makes the batch larger, which makes TPOT slower
        busy, idle, beside, lone = _pace(sharing, steps, batch, batch * context, load.prompt, device)
        speed = active * beside + (1.0 - active) * lone
        # Of the time in which an answer is generated, the part beside prefill.
        life = min(HORIZON, max(load.output * (tpot or busy), 0.2))
        pressed = min(1.0, incoming / speed + backlog / (speed * life))
        tpot = _mean_tpot(busy, idle, pressed, load.output, load.prompt / speed)
        # Who begins to decode: no more than arrive and wait, and no faster than prompts are computed.
        begin = min(load.rate + len(queue.waiting) / life, speed / max(load.prompt, 1.0))
        settled = min(float(device.seats), begin * load.output * tpot)
        # Whoever decodes now will not for long, and who will is not there yet: the more of the two, to be safe.
        active = 1.0 - math.exp(-max(float(queue.decoding), settled))
        batch = max(1.0, 0.5 * (queue.decoding + settled))
    used, error = min(1.0, incoming / speed), SPREAD_ERRORS * steps.error
    spread, output = max(SPREAD, error), max(load.output, 1.0)
    spread_mean = max(SPREAD, error / math.sqrt(output)) if sharing.tpot is None else max(SPREAD_PACED, error / output)
    pace = Pace(busy, idle, used, _harmonic(busy, idle, used), speed, spread_mean)
    known, waits = _known(queue, speed, _together(sharing, steps, device), targets.ttft, spread, now)
    late, mean = _arriving(steps, ttft, load, queue, known, speed, targets.ttft, spread, device)
    coming = load.rate * HORIZON
    drain = min(HORIZON, backlog / max(speed - incoming, 1e-9)) if speed > incoming else HORIZON
    slow_known, slow_answers = _slow_known(queue, load, pace, drain, targets.tpot)
    slow = _slow_arriving(load, pace, targets.tpot)
    misses = sum(1.0 - (1.0 - a) * (1.0 - b) for a, b in zip(known, slow_known, strict=True)) + slow_answers
    misses += coming * (1.0 - (1.0 - late) * (1.0 - slow))
    requests = coming + len(known) + queue.decoding
    all_late = (sum(known) + coming * late) / max(coming + len(known), 1e-9)
    all_slow = (sum(slow_known) + slow_answers + coming * slow) / max(requests, 1e-9)
    ttft_mean = max(mean, waits)
    slack = min(ttft_mean / targets.ttft, 10.0) + min(tpot / targets.tpot, 10.0)
    part = misses / max(requests, 1e-9)
    return Outlook(sharing, misses + 0.02 * requests * slack, misses, part, all_late, all_slow, ttft_mean, tpot, speed)


@dataclass(frozen=True, slots=True)
class Pace:
    """busy, idle: TPOT beside prefill, and without. used: the part of the time in which prompts are computed, in the
    long run. settled: TPOT then. speed: tokens of prompts per second. spread: of the truth around a TPOT."""

    busy: float
    idle: float
    used: float
    settled: float
    speed: float
    spread: float

    def tpot(self, tokens: float, pressed: float) -> float:
        """Of so many tokens; in the first `pressed` seconds, prompts that wait are computed beside them."""
        beside = min(tokens, pressed / self.busy)
        return (beside * self.busy + (tokens - beside) * self.settled) / tokens


def _harmonic(busy: float, idle: float, used: float) -> float:
    """TPOT of a long answer: so many of its tokens fall into either part of the time."""
    return 1.0 / (used / busy + (1.0 - used) / idle)


def _mean_tpot(busy: float, idle: float, used: float, output: float, service: float) -> float:
    """TPOT over all answers. One that is shorter than a time in which prompts are computed sees the one or the other,
    and their mean is larger. service: seconds that a prompt is computed."""
    long = _harmonic(busy, idle, used)
    life, period = output * long, service / max(1.0 - used, 0.05)
    part = life / (life + period) if life + period > 0 else 1.0
    return part * long + (1.0 - part) * (used * busy + (1.0 - used) * idle)


def _slow_known(queue: Queue, load: Load, pace: Pace, drain: float, target: float) -> tuple[list[float], float]:
    """(probability to miss the TPOT target of each that waits, how many of those that decode will).

    Who waits begins to decode while those behind it are computed. Who decodes has saved or lost something so far.
    """
    tokens, ahead, found = max(load.output, 1.0), 0, []
    for _, left in queue.waiting:
        ahead += left
        found.append(_over(pace.tpot(tokens, max(0.0, drain - ahead / pace.speed)), target, pace.spread))
    if not queue.answers:
        return found, 0.0
    ahead_tpot = pace.tpot(tokens, drain)
    means = [(seconds + tokens * ahead_tpot) / (done + tokens) for seconds, done in queue.answers]
    slow = sum(_over(mean, target, pace.spread) for mean in means)
    return found, slow * queue.decoding / len(queue.answers)


def _slow_arriving(load: Load, pace: Pace, target: float) -> float:
    """The part of those to come that misses the TPOT target. A long answer sees the mean of busy and idle times; a
    short one falls into the one or the other."""
    life = load.output * pace.settled
    busy = load.prompt / pace.speed / max(1.0 - pace.used, 0.05)
    mean = life / (life + busy) if life + busy > 0 else 1.0
    settled, beside, alone = (_over(one, target, pace.spread) for one in (pace.settled, pace.busy, pace.idle))
    return mean * settled + (1.0 - mean) * (pace.used * beside + (1.0 - pace.used) * alone)


def _pace(
    sharing: Sharing, steps: StepModel, batch: float, slots: float, prompt: float, device: Limits
) -> tuple[float, float, float, float]:
    """(TPOT beside prefill, TPOT without, tokens of prompts per second beside decode, and without)."""
    alone = steps.predict(batch, slots, 1.0)
    lone = device.chunk / of_prompts(steps, device.chunk, prompt)
    chunk = float(min(sharing.chunk or device.chunk, device.chunk))
    if sharing.regime is Regime.MIXED:
        least, most = max(1.0, chunk * PROMPTS_LEAST), max(1.0, device.chunk - batch)
        if sharing.tpot is not None:
            chunk = tokens_within(steps, sharing.tpot, slots, prompt)
        chunk = min(max(least, chunk - batch), most)
        step = steps.predict(batch + chunk, slots + prompt, **_attended(chunk, prompt))
        return step, alone, chunk / step, lone
    x, y = sharing.partition.prefill / device.shares, sharing.partition.decode / device.shares
    if sharing.regime is Regime.TURNS:
        # A turn has the work of a chunk: of a larger step, where the device can cut it (see Planner).
        part, tokens = x / (x + y), min(device.chunk, chunk * device.layers)
        seconds = of_prompts(steps, tokens, prompt, parts=math.ceil(tokens / chunk))
        return alone / (1.0 - part), alone, tokens / seconds * part, lone
    over = max(1.0, x + y)
    beside = chunk / of_prompts(steps, chunk, prompt, x / over, 1.0)
    return steps.predict(batch, slots, y / over, 1.0), alone, beside, lone


def _together(sharing: Sharing, steps: StepModel, device: Limits) -> int:
    """Tokens of prompts that a step takes at once if there are as many: none of them has its first token before the
    step ends. It ends with a prompt as soon as it is worth its cost."""
    most = math.ceil(min(device.chunk, max(1.0, cost(steps).worthwhile)))
    if sharing.regime is Regime.SPLIT or sharing.chunk is None:
        return most
    return min(most, sharing.chunk * (device.layers if sharing.regime is Regime.TURNS else 1))


def _known(
    queue: Queue, speed: float, together: int, target: float, spread: float, now: float
) -> tuple[list[float], float]:
    """(probability to be late of each that waits, mean seconds to their first token)."""
    found, total, ahead = [], 0.0, 0.0
    backlog = sum(tokens for _, tokens in queue.waiting)
    for arrived, tokens in queue.waiting:
        seconds = now - arrived + min(backlog, math.ceil((ahead + tokens) / together) * together) / speed
        total += seconds
        found.append(_over(seconds, target, spread))
        ahead += tokens * (1.0 - found[-1])  # those who are too late let others pass
    return found, total / len(found) if found else 0.0


def _arriving(
    steps: StepModel,
    ttft: TtftModel | None,
    load: Load,
    queue: Queue,
    known: Sequence[float],
    speed: float,
    target: float,
    spread: float,
    device: Limits,
) -> tuple[float, float]:
    """(part of those to come that will be late, their mean TTFT).

    They find what is left of those that wait now and can make it, which others go before only if they cannot; and
    what else has arrived by then: that is queueing theory's part.
    """
    if not load.prompts or load.rate <= 0:
        return 0.0, 0.0
    incoming = load.rate * load.prompt
    used, service = incoming / speed, load.prompt / speed
    # Pollaczek and Khinchine's mean wait, with the spread of the prompts that were seen.
    burst = 0.5 * service * sum(tokens * tokens for tokens in load.prompts) / len(load.prompts) / load.prompt**2
    mean = math.inf
    if used * (1.0 + MARGIN) < 1.0:
        mean = service + burst * used / (1.0 - used)
        if ttft is not None:
            whole = device.chunk / of_prompts(steps, device.chunk, load.prompt)
            # However it is shared, what counts is the part of the whole device's speed that prompts get.
            mean = min(max(ttft.predict(min(1.0, speed / whole), incoming / whole), service), 1e6)
            burst = max(mean - service, 1e-6) * (1.0 - used) / used
    backlog = sum(tokens * (1.0 - late) for (_, tokens), late in zip(queue.waiting, known, strict=True))
    late = 0.0
    for moment in MOMENTS:
        left = max(0.0, backlog - (speed - incoming) * moment * HORIZON) / speed
        for tokens in load.sizes:
            alone = left + tokens / speed
            late += max(_over(alone, target, spread), _waits_longer(target - alone, used, burst))
    return late / (len(MOMENTS) * len(load.sizes)), mean


def _waits_longer(seconds: float, used: float, burst: float) -> float:
    """The part of those who come that would wait longer, and so let others pass: the M/M/1 queue whose customers do not
    join when their wait would be longer than `seconds`. burst: seconds of work that arrive at once, so to speak; used:
    the work that arrives, also more than can be done."""
    if seconds <= 0:
        return 1.0
    free = 1.0 - used
    if abs(free) < 1e-6:
        return used / (1.0 + used * seconds / burst + used)
    tail = math.exp(min(-free * seconds / burst, 500.0))
    return used * tail / (1.0 + used * (1.0 - tail) / free + used * tail)


def _over(predicted: float, target: float, spread: float) -> float:
    """The probability that something predicted so comes out above the target."""
    if predicted <= 0:
        return 0.0
    if math.isinf(predicted):
        return 1.0
    return 0.5 * (1.0 + math.erf(math.log(predicted / target) / (spread * math.sqrt(2.0))))


def candidates(
    steps: StepModel, targets: Targets, queue: Queue, load: Load, device: Limits, weight: float = 0.0
) -> Sequence[Sharing]:
    """Every way of sharing worth a forecast: mixed steps with some part of the TPOT target for each token, turns,
    splits. Not overlap, of which the law says what it says of an even split."""
    whole = Partition(device.shares, device.shares)
    batch, slots = max(queue.decoding, 1), float(queue.context)
    found = []
    for part in FILLS:
        chunk = int(min(tokens_within(steps, part * targets.tpot, slots, load.prompt), device.chunk))
        if chunk > 0:
            found.append(Sharing(Regime.MIXED, whole, chunk, weight, part * targets.tpot))
    # Even where decode alone misses its target, prompts must advance.
    least = min(device.chunk, batch + ADVANCE)
    found.append(Sharing(Regime.MIXED, whole, least, weight))
    # While prompts have a turn, a short answer must not lose the target of all its tokens.
    turn = device.chunk // (TURNS_A_STEP if device.layers > 1 else 2)
    turn = max(1, min(turn, max(one.chunk or 0 for one in found) - batch))
    token = of_prompts(steps, device.chunk, load.prompt) / device.chunk
    if load.rate * load.prompt * token < RARE and max(load.prompts, default=0) * token > LONG * targets.ttft:
        found.append(Sharing(Regime.MIXED, whole, device.chunk, weight))
    for prefill in (1, 2, 3, 4, 5, 6, 7):
        found.append(Sharing(Regime.TURNS, Partition(prefill, 8 - prefill), turn, weight))
    if device.shares > 1:
        parts = (round(device.shares * part / SPLITS) for part in range(1, SPLITS))
        units = sorted({max(1, min(device.shares - 1, one)) for one in parts})
        found += [Sharing(Regime.SPLIT, Partition(unit, device.shares - unit), None, weight) for unit in units]
    return found


def cost(steps: StepModel) -> StepLaw:
    """The same for the planner: of a step that has the whole device to itself."""
    slot = steps.predict(0.0, 1.0) - steps.predict(0.0, 0.0)
    return StepLaw(steps.predict(0.0, 0.0), steps.token, slot, steps.read, steps.pair)


def of_prompts(
    steps: StepModel, tokens: float, prompt: float, share: float = 1.0, rival: float = 0.0, parts: float = 1.0
) -> float:
    """Seconds of a step of so many tokens of prompts that are `prompt` tokens long."""
    return steps.predict(tokens, prompt, share, rival, parts, **_attended(tokens, prompt))


def _attended(tokens: float, prompt: float) -> dict[str, float]:
    """What so many tokens of prompts of such a length read and attend to, on average over the parts of a prompt."""
    return {"read": max(tokens, 0.5 * (tokens + prompt)), "pairs": 0.5 * tokens * prompt}


def tokens_within(steps: StepModel, seconds: float, context: float, prompt: float) -> float:
    """Tokens of prompts of such a length in a step on the whole device that takes so long, beside decode that reads
    `context` slots; infinite where they cost nothing."""
    each = steps.token + 0.5 * steps.read + 0.5 * steps.pair * prompt
    left = seconds - steps.predict(0.0, context + prompt, read=0.5 * prompt)
    return max(0.0, left / each) if each > 0 else math.inf
