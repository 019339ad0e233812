"""A quantised model under a trace of real arrivals, with a 4-bit KV cache whose pool is too small: right, and faster?

    python benchmarks/comet_serving.py [--quick] [--trace CSV] [--seconds 120] [--json FILE] [--plot FILE]

The trace (columns arrival_s, input_tokens, output_tokens; the Azure conversation trace of 2023 is meant) is scaled to
the machine: arrivals and lengths times the factors that are printed. Without --trace one is drawn that is like it, and
the output says so. Prompts are random ids after 32 that all share, greedy, with prefix caching.

1. *alone*: every request by itself on an idle server of the quantised model with the 4-bit KV cache, and without
   prefix caching: its tokens are the truth.
2. *trace*: at each rate, the quantised model with KV in 4 bits, then the same model in BF16 with KV in BF16, with KV
   pools of the same bytes. Goodput counts the requests that met both targets.
3. *pressure*: all requests of the highest rate as fast as the connections take them, so that the pool is full and
   sequences are preempted all the time.

Claims: `mismatches` (answers of the 4-bit server, in 2 and 3, that are not the tokens of 1), `errors`, `preemptions`
and `pool_usage` (highest share of the pool that was held) of 3; `goodput_vs_bf16`, of the highest goodputs over the
rates; `concurrent_sequences_ratio`: KV blocks in the same bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import quantised_models
from serving import Server

import models
from weft.bench.client import Stream, Target, first_model, send
from weft.bench.stats import Record, Slo, Summary, summarise
from weft.bench.traces import Size, clip, read_trace, scale_trace
from weft.bench.traffic import Shot, arrivals, shots
from weft.models.families import ModelConfig, read_config

SHARED = 32  # leading ids that all prompts have
SAMPLE_SECONDS = 0.2
SKIPPED = 300.0  # seconds: the Azure trace begins slowly, and is even after that
BLOCK_SIZE = 16
PLACES = 64  # most sequences in a step, and connections of the pressure phase
FOUR, BF16 = "4 bits", "BF16"
# What is drawn where no trace is given: about the Azure conversation trace's rate and lengths.
DRAWN_RATE, DRAWN_BURSTINESS, DRAWN_INPUT, DRAWN_OUTPUT, DRAWN_SPREAD = 5.9, 0.7, 1000.0, 150.0, 0.8


@dataclass(frozen=True, slots=True)
class Scale:
    """How the trace is fitted to a model on this machine. rates: factors of the arrival rate, one run each.

    input, output: factors of the lengths; longest: most tokens (in, out); slo: the targets in seconds.
    """

    rates: tuple[float, ...]
    input: float
    output: float
    longest: tuple[int, int]
    slo: Slo
    seconds: float

    @property
    def context(self) -> int:
        return sum(self.longest)


# One in sixteen and one in two: about 70 in, 130 out. Sequences that grow much are those that preempt others.
LLAMA = Scale((0.03, 0.06, 0.14), 1 / 16, 1 / 2, (256, 240), Slo(ttft=2.0, tpot=0.15), 120.0)
BUILTIN = Scale((1.0, 4.0), 1 / 16, 1 / 2, (256, 240), Slo(ttft=0.5, tpot=0.05), 5.0)
WARM = 2  # requests to a server before any counts


@dataclass(slots=True)
class Outcome:
    """What a run of requests showed. samples: (share of the pool held, running sequences) over time."""

    records: list[Record]
    tokens: list[list[int]]
    preemptions: float = 0.0
    samples: list[tuple[float, float]] = field(default_factory=list)

    @property
    def usage(self) -> float:
        return max((usage for usage, _ in self.samples), default=0.0)

    @property
    def running(self) -> float:
        return max((running for _, running in self.samples), default=0.0)

    def wrong(self, truth: Sequence[Sequence[int]]) -> list[int]:
        """The requests that completed with other tokens than they have alone."""
        done = [number for number, record in enumerate(self.records) if record.error is None]
        return [number for number in done if self.tokens[number] != list(truth[number])]

    def errors(self) -> int:
        return sum(record.error is not None for record in self.records)


def main() -> None:
    arguments = _arguments()
    watch = common.LoadWatch()
    cache = common.cache_folder(arguments.cache)
    model = models.builtin() if arguments.quick else models.random_llama(cache)
    scale, config = arguments.scale, read_config(model)
    rng = np.random.default_rng(arguments.seed)
    loads, notes = _loads(arguments, scale, config, rng)
    pool = pool_bytes(config, scale.context)
    with ExitStack() as stack:
        quantised = quantised_models.fmpq(model, cache)
        four = ["--kv-cache-dtype", arguments.kv]
        alone = stack.enter_context(_server(quantised, scale, [*four, "--no-enable-prefix-caching"]))
        small = ["--kv-cache-memory-bytes", str(pool)]
        servers = {
            FOUR: stack.enter_context(_server(quantised, scale, [*four, *small])),
            BF16: stack.enter_context(_server(model, scale, ["--kv-cache-dtype", "bf16", *small])),
        }
        found = asyncio.run(_measure(alone, servers, loads))
    rows = _rows(found, scale, pool)
    print(_table(rows))
    notes += _notes(found, scale, pool)
    if (note := common.load_note(watch)) is not None:
        notes.append(note)
    if arguments.plot is not None:
        _plot(rows, arguments.plot)
    common.report(arguments, _claims(found, scale), rows, notes)


@dataclass(slots=True)
class Found:
    """truth: each request's tokens, alone. runs: by (contestant, rate). blocks: in each server's pool."""

    truth: list[list[int]]
    runs: dict[tuple[str, float], Outcome]
    pressure: Outcome
    blocks: dict[str, float]


async def _measure(alone: Server, servers: dict[str, Server], loads: dict[float, list[Shot]]) -> Found:
    hardest = max(loads.values(), key=len)
    everybody = (alone, *servers.values())
    await asyncio.gather(*(server.wait_ready() for server in everybody))
    for server in everybody:
        await _run(server, hardest[:WARM], places=1)
    common.say(f"alone: {len(hardest)} requests, one after another")
    truth = await _run(alone, hardest, places=1)
    if failed := [record.error for record in truth.records if record.error is not None]:
        raise SystemExit(f"a request that ran alone failed: {failed[0]}")
    runs: dict[tuple[str, float], Outcome] = {}
    for rate, load in loads.items():
        for name, server in servers.items():
            common.say(f"trace at {rate:g} of its rate: {len(load)} requests, {name}")
            runs[name, rate] = await _run(server, load)
    at_once = [Shot(0.0, shot.prompt, shot.input_tokens, shot.output_tokens) for shot in hardest]
    common.say(f"pressure: {len(at_once)} requests, {PLACES} at a time")
    pressure = await _run(servers[FOUR], at_once, places=PLACES)
    blocks = {name: await _blocks(server) for name, server in servers.items()}
    return Found(truth.tokens, runs, pressure, blocks)


async def _run(server: Server, load: Sequence[Shot], places: int | None = None) -> Outcome:
    """Send every request when it is due, or as one of `places` is free; watch the pool meanwhile."""
    name = await first_model(server.address)
    extra = {"temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
    target = Target(server.address, name, extra=extra, timeout=3600.0)
    before = await server.metrics()
    samples: list[tuple[float, float]] = []
    sampler = asyncio.create_task(_sample(server, samples))
    gate = asyncio.Semaphore(places or len(load))
    streams = [Stream() for _ in load]
    start = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - start

    async def one(shot: Shot, stream: Stream) -> Record:
        await asyncio.sleep(max(0.0, shot.due - clock()))
        async with gate:
            return await send(target, shot, clock, stream)

    records = await asyncio.gather(*(one(*pair) for pair in zip(load, streams, strict=True)))
    sampler.cancel()
    server.check_alive()
    after = await server.metrics()
    preempted = after["num_preemptions_total"] - before["num_preemptions_total"]
    return Outcome(list(records), [stream.tokens for stream in streams], preempted, samples)


async def _sample(server: Server, samples: list[tuple[float, float]]) -> None:
    while True:
        now = await server.metrics()
        samples.append((now["kv_cache_usage_perc"], now["num_requests_running"]))
        await asyncio.sleep(SAMPLE_SECONDS)


async def _blocks(server: Server) -> float:
    return sum(count for name, count in (await server.metrics()).items() if name.startswith("kv_blocks."))


def _server(model: Path, scale: Scale, flags: list[str]) -> Server:
    usual = ["--dtype", "bfloat16", "--max-model-len", str(scale.context), "--max-num-seqs", str(PLACES)]
    return Server([str(model), *usual, "--block-size", str(BLOCK_SIZE), "--log-level", "warning", *flags])


def pool_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of a KV pool that holds `tokens` tokens in BF16, in whole blocks."""
    token = config.layers * 2 * config.kv_heads * config.head_dim * 2
    return -(-tokens // BLOCK_SIZE) * BLOCK_SIZE * token


def _loads(
    arguments: argparse.Namespace, scale: Scale, config: ModelConfig, rng: np.random.Generator
) -> tuple[dict[float, list[Shot]], list[str]]:
    """The requests of each rate: the trace's first ones, so that the lower rates' are among the highest's."""
    if arguments.trace is not None:
        rows, source = read_trace(arguments.trace), f"the trace is {arguments.trace.name}"
    else:
        rows, source = drawn_trace(rng), "NO TRACE GIVEN: arrivals and lengths are drawn (see --trace)"
    rows = after(rows, arguments.skip)
    counts = {rate: count_within(rows, arguments.seconds * rate) for rate in scale.rates}
    most = max(counts.values())
    sizes, cut = fitted(rows[:most], scale)
    made = shots([0.0] * most, sizes, config.vocabulary, SHARED, rng)
    loads = {}
    for rate, count in counts.items():
        due, _ = scale_trace(rows, count, rate, 1.0)
        loads[rate] = [
            Shot(when, shot.prompt, shot.input_tokens, shot.output_tokens)
            for when, shot in zip(due, made[:count], strict=True)
        ]
    notes = [
        f"{source}, from second {arguments.skip:g} on; inputs times {scale.input:g}, outputs times {scale.output:g}, "
        f"arrivals times {', '.join(f'{rate:g}' for rate in scale.rates)} for {arguments.seconds:g} s each",
        f"{cut} of {most} requests were cut to {scale.longest[0]} tokens in or {scale.longest[1]} out",
    ]
    return loads, notes


def after(rows: Sequence[tuple[float, Size]], seconds: float) -> list[tuple[float, Size]]:
    """The rows that arrive later than that. Raises SystemExit when there are none."""
    kept = [row for row in rows if row[0] >= seconds]
    if not kept:
        raise SystemExit(f"--skip is {seconds:g}, and the trace's last request arrives at {rows[-1][0]:g} s")
    return kept


def count_within(rows: Sequence[tuple[float, Size]], seconds: float) -> int:
    """How many of the rows arrive in the first `seconds` of the trace; at least one."""
    return max(1, sum(arrival - rows[0][0] <= seconds for arrival, _ in rows))


def fitted(rows: Sequence[tuple[float, Size]], scale: Scale) -> tuple[list[Size], int]:
    """The lengths after scaling and cutting, and how many were cut."""
    sizes = [
        Size(max(1, round(size.input * scale.input)), max(1, round(size.output * scale.output))) for _, size in rows
    ]
    return clip(sizes, *scale.longest)


def drawn_trace(rng: np.random.Generator, count: int = 12_000) -> list[tuple[float, Size]]:
    """Bursty arrivals and lengths with a long tail."""

    def lengths(middle: float) -> list[int]:
        drawn: list[int] = np.ceil(middle * rng.lognormal(0.0, DRAWN_SPREAD, count)).astype(int).tolist()
        return drawn

    sizes = [Size(*pair) for pair in zip(lengths(DRAWN_INPUT), lengths(DRAWN_OUTPUT), strict=True)]
    return list(zip(arrivals(count, DRAWN_RATE, DRAWN_BURSTINESS, rng), sizes, strict=True))


def _claims(found: Found, scale: Scale) -> dict[str, float]:
    ours = [*(run for (name, _), run in found.runs.items() if name == FOUR), found.pressure]
    best = {name: best_goodput(found, name, scale.slo) for name in (FOUR, BF16)}
    return {
        "compared": float(sum(len(run.records) - run.errors() for run in ours)),
        "mismatches": float(sum(len(run.wrong(found.truth)) for run in ours)),
        "errors": float(sum(run.errors() for run in [*found.runs.values(), found.pressure])),
        "preemptions": found.pressure.preemptions,
        "pool_usage": found.pressure.usage,
        "concurrent_sequences_ratio": found.blocks[FOUR] / found.blocks[BF16],
        **({"goodput_vs_bf16": best[FOUR] / best[BF16]} if best[BF16] > 0 else {}),
    }


def best_goodput(found: Found, name: str, slo: Slo) -> float:
    """Requests/s that met the targets, at the rate where they were most."""
    return max(summarise(run.records, slo).goodput or 0.0 for (whose, _), run in found.runs.items() if whose == name)


def _rows(found: Found, scale: Scale, pool: int) -> list[dict[str, Any]]:
    runs = [(name, f"{rate:g}", run) for (name, rate), run in found.runs.items()]
    runs.append((FOUR, "pressure", found.pressure))
    return [
        {
            "contestant": name,
            "load": load,
            "requests": len(run.records),
            **_figures(summarise(run.records, scale.slo)),
            "preemptions": run.preemptions,
            "pool_usage": run.usage,
            "pool_usage_median": float(np.median([usage for usage, _ in run.samples])) if run.samples else None,
            "most_running": run.running,
            "mismatches": len(run.wrong(found.truth)) if name == FOUR else None,
            "pool_bytes": pool,
            "pool_blocks": found.blocks[name],
        }
        for name, load, run in runs
    ]


def _figures(summary: Summary) -> dict[str, Any]:
    return {
        "failed": summary.failed,
        "errors": dict(summary.errors),
        "seconds": summary.duration,
        "output_tokens_per_s": summary.output_throughput,
        "goodput": summary.goodput,
        "attainment": summary.attainment,
        "ttft_p50_ms": 1000 * summary.ttft.p50,
        "ttft_p99_ms": 1000 * summary.ttft.p99,
        "tpot_p50_ms": 1000 * summary.tpot.p50,
        "tpot_p99_ms": 1000 * summary.tpot.p99,
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["", "requests", "out tok/s", "goodput/s", "within SLO", "TTFT p50/p99 ms", "TPOT p50/p99 ms"]
    head += ["pool held", "running", "preempted", "wrong"]
    lines = [
        [
            f"{row['contestant']}, {row['load']}",
            row["requests"],
            f"{row['output_tokens_per_s']:.1f}",
            f"{row['goodput']:.2f}",
            f"{row['attainment']:.0%}",
            f"{row['ttft_p50_ms']:.0f} / {row['ttft_p99_ms']:.0f}",
            f"{row['tpot_p50_ms']:.0f} / {row['tpot_p99_ms']:.0f}",
            f"{row['pool_usage']:.0%}",
            f"{row['most_running']:.0f}",
            f"{row['preemptions']:.0f}",
            "-" if row["mismatches"] is None else row["mismatches"],
        ]
        for row in rows
    ]
    return f"\n{common.table(head, lines)}\n"


def _notes(found: Found, scale: Scale, pool: int) -> list[str]:
    tokens = {name: int(blocks) * BLOCK_SIZE for name, blocks in found.blocks.items()}
    notes = [
        f"targets: TTFT {1000 * (scale.slo.ttft or 0):.0f} ms and TPOT {1000 * (scale.slo.tpot or 0):.0f} ms",
        f"KV pools of {pool / 2**20:.1f} MiB hold {tokens[FOUR]} tokens in 4 bits and {tokens[BF16]} in BF16",
    ]
    if found.pressure.preemptions == 0:
        notes.append("NO PREEMPTION under pressure: the pool was not too small, and the comparison shows less")
    if best_goodput(found, BF16, scale.slo) == 0:
        notes.append("in BF16 no request met the targets at any rate: there is no ratio of goodputs")
    wrong = found.pressure.wrong(found.truth)
    if wrong:
        notes.append(f"WRONG under pressure: requests {', '.join(map(str, wrong[:10]))}")
    return notes


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure as Picture

    picture = Picture(layout="constrained")
    axes = picture.subplots()
    for name in (FOUR, BF16):
        own = [row for row in rows if row["contestant"] == name and row["load"] != "pressure"]
        axes.plot([float(row["load"]) for row in own], [row["goodput"] for row in own], "o-", label=name)
    axes.set(xlabel="arrival rate, of the trace's own", ylabel="goodput, requests/s", ylim=(0, None))
    axes.legend()
    picture.savefig(path)


def _arguments() -> argparse.Namespace:
    parser = common.parser("A quantised model under a trace of arrivals, with a KV pool that is too small.")
    parser.add_argument("--trace", type=Path, metavar="CSV", help="arrival_s,input_tokens,output_tokens; may be .gz")
    parser.add_argument("--seconds", type=float, help="of arrivals at each rate; default: 120, with --quick 5")
    parser.add_argument(
        "--skip", type=float, default=SKIPPED, help=f"seconds of the trace to leave out at its start ({SKIPPED:g})"
    )
    parser.add_argument("--rates", type=_factors, metavar="LIST", help="factors of the trace's arrival rate")
    parser.add_argument("--kv-cache-dtype", dest="kv", default="int4", help="of the quantised model (int4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="default: weft-bench in the user's cache")
    arguments = parser.parse_args()
    chosen = BUILTIN if arguments.quick else LLAMA
    rates = arguments.rates or chosen.rates
    arguments.scale = Scale(rates, chosen.input, chosen.output, chosen.longest, chosen.slo, chosen.seconds)
    arguments.seconds = arguments.seconds or chosen.seconds
    return arguments


def _factors(text: str) -> tuple[float, ...]:
    try:
        factors = tuple(float(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if not factors or min(factors) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of factors above 0, such as 0.06,0.12")
    return factors


if __name__ == "__main__":
    main()
