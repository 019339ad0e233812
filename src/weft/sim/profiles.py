"""Readers of published GPU profiles, as arrays in seconds and bytes, and which of their rows are kept for judging fits.

aiconfigurator: ai-dynamo/aiconfigurator, measured operations. llmservingsim: casys-kaist/LLMServingSim, layers of a
model.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weft.errors import ConfigError
from weft.sim.attention import DIAGONAL, ROWS, Heads, Work

Floats = NDArray[np.float64]
# Files of all-reduces of each library, and the end of the names of kernels without the host's time.
LIBRARIES = {
    "nccl": ("nccl_perf*.csv.gz", "NCCL"),
    "vllm": ("custom_allreduce_perf_vllm*.csv.gz", "graph"),
    "sglang": ("custom_allreduce_perf_sglang*.csv.gz", "graph"),
    "trtllm": ("custom_allreduce_perf_trtllm*.csv.gz", "TRTLLM"),
}
KEPT = 5  # one in so many groups of rows is kept back


def kept_back(*columns: Sequence[float] | Floats) -> NDArray[np.bool_]:
    """Rows that are never fitted on: those whose columns, written as whole numbers with commas, have a CRC-32 that KEPT
    divides. Chosen by the columns alone, so that all rows which agree in them are kept back together."""
    rows = zip(*(np.asarray(column).astype(np.int64).tolist() for column in columns), strict=True)
    return np.array([zlib.crc32(",".join(map(str, row)).encode()) % KEPT == 0 for row in rows], dtype=bool)


@dataclass(frozen=True, slots=True)
class Gemms:
    """[m, k] times [k, n]."""

    m: Floats
    n: Floats
    k: Floats
    seconds: Floats

    def where(self, rows: NDArray[np.bool_]) -> Gemms:
        return Gemms(self.m[rows], self.n[rows], self.k[rows], self.seconds[rows])

    @property
    def kept_back(self) -> NDArray[np.bool_]:
        """By weight shape: no product with a weight of this shape is fitted on."""
        return kept_back(self.n, self.k)


@dataclass(frozen=True, slots=True)
class Attentions:
    """Batches of equal sequences: `rows` each, after `prior` positions."""

    batch: Floats
    rows: Floats
    prior: Floats
    heads: Floats
    kv_heads: Floats
    seconds: Floats

    def where(self, rows: NDArray[np.bool_]) -> Attentions:
        return Attentions(
            self.batch[rows],
            self.rows[rows],
            self.prior[rows],
            self.heads[rows],
            self.kv_heads[rows],
            self.seconds[rows],
        )

    @property
    def kept_back(self) -> NDArray[np.bool_]:
        """By batch and heads, at all lengths."""
        return kept_back(self.batch, self.heads, self.kv_heads)


@dataclass(frozen=True, slots=True)
class Reduces:
    """size: bytes of each rank."""

    ranks: Floats
    size: Floats
    seconds: Floats

    def where(self, rows: NDArray[np.bool_]) -> Reduces:
        return Reduces(self.ranks[rows], self.size[rows], self.seconds[rows])

    @property
    def kept_back(self) -> NDArray[np.bool_]:
        return kept_back(self.ranks, self.size)


@dataclass(frozen=True, slots=True)
class Moes:
    tokens: Floats
    hidden: Floats
    intermediate: Floats
    experts: Floats
    top_k: Floats
    seconds: Floats

    def where(self, rows: NDArray[np.bool_]) -> Moes:
        return Moes(
            self.tokens[rows], self.hidden[rows], self.intermediate[rows], self.experts[rows], self.top_k[rows],
            self.seconds[rows],
        )  # fmt: skip

    @property
    def kept_back(self) -> NDArray[np.bool_]:
        """By the shape of the layer, at all token counts."""
        return kept_back(self.hidden, self.intermediate, self.experts, self.top_k)


def read_table(path: Path) -> dict[str, list[str]]:
    """Columns of a CSV file, which may be compressed. Raises ConfigError naming a file that cannot be read."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise ConfigError(f"{path} has no rows")
    return {name: [row[name] for row in rows] for name in rows[0]}


def _rows(table: dict[str, list[str]], kept: list[bool]) -> dict[str, list[str]]:
    return {name: list(compress(column, kept)) for name, column in table.items()}


def read_gemms(path: Path, dtype: str | None = None) -> Gemms:
    """m, n, k and latency_ms (or seconds) of a CSV file; of its rows of `dtype` where it has such a column. What
    `weft bench kernels` writes will do: its products on the whole device, whose precision is the dtype. Raises
    ConfigError for a column that is missing, and when no row is left."""
    table = read_table(path)
    if "operation" in table:
        table = _products(table, 1.0)
    return _gemms(path, table, dtype)


def read_shares(path: Path, dtype: str) -> dict[float, Gemms]:
    """Products on less than the whole device, by the part of it that they had, from what `weft bench kernels --shares`
    writes; of other files none. Raises as read_gemms."""
    table = read_table(path)
    if "operation" not in table:
        return {}
    shares, units = _columns(path, table, "share", "shares")
    parts = sorted(set((shares / units).tolist()) - {1.0})
    return {part: _gemms(path, _products(table, part), dtype) for part in parts}


def _products(table: dict[str, list[str]], part: float) -> dict[str, list[str]]:
    """Rows of products on this part of the device; their precision is their dtype."""
    rows = zip(table["operation"], table["share"], table["shares"], strict=True)
    kept = [operation == "gemm" and float(share) / float(units) == part for operation, share, units in rows]
    found = _rows(table, kept)
    return found | {"dtype": found["precision"]}


def _gemms(path: Path, table: dict[str, list[str]], dtype: str | None) -> Gemms:
    if dtype is not None and "dtype" in table:
        there = ", ".join(sorted(set(table["dtype"]))) or "none"
        table = _rows(table, [kind == dtype for kind in table["dtype"]])
        if not table["dtype"]:
            raise ConfigError(f"{path} has no rows of {dtype}; there are {there}")
    unit = 1e-3 if "latency_ms" in table else 1.0
    names = ("m", "n", "k", "latency_ms" if "latency_ms" in table else "seconds")
    m, n, k, taken = columns = _columns(path, table, *names)
    for name, column in zip(names, columns, strict=True):
        if column.min() <= 0:
            raise ConfigError(f"{path}: {name} is {column.min():g} in a row; it must be more than 0")
    return Gemms(m, n, k, taken * unit)


def read_attentions(folder: Path, gpu: str) -> Attentions:
    """Prompts and decoding of aiconfigurator's bf16 profile with heads of 128. In both, `isl` rows come after `step`
    positions."""
    found = []
    for name in ("context", "generation"):
        path = folder / f"{gpu}_{name}_attention_bf16_hd128.csv.gz"
        found.append(_columns(path, read_table(path), *_ATTENTION))
    batch, rows, prior, heads, kv_heads, taken = (np.concatenate(both) for both in zip(*found, strict=True))
    return Attentions(batch, rows, prior, heads, kv_heads, taken * 1e-3)


def read_reduces(paths: Iterable[Path], kernel_name: str) -> Reduces:
    """16-bit all-reduces of aiconfigurator's profiles, of the kernels whose names end in `kernel_name`."""
    ranks, size, taken = [], [], []
    for path in paths:
        table = read_table(path)
        kind = table["nccl_dtype" if "nccl_dtype" in table else "allreduce_dtype"]
        for row, (name, kernel, dtype) in enumerate(zip(table["op_name"], table["kernel_source"], kind, strict=True)):
            if name == "all_reduce" and dtype in ("bfloat16", "half") and kernel.endswith(kernel_name):
                ranks.append(float(table["num_gpus"][row]))
                size.append(2.0 * float(table["message_size"][row]))  # the file counts elements
                taken.append(float(table["latency_ms"][row]) * 1e-3)
    return Reduces(np.array(ranks), np.array(size), np.array(taken))


def read_moes(path: Path) -> Moes:
    """Experts with a gate that are split over ranks (not spread, where the ranks' loads differ)."""
    table = read_table(path)
    gated = [(hidden, top_k) not in _NO_GATE for hidden, top_k in zip(table["hidden_size"], table["topk"], strict=True)]
    split = np.array(gated) & np.array([ranks == "1" for ranks in table["moe_ep_size"]])
    names = ("num_tokens", "hidden_size", "inter_size", "num_experts", "topk", "moe_tp_size", "latency_ms")
    tokens, hidden, wide, experts, top_k, ranks, taken = (column[split] for column in _columns(path, table, *names))
    return Moes(tokens, hidden, wide / ranks, experts, top_k, taken * 1e-3)


def heads_of(profile: Attentions) -> Heads:
    """Those of each row, as arrays."""
    return Heads(profile.heads, profile.kv_heads, 128, 128, 2 * 128)


def works(profile: Attentions, packed: bool) -> Work:
    """The work of each row, as arrays: what attention.work_of makes of a batch of equal slices."""
    group = heads_of(profile).together(packed)
    one = profile.rows == 1
    blocks = np.ceil(profile.rows * group / ROWS) * profile.batch * ~one
    return Work(
        pairs=blocks * ROWS / group * (profile.prior + profile.rows / 2 + DIAGONAL),
        blocks=blocks,
        rows=profile.rows * profile.batch * ~one,
        prior=profile.prior * profile.batch * ~one,
        longest=(profile.prior + profile.rows) * ~one,
        tallest=np.ceil(profile.rows * group / ROWS) * ~one,
        sequences=profile.batch * one,
        slots=(profile.prior + 1) * profile.batch * one,
        longest_decode=(profile.prior + 1) * one,
    )


def read_layers(path: Path, layer: str, column: str = "tokens") -> tuple[Floats, Floats]:
    """(tokens, seconds) of one layer of llmservingsim's dense or per-sequence profile."""
    table = read_table(path)
    tokens, taken = _columns(path, table, column, "time_us")
    rows = np.array([name == layer for name in table["layer"]])
    return tokens[rows], taken[rows] * 1e-6


def read_layer_gemms(folder: Path) -> Gemms:
    """Products of Llama-3.1-8B on one rank and on one of two, in llmservingsim's profile."""
    found = []
    for ranks in (1, 2):
        for layer, (n, k) in _LAYERS.items():
            file, column = ("per_sequence", "sequences") if layer == "lm_head" else ("dense", "tokens")
            m, seconds = read_layers(folder / f"tp{ranks}" / f"{file}.csv.gz", layer, column)
            cut = (n, k // ranks) if layer in ("o_proj", "down_proj") else (n // ranks, k)
            found.append((m, np.full(len(m), cut[0]), np.full(len(m), cut[1]), seconds))
    return Gemms(*(np.concatenate(column).astype(np.float64) for column in zip(*found, strict=True)))


def read_h100_gemms(path: Path, model: str, ranks: int) -> Gemms:
    """Products of one rank in llmservingsim's h100_v0: times of layers of Llama-3.1-8B or -70B at every token count."""
    hidden, wide, heads = {"Llama-3.1-8B": (4096, 14336, 32), "Llama-3.1-70B": (8192, 28672, 64)}[model]
    shapes = {
        "q_proj": (128 * heads // ranks, hidden), "k_proj": (128 * 8 // ranks, hidden),
        "o_proj": (hidden, 128 * heads // ranks), "gate_proj": (wide // ranks, hidden),
        "down_proj": (hidden, wide // ranks), "lm_head": (128256 // ranks, hidden),
    }  # fmt: skip
    table = read_table(path)
    m, taken = _columns(path, table, "input", "latency(ns)")
    rows = np.array([name in shapes for name in table["layer_name"]])
    n, k = np.array([shapes[name] for name in table["layer_name"] if name in shapes], dtype=np.float64).T
    return Gemms(m[rows], n, k, taken[rows] * 1e-9)


def read_pointwise(folder: Path) -> tuple[Floats, Floats]:
    """(bytes, seconds) of norms (residual and hidden states, read and written) and gates in the same profile."""
    norm, norm_seconds = read_layers(folder / "tp1" / "dense.csv.gz", "layernorm")
    gate, gate_seconds = read_layers(folder / "tp1" / "dense.csv.gz", "act_fn")
    moved = np.concatenate([norm * 4 * 4096 * 2, gate * 3 * 14336 * 2])
    return moved, np.concatenate([norm_seconds, gate_seconds])


def read_mixed(path: Path, heads: Heads, packed: bool) -> tuple[Work, Floats, NDArray[np.bool_]]:
    """llmservingsim's attention profile: one chunk of a prompt, beside equal decoding sequences; either may be none.
    The last array tells the rows that are kept back: by chunk and number of sequences, at all lengths."""
    chunk, prior, sequences, slots, taken = _columns(
        path, read_table(path), "prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"
    )
    group = heads.together(packed)
    prompt = chunk > 0
    blocks = np.ceil(chunk * group / ROWS)
    work = Work(
        pairs=blocks * ROWS / group * (prior + chunk / 2 + DIAGONAL),
        blocks=blocks,
        rows=chunk,
        prior=prior * prompt,
        longest=(prior + chunk) * prompt,
        tallest=blocks,
        sequences=sequences,
        slots=sequences * slots,
        longest_decode=slots * (sequences > 0),
    )
    return work, taken * 1e-6, kept_back(chunk, sequences)


# (n, k) of Llama-3.1-8B.
_LAYERS = {
    "qkv_proj": (6144, 4096),
    "o_proj": (4096, 4096),
    "gate_up_proj": (28672, 4096),
    "down_proj": (4096, 14336),
    "lm_head": (128256, 4096),
}
# (hidden size, experts of a token) of the models in the profile whose experts have two matrices and no gate.
_NO_GATE = {("2688", "6"), ("2048", "22"), ("4096", "22")}
_ATTENTION = ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "latency_ms")


def _columns(path: Path, table: dict[str, list[str]], *names: str) -> list[Floats]:
    if missing := [name for name in names if name not in table]:
        raise ConfigError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table)}")
    try:
        found = [np.array([float(text) for text in table[name]]) for name in names]
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not all(math.isfinite(value) for column in found for value in column):
        raise ConfigError(f"{path} has values that are no finite numbers")
    return found
