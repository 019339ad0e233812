"""Why one engine: phases, weave and comet in all eight combinations, and the load that each of them can serve.

    python benchmarks/union.py TRACE ... [--gpus h100 a100-80] [--quick] [--json FILE] [--plot FILE]

TRACES: files with arrival_s, input_tokens, output_tokens (CSV), or Mooncake's JSON lines; also .gz. Each is served by
Llama-3-70B on eight GPUs of a kind at growing rates: its first requests, so many times as fast. The figure of a
combination is its goodput at the targets: the highest rate at which 90 % of the requests meet both the TTFT and the
TPOT target, found by bisection. The targets are the same for all eight.

             off                                          on
    phases   one mixed lane, the best of four chunks      two lanes under --partition auto, as it finds its way
    weave    plain tensor parallelism: vLLM's all-reduce  fused seams, hidden behind the other half of the batch
             and a norm on every rank                     where that is quicker
    comet    BF16 weights, activations and KV             four-bit weights and KV; activations on the 8-bit tensor cores
                                                          of an H100 (W4A8), on the 4-bit ones of an A100 but for the
                                                          channels with outliers (W4Ax)

With weave and comet together the gather of a seam carries the quantised activations.

Every figure is SIMULATED: weft's scheduler and controller on a cost model. Nothing is drawn, so that the same command
gives the same table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from union_tables import Cell, claims, draw, findings, show

from weft.bench.stats import Record, Slo
from weft.bench.traces import Row, read_trace
from weft.config import EngineConfig
from weft.progress import Bar
from weft.sim.estimate import cost_of, setup_of
from weft.sim.hardware import find_gpu
from weft.sim.models import find_model
from weft.sim.replica import Setup
from weft.sim.study import Fleet, study
from weft.sim.tally import Totals
from weft.sim.traffic import clipped, faster, repeated

MODEL, RANKS = "llama-3-70b", 8
COMET = {"h100": "w4a8", "a100-80": "w4ax"}
# Most tokens in a step: the mixed lane is tuned by hand, and auto has to find its own chunks below this.
CHUNKS = (512, 1024, 2048, 4096)
STEPS = (2048,)
LONGEST = 32768
PART = 0.9  # of the requests, that must meet both targets
TPOT = 0.05
# Prompts that name their blocks are those of Mooncake, ten times as long as the others.
TTFT, TTFT_LONG = 1.0, 5.0
# The search: steps until one rate passes and the next one does not, then halves until the two are this close.
STEP, CLOSE = 1.3, 1.04
FURTHEST = 1000.0  # few requests at once may be served however quickly they come
ALONE = 20


@dataclass(frozen=True, slots=True)
class Trace:
    """name: for people. rows: its first requests, cut to the longest sequence. rate: requests/s of these."""

    name: str
    rows: tuple[Row, ...]
    slo: Slo
    caching: bool

    @property
    def rate(self) -> float:
        return (len(self.rows) - 1) / (self.rows[-1][0] - self.rows[0][0])


@dataclass(frozen=True, slots=True)
class Combination:
    """What is on."""

    phases: bool
    weave: bool
    comet: bool

    @property
    def name(self) -> str:
        on = [name for name in ("phases", "weave", "comet") if getattr(self, name)]
        return " + ".join(on) or "none"

    @property
    def steps(self) -> tuple[int, ...]:
        return STEPS if self.phases else CHUNKS

    def setup(self, gpu: str, trace: Trace, tokens: int) -> Setup:
        """tokens: most in a step."""
        kv = "int4" if self.comet else "bf16"
        config = EngineConfig(
            partition="auto" if self.phases else "off",
            slo_ttft=trace.slo.ttft if self.phases else None,
            slo_tpot=trace.slo.tpot if self.phases else None,
            max_num_seqs=256,
            max_num_batched_tokens=tokens,
            max_num_queued_reqs=10**6,
            block_size=64,
            max_model_len=LONGEST,
            enable_prefix_caching=trace.caching,
            kv_cache_dtype=kv,
        )
        precision = COMET[gpu] if self.comet else "bf16"
        return setup_of(cost_of(find_model(MODEL), find_gpu(gpu), RANKS, precision, kv, weave=self.weave), config)


COMBINATIONS = sorted(
    (Combination(*on) for on in itertools.product((False, True), repeat=3)),
    key=lambda one: (one.phases + one.weave + one.comet, one.comet, one.weave),
)


class _Hopeless(Exception):
    """More requests have missed a target already than may."""


def serve(setup: Setup, trace: Trace, factor: float) -> Totals | None:
    """The trace, `factor` times as fast; None as soon as too many requests have missed a target."""
    allowed, missed = (1.0 - PART) * len(trace.rows), 0

    def ended(record: Record) -> None:
        nonlocal missed
        missed += not trace.slo.met_by(record)
        if missed > allowed:
            raise _Hopeless

    try:
        return study(Fleet(setup), faster(trace.rows, factor), trace.slo, on_end=ended).totals
    except _Hopeless:
        return None


def highest(passes: Callable[[float], bool], start: float) -> float:
    """The highest rate that passes, to within CLOSE; 0 where none down to start / FURTHEST does, the last one tried
    where all up to start * FURTHEST do. A rate above one that does not pass may pass again where requests come in
    bursts: this is the first that does not, seen from `start`."""
    low, high = 0.0, 0.0
    rate = start
    while not (low and high):
        if passes(rate):
            low = rate
            rate *= STEP
        else:
            high = rate
            rate /= STEP
        if not start / FURTHEST < rate < start * FURTHEST:
            return low
    while high / low > CLOSE:
        middle = (low * high) ** 0.5
        if passes(middle):
            low = middle
        else:
            high = middle
    return low


def goodput(gpu: str, trace: Trace, one: Combination, start: float) -> Cell:
    """One combination: its best step size at the highest rate. start: the rate to begin with."""
    setups = {tokens: one.setup(gpu, trace, tokens) for tokens in one.steps}
    order = list(setups)
    found: dict[float, tuple[int, Totals]] = {}
    runs = 0

    def passes(factor: float) -> bool:
        nonlocal runs
        for tokens in order:
            runs += 1
            totals = serve(setups[tokens], trace, factor)
            if totals is not None:
                found[factor] = tokens, totals
                order.remove(tokens)
                order.insert(0, tokens)  # what was good at one rate is tried first at the next
                return True
        return False

    factor = highest(passes, start)
    tokens, totals = found.get(factor, (0, None))
    return Cell(gpu, trace.name, one.name, factor, factor * trace.rate, tokens, totals, runs)


def alone(gpu: str, trace: Trace) -> Totals:
    """One request at a time with nothing on: what the targets are held against."""
    sizes = sorted((size for _, size in trace.rows), key=lambda size: size.input)
    picked = sizes[len(sizes) // ALONE // 2 :: max(1, len(sizes) // ALONE)]
    setup = COMBINATIONS[0].setup(gpu, trace, 2048)
    return study(Fleet(setup), [(1000.0 * at, size) for at, size in enumerate(picked)], trace.slo).totals


def cells(gpus: Sequence[str], traces: Sequence[Trace]) -> Iterator[Cell]:
    """All of them, in the order of the table. A combination begins where the best of what it adds to has ended."""
    for gpu in gpus:
        for trace in traces:
            best: dict[Combination, float] = {}
            for one in COMBINATIONS:
                less = [rate for other, rate in best.items() if _within(other, one)]
                cell = goodput(gpu, trace, one, max(less, default=1.0) or 1.0)
                best[one] = cell.factor
                yield cell


def _within(less: Combination, more: Combination) -> bool:
    return less.phases <= more.phases and less.weave <= more.weave and less.comet <= more.comet


def read(path: Path, requests: int) -> Trace:
    rows = tuple(itertools.islice(clipped(repeated(read_trace(path)), LONGEST), requests))
    named = any(size.hashes for _, size in rows)
    name = "_".join(path.name.split(".")[0].split("_")[:2])
    return Trace(name, rows, Slo(TTFT_LONG if named else TTFT, TPOT), named)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="azure2023_conv, _code, mooncake")
    parser.add_argument("--gpus", nargs="+", choices=tuple(COMET), default=list(COMET), help="both kinds by default")
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="first ones of each trace (1000)")
    arguments = parser.parse_args()
    paths, requests = (arguments.traces[:1], 150) if arguments.quick else (arguments.traces, arguments.requests)
    traces = [read(path, requests) for path in paths]
    found: list[Cell] = []
    with Bar(len(arguments.gpus) * len(traces) * len(COMBINATIONS)) as bar:
        for cell in cells(arguments.gpus, traces):
            found.append(cell)
            words = f"{cell.gpu}, {cell.trace}, {cell.combination}: {cell.rate:.2f} requests/s"
            bar.show(len(found), words)
            common.say(words)
            common.write_json(arguments, {}, [one.row() for one in found], ["unfinished"])
    notes = [
        f"SIMULATED: {MODEL} on {RANKS} GPUs, {len(traces[0].rows)} requests of each trace, rates to within "
        f"{CLOSE - 1:.0%}"
    ]
    for gpu in arguments.gpus:
        for trace in traces:
            totals = alone(gpu, trace)
            notes.append(
                f"{gpu}, {trace.name}: targets TTFT {trace.slo.ttft:g} s, TPOT {1e3 * TPOT:g} ms; a request alone with "
                f"nothing on: TTFT P90 {totals.ttft.p90:.2f} s, TPOT P90 {1e3 * totals.tpot.p90:.1f} ms"
            )
    print(show(found))
    for line in findings(found, CLOSE):
        print(line)
    if arguments.plot is not None:
        draw(found, arguments.plot)
    made: dict[str, Any] = claims(found)
    common.report(arguments, made, [cell.row() for cell in found], notes)


if __name__ == "__main__":
    main()
