"""semi-PD's figures 12 to 16 beside the same set-ups in weft's simulator, and how much load each way to share bears.

    python benchmarks/paper_semi_pd.py [--quick] [--only SETUP ...] [--json FILE] [--plot FILE] [--doc FILE]

No GPU is used: every figure of ours is SIMULATED, with the scheduler and the controllers that serve. Lengths are drawn
to the datasets' mean lengths (docs/paper_semi_pd.md says from where); arrivals are Poisson. Rates are those of the
paper, for one instance; PD disaggregation is two instances with twice the requests. The cluster has 8 GPUs with 8 times
the rate.

First each set-up at the paper's rates: P90 and P99, and the part of the requests within the paper's targets. Then the
highest rate at which 90 % of the requests meet targets made by the paper's rule: 7.5 times the TTFT and 10 times the
TPOT of one request alone, here on the simulated device, because its speed is not that of the paper's engine.

paper_vs_*: that rate with semi-PD's controller over that with another way, the mean over set-ups (the paper prints 1.55
against chunks of 1024, 1.72 against whole prompts, 1.62 against PD, 1.11 against 100%:100%). auto_vs_*: the same for
weft's own. best_split_vs_best_chunk: what splitting a device is worth at all; below 1 it does not pay.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import common
import numpy as np
from paper_common import figures, finish, lengths, markdown, number, parser, setup

from weft.bench.stats import Slo
from weft.bench.traces import Row, Size
from weft.sim.estimate import cost_of
from weft.sim.hardware import find_gpu
from weft.sim.models import find_model
from weft.sim.run import Transfer
from weft.sim.step import StepCost
from weft.sim.study import Fleet, Outcome, study

REQUESTS, QUICK_REQUESTS = 600, 40
CLUSTER_TIMES = 4  # as many requests for the cluster
SEED = 0
ATTAINED = 0.9
STEP = 1.08  # between two rates that the search distinguishes
TIMES_TTFT, TIMES_TPOT = 7.5, 10.0  # of one request alone: the paper's tight targets
NVLINK = 300e9  # bytes/s for KV between two instances


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean, spread and the longest, of prompts and of answers. long: every so many-th prompt has 4000 tokens."""

    prompt: tuple[float, float, int]
    answer: tuple[float, float, int]
    long: int = 0


SHAREGPT = Lengths((251, 1.5, 1024), (198, 1.0, 1024))
LONGBENCH = Lengths((1738, 0.6, 8000), (91, 0.8, 1024))
MATH = Lengths((90, 0.6, 1024), (200, 0.7, 1024))
MIXED = Lengths(SHAREGPT.prompt, SHAREGPT.answer, 20)


@dataclass(frozen=True, slots=True)
class Case:
    """A set-up. gpus: of the whole, if it is more than one instance."""

    name: str
    model: str
    gpu: str
    ranks: int
    precision: str
    lengths: Lengths
    gpus: int = 1

    @property
    def cost(self) -> StepCost:
        return _cost(self.model, self.gpu, self.ranks, self.precision)


CASES = (
    Case("V2-Lite ShareGPT", "deepseek-v2-lite", "a100-80", 1, "bf16", SHAREGPT),
    Case("V3 MATH-500", "deepseek-v3", "h200", 8, "fp8", MATH),
    Case("8B ShareGPT", "llama-3-8b", "a100-80", 1, "fp16", SHAREGPT),
    Case("8B LongBench", "llama-3-8b", "a100-80", 1, "fp16", LONGBENCH),
    Case("70B ShareGPT", "llama-3-70b", "a100-80", 4, "fp16", SHAREGPT),
    Case("70B LongBench", "llama-3-70b", "a100-80", 4, "fp16", LONGBENCH),
    Case("cluster", "deepseek-v2-lite", "a100-80", 1, "bf16", MIXED, gpus=8),
)


@dataclass(frozen=True, slots=True)
class Policy:
    """tokens: most of a step. prefill: replicas that only prefill, of `replicas` for one instance's rate each."""

    name: str
    partition: str = "off"
    tokens: int = 8192
    prefill: int = 0
    replicas: int = 1


WHOLE, CHUNK = Policy("whole prompts"), Policy("chunk 1024", tokens=1024)
CHUNKS = (CHUNK, *(Policy(f"chunk {tokens}", tokens=tokens) for tokens in (512, 2048)))
SPLITS = tuple(Policy(f"split {split}", split) for split in ("3:9", "6:6", "9:3"))
PD = Policy("PD 1:1", prefill=1, replicas=2)
OVERLAP, CODE = Policy("100%:100%", "100%:100%"), Policy("80%:100%", "80%:100%")
PAPER, AUTO = Policy("paper", "paper"), Policy("auto", "auto")
POLICIES = (WHOLE, *CHUNKS, PD, OVERLAP, CODE, *SPLITS, PAPER, AUTO)
CLUSTER = (WHOLE, Policy("PD 2:6", prefill=2, replicas=8), CODE, OVERLAP, AUTO)


def main() -> None:
    arguments = _arguments()
    paper = figures("semi_pd")
    count = arguments.requests or (QUICK_REQUESTS if arguments.quick else REQUESTS)
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only]
    single = list(singles(paper, cases))
    tables = {"single": show_singles(single), "points": "", "capacity": ""}
    print(f"**One request alone**\n\n{tables['single']}")
    rows: list[dict[str, Any]] = []
    for case in cases:
        known = [one for one in paper["figures"] if one["setup"] == case.name]
        for rate in sorted({one["rate"] for one in known}):
            targets = _slo(paper, case)
            here = list(points(case, rate, targets, count, [one for one in known if one["rate"] == rate]))
            table = f"\n**{case.name}, {rate:g} requests/s**, {_words(targets)}\n\n{show(here)}\n"
            print(table, flush=True)
            tables["points"] += table
            rows += here
    found = [one for case in cases if case.name in paper["targets"] for one in capacities(case, count)]
    tables["capacity"] = show_capacities(found)
    print(f"\n**Highest rate with {ATTAINED:.0%} within targets**\n\n{tables['capacity']}")
    if arguments.plot is not None:
        draw(found, arguments.plot)
    notes = [f"{count} requests a run, {CLUSTER_TIMES * count} of the cluster; seed {SEED}"]
    finish(arguments, paper, claims(found), single + rows + found, tables, notes)


@cache
def _cost(model: str, gpu: str, ranks: int, precision: str) -> StepCost:
    return cost_of(find_model(model), find_gpu(gpu), ranks, precision)


@cache
def requests(load: Lengths, count: int) -> tuple[tuple[float, ...], tuple[Size, ...]]:
    """Arrivals at one request a second, and sizes: the same for every rate and policy."""
    rng = np.random.default_rng(SEED)
    due = np.cumsum(rng.standard_exponential(count)).tolist()
    read, written = (lengths(*shape, rng.standard_normal(count).tolist()) for shape in (load.prompt, load.answer))
    if load.long:
        read = [4000 if at % load.long == 0 else tokens for at, tokens in enumerate(read)]
    return tuple(due), tuple(map(Size, read, written))


def run(case: Case, policy: Policy, rate: float, slo: Slo, count: int) -> Outcome:
    """rate: for one instance."""
    replicas = policy.replicas if policy.prefill else case.gpus
    due, sizes = requests(case.lengths, count * (CLUSTER_TIMES if case.gpus > 1 else 1))
    traffic: list[Row] = [(at / (rate * replicas), size) for at, size in zip(due, sizes, strict=True)]
    targets = {"slo_ttft": slo.ttft, "slo_tpot": slo.tpot} if policy.partition in ("auto", "paper") else {}
    made = setup(case.cost, tokens=policy.tokens, partition=policy.partition, **targets)
    transfer = Transfer(case.cost.kv_bytes_per_token, NVLINK) if policy.prefill else None
    router = "least-loaded" if case.gpus > 1 else "round-robin"
    return study(Fleet(made, replicas, router, prefill=policy.prefill, transfer=transfer), traffic, slo)


def alone(case: Case) -> Slo:
    """The paper's rule: multiples of one request of mean length on the idle device."""
    prompt, answer = round(case.lengths.prompt[0]), round(case.lengths.answer[0])
    ttft = case.cost.whole([prompt], [0], 1)
    tpot = case.cost.whole([1], [prompt + answer // 2], 1)
    return Slo(TIMES_TTFT * ttft, TIMES_TPOT * tpot)


def _slo(paper: dict[str, Any], case: Case) -> Slo:
    known = paper["targets"].get(case.name)
    return alone(case) if known is None else Slo(*known)


def singles(paper: dict[str, Any], cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """What the paper's targets say of one request alone, by its rule, and what the simulator says. Milliseconds."""
    for case in cases:
        ours, theirs = alone(case), paper["targets"].get(case.name)
        if theirs is not None:
            yield {
                "setup": case.name, "ttft_alone": 1e3 * (ours.ttft or 0.0) / TIMES_TTFT,
                "tpot_alone": 1e3 * (ours.tpot or 0.0) / TIMES_TPOT, "theirs_ttft_alone": 1e3 * theirs[0] / TIMES_TTFT,
                "theirs_tpot_alone": 1e3 * theirs[1] / TIMES_TPOT,
            }  # fmt: skip


def show_singles(rows: Sequence[dict[str, Any]]) -> str:
    fields = ("theirs_ttft_alone", "ttft_alone", "theirs_tpot_alone", "tpot_alone")
    head = ("set-up", "TTFT ms: theirs", "ours", "TPOT ms: theirs", "ours")
    return markdown(head, [[one["setup"], *(number(one[field], 0) for field in fields)] for one in rows])


def points(case: Case, rate: float, slo: Slo, count: int, theirs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every way at one rate. Of chunks and splits only those that the paper has, and the best of each kind."""
    found = {}
    for policy in CLUSTER if case.gpus > 1 else POLICIES:
        common.say(f"{case.name}, {rate:g}/s, {policy.name}")
        found[policy.name] = run(case, policy, rate, slo, count).totals
    named = {one["policy"]: one for one in theirs}

    def worth(name: str) -> tuple[float, float]:
        one = found[name]
        return one.attainment, -max(one.ttft.p90 / (slo.ttft or 1.0), one.tpot.p90 / (slo.tpot or 1.0))

    best = {max((one.name for one in kind), key=worth) for kind in (CHUNKS, SPLITS) if kind[0].name in found}
    members = {one.name for kind in (CHUNKS, SPLITS) for one in kind}
    for name, one in found.items():
        if name in members and name not in best and name not in named:
            continue
        paper = named.get(name, {})
        yield {
            "setup": case.name, "rate": rate, "policy": name, "best": name in best,
            "requests": one.completed + one.failed,
            "system": paper.get("system"), "ttft_p90": 1e3 * one.ttft.p90, "ttft_p99": 1e3 * one.ttft.p99,
            "tpot_p90": 1e3 * one.tpot.p90, "tpot_p99": 1e3 * one.tpot.p99, "attainment": one.attainment,
            "theirs": {key: paper.get(key) for key in FIELDS},
        }  # fmt: skip


FIELDS = ("ttft_p90", "ttft_p99", "tpot_p90", "tpot_p99", "attainment")


def show(rows: Sequence[dict[str, Any]]) -> str:
    head = ["way", "theirs is"]
    for words in ("TTFT P90 ms", "TTFT P99", "TPOT P90", "TPOT P99", "in targets"):
        head += [f"{words}: theirs", "ours"]
    made = []
    for one in rows:
        cells = [one["policy"] + (" (best)" if one["best"] else ""), one["system"] or "-"]
        for field in FIELDS:
            digits = 2 if field == "attainment" else 0
            cells += [number(one["theirs"][field], digits), number(one[field], digits)]
        made.append(cells)
    return markdown(head, made)


def capacities(case: Case, count: int) -> Iterator[dict[str, Any]]:
    """The highest rate of every way, and of the best chunk and the best split, which are looked for among more."""
    slo = alone(case)
    chunks = tuple(Policy(f"chunk {tokens}", tokens=tokens) for tokens in (256, 512, 2048))
    splits = tuple(Policy(f"split {part}:{12 - part}", f"{part}:{12 - part}") for part in (9, 4, 6, 8, 10))
    start = 1.0 / (case.cost.whole([round(case.lengths.prompt[0])], [0], 1) * 4)
    found: dict[str, float] = {}
    for policy in (WHOLE, CHUNK, PD, OVERLAP, CODE, PAPER, AUTO):
        common.say(f"{case.name}, highest rate, {policy.name}")
        start = found[policy.name] = highest(partial(attained, case, policy, slo, count), start)
        yield _capacity(case, slo, policy.name, policy.name, found[policy.name])
    for kind, members, known in (("best chunk", chunks, (CHUNK, WHOLE)), ("best split", splits, ())):
        rate, name = max(((found[one.name], one.name) for one in known), default=(0.0, ""))
        for one in members:
            common.say(f"{case.name}, highest rate, {one.name}")
            bears = partial(attained, case, one, slo, count)
            if not rate:
                rate, name = highest(bears, found[CHUNK.name]), one.name
            elif bears(rate * STEP):
                rate, name = highest(bears, rate * STEP), one.name
        yield _capacity(case, slo, kind, name, rate)


def _capacity(case: Case, slo: Slo, kind: str, policy: str, rate: float) -> dict[str, Any]:
    return {
        "setup": case.name, "kind": kind, "policy": policy, "capacity": rate, "target_ttft_ms": 1e3 * (slo.ttft or 0),
        "target_tpot_ms": 1e3 * (slo.tpot or 0),
    }  # fmt: skip


def attained(case: Case, policy: Policy, slo: Slo, count: int, rate: float) -> bool:
    return run(case, policy, rate, slo, count).totals.attainment >= ATTAINED


def highest(bears: Callable[[float], bool], start: float) -> float:
    """The highest rate start * STEP**n that is borne, if none below one that is borne is not. 0 below start / 1000."""
    least = -round(np.log(1000) / np.log(STEP))
    low, high = (0, None) if bears(start) else (None, 0)
    reach = 1
    while low is None or high is None:
        if low is None:
            if high is not None and high <= least:
                return 0.0
            at = (high or 0) - reach
            low, high = (at, high) if bears(start * STEP**at) else (None, at)
        else:
            at = low + reach
            low, high = (at, None) if bears(start * STEP**at) else (low, at)
        reach *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bears(start * STEP**middle) else (low, middle)
    return float(start * STEP**low)


def show_capacities(found: Sequence[dict[str, Any]]) -> str:
    kinds = list(dict.fromkeys(one["kind"] for one in found))
    made = []
    for name, group in itertools.groupby(found, key=lambda one: one["setup"]):
        here = {one["kind"]: one for one in group}
        first = next(iter(here.values()))
        cells = [f"{name} ({first['target_ttft_ms']:.0f} / {first['target_tpot_ms']:.0f} ms)"]
        for kind in kinds:
            one = here[kind]
            cells.append(number(one["capacity"], 1) + (f" ({one['policy']})" if "best" in kind else ""))
        made.append(cells)
    return markdown(["set-up (TTFT / TPOT target)", *kinds], made)


def ratios(found: Sequence[dict[str, Any]], one: str, other: str) -> list[float]:
    by = {(each["setup"], each["kind"]): each["capacity"] for each in found}
    return [
        rate / by[name, other] for (name, kind), rate in by.items() if kind == one and by.get((name, other), 0.0) > 0
    ]


def claims(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    made = {}
    for one in ("paper", "auto"):
        for other in ("whole prompts", "chunk 1024", "best chunk", "PD 1:1", "100%:100%", "best split"):
            values = ratios(found, one, other)
            if values:
                made[f"{one}_vs_{_word(other)}"] = float(np.mean(values))
    values = ratios(found, "best split", "best chunk")
    return made | ({"best_split_vs_best_chunk": float(np.mean(values))} if values else {})


def _word(name: str) -> str:
    return name.replace("%", "").replace(":", "_").replace(" ", "_").lower()


def _words(slo: Slo) -> str:
    return f"targets TTFT {1e3 * (slo.ttft or 0):.0f} ms, TPOT {1e3 * (slo.tpot or 0):.0f} ms"


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one["setup"] for one in found))
    figure = Figure(figsize=(3.2 * len(names), 4), layout="constrained")
    panels: Any = figure.subplots(1, len(names), squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        here = [one for one in found if one["setup"] == name]
        axes.barh([one["kind"] for one in here], [one["capacity"] for one in here])
        axes.invert_yaxis()
        axes.set(title=name, xlabel="requests/s (simulated)")
    figure.savefig(path, dpi=90)


def _arguments() -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    made.add_argument("--only", nargs="+", choices=names, metavar="SETUP", help=f"of {', '.join(names)}")
    made.add_argument("--requests", type=int, metavar="N", help=f"of each run ({REQUESTS}; {QUICK_REQUESTS} quick)")
    return made.parse_args()


if __name__ == "__main__":
    main()
