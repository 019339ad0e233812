"""Ranks of the cuda device, two processes with interpreted kernels: the same bits however they are joined, and the
tokens of one rank. gloo is in NCCL's place; the symmetric kernels reach the other rank through memory of the host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available():
    pytest.skip("for interpreted kernels; tests/gpu has ranks on GPUs", allow_module_level=True)

from weft.comet.checkpoint import FmpqConfig, tensor_shapes
from weft.comet.forward import SITES
from weft.config import EngineConfig
from weft.core.plan import Lane, Plan, Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices.cuda_ranks import rank_gpu
from weft.devices.group import Group
from weft.errors import ConfigError, RankLost
from weft.loop.ranks import open_ranks
from weft.models.families import ModelConfig, parse_config
from weft.models.loader import tensor_shapes as float_shapes
from weft.weave.choice import GAIN

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 91,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
WAYS = {
    "plain": ("nccl", "plain"),
    "one-shot": ("nccl", "one-shot"),
    "fused": ("nccl", "fused"),
    "woven": ("nccl", "woven"),
    "symmetric": ("symmetric", "fused"),
    "symmetric woven": ("symmetric", "woven"),
}
MODELS = {
    "float32": tuple(WAYS),
    "bfloat16": ("fused", "woven", "plain"),
    "fmpq": ("fused", "woven", "symmetric woven"),
}
LIMITS = {"num_blocks": 5, "max_num_seqs": 2, "max_num_batched_tokens": 24, "max_model_len": 32, "rank_timeout": 60.0}
SCRIPT = Path(__file__).with_name("rank_steps.py")


def make_model(folder: Path, name: str) -> Path:
    """Random weights; fmpq: random integers of 4 bits, 8 in one block of each linear."""
    folder.mkdir()
    shape = SHAPE if name == "float32" else {**SHAPE, "num_hidden_layers": 1}
    config, chance = parse_config(shape), torch.Generator().manual_seed(3)
    shapes = float_shapes(config)
    tensors = {
        key: torch.ones(shape) if key.endswith("norm.weight") else torch.randn(shape, generator=chance) * 0.2
        for key, shape in shapes.items()
    }
    described = {**shape, "torch_dtype": "bfloat16" if name == "bfloat16" else "float32"}
    if name == "fmpq":
        form = FmpqConfig(8, dict.fromkeys(SITES, (1,) * config.layers), dict.fromkeys(SITES, (True,) * config.layers))
        kept = {key: value for key, value in tensors.items() if ".layers." not in key or key.endswith("norm.weight")}
        tensors = kept | random_integers(form, config, chance)
        described["quantization_config"] = form.as_json()
    (folder / "config.json").write_text(json.dumps(described))
    save_file(tensors, folder / "model.safetensors")
    return folder


def random_integers(form: FmpqConfig, config: ModelConfig, chance: torch.Generator) -> dict[str, torch.Tensor]:
    drawn: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
        "I8": lambda shape: torch.randint(-128, 128, shape, generator=chance, dtype=torch.int8),
        "I32": lambda shape: torch.randint(-(2**31), 2**31, shape, generator=chance).int(),
        "BF16": lambda shape: ((torch.rand(shape, generator=chance) + 0.5) * 0.02).bfloat16(),
        "order": lambda shape: torch.randperm(shape[0], generator=chance).int(),
    }
    return {
        f"model.layers.{index}.{name}": drawn["order" if name.endswith("permutation") else letters](shape)
        for index in range(config.layers)
        for name, (shape, letters) in tensor_shapes(form, config, index).items()
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, name) for name in MODELS}


@pytest.fixture(scope="module")
def found(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank has found, by case."""
    cases: list[dict[str, Any]] = []
    for model, folder in models.items():
        base = {"device": "cuda", "model": str(folder), **LIMITS}
        cases.append({"name": f"{model} alone", "config": base})
        for way in MODELS[model]:
            collective, weave = WAYS[way]
            given = {"tensor_parallel_size": 2, "collective": collective, "weave": weave}
            cases.append({"name": f"{model} {way}", "config": base | given})
    base = {"device": "cuda", "model": str(models["bfloat16"]), **LIMITS, "tensor_parallel_size": 2}
    cases.append({"name": "auto", "config": base})
    for collective in ("nccl", "symmetric"):
        dying = base | {"collective": collective, "weave": "fused", "rank_timeout": 3.0}
        cases.append({"name": f"dies {collective}", "config": dying, "dies": 1})
    folder = tmp_path_factory.mktemp("found")
    lines = "".join(json.dumps(case) + "\n" for case in cases)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], input=lines, text=True, check=True, env=environment)
    return {
        case["name"]: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{case['name']}.?"))]
        for case in cases
    }


@pytest.mark.parametrize("model", MODELS)
def test_ranks_have_the_same_bits_however_they_are_joined(found: dict[str, list[Any]], model: str) -> None:
    fused = found[f"{model} fused"][0]["steps"]
    assert len(fused) == 3 and all(len(step) == 2 for step in fused)
    for way in MODELS[model]:
        first, second = found[f"{model} {way}"]
        assert first["steps"] == second["steps"], f"{way}: ranks differ"
        if way != "plain" or model == "float32":  # an all-reduce rounds its sum to the model's precision
            assert first["steps"] == fused, way
        else:
            assert tokens(first) == tokens(found[f"{model} fused"][0])


@pytest.mark.parametrize("model", MODELS)
def test_ranks_answer_like_one(found: dict[str, list[Any]], model: str) -> None:
    (alone,), (first, _) = found[f"{model} alone"], found[f"{model} woven"]
    assert tokens(alone) == tokens(first)
    assert alone["steps"] != first["steps"] or model != "bfloat16", "sums in another order"
    for step, other in zip(alone["steps"], first["steps"], strict=True):
        for (_, _, logprob), (_, _, theirs) in zip(step, other, strict=True):
            assert theirs == pytest.approx(logprob, abs=1e-4 if model == "float32" else 0.1)


def test_what_costs_least_is_chosen_alike(found: dict[str, list[Any]]) -> None:
    first, second = found["auto"]
    assert first["steps"] == second["steps"] and tokens(first) == tokens(found["bfloat16 alone"][0])
    assert first["chosen"] == second["chosen"]
    (_, prompts), *_ = first["chosen"]
    assert [*prompts] == ["plain", "one-shot", "fused", "woven"]
    for mode, seconds in first["chosen"]:
        assert (1 - GAIN) * seconds[mode] <= min(seconds.values()), "something else costs less"
    assert any("gloo in NCCL's place" in note for note in first["notes"])
    assert not any("gloo" in note for note in found["float32 symmetric"][0]["notes"])


@pytest.mark.parametrize("collective", ["nccl", "symmetric"])
def test_a_rank_that_ends_is_missed_by_the_other(found: dict[str, list[Any]], collective: str) -> None:
    (left,) = found[f"dies {collective}"]
    assert left["error"].startswith("RankLost: rank 1 did not come within 3 s"), left["error"]


def tokens(one: dict[str, Any]) -> list[list[int]]:
    return [[token for _, token, _ in step] for step in one["steps"]]


def test_ranks_are_one_device_until_one_is_killed(models: dict[str, Path], found: dict[str, list[Any]]) -> None:
    """As `weft serve` starts them."""
    config = EngineConfig(device="cuda", model=str(models["fmpq"]), tensor_parallel_size=2, weave="fused", **LIMITS)
    config.validate()
    device = open_ranks(config, models["fmpq"], lambda _: None)
    try:
        assert device.describe().device == "cuda, interpreted on this CPU, 2 ranks"
        prompt = tuple(11 * at % 90 for at in range(21))
        greedy = SamplingParams(temperature=0.0)
        device.submit(Plan(1, Lane.MIXED, (Slice(0, 0, prompt, (0, 1), Sampling(greedy, 0, 21)),)))
        while not (results := device.poll(60.0)):
            pass
        assert [one.token for one in results[0].sampled] == tokens(found["fmpq alone"][0])[0][:1]
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        ranks = [int(pid) for pid in children if "weft.loop.rank" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(ranks[1], signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(RankLost, match="rank 1 was killed by SIGKILL"):
            while time.monotonic() < begun + 5:
                device.poll(1.0)
    finally:
        device.close()


def test_each_rank_has_a_gpu_of_its_own() -> None:
    def group(rank: int, neighbours: int) -> Group:
        return Group(rank, 4, neighbours, "g", "h", 1, "h", 1.0, False, lambda blocks: blocks)

    assert [rank_gpu(group(rank, 2), 2) for rank in range(4)] == [0, 1, 0, 1]
    assert rank_gpu(group(3, 4), 8) == 3
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size is 4, 4 of them .* weft sees 1 GPU here"):
        rank_gpu(group(0, 4), 1)
