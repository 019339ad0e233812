"""llama.cpp as a contestant: its library called directly, without the sampling and text layers of its Python binding.

Flash attention on, a micro-batch of 512, one stream of KV for each sequence. Arguments: GGUF file, most sequences.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

import llama_cpp
import numpy as np
from workerloop import serve

CONTEXT = 1024
BATCH = 2048
MICRO_BATCH = 512
FLASH_ATTENTION_ON = 1


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Drops the log; kept at module level because the library holds the pointer."""


class LlamaCpp:
    def __init__(self, path: str, sequences: int) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        # A context for one sequence and one for many: with many, each sequence's KV is a stream of its own.
        self._single = self._context(1)
        self._many = self._context(sequences)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._columns = [
            np.ctypeslib.as_array(column, shape=(BATCH,))
            for column in (self._batch.token, self._batch.pos, self._batch.logits)
        ]
        self._sequences = [0] * BATCH  # what batch.seq_id holds: writing it row by row is slow
        for row in range(BATCH):
            self._batch.n_seq_id[row] = 1
            self._batch.seq_id[row][0] = 0
        self.name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"

    def run(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        context = self._single if len(prompts) == 1 else self._many
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        start = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in prompts]
        self._prefill(context, prompts, tokens)
        times = [time.perf_counter() - start]
        length = len(prompts[0])
        for step in range(output - 1):
            rows = [(one[-1], length + step, sequence, True) for sequence, one in enumerate(tokens)]
            self._decode(context, rows)
            for row, one in enumerate(tokens):
                one.append(self._argmax(context, row))
            times.append(time.perf_counter() - start)
        return {"seconds": time.perf_counter() - start, "first": times[0], "last": times[-1], "tokens": tokens}

    def score(self, tokens: list[int]) -> dict[str, Any]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._single), False)
        self._decode(self._single, [(token, i, 0, True) for i, token in enumerate(tokens)])
        top, logprobs = [], []
        for row, following in enumerate(tokens[1:]):
            logits = self._logits(self._single, row).astype(np.float64)
            top.append(int(logits.argmax()))
            peak = logits.max()
            logprobs.append(float(logits[following] - peak - np.log(np.exp(logits - peak).sum())))
        return {"top": top, "logprobs": logprobs}

    def _prefill(self, context: Any, prompts: list[list[int]], tokens: list[list[int]]) -> None:
        """All prompts, whole ones together as far as a batch takes them, and the first token of each."""
        waiting = list(enumerate(prompts))
        while waiting:
            rows: list[tuple[int, int, int, bool]] = []
            ends: list[tuple[int, int]] = []
            while waiting and len(rows) + len(waiting[0][1]) <= BATCH:
                sequence, prompt = waiting.pop(0)
                rows += [(token, i, sequence, i == len(prompt) - 1) for i, token in enumerate(prompt)]
                ends.append((sequence, len(rows) - 1))
            self._decode(context, rows)
            for sequence, row in ends:
                tokens[sequence].append(self._argmax(context, row))

    def _context(self, sequences: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = CONTEXT * sequences
        params.n_batch = BATCH
        params.n_ubatch = MICRO_BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.flash_attn_type = FLASH_ATTENTION_ON
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context for {sequences} sequences")
        return context

    def _decode(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: (token, position, sequence, whether its logits are wanted)."""
        tokens, positions, sequences, wanted = zip(*rows, strict=True)
        for column, values in zip(self._columns, (tokens, positions, wanted), strict=True):
            column[: len(rows)] = values
        for row, sequence in enumerate(sequences):
            if self._sequences[row] != sequence:
                self._sequences[row] = self._batch.seq_id[row][0] = sequence
        self._batch.n_tokens = len(rows)
        status = llama_cpp.llama_decode(context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode answers {status}")

    def _logits(self, context: Any, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        pointer = llama_cpp.llama_get_logits_ith(context, row)
        return np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))

    def _argmax(self, context: Any, row: int) -> int:
        return int(self._logits(context, row).argmax())


if __name__ == "__main__":
    serve(lambda: LlamaCpp(sys.argv[1], int(sys.argv[2])))
