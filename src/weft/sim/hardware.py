"""GPUs and links as data: what their makers say they can do, and coefficients fitted on measured times.

The files are data/gpus.json (constants with their source, and whose coefficients a GPU takes), data/fits.json and
data/links.json (coefficients, written by tools/fit_gpu.py). A GPU without measurements of its own takes the
coefficients of its nearest relative, which are parts of its own peaks where they are no times; it is marked
uncalibrated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from weft.errors import ConfigError

DATA = Path(__file__).parent / "data"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GemmFit:
    """launch: seconds of any kernel. math: part of the peak that a tile reaches. step: seconds of each step of 128
    bytes along k. tile: seconds of a tile of 128x128 before its first and after its last step. dram: part of the
    bandwidth. overlap: exponent of the norm that joins arithmetic and memory (1: one after the other, infinite: side by
    side). split: seconds of joining the parts of a product that is split along k. tiles: the tiles that kernels exist
    for, rows and columns."""

    launch: float
    math: float
    step: float
    tile: float
    dram: float
    overlap: float
    split: float
    tiles: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class AttentionFit:
    """launch: seconds of the operation with its writing of keys and values. math: part of the peak. chain: part of its
    time alone that the longest block of rows keeps the others waiting; overlap: exponent of the norm that joins them.
    tile, block: seconds to start and end a block of 128 rows of prompts, and one of a decoding sequence. dram: part of
    the bandwidth. position: seconds for each position of the longest decoding sequence, split as far as it goes. alone:
    the same where each head has keys of its own and is not split. combine: seconds of joining the parts of sequences.
    regroup: seconds to put the heads of several decoding sequences in order. decode_overlap: exponent for blocks and
    memory. packed: whether a block takes rows of all heads that share keys. Where not: beside: how much longer the keys
    of decoding sequences take to read beside prompts; empty: seconds of each block that these have no rows for."""

    launch: float
    math: float
    chain: float
    overlap: float
    tile: float
    block: float
    dram: float
    position: float
    alone: float
    combine: float
    regroup: float
    decode_overlap: float
    beside: float
    empty: float
    packed: bool


@dataclass(frozen=True, slots=True)
class MoeFit:
    """Of both products of all experts together. launch: seconds. expert: seconds of each expert that has tokens. math,
    dram: parts of the peaks."""

    launch: float
    expert: float
    math: float
    dram: float


@dataclass(frozen=True, slots=True)
class PointwiseFit:
    """Of norms, gates, rotations. launch: seconds. dram: part of the bandwidth."""

    launch: float
    dram: float


@dataclass(frozen=True, slots=True)
class HostFit:
    """What a step costs that is no kernel of a layer. step: seconds. sequence: seconds for each that samples."""

    step: float
    sequence: float


@dataclass(frozen=True, slots=True)
class CollectiveFit:
    """Of one library. launch: seconds of a collective of two ranks. rank: seconds more for each further one. second:
    seconds more where it takes two phases. bandwidth: part of the link's. multicast: the same where the switch adds up;
    0: it cannot. limit: bytes beyond which the library leaves it to NCCL; 0: never."""

    launch: float
    rank: float
    second: float
    bandwidth: float
    multicast: float
    limit: float


@dataclass(frozen=True, slots=True)
class Link:
    """bandwidth: bytes/s that each rank sends, and as much that it receives. ranks: most that it joins. calibrated:
    whether the coefficients were fitted on times of such a link. collective: of the library that joins the ranks;
    large: of NCCL."""

    name: str
    title: str
    bandwidth: float
    ranks: int
    calibrated: bool
    source: str
    collective: CollectiveFit
    large: CollectiveFit


@dataclass(frozen=True, slots=True)
class Gpu:
    """flops: operations/s, dense, by arithmetic (bf16, fp8, int8, int4, fp4): what is missing it does not have.
    bandwidth: bytes/s of its memory. memory: bytes. saturation: the part of the SMs that draws all of the bandwidth.
    contention: how much longer memory takes beside a lane on the whole device. calibrated: whether the coefficients
    were fitted on times of this GPU; `note` says what they come from."""

    name: str
    title: str
    sms: int
    flops: Mapping[str, float]
    bandwidth: float
    memory: float
    link: str
    calibrated: bool
    note: str
    source: str
    saturation: float
    contention: float
    gemm: GemmFit
    attention: AttentionFit
    moe: MoeFit
    pointwise: PointwiseFit
    host: HostFit

    def part(self, share: float = 1.0, rival: float = 0.0, arithmetic: str = "bf16") -> Part:
        """What a lane on `share` of the device has while another computes on `rival` of it (0: nobody does).

        Shares that add up to more than the device shrink in proportion.
        """
        if not 0.0 < share <= 1.0 or not 0.0 <= rival <= 1.0:
            raise ConfigError(f"{share = }, {rival = }: a share of a device is more than 0 and at most 1")
        own = share / max(1.0, share + rival)
        bandwidth = self.bandwidth * min(1.0, own / self.saturation) / (1.0 + self.contention * rival)
        return Part(self.sms * own, self.flops["bf16"] / self.sms, bandwidth, self.speed(arithmetic))

    def speed(self, arithmetic: str) -> float:
        """Of tensor cores on such numbers, relative to bf16; int4 runs as int8 where there is nothing for it. Raises
        ConfigError where it cannot run."""
        for name in (arithmetic, "int8") if arithmetic == "int4" else (arithmetic,):
            if name in self.flops:
                return self.flops[name] / self.flops["bf16"]
        raise ConfigError(f"{self.title} has no {arithmetic} arithmetic; it has {', '.join(self.flops)}")


@dataclass(frozen=True, slots=True)
class Part:
    """What a kernel has of a GPU. sm_flops: operations/s of one SM in bf16. speed: how much faster its arithmetic
    is."""

    sms: float
    sm_flops: float
    bandwidth: float
    speed: float = 1.0

    @property
    def flops(self) -> float:
        return self.sms * self.sm_flops * self.speed


@cache
def _data(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / name).read_text())
    return found


def gpu_names() -> tuple[str, ...]:
    return tuple(_data("gpus.json"))


def link_names() -> tuple[str, ...]:
    return tuple(_data("links.json"))


def find_gpu(name: str) -> Gpu:
    """By name, or from a file that tools/fit_gpu.py wrote. Raises ConfigError naming those there are."""
    if name.endswith(".json"):
        try:
            return read_gpu(json.loads(Path(name).read_text()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"GPU file {name} cannot be read: {error}") from error
    gpus = _data("gpus.json")
    if name not in gpus:
        raise ConfigError(
            f"no GPU is called {name!r}; there are {', '.join(gpus)}, and .json files of tools/fit_gpu.py"
        )
    return read_gpu({"name": name} | gpus[name])


def read_gpu(raw: Mapping[str, Any]) -> Gpu:
    """From the fields of gpus.json; what `fit` names is taken from fits.json, what stands there itself goes first.
    Raises ConfigError naming a field that is missing or unknown."""
    fits = _data("fits.json")
    taken = raw.get("fit")
    if taken is not None and taken not in fits:
        raise ConfigError(f"fit is {taken!r}; it must be one of {', '.join(fits)}")
    found = (fits[taken] if taken is not None else {}) | dict(raw)
    found.pop("fit", None)
    for key, kind in _FITS.items():
        if key in found:
            found[key] = _read(kind, found[key], key)
    if "flops" in found:
        found["flops"] = {kind: float(value) for kind, value in found["flops"].items()}
    return _read(Gpu, found, "GPU")


def find_link(name: str, library: str | None = None) -> Link:
    """library: whose collectives: nccl, and where they were measured vllm (the default there), sglang and trtllm.
    Raises ConfigError naming the links, or the libraries, that there are."""
    links = _data("links.json")
    if name not in links:
        raise ConfigError(f"no link is called {name!r}; there are {', '.join(links)}")
    raw = {"name": name} | links[name]
    libraries = {key: _read(CollectiveFit, value, key) for key, value in raw.pop("libraries").items()}
    library = library or next(iter(libraries))
    if library not in libraries:
        raise ConfigError(f"no collectives of {library!r} on {name}; there are {', '.join(libraries)}")
    return _read(Link, raw | {"collective": libraries[library], "large": libraries["nccl"]}, "link")


_FITS: dict[str, Any] = {
    "gemm": GemmFit,
    "attention": AttentionFit,
    "moe": MoeFit,
    "pointwise": PointwiseFit,
    "host": HostFit,
}


def _read(kind: type[T], raw: Mapping[str, Any], what: str) -> T:
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if missing := sorted(names - raw.keys()):
        raise ConfigError(f"{what}: {', '.join(missing)} is missing")
    if unknown := sorted(raw.keys() - names):
        raise ConfigError(f"{what}: {', '.join(unknown)} is not known; there are {', '.join(sorted(names))}")
    if kind is GemmFit:
        raw = dict(raw) | {"tiles": tuple((int(rows), int(columns)) for rows, columns in raw["tiles"])}
    return kind(**raw)
