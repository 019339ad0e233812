"""What is in a GPU's memory, and what is left of it for the KV pool."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from weft.config import EngineConfig
from weft.devices.cuda_streams import Gpu
from weft.devices.cuda_trial import Peaks
from weft.devices.memory import Pool, size_pool
from weft.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes. others: of other processes, and what CUDA itself took (compiled kernels, too). activations: of a step of
    every lane, at the peak. graphs: of recorded decode steps."""

    total: int
    others: int
    weights: int
    activations: int
    graphs: int

    @property
    def taken(self) -> int:
        return self.others + self.weights + self.activations + self.graphs

    def rows(self, pool: int) -> tuple[tuple[str, int], ...]:
        """For the start-up table; what is nothing is left out."""
        rows = (
            ("other processes and CUDA", self.others),
            ("weights", self.weights),
            ("activations, at the peak", self.activations),
            ("decode graphs", self.graphs),
            ("KV pool", pool),
            ("left alone", self.total - self.taken - pool),
            ("the device's memory", self.total),
        )
        return tuple(row for row in rows if row[1] > 0)


def usage_of(gpu: Gpu, weights: int, peaks: Peaks, lanes: int) -> Usage:
    """After the weights were loaded and steps were tried out."""
    free, total = gpu.memory()
    return Usage(
        total=total,
        others=max(0, total - free - weights),
        weights=weights,
        activations=lanes * peaks.prefill,
        graphs=lanes * peaks.graphs,
    )


def check_weights(needed: int, free: int, total: int) -> None:
    """Raises ConfigError for weights that do not fit in what is free."""
    if needed > free:
        raise ConfigError(
            f"the weights take {gib(needed)}, and {gib(free)} of the device's {gib(total)} are free; what would "
            "help: --dtype bfloat16, a checkpoint of `weft quantize` (a quarter of that), or ending other processes"
        )


@contextmanager
def out_of_memory(words: str) -> Iterator[None]:
    """Raises ConfigError, which says these words, where the device has no memory for what is done in it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"{words} (torch: {str(error).partition(chr(10))[0]})") from error


def size_gpu_pool(config: EngineConfig, context: int, token_bytes: int, usage: Usage) -> Pool:
    """The KV pool in what --gpu-memory-utilization leaves. Raises ConfigError naming the flag and what would fit."""
    share = config.gpu_memory_utilization
    free = int(usage.total * share) - usage.taken
    block = token_bytes * config.block_size
    if free < block:
        least = (usage.taken + block) / usage.total
        fits = math.ceil(least * 100) / 100
        remedy = (
            f"--gpu-memory-utilization {fits:.2f} holds one block"
            if fits <= 1
            else f"{gib(usage.taken + block - usage.total)} more have to be free: other processes, or a smaller model"
        )
        raise ConfigError(
            f"--gpu-memory-utilization is {share:g}: {gib(int(usage.total * share))} of {gib(usage.total)}; "
            f"taken are {gib(usage.others)} by other processes and CUDA, {gib(usage.weights)} by weights, "
            f"{gib(usage.activations)} by activations (--max-num-batched-tokens {config.max_num_batched_tokens}), "
            f"{gib(usage.graphs)} by graphs (--max-num-seqs {config.max_num_seqs}); {remedy}"
        )
    return size_pool(config, context, token_bytes, free, share=1)


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
