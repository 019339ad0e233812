"""Two ranks, one core each, joined by a shaped link: what weaving hides of it.

    sudo python benchmarks/weave_link.py [--quick | --short | --mixture | --cells CELL ...] [--rounds N]
                                         [--layers N] [--gloo] [--json FILE] [--plot FILE]

The ranks live in network namespaces that a veth pair joins; tbf shapes both directions. Latency is added in user space,
once for each of the two rounds of a seam, since these kernels have no netem. A step is one prompt through the layers of
a 1.1B model, in BF16 and in W4A8, random weights; `--layers` of its 22, for time, and all ratios are per layer. Ranks
begin it together, and it takes as long as the slower one does, with or without communication (tax_of_rank_0 is by rank
0's clock alone). Modes take turns, and every ratio is of one round; those that must give the same bits are compared
first.

    plain                     all-reduce over gloo, then every rank normalises all rows: the baseline
    one-shot                  every rank sends all it has to the other: one latency instead of two
    fused                     reduce-scatter, norm of own rows, all-gather; one strand
    woven, two strands        the seams in a thread of their own
    woven                     three strands
    ..., quantised gather     rows travel as the next linear takes them (W4A8); so they are served
    no communication          every rank goes on with its own sums: wrong results, and the time that cannot be beaten
                              but by not normalising all rows on every rank
    split, no communication   the same in three strands: what splitting costs
    fused, woven over gloo    with --gloo: the same seams, whose messages the gloo library carries
    rejoined, two strands     with --mixture: woven, but experts are computed once for all strands
    rejoined                  three strands

--mixture is a model with experts in the place of the 1.1B one: 60 of them in a layer, of which a token takes 4, and one
that it always takes; BF16, as Qwen1.5-MoE-A2.7B; 3 of its 24 layers if not told otherwise.

What weft would choose is measured once for a link and a model, for the sizes that a rank measures when it starts.

* woven_gain_at_25_percent_comm: plain / woven where communication is a quarter of plain: on links found from the
  other rows, one for each precision and some sizes; the median of these cells.
* woven_gain_at_20_to_30_percent_comm: the same of all cells in which it is so much.
* woven_gain_500mbit: plain / woven at 500 Mbit/s without more latency, the median over sizes and precisions.
* woven_tax_percent: woven over no communication, from 1024 tokens on where the link is not saturated; the worst.
* gather_bytes_saved_int8, gather_bytes_saved_int4: of the bytes that a woven step of all 22 layers sends, by the
  interface's counter, where all activations of the linears have 8 bits, or 4; gather_bytes_saved_mixed: where they have
  4 bits, and one block of channels in 16 has 8.
* worst_case_vs_plain: plain over the mode that the cost model chooses, the worst cell of the grid.
* choice_regret_percent: the mode that it chooses over the best of those that it can choose from, the worst cell.
* rejoined_vs_woven, rejoined_vs_plain: of the model with experts, woven (or plain) over rejoined, three strands each;
  the median of its cells. worst_case_vs_plain and choice_regret_percent are of these cells, too.
* gloo_vs_links_fused, gloo_vs_links_woven: with --gloo, a step over gloo over one whose seams weft carries itself
  (csrc/links.h), the median of all cells; gloo_vs_links_cpu: the same of the CPU seconds that a woven step takes of
  rank 0, products included. So whether gloo is the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import common

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
MIXTURE: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
PLAIN, ONE_SHOT, FUSED, TWO, WOVEN = "plain", "one-shot", "fused", "woven, two strands", "woven"
QUANTISED = "woven, quantised gather"
FUSED_QUANTISED, TWO_QUANTISED = "fused, quantised gather", "woven, two strands, quantised gather"
NOTHING, SPLIT = "no communication", "split, no communication"
FUSED_GLOO, WOVEN_GLOO = "fused over gloo", "woven over gloo"
TWO_REJOINED, REJOINED = "rejoined, two strands", "rejoined"
MODES = (PLAIN, ONE_SHOT, FUSED, TWO, WOVEN, FUSED_QUANTISED, TWO_QUANTISED, QUANTISED, NOTHING, SPLIT)
ALL_MODES = (*MODES, TWO_REJOINED, REJOINED, FUSED_GLOO, WOVEN_GLOO)
MBIT = (2000, 1000, 500, 250)
LATENCIES = (0.0, 1e-4, 1e-3)
TOKENS = (256, 512, 1024, 2048)
LAYERS = 22  # of the model
QUARTER_TOKENS = (512, 1024)  # sizes for which a link is found
PORT = 29517  # within a namespace
SATURATED = 0.8  # a link that needs more than this part of the time of computing


@dataclass(frozen=True, slots=True)
class Cell:
    """mbit: of the link; None where it is not shaped. latency: seconds added to each round."""

    mbit: int | None
    latency: float
    precision: str
    tokens: int


BYTES = tuple(Cell(None, 0.0, precision, 256) for precision in ("w4a8", "w4a4", "w4ax"))  # only the bytes count
SHORT = (
    *(Cell(mbit, 0.0, "w4a8", 256) for mbit in (2000, 500, 250)),
    *(Cell(mbit, 0.0, "bf16", 256) for mbit in (1000, 500)),
    *(Cell(mbit, 0.0, "w4a8", 1024) for mbit in (2000, 1000, 500)),
    *(Cell(mbit, 0.0, "bf16", 1024) for mbit in (1000, 500)),
    *(Cell(1000, latency, "w4a8", 512) for latency in (0.0, 1e-3)),
    Cell(1000, 0.0, "w4a8", 2048),
    Cell(500, 0.0, "bf16", 2048),
)


OF_EXPERTS = (
    *(Cell(mbit, 0.0, "mixture", tokens) for mbit in MBIT for tokens in TOKENS[:3]),
    *(Cell(1000, 1e-3, "mixture", tokens) for tokens in TOKENS[:3]),
)


def main() -> None:
    arguments = _arguments()
    if reason := _missing():
        print(f"skipped: {reason}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no namespace stays
    watch = common.LoadWatch()
    cells = arguments.cells or list(grid(quick=arguments.quick, short=arguments.short))
    groups: list[tuple[Sequence[Cell], int]] = [(BYTES, LAYERS), (cells, arguments.layers)]
    if arguments.mixture:
        groups = [(OF_EXPERTS, arguments.layers)]
    elif arguments.cells:
        groups = groups[1:]
    rows = []
    with _namespaces() as link:
        for some, layers in groups:
            precisions = [*dict.fromkeys(cell.precision for cell in some)]
            most = max(cell.tokens for cell in some)
            with closing(Ranks(link, layers, precisions, most, gloo=arguments.gloo)) as ranks:
                found = _measure(link, ranks, some, arguments.rounds)
                if some is not BYTES and not (arguments.cells or arguments.mixture):
                    found += [
                        one | {"quarter": True} for one in _measure(link, ranks, quarters(found), arguments.rounds)
                    ]
                rows += found
    timed = _timed(rows)
    print(common.table(_head(timed), [_cells(one, timed) for one in rows]), "\n")
    if arguments.plot is not None:
        _plot(arguments.plot, rows)
    note = common.load_note(watch)
    notes = [
        f"{arguments.layers} layers of {LAYERS} (of a model with experts, 24), {arguments.rounds} rounds",
        *([note] if note else []),
    ]
    common.report(arguments, claims(rows), rows, notes)


def _measure(link: Link, ranks: Ranks, cells: Sequence[Cell], rounds: int) -> list[dict[str, Any]]:
    found = []
    for cell in cells:
        link.shape(cell.mbit)
        found.append(row(cell, ranks.job(cell, rounds if cell.mbit else 1)))
        common.say(f"{cell}: {', '.join(f'{name} {found[-1][name]}' for name in _timed(found[-1:]))}")
    return found


def quarters(rows: Sequence[dict[str, Any]]) -> list[Cell]:
    """Cells of links at which communication would be a quarter of plain: what it takes over computing, which is a third
    of that then, is taken to grow straight with the seconds of a bit between two links that were measured."""
    cells = []
    for precision in dict.fromkeys(one["precision"] for one in rows):
        for tokens in QUARTER_TOKENS:
            points = sorted(
                (1 / one["mbit"], one["communication"] / (1 - one["communication"]))
                for one in rows
                if (one["precision"], one["tokens"], one["latency"]) == (precision, tokens, 0.0)
            )
            for (left, low), (right, high) in pairwise(points):
                if low <= 1 / 3 < high:
                    bit = left + (right - left) * (1 / 3 - low) / (high - low)
                    cells.append(Cell(round(1 / bit), 0.0, precision, tokens))
                    break
    return cells


def grid(*, quick: bool = False, short: bool = False) -> Iterator[Cell]:
    """Every link and size; latency on one link only, since it matters where bandwidth does not."""
    if short:
        yield from SHORT
        return
    for precision in ("bf16", "w4a8"):
        for mbit in (1000, 500) if quick else MBIT:
            for latency in LATENCIES if mbit == 1000 and not quick else LATENCIES[:1]:
                for tokens in (256, 1024) if quick else TOKENS:
                    yield Cell(mbit, latency, precision, tokens)


def served(*, quantised: bool) -> dict[tuple[str, int], str]:
    """What weft chooses from, by its mode and number of strands. quantised: rows travel so wherever they can."""
    fused, two, three = (FUSED_QUANTISED, TWO_QUANTISED, QUANTISED) if quantised else (FUSED, TWO, WOVEN)
    rejoined = {("rejoined", 2): TWO_REJOINED, ("rejoined", 3): REJOINED}
    woven = {("woven", 2): two, ("woven", 3): three} | rejoined
    return {("plain", 1): PLAIN, ("one-shot", 1): ONE_SHOT, ("fused", 1): fused} | woven


def merged(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answers of all ranks in one: the seconds of the slower rank in each step, and of_rank_0, its own. CPU and
    bytes are those of rank 0."""
    own = answers[0]["seconds"]
    slower = {name: list(map(max, *(answer["seconds"][name] for answer in answers))) for name in own}
    return answers[0] | {"seconds": slower, "of_rank_0": own}


def row(cell: Cell, answer: dict[str, Any]) -> dict[str, Any]:
    """Figures of one cell, of what `merged` gives; ratios are of one round each."""
    seconds = answer["seconds"]

    def ratio(over: str, under: str, whose: str = "seconds") -> common.Figure:
        return common.Figure.of([a / b for a, b in zip(answer[whose][over], answer[whose][under], strict=True)])

    choices = [name for name in served(quantised=QUANTISED in seconds).values() if name in seconds]
    best = min(choices, key=lambda name: statistics.median(seconds[name]))
    found: dict[str, Any] = {
        "mbit": cell.mbit,
        "latency": cell.latency,
        "precision": cell.precision,
        "tokens": cell.tokens,
        **{name: common.Figure.of([1000 * one for one in seconds[name]]) for name in ALL_MODES if name in seconds},
        "communication": 1 - 1 / ratio(PLAIN, NOTHING).median,
        "link_load": ratio(FUSED, NOTHING).median - 1,
        "gain": ratio(PLAIN, WOVEN),
        "tax": ratio(WOVEN, NOTHING).median - 1,
        "tax_of_rank_0": ratio(WOVEN, NOTHING, "of_rank_0").median - 1,
        "chosen": answer["chosen"],
        "chosen_vs_plain": ratio(PLAIN, answer["chosen"]).median,
        "best": best,
        "regret": ratio(answer["chosen"], best).median - 1,
    }
    if WOVEN_GLOO in seconds:
        found["gloo_vs_links_fused"] = ratio(FUSED_GLOO, FUSED)
        found["gloo_vs_links_woven"] = ratio(WOVEN_GLOO, WOVEN)
        found["gloo_vs_links_cpu"] = ratio(WOVEN_GLOO, WOVEN, "cpu")
    if REJOINED in seconds:
        found["rejoined_vs_woven"], found["rejoined_vs_plain"] = ratio(WOVEN, REJOINED), ratio(PLAIN, REJOINED)
    if QUANTISED in seconds:
        found["quantised_gain"] = ratio(PLAIN, QUANTISED)
        found["bytes_saved"] = 1 - answer["sent"][QUANTISED] / answer["sent"][WOVEN]
    return found


def claims(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Those that the rows have cells for."""
    every = [one for one in rows if one["mbit"] is not None]
    timed = [one for one in every if one["precision"] != "mixture"]
    sent = {one["precision"]: one["bytes_saved"] for one in rows if one["mbit"] is None}
    found = {
        "woven_gain_at_25_percent_comm": _median([one["gain"].median for one in timed if one.get("quarter")]),
        "woven_gain_at_20_to_30_percent_comm": _median(
            [one["gain"].median for one in timed if 0.2 <= one["communication"] <= 0.3]
        ),
        "woven_gain_500mbit": _median(
            [one["gain"].median for one in timed if one["mbit"] == 500 and one["latency"] == 0]
        ),
        "woven_tax_percent": max(
            (100 * one["tax"] for one in timed if one["tokens"] >= 1024 and one["link_load"] < SATURATED), default=None
        ),
        "gather_bytes_saved_int8": sent.get("w4a8"),
        "gather_bytes_saved_int4": sent.get("w4a4"),
        "gather_bytes_saved_mixed": sent.get("w4ax"),
        "worst_case_vs_plain": min((one["chosen_vs_plain"] for one in every), default=None),
        "choice_regret_percent": max((100 * one["regret"] for one in every), default=None),
        **{
            name: _median([one[name].median for one in every if name in one])
            for name in ("rejoined_vs_woven", "rejoined_vs_plain")
        },
        **_transports([one for one in timed if "gloo_vs_links_cpu" in one]),
    }
    return {name: value for name, value in found.items() if value is not None}


def _transports(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """gloo beside weft's own connections."""
    names = ("gloo_vs_links_fused", "gloo_vs_links_woven", "gloo_vs_links_cpu")
    return {name: _median([one[name].median for one in rows]) for name in names}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


class Link:
    """Two namespaces and the veth pair between them."""

    def __init__(self, name: str) -> None:
        self.spaces = (f"{name}-0", f"{name}-1")
        self.interfaces = ("weft0", "weft1")
        self.addresses = ("10.77.0.1", "10.77.0.2")

    def open(self) -> None:
        for space in self.spaces:
            _run("ip", "netns", "add", space)
        first, second = self.interfaces
        _run("ip", "-n", self.spaces[0], "link", "add", first, "type", "veth", "peer", "name", second)
        _run("ip", "-n", self.spaces[0], "link", "set", second, "netns", self.spaces[1])
        for space, interface, address in zip(self.spaces, self.interfaces, self.addresses, strict=True):
            _run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", interface)
            _run("ip", "-n", space, "link", "set", interface, "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")

    def shape(self, mbit: int | None) -> None:
        """Let this many megabits a second through, each way; None: as many as there can be."""
        for space, interface in zip(self.spaces, self.interfaces, strict=True):
            device = ("dev", interface, "root")
            subprocess.run(("tc", "-n", space, "qdisc", "del", *device), check=False, capture_output=True)
            if mbit is not None:
                # Two milliseconds; and more than the largest packet, 68 KiB with the headers of its parts, which tbf
                # would cut up otherwise, on the core that computes.
                burst = max(128 * 1024, mbit * 1_000_000 // 8 // 500)
                limits = ("burst", str(burst), "limit", str(8 * 2**20))
                _run("tc", "-n", space, "qdisc", "add", *device, "tbf", "rate", f"{mbit}mbit", *limits)

    def close(self) -> None:
        for space in self.spaces:
            subprocess.run(("ip", "netns", "del", space), check=False, capture_output=True)

    def within(self, rank: int) -> tuple[str, ...]:
        """What a command begins with that runs where this rank is."""
        return ("ip", "netns", "exec", self.spaces[rank])


@contextmanager
def _namespaces() -> Iterator[Link]:
    link = Link(f"weft-{os.getpid()}")
    try:
        link.open()
        yield link
    finally:
        link.close()


class Ranks:
    """The two processes (weave_ranks.py)."""

    def __init__(self, link: Any, layers: int, precisions: Sequence[str], tokens: int, *, gloo: bool = False) -> None:
        from weft.kernels import resolve

        cores = sorted(os.sched_getaffinity(0))
        script = str(Path(__file__).with_name("weave_ranks.py"))
        self._processes = [
            subprocess.Popen(
                (*link.within(rank), sys.executable, script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        for rank, process in enumerate(self._processes):
            orders = {
                "rank": rank,
                "core": cores[rank % len(cores)],
                "level": resolve("auto")[0],
                "models": {
                    name: (MIXTURE if name == "mixture" else SHAPE) | {"num_hidden_layers": layers}
                    for name in precisions
                },
                "tokens": tokens,
                "gloo": gloo,
                "address": link.addresses[0],
                "port": PORT,
                "bind": link.addresses[rank],
                "interface": link.interfaces[rank],
            }
            self._tell(process, orders)
        for process in self._processes:
            self._answer(process)

    def job(self, cell: Cell, rounds: int) -> dict[str, Any]:
        """As `merged`."""
        for process in self._processes:
            self._tell(
                process,
                {
                    "mbit": cell.mbit,
                    "latency": cell.latency,
                    "precision": cell.precision,
                    "tokens": cell.tokens,
                    "rounds": rounds,
                },
            )
        return merged([self._answer(process) for process in self._processes])

    def close(self) -> None:
        """Ends them: by the end of their input, or, where this was interrupted, at once."""
        for process in self._processes:
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()

    @staticmethod
    def _tell(process: subprocess.Popen[str], what: dict[str, Any]) -> None:
        if process.stdin is not None:
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> Any:
        line = process.stdout.readline() if process.stdout is not None else ""
        if not line:
            raise RuntimeError(f"a rank has ended with exit code {process.wait()}")
        return json.loads(line)


def _arguments() -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, metavar="N", help="layers of the model (6; 4 with --quick, 3 with --mixture)"
    )
    parser.add_argument(
        "--cells", type=_cell, nargs="+", metavar="CELL", help="these only: MBIT:PRECISION:TOKENS[:MILLISECONDS]"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="of each cell (7; 5 with --short, 3 with --quick)")
    parser.add_argument("--gloo", action="store_true", help="also carry fused and woven seams by the gloo library")
    parser.add_argument("--mixture", action="store_true", help="a model with experts instead")
    parser.add_argument("--short", action="store_true", help="a part of the grid: all claims in ten minutes")
    arguments = parser.parse_args()
    arguments.layers = arguments.layers or (3 if arguments.mixture else 4 if arguments.quick else 6)
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 5 if arguments.short else 7)
    return arguments


def _cell(text: str) -> Cell:
    """MBIT:PRECISION:TOKENS, or with MILLISECONDS of latency behind them."""
    parts = text.split(":")
    try:
        mbit, tokens = int(parts[0]), int(parts[2])
        latency = float(parts[3]) / 1000 if len(parts) > 3 else 0.0
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"{text!r}; 500:bf16:1024 and 1000:w4a8:512:0.1 would work") from None
    if len(parts) > 4 or parts[1] not in ("bf16", "w4a8", "mixture") or min(mbit, tokens) < 1 or latency < 0:
        raise argparse.ArgumentTypeError(f"{text!r}; 500:bf16:1024 and 1000:w4a8:512:0.1 would work")
    return Cell(mbit, latency, parts[1], tokens)


def _missing() -> str | None:
    """Why this cannot run here."""
    if os.geteuid():
        return "network namespaces need root"
    if absent := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"no {absent[0]} here"
    return None if common.cores() > 1 else "two ranks need a core each"


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _timed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The modes that there are."""
    return [name for name in ALL_MODES if any(name in one for one in rows)]


def _head(timed: Sequence[str]) -> list[str]:
    times = [f"{name}, ms" for name in timed]
    return ["link", "model", "tokens", *times, "comm", "woven gain", "chosen", "vs plain", "best", "regret"]


def _cells(one: dict[str, Any], timed: Sequence[str]) -> list[object]:
    link = "not shaped" if one["mbit"] is None else f"{one['mbit']} Mbit/s"
    if one["latency"]:
        link += f" + {1000 * one['latency']:g} ms"
    times = [one.get(name, "-") for name in timed]
    shares = [f"{one['communication']:.0%}", one["gain"], one["chosen"], f"{one['chosen_vs_plain']:.2f}"]
    return [link, one["precision"], one["tokens"], *times, *shares, one["best"], f"{one['regret']:.1%}"]


def _plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib import pyplot

    precisions = ("bf16", "w4a8")
    figure, axes = pyplot.subplots(1, len(precisions), figsize=(11, 4), squeeze=False, sharey=True)
    for axis, precision in zip(axes[0], precisions, strict=True):
        for mbit in MBIT:
            some = [one for one in rows if (one["precision"], one["mbit"], one["latency"]) == (precision, mbit, 0.0)]
            some.sort(key=lambda one: one["tokens"])
            axis.plot(
                [one["tokens"] for one in some], [one["gain"].median for one in some], "o-", label=f"{mbit} Mbit/s"
            )
        axis.axhline(1.0, color="grey", linestyle=":")
        axis.set(xscale="log", xlabel="tokens", ylabel="plain / woven", title=precision)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
