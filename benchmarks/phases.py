"""How prefill and decode should share a device: chunks, splits, overlap, turns, PD disaggregation, semi-PD's way, auto.

    python benchmarks/phases.py [TRACE ...] [--quick] [--part report] [--json FILE] [--plot FILE]
    python benchmarks/phases.py [TRACE ...] --cpu builtin|llama-1.1b [--minutes 15] [--json FILE] [--plot FILE]

TRACES: files with arrival_s, input_tokens, output_tokens (CSV), or Mooncake's JSON lines; also .gz. A load whose mix
changes twice, prompt-heavy, generation-heavy and prompt-heavy again, is always there. A request counts when it met both
targets; one that was refused or failed has not.

Without --cpu: the real engine and policies on the simulated device in virtual time; the figures are SIMULATED. The
policies' constants were chosen on the part `tune` of the loads; what is shown is the part `report`, which begins 15
minutes later (other seeds, where the load is drawn). `--part both` adds how the fixed policy does that was best before.

With --cpu: `weft serve`, and llama.cpp's server where it has been built (benchmarks/peers/llama_server.py), over HTTP.
What the machine can do, and how fast one request alone is, is measured first: the rates are parts of the one, the
targets multiples of the other.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import common
import phases_cpu
import phases_simulated as simulated
from phases_loads import CHANGING, Load, changing, recorded
from phases_tables import Row, chosen_elsewhere, claims, draw, no_room, row, show

from weft.bench.stats import Slo, summarise

DEVICE = "simulated"


def main() -> None:
    arguments = _arguments()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("weft.partition").setLevel(logging.INFO if arguments.log else logging.ERROR)
    if arguments.cpu is not None:
        phases_cpu.main(arguments)
        return
    parts = ["tune", "report"] if arguments.part == "both" else [arguments.part]
    found = {part: run(arguments, part) for part in parts}
    shown = found[parts[-1]]
    targets = simulated.TARGETS
    notes = [
        f"SIMULATED: {simulated.COST}, {simulated.SHARES} shares, targets TTFT {targets.ttft:g} s and TPOT "
        f"{targets.tpot:g} s; part {parts[-1]}"
    ]
    notes += no_room(shown)
    made = {} if arguments.only else claims(shown, "simulated_")
    if len(parts) == 2 and not arguments.only:
        made |= chosen_elsewhere(found["tune"], shown, "simulated_")
    if arguments.plot is not None:
        draw(shown, arguments.plot, DEVICE, (targets.ttft, targets.tpot))
    common.report(arguments, made, [one | {"part": part} for part in parts for one in found[part]], notes)


def run(arguments: argparse.Namespace, part: str) -> list[Row]:
    seconds = arguments.seconds or (30.0 if arguments.quick else 300.0)
    rates = arguments.rates or ([1.1] if arguments.quick else [0.8, 1.0, 1.2])
    slo = Slo(simulated.TARGETS.ttft, simulated.TARGETS.tpot)
    rows: list[Row] = []
    for load in loads(arguments.traces):
        if arguments.loads and load.name not in arguments.loads:
            continue
        for rate in rates:
            vocabulary = simulated.CAPACITY.vocabulary
            entrants = simulated.contestants()
            if arguments.only:
                entrants = [one for one in entrants if {one.name, one.kind} & set(arguments.only)]
            many = {1} | {one.devices for one in entrants}
            shots = {devices: load.make(part, devices * rate, seconds, vocabulary) for devices in many}
            here = []
            for one in entrants:
                records, switches = simulated.serve(one, shots[one.devices], load.caching)
                made = row(DEVICE, load.name, rate, one.name, one.kind, summarise(records, slo), switches)
                here.append(made | {"goodput": made["goodput"] / one.devices, "devices": one.devices})
            print(
                f"\n{load.name} ({part}), {rate:g} times its rate: {len(shots[1])} requests in {seconds:g} s, goodput "
                "of each device (simulated)"
            )
            print(show(here), flush=True)
            rows += here
    return rows


def loads(paths: list[Path]) -> list[Load]:
    found = []
    for path in paths:
        load = recorded(path, simulated.AZURE)
        found.append(recorded(path, simulated.MOONCAKE) if load.caching else load)
    return [*found, changing(simulated.MIXES)]


def _arguments() -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE", help=f"files; the load {CHANGING} is added")
    parser.add_argument("--loads", nargs="+", metavar="NAME", help="only these, such as azure2023_conv or changing")
    parser.add_argument("--only", nargs="+", metavar="POLICY", help="such as auto, 'chunk 256' or split")
    parser.add_argument("--rates", type=float, nargs="+", metavar="X", help="factors of the loads' rates")
    parser.add_argument("--log", action="store_true", help="print every decision")
    virtual = parser.add_argument_group("simulated")
    virtual.add_argument("--seconds", type=float, help="of virtual time; default 300, 30 with --quick")
    virtual.add_argument("--part", choices=("tune", "report", "both"), default="report")
    real = parser.add_argument_group("on this machine's CPU")
    real.add_argument("--cpu", choices=phases_cpu.MODELS, metavar="|".join(phases_cpu.MODELS), help="serve this model")
    real.add_argument("--minutes", type=float, default=15.0, help="about as long does it take (15)")
    real.add_argument("--llama-server", type=Path, metavar="FILE", help="default: the one in the cache")
    real.add_argument("--cache", type=Path, metavar="DIR", help="default: weft-bench in the user's cache")
    return parser.parse_args()


if __name__ == "__main__":
    main()
