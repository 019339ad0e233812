"""weft in 4 bits against llama.cpp, OpenVINO GenAI and vLLM on this CPU: all cores, interleaved in one run.

    python benchmarks/comet_cpu.py [--quick] [--contestants NAMES] [--rounds 5] [--minutes 40] [--json FILE] [--plot F]

A Llama of 1.1 billion random weights, greedy, on the same random token ids, no prefix cache and no stop tokens:

* prefill: 512 tokens in, one out; input tokens over the time to that one.
* decode: 16 in, 128 out; (output tokens - 1) over the time from the first to the last.
* batch16: 16 prompts of 128 tokens at once, 128 out each; all output tokens over the whole time. weft is asked through
  its HTTP server, by a client that shares the cores. The peers run in one process each, without any server: that is the
  faster way for each of them.
* builtin_decode: decode on the small model in weft's package, against llama.cpp's Q4_0 only.

weft serves an fmpq checkpoint with a 4-bit KV cache; the peers are llama.cpp Q4_0 and Q8_0, OpenVINO with INT4 weights
and INT8 activations, vLLM in BF16 and W8A8. Every contestant is loaded once, and waits without taking CPU while others
run. For every case of every round they take turns, in an order that rotates; the machine's bandwidth and integer peak
are probed between turns. A figure is a median over rounds with [least..greatest]; a ratio is the median of the rounds'
own ratios; the best peer of a case is the one with the highest median. A ratio of two turns whose probes differ by more
than a fifth does not count, where at least three others are left.

A peer that is missing or fails is a row that says why, and no claim counts it.

weight_bytes_ratio and kv_bytes_ratio are of what weft itself reports of its memory, against weft in BF16.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import peer_models
import quantised_models
from contest import BEST, ENOUGH, OURS, Contest, Entrant, Question, Turn, best_peer, claims, figures, ratios, rounds
from serve_cpu import Case

import models

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
import contestant as peers
import environments
from contestant import Contestant, ContestantError

ROUNDS, MINUTES = 5, 40.0
SEQUENCES = 16
SCORED = 256
ALIKE = 0.4  # least correlation with BF16's log-probabilities: random weights suffer much from 4 bits, others have 0
SMALL_REPEATS = 5  # the small model answers in a tenth of a second
BITS = 4 + 16 / 128  # a weight and its part of the scale
KV = "int4"
Q4, Q8, OPENVINO = "llama.cpp Q4_0", "llama.cpp Q8_0", "OpenVINO INT4"
VLLM, VLLM8 = "vLLM BF16", "vLLM W8A8"
SHORT = {"q4_0": Q4, "q8_0": Q8, "openvino": OPENVINO, "vllm": VLLM, "vllm-w8a8": VLLM8}  # as --contestants has them
ENVIRONMENTS = {Q4: "llamacpp", Q8: "llamacpp", OPENVINO: "openvino", VLLM: "vllm", VLLM8: "vllm"}
NEEDS = {OURS: 1.5, Q4: 1.5, Q8: 2.0, OPENVINO: 3.5, VLLM: 6.0, VLLM8: 5.0}  # GiB while it loads
CLAIMS = {
    "prefill_vs_best_peer": ("prefill", BEST),
    "prefill_vs_llamacpp_q4_0": ("prefill", Q4),
    "decode_vs_best_peer": ("decode", BEST),
    "batch16_vs_best_peer": ("batch16", BEST),
    "batch16_vs_llamacpp_q4_0": ("batch16", Q4),
    "builtin_decode_vs_llamacpp_q4_0": ("builtin_decode", Q4),
}
SMALL = Case("builtin_decode", 1, 16, 128)
CASES = (Case("prefill", 1, 512, 1), Case("decode", 1, 16, 128), Case("batch16", 16, 128, 128), SMALL)
QUICK_CASES = (Case("prefill", 1, 256, 1), Case("decode", 1, 16, 32), Case("batch16", 16, 32, 16), SMALL)
ALL = tuple(case.name for case in CASES if case is not SMALL)


def main() -> None:
    arguments = _arguments()
    start, watch = time.monotonic(), common.LoadWatch()
    cache = common.cache_folder(arguments.cache)
    big, small = models.random_llama(cache), models.builtin()
    rng = np.random.default_rng(arguments.seed)
    questions = [_question(case, small if case is SMALL else big) for case in arguments.cases]
    scored = questions[0].prompts(rng, SCORED)[0]
    memory, truth = _memory(big, arguments.kv, cache, scored)
    with ExitStack() as stack:
        contest = Contest(stack.enter_context(peers.probes(cache / "probes.log")))
        contest.load(_entrants(arguments, big, small, cache), stack)
        missing = [case.name for case in arguments.cases if not _ours(contest, case)]
        if missing:
            raise SystemExit(f"weft cannot take part in {missing[0]}: {contest.failed.get(OURS)}")
        checks = [*_loaded_rows(contest), *_agreement(contest, scored, truth)]
        contest.warm_up(questions, rng)
        turns, done = rounds(contest, questions, rng, arguments.rounds, start + 60 * arguments.minutes)
    rows = [row for question in questions for row in _rows(question.case, turns, big, contest.failed)]
    print(_tables(rows))
    notes = _notes(contest, turns, checks, done, arguments, watch)
    if arguments.plot is not None:
        _plot(rows, arguments.plot)
    said = claims(CLAIMS, turns) | {name: memory[name] for name in ("weight_bytes_ratio", "kv_bytes_ratio")}
    common.report(arguments, said, [*rows, *checks, memory, *_probe_rows(turns)], notes)


def _question(case: Case, folder: Path) -> Question:
    return Question(case, models.Shape.of(folder).vocabulary, SMALL_REPEATS if case is SMALL else 1)


def _entrants(arguments: argparse.Namespace, big: Path, small: Path, cache: Path) -> list[Entrant]:
    """weft, and the peers that were asked for. The peer that takes most memory comes first, while there is most."""
    kv, log = arguments.kv, partial(_log, cache)
    quantised, tiny = quantised_models.fmpq(big, cache), quantised_models.fmpq(small, cache)
    ours = [
        Entrant(OURS, ALL[:2], NEEDS[OURS], partial(peers.weft, quantised, SEQUENCES, log("weft"), kv)),
        Entrant(OURS, ALL[2:], NEEDS[OURS], partial(peers.weft_server, quantised, SEQUENCES, log("server"), kv, OURS)),
        Entrant(OURS, (SMALL.name,), 0.5, partial(peers.weft, tiny, SEQUENCES, log("weft-small"), kv)),
    ]
    others = [Entrant(name, ALL, NEEDS[name], partial(_open, name, big, cache)) for name in SHORT.values()]
    others.append(Entrant(Q4, (SMALL.name,), 0.5, partial(_open, Q4, small, cache)))
    chosen = [one for one in others if one.name in arguments.contestants]
    return [*ours, *sorted(chosen, key=lambda one: -one.need)]


def _open(name: str, folder: Path, cache: Path) -> Contestant:
    """A peer with its form of the model. Raises ContestantError where its environment is not set up."""
    environment = ENVIRONMENTS[name]
    python = environments.interpreter(environment, cache)
    if not environments.works(environment, python):
        raise ContestantError(f"not set up; python benchmarks/peers/environments.py {environment} does that")
    log = _log(cache, f"{SHORT_OF[name]}-{folder.name}")
    if name in (Q4, Q8):
        file = peer_models.gguf(folder, python, cache, "q4_0" if name == Q4 else "q8_0")
        return peers.llamacpp(python, file, SEQUENCES, log, name)
    if name == OPENVINO:
        return peers.openvino(python, peer_models.openvino(folder, python, cache), SEQUENCES, log, name)
    return peers.vllm(python, quantised_models.w8a8(folder, cache) if name == VLLM8 else folder, SEQUENCES, log, name)


SHORT_OF = {name: short for short, name in SHORT.items()}


def _log(cache: Path, name: str) -> Path:
    return cache / f"{name}.log"


def _ours(contest: Contest, case: Case) -> bool:
    return any(entrant.name == OURS and case.name in entrant.cases for entrant, _ in contest.loaded)


def _memory(folder: Path, kv: str, cache: Path, scored: list[int]) -> tuple[dict[str, Any], list[float]]:
    """What weft reports of its memory in BF16 and in 4 bits, one after the other, and the ratios.

    And what it says in BF16 of the tokens to be scored: their log-probabilities.
    """
    common.say("memory of weft, in BF16 and in 4 bits")
    reported: dict[str, dict[str, float]] = {}
    truth: list[float] = []
    for name, model, cache_dtype in (("bf16", folder, "auto"), ("fmpq", quantised_models.fmpq(folder, cache), kv)):
        with peers.weft(model, SEQUENCES, _log(cache, "weft-memory"), cache_dtype) as one:
            parts = one.facts["memory"]
            truth = truth or one.ask("score", tokens=scored)["logprobs"]
            reported[name] = {
                "weights": parts["weights"],
                "kv_of_a_token": parts["KV pool"] / one.facts["kv_slots"],
                "resident": common.resident_bytes(one.pid),
            }
    plain, four = reported["bf16"], reported["fmpq"]
    row = {
        "check": "memory",
        "bytes": reported,
        "weight_bytes_ratio": four["weights"] / plain["weights"],
        "kv_bytes_ratio": four["kv_of_a_token"] / plain["kv_of_a_token"],
    }
    return row, truth


def _loaded_rows(contest: Contest) -> list[dict[str, Any]]:
    return [
        {
            "contestant": entrant.name,
            "cases": list(entrant.cases),
            "engine": one.engine,
            "load_s": one.load_seconds,
            "resident_bytes_after_load": sum(map(common.resident_bytes, common.process_tree(one.pid))),
        }
        for entrant, one in contest.loaded
    ]


def _agreement(contest: Contest, tokens: list[int], truth: list[float]) -> list[dict[str, Any]]:
    """How all log-probabilities of some tokens correlate with those of weft in BF16, so that nobody runs another
    model. An engine that gives none is passed over."""
    found = []
    for entrant, one in contest.loaded:
        if ALL[0] in entrant.cases:
            try:
                theirs = one.ask("score", tokens=tokens)["logprobs"]
            except ContestantError as error:
                common.say(f"{entrant.name} is not compared: {error}")
                continue
            same = float(np.corrcoef(truth, theirs)[0, 1])
            found.append({"check": "agreement", "of": entrant.name, "correlation": same})
    return found


def _rows(case: Case, turns: dict[str, list[Turn]], big: Path, failed: dict[str, str]) -> list[dict[str, Any]]:
    """One row for each contestant of a case."""
    made = turns[case.name]
    rates, against, best = figures(made), ratios(made), best_peer(made)
    limit = None if case is SMALL else _limit(case, models.Shape.of(big), made)
    rows: list[dict[str, Any]] = [
        {
            "case": case.name,
            "prompts": case.prompts,
            "input": case.input,
            "output": case.output,
            "contestant": name,
            "tokens_per_s": rate,
            "weft_vs": against[name].figure if name in against else None,
            "steady_rounds": against[name].steady if name in against else None,
            "best_peer": name == best,
            "limit": limit if name == OURS else None,
        }
        for name in (OURS, *SHORT.values())
        if (rate := rates.get(name)) is not None
    ]
    there = [name for name in failed if case is not SMALL or name == Q4]
    return rows + [{"case": case.name, "contestant": name, "failed": failed[name]} for name in there]


def _limit(case: Case, shape: models.Shape, turns: Sequence[Turn]) -> common.Figure:
    """Tokens/s of an engine that only reads 4-bit weights and multiplies 8-bit integers, both at the probed rates."""
    found = []
    for probe in _probes(turns):
        head = shape.head * case.prompts
        prefill = 2 * (case.prompts * case.input * shape.body + head) / probe["integers"]
        reading = (shape.body + shape.head) * BITS / 8 / probe["bandwidth"]
        step = max(reading, 2 * (shape.body + shape.head) * case.prompts / probe["integers"])
        first = max(prefill, reading)
        answer = {"first": first, "last": first + (case.output - 1) * step}
        found.append(case.rate({**answer, "seconds": answer["last"]}))
    return common.Figure.of(found)


def _tables(rows: Sequence[dict[str, Any]]) -> str:
    texts = []
    for name in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == name]
        lines = [
            [row["contestant"], "failed", "", ""]
            if "failed" in row
            else [
                row["contestant"] + (" (best peer)" if row["best_peer"] else ""),
                row["tokens_per_s"],
                row["weft_vs"] or "",
                row["limit"] or "",
            ]
            for row in own
        ]
        texts.append(common.table([name, "tokens/s", "weft / it", "limit in 4 bits"], lines))
    return "\n" + "\n\n".join(texts) + "\n"


def _notes(
    contest: Contest,
    turns: dict[str, list[Turn]],
    checks: Sequence[dict[str, Any]],
    done: int,
    arguments: argparse.Namespace,
    watch: common.LoadWatch,
) -> list[str]:
    notes = [f"{name} failed: {why}" for name, why in contest.failed.items()]
    if done < arguments.rounds:
        notes.append(f"{done} of {arguments.rounds} rounds fitted in {arguments.minutes:g} minutes")
    for case, made in turns.items():
        names = ", ".join(name for name in figures(made) if name != OURS)
        for name, ratio in ratios(made).items():
            if ratio.steady < ratio.rounds:
                word = "" if ratio.steady >= ENOUGH else "NOT STEADY: "
                count = "these alone count" if ratio.steady >= ENOUGH else "too few, so all count"
                notes.append(f"{case}: {word}weft and {name}: {ratio.steady} of {ratio.rounds} steady, {count}")
        notes.append(f"{case}: {f'compared with {names}; the best peer is {best_peer(made)}' if names else 'no peer'}")
    for row in checks:
        if row.get("check") == "agreement":
            word = "" if row["correlation"] >= ALIKE else "NOT THE SAME MODEL? "
            notes.append(f"{word}log-probabilities of {row['of']} correlate with BF16's by {row['correlation']:.3f}")
    if (load := common.load_note(watch)) is not None:
        notes.append(load)
    return notes


def _probes(turns: Sequence[Turn]) -> list[dict[str, float]]:
    return [probe for turn in turns for pair in turn.probes.values() for probe in pair]


def _probe_rows(turns: dict[str, list[Turn]]) -> list[dict[str, Any]]:
    probes = [probe for made in turns.values() for probe in _probes(made)]
    return [
        {"probe": name, "unit": unit, "value": common.Figure.of([probe[name] for probe in probes])}
        for name, unit in (("bandwidth", "bytes/s"), ("integers", "op/s"))
    ]


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure as Picture

    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows if "failed" not in row))
    colours = {name: f"C{place}" for place, name in enumerate(names)}
    picture = Picture(figsize=(3.2 * len(cases), 4), layout="constrained")
    panels: Any = picture.subplots(1, len(cases), squeeze=False)
    for panel, case in zip(panels[0], cases, strict=True):
        own = [row for row in rows if row["case"] == case and "failed" not in row]
        for place, row in enumerate(own):
            figure = row["tokens_per_s"]
            spread = [[figure.median - figure.low], [figure.high - figure.median]]
            panel.bar(place, figure.median, yerr=spread, color=colours[row["contestant"]], label=row["contestant"])
            if row["limit"] is not None:
                panel.axhline(row["limit"].median, color="grey", linestyle=":", label="limit in 4 bits")
        panel.set(title=case, xticks=[], ylabel="tokens/s")
    handles = {label: one for panel in panels[0] for one, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    picture.savefig(path)


def _arguments() -> argparse.Namespace:
    def listed(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in SHORT]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(SHORT)}")
        return [SHORT[name] for name in names]

    parser = common.parser("weft in 4 bits against llama.cpp, OpenVINO GenAI and vLLM on this CPU.")
    parser.add_argument(
        "--contestants", type=listed, metavar="NAMES", help=f"peers, of {','.join(SHORT)}; --quick: without vLLM"
    )
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}, with --quick 1")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"begin no round that ends later ({MINUTES:g})")
    parser.add_argument("--kv-cache-dtype", dest="kv", default=KV, help=f"weft's ({KV})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="environments and models; default: weft-bench in the user's cache"
    )
    arguments = parser.parse_args()
    if arguments.rounds is None:
        arguments.rounds = 1 if arguments.quick else ROUNDS
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}; it must be at least 1")
    if arguments.contestants is None:
        arguments.contestants = [name for name in SHORT.values() if not (arguments.quick and name in (VLLM, VLLM8))]
    arguments.cases = QUICK_CASES if arguments.quick else CASES
    return arguments


if __name__ == "__main__":
    main()
