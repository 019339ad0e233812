"""64 clients for ten minutes, a third of which hang up on their requests: does the server stay right, and the same?

    python benchmarks/soak.py [--quick] [--device cpu|simulated|both] [--minutes 10] [--json FILE]

Random lengths; whole and cut connections in the manners of clients.py. Against a server of its own, on

* cpu: the built-in model. Half of the requests come from a list whose answers were taken one by one beforehand.
* simulated: the simulated device, with a pool of a tenth of the blocks that the clients' requests need at one time,
  so that sequences are preempted all the time. Every answer is compared with the device's oracle.

Claims, for each device: `errors` that no client caused; `mismatches` of texts; `baseline_s`, from the last client's end
to a pool in which no block is held; `rss_growth_percent`, the greatest of any process, from the second fifth of the run
to the last; for simulated also `preemptions`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
from clients import Ask, Manner, Tally, client, whole
from serving import Server

import models
from weft.devices.simulated import continuation
from weft.text.detokenizer import TextStream
from weft.text.tokenizer import Tokenizer

# Longest prompt and longest answer, for each device. Where the pool is small, what sequences grow by preempts others.
LONGEST = {"cpu": (256, 128), "simulated": (64, 256)}
BLOCK_SIZE = 16
POOL_SHARE = 0.1
KNOWN = 32
FIRST_ID = 16
BASELINE_LIMIT = 30.0
SAMPLE_SECONDS = 1.0


@dataclass(slots=True)
class Outcome:
    """What a soak showed. resident: bytes over time, by process."""

    tally: Tally
    seconds: float
    baseline_seconds: float | None
    preemptions: float
    log: str
    resident: dict[str, list[int]] = field(default_factory=dict)

    def growth(self, process: str) -> float | None:
        """Percent from the median of the second fifth to the median of the last; None for too short a run."""
        samples = self.resident[process]
        fifth = len(samples) // 5
        if fifth < 2:
            return None
        return 100 * (statistics.median(samples[-fifth:]) / statistics.median(samples[fifth : 2 * fifth]) - 1)


def main() -> None:
    arguments = _arguments()
    watch = common.LoadWatch()
    claims: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    outcomes = {}
    for device in ("cpu", "simulated") if arguments.device == "both" else (arguments.device,):
        outcome = outcomes[device] = asyncio.run(_soak(device, arguments))
        rows.append(_row(device, outcome))
        claims |= _claims(device, outcome)
        _say(device, outcome)
    if arguments.plot is not None:
        _plot(outcomes, arguments.plot)
    note = common.load_note(watch)
    common.report(arguments, claims, rows, [note] if note else [])


async def _soak(device: str, arguments: argparse.Namespace) -> Outcome:
    tokenizer = Tokenizer.from_folder(models.builtin())
    with Server(_flags(device, arguments.clients)) as server:
        await server.wait_ready()
        make = await _asks(device, server, tokenizer, arguments.seed)
        before = await server.metrics()
        tally = Tally()
        resident: dict[str, list[int]] = {}
        start = time.monotonic()
        end = start + 60 * arguments.minutes
        sampler = asyncio.create_task(_sample(server, resident))
        async with asyncio.TaskGroup() as group:
            for number in range(arguments.clients):
                rng = random.Random(f"{arguments.seed}/{number}")
                group.create_task(client(server.address, make, rng, lambda: time.monotonic() >= end, tally))
        baseline = await _baseline(server)
        seconds = time.monotonic() - start
        sampler.cancel()
        server.check_alive()
        after = await server.metrics()
        preempted = after.get("num_preemptions_total", 0.0) - before.get("num_preemptions_total", 0.0)
        return Outcome(tally, seconds, baseline, preempted, server.log, resident)


def _flags(device: str, clients: int) -> list[str]:
    flags = ["--block-size", str(BLOCK_SIZE), "--log-level", "warning"]
    if device == "cpu":
        return flags
    longest = sum(LONGEST[device])
    wanted = round(POOL_SHARE * clients * (1 + longest / 2) / BLOCK_SIZE)
    fits_one = -(-longest // BLOCK_SIZE) + 1
    return [*flags, "--device", "simulated", "--num-blocks", str(max(wanted, fits_one))]


async def _asks(device: str, server: Server, tokenizer: Tokenizer, seed: int) -> Callable[[random.Random], Ask]:
    """What the clients ask, with the answers that are known."""
    if device == "simulated":
        return lambda rng: _simulated(rng, tokenizer)
    rng = random.Random(seed)
    known = []
    for ask in [_random(rng, tokenizer, device) for _ in range(KNOWN)]:
        answer = await whole(server.address, ask, Tally())
        known.append(Ask(ask.prompt, ask.output, expected=answer.text))
    return lambda rng: rng.choice(known) if rng.random() < 0.5 else _random(rng, tokenizer, device)


def _random(rng: random.Random, tokenizer: Tokenizer, device: str, temperature: float = 0.0) -> Ask:
    most_in, most_out = LONGEST[device]
    prompt = tuple(rng.randrange(FIRST_ID, tokenizer.vocabulary) for _ in range(rng.randint(1, most_in)))
    return Ask(prompt, rng.randint(1, most_out), temperature, rng.randrange(2**32))


def _simulated(rng: random.Random, tokenizer: Tokenizer) -> Ask:
    """A request to the simulated device, whose answer the oracle knows, whatever the temperature."""
    ask = _random(rng, tokenizer, "simulated", temperature=rng.choice((0.0, 1.0)))
    tokens = continuation(ask.prompt, ask.output, tokenizer.vocabulary)
    stream = TextStream(tokenizer, prompt=ask.prompt)
    text = "".join(stream.feed(token).text for token in tokens) + stream.finish().text
    return replace(ask, expected=text)


async def _baseline(server: Server) -> float | None:
    """Seconds until nothing runs or waits and no block is held or pinned; None when that does not come."""
    start = time.monotonic()
    while time.monotonic() - start < BASELINE_LIMIT:
        server.check_alive()
        now = await server.metrics()
        busy = ("num_requests_running", "num_requests_waiting", "kv_blocks.held", "kv_blocks.pinned")
        if not any(now[name] for name in busy):
            return time.monotonic() - start
        await asyncio.sleep(0.05)
    return None


async def _sample(server: Server, resident: dict[str, list[int]]) -> None:
    """Note the resident memory of the server's processes, again and again."""
    while True:
        for pid in common.process_tree(server.pid):
            if (found := common.resident_bytes(pid)) > 0:
                resident.setdefault("front end" if pid == server.pid else f"engine ({pid})", []).append(found)
        await asyncio.sleep(SAMPLE_SECONDS)


def _claims(device: str, outcome: Outcome) -> dict[str, float]:
    grown = [growth for name in outcome.resident if (growth := outcome.growth(name)) is not None]
    found = {
        "errors": float(sum(outcome.tally.errors.values())),
        "mismatches": float(outcome.tally.mismatches),
        "baseline_s": float("inf") if outcome.baseline_seconds is None else outcome.baseline_seconds,
        **({"rss_growth_percent": max(grown)} if grown else {}),
        **({"preemptions": outcome.preemptions} if device == "simulated" else {}),
    }
    return {f"{device}_{name}": value for name, value in found.items()}


def _row(device: str, outcome: Outcome) -> dict[str, Any]:
    return {
        "device": device,
        "seconds": outcome.seconds,
        "requests": {manner.value: count for manner, count in outcome.tally.ended.items()},
        "output_tokens": outcome.tally.tokens,
        "compared": outcome.tally.compared,
        "mismatches": outcome.tally.mismatches,
        "errors": outcome.tally.errors,
        "baseline_s": outcome.baseline_seconds,
        "preemptions": outcome.preemptions,
        "resident_bytes": outcome.resident,
        "rss_growth_percent": {name: outcome.growth(name) for name in outcome.resident},
    }


def _say(device: str, outcome: Outcome) -> None:
    tally = outcome.tally
    baseline = "never" if outcome.baseline_seconds is None else f"{outcome.baseline_seconds:.2f} s"
    lines: list[tuple[str, object]] = [(manner.value, tally.ended[manner]) for manner in Manner]
    lines += [
        ("errors that no client caused", sum(tally.errors.values())),
        ("answers compared", tally.compared),
        ("answers that were wrong", tally.mismatches),
        ("output tokens/s of whole answers", f"{tally.tokens / outcome.seconds:.0f}"),
        ("preemptions", f"{outcome.preemptions:.0f}"),
        ("blocks back at baseline after", baseline),
    ]
    for name, samples in outcome.resident.items():
        growth = outcome.growth(name)
        shown = "too short to say" if growth is None else f"{growth:+.2f} %"
        lines.append((f"memory of the {name}, MiB; growth", f"{samples[-1] / 2**20:.0f}; {shown}"))
    print(common.table([f"{device}, {outcome.seconds:.0f} s", ""], lines))
    for reason, count in sorted(tally.errors.items(), key=lambda pair: -pair[1]):
        print(f"error, {count} times: {reason}")
    if tally.errors and outcome.log.strip():
        print("the server's log ends in:", *outcome.log.strip().splitlines()[-10:], sep="\n    ")
    print()


def _plot(outcomes: dict[str, Outcome], path: Path) -> None:
    from matplotlib.figure import Figure as Picture

    picture = Picture(layout="constrained")
    axes = picture.subplots()
    for device, outcome in outcomes.items():
        for name, samples in outcome.resident.items():
            axes.plot([size / samples[0] for size in samples], label=f"{device}: {name.partition(' (')[0]}")
    axes.set(xlabel="s", ylabel="resident memory / at first")
    axes.legend()
    picture.savefig(path)


def _arguments() -> argparse.Namespace:
    parser = common.parser("Many clients, some of which hang up, against one server for a long time.")
    parser.add_argument("--device", choices=("cpu", "simulated", "both"), default="both")
    parser.add_argument("--minutes", type=float, help="for each device; default: 10, with --quick 0.3")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.minutes is None:
        arguments.minutes = 0.3 if arguments.quick else 10.0
    if arguments.minutes <= 0 or arguments.clients < 1:
        parser.error("--minutes must be more than 0 and --clients at least 1")
    return arguments


if __name__ == "__main__":
    main()
