"""`weft simulate`: the engine, its scheduler and its controllers on GPUs that exist on paper."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from weft.bench.plot import require_picture
from weft.bench.report import write_json
from weft.bench.stats import Slo
from weft.cli import simulated
from weft.cli.flags import Parser
from weft.progress import Bar
from weft.sim.estimate import cost_of, setup_of
from weft.sim.hardware import find_gpu, gpu_names
from weft.sim.load import Load
from weft.sim.models import find_model
from weft.sim.precision import PRECISIONS
from weft.sim.report import Run, as_json, plot, print_runs
from weft.sim.run import Transfer
from weft.sim.step import StepCost
from weft.sim.study import ROUTERS, Failure, Fleet, study

LOOKS = 240
EPILOG = (
    "Every figure is simulated: the scheduler and the controllers are those that serve, the GPUs are a model. Prompts "
    "of traces without block names share nothing; answers have the length that the trace says."
)


def main(arguments: Sequence[str]) -> int:
    given, load = simulated.read(_parser(), arguments, _problems)
    if given.plot is not None:
        require_picture(given.plot)
    cost = cost_of(
        simulated.named("--model", find_model, given.model),
        simulated.named("--gpu", find_gpu, given.gpu),
        given.tensor_parallel_size,
        given.precision,
        given.kv_cache_dtype,
        weave=given.weave,
    )
    fleet = _fleet(given, cost, load)
    slo = Slo(given.slo_ttft, given.slo_tpot)
    runs = [_run(fleet, load, rate, slo, given) for rate in given.rates]
    console = Console()
    title = (
        f"{given.replicas} x {given.tensor_parallel_size} x {given.gpu}, {cost.model.name} in {given.precision}, "
        f"--partition {given.partition}"
    )
    console.print(title, markup=False, highlight=False)
    for caveat in cost.caveats:
        console.print(f"  {caveat}", markup=False, highlight=False)
    for run in runs:
        console.print(f"  {run.words}", markup=False, highlight=False)
    print_runs(runs, slo, console)
    if given.json is not None:
        write_json(given.json, as_json(simulated.settings_of(given), runs))
    if given.plot is not None:
        plot(runs, title, given.plot)
    return 0 if any(run.outcome.totals.completed for run in runs) else 1


def _parser() -> Parser:
    parser = Parser("weft simulate", "Serve traffic on simulated GPUs in virtual time.", EPILOG)
    fleet = parser.add_argument_group("fleet")
    simulated.add_model(fleet)
    fleet.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(gpu_names())} (h100)")
    fleet.add_argument("--tensor-parallel-size", "--tp", type=int, default=1, metavar="N", help="GPUs of a replica (1)")
    fleet.add_argument("--precision", choices=tuple(PRECISIONS), default="bf16", help="of weights and activations")
    fleet.add_argument("--replicas", type=int, default=1, metavar="N", help="behind a router (1)")
    fleet.add_argument("--router", choices=ROUTERS, default="least-loaded")
    fleet.add_argument(
        "--prefill-replicas", type=int, default=0, metavar="N",
        help="so many of the replicas prefill only, and the others decode (PD disaggregation); 0: each does both",
    )  # fmt: skip
    fleet.add_argument("--kv-link", type=float, default=50.0, metavar="GB/S", help="from prefill to decode (50)")
    fleet.add_argument(
        "--fail", type=_failure, action="append", default=[], metavar="AT:COUNT:REPAIR",
        help="at so many seconds, COUNT replicas are gone for REPAIR seconds; may be repeated",
    )  # fmt: skip
    fleet.add_argument(
        "--processes", type=int, default=1, metavar="N",
        help="that compute the replicas, for a large fleet on several cores; the result is the same (1)",
    )  # fmt: skip
    fleet.add_argument("--partition", default="off", metavar="TEXT", help="as in weft serve (off)")
    simulated.add_engine(parser)
    simulated.add_traffic(parser, "the trace once, or 600")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1.0], metavar="X",
        help="one run for each: a factor of the trace's rate, or requests/s where the load is drawn (1)",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--slo-ttft", type=float, metavar="S", help="goodput counts requests within these targets, and")
    output.add_argument("--slo-tpot", type=float, metavar="S", help="--partition auto and paper go by them")
    output.add_argument("--warm-up", type=float, default=0.0, metavar="S", help="requests before that do not count (0)")
    output.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (needs matplotlib)")
    simulated.add_output(output, "settings, figures and timelines")
    return parser


def _problems(given: argparse.Namespace) -> list[str]:
    found = []
    for name in ("tensor_parallel_size", "replicas", "processes"):
        if getattr(given, name) < 1:
            found.append(f"--{name.replace('_', '-')} is {getattr(given, name)}; it must be at least 1")
    if not 0 <= given.prefill_replicas < max(1, given.replicas):
        found.append(
            f"--prefill-replicas is {given.prefill_replicas}; it must be at least 0 and less than --replicas "
            f"{given.replicas}"
        )
    if given.prefill_replicas and (given.partition != "off" or given.fail):
        found.append("--prefill-replicas does not go with --partition or --fail: its replicas have one phase each")
    if given.prefill_replicas and given.processes > 1:
        found.append("--prefill-replicas does not go with --processes: what ends on one replica begins on another")
    if not 0 < given.kv_link < math.inf:
        found.append(f"--kv-link is {given.kv_link}; it must be more than 0")
    found += filter(None, [simulated.rate_problem("--rates", rate) for rate in given.rates])
    if not 0 <= given.warm_up < math.inf:
        found.append(f"--warm-up is {given.warm_up}; it must be at least 0")
    return [*found, *filter(None, [simulated.partition_problem("--partition", given.partition)])]


def _failure(text: str) -> Failure:
    try:
        at, count, repair = text.split(":")
        found = Failure(float(at), int(count), float(repair))
    except ValueError:
        found = Failure(-1.0, 0, 0.0)
    if not (0 <= found.at < math.inf and found.count >= 1 and 0 < found.repair < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not AT:COUNT:REPAIR, such as 300:8:120")
    return found


def _fleet(given: argparse.Namespace, cost: StepCost, load: Load) -> Fleet:
    setup = setup_of(cost, simulated.config_of(given, given.partition, load))
    link = Transfer(cost.kv_bytes_per_token, given.kv_link * 1e9)
    return Fleet(setup, given.replicas, given.router, tuple(given.fail), given.prefill_replicas, link)


def _run(fleet: Fleet, load: Load, rate: float, slo: Slo, given: argparse.Namespace) -> Run:
    seconds = load.length(rate)
    with Bar(seconds, not given.disable_progress) as bar:

        def show(now: float) -> None:
            bar.show(min(now, seconds), f"rate {rate:g}: {now:.0f} of {seconds:.0f} s (simulated)")

        outcome = study(
            fleet, load.stream(rate), slo, seconds=seconds, warm_up=given.warm_up, looks=LOOKS,
            processes=given.processes, on_time=show,
        )  # fmt: skip
    return Run(rate, load.words(rate), outcome)
