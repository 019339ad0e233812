"""The model of gpu.py: an 8B shape of random weights, made on the device, as a cuda device without an HTTP server."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from weft.core.plan import Capacity, Lane, Plan, Result
from weft.devices.base import Description
from weft.devices.cuda import CudaDevice
from weft.devices.cuda_forward import CudaForward
from weft.devices.cuda_lane import CudaLane
from weft.devices.cuda_streams import Gpu, Stream
from weft.kernels.base import EMBEDDING_GROUP
from weft.kernels.reference import PlainEmbedding
from weft.kernels.triton import TritonKernels
from weft.kernels.triton_w4ax import TritonW4Ax
from weft.kernels.w4ax_weights import BLOCK
from weft.models.decoder import Decoder
from weft.models.families import ModelConfig, parse_config
from weft.models.loader import LayerWeights, Weights
from weft.models.rope import Rotary

GIB = 2**30
BLOCK_SIZE = 16
PATIENCE = 120.0  # seconds for one step; a first one compiles its kernels
HELD = 50_000_000  # cycles of the device, about 25 ms: more than the host takes for the launches of two steps
SPREAD = 0.02  # of random weights: a standard deviation as at the start of training


class DoesNotFit(Exception):
    """A row that this device has no memory for."""


class Stuck(Exception):
    """The device does not answer: nothing more can be measured in this process."""


@dataclass(frozen=True)
class Sizes:
    """What is measured. raw: the model's config.json. room: positions that a decode row goes through, half of them
    before its context. warmup: steps before any that counts. calls: of a kernel in a row. steps: most decode steps in a
    round. copied: bytes of the copy that is called bandwidth. matmul: rows, columns and depth of the product that is
    called the peak. reserve: bytes left for activations and graphs. largest: no batch has more sequences."""

    raw: dict[str, Any]
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    room: int
    warmup: int
    calls: int
    steps: int
    rounds: int
    copied: int
    matmul: int
    reserve: int
    largest: int

    def quick(self) -> Sizes:
        return replace(self, rounds=min(self.rounds, 2), steps=min(self.steps, 16))


def _raw(
    hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, inner: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


REAL = Sizes(
    raw=_raw(4096, 32, 32, 8, 128, 14336, 128256),
    prompts=(512, 4096, 16384),
    batches=(1, 8, 64, 256),
    contexts=(1024, 8192),
    room=256,
    warmup=4,
    calls=10,
    steps=40,
    rounds=5,
    copied=4 * GIB,
    matmul=8192,
    reserve=4 * GIB,
    largest=1024,
)
TINY = Sizes(
    raw=_raw(128, 1, 4, 1, 32, 128, 128),
    prompts=(3, 5, 9),
    batches=(1, 2, 3, 4),
    contexts=(20, 40),
    room=16,
    warmup=1,
    calls=1,
    steps=1,
    rounds=1,
    copied=2**16,
    matmul=32,
    reserve=0,
    largest=2,
)


@dataclass(frozen=True)
class Model:
    """weights: of `kernels`. cache: as --kv-cache-dtype. units: those that multiply most, "bf16" or "int8"."""

    name: str
    config: ModelConfig
    weights: Weights
    kernels: TritonKernels
    cache: str
    units: str

    @property
    def streamed(self) -> int:
        """Bytes of weights that a step reads: all but the embedding."""
        return self.weights.size - _table_bytes(self.weights.embedding)

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token, in all layers."""
        config = self.config
        one = self.kernels.attend.token_bytes(config.kv_heads, config.head_dim, self.weights.dtype, self.cache)
        return config.layers * one

    @property
    def head_operations(self) -> float:
        """Of the output layer, for one row."""
        return 2.0 * self.config.hidden_size * self.config.vocabulary

    @property
    def layer_operations(self) -> float:
        """Of all linear layers but the output layer, for one token."""
        config = self.config
        heads = (2 * config.heads + 2 * config.kv_heads) * config.head_dim
        return 2.0 * config.layers * config.hidden_size * (heads + 3 * config.intermediate_size)

    def attention_operations(self, pairs: float) -> float:
        """For so many pairs of a query's position and a key's."""
        return 4.0 * self.config.layers * self.config.heads * self.config.head_dim * pairs


def plain_model(gpu: Gpu, raw: dict[str, Any]) -> Model:
    """BF16."""
    config, kernels = parse_config(raw), TritonKernels(gpu.device)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16, device=gpu.device).normal_(std=SPREAD)

    def linear(rows: int, columns: int) -> Any:
        return kernels.pack_linear(draw(rows, columns))

    embedding = kernels.pack_embedding(draw(config.vocabulary, config.hidden_size))
    return Model("BF16", config, _weights(gpu, config, embedding, linear), kernels, "bf16", "bf16")


def quantised_weights(gpu: Gpu, raw: dict[str, Any]) -> Weights:
    """All linear layers, the output layer and the embedding in 4 bits, a tenth of the channel blocks as outliers, the
    others behind a Hadamard transform, as `weft quantize` makes them."""
    config, kernels = parse_config(raw), TritonKernels(gpu.device)

    def integers(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-8, 8, (rows, columns), dtype=torch.int8, device=gpu.device)

    def scales(rows: int, groups: int) -> torch.Tensor:
        # Four bits spread evenly have a standard deviation of 4.6.
        drawn = torch.rand(rows, groups, device=gpu.device) + 0.5
        return (drawn * (SPREAD / 4.6)).bfloat16().float()

    def linear(rows: int, columns: int) -> Any:
        blocks = columns // BLOCK
        return kernels.pack_w4ax(
            integers(rows, columns),
            scales(rows, blocks),
            permutation=torch.randperm(columns, device=gpu.device),
            outlier_blocks=max(1, blocks // 10),
            hadamard=True,
        )

    rows, columns = config.vocabulary, config.hidden_size
    embedding = kernels.pack_embedding(integers(rows, columns), scales(rows, columns // EMBEDDING_GROUP).bfloat16())
    return _weights(gpu, config, embedding, linear)


def quantised_model(gpu: Gpu, raw: dict[str, Any], weights: Weights, *, sixteen: bool) -> Model:
    """W4A16 with BF16 keys and values, or W4A8 with those in 4 bits."""
    config, kernels = parse_config(raw), TritonKernels(gpu.device, sixteen=sixteen)
    if sixteen:
        return Model("W4A16", config, weights, kernels, "bf16", "bf16")
    return Model("W4A8KV4", config, weights, kernels, "int4", "int8")


def _weights(gpu: Gpu, config: ModelConfig, embedding: Any, linear: Any) -> Weights:
    def norm() -> torch.Tensor:
        return torch.ones(config.hidden_size, dtype=torch.bfloat16, device=gpu.device)

    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    layers = tuple(
        LayerWeights(
            input_norm=norm(),
            mlp_norm=norm(),
            q_norm=None,
            k_norm=None,
            qkv=linear((config.heads + 2 * config.kv_heads) * head_dim, hidden),
            output=linear(hidden, config.heads * head_dim),
            gate_up=linear(2 * inner, hidden),
            down=linear(hidden, inner),
        )
        for _ in range(config.layers)
    )
    rotary = Rotary(config.rope, head_dim)
    rotary.move(gpu.device)
    head = linear(config.vocabulary, hidden)
    linears = [head, *(getattr(layer, name) for layer in layers for name in ("qkv", "output", "gate_up", "down"))]
    size = sum(one.bytes if isinstance(one, TritonW4Ax) else one.weight.nbytes for one in linears)
    return Weights(torch.bfloat16, embedding, layers, norm(), head, rotary, size + _table_bytes(embedding))


def _table_bytes(embedding: PlainEmbedding) -> int:
    return embedding.values.nbytes + (0 if embedding.scales is None else embedding.scales.nbytes)


def fill(kv: Any) -> None:
    """Random keys and values, so that nothing is faster than it will be."""
    for part in (kv.keys, kv.values):
        if kv.bits == 16:
            part.codes.normal_()
        else:
            part.codes.random_(0, 256)
            scale = torch.tensor(4.0 / 2**kv.bits, dtype=torch.bfloat16).view(torch.int16).item()
            part.numbers.fill_(scale | 128 << 16)


@contextmanager
def opened(
    gpu: Gpu, model: Model, *, batch: int, length: int, blocks: int, tokens: int = 0, stream: Stream | None = None
) -> Iterator[CudaDevice]:
    """The model on a device of one lane, with a KV pool that is full of random numbers.

    batch: most sequences in a step. length: of the longest. tokens: most in a step, where that is more. stream: the
    lane's, where it is wanted outside. Raises DoesNotFit.
    """
    collect(gpu)
    check_room(gpu, model, blocks * BLOCK_SIZE)
    decoder = Decoder(model.config, model.weights, model.kernels, length)
    kv = decoder.make_kv(blocks, BLOCK_SIZE, model.cache)
    for storage in kv:
        fill(storage)
    settle(gpu)
    stream = gpu.stream() if stream is None else stream
    forward = CudaForward(gpu, stream, decoder, kv, BLOCK_SIZE, max_slices=batch, graphs=gpu.captures)
    capacity = Capacity(
        blocks=blocks,
        block_size=BLOCK_SIZE,
        max_tokens=max(batch, tokens),
        max_slices=batch,
        shares=gpu.shares,
        max_model_len=length,
        vocabulary=model.config.vocabulary,
        ahead=1,
    )
    lanes = {Lane.MIXED: CudaLane(gpu, stream, decoder, forward, BLOCK_SIZE)}
    words = Description(gpu.name, "bfloat16", model.kernels.name)
    device = CudaDevice(capacity, gpu, lanes, description=words, memory=(), partition=None)
    del kv, forward, lanes
    try:
        yield device
    except Stuck:
        raise  # its threads wait for ever, and `close` would wait for them
    except BaseException:
        device.close()
        raise
    device.close()


def check_room(gpu: Gpu, model: Model, slots: int) -> None:
    needed, room = slots * model.token_bytes, free(gpu)
    if needed > room:
        raise DoesNotFit(f"its keys and values take {needed / GIB:.1f} GiB, and {room / GIB:.1f} are free for them")


def free(gpu: Gpu) -> int:
    """Bytes of the device that are nobody's."""
    return gpu.memory()[0]


def collect(gpu: Gpu) -> None:
    """Give back the memory of what nobody uses any more."""
    gc.collect()
    settle(gpu)
    gpu.memory()  # torch gives its own back here


def settle(gpu: Gpu) -> None:
    """Wait for all that was launched on any stream."""
    if gpu.device.type == "cuda":
        torch.cuda.synchronize(gpu.device)


def hold(gpu: Gpu, stream: Stream) -> None:
    """Keep the stream busy for a while: what is launched meanwhile is there before it can begin."""
    if gpu.device.type == "cuda":
        with stream.use():
            torch.cuda._sleep(HELD)


def answer(device: CudaDevice, plan: Plan) -> Result:
    """What a plan gives. Raises RuntimeError where the step fails, Stuck where there is no answer."""
    device.submit(plan)
    found: Sequence[Result] = device.poll(PATIENCE)
    if not found:
        raise Stuck(f"a step gave no result within {PATIENCE:g} s")
    (result,) = found
    if result.error is not None or result.failed:
        raise RuntimeError(result.error or f"the model computed nonsense: {result.failed[0][1]}")
    return result
