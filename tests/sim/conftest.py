"""A small replica to simulate."""

from __future__ import annotations

from typing import Any

import pytest

from weft.config import EngineConfig
from weft.core.plan import Capacity
from weft.devices.cost import CostModel
from weft.sim.replica import Setup
from weft.sim.traffic import VOCABULARY

COST = CostModel(fixed=1e-3, per_token=1e-4, per_context=1e-7, weights=4e-3, saturation=0.5, contention=0.3)


def make_setup(**given: Any) -> Setup:
    """Fields of Capacity and EngineConfig, and `cost`."""
    repeats = 64 if given.get("partition", "off") == "off" else 1
    capacity = {"blocks": 64, "block_size": 16, "max_model_len": 512, "shares": 4, "layers": 4, "repeats": repeats}
    known = {name: given.pop(name) for name in list(given) if name in capacity}
    cost = given.pop("cost", COST)
    config = EngineConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_num_queued_reqs": 10**6, **given})
    made = Capacity(
        **{**capacity, **known},
        max_tokens=config.max_num_batched_tokens,
        max_slices=config.max_num_seqs,
        vocabulary=VOCABULARY,
    )
    return Setup(config, made, cost)


@pytest.fixture(scope="session")
def setup() -> Any:
    return make_setup
