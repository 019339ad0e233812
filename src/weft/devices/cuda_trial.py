"""Steps that a GPU runs before it opens: to know what memory they take, and so that all kernels are compiled by then.

Compiling one takes seconds, and a request would wait for it. What decides which kernels are called: how many rows there
are (the tile of a product), how many slices (attention), and what is asked of a draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from weft.config import EngineConfig
from weft.core.plan import Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices.cuda_draw import start_draw
from weft.devices.cuda_forward import CudaForward, buckets, planner_of
from weft.devices.cuda_ranks import Ranks
from weft.devices.cuda_streams import Gpu
from weft.errors import ConfigError
from weft.kernels.triton import TritonKernels
from weft.models.decoder import Decoder
from weft.models.families import ModelConfig
from weft.models.loader import Weights

GREEDY = SamplingParams(temperature=0.0)
ALL = SamplingParams(
    temperature=0.5, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logit_bias=((0, 1.0),), logprobs=1
)
TILES = (16, 32, 64)  # rows; beyond them a product has one kernel


@dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes at the peak: of a prefill step, and of what decode graphs of one lane hold."""

    prefill: int
    graphs: int


def peaks_of(
    gpu: Gpu,
    config: EngineConfig,
    model: ModelConfig,
    kernels: TritonKernels,
    weights: Weights,
    ranks: Ranks | None = None,
) -> Peaks:
    """What `try_out` finds. Raises ConfigError where the device has no memory for steps of that size: it names the
    flags, and values that were tried and fit. Of ranks none tries alone, for all must make the same steps."""

    def tried(tokens: int, seats: int) -> Peaks | None:
        smaller = replace(config, max_num_batched_tokens=tokens, max_num_seqs=seats)
        try:
            return try_out(gpu, smaller, model, kernels, weights, ranks)
        except torch.OutOfMemoryError:
            return None

    tokens, seats = config.max_num_batched_tokens, config.max_num_seqs
    found = tried(tokens, seats)
    if found is not None:
        return found
    flags = f"--max-num-batched-tokens is {tokens} and --max-num-seqs is {seats}"
    remedy = "smaller ones, other processes that end, or a smaller model would help"
    free, _ = gpu.memory()  # by now what the step had taken is free again
    while ranks is None and tokens > 1:
        tokens, seats = tokens // 2, max(1, seats // 2)
        if tried(tokens, seats) is not None:
            remedy = f"--max-num-batched-tokens {tokens} and --max-num-seqs {seats} fit"
            break
        gpu.memory()
    raise ConfigError(
        f"{flags}: a step of that size does not fit in {free / 2**30:.2f} GiB beside the weights; {remedy}"
    )


def try_out(
    gpu: Gpu,
    config: EngineConfig,
    model: ModelConfig,
    kernels: TritonKernels,
    weights: Weights,
    ranks: Ranks | None = None,
) -> Peaks:
    """Run the largest steps that there can be, and small ones, on a KV of their own that is gone afterwards. ranks: the
    others, who try out the same."""
    seats, tokens, size = config.max_num_seqs, config.max_num_batched_tokens, config.block_size
    length = min(tokens, model.context)
    decoder = Decoder(model, weights, kernels, length)
    whole = -(-length // size)
    kv = decoder.make_kv(whole, size, config.kv_cache_dtype)
    stream, planner = gpu.stream(), planner_of(gpu, kernels.attend, decoder, size, seats)
    forward = CudaForward(gpu, stream, decoder, kv, size, max_slices=seats, graphs=False, planner=planner, ranks=ranks)
    table = tuple(range(whole))
    # As wide as in a graph: decode keeps partial sums for every split that a table might have.
    longest = min(model.context, config.max_model_len or model.context)
    row = Slice(0, 0, (0,), (0,) * max(whole, -(-longest // size)))

    def prompt(count: int) -> Slice:
        return Slice(0, 0, (0,) * count, table)

    def run(slices: Sequence[Slice], rows: int) -> None:
        with stream.use():
            logits = forward.run(slices, range(rows))
            for params in (GREEDY, ALL):
                start_draw(gpu, logits, [Sampling(params, 0, 1, (0,), (0,), (0,))] * rows, forward.drawn)

    @torch.inference_mode()
    def prefill() -> None:
        run([prompt(min(length, tokens - at)) for at in range(0, tokens, length)], seats)

    @torch.inference_mode()
    def decode() -> None:
        run([row] * seats, seats)

    @torch.inference_mode()
    def others() -> None:
        for count in TILES:
            run([prompt(min(count, length))], 1)
        for count in (*(64 << step for step in range(seats.bit_length()) if 64 << step < seats), seats):
            run([row] * count, count)
            run([*[row] * (count - 1), prompt(min(2, length))], 1)

    gpu.peak(others)
    peaks = gpu.peak(prefill), gpu.peak(decode)
    logits = seats * model.vocabulary * torch.float32.itemsize  # of all graphs
    planned = 0 if planner is None else planner.bytes(len(buckets(seats)))
    return Peaks(peaks[0] + planned, peaks[1] + logits if kernels.attend.capturable else 0)
