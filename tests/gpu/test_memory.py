"""The KV pool that a device makes of the memory there is: steps have room beside it, its last blocks are like its
first, and a share that is too small names one that is not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from weft.config import EngineConfig
from weft.core.plan import Lane, Plan, Result, Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices import open_device
from weft.devices.base import Device
from weft.errors import ConfigError

pytestmark = pytest.mark.xdist_group("memory")  # one after the other
GIB = 2**30
GREEDY = SamplingParams(temperature=0.0)
SEQUENCES, TOKENS, DECODED = 256, 8192, 4
PROMPT = TOKENS // SEQUENCES
EACH = -(-(PROMPT + DECODED) // 16)  # blocks of a sequence
# In half of a large GPU's memory the pool of a layer has more numbers than 32 bits count.
WIDE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
OTHERS = 8 * GIB  # that tests beside this one take or give back meanwhile
SLACK = GIB // 2  # torch takes memory in pieces of a few MiB, from each stream


@contextmanager
def opened(folder: Path, share: float) -> Iterator[Device]:
    (folder / "config.json").write_text(json.dumps(WIDE))
    config = EngineConfig(
        device="cuda",
        load_format="dummy",
        gpu_memory_utilization=share,
        max_num_seqs=SEQUENCES,
        max_num_batched_tokens=TOKENS,
    )
    device = open_device(config, folder, lambda phase: None)
    try:
        yield device
    finally:
        device.close()


def answer(device: Device, step: int, slices: list[Slice]) -> list[int]:
    device.submit(Plan(step, Lane.MIXED, tuple(slices)))
    found: list[Result] = device.poll(50.0)
    assert found, "no result within 50 s"
    assert found[0].error is None and not found[0].failed, found[0]
    return [sampled.token for sampled in found[0].sampled]


def answers(device: Device, tables: list[tuple[int, ...]]) -> list[list[int]]:
    """The tokens of each step: of as many tokens and as many sequences as there can be, then decode."""

    def piece(i: int, at: int, tokens: tuple[int, ...]) -> Slice:
        return Slice(i, at, tokens, tables[i], Sampling(GREEDY, 0, at + len(tokens)))

    prompts = [tuple((7 * i + 13 * place) % 4096 for place in range(PROMPT)) for i in range(SEQUENCES)]
    found = [answer(device, 1, [piece(i, 0, prompt) for i, prompt in enumerate(prompts)])]
    for step in range(DECODED):
        given = [piece(i, PROMPT + step, (token,)) for i, token in enumerate(found[-1])]
        found.append(answer(device, 2 + step, given))
    return found


def test_the_largest_steps_have_room_and_the_last_blocks_are_as_good(tmp_path: Path) -> None:
    with opened(tmp_path, 0.5) as device:
        torch.cuda.reset_peak_memory_stats()
        blocks, table = device.capacity().blocks, dict(device.memory())
        first = [tuple(range(i * EACH, (i + 1) * EACH)) for i in range(SEQUENCES)]
        assert blocks >= 2 * EACH * SEQUENCES
        last = [tuple(blocks - 1 - block for block in blocks_of_one) for blocks_of_one in first]
        found = answers(device, last)
        assert len(set(found[-1])) > 1
        assert answers(device, first) == found
        long = Slice(0, 0, tuple(place % 4096 for place in range(TOKENS)), tuple(range(blocks - TOKENS // 16, blocks)))
        answer(device, 99, [long._replace(sample=Sampling(GREEDY, 0, TOKENS))])
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        said = {name: f"{size / GIB:.2f} GiB" for name, size in table.items()}
        own = ("weights", "activations, at the peak", "decode graphs", "KV pool")
        held = torch.cuda.max_memory_reserved() / GIB
        assert held <= (sum(table.get(name, 0) for name in own) + SLACK) / GIB, said
        assert table["the device's memory"] == total == sum(table.values()) - total, said
        assert total / 2 - table["KV pool"] // blocks <= total - table["left alone"] <= total / 2, said
        assert abs(free - table["left alone"]) <= OTHERS, (free / GIB, said)


def test_a_share_that_is_too_small_names_one_that_is_not(tmp_path: Path) -> None:
    share, refused = 0.001, 0
    for _ in range(5):  # other tests may take more in between
        try:
            with opened(tmp_path, share) as device:
                assert device.capacity().blocks >= 1
                break
        except ConfigError as error:
            found: Any = re.search(r"--gpu-memory-utilization ([\d.]+) holds one block", error.message)
            assert found is not None, error.message
            share, refused = float(found[1]), refused + 1
    else:
        pytest.fail(f"not even {share} was enough")
    assert refused >= 1
