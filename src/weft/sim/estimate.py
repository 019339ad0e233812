"""From a model and a GPU to a replica: how long its steps take (sim/step.py), and how much KV it holds."""

from __future__ import annotations

from weft.config import EngineConfig
from weft.core.plan import Capacity
from weft.errors import ConfigError
from weft.sim.hardware import Gpu, find_link
from weft.sim.models import Model
from weft.sim.precision import find_precision
from weft.sim.replica import Setup
from weft.sim.step import StepCost
from weft.sim.traffic import VOCABULARY

MEMORY = 0.9  # the part of a GPU's memory that weights and KV may have
SHARES = 12  # that two lanes divide
REPEATS = 64  # times that a plan of one lane is carried out at most
KV_BITS = {"auto": 16, "bf16": 16, "int8": 8, "int4": 4}  # by --kv-cache-dtype


def cost_of(
    model: Model, gpu: Gpu, tp: int, precision: str, kv_cache_dtype: str = "auto", *, weave: bool = False
) -> StepCost:
    """Of one replica on `tp` GPUs, joined by the link that such GPUs have. weave: its seams are hidden where that pays
    (TokenWeave). Raises ConfigError for what the GPU or the link cannot do."""
    link = find_link(gpu.link) if tp > 1 else None
    kv = KV_BITS[kv_cache_dtype]
    return StepCost(model, gpu, find_precision(precision, kv), tp, link, weave=weave and tp > 1, fused=weave and tp > 1)


def setup_of(cost: StepCost, config: EngineConfig) -> Setup:
    """A replica whose KV is in what the weights leave of its memory. cost: made for config's KV cache. Raises
    ConfigError when that is not enough for one sequence of full length."""
    model = cost.model
    room = MEMORY * cost.capacity_bytes
    longest = config.max_model_len or model.context
    blocks = config.num_blocks or int(
        max(room - cost.weight_bytes, 0.0) // (cost.kv_bytes_per_token * config.block_size)
    )
    needed = -(-longest // config.block_size)
    if blocks < needed:
        where = f"{model.name} in {cost.precision.name} on {cost.ranks} x {cost.gpu.name}"
        raise ConfigError(
            f"{where}: weights of {cost.weight_bytes / 1e9:.0f} GB leave room for {blocks * config.block_size} KV "
            f"slots of {room / 1e9:.0f} GB, and a sequence of {longest} tokens needs more; more ranks (--tp), fewer "
            "bits (--precision) or a smaller --max-model-len would help"
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
        repeats=REPEATS if config.partition == "off" else 1,
    )
    return Setup(config, capacity, cost)
