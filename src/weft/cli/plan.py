"""`weft plan`: the cheapest simulated fleet that meets latency targets for some traffic."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from weft.bench.report import finite, write_json
from weft.cli import simulated
from weft.cli.flags import Parser
from weft.config import EngineConfig
from weft.progress import Bar
from weft.sim.estimate import cost_of, setup_of
from weft.sim.hardware import Gpu, find_gpu, gpu_names
from weft.sim.load import Load
from weft.sim.models import Model, find_model
from weft.sim.plan_search import Candidate, Targets, Verdict, replicas, search, traffic_of
from weft.sim.precision import PRECISIONS
from weft.sim.replica import Setup
from weft.sim.report import SIMULATED
from weft.sim.step import StepCost
from weft.sim.study import ROUTERS

EPILOG = (
    "Every figure is simulated. Prices are yours: a GPU without --price is not looked at. The answer is confirmed on "
    "its whole fleet; the others were mostly tried on one replica that gets its part of the requests."
)


def main(arguments: Sequence[str]) -> int:
    given, load = simulated.read(_parser(), arguments, _problems)
    traffic = traffic_of(lambda: load.stream(given.rate))
    targets = Targets(given.slo_ttft, given.slo_tpot, given.percentile)
    candidates = _candidates(given, load)
    console = Console()
    sizes = f"{traffic.inputs.mean():.0f} in, {traffic.outputs.mean():.0f} out"
    words = f"{load.words(given.rate)}: {traffic.rate:.2f} requests/s, {sizes}"
    console.print(f"{words}\n{SIMULATED}", markup=False, highlight=False)
    with Bar(len(candidates), not given.disable_progress) as bar:
        verdicts = search(candidates, traffic, targets, given.router, given.max_gpus, bar.show)
    _print(verdicts, targets, console)
    for caveat in _caveats(verdicts[0]):
        console.print(f"  {caveat}", markup=False, highlight=False)
    if given.json is not None:
        rows = [_row(one) for one in verdicts]
        content = {"simulated": True, "settings": simulated.settings_of(given), "traffic": words, "verdicts": rows}
        write_json(given.json, finite(content))
    return 0 if verdicts[0].replicas is not None else 1


def _parser() -> Parser:
    parser = Parser("weft plan", "Find the cheapest simulated fleet that meets latency targets.", EPILOG)
    looked = parser.add_argument_group("what is looked at")
    simulated.add_model(looked)
    looked.add_argument(
        "--price", type=_price, action="append", default=[], metavar="GPU=X",
        help=f"of a GPU for an hour; may be repeated. GPUs: {', '.join(gpu_names())}",
    )  # fmt: skip
    looked.add_argument("--tensor-parallel-sizes", "--tp", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    looked.add_argument("--precisions", choices=tuple(PRECISIONS), nargs="+", default=["bf16"])
    looked.add_argument("--partitions", nargs="+", default=["off", "auto"], metavar="P", help="as in weft serve")
    looked.add_argument("--max-gpus", type=int, default=64, metavar="N", help="of a fleet at most (64)")
    looked.add_argument("--router", choices=ROUTERS, default="least-loaded", help="of the fleet that is confirmed")
    aims = parser.add_argument_group("targets")
    aims.add_argument("--slo-ttft", type=float, metavar="S", help="seconds to the first token")
    aims.add_argument("--slo-tpot", type=float, metavar="S", help="seconds for each later token")
    aims.add_argument("--percentile", type=int, choices=(50, 90, 99), default=90, help="that must meet them (90)")
    simulated.add_engine(parser)
    simulated.add_traffic(parser, "the trace once, or 600")
    parser.add_argument("--rate", type=float, default=1.0, metavar="X", help="of the trace's own, or requests/s (1)")
    simulated.add_output(parser.add_argument_group("output"), "settings and verdicts")
    return parser


def _problems(given: argparse.Namespace) -> list[str]:
    found = []
    if not given.price:
        found.append("there is no --price; give one for each GPU to look at, such as --price h100=2.5")
    if given.slo_ttft is None and given.slo_tpot is None:
        found.append("there is no target; give --slo-ttft, --slo-tpot or both")
    found += filter(None, [simulated.rate_problem("--rate", given.rate)])
    if given.max_gpus < 1:
        found.append(f"--max-gpus is {given.max_gpus}; it must be at least 1")
    if min(given.tensor_parallel_sizes) < 1:
        found.append(f"--tensor-parallel-sizes has {min(given.tensor_parallel_sizes)}; each must be at least 1")
    return [*found, *filter(None, [simulated.partition_problem("--partitions", text) for text in given.partitions])]


def _price(text: str) -> tuple[str, float]:
    """The GPU by the name or file that was given: a fitted file may have the name of a GPU that there is, too."""
    name, _, number = text.rpartition("=")
    try:
        price = float(number)
    except ValueError:
        price = 0.0
    if not 0 < price < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not GPU=X with a price of more than 0, such as h100=2.5")
    simulated.named("--price", find_gpu, name)
    return name, price


def _candidates(given: argparse.Namespace, load: Load) -> list[Candidate]:
    model = simulated.named("--model", find_model, given.model)
    found = []
    for name, price in dict(given.price).items():
        for ranks in sorted(set(given.tensor_parallel_sizes)):
            for precision in dict.fromkeys(given.precisions):
                for text in dict.fromkeys(given.partitions):
                    config = simulated.config_of(given, text, load)
                    weave = given.weave and ranks > 1
                    make = partial(_setup, model, find_gpu(name), ranks, precision, weave, config)
                    words = f"{ranks} x {name}, {precision}{', woven' if weave else ''}, --partition {text}"
                    found.append(Candidate(words, ranks, price * ranks, make))
    return found


def _setup(model: Model, gpu: Gpu, ranks: int, precision: str, weave: bool, config: EngineConfig) -> Setup:
    return setup_of(cost_of(model, gpu, ranks, precision, config.kv_cache_dtype, weave=weave), config)


def _caveats(best: Verdict) -> tuple[str, ...]:
    """What of the answer was not measured."""
    cost = None if best.replicas is None else best.candidate.make().cost
    return cost.caveats if isinstance(cost, StepCost) else ()


def _print(verdicts: Sequence[Verdict], targets: Targets, console: Console) -> None:
    good = [one for one in verdicts if one.replicas is not None]
    table = Table("replica", "replicas", "GPUs", "price/h", "TTFT", "TPOT", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for one in good:
        count = one.replicas or 0
        table.add_row(
            one.candidate.name, str(count), str(count * one.candidate.gpus), f"{one.price:.2f}",
            *_percentiles(one, targets),
        )  # fmt: skip
    if good:
        console.print(table)
    for one in good:
        console.print(f"{one.candidate.name}: {one.reason}", markup=False, highlight=False)
    reasons: dict[str, list[str]] = {}
    for one in verdicts[len(good) :]:
        reasons.setdefault(one.reason, []).append(one.candidate.name)
    for reason, names in reasons.items():
        console.print(f"not {'; '.join(names)}: {reason}", markup=False, highlight=False)
    if not good:
        console.print("no configuration meets the targets (simulated)", markup=False)
        return
    best = good[0]
    words = f"cheapest (simulated): {replicas(best.replicas)} of {best.candidate.name}, {best.price:.2f} an hour"
    if good[1:]:
        words += f"; the next, {good[1].replicas} of {good[1].candidate.name}, costs {good[1].price:.2f}"
    console.print(words, markup=False, highlight=False)


def _percentiles(one: Verdict, targets: Targets) -> tuple[str, str]:
    if one.totals is None:
        return "-", "-"
    name = f"p{targets.percentile}"
    ttft, tpot = getattr(one.totals.ttft, name), getattr(one.totals.tpot, name)
    return f"{ttft:.3f} s", f"{tpot * 1e3:.1f} ms"


def _row(one: Verdict) -> dict[str, Any]:
    return {
        "candidate": one.candidate.name,
        "gpus_each": one.candidate.gpus,
        "price_each": one.candidate.price,
        "replicas": one.replicas,
        "price": one.price,
        "bound": one.bound,
        "confirmed": one.confirmed,
        "reason": one.reason,
        "totals": None if one.totals is None else asdict(one.totals),
    }
