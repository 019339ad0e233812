"""`weft doctor --phases FILE`: the latency models that a recorded run teaches, and how well they predicted it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weft.bench.plot import require_picture
from weft.errors import ConfigError
from weft.phases.latency import StepModel, TtftModel
from weft.phases.paper import PaperPolicy
from weft.phases.recording import Recording, read
from weft.phases.review import Pair, Review, review

SHOWN = 8  # of the last decisions


def report(path: Path, plot: Path | None) -> tuple[dict[str, Any], str]:
    """The same as JSON and as text; a picture if asked for. Raises ConfigError."""
    if plot is not None:
        require_picture(plot)
    recording = read(path)
    found = review(recording)
    if plot is not None:
        _draw(found, plot)
    return _content(recording, found), _text(recording, found)


def _content(recording: Recording, found: Review) -> dict[str, Any]:
    return {
        "policy": _name(recording),
        "questions": found.asked,
        "seconds": found.seconds,
        "decisions": [{"at": one.at, "reason": one.reason} for one in found.decisions],
        "replay_is_the_same": found.same,
        "step_model": None if found.steps is None else _numbers(found.steps),
        "ttft_model": None if found.ttft is None else _numbers(found.ttft),
        "prediction": {name: _errors(pairs) for name, pairs in found.kinds().items()},
    }


def _numbers(model: StepModel | TtftModel) -> dict[str, Any]:
    return {name: getattr(model, name) for name in type(model).__slots__}


def _errors(pairs: Sequence[Pair]) -> dict[str, float]:
    """Of |predicted - observed| / observed, and the bias: the median of predicted / observed."""
    errors = [one.error for one in pairs]
    return {
        "count": len(pairs),
        "median": float(np.median(errors)),
        "p90": float(np.percentile(errors, 90)),
        "bias": float(np.median([one.predicted / one.observed for one in pairs])),
    }


def _name(recording: Recording) -> str:
    return "paper" if isinstance(recording.policy, PaperPolicy) else "auto"


def _text(recording: Recording, found: Review) -> str:
    targets = recording.policy.targets
    same = "decides the same again" if found.same else "decides OTHERWISE: it was recorded by another version"
    lines = [
        f"--partition {_name(recording)}, targets TTFT {targets.ttft:g} s and TPOT {targets.tpot:g} s",
        f"{found.asked} questions in {found.seconds:.1f} s, {len(found.decisions)} decisions; a replay {same}",
        "",
        *_step_lines(found.steps),
        *_ttft_lines(found.ttft),
        "",
        "predictions, each made before what it is compared with",
    ]
    for name, pairs in found.kinds().items():
        errors = _errors(pairs)
        lines.append(
            f"  {name:8} {errors['count']:6.0f}   off by {errors['median']:.1%} (median), {errors['p90']:.1%} (P90); "
            f"predicted / observed {errors['bias']:.3f}"
        )
    if not found.pairs:
        lines.append("  none: there was no model before the run ended")
    if found.decisions:
        lines += ["", "last decisions"]
        lines += [f"  {one.at:10.2f} s  {one.reason}" for one in found.decisions[-SHOWN:]]
    return "\n".join(lines)


def _step_lines(model: StepModel | None) -> list[str]:
    if model is None:
        return ["step times: no fit; fewer than three steps were seen"]
    saturation = "not told by these shares" if model.saturation is None else f"{model.saturation:.0%} of the device"
    longer = f"{model.excess if model.contention is None else model.contention:.1%} longer beside the other lane"
    untold = f"not told, for no share was seen both with the other lane and without; {longer} than shares explain"
    contention = longer if model.contention is not None else untold
    return [
        f"step times, from {model.samples} steps at {_shares(model.shares)} (median error {model.error:.1%})",
        f"  fixed       {model.fixed * 1e3:10.4f} ms",
        f"  base        {model.base * 1e3:10.4f} ms on the whole device",
        f"  token       {model.token * 1e6:10.4f} us",
        f"  slot        {model.slot * 1e9:10.4f} ns of context",
        f"  read        {model.read * 1e9:10.4f} ns of context that prompts read",
        f"  pair        {model.pair * 1e12:10.4f} ps of a prompt's token and a slot that it attends to",
        f"  saturation  {saturation}",
        f"  contention  {contention}",
    ]


def _ttft_lines(model: TtftModel | None) -> list[str]:
    if model is None:
        return ["TTFT = a / (x - load) + b: no fit; it takes fresh samples at two shares"]
    return [
        f"TTFT = a / (x - load) + b, from {model.samples} requests at {len(model.shares)} shares "
        f"(median error {model.error:.1%})",
        f"  a           {model.a:10.4f} s",
        f"  b           {model.b:10.4f} s",
    ]


def _shares(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares) or "no share with enough fresh samples"


def _draw(found: Review, path: Path) -> None:
    from matplotlib.figure import Figure

    kinds = found.kinds()
    figure = Figure(figsize=(4.2 * max(1, len(kinds)), 4.2), layout="constrained")
    panels: Any = figure.subplots(1, max(1, len(kinds)), squeeze=False)[0]
    for axes, (name, pairs) in zip(panels, kinds.items(), strict=False):
        observed, predicted = (np.array([getattr(one, side) for one in pairs]) for side in ("observed", "predicted"))
        dots = axes.scatter(observed * 1e3, predicted * 1e3, s=6, c=[one.share for one in pairs], vmin=0, vmax=1)
        ends = [float(min(observed.min(), predicted.min())) * 1e3, float(max(observed.max(), predicted.max())) * 1e3]
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        axes.set(
            title=f"{name}: off by {_errors(pairs)['median']:.1%}", xlabel="observed (ms)", ylabel="predicted (ms)"
        )
        axes.set(xscale="log", yscale="log")
        figure.colorbar(dots, ax=axes, label="share")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from error
