"""weft against transformers and llama.cpp on this CPU: BF16, all cores, interleaved in one run.

    python benchmarks/serve_cpu.py [--quick] [--models builtin,llama-1.1b] [--llama-python PATH] [--json FILE]

Each contestant is a process that has its engine loaded and answers one question at a time; for every case of every
round they take turns, in an order that rotates, on the same random token ids. Greedy, no prefix cache, no stop tokens.

* prefill: 512 tokens in, one out; input tokens over the time to that one.
* decode: 16 in, 128 out; (output tokens - 1) over the time from the first to the last.
* batch8, batch16: so many prompts of 128 tokens at once, 128 out each; all output tokens over the whole time.

A figure is a median over rounds with [least..greatest]; a ratio is the median of the rounds' own ratios. A round is
steady when the machine's probed limits before and after it agree within a fifth; where five rounds are steady, only
these count. Before the rounds, the engines' log-probabilities are compared: they must be running the same model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import peer_models

import models

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
import contestant as peers
import environments
from contestant import Contestant

ROUNDS = 5
SPARE_ROUNDS = 3
STEADY = 0.8  # least ratio of a limit before and after a round
SEQUENCES = 16
SCORED = 64
CACHED_BYTES = 64 * 2**20
SAME_MODEL = 0.1  # greatest mean difference of log-probabilities between engines that run one model in BF16
FIRST_ID = 16
EVERYBODY = ("weft", "transformers", "llama.cpp")
CLAIMS = {
    "decode_vs_llamacpp": ("decode", "llama.cpp"),
    "decode_vs_transformers": ("decode", "transformers"),
    "prefill_vs_llamacpp": ("prefill", "llama.cpp"),
    "batch16_vs_llamacpp": ("batch16", "llama.cpp"),
    "batch16_vs_transformers": ("batch16", "transformers"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked: `prompts` prompts of `input` tokens, `output` tokens each."""

    name: str
    prompts: int
    input: int
    output: int

    def rate(self, answer: dict[str, Any]) -> float:
        """Tokens per second, by the case's own definition."""
        if self.output == 1:
            return self.input / float(answer["first"])
        if self.prompts == 1:
            return (self.output - 1) / float(answer["last"] - answer["first"])
        return self.prompts * self.output / float(answer["seconds"])

    def limit(self, shape: models.Shape, bandwidth: float, flops: float) -> float:
        """The same figure for an engine that only reads the weights (BF16) and only multiplies, both at full rate.

        A model that fits the CPU's caches need not be read from memory, so only the arithmetic limits it.
        """
        prefill = 2 * self.prompts * (self.input * shape.body + shape.head) / flops
        weights = shape.body + shape.head
        reading = 2 * weights / bandwidth if 2 * weights > CACHED_BYTES else 0.0
        step = max(reading, 2 * weights * self.prompts / flops)
        if self.output == 1:
            return self.input / max(prefill, reading)
        if self.prompts == 1:
            return 1 / step
        return self.prompts * self.output / (prefill + (self.output - 1) * step)


CASES = (
    Case("prefill", 1, 512, 1),
    Case("decode", 1, 16, 128),
    Case("batch8", 8, 128, 128),
    Case("batch16", 16, 128, 128),
)


@dataclass(slots=True)
class Round:
    """rates: (case, contestant) -> tokens/s. before, after: what the limits probe answered."""

    before: dict[str, float]
    after: dict[str, float] = field(default_factory=dict)
    rates: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def steady(self) -> bool:
        pairs = ((self.before[name], self.after[name]) for name in ("bandwidth", "bf16"))
        return all(min(pair) >= STEADY * max(pair) for pair in pairs)


def main() -> None:
    arguments = _arguments()
    cache = common.cache_folder(arguments.cache)
    pythons = {
        "llama.cpp": environments.find("llamacpp", arguments.llama_python, cache),
        "transformers": environments.find("transformers", arguments.transformers_python, cache),
    }
    rows: list[dict[str, Any]] = []
    claims: dict[str, float] = {}
    notes = [
        f"{name} is missing; set it up with: python benchmarks/peers/environments.py {name.replace('.', '')}"
        for name, python in pythons.items()
        if python is None and name in arguments.contestants
    ]
    for model in arguments.models:
        watch = common.LoadWatch()
        folder = models.builtin() if model == "builtin" else models.random_llama(cache)
        found, agreement = _measure(arguments, model, folder, pythons, cache)
        kept, note = _kept(found, arguments.rounds)
        notes += [f"{model}: {words}" for words in (note, common.load_note(watch)) if words]
        rows += _rows(model, models.Shape.of(folder), kept) + agreement
        print(_table(model, rows))
        prefix = "" if model == "llama-1.1b" else f"{model}_"
        claims |= {prefix + name: value for name, value in _claims(kept).items()}
    if arguments.plot is not None:
        _plot(rows, arguments.plot)
    common.report(arguments, claims, rows, notes)


def _measure(
    arguments: argparse.Namespace, model: str, folder: Path, pythons: dict[str, Path | None], cache: Path
) -> tuple[list[Round], list[dict[str, Any]]]:
    """Load everybody, compare what they compute, and run the rounds."""
    with ExitStack() as stack:
        limits = stack.enter_context(peers.limits(cache / "limits.log"))
        loaded = [
            stack.enter_context(_load(name, folder, pythons.get(name), cache))
            for name in arguments.contestants
            if name == "weft" or pythons[name] is not None
        ]
        shape = models.Shape.of(folder)
        rng = np.random.default_rng(arguments.seed)
        agreement = [*_loaded_rows(model, loaded), *_agreement(model, loaded, _prompts(rng, shape, 1, SCORED)[0])]
        for case in CASES:  # warm-up: first touches, lazy set-up, thread pools
            for one in loaded:
                one.ask("run", prompts=_prompts(rng, shape, case.prompts, case.input), output=min(case.output, 4))
        rounds: list[Round] = []
        probe = limits.ask("run")
        while sum(done.steady for done in rounds) < arguments.rounds and len(rounds) < arguments.rounds + SPARE_ROUNDS:
            current = Round(before=probe)
            for number, case in enumerate(CASES):
                asked = _prompts(rng, shape, case.prompts, case.input)
                turn = (len(rounds) + number) % len(loaded)
                for one in loaded[turn:] + loaded[:turn]:
                    answer = one.ask("run", prompts=asked, output=case.output)
                    _check_lengths(one, case, answer)
                    current.rates[case.name, one.name] = case.rate(answer)
            probe = current.after = limits.ask("run")
            rounds.append(current)
            _say(model, current, len(rounds))
        return rounds, agreement


def _load(name: str, folder: Path, python: Path | None, cache: Path) -> Contestant:
    log = cache / f"{name}.log"
    if name == "weft":
        return peers.weft(folder, SEQUENCES, log)
    if python is None:
        raise SystemExit(f"{name} has no environment")
    if name == "transformers":
        return peers.transformers(python, folder, log)
    return peers.llamacpp(python, peer_models.gguf(folder, python, cache), SEQUENCES, log)


def _agreement(model: str, loaded: Sequence[Contestant], tokens: list[int]) -> list[dict[str, Any]]:
    """One row for each pair of engines. Raises SystemExit when two do not run the same model."""
    answers = {one.name: one.ask("score", tokens=tokens) for one in loaded}
    found = []
    names = list(answers)
    for first, second in ((a, b) for i, a in enumerate(names) for b in names[i + 1 :]):
        pairs = zip(answers[first]["logprobs"], answers[second]["logprobs"], strict=True)
        difference = statistics.mean(abs(a - b) for a, b in pairs)
        same = statistics.mean(a == b for a, b in zip(answers[first]["top"], answers[second]["top"], strict=True))
        print(
            f"{model}: {first} and {second} agree on the most probable token at {same:.0%} of {len(tokens) - 1} "
            f"positions; log-probabilities differ by {difference:.4f} on average"
        )
        if difference > SAME_MODEL:
            raise SystemExit(f"{model}: {first} and {second} do not compute the same model")
        found.append(
            {
                "model": model,
                "check": "agreement",
                "of": [first, second],
                "top1": same,
                "logprob_difference": difference,
            }
        )
    return found


def _loaded_rows(model: str, loaded: Sequence[Contestant]) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "contestant": one.name,
            "engine": one.engine,
            "load_s": one.load_seconds,
            "resident_bytes_after_load": common.resident_bytes(one.pid),
        }
        for one in loaded
    ]


def _prompts(rng: np.random.Generator, shape: models.Shape, count: int, length: int) -> list[list[int]]:
    drawn: list[list[int]] = rng.integers(FIRST_ID, shape.vocabulary, (count, length)).tolist()
    return drawn


def _check_lengths(one: Contestant, case: Case, answer: dict[str, Any]) -> None:
    lengths = [len(tokens) for tokens in answer["tokens"]]
    if lengths != [case.output] * case.prompts:
        raise SystemExit(f"{one.name} answered {case.name} with {lengths} tokens instead of {case.output} each")


def _kept(rounds: list[Round], wanted: int) -> tuple[list[Round], str | None]:
    """The rounds that count, and what a reader must know about the others."""
    steady = [done for done in rounds if done.steady]
    if len(steady) == len(rounds):
        return rounds, None
    if len(steady) >= wanted:
        return steady, f"{len(rounds) - len(steady)} of {len(rounds)} rounds were not steady and do not count"
    return rounds, f"NOT STEADY: the machine's limits moved by more than a fifth in {len(rounds) - len(steady)} rounds"


def _rows(model: str, shape: models.Shape, rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """One row for each case: the figures, weft's ratios to the others, and the limits."""
    rows: list[dict[str, Any]] = []
    for case in CASES:
        rates = {
            name: common.Figure.of([done.rates[case.name, name] for done in rounds])
            for name in EVERYBODY
            if (case.name, name) in rounds[0].rates
        }
        probes = [probe for done in rounds for probe in (done.before, done.after)]
        limit = common.Figure.of([case.limit(shape, probe["bandwidth"], probe["bf16"]) for probe in probes])
        ratios = {
            name: common.Figure.of([done.rates[case.name, "weft"] / done.rates[case.name, name] for done in rounds])
            for name in rates
            if name != "weft" and "weft" in rates
        }
        rows.append(
            {
                "model": model,
                "case": case.name,
                "prompts": case.prompts,
                "input": case.input,
                "output": case.output,
                "tokens_per_s": rates,
                "weft_vs": ratios,
                "limit": limit,
            }
        )
    for name, unit in (("bandwidth", "bytes/s"), ("bf16", "flop/s")):
        values = [done.before[name] for done in rounds] + [rounds[-1].after[name]]
        rows.append({"model": model, "probe": name, "unit": unit, "value": common.Figure.of(values)})
    return rows


def _claims(rounds: Sequence[Round]) -> dict[str, float]:
    return {
        name: statistics.median(done.rates[case, "weft"] / done.rates[case, peer] for done in rounds)
        for name, (case, peer) in CLAIMS.items()
        if (case, peer) in rounds[0].rates and (case, "weft") in rounds[0].rates
    }


def _table(model: str, rows: Sequence[dict[str, Any]]) -> str:
    cases = [row for row in rows if row["model"] == model and "case" in row]
    names = list(cases[0]["tokens_per_s"])
    peers_of = list(cases[0]["weft_vs"])
    head = [f"{model}, tokens/s", *names, *(f"weft / {name}" for name in peers_of), "limit"]
    lines = [
        [
            row["case"],
            *(row["tokens_per_s"][name] for name in names),
            *(row["weft_vs"][name] for name in peers_of),
            row["limit"],
        ]
        for row in cases
    ]
    probes = [row for row in rows if row["model"] == model and "probe" in row]
    said = ", ".join(f"{row['probe']} {row['value'].median / 1e9:.0f} G{row['unit']}" for row in probes)
    return f"\n{common.table(head, lines)}\nprobed limits: {said}\n"


def _say(model: str, done: Round, number: int) -> None:
    """One line on standard error, so that a long run shows that it lives."""
    rates = ", ".join(f"{case} {name} {rate:.1f}" for (case, name), rate in done.rates.items())
    print(f"{model} round {number}{'' if done.steady else ' (not steady)'}: {rates}", file=sys.stderr, flush=True)


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure as Picture

    names = list(dict.fromkeys(row["model"] for row in rows if "case" in row))
    picture = Picture(figsize=(6 * len(names), 4), layout="constrained")
    panels: Any = picture.subplots(1, len(names), squeeze=False)
    for panel, model in zip(panels[0], names, strict=True):
        cases = [row for row in rows if row["model"] == model and "case" in row]
        contestants = list(cases[0]["tokens_per_s"])
        for place, name in enumerate(contestants):
            values = [row["tokens_per_s"][name].median for row in cases]
            panel.bar(
                np.arange(len(cases)) + 0.8 * place / len(contestants), values, 0.8 / len(contestants), label=name
            )
        for place, row in enumerate(cases):
            panel.hlines(row["limit"].median, place - 0.2, place + 0.7, color="grey", linestyle=":")
        panel.set(title=model, ylabel="tokens/s", yscale="log")
        panel.set_xticks(np.arange(len(cases)) + 0.3, [row["case"] for row in cases])
    panels[0][0].legend(loc="upper right", bbox_to_anchor=(1.0, 0.9))
    picture.savefig(path)


def _arguments() -> argparse.Namespace:
    def listed(choices: Sequence[str]) -> Any:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            unknown = [name for name in names if name not in choices]
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(choices)}")
            return names

        return parse

    every_model = ("builtin", "llama-1.1b")
    parser = common.parser("weft against transformers and llama.cpp on this CPU.")
    parser.add_argument(
        "--models", type=listed(every_model), help=f"default: {','.join(every_model)}; --quick: builtin"
    )
    parser.add_argument("--contestants", type=listed(EVERYBODY), default=list(EVERYBODY), metavar="NAMES")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"steady rounds to take ({ROUNDS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="environments and models; default: weft-bench in the user's cache"
    )
    parser.add_argument(
        "--llama-python", type=Path, metavar="PATH", help="interpreter that has llama_cpp, gguf and numpy"
    )
    parser.add_argument("--transformers-python", type=Path, metavar="PATH", help="interpreter that has transformers")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}; it must be at least 1")
    arguments.models = arguments.models or (["builtin"] if arguments.quick else list(every_model))
    return arguments


if __name__ == "__main__":
    main()
