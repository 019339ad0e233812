"""TokenWeave's tables (section 8) beside the same set-ups on simulated H100s, and whether to weave by weft's choice.

    python benchmarks/paper_tokenweave.py [--quick] [--json FILE] [--plot FILE] [--doc docs/paper_tokenweave.md]

No GPU is used: every figure of ours is SIMULATED, from times of products, attention and all-reduces that were measured
on H100 and fitted (docs/simulator_model.md). Two constants of the simulator's woven step come from one column of this
paper (ibid.); nothing was changed for these tables.

Gains are the time of a plain step over that of another one. `silent` is a plain step whose all-reduces take no time.
`choice` is what weft.weave.choice decides with the curves that a rank would measure at start-up; `table` what the
paper's shipped configuration does at that size.

gain_error_percent: mean absolute error of the woven gain against the paper's, all cells; gain_median_ratio: median of
ours over theirs. worst_case_vs_plain: the least gain of weft's choice in the grid; worst_case_table: of the paper's
table, in the simulation. choices_regret_percent: the most that a choice takes longer than the quickest mode.
mixtral_1k_woven, mixtral_2k_woven: what weaving would give where the paper has 0.62 and 0.98.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
from paper_common import at_once, figures, finish, lengths, markdown, number, parser, setup

from weft.bench.stats import Slo
from weft.bench.traces import Size
from weft.sim.estimate import cost_of
from weft.sim.hardware import find_gpu
from weft.sim.models import find_model
from weft.sim.step import StepCost
from weft.sim.study import Fleet, study
from weft.weave.choice import Costs, Curve, Mode, choose_mode

GPU = "h100"
BELOW = (256, 512)  # sizes that the paper's table never weaves
MEASURED = tuple(2**power for power in range(4, 17))  # tokens that a rank measures at start-up
CHUNK = 8192  # tokens of the step at which it measures what a seam costs a stage beside it
REQUESTS, QUICK_REQUESTS = 200, 40
SEATS = 256


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt. Gains over plain; `theirs_*` None where the paper has none. predicted: by the choice, of itself."""

    model: str
    ranks: int
    tokens: int
    plain_ms: float
    fused: float
    woven: float
    silent: float
    theirs_woven: float | None
    theirs_silent: float | None
    choice: Mode
    predicted: float
    table: Mode

    def gain(self, mode: Mode) -> float:
        return {Mode.PLAIN: 1.0, Mode.FUSED: self.fused, Mode.WOVEN: self.woven}[mode]


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    paper = figures("tokenweave")
    found = list(prefills(paper))
    tables = {"prefill": markdown(PREFILL_HEAD, [prefill_cells(one) for one in found])}
    print(tables["prefill"])
    rows: list[dict[str, Any]] = [prefill_row(one) for one in found]
    for kind, head, made in (
        ("share", ("model, tokens", "AllReduce %: theirs", "ours", "norm %: theirs", "ours"), shares(paper)),
        ("seam", ("tokens", "AllReduce us: theirs", "ours", "norm: theirs", "ours", "fused: theirs", "ours"),
         seams(paper)),
        ("whole", ("model, tokens", "plain us: theirs", "ours", "woven: theirs", "ours"), whole_layers(paper)),
        ("gain", ("model, tokens", "woven: theirs", "ours", "ours with their seams"), with_their_seams(paper)),
        ("layer", ("model, tokens", "theirs us: plain", "woven", "predicted: woven", "fused", "choice"), layers(paper)),
        ("throughput", ("model, load", "theirs", "ours"), throughputs(paper, arguments.quick)),
    ):  # fmt: skip
        table = list(made)
        tables[kind] = markdown(head, [[one["name"], *map(_cell, one["values"])] for one in table])
        print(f"\n{tables[kind]}", flush=True)
        rows += [{"kind": kind, "name": one["name"], "head": head[1:], "values": one["values"]} for one in table]
    if arguments.plot is not None:
        draw(found, arguments.plot)
    finish(arguments, paper, claims(found), rows, tables)


def cost(model: str, ranks: int, weave: bool = False) -> StepCost:
    return cost_of(find_model(model), find_gpu(GPU), ranks, "bf16", weave=weave)


def measured(one: StepCost) -> Costs:
    """What a rank would measure at start-up (weft.models.measure), if it were as the simulator says."""
    stages = {tokens: one.stages(tokens) for tokens in MEASURED}
    half = one.stages(CHUNK // 2)
    seam = half.join + half.norm / one.ranks
    drag = max(0.0, one.woven_pair(half.attend, seam) - max(half.attend, seam)) / min(half.attend, seam)

    def curve(values: dict[int, float]) -> Curve:
        return Curve(tuple(values.items()))

    return Costs(
        layers=one.model.layers,
        attend=curve({tokens: each.attend for tokens, each in stages.items()}),
        feed=curve({tokens: each.feed for tokens, each in stages.items()}),
        seams={
            Mode.PLAIN: curve({tokens: each.join + each.norm for tokens, each in stages.items()}),
            Mode.FUSED: curve({tokens: each.join + each.norm / one.ranks for tokens, each in stages.items()}),
        },
        drag=drag,
    )


def halves(tokens: int) -> tuple[int, int]:
    """The strands of the paper, and of the simulator; weft itself may weave three."""
    return tokens // 2, tokens - tokens // 2


def prefills(paper: dict[str, Any]) -> Iterator[Prefill]:
    for cells in paper["prefill"]:
        one = cost(cells["model"], cells["ranks"])
        costs = measured(one)
        theirs = {tokens: (cells["woven"][at], cells["silent"][at]) for at, tokens in enumerate(paper["tokens"])}
        for tokens in (*BELOW, *paper["tokens"]):
            ways, strands = one.ways(tokens), halves(tokens)
            woven, silent = theirs.get(tokens, (None, None))
            choice, _ = choose_mode(costs, tokens, (strands,))
            predicted = costs.seconds(Mode.PLAIN, strands) / costs.seconds(choice, strands)
            yield Prefill(
                cells["model"], cells["ranks"], tokens, 1e3 * ways.plain, ways.plain / ways.fused,
                ways.plain / ways.woven, ways.plain / ways.silent, woven, silent,
                choice, predicted,
                Mode.WOVEN if tokens >= paper["table"]["least"][cells["model"]] else Mode.FUSED,
            )  # fmt: skip


def shares(paper: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, both in paper["shares"].items():
        one = cost(name, 8)
        for tokens, joins, norms in zip(paper["tokens"], both["joins"], both["norms"], strict=False):
            ways, stages = one.ways(tokens), one.stages(tokens)
            part = 100 * 2 * one.model.layers / ways.plain
            yield {"name": f"{name}, {tokens}", "values": (joins, part * stages.join, norms, part * stages.norm)}


def seams(paper: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of hidden 8192, as Llama-3-70B has it."""
    one, theirs = cost("llama-3-70b", 8), paper["seams"]
    for tokens, join, norm, fused in zip(*(theirs[key] for key in ("tokens", "join", "norm", "fused")), strict=True):
        ours = one.stages(tokens)
        both = ours.join + ours.norm / one.ranks
        yield {"name": str(tokens), "values": (join, 1e6 * ours.join, norm, 1e6 * ours.norm, fused, 1e6 * both)}


def with_their_seams(paper: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Gains from weaving if seams took what the paper measured: how much of the difference is due to them. For hidden
    8192 on 8 ranks, which figure 4 has. A woven step is left as it is: what bounds it are its stages."""
    theirs = paper["seams"]
    both = [join + norm for join, norm in zip(theirs["join"], theirs["norm"], strict=True)]
    seam = Curve(tuple(zip(theirs["tokens"], (1e-6 * us for us in both), strict=True)))
    for cells in paper["prefill"][:2]:
        one = cost(cells["model"], 8)
        for tokens, woven in zip(paper["tokens"], cells["woven"], strict=True):
            ways, ours = one.ways(tokens), one.stages(tokens)
            swapped = ways.plain + 2 * one.model.layers * (seam(tokens) - ours.join - ours.norm)
            yield {
                "name": f"{cells['model']}, {tokens}",
                "values": (woven, ways.plain / ways.woven, swapped / ways.woven),
            }


def whole_layers(paper: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Microseconds of a layer with both its seams."""
    theirs, one = paper["layers"]["llama-3-70b"], cost("llama-3-70b", 8)
    for tokens, plain, woven in zip(theirs["tokens"], theirs["plain"], theirs["woven"], strict=True):
        ways, each = one.ways(tokens), one.stages(tokens)
        whole = each.attend + each.feed + 2 * (each.join + each.norm)
        quicker = (ways.plain - ways.woven) / theirs["layers"]
        yield {"name": f"llama-3-70b, {tokens}", "values": (plain, 1e6 * whole, woven, 1e6 * (whole - quicker))}


def layers(paper: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """weft's choice given the paper's own times instead of the simulator's, nothing lost beside a seam.

    A stage takes what AllReduces and norms leave of a layer, half of it each; a fused seam what an AllReduce takes
    (figure 4). What is below the least measured size takes as long as that: where the paper's Mixtral is bound by
    launches, it does.
    """
    for name, theirs in paper["layers"].items():
        both = paper["shares"][name]
        known = list(zip(theirs["tokens"], theirs["plain"], both["joins"], both["norms"], strict=False))
        stage = Curve(tuple((tokens, us * (100 - join - norm) / 200) for tokens, us, join, norm in known))
        plain = Curve(tuple((tokens, us * (join + norm) / 200) for tokens, us, join, norm in known))
        fused = Curve(tuple((tokens, us * join / 200) for tokens, us, join, _ in known))
        costs = Costs(theirs["layers"], stage, stage, {Mode.PLAIN: plain, Mode.FUSED: fused}, drag=0.0)
        launched = name.startswith("mixtral")
        for (tokens, us, *_), woven in list(zip(known, theirs["woven"], strict=True))[0 if launched else 1 :]:
            strands = halves(tokens)
            predicted = [costs.seconds(mode, strands) / costs.layers for mode in (Mode.WOVEN, Mode.FUSED)]
            chosen = choose_mode(costs, tokens, (strands,))[0].value
            yield {"name": f"{name}, {tokens}", "values": (us, woven, *predicted, chosen)}


def throughputs(paper: dict[str, Any], quick: bool) -> Iterator[dict[str, Any]]:
    """Requests that all come at once: seconds of plain ranks over those of woven ones."""
    rng = np.random.default_rng(0)
    count = QUICK_REQUESTS if quick else REQUESTS
    read, written = (lengths(*shape, rng.standard_normal(count).tolist()) for shape in SHAREGPT)
    for theirs in paper["throughput"]:
        costs = [cost(theirs["model"], 8, weave) for weave in (False, True)]
        for load in ("512/128", "1024/128", "2048/128", "ShareGPT"):
            common.say(f"{theirs['model']}, {load}")
            sizes = list(map(Size, read, written))
            if load != "ShareGPT":
                sizes = [Size(*map(int, load.split("/")))] * count
            plain, woven = (
                study(Fleet(setup(one, tokens=theirs["chunk"], seats=SEATS)), at_once(sizes), Slo()).totals.seconds
                for one in costs
            )
            yield {"name": f"{theirs['model']}, {load}", "values": (theirs[load], plain / woven)}


# Mean, spread and the longest, of prompts and of answers (docs/paper_semi_pd.md).
SHAREGPT = ((251, 1.5, 1024), (198, 1.0, 1024))


def claims(found: list[Prefill]) -> dict[str, float]:
    compared = [(one.woven, one.theirs_woven) for one in found if one.theirs_woven is not None]
    regrets = [max(1.0, one.fused, one.woven) / one.gain(one.choice) - 1 for one in found]
    made = {
        "gain_error_percent": 100 * float(np.mean([abs(ours / theirs - 1) for ours, theirs in compared])),
        "gain_median_ratio": float(np.median([ours / theirs for ours, theirs in compared])),
        "worst_case_vs_plain": min(one.gain(one.choice) for one in found),
        "worst_case_table": min(one.gain(one.table) for one in found),
        "choices_regret_percent": 100 * max(regrets),
    }
    for tokens in (1024, 2048):
        made[f"mixtral_{tokens // 1024}k_woven"] = next(
            one.woven for one in found if one.model.startswith("mixtral") and one.tokens == tokens
        )
    return made


PREFILL_HEAD = (
    "model, ranks, tokens", "plain ms", "silent: theirs", "ours", "woven: theirs", "ours", "fused: ours", "choice",
    "its gain", "as it predicts", "their table", "its gain",
)  # fmt: skip


def prefill_cells(one: Prefill) -> list[str]:
    return [
        f"{one.model}, {one.ranks}, {one.tokens}", number(one.plain_ms, 1), number(one.theirs_silent),
        number(one.silent), number(one.theirs_woven), number(one.woven), number(one.fused), one.choice.value,
        number(one.gain(one.choice)), number(one.predicted), one.table.value, number(one.gain(one.table)),
    ]  # fmt: skip


def prefill_row(one: Prefill) -> dict[str, Any]:
    return {
        "kind": "prefill", "model": one.model, "ranks": one.ranks, "tokens": one.tokens, "plain_ms": one.plain_ms,
        "silent": one.silent, "woven": one.woven, "fused": one.fused, "theirs_silent": one.theirs_silent,
        "theirs_woven": one.theirs_woven, "choice": one.choice.value, "choice_gain": one.gain(one.choice),
        "choice_predicted": one.predicted,
        "table": one.table.value, "table_gain": one.gain(one.table),
    }  # fmt: skip


def _cell(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return number(value, 2 if value < 3 else 1)


def draw(found: list[Prefill], path: Path) -> None:
    from matplotlib.figure import Figure

    setups = list(dict.fromkeys((one.model, one.ranks) for one in found))
    figure = Figure(figsize=(4 * len(setups), 4), layout="constrained")
    panels: Any = figure.subplots(1, len(setups), sharey=True)
    for axes, (model, ranks) in zip(panels, setups, strict=True):
        here = [one for one in found if (one.model, one.ranks) == (model, ranks)]
        theirs = [one for one in here if one.theirs_woven is not None]
        axes.semilogx([one.tokens for one in theirs], [one.theirs_woven for one in theirs], "k-o", label="paper, woven")
        axes.semilogx([one.tokens for one in here], [one.woven for one in here], "--", label="simulated, woven")
        axes.semilogx([one.tokens for one in here], [one.fused for one in here], ":", label="simulated, fused only")
        chosen = [one.gain(one.choice) for one in here]
        axes.semilogx([one.tokens for one in here], chosen, linewidth=3, alpha=0.4, label="simulated, weft's choice")
        axes.axhline(1.0, color="black", linewidth=0.5)
        axes.set(title=f"{model}, {ranks} x {GPU.upper()}", xlabel="tokens", ylabel="gain over plain")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
