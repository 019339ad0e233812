"""From a model and a GPU to a replica: how long its steps take, and how much KV it holds.

The one place where simulated fleets learn of hardware. It is a roofline of public peak figures with common
efficiencies, not calibrated on any measurement: good for trying things out, not for buying.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.config import EngineConfig
from weft.core.plan import Capacity
from weft.devices.cost import CostModel
from weft.errors import ConfigError
from weft.sim.replica import Setup
from weft.sim.traffic import VOCABULARY

# Parts of the peaks that kernels reach, of memory that serves weights and KV, and seconds of launches.
COMPUTE, BANDWIDTH, LINK = 0.6, 0.8, 0.6
MEMORY = 0.9
STEP, LAYER, JOIN = 5e-4, 2e-5, 1e-5
# Shares that two lanes divide; half of the cores fill the memory; what a lane on the whole device costs another.
SHARES, SATURATION, CONTENTION = 12, 0.5, 0.2


@dataclass(frozen=True, slots=True)
class Gpu:
    """flops: dense, 16-bit. bandwidth, link: bytes/s of its memory, and to each of its neighbours. memory: bytes."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float


@dataclass(frozen=True, slots=True)
class Model:
    """Of the Llama family. kv: numbers of keys and values for each token."""

    name: str
    layers: int
    hidden: int
    weights: float
    kv: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Precision:
    """weight: bytes of a weight. speed: arithmetic relative to 16 bits."""

    weight: float
    speed: float


GPUS = {
    one.name: one
    for one in (
        Gpu("a100-40", 312e12, 1.555e12, 40e9, 300e9),
        Gpu("a100-80", 312e12, 2.039e12, 80e9, 300e9),
        Gpu("h100", 989e12, 3.35e12, 80e9, 450e9),
        Gpu("h200", 989e12, 4.8e12, 141e9, 450e9),
        Gpu("l40s", 362e12, 0.864e12, 48e9, 32e9),
    )
}
PRECISIONS = {"bf16": Precision(2.0, 1.0), "w8a8": Precision(1.0, 2.0), "w4a16": Precision(0.5, 1.0),
              "w4a8": Precision(0.5, 2.0)}  # fmt: skip
KV_BYTES = {"auto": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "llama-3-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """Raises ConfigError for a name that is not known."""
    if name not in GPUS:
        raise ConfigError(f"--gpu is {name!r}; it must be one of {', '.join(GPUS)}")
    return GPUS[name]


def find_model(name: str) -> Model:
    """By name, or from the config.json of a folder. Raises ConfigError when there is none, or it is no dense Llama."""
    if name in SHAPES:
        return _model(name, SHAPES[name])
    path = Path(name) if name.endswith(".json") else Path(name) / "config.json"
    try:
        shape = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model is {name!r}; it must be one of {', '.join(SHAPES)}, or a folder with a config.json ({error})"
        ) from error
    if any("expert" in key for key in shape):
        raise ConfigError(f"--model {name} is a mixture of experts, of which the roofline knows nothing")
    try:
        return _model(Path(name).stem, shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} does not tell the model's shape: {error!r}") from error


def _model(name: str, shape: dict[str, Any]) -> Model:
    hidden, layers, heads = (int(shape[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads = int(shape.get("num_key_value_heads", heads))
    head = int(shape.get("head_dim") or hidden // heads)
    attention = hidden * head * (2 * heads + 2 * kv_heads)
    weights = layers * (attention + 3 * hidden * int(shape["intermediate_size"])) + hidden * int(shape["vocab_size"])
    longest = int(shape.get("max_position_embeddings", 4096))
    return Model(name, layers, hidden, float(weights), 2 * layers * kv_heads * head, longest)


def cost_of(model: Model, gpu: Gpu, tp: int, precision: str, kv_cache_dtype: str = "auto") -> CostModel:
    """Of one replica on `tp` GPUs, whose ranks are joined twice in each layer."""
    form = PRECISIONS[precision]
    joined = 4 * (tp - 1) / tp * model.hidden * 2 * model.layers / (gpu.link * LINK)
    return CostModel(
        fixed=STEP + model.layers * (LAYER + (2 * JOIN if tp > 1 else 0.0)),
        per_token=2 * model.weights / (tp * gpu.flops * form.speed * COMPUTE) + joined,
        per_context=model.kv * KV_BYTES[kv_cache_dtype] / (tp * gpu.bandwidth * BANDWIDTH),
        weights=model.weights * form.weight / (tp * gpu.bandwidth * BANDWIDTH),
        saturation=SATURATION,
        contention=CONTENTION,
    )


def setup_of(model: Model, gpu: Gpu, tp: int, precision: str, config: EngineConfig) -> Setup:
    """A replica on `tp` GPUs, with KV in what the weights leave of their memory. Raises ConfigError when that is not
    enough for one sequence of full length."""
    weights = (model.weights + model.hidden * 128e3) * PRECISIONS[precision].weight
    left = MEMORY * gpu.memory * tp - weights
    slot = model.kv * KV_BYTES[config.kv_cache_dtype]
    longest = config.max_model_len or model.max_model_len
    blocks = config.num_blocks or int(max(left, 0.0) // (slot * config.block_size))
    needed = -(-longest // config.block_size)
    if blocks < needed:
        raise ConfigError(
            f"{model.name} in {precision} on {tp} x {gpu.name}: weights of {weights / 1e9:.0f} GB leave room for "
            f"{blocks * config.block_size} KV slots of {MEMORY * gpu.memory * tp / 1e9:.0f} GB, and a sequence of "
            f"{longest} tokens needs more; more ranks (--tp), fewer bits (--precision) or a smaller --max-model-len "
            "would help"
        )
    capacity = Capacity(
        blocks=blocks,
        block_size=config.block_size,
        max_tokens=config.max_num_batched_tokens,
        max_slices=config.max_num_seqs,
        shares=SHARES,
        max_model_len=longest,
        vocabulary=VOCABULARY,
        layers=model.layers,
    )
    return Setup(config, capacity, cost_of(model, gpu, tp, precision, config.kv_cache_dtype))
