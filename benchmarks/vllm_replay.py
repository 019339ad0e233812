"""A measured run of vLLM, request by request, and the same requests in virtual time on the simulated GPU.

The scheduler and the engine are weft's own, set as that run was: sequences, tokens of a step, chunked prompts. The run:
LLMServingSim's bench_vllm, Llama-3.1-8B in bf16 on one RTX PRO 6000 with vLLM 0.19, 300 requests of ShareGPT's lengths.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weft.core.plan import Capacity
from weft.core.request import Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices.virtual import VirtualDevice
from weft.loop.engine import Engine
from weft.sim.step import StepCost

MEASURED = Path("llmservingsim") / "bench_vllm" / "RTXPRO6000" / "Llama-3.1-8B" / "vllm"
BLOCK = 16
MEMORY = 0.9  # vLLM's part of the memory for weights and KV
VOCABULARY = 128256


@dataclass(frozen=True, slots=True)
class Measured:
    """due: seconds after the first. ttft, tpot: seconds."""

    due: float
    input_tokens: int
    output_tokens: int
    ttft: float
    tpot: float


def read_run(folder: Path) -> tuple[list[Measured], int, int]:
    """The requests in order of arrival, most sequences and most tokens of a step."""
    given = json.loads((folder / "meta.json").read_text())["engine_kwargs"]
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: float(row["arrival_time"]))
    first = rows[0]["arrival_time"]
    found = [
        Measured(
            due=row["arrival_time"] - first,
            input_tokens=row["input_toks"],
            output_tokens=row["output_toks"],
            ttft=row["first_token_ts"] - row["queued_ts"],
            tpot=(row["last_token_ts"] - row["first_token_ts"]) / (row["output_toks"] - 1),
        )
        for row in rows
    ]
    return found, given["max_num_seqs"], given["max_num_batched_tokens"]


def replay(run: list[Measured], cost: StepCost, sequences: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """TTFT and TPOT of each request, in virtual time."""
    left = MEMORY * cost.capacity_bytes - cost.weight_bytes
    longest = max(one.input_tokens + one.output_tokens for one in run)
    capacity = Capacity(
        blocks=int(left / (cost.kv_bytes_per_token * BLOCK)), block_size=BLOCK, max_tokens=tokens, max_slices=sequences,
        shares=1, max_model_len=longest + BLOCK, vocabulary=VOCABULARY,
    )  # fmt: skip
    device = VirtualDevice(capacity, cost=cost)  # type: ignore[arg-type]
    settings = SchedulerSettings(sequences, tokens, max_num_queued_reqs=10**6, enable_prefix_caching=False)
    scheduler = Scheduler(capacity, device.lanes(), settings, key=b"replay")
    engine = Engine(device, scheduler, device.clock, step_timeout=None)
    seen: list[list[float]] = [[] for _ in run]
    at, ended = 0, 0
    while ended < len(run):
        while at < len(run) and run[at].due <= device.clock() + 1e-9:
            params = SamplingParams(max_tokens=run[at].output_tokens, ignore_eos=True, temperature=0.0)
            engine.submit(Request(str(at), (at % VOCABULARY,) * run[at].input_tokens, params))
            at += 1
        for event in engine.step(max(run[at].due - device.clock(), 0.0) if at < len(run) else None):
            if isinstance(event, TokenOutput) and event.token is not None:
                seen[int(event.request)].append(device.clock())
            elif isinstance(event, RequestEnd):
                ended += 1
    ttft = np.array([times[0] - one.due for times, one in zip(seen, run, strict=True)])
    return ttft, np.array([(times[-1] - times[0]) / (len(times) - 1) for times in seen])
