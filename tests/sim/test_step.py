"""The cost of a step: conservation and monotony whatever the model and the GPU, and figures that are public."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.config import EngineConfig
from weft.core.plan import Capacity, Lane, Plan, Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices.virtual import VirtualDevice
from weft.errors import CheckpointError, ConfigError
from weft.sim.estimate import cost_of, setup_of
from weft.sim.hardware import find_gpu, find_link, gpu_names, link_names, read_gpu
from weft.sim.models import find_model, model_names, read_model
from weft.sim.precision import PRECISIONS, find_precision
from weft.sim.step import CUT, StepCost

BF16 = find_precision("bf16")
DRAW = Sampling(SamplingParams(), 0, 0)
NVLINK = find_link("nvlink4")
MODELS = st.sampled_from(["llama-3-8b", "mixtral-8x22b", "deepseek-v2-lite", "qwen3-30b-a3b"])
SLICES = st.lists(st.tuples(st.one_of(st.just(1), st.integers(1, 500)), st.integers(0, 5000)), min_size=1, max_size=6)
# Caches are kept from one example to the next, as in a run.
COSTS = {(name, gpu): StepCost(find_model(name), find_gpu(gpu), BF16) for name in model_names() for gpu in gpu_names()}


def cost(name: str = "llama-3-8b", gpu: str = "h100") -> StepCost:
    return COSTS[name, gpu]


def plan(*shapes: tuple[int, int], part: int = 0, parts: int = 1) -> Plan:
    """(rows, positions before them) of each slice; all draw a token."""
    slices = tuple(Slice(i, before, (1,) * rows, (), DRAW) for i, (rows, before) in enumerate(shapes))
    return Plan(0, Lane.MIXED, slices, part, parts)


@settings(max_examples=30, deadline=None)
@given(MODELS, st.sampled_from(gpu_names()), SLICES, st.integers(1, 500), st.integers(0, 5000))
def test_more_tokens_or_context_never_take_less(
    model: str, gpu: str, slices: list[tuple[int, int]], more: int, context: int
) -> None:
    taken = cost(model, gpu).seconds(plan(*slices))
    (rows, before), *others = slices
    taller = rows + more if rows > 1 else rows
    assert cost(model, gpu).seconds(plan((taller, before + context), *others)) >= taken * (1 - 1e-9)
    assert cost(model, gpu).seconds(plan(*slices, (more, context))) >= taken * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(
    MODELS,
    st.sampled_from(gpu_names()),
    st.sampled_from([1, 4]),
    st.sampled_from(["bf16", "w4a8"]),
    st.booleans(),
    SLICES,
)
def test_no_step_takes_less_than_the_least(
    model: str, gpu: str, ranks: int, precision: str, weave: bool, slices: list[tuple[int, int]]
) -> None:
    found = cost_of(find_model(model), find_gpu(gpu), ranks, precision, weave=weave)
    setup = setup_of(found, EngineConfig(num_blocks=40_000, max_model_len=4096))
    rows, before = zip(*slices, strict=True)
    for samples in (0, len(slices)):
        assert 0 < setup.least <= found.whole(list(rows), list(before), samples)


@settings(max_examples=30, deadline=None)
@given(MODELS, SLICES, st.floats(0.05, 1), st.floats(0.05, 1), st.floats(0, 1))
def test_a_greater_share_never_takes_longer_and_a_rival_never_helps(
    model: str, slices: list[tuple[int, int]], one: float, other: float, rival: float
) -> None:
    low, high = sorted((one, other))
    found = cost(model)
    assert found.seconds(plan(*slices), high) <= found.seconds(plan(*slices), low) * (1 + 1e-9)
    assert found.seconds(plan(*slices), low, rival) >= found.seconds(plan(*slices), low) * (1 - 1e-9)


@settings(max_examples=30, deadline=None)
@given(MODELS, SLICES, st.sampled_from([2, 4, 8]), st.sampled_from(link_names()), st.booleans())
def test_ranks_never_save_more_than_their_number(
    model: str, slices: list[tuple[int, int]], ranks: int, link: str, weave: bool
) -> None:
    one = cost(model)
    several = StepCost(one.model, one.gpu, BF16, ranks, find_link(link), weave=weave)
    assert several.seconds(plan(*slices)) >= one.seconds(plan(*slices)) / ranks * (1 - 1e-9)


@settings(max_examples=30, deadline=None)
@given(MODELS, SLICES, st.integers(1, 8))
def test_parts_of_a_step_sum_to_the_step_and_their_launches(
    model: str, slices: list[tuple[int, int]], parts: int
) -> None:
    whole = cost(model).seconds(plan(*slices))
    cut = sum(cost(model).seconds(plan(*slices, part=part, parts=parts)) for part in range(parts))
    assert cut == pytest.approx(whole + (parts * CUT if parts > 1 else 0))


@settings(max_examples=30, deadline=None)
@given(SLICES, st.sampled_from(sorted(PRECISIONS)), st.sampled_from([16, 8, 4]))
def test_never_faster_than_weights_and_cache_are_read(
    slices: list[tuple[int, int]], precision: str, kv_bits: int
) -> None:
    found = StepCost(find_model("llama-3-8b"), find_gpu("h100"), find_precision(precision, kv_bits))
    slots = sum(before + rows for rows, before in slices)
    embedding = found.model.embeddings() - found.model.vocabulary * found.model.hidden
    moved = found.weight_bytes - 2 * embedding + found.kv_bytes_per_token * slots
    assert found.seconds(plan(*slices)) >= moved / found.gpu.bandwidth


@settings(max_examples=20, deadline=None)
@given(SLICES)
def test_seams_that_are_fused_or_woven_never_take_longer(slices: list[tuple[int, int]]) -> None:
    model, gpu = find_model("llama-3-70b"), find_gpu("h100")
    plain, fused, woven = (
        StepCost(model, gpu, BF16, 8, NVLINK, fused=fused, weave=weave).seconds(plan(*slices))
        for fused, weave in ((False, False), (True, False), (False, True))
    )
    assert woven <= fused <= plain


def test_long_prompts_are_woven_and_short_ones_are_not() -> None:
    model, gpu = find_model("llama-3-70b"), find_gpu("h100")
    fused, woven = (StepCost(model, gpu, BF16, 8, NVLINK, fused=True, weave=weave) for weave in (False, True))
    assert woven.seconds(plan((8192, 0))) < 0.9 * fused.seconds(plan((8192, 0)))
    assert woven.seconds(plan((8, 0))) == fused.seconds(plan((8, 0)))


@pytest.mark.parametrize("name", ["llama-3-70b", "mixtral-8x22b"])
@pytest.mark.parametrize("tokens", [2, 300, 5000])
def test_each_way_of_joining_is_what_a_step_of_it_takes(name: str, tokens: int) -> None:
    model, gpu = find_model(name), find_gpu("h100")
    plain, fused, woven = (
        StepCost(model, gpu, BF16, 8, NVLINK, fused=fused, weave=weave)
        for fused, weave in ((False, False), (True, False), (True, True))
    )
    ways = plain.ways(tokens)
    assert ways == woven.ways(tokens)
    assert ways.plain == pytest.approx(plain.seconds(plan((tokens, 0))))
    assert ways.fused == pytest.approx(fused.seconds(plan((tokens, 0))))
    assert min(ways.fused, ways.woven) == pytest.approx(woven.seconds(plan((tokens, 0))))
    stages = plain.stages(tokens)
    assert ways.plain - ways.silent == pytest.approx(2 * model.layers * stages.join)
    assert ways.plain - ways.fused == pytest.approx(2 * model.layers * stages.norm * 7 / 8)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3-8b", 8.03), ("llama-3-70b", 70.6), ("llama-3.1-405b", 405.9), ("qwen2.5-72b", 72.7),
        ("mixtral-8x22b", 140.6), ("deepseek-v2-lite", 15.7), ("deepseek-v3", 671.0), ("qwen3-30b-a3b", 30.5),
        ("llama-2-7b", 6.74), ("llama-2-13b", 13.0), ("llama-30b", 32.5),
    ],
)  # fmt: skip
def test_models_have_the_parameters_that_they_are_known_for(name: str, billions: float) -> None:
    model = find_model(name)
    assert (model.parameters() + model.embeddings()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_what_a_token_takes_in_the_cache() -> None:
    assert cost("llama-3-8b").kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert cost("deepseek-v3").kv_bytes_per_token == 61 * 576 * 2
    copies = StepCost(find_model("mixtral-8x22b"), find_gpu("h200"), BF16, 16, find_link("ethernet-400g"))
    assert copies.kv_bytes_per_token == 2 * cost("mixtral-8x22b").kv_bytes_per_token, "16 ranks share 8 heads"
    four = StepCost(find_model("llama-3-8b"), find_gpu("h100"), find_precision("w4ax", 4))
    assert four.kv_bytes_per_token == 2 * 32 * 8 * 128 * 4.25 / 8
    assert four.weight_bytes < 0.4 * cost("llama-3-8b").weight_bytes


def test_fewer_bits_are_quicker_in_their_place() -> None:
    model, gpu = find_model("llama-3-70b"), find_gpu("a100-80")
    costs = {
        name: StepCost(model, gpu, find_precision(name), 4, find_link("nvlink3"))
        for name in PRECISIONS
        if name != "fp8"
    }
    decode = {name: each.seconds(plan(*[(1, 1000)] * 8)) for name, each in costs.items()}
    prompt = {name: each.seconds(plan((4096, 0))) for name, each in costs.items()}
    assert decode["w4a16"] < 0.7 * decode["bf16"] and prompt["w4a16"] > 0.95 * prompt["bf16"]
    assert decode["w8a8"] < 0.8 * decode["bf16"] and prompt["w8a8"] < 0.75 * prompt["bf16"]
    assert prompt["w4a4"] < prompt["w4ax"] < prompt["w4a8"]


def test_what_was_not_measured_is_said() -> None:
    assert cost("llama-3-8b", "h100").caveats == ()
    found = StepCost(find_model("llama-3-8b"), find_gpu("b200"), find_precision("fp8"), 2, find_link("pcie5"))
    text = " ".join(found.caveats)
    assert "B200" in text and "PCIe 5.0" in text and "fp8" in text


CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
    "intermediate_size": 128,
}  # fmt: skip


def test_shapes_of_unknown_models_have_a_caveat_and_layers_without_kv_are_refused() -> None:
    assert read_model("mine", CONFIG).caveat is None
    odd = read_model("mine", CONFIG | {"model_type": "gpt_neox"})
    (text,) = StepCost(odd, find_gpu("h100"), BF16).caveats
    assert "mine: its model_type 'gpt_neox' is not known" in text
    assert "has no model_type" in str(read_model("mine", {**CONFIG, "model_type": None}).caveat)
    for wrong in ({"linear_num_value_heads": 32}, {"layer_types": ["full_attention", "linear_attention"]}):
        with pytest.raises(CheckpointError, match=f"{next(iter(wrong))} is .* not simulated"):
            read_model("mine", CONFIG | {"model_type": "qwen3_next"} | wrong)


def test_what_a_config_leaves_out_or_gets_wrong() -> None:
    assert read_model("mine", CONFIG | {"model_type": "gemma"}).tied and not read_model("mine", CONFIG).tied
    assert not read_model("mine", CONFIG | {"model_type": "gemma", "tie_word_embeddings": False}).tied
    experts = CONFIG | {"num_experts": 8, "num_experts_per_tok": 2, "shared_expert_intermediate_size": "x"}
    with pytest.raises(CheckpointError, match="shared_expert_intermediate_size is 'x'; it must be a whole number"):
        read_model("mine", experts)


def test_a_virtual_device_takes_it() -> None:
    capacity = Capacity(
        blocks=64, block_size=16, max_tokens=512, max_slices=8, shares=1, max_model_len=512, vocabulary=100
    )
    device = VirtualDevice(capacity, cost=cost())  # type: ignore[arg-type]
    given = Plan(1, Lane.MIXED, (Slice(0, 0, (1,) * 100, tuple(range(7)), DRAW),))
    device.submit(given)
    (result,) = device.poll(None)
    assert result.seconds == pytest.approx(cost().seconds(given)) and device.clock() == result.seconds


def test_errors_name_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no GPU is called 'v100'; there are a100-40, a100-80"):
        find_gpu("v100")
    with pytest.raises(ConfigError, match="no model is called 'gpt-5'; there are deepseek-v2-lite"):
        find_model("gpt-5")
    with pytest.raises(ConfigError, match="no precision is called 'w2a2'; there are bf16"):
        find_precision("w2a2")
    with pytest.raises(ConfigError, match="A100 SXM 80 GB has no fp8 arithmetic"):
        StepCost(find_model("llama-3-8b"), find_gpu("a100-80"), find_precision("fp8"))
    with pytest.raises(ConfigError, match="ranks is 3; it must divide the 32 heads"):
        StepCost(find_model("llama-3-8b"), find_gpu("h100"), BF16, 3, NVLINK)
    with pytest.raises(ConfigError, match="2 ranks need a link"):
        StepCost(find_model("llama-3-8b"), find_gpu("h100"), BF16, 2)
    with pytest.raises(ConfigError, match="share = 0"):
        cost().seconds(plan((1, 1)), 0.0)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match="lacks num_attention_heads"):
        find_model(str(tmp_path))


def test_a_gpu_can_be_given_as_a_file(tmp_path: Path) -> None:
    raw = {"name": "mine", "fit": "h100"} | json.loads(_gpus())["h100"] | {"title": "Mine", "sms": 99}
    (tmp_path / "mine.json").write_text(json.dumps(raw))
    assert find_gpu(str(tmp_path / "mine.json")).sms == 99
    with pytest.raises(ConfigError, match="GPU: sms is missing"):
        read_gpu({key: value for key, value in raw.items() if key != "sms"})
    with pytest.raises(ConfigError, match="gemm: colour is not known"):
        read_gpu(raw | {"gemm": {**_fits()["h100"]["gemm"], "colour": 1}})
    with pytest.raises(ConfigError, match="fit is 'p100'; it must be one of"):
        read_gpu(raw | {"fit": "p100"})


def _gpus() -> str:
    from weft.sim.hardware import DATA

    return (DATA / "gpus.json").read_text()


def _fits() -> dict[str, dict[str, object]]:
    from weft.sim.hardware import DATA

    found: dict[str, dict[str, object]] = json.loads((DATA / "fits.json").read_text())
    return found
