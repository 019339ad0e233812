"""weft as a contestant: the engine in this process, as `weft.LLM` has it.

Arguments: model folder, most sequences, --kv-cache-dtype.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from workerloop import serve

import weft
from weft.config import EngineConfig
from weft.core.request import PromptScores, Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.loop.build import open_engine

CONTEXT = 1024


class Weft:
    def __init__(self, model: str, sequences: int, kv: str) -> None:
        # Prefix caching is off, so that no round is helped by the one before.
        config = EngineConfig(
            model=model,
            dtype="bfloat16",
            max_model_len=CONTEXT,
            max_num_seqs=sequences,
            enable_prefix_caching=False,
            kv_cache_dtype=kv,
        )
        config.validate()
        self._engine, ready = open_engine(config, lambda _: None)
        self._asked = 0
        self.facts = {"memory": dict(ready.memory), "kv_slots": ready.blocks * ready.block_size}
        self.name = f"weft {weft.__version__} ({ready.device}, {ready.kernels}, {ready.dtype})"

    def run(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        start = time.perf_counter()
        names = self._submit(prompts, SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True))
        tokens: dict[str, list[int]] = {name: [] for name in names}
        times: list[float] = []
        waiting = set(names)
        while waiting:
            events = self._engine.step(None)
            now = time.perf_counter() - start
            for event in events:
                if isinstance(event, TokenOutput) and event.token is not None:
                    tokens[event.request].append(event.token)
                    if event.request == names[0]:
                        times.append(now)
                elif isinstance(event, RequestEnd):
                    _check(event)
                    waiting.discard(event.request)
        return {
            "seconds": time.perf_counter() - start,
            "first": times[0],
            "last": times[-1],
            "tokens": [tokens[name] for name in names],
        }

    def score(self, tokens: list[int]) -> dict[str, Any]:
        names = self._submit([tokens], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1))
        scores: PromptScores | None = None
        while True:
            for event in self._engine.step(None):
                if isinstance(event, PromptScores):
                    scores = event
                elif isinstance(event, RequestEnd) and event.request == names[0]:
                    _check(event)
                    if scores is None:
                        raise RuntimeError("the engine delivered no prompt log-probabilities")
                    return {
                        "top": [score.top[0][0] for score in scores.scores],
                        "logprobs": [score.logprob for score in scores.scores],
                    }

    def _submit(self, prompts: list[list[int]], params: SamplingParams) -> list[str]:
        names = []
        for prompt in prompts:
            self._asked += 1
            names.append(f"bench-{self._asked}")
            self._engine.submit(Request(names[-1], tuple(prompt), params))
        return names


def _check(end: RequestEnd) -> None:
    if end.error is not None:
        raise RuntimeError(end.error)


if __name__ == "__main__":
    serve(lambda: Weft(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
