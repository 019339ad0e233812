"""OpenVINO GenAI as a contestant. Arguments: exported folder, most sequences.

One prompt goes through LLMPipeline, several through ContinuousBatchingPipeline: each is the faster one at its own.
The CPU plugin's defaults stand: activations are quantised to INT8 on the fly, the KV cache has 8 bits.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai
from workerloop import serve

CONTEXT = 1024
BLOCK = 32  # KV slots in a block of the CPU plugin
BATCHED_TOKENS = 512


class Times(openvino_genai.StreamerBase):
    """The moments at which tokens came."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def write(self, _: Any) -> Any:
        self.seen.append(time.perf_counter())
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is kept back."""


class OpenVino:
    def __init__(self, folder: str, sequences: int) -> None:
        threads = {"INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0))}
        self._single = openvino_genai.LLMPipeline(folder, "CPU", **threads)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = sequences * CONTEXT // BLOCK
        scheduler.max_num_seqs = sequences
        scheduler.max_num_batched_tokens = BATCHED_TOKENS
        scheduler.enable_prefix_caching = False
        self._many = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", threads)
        self.name = f"openvino-genai {importlib.metadata.version('openvino-genai')}"

    def run(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        wanted = openvino_genai.GenerationConfig()
        wanted.max_new_tokens = wanted.min_new_tokens = output
        wanted.ignore_eos = True
        wanted.do_sample = False
        tensors = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        start = time.perf_counter()
        if len(prompts) == 1:
            times = Times()
            tokens = [list(self._single.generate(tensors[0], wanted, times).tokens[0])]
            first, last = times.seen[0] - start, times.seen[-1] - start
        else:
            found = self._many.generate(tensors, [wanted] * len(tensors))
            tokens = [list(one.m_generation_ids[0]) for one in found]
            first, last = float("nan"), time.perf_counter() - start
        return {"seconds": time.perf_counter() - start, "first": first, "last": last, "tokens": tokens}

    def score(self, tokens: list[int]) -> dict[str, Any]:
        raise NotImplementedError("OpenVINO GenAI gives no log-probabilities of a prompt")


if __name__ == "__main__":
    serve(lambda: OpenVino(sys.argv[1], int(sys.argv[2])))
