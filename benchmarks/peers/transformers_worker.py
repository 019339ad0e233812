"""transformers as a contestant: `generate`, greedy, a static batch, BF16. Argument: model folder."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from workerloop import serve


class Clock(StoppingCriteria):
    """Never stops anything; notes when each step's tokens were known."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Transformers:
    def __init__(self, model: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self.name = f"transformers {transformers.__version__}, torch {torch.__version__}"

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        start = time.perf_counter()
        ids = torch.tensor(prompts)
        clock = Clock()
        found = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=output,
            max_new_tokens=output,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return {
            "seconds": time.perf_counter() - start,
            "first": clock.times[0] - start,
            "last": clock.times[-1] - start,
            "tokens": found[:, ids.shape[1] :].tolist(),
        }

    @torch.inference_mode()
    def score(self, tokens: list[int]) -> dict[str, Any]:
        ids = torch.tensor([tokens])
        logprobs = self._model(ids).logits[0, :-1].float().log_softmax(-1)
        return {
            "top": logprobs.argmax(-1).tolist(),
            "logprobs": logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist(),
        }


if __name__ == "__main__":
    serve(lambda: Transformers(sys.argv[1]))
