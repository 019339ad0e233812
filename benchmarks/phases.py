"""How prefill and decode should share a device: chunks, splits, overlap, turns, PD disaggregation, semi-PD's way, auto.

    python benchmarks/phases.py [TRACE ...] [--quick] [--part report] [--json FILE] [--plot FILE] [--doc FILE]
    python benchmarks/phases.py [TRACE ...] --cpu MODEL ... [--minutes 20] [--json FILE [--resume]] [--plot FILE]
    python benchmarks/phases.py --again JSON [--plot FILE] [--doc FILE]

TRACES: files with arrival_s, input_tokens, output_tokens (CSV), or Mooncake's JSON lines; also .gz. A load whose mix
changes twice, prompt-heavy, generation-heavy and prompt-heavy again, is always there. A request counts when it met both
targets; one that was refused or failed has not.

Without --cpu: the real engine and policies on simulated devices in virtual time; the figures are SIMULATED. The
policies' constants were chosen on the part `tune` of the loads; what is shown is the part `report`, which begins 15
minutes later (other seeds, where the load is drawn). `--part both` adds how the fixed policy does that was best before.

With --cpu: `weft serve`, and llama.cpp's server where it has been built (benchmarks/peers/llama_server.py), over HTTP;
see phases_cpu.py.

--again: nothing is measured; pictures and tables are made of an earlier run's JSON.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import common
import phases_cpu
import phases_simulated as simulated
from paper_common import into_document
from phases_loads import CHANGING, load_all
from phases_tables import (
    Found,
    Row,
    against_best,
    chosen_elsewhere,
    claims,
    documents,
    draw,
    no_room,
    row,
    show,
    told,
)

from weft.bench.stats import summarise


def main() -> None:
    arguments = _arguments()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("weft.partition").setLevel(logging.INFO if arguments.log else logging.ERROR)
    found = _found(arguments)
    for note in found.notes:
        print(note)
    for name, value in found.claims.items():
        print(f"{name} = {value:.3f}")
    shown = _reported(found.rows)
    if arguments.plot is not None:
        draw(shown, arguments.plot, found.targets)
    if arguments.doc is not None:
        into_document(arguments.doc, documents(shown, found.claims))
    if arguments.again is None:
        common.write_json(arguments, found.claims, found.rows, found.notes)


def _found(arguments: argparse.Namespace) -> Found:
    if arguments.again is not None:
        return told(arguments.again)
    found = run_simulated(arguments) if arguments.cpu is None else phases_cpu.run(arguments)
    return replace(found, notes=[*found.notes, *against_best(_reported(found.rows))])


def _reported(rows: list[Row]) -> list[Row]:
    return [one for one in rows if one.get("part", "report") == "report"]


def run_simulated(arguments: argparse.Namespace) -> Found:
    parts = ["tune", "report"] if arguments.part == "both" else [arguments.part]
    found = {part: contest(arguments, part) for part in parts}
    shown = found[parts[-1]]
    notes = [
        f"SIMULATED {name}: {device.cost}, {device.shares} shares, targets TTFT {device.targets.ttft:g} s and TPOT "
        f"{device.targets.tpot:g} s; part {parts[-1]}"
        for name, device in simulated.DEVICES.items()
    ]
    made: dict[str, float] = {}
    if not arguments.only:
        made = claims(shown, "simulated_")
        if len(parts) == 2:
            made |= chosen_elsewhere(found["tune"], shown, "simulated_")
    targets = {
        name: (device.targets.ttft or 0.0, device.targets.tpot or 0.0) for name, device in simulated.DEVICES.items()
    }
    return Found([one | {"part": part} for part in parts for one in found[part]], made, notes + no_room(shown), targets)


def contest(arguments: argparse.Namespace, part: str) -> list[Row]:
    seconds = arguments.seconds or (30.0 if arguments.quick else 120.0)
    rates = arguments.rates or ([1.1] if arguments.quick else [0.8, 1.0, 1.2])
    rows: list[Row] = []
    for device, what in simulated.DEVICES.items():
        entrants = simulated.contestants(what)
        if arguments.only:
            entrants = [one for one in entrants if {one.name, one.kind} & set(arguments.only)]
        for load in load_all(arguments.traces, what.azure, what.mooncake, what.mixes):
            if arguments.loads and load.name not in arguments.loads:
                continue
            for rate in rates:
                asked = {devices: load.make(part, devices * rate, seconds, 0) for devices in (1, 2)}
                here = []
                for one in entrants:
                    records, switches = simulated.serve(one, asked[one.devices], what.targets, load.caching)
                    found = summarise(records, what.targets)
                    made = row(device, load.name, rate, one.name, one.kind, found, switches)
                    each = {"devices": one.devices, "per_second": len(asked[one.devices]) / seconds / one.devices}
                    here.append(made | each | {"goodput": made["goodput"] / one.devices})
                print(
                    f"\n{load.name} ({part}), {rate:g} times its rate, on {device}: {len(asked[1])} requests in "
                    f"{seconds:g} s, goodput of each device (simulated)"
                )
                print(show(here), flush=True)
                rows += here
    return rows


def _arguments() -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE", help=f"files; the load {CHANGING} is added")
    parser.add_argument("--loads", nargs="+", metavar="NAME", help="only these, such as azure2023_conv or changing")
    parser.add_argument("--only", nargs="+", metavar="POLICY", help="such as auto, 'chunk 256' or split")
    parser.add_argument(
        "--rates", type=float, nargs="+", metavar="X", help="factors of the loads' rates, or of those found with --cpu"
    )
    virtual = parser.add_argument_group("simulated")
    virtual.add_argument("--seconds", type=float, help="of virtual time; default 120, 30 with --quick")
    virtual.add_argument("--part", choices=("tune", "report", "both"), default="report")
    virtual.add_argument("--doc", type=Path, metavar="FILE", help="put the tables into this document, too")
    virtual.add_argument("--log", action="store_true", help="print every decision")
    real = parser.add_argument_group("on this machine's CPU")
    models = phases_cpu.MODELS
    real.add_argument("--cpu", nargs="+", choices=models, metavar="MODEL", help=f"serve these: {', '.join(models)}")
    real.add_argument("--minutes", type=float, default=20.0, help="as long does it take at most, about (20)")
    real.add_argument("--resume", action="store_true", help="go on where a run with the same --json was ended")
    real.add_argument("--llama-server", type=Path, metavar="FILE", help="default: the one in the cache")
    real.add_argument("--cache", type=Path, metavar="DIR", help="default: weft-bench in the user's cache")
    parser.add_argument("--again", type=Path, metavar="JSON", help="measure nothing; show what an earlier run wrote")
    arguments = parser.parse_args()
    if arguments.again is not None and (arguments.json is not None or arguments.cpu is not None):
        parser.error("--again measures nothing: --json and --cpu do not go with it")
    if arguments.doc is not None and (arguments.cpu is not None or arguments.only or arguments.loads):
        parser.error("--doc has all of the simulated contest: --cpu, --only and --loads do not go with it")
    return arguments


if __name__ == "__main__":
    main()
