"""`weft serve` as a contestant, asked over HTTP with streaming by a client in this process.

Arguments: model folder, most sequences, --kv-cache-dtype. The server, its engine and the client share the cores.
"""

from __future__ import annotations

import asyncio
import atexit
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from serving import Server
from workerloop import serve

import weft
from weft.bench.client import Target, first_model
from weft.bench.load import run_load
from weft.bench.traffic import Shot

CONTEXT = 1024


class WeftServer:
    def __init__(self, model: str, sequences: int, kv: str) -> None:
        flags = ["--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--max-num-seqs", str(sequences)]
        flags += ["--kv-cache-dtype", kv, "--no-enable-prefix-caching", "--log-level", "warning"]
        self._server = Server([model, *flags])
        atexit.register(self._server.stop)
        asyncio.run(self._server.wait_ready())
        name = asyncio.run(first_model(self._server.address))
        self._target = Target(self._server.address, name, extra={"temperature": 0.0, "ignore_eos": True})
        self.name = f"weft {weft.__version__} (weft serve, HTTP)"

    def run(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        shots = [Shot(0.0, tuple(prompt), len(prompt), output) for prompt in prompts]
        start = time.perf_counter()
        records = asyncio.run(run_load(self._target, shots, None, lambda _: None))
        seconds = time.perf_counter() - start
        if failed := [record.error for record in records if record.error is not None]:
            raise RuntimeError(failed[0])
        lengths = [record.output_tokens for record in records]
        return {"seconds": seconds, "first": records[0].first, "last": records[0].last, "lengths": lengths}

    def score(self, tokens: list[int]) -> dict[str, Any]:
        raise NotImplementedError("the engine without a server is asked for scores")


if __name__ == "__main__":
    serve(lambda: WeftServer(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
