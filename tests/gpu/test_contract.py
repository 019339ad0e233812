"""What devices/base.py promises, on the GPU that is here: all of tests/devices/test_contract.py, in BF16 as well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from tests.devices.test_contract import *  # noqa: F403  (all tests there are run here)

from weft.config import EngineConfig
from weft.devices import open_device
from weft.devices.base import Device

SETTINGS = [("float32", "auto", "off"), ("bfloat16", "auto", "1:1"), ("bfloat16", "int4", "off")]


@pytest.fixture(params=SETTINGS, ids="-".join)
def device(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Device]:
    dtype, cache, partition = request.param
    config = EngineConfig(
        device="cuda",
        dtype=dtype,
        kv_cache_dtype=cache,
        partition=partition,
        num_blocks=64,
        max_model_len=128,
        max_num_seqs=4,
    )
    opened = open_device(config, tiny_model, lambda phase: None)
    yield opened
    opened.close()
