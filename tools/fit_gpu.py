"""Fits the coefficients of the simulator's cost model on measured times.

    python tools/fit_gpu.py --data DIR          # all that weft ships: src/weft/sim/data/{fits,links}.json
    python tools/fit_gpu.py --gpu h100 --csv FILE --out my_h100.json [--arithmetic int8]
    python tools/fit_gpu.py --gpu h100 --phases FILE --out my_h100.json

DIR holds gpu_profiles (aiconfigurator, llmservingsim). The CSV has the columns m, n, k, dtype, seconds of products
[m, k] times [k, n] on the GPU. --phases is the JSON of benchmarks/gpu_phases.py: what two lanes on parts of the SMs
cost each other (saturation, contention). What a file cannot tell stays as it is; both can be given at once, and --gpu
can be a file that this tool wrote. Rows of the profiles that are kept back (weft.sim.profiles) are never fitted on.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import ConfigError
from weft.sim import fit, hardware, profiles
from weft.sim.attention import Heads, Work
from weft.sim.gemm import Operands
from weft.sim.hardware import Gpu, Part
from weft.sim.phase_times import read_phase_times

# Both ways round. Ampere's library has few kernels, Hopper's more.
AMPERE = ((256, 128), (128, 256), (128, 128), (256, 64), (64, 256), (128, 64), (64, 128), (64, 64), (64, 32), (32, 64))
HOPPER = (*AMPERE, (192, 128), (128, 192), (128, 32), (32, 128))
PROFILED = {"a100": ("a100_sxm", AMPERE, False), "h100": ("h100_sxm", HOPPER, True), "h200": ("h200_sxm", HOPPER, True)}
GPU_OF = {"a100": "a100-80", "h100": "h100", "h200": "h200", "rtx-pro-6000": "rtx-pro-6000"}
LINKS = {"nvlink3": (("a100_sxm",), False), "nvlink4": (("h100_sxm", "h200_sxm"), True)}
LIMITS = tuple(2.0**power for power in range(19, 27))
# Of RMSNorm on an H100: 3.0 of 3.35 TB/s at 32768 tokens of 8192 (TokenWeave, figure 4).
NORM_DRAM = 0.9
# What profiles of prompts alone and decoding alone cannot tell, and one with heads of one group.
ALONE = {"beside": 1.0, "empty": 0.0}
GROUPED = {"alone": 2e-8, "regroup": 0.0}
MIXED = 1500  # rows of each kind that attention is fitted on
DIGITS = 4


def whole(gpu: Gpu) -> Part:
    return gpu.part()


def profiled(folder: Path, gpu: Gpu, name: str, tiles: Any, packed: bool) -> dict[str, Any]:
    """Products, attention and experts of one GPU in aiconfigurator's profile."""
    gemms = profiles.read_gemms(folder / f"{name}_gemm_bf16.csv.gz")
    attentions = profiles.read_attentions(folder, name)
    attentions = attentions.where(~attentions.kept_back)
    moes = profiles.read_moes(folder / f"{name}_moe_bf16.csv.gz")
    heads, work = profiles.heads_of(attentions), profiles.works(attentions, packed)
    return {
        "gemm": fit.fit_gemm(whole(gpu), gemms.where(~gemms.kept_back), tiles),
        "attention": fit.fit_attention(whole(gpu), heads, work, attentions.seconds, packed, ALONE),
        "moe": fit.fit_moe(whole(gpu), moes.where(~moes.kept_back)),
    }


def layered(folder: Path, gpu: Gpu) -> dict[str, Any]:
    """Products, attention and pointwise kernels of the RTX PRO 6000 in llmservingsim's profile."""
    gemms = profiles.read_layer_gemms(folder)
    heads = Heads(32, 8, 128, 128, 2 * 128)
    work, seconds, kept_back = profiles.read_mixed(folder / "tp1" / "attention.csv.gz", heads, False)
    fitted = balanced(work, ~kept_back)
    kept = replace(work, **{name: getattr(work, name)[fitted] for name in work.__slots__})
    moved, taken = profiles.read_pointwise(folder)
    return {
        "gemm": fit.fit_gemm(whole(gpu), gemms.where(~gemms.kept_back), HOPPER),
        "attention": fit.fit_attention(whole(gpu), heads, kept, seconds[fitted], False, GROUPED),
        "pointwise": fit.fit_pointwise(whole(gpu), moved, taken),
    }


def balanced(work: Work, fitted: Any) -> Any:
    """Indices of fitted rows: a step has prompts, decoding sequences, or both, and the profile has fifty times as many
    of the last kind."""
    kinds = (work.rows == 0, work.sequences == 0, (work.rows > 0) & (work.sequences > 0))
    found = [np.flatnonzero(fitted & kind) for kind in kinds]
    return np.concatenate([rows[np.linspace(0, len(rows) - 1, MIXED).astype(int)] for rows in found])


def collectives(folder: Path, name: str, prefixes: Sequence[str], multicast: bool) -> dict[str, dict[str, float]]:
    """Of each library that was measured on a link; NCCL first, which the others leave large sizes to."""
    link, found = hardware.find_link(name), {}
    for library, (pattern, kernel) in profiles.LIBRARIES.items():
        paths = [path for prefix in prefixes for path in sorted(folder.glob(f"{prefix}_{pattern}"))]
        times = profiles.read_reduces(paths, kernel)
        made = fit.fit_collective(
            link, times.where(~times.kept_back), multicast, (0.0,) if library == "nccl" else LIMITS
        )
        if library == "nccl":
            link = replace(link, large=made)
        found[library] = rounded(asdict(made))
    return {library: found[library] for library in ("vllm", "sglang", "trtllm", "nccl")}


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Sizes in bytes stay whole."""
    return {
        name: float(f"{value:.{DIGITS}g}") if isinstance(value, float) and not value.is_integer() else value
        for name, value in found.items()
    }


def write(path: Path, found: Any) -> None:
    text = json.dumps(found, indent=2)
    path.write_text(re.sub(r"\[[^\]{}]*\]", lambda match: " ".join(match[0].split()), text) + "\n")  # tiles on one line
    print(f"wrote {path}")


def fit_all(data: Path) -> None:
    fits = json.loads((hardware.DATA / "fits.json").read_text())
    for name, (prefix, tiles, packed) in PROFILED.items():
        made = profiled(data / "aiconfigurator", hardware.find_gpu(GPU_OF[name]), prefix, tiles, packed)
        fits[name] |= {kind: rounded(asdict(value)) for kind, value in made.items()}
    rtx = data / "llmservingsim" / "perf" / "RTXPRO6000" / "meta-llama" / "Llama-3.1-8B" / "bf16"
    made = layered(rtx, hardware.find_gpu("rtx-pro-6000"))
    fits["rtx-pro-6000"] |= {kind: rounded(asdict(value)) for kind, value in made.items()}
    for kind in ALONE:  # the same kernels, of the same library
        fits["a100"]["attention"][kind] = fits["rtx-pro-6000"]["attention"][kind]
    for name in PROFILED:  # no times of bare pointwise kernels on these
        fits[name]["pointwise"] = {"launch": fits["rtx-pro-6000"]["pointwise"]["launch"], "dram": NORM_DRAM}
    fits["rtx-pro-6000"]["moe"] = fits["a100"]["moe"]
    write(hardware.DATA / "fits.json", fits)
    links = json.loads((hardware.DATA / "links.json").read_text())
    for name, (prefixes, multicast) in LINKS.items():
        links[name]["libraries"] = collectives(data / "aiconfigurator", name, prefixes, multicast)
    links["nvlink5"]["libraries"] = links["nvlink4"]["libraries"]
    write(hardware.DATA / "links.json", links)


def fit_csv(gpu: Gpu, path: Path, arithmetic: str) -> Gpu:
    """The GPU with coefficients for products fitted on a file, with `arithmetic` of fewer bits, too; and where the file
    has products on parts of the SMs, with the part that draws all of the bandwidth."""
    bits = {"bf16": 16, "int8": 8, "fp8": 8, "int4": 4, "fp4": 4}[arithmetic]
    times = profiles.read_gemms(path, arithmetic)
    if len(times.m) < len(fit.GEMM):
        raise ConfigError(
            f"{path} has {len(times.m)} rows of {arithmetic}; {len(fit.GEMM)} coefficients are fitted on them, which "
            "takes at least as many products of different sizes"
        )
    made = fit.fit_gemm(gpu.part(arithmetic=arithmetic), times, gpu.gemm.tiles, Operands(bits, bits))
    gpu = replace(gpu, gemm=made, calibrated=True, note=f"products fitted on {path.name}")
    shares = profiles.read_shares(path, arithmetic)
    if shares:
        point = fit.fit_saturation(gpu, shares, arithmetic, Operands(bits, bits))
        gpu = replace(gpu, saturation=point, note=f"{gpu.note}, with parts of the SMs")
    return gpu


def fit_phases(gpu: Gpu, path: Path) -> Gpu:
    """The GPU with what two lanes cost each other, from the file of benchmarks/gpu_phases.py."""
    made = fit.fit_shares(read_phase_times(path), gpu)
    return replace(made, note=f"{gpu.note}; saturation and contention fitted on {path.name}".removeprefix("; "))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with gpu_profiles")
    parser.add_argument("--gpu", metavar="NAME", help=f"whose constants to take: {', '.join(hardware.gpu_names())}")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="columns m, n, k, seconds")
    parser.add_argument("--phases", type=Path, metavar="FILE", help="what benchmarks/gpu_phases.py --json wrote")
    parser.add_argument("--arithmetic", default="bf16", choices=("bf16", "int8", "fp8", "int4", "fp4"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the fitted GPU goes")
    given = parser.parse_args(arguments)
    if given.data is not None:
        fit_all(given.data / "gpu_profiles" if (given.data / "gpu_profiles").is_dir() else given.data)
    elif given.gpu and given.out and (given.csv or given.phases):
        try:
            gpu = hardware.find_gpu(given.gpu)
            gpu = gpu if given.csv is None else fit_csv(gpu, given.csv, given.arithmetic)
            gpu = gpu if given.phases is None else fit_phases(gpu, given.phases)
        except ConfigError as error:
            parser.error(error.message)
        found = asdict(gpu)
        write(given.out, found | {"gemm": rounded(found["gemm"])})
    else:
        parser.error("give --data; or --gpu and --out, with --csv or --phases")


if __name__ == "__main__":
    main()
