"""semi-PD's figures 12 to 16 beside the same set-ups in weft's simulator, and how much load each way to share bears.

    python benchmarks/paper_semi_pd.py [--quick] [--only SETUP ...] [--json FILE] [--plot FILE] [--doc FILE]
    python benchmarks/paper_semi_pd.py --again JSON [--plot FILE] [--doc FILE]

No GPU is used: every figure of ours is SIMULATED, with the scheduler and the controllers that serve, on the GPU that
the paper measured and, with the same load, on an H100 where the model fits. Lengths are drawn to the datasets' mean
lengths (docs/paper_semi_pd.md says from where); arrivals are Poisson. Rates are those of the paper, for one instance;
PD disaggregation is two instances with twice the requests. The cluster has 8 GPUs with 8 times the rate.

First each set-up at the paper's rates: P90 and P99, the part of the requests within the paper's targets, and the mean
end-to-end latency. Then the highest rate at which 90 % of the requests meet targets made by the paper's rule: 7.5 times
the TTFT and 10 times the TPOT of one request alone, here on the simulated device, because its speed is not that of the
paper's engine.

paper_vs_*: that rate with semi-PD's controller over that with another way, the mean over set-ups. auto_vs_*: the same
for weft's own. best_split_vs_best_chunk: what splitting a device is worth at all; below 1 it does not pay. e2e_*: mean
end-to-end latency of SGLang's way over that of semi-PD's public code, least and most of all rates. h100_*: on the H100.

--again: nothing is simulated; the tables and the picture are made of an earlier run's JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import common
import numpy as np
from paper_common import BLOCK, figures, finish, lengths, markdown, number, parser, setup

from weft.bench.stats import Slo
from weft.bench.traces import Row, Size
from weft.sim.estimate import MEMORY, cost_of
from weft.sim.hardware import find_gpu
from weft.sim.models import find_model
from weft.sim.run import Transfer
from weft.sim.step import StepCost
from weft.sim.study import Fleet, Outcome, study

REQUESTS, QUICK_REQUESTS = 600, 20
CLUSTER_TIMES = 4  # as many requests for the cluster
SEED = 0
ATTAINED = 0.9
STEP = 1.08  # between two rates that the search distinguishes
TIMES_TTFT, TIMES_TPOT = 7.5, 10.0  # of one request alone: the paper's tight targets
NVLINK = 300e9  # bytes/s for KV between two instances
OTHER = "h100"  # simulated beside the paper's GPU
GPUS = {"a100-80": "A100", "a100-40": "A100", "h200": "H200", "h100": "H100"}


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
    """A set-up. gpus: of the whole, if it is more than one instance. stages: of a pipeline, each of so many ranks.
    rates: of the paper, beside those that there are figures of."""

    name: str
    model: str
    gpu: str
    ranks: int
    precision: str
    lengths: Lengths
    gpus: int = 1
    stages: int = 1
    rates: tuple[float, ...] = ()

    @property
    def cost(self) -> StepCost:
        """Of a step through all stages, one after the other."""
        return _cost(self.model, self.gpu, self.ranks, self.precision)

    @property
    def blocks(self) -> int:
        """Of KV that each stage's sequences have."""
        room = MEMORY * self.stages * self.cost.capacity_bytes - self.cost.weight_bytes
        return int(room / (self.stages * self.cost.kv_bytes_per_token * BLOCK))

    def everywhere(self) -> list[Case]:
        """On the paper's GPU, and on the other one if it has room."""
        return [self, *(one for one in [replace(self, gpu=OTHER)] if one.blocks > 0)]


CASES = (
    Case("V2-Lite ShareGPT", "deepseek-v2-lite", "a100-80", 1, "bf16", SHAREGPT, rates=(8, 10, 12)),
    Case("V3 MATH-500", "deepseek-v3", "h200", 8, "fp8", MATH, rates=(8, 10, 12)),
    Case("8B ShareGPT", "llama-3-8b", "a100-80", 1, "fp16", SHAREGPT),
    Case("8B LongBench", "llama-3-8b", "a100-80", 1, "fp16", LONGBENCH),
    Case("70B ShareGPT", "llama-3-70b", "a100-80", 4, "fp16", SHAREGPT),
    Case("70B LongBench", "llama-3-70b", "a100-80", 4, "fp16", LONGBENCH),
    Case("405B ShareGPT", "llama-3.1-405b", "a100-40", 8, "fp16", SHAREGPT, stages=4, rates=(1.5, 3)),
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
SPLITS = tuple(Policy(f"split {split}", split) for split in ("3:9", "6:6", "9:3", "10:2"))
PD = Policy("PD 1:1", prefill=1, replicas=2)
OVERLAP, CODE = Policy("100%:100%", "100%:100%"), Policy("80%:100%", "80%:100%")
PAPER, AUTO = Policy("paper", "paper"), Policy("auto", "auto")
POLICIES = (WHOLE, *CHUNKS, PD, OVERLAP, CODE, *SPLITS, PAPER, AUTO)
CLUSTER = (WHOLE, Policy("PD 2:6", prefill=2, replicas=8), CODE, OVERLAP, AUTO)


@dataclass(frozen=True, slots=True)
class Found:
    """Rows. single: of one request alone. points: of every way at every rate. capacity: the highest rates."""

    single: list[dict[str, Any]]
    points: list[dict[str, Any]]
    capacity: list[dict[str, Any]]
    notes: list[str]


def main() -> None:
    arguments = _arguments()
    paper = figures("semi_pd")
    found = simulate(arguments, paper) if arguments.again is None else told(arguments.again)
    made = claims(found.capacity) | e2e_claims(found.points)
    names = dict.fromkeys(one["setup"] for one in found.points)
    words = {case.name: _words(paper, case) for case in CASES if case.name in names}
    tables = {
        "single": show_singles(found.single),
        "points": show_points(found.points, words),
        "figures": show_figures(found.points),
        "e2e": show_e2e(found.points),
        "capacity": show_capacities(found.capacity),
        "headline": show_headline(paper, made),
    }
    for name, table in tables.items():
        if name != "points":  # which were shown as they came
            print(f"\n**{name}**\n\n{table}")
    if arguments.plot is not None:
        draw(found.capacity, arguments.plot)
    finish(arguments, paper, made, found.single + found.points + found.capacity, tables, found.notes)


def simulate(arguments: argparse.Namespace, paper: dict[str, Any]) -> Found:
    count = arguments.requests or (QUICK_REQUESTS if arguments.quick else REQUESTS)
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only]
    rows: list[dict[str, Any]] = []
    for case in cases:
        known = [one for one in paper["figures"] if one["setup"] == case.name]
        for rate in sorted({one["rate"] for one in known} | set(case.rates)):
            there = [one for one in known if one["rate"] == rate]
            here = [row for one in case.everywhere() for row in points(one, rate, _slo(paper, one), count, there)]
            print(f"\n**{case.name}, {rate:g} requests/s**\n\n{show(here)}", flush=True)
            rows += here
    searched = [one for case in cases if case.name in paper["targets"] for one in case.everywhere()]
    found = [one for case in searched for one in capacities(case, count)]
    notes = [f"{count} requests a run, {CLUSTER_TIMES * count} of the cluster; seed {SEED}"]
    return Found(list(singles(paper, cases)), rows, found, notes)


def told(path: Path) -> Found:
    """What the JSON of an earlier run says."""
    content = json.loads(path.read_text())
    found = Found([], [], [], content["notes"][-1:])  # finish() puts the others before it
    for one in content["rows"]:
        (found.capacity if "kind" in one else found.points if "policy" in one else found.single).append(one)
    return found


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
    instances = policy.replicas if policy.prefill else case.gpus
    due, sizes = requests(case.lengths, count * (CLUSTER_TIMES if case.gpus > 1 else 1))
    traffic: list[Row] = [(at / (rate * instances), size) for at, size in zip(due, sizes, strict=True)]
    more: dict[str, Any] = {"num_blocks": case.blocks, "partition": policy.partition}
    if policy.partition in ("auto", "paper"):
        more |= {"slo_ttft": slo.ttft, "slo_tpot": slo.tpot}
    made = setup(case.cost, tokens=policy.tokens, **more)
    transfer = Transfer(case.cost.kv_bytes_per_token, NVLINK) if policy.prefill else None
    # While one step is in one stage, others are in the next ones: as many replicas, each a step from end to end.
    replicas, prefill = instances * case.stages, policy.prefill * case.stages
    router = "least-loaded" if case.gpus > 1 or case.stages > 1 else "round-robin"
    return study(Fleet(made, replicas, router, prefill=prefill, transfer=transfer), traffic, slo)


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
        theirs = paper["targets"].get(case.name)
        if theirs is not None:
            for one in case.everywhere():
                ours = alone(one)
                yield {
                    "setup": case.name, "gpu": one.gpu, "ttft_alone": 1e3 * (ours.ttft or 0.0) / TIMES_TTFT,
                    "tpot_alone": 1e3 * (ours.tpot or 0.0) / TIMES_TPOT,
                    "theirs_ttft_alone": 1e3 * theirs[0] / TIMES_TTFT,
                    "theirs_tpot_alone": 1e3 * theirs[1] / TIMES_TPOT,
                }  # fmt: skip


def show_singles(rows: Sequence[dict[str, Any]]) -> str:
    made = []
    for name, here in _groups(rows, "setup").items():
        first, cells = here[0], [name]
        for field in ("ttft_alone", "tpot_alone"):
            cells += [number(first[f"theirs_{field}"], 0), _beside([one[field] for one in here], 0)]
        made.append(cells)
    return markdown(["set-up", "TTFT ms: theirs", "ours", "TPOT ms: theirs", "ours"], made)


def _groups(rows: Sequence[dict[str, Any]], *fields: str) -> dict[Any, list[dict[str, Any]]]:
    """The rows of each value of a field, or of several, in their order."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for one in rows:
        key = tuple(one[field] for field in fields)
        found.setdefault(key[0] if len(key) == 1 else key, []).append(one)
    return found


def _beside(values: Sequence[float], digits: int) -> str:
    """On the paper's GPU, and on the other one."""
    return " / ".join(number(value, digits) for value in values)


def points(case: Case, rate: float, slo: Slo, count: int, theirs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every way at one rate. best: of the chunks, and of the splits."""
    found = {}
    for policy in CLUSTER if case.gpus > 1 else POLICIES:
        common.say(f"{case.name}, {rate:g}/s, {case.gpu}, {policy.name}")
        found[policy.name] = run(case, policy, rate, slo, count).totals
    named = {one["policy"]: one for one in theirs}

    def worth(name: str) -> tuple[float, float]:
        one = found[name]
        return one.attainment, -max(one.ttft.p90 / (slo.ttft or 1.0), one.tpot.p90 / (slo.tpot or 1.0))

    best = {max((one.name for one in kind), key=worth) for kind in (CHUNKS, SPLITS) if kind[0].name in found}
    for name, one in found.items():
        paper = named.get(name, {})
        yield {
            "setup": case.name, "gpu": case.gpu, "rate": rate, "policy": name, "best": name in best,
            "requests": one.completed + one.failed,
            "system": paper.get("system"), "ttft_p90": 1e3 * one.ttft.p90, "ttft_p99": 1e3 * one.ttft.p99,
            "tpot_p90": 1e3 * one.tpot.p90, "tpot_p99": 1e3 * one.tpot.p99, "attainment": one.attainment,
            "e2e_mean": one.e2e.mean,
            "theirs": {key: paper[key] for key in FIELDS if key in paper},
        }  # fmt: skip


# Of a table's columns: what is above them, and digits.
FIELDS = {
    "ttft_p90": ("TTFT P90 ms", 0), "ttft_p99": ("TTFT P99", 0), "tpot_p90": ("TPOT P90", 0),
    "tpot_p99": ("TPOT P99", 0), "attainment": ("in targets", 2),
}  # fmt: skip
_SEVERAL = {one.name for kind in (CHUNKS, SPLITS) for one in kind}


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Of one rate. Of chunks and splits only those that the paper has, and the best of each kind."""
    head = ["way", "theirs is"]
    for words, _ in FIELDS.values():
        head += [f"{words}: theirs", "ours"]
    made = []
    for name, here in _groups(rows, "policy").items():
        best = [GPUS[one["gpu"]] for one in here if one["best"]]
        if name in _SEVERAL and not best and here[0]["system"] is None:
            continue
        words = "" if not best else " (best)" if len(best) == len(here) else f" (best on {best[0]})"
        made.append([name + words, here[0]["system"] or "-", *_cells(here), _beside([o["e2e_mean"] for o in here], 2)])
    return markdown([*head, "mean E2E s: ours"], made)


def _cells(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of one way: each figure of the paper, and ours."""
    cells = []
    for field, (_, digits) in FIELDS.items():
        cells += [number(rows[0]["theirs"].get(field), digits), _beside([one[field] for one in rows], digits)]
    return cells


def show_points(rows: Sequence[dict[str, Any]], words: dict[str, str]) -> str:
    """Every rate, folded up by set-up. words: what is said of each."""
    made = []
    for name, here in _groups(rows, "setup").items():
        made.append(f"<details><summary>{name}: {words[name]}</summary>\n")
        for rate, group in _groups(here, "rate").items():
            made.append(f"**{rate:g} requests/s**\n\n{show(group)}\n")
        made.append("</details>\n")
    return "\n" + "\n".join(made)


def show_figures(rows: Sequence[dict[str, Any]]) -> str:
    """Only what the paper has figures of."""
    head = ["set-up", "requests/s", "theirs is", "here"]
    for words, _ in FIELDS.values():
        head += [f"{words}: theirs", "ours"]
    made = []
    for (name, rate, policy), here in _groups(rows, "setup", "rate", "policy").items():
        if here[0]["theirs"]:
            cells = _cells(here)
            pairs = zip(cells[::2], cells[1::2], strict=True)
            shown = [cell for theirs, ours in pairs for cell in (theirs, "-" if theirs == "-" else ours)]
            made.append([name, f"{rate:g}", here[0]["system"], policy, *shown])
    return markdown(head, made)


E2E_WAYS = (WHOLE, CODE, OVERLAP, PAPER, AUTO)


def _gains(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float, str, float]]:
    """Set-up, rate, GPU: mean end-to-end latency of SGLang's way over that of semi-PD's public code."""
    for (name, rate, gpu), here in _groups(rows, "setup", "rate", "gpu").items():
        by = {one["policy"]: one["e2e_mean"] for one in here}
        yield name, rate, gpu, by[WHOLE.name] / by[CODE.name]


def show_e2e(rows: Sequence[dict[str, Any]]) -> str:
    gains: dict[tuple[str, float], list[float]] = {}
    for name, rate, _, gain in _gains(rows):
        gains.setdefault((name, rate), []).append(gain)
    known = _groups(rows, "setup", "rate", "policy")
    made = []
    for (name, rate), found in gains.items():
        each = [known.get((name, rate, way.name), []) for way in E2E_WAYS]  # the cluster has not all of them
        here = [_beside([one["e2e_mean"] for one in those], 2) if those else "-" for those in each]
        made.append([name, f"{rate:g}", *here, _beside(found, 2)])
    ways = [way.name for way in E2E_WAYS]
    return markdown(["set-up", "requests/s", *ways, f"{WHOLE.name} over {CODE.name}"], made)


def e2e_claims(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of the set-ups in which the paper has SGLang."""
    setups = {one["setup"] for one in rows if one["system"] == "SGLang"}
    found: dict[str, list[float]] = {}
    for name, _, gpu, gain in _gains([one for one in rows if one["setup"] in setups]):
        found.setdefault(_prefix(gpu) + f"e2e_{_word(name.split()[0])}", []).append(gain)
    return {
        f"{name}_{word}": of(values) for name, values in found.items() for word, of in (("least", min), ("most", max))
    }


def _prefix(gpu: str) -> str:
    return f"{OTHER}_" if gpu == OTHER else ""


def show_headline(paper: dict[str, Any], made: dict[str, float]) -> str:
    """The ratios that the paper begins with."""

    def ours(*names: str) -> list[str]:
        known = [[made.get(prefix + name) for name in names] for prefix in ("", f"{OTHER}_")]
        return ["–".join(number(value) for value in one) if None not in one else "-" for one in known]

    lines = []
    for name, theirs in paper["e2e"].items():
        word = f"e2e_{_word(name.split()[0])}"
        what = f"mean end-to-end latency of SGLang over semi-PD, {name}, by rate"
        lines.append([what, "–".join(map(number, theirs)), *ours(f"{word}_least", f"{word}_most")])
    for way, theirs in paper["capacity"].items():
        what = f"highest rate of semi-PD over that of {way}, mean of {len(paper['targets'])} set-ups"
        lines.append([what, number(theirs), *ours(f"paper_vs_{_word(way)}")])
    return markdown(["", "theirs", "ours", f"ours, {GPUS[OTHER]}"], lines)


def capacities(case: Case, count: int) -> Iterator[dict[str, Any]]:
    """The highest rate of every way, and of the best chunk and the best split, which are looked for among more."""
    slo = alone(case)
    chunks = tuple(Policy(f"chunk {tokens}", tokens=tokens) for tokens in (256, 512, 2048))
    splits = tuple(Policy(f"split {part}:{12 - part}", f"{part}:{12 - part}") for part in (9, 4, 6, 8, 10))
    start = 1.0 / (case.cost.whole([round(case.lengths.prompt[0])], [0], 1) * 4)
    found: dict[str, float] = {}
    for policy in (WHOLE, CHUNK, PD, OVERLAP, CODE, PAPER, AUTO):
        common.say(f"{case.name}, {case.gpu}, highest rate, {policy.name}")
        start = found[policy.name] = highest(partial(attained, case, policy, slo, count), start)
        yield _capacity(case, slo, policy.name, policy.name, found[policy.name])
    for kind, members, known in (("best chunk", chunks, (CHUNK, WHOLE)), ("best split", splits, ())):
        rate, name = max(((found[one.name], one.name) for one in known), default=(0.0, ""))
        for one in members:
            common.say(f"{case.name}, {case.gpu}, highest rate, {one.name}")
            bears = partial(attained, case, one, slo, count)
            if not rate:
                rate, name = highest(bears, found[CHUNK.name]), one.name
            elif bears(rate * STEP):
                rate, name = highest(bears, rate * STEP), one.name
        yield _capacity(case, slo, kind, name, rate)


def _capacity(case: Case, slo: Slo, kind: str, policy: str, rate: float) -> dict[str, Any]:
    return {
        "setup": case.name, "gpu": case.gpu, "kind": kind, "policy": policy, "capacity": rate,
        "target_ttft_ms": 1e3 * (slo.ttft or 0), "target_tpot_ms": 1e3 * (slo.tpot or 0),
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
    for (name, gpu), group in _groups(found, "setup", "gpu").items():
        here = {one["kind"]: one for one in group}
        targets = f"{group[0]['target_ttft_ms']:.0f} / {group[0]['target_tpot_ms']:.0f} ms"
        cells = [f"{name}, {GPUS[gpu]} ({targets})"]
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
    """Means over set-ups; those of the other GPU apart."""
    others = ("whole prompts", "chunk 1024", "best chunk", "PD 1:1", "100%:100%", "best split")
    pairs = {f"{one}_vs_{_word(other)}": (one, other) for one in ("paper", "auto") for other in others}
    pairs["best_split_vs_best_chunk"] = "best split", "best chunk"
    made = {}
    for prefix, here in _groups([one | {"prefix": _prefix(one["gpu"])} for one in found], "prefix").items():
        for name, (one, other) in pairs.items():
            if values := ratios(here, one, other):
                made[prefix + name] = float(np.mean(values))
    return made


def _word(name: str) -> str:
    return name.replace("%", "").replace(":", "_").replace(" ", "_").replace("-", "_").lower()


def _words(paper: dict[str, Any], case: Case) -> str:
    """The GPUs and the targets of a set-up."""
    made = []
    for one in case.everywhere():
        slo, count = _slo(paper, one), one.gpus * one.ranks * one.stages
        targets = f"TTFT {1e3 * (slo.ttft or 0):.0f} ms, TPOT {1e3 * (slo.tpot or 0):.0f} ms"
        made.append(f"{f'{count} ' if count > 1 else ''}{GPUS[one.gpu]}, targets {targets}")
    return "; ".join(made)


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one["setup"] for one in found))
    gpus = list(dict.fromkeys(one["gpu"] for one in found))
    figure = Figure(figsize=(3.2 * len(names), 5), layout="constrained")
    panels: Any = figure.subplots(1, len(names), squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        for place, gpu in enumerate(gpus):
            here = [one for one in found if (one["setup"], one["gpu"]) == (name, gpu)]
            at = np.arange(len(here)) + 0.4 * place
            axes.barh(at, [one["capacity"] for one in here], 0.4, label=GPUS[gpu])
        kinds = [one["kind"] for one in found if (one["setup"], one["gpu"]) == (name, gpus[0])]
        axes.set_yticks(np.arange(len(kinds)) + 0.2 * (len(gpus) - 1), kinds)
        axes.invert_yaxis()
        axes.set(title=name, xlabel="requests/s (simulated)")
    panels[0, -1].legend()
    figure.savefig(path, dpi=90)


def _arguments() -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    made.add_argument("--only", nargs="+", choices=names, metavar="SETUP", help=f"of {', '.join(names)}")
    made.add_argument("--requests", type=int, metavar="N", help=f"of each run ({REQUESTS}; {QUICK_REQUESTS} quick)")
    made.add_argument("--again", type=Path, metavar="JSON", help="simulate nothing; show what an earlier run wrote")
    arguments = made.parse_args()
    if arguments.again is not None and arguments.json is not None:
        made.error("--again simulates nothing: --json does not go with it")
    return arguments


if __name__ == "__main__":
    main()
