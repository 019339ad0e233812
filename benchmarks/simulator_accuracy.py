"""How near the simulator's cost model comes to measured times that its coefficients were not fitted on.

    python benchmarks/simulator_accuracy.py --data DIR [--quick] [--json FILE] [--plot FILE]

DIR holds gpu_profiles (default: shared/data beside the checkout). What is kept back was chosen before fitting, by a
hash of what was computed (weft.sim.profiles): every fifth weight shape, every fifth batch and heads of attention, every
fifth size of an all-reduce. tools/fit_gpu.py fits on the rest. Beside the model, a roofline of three coefficients
(launch, parts of both peaks) is fitted on the same rows. A run of vLLM is replayed in virtual time; nothing was fitted
on it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import vllm_replay

from weft.sim import fit, profiles
from weft.sim.attention import Heads, attention_seconds
from weft.sim.gemm import gemm_bytes, gemm_seconds
from weft.sim.hardware import Gpu, find_gpu, find_link
from weft.sim.models import find_model
from weft.sim.precision import find_precision
from weft.sim.step import StepCost

SXM = {"a100-80": "a100_sxm", "h100": "h100_sxm", "h200": "h200_sxm"}
LINKS = {"nvlink3": ("a100_sxm",), "nvlink4": ("h100_sxm", "h200_sxm")}
DRAWN = 800  # about so many rows of each kind
RTX = Path("llmservingsim") / "perf" / "RTXPRO6000" / "meta-llama" / "Llama-3.1-8B" / "bf16"


@dataclass(frozen=True, slots=True)
class Residuals:
    """kept: rows that were not fitted on. size: what to draw them over, and its name."""

    kind: str
    name: str
    predicted: np.ndarray
    measured: np.ndarray
    kept: np.ndarray
    size: np.ndarray
    size_name: str

    @property
    def errors(self) -> np.ndarray:
        """Of what was kept back, in percent."""
        return 100 * (self.predicted / self.measured - 1)[self.kept]

    def row(self) -> dict[str, Any]:
        part = np.abs(self.errors)
        return {
            "kind": self.kind, "name": self.name, "mape_percent": part.mean(), "median_percent": np.median(part),
            "p90_percent": np.percentile(part, 90), "bias_percent": self.errors.mean(), "rows": len(part),
        }  # fmt: skip


def main() -> None:
    arguments = _arguments()
    data = arguments.data / "gpu_profiles"
    if not data.is_dir():
        raise SystemExit(f"{data} is not there; --data names the folder that holds gpu_profiles")
    found = [*gemms(data), *serving_layers(data), *attentions(data), *reduces(data), *experts(data)]
    rows = [one.row() for one in found]
    if not arguments.quick:
        rows += transferred(data)
    print(common.table(["kept back", *list(rows[0])[2:]], [_cells(row) for row in rows]))
    claims = pooled(found) | {"roofline_gemm_mape_percent": roofline(data)}
    run, replayed = vllm(data / vllm_replay.MEASURED)
    claims |= run
    if arguments.plot is not None:
        draw(found, replayed, arguments.plot)
    notes = [
        "The replayed run is SIMULATED with weft's scheduler; the times it is compared with were measured with vLLM."
    ]
    common.report(arguments, claims, rows, notes)


def gemms(data: Path) -> Iterator[Residuals]:
    for name, prefix in SXM.items():
        times = profiles.read_gemms(data / "aiconfigurator" / f"{prefix}_gemm_bf16.csv.gz")
        yield gemm_residuals("gemm", name, find_gpu(name), times)
    yield gemm_residuals("gemm", "rtx-pro-6000", find_gpu("rtx-pro-6000"), profiles.read_layer_gemms(data / RTX))


def serving_layers(data: Path) -> Iterator[Residuals]:
    """Layers of Llama-3.1 on an H100, from a profile that nothing was fitted on."""
    gpu, folder = find_gpu("h100"), data / "llmservingsim" / "h100_v0" / "meta-llama"
    for name, ranks in (("Llama-3.1-8B", (1, 2)), ("Llama-3.1-70B", (1, 2, 4))):
        parts = [profiles.read_h100_gemms(folder / name / f"tp{rank}" / "layers.csv.gz", name, rank) for rank in ranks]
        joined = profiles.Gemms(
            *(np.concatenate([getattr(one, key) for one in parts]) for key in ("m", "n", "k", "seconds"))
        )
        found = gemm_residuals("layers", f"{name}, h100", gpu, joined)
        yield replace(found, kept=np.ones(len(joined.m), dtype=bool))


def gemm_residuals(kind: str, name: str, gpu: Gpu, times: profiles.Gemms) -> Residuals:
    predicted = np.concatenate(
        [gemm_seconds(gpu.gemm, gpu.part(), *(c[i : i + 2000] for c in (times.m, times.n, times.k)))
         for i in range(0, len(times.m), 2000)]
    )  # fmt: skip
    size = 2 * times.m * times.n * times.k
    return Residuals(kind, name, predicted, times.seconds, times.kept_back, size, "operations")


def attentions(data: Path) -> Iterator[Residuals]:
    for name, prefix in SXM.items():
        yield attention_residuals(
            "attention", name, find_gpu(name), profiles.read_attentions(data / "aiconfigurator", prefix)
        )
    gpu, heads = find_gpu("rtx-pro-6000"), Heads(32, 8, 128, 128, 2 * 128)
    work, seconds, kept = profiles.read_mixed(data / RTX / "tp1" / "attention.csv.gz", heads, gpu.attention.packed)
    predicted = attention_seconds(gpu.attention, gpu.part(), heads, work)
    yield Residuals("attention, mixed", "rtx-pro-6000", predicted, seconds, kept, seconds, "seconds measured")


def attention_residuals(kind: str, name: str, gpu: Gpu, times: profiles.Attentions) -> Residuals:
    work = profiles.works(times, gpu.attention.packed)
    predicted = attention_seconds(gpu.attention, gpu.part(), profiles.heads_of(times), work)
    return Residuals(kind, name, predicted, times.seconds, times.kept_back, times.seconds, "seconds measured")


def reduces(data: Path) -> Iterator[Residuals]:
    for name, prefixes in LINKS.items():
        for library, (pattern, kernel) in profiles.LIBRARIES.items():
            folder = data / "aiconfigurator"
            paths = [path for prefix in prefixes for path in sorted(folder.glob(f"{prefix}_{pattern}"))]
            times = profiles.read_reduces(paths, kernel)
            predicted = fit.reduce_predictions(find_link(name, library), times)
            label = f"{name} {library}"
            yield Residuals("all-reduce", label, predicted, times.seconds, times.kept_back, times.size, "bytes")


def experts(data: Path) -> Iterator[Residuals]:
    for name, prefix in SXM.items():
        gpu, times = find_gpu(name), profiles.read_moes(data / "aiconfigurator" / f"{prefix}_moe_bf16.csv.gz")
        predicted = fit.moe_predictions(gpu.moe, gpu.part(), times)
        yield Residuals("experts", name, predicted, times.seconds, times.kept_back, times.tokens, "tokens")


def transferred(data: Path) -> list[dict[str, Any]]:
    """Coefficients of another GPU, with a GPU's own peaks: what an uncalibrated one may expect. All rows count."""
    found = []
    for name, other in (("h100", "h200"), ("h200", "h100"), ("h100", "a100-80"), ("a100-80", "h100")):
        gpu, source = find_gpu(name), find_gpu(other)
        gpu = replace(gpu, gemm=source.gemm, attention=source.attention)
        folder, label = data / "aiconfigurator", f"{name} with coefficients of {other}"
        products = profiles.read_gemms(folder / f"{SXM[name]}_gemm_bf16.csv.gz")
        both = (
            gemm_residuals("gemm", label, gpu, products),
            attention_residuals("attention", label, gpu, profiles.read_attentions(folder, SXM[name])),
        )
        found += [replace(one, kept=np.ones(len(one.measured), dtype=bool)).row() for one in both]
    return found


def pooled(found: list[Residuals]) -> dict[str, float]:
    """Over all GPUs, each row alike. Mixed steps count as attention, too."""

    def errors(kind: str) -> np.ndarray:
        return np.abs(np.concatenate([one.errors for one in found if one.kind.startswith(kind)]))

    return {
        "gemm_mape_percent": errors("gemm").mean(),
        "gemm_median_percent": float(np.median(errors("gemm"))),
        "attention_mape_percent": errors("attention").mean(),
        "allreduce_mape_percent": errors("all-reduce").mean(),
        "experts_mape_percent": errors("experts").mean(),
    }


def roofline(data: Path) -> float:
    """Mean error in percent, as gemm_mape_percent, of launch + max(operations, bytes) with three fitted
    coefficients."""
    found = []
    for name, prefix in SXM.items():
        part = find_gpu(name).part()
        times = profiles.read_gemms(data / "aiconfigurator" / f"{prefix}_gemm_bf16.csv.gz")
        compute = 2 * times.m * times.n * times.k / part.flops
        memory = gemm_bytes(times.m, times.n, times.k) / part.bandwidth

        def predict(given: np.ndarray, rows: np.ndarray, compute: Any = compute, memory: Any = memory) -> np.ndarray:
            return np.asarray(given[0] + np.maximum(compute[rows] / given[1], memory[rows] / given[2]))

        fitted, kept = ~times.kept_back, times.kept_back
        given = fit.fit_positive(lambda now: predict(now, fitted), times.seconds[fitted], (3e-6, 0.7, 0.8))  # noqa: B023
        found.append(np.abs(predict(given, kept) / times.seconds[kept] - 1))
    return float(100 * np.concatenate(found).mean())


def vllm(folder: Path) -> tuple[dict[str, float], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Errors of the replayed run in percent, and (simulated, measured) TTFT and TPOT."""
    run, sequences, tokens = vllm_replay.read_run(folder)
    cost = StepCost(find_model("llama-3.1-8b"), find_gpu("rtx-pro-6000"), find_precision("bf16"))
    ttft, tpot = vllm_replay.replay(run, cost, sequences, tokens)
    both = {
        "ttft": (ttft, np.array([one.ttft for one in run])),
        "tpot": (tpot, np.array([one.tpot for one in run])),
    }
    figures = {"mean": np.mean, "median": np.median, "p99": lambda values: np.percentile(values, 99)}
    made = [
        [f"vLLM run, {name} {label}", *(f"{1e3 * figure(one):.1f}" for one in values),
         f"{100 * (figure(values[0]) / figure(values[1]) - 1):+.1f}"]
        for name, values in both.items() for label, figure in figures.items()
    ]  # fmt: skip
    print(common.table(["", "simulated ms", "measured ms", "error %"], made))

    def error(name: str, label: str) -> float:
        simulated, measured = (figures[label](values) for values in both[name])
        return float(100 * abs(simulated / measured - 1))

    claims = {f"vllm_{name}_mean_error_percent": error(name, "mean") for name in both}
    return claims | {"vllm_p99_error_percent": max(error(name, "p99") for name in both)}, both


def draw(found: list[Residuals], replayed: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(18, 14), layout="constrained")
    rows = picture.subplots(5, 5)
    axes = iter(rows.flat)
    for one, axis in zip(found, axes, strict=False):
        some = slice(None, None, max(1, len(one.errors) // DRAWN))
        axis.semilogx(one.size[one.kept][some], one.errors[some], ".", markersize=2)
        axis.set(title=f"{one.kind}, {one.name}", xlabel=one.size_name, ylabel="error %", ylim=(-60, 60))
        axis.axhline(0, color="black", linewidth=0.5)
    for (name, (simulated, measured)), axis in zip(replayed.items(), axes, strict=False):
        part = np.linspace(0, 100, len(measured))
        axis.plot(np.sort(measured), part, label="measured (vLLM)")
        axis.plot(np.sort(simulated), part, "--", label="simulated")
        axis.set(title=f"run of 300 requests, {name.upper()}", xlabel="seconds", ylabel="percent of requests")
        axis.legend()
    for axis in axes:
        axis.axis("off")
    picture.savefig(path, dpi=50)


def _cells(row: dict[str, Any]) -> list[str]:
    return [f"{row['kind']}, {row['name']}", *(f"{value:.1f}" for value in list(row.values())[2:-1]), str(row["rows"])]


def _arguments() -> argparse.Namespace:
    made = common.parser(__doc__.split("\n")[0])
    data = common.REPOSITORY.parent / "shared" / "data"
    made.add_argument(
        "--data", type=Path, default=data, metavar="DIR", help="holds gpu_profiles (default: %(default)s)"
    )
    return made.parse_args()


if __name__ == "__main__":
    main()
