"""Mixtures of experts: what a layer computes, that rows do not meet, how they are loaded and cut.

test_decoder.py has the whole models, against transformers, test_families.py what config.json may say, and
test_ranked.py several ranks.
"""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from weft.core.plan import Capacity, Slice
from weft.devices.cpu import memory_rows
from weft.errors import CheckpointError, ConfigError
from weft.kernels import LEVELS, available, open_kernels
from weft.kernels.base import Kernels
from weft.kernels.reference import PlainLinear, ReferenceKernels
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.experts import Mixture, mix, route
from weft.models.families import parse_config, read_config
from weft.models.forward import Plain, open_forward
from weft.models.layers import Layer
from weft.models.loader import Dummy, Weights, layer_shapes, load_weights, tensor_shapes, weight_bytes
from weft.models.mixtures import Experts
from weft.models.shard import Part, shard_config

BLOCK, HIDDEN = 16, 64
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": 35,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 35,
        "shared_expert_intermediate_size": 50,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 9,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 35,
        "norm_topk_prob": True,
    },
}
NATIVE = [name for name in available() if name in LEVELS]
built = pytest.mark.skipif(not NATIVE, reason="the C++ extension is not built")


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture
def saved(small: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a model of a family with random weights large enough for every part to matter."""

    def make(family: str, **changes: Any) -> Path:
        folder = small(**FAMILIES[family] | changes)
        tensors = {
            name: torch.ones(shape) if name.endswith("norm.weight") else draw(*shape, seed=seed, scale=0.2)
            for seed, (name, shape) in enumerate(tensor_shapes(read_config(folder)).items())
        }
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def backend() -> Iterator[Callable[..., Kernels]]:
    opened: list[Kernels] = []

    def open_one(name: str, threads: int = 1) -> Kernels:
        opened.append(open_kernels(name, (0,) * threads))
        return opened[-1]

    yield open_one
    for kernels in opened:
        kernels.close()


def load(folder: Path, kernels: Kernels, dtype: torch.dtype = torch.float32, **options: Any) -> Weights:
    return load_weights(folder, read_config(folder), kernels, dtype, **options)


def mixture_of(folder: Path, kernels: Kernels, dtype: torch.dtype = torch.float32, **options: Any) -> Mixture:
    mixture = load(folder, kernels, dtype, **options).layers[1].mixture
    assert mixture is not None
    return mixture


# ---------------------------------------------------------------- what a layer computes


def expected(folder: Path, hidden: torch.Tensor) -> torch.Tensor:
    """Of layer 1, token by token, from the file, in float64."""
    experts = read_config(folder).experts
    assert experts is not None
    prefix, names = "model.layers.1.", ("gate_proj", "up_proj", "down_proj")
    block = "mlp"
    if "mixtral" in (folder / "config.json").read_text():
        block, names = "block_sparse_moe", ("w1", "w3", "w2")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(folder / "model.safetensors").items()}

    def weight(name: str) -> torch.Tensor:
        return tensors[f"{name}.weight"].to(hidden.dtype).double()

    def feed(x: torch.Tensor, whose: str, names: tuple[str, ...] = names) -> torch.Tensor:
        gate, up, down = (weight(f"{whose}.{name}") for name in names)
        return down @ (silu(gate @ x) * (up @ x))

    rows = []
    for x in hidden.double():
        scores = (weight(f"{block}.gate") @ x).softmax(dim=0)
        chosen = sorted(range(experts.count), key=lambda expert: -scores[expert])[: experts.active]
        total = sum(scores[expert] for expert in chosen) if experts.normalised else 1.0
        row = sum(feed(x, f"{block}.experts.{expert}") * scores[expert] / total for expert in chosen)
        if experts.shared:
            row = row + feed(x, "mlp.shared_expert") * (weight("mlp.shared_expert_gate") @ x).sigmoid()
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("kernels", available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "normalised"),
    [("mixtral", True), *((f"qwen{n}_moe", normalised) for n in (2, 3) for normalised in (True, False))],
)
def test_a_layer_is_the_sum_of_the_experts_that_each_token_takes(
    saved: Callable[..., Path],
    backend: Callable[..., Kernels],
    family: str,
    normalised: bool,
    dtype: torch.dtype,
    kernels: str,
) -> None:
    folder = saved(family) if family == "mixtral" else saved(family, norm_topk_prob=normalised)
    hidden = draw(23, HIDDEN, seed=4).to(dtype)
    opened = backend(kernels)
    got = mix(hidden, mixture_of(folder, opened, dtype), opened)
    want = expected(folder, hidden)
    assert got.dtype is dtype and want.std() > 1
    close = 1e-5 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(got.double(), want, rtol=close, atol=close * float(want.abs().max()))


@pytest.mark.parametrize("kernels", available())
@pytest.mark.parametrize("family", FAMILIES)
def test_of_no_rows_nothing_comes_out(
    saved: Callable[..., Path], backend: Callable[..., Kernels], family: str, kernels: str
) -> None:
    opened = backend(kernels)
    mixture = mixture_of(saved(family), opened, torch.bfloat16)
    out = mix(torch.empty((0, HIDDEN), dtype=torch.bfloat16), mixture, opened)
    assert out.shape == (0, HIDDEN) and out.dtype is torch.bfloat16


@built
def test_what_an_expert_gives_is_rounded_once(saved: Callable[..., Path], backend: Callable[..., Kernels]) -> None:
    kernels, hidden = backend(NATIVE[0]), draw(9, HIDDEN, seed=1).bfloat16()
    folder = saved("qwen3_moe", num_experts=2, num_experts_per_tok=1, norm_topk_prob=False)
    mixture = mixture_of(folder, kernels, torch.bfloat16)
    weights, chosen = route(kernels.linear(hidden, mixture.router, torch.float32), mixture.experts)
    got = mix(hidden, mixture, kernels)
    for row, (weight, expert) in enumerate(zip(weights, chosen.flatten().tolist(), strict=True)):
        activated = kernels.silu_mul(kernels.linear(hidden[row : row + 1], mixture.gate_up[expert]))
        given = kernels.linear(activated, mixture.down[expert], torch.float32) * weight
        assert got[row : row + 1].equal(given.bfloat16())


def test_an_expert_that_nobody_takes_is_not_computed(saved: Callable[..., Path]) -> None:
    class Counted(ReferenceKernels):
        fed = 0

        def silu_mul(self, gate_up: torch.Tensor, reader: Any = None) -> torch.Tensor:
            self.fed += 1
            return super().silu_mul(gate_up, reader)

    kernels = Counted((0,))
    mixture = mixture_of(saved("qwen3_moe"), kernels)
    mix(draw(1, HIDDEN), mixture, kernels)
    assert kernels.fed == 4


def test_the_weights_of_a_route() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, 0.0, 5.0, 4.0]])
    weights, chosen = route(logits, Experts(4, 2, 8, 0, normalised=False))
    assert chosen.tolist() == [[1, 2], [2, 3]]
    torch.testing.assert_close(weights, logits.softmax(dim=1).gather(1, chosen))
    normalised, same = route(logits, Experts(4, 2, 8, 0, normalised=True))
    assert same.equal(chosen)
    torch.testing.assert_close(normalised, logits.gather(1, chosen).softmax(dim=1))


# ---------------------------------------------------------------- rows do not meet


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", NATIVE)
def test_a_row_has_the_same_bits_alone_in_any_batch_and_with_any_number_of_threads(
    saved: Callable[..., Path], backend: Callable[..., Kernels], family: str, dtype: torch.dtype, kernels: str
) -> None:
    one, three = backend(kernels), backend(kernels, 3)
    mixture = mixture_of(saved(family), one, dtype)
    hidden = draw(70, HIDDEN, seed=9).to(dtype)
    whole = mix(hidden, mixture, one)
    assert mix(hidden, mixture, three).equal(whole)

    @given(st.lists(st.integers(0, 69), min_size=1, max_size=40), st.booleans())
    def check(rows: list[int], threads: bool) -> None:
        assert mix(hidden[rows], mixture, three if threads else one).equal(whole[rows])

    check()
    for row in range(70):
        assert mix(hidden[row : row + 1], mixture, one).equal(whole[row : row + 1])


@given(st.lists(st.integers(0, 299), min_size=1, max_size=70), st.sampled_from([5, 60, 128]), st.integers(1, 8))
def test_a_row_is_routed_alone(rows: list[int], count: int, active: int) -> None:
    experts = Experts(count, min(active, count), 8, 0, normalised=True)
    logits = draw(300, count, seed=count)
    logits[::7] = logits[::7].round()  # equals among them
    weights, chosen = route(logits, experts)
    some, taken = route(logits[rows], experts)
    assert some.equal(weights[rows]) and taken.equal(chosen[rows])


@built
def test_a_row_of_nan_spoils_no_other(saved: Callable[..., Path], backend: Callable[..., Kernels]) -> None:
    kernels = backend(NATIVE[0])
    mixture = mixture_of(saved("qwen2_moe"), kernels)
    hidden = draw(9, HIDDEN, seed=2)
    whole = mix(hidden, mixture, kernels)
    hidden[4] = torch.nan
    spoilt = mix(hidden, mixture, kernels)
    assert spoilt[4].isnan().all()
    others = [row for row in range(9) if row != 4]
    assert spoilt[others].equal(whole[others])


def test_pieces_of_the_reference_are_close(saved: Callable[..., Path], backend: Callable[..., Kernels]) -> None:
    kernels = backend("reference")
    mixture, hidden = mixture_of(saved("qwen2_moe"), kernels), draw(40, HIDDEN, seed=3)
    pieces = [mix(hidden[first:end], mixture, kernels) for first, end in pairwise([0, 1, 8, 40])]
    torch.testing.assert_close(torch.cat(pieces), mix(hidden, mixture, kernels))


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("kernels", available())
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_sum_to_the_whole_and_route_alike(
    saved: Callable[..., Path], backend: Callable[..., Kernels], family: str, ranks: int, kernels: str
) -> None:
    folder, opened = saved(family), backend(kernels)
    config, hidden = read_config(folder), draw(11, HIDDEN, seed=8)
    parts = [mixture_of(folder, opened, part=Part(rank, ranks)) for rank in range(ranks)]
    assert [part.experts for part in parts] == [
        shard_config(config, Part(rank, ranks)).experts for rank in range(ranks)
    ]
    whole = mixture_of(folder, opened)
    for number in ("inner", "shared"):
        assert sum(getattr(part.experts, number) for part in parts) == getattr(whole.experts, number)
    logits = [opened.linear(hidden, part.router, torch.float32) for part in parts]
    assert all(other.equal(logits[0]) for other in logits)
    total = torch.stack([mix(hidden, part, opened) for part in parts]).sum(dim=0)
    wanted = mix(hidden, whole, opened)
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_random_weights_are_cut_as_the_files_are(saved: Callable[..., Path]) -> None:
    folder, kernels = saved("qwen2_moe"), ReferenceKernels((0,))
    whole = mixture_of(folder, kernels, dummy_seed=3)
    first, second = (mixture_of(folder, kernels, dummy_seed=3, part=Part(rank, 2)) for rank in range(2))
    assert torch.cat([first.down[4].weight, second.down[4].weight], dim=1).equal(whole.down[4].weight)
    assert first.router.weight.equal(whole.router.weight)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "qwen3_moe",
            {"moe_intermediate_size": 2},
            "each expert of the model has 2 channels: .*, so 2 would be the most",
        ),
        ("mixtral", {"intermediate_size": 1}, "each expert of the model has 1 channel:"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 2}, "the shared expert of the model has 2 channels"),
    ],
)
def test_more_ranks_than_channels_are_refused(
    small: Callable[..., Path], family: str, changes: dict[str, Any], words: str
) -> None:
    config = read_config(small(**FAMILIES[family] | changes))
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size is 3, and {words}"):
        shard_config(config, Part(0, 3))


# ---------------------------------------------------------------- from files to weights


def test_loading_holds_no_more_than_an_expert(small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[weakref.ref[torch.Tensor]] = []
    peak = 0

    class Copying(ReferenceKernels):
        def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PlainLinear:
            nonlocal peak
            drawn.append(weakref.ref(weight))
            peak = max(peak, sum(tensor.nbytes for ref in drawn if (tensor := ref()) is not None))
            return PlainLinear(weight.clone(), bias)

    def draw_and_remember(self: Dummy, name: str) -> torch.Tensor:
        tensor = draw_one(self, name)
        drawn.append(weakref.ref(tensor))
        return tensor

    draw_one = Dummy._draw
    monkeypatch.setattr(Dummy, "_draw", draw_and_remember)
    folder = small(**FAMILIES["qwen3_moe"] | {"vocab_size": 8, "num_experts": 60, "moe_intermediate_size": 200})
    weights = load(folder, Copying((0,)), dummy_seed=1)
    gc.collect()
    assert all(ref() is None for ref in drawn)
    expert = 3 * 200 * HIDDEN * 4
    assert expert < peak < 2 * expert < 0.05 * weights.size  # its tensors, and gate and up joined


@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_of_all_is_known(saved: Callable[..., Path], family: str) -> None:
    folder = saved(family)
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    config = read_config(folder)
    assert load(folder, ReferenceKernels((0,))).size == weight_bytes(config, torch.float32) == stored
    assert weight_bytes(config, torch.bfloat16) == stored // 2
    parts = [load(folder, ReferenceKernels((0,)), part=Part(rank, 2)).size for rank in range(2)]
    routers = sum(math.prod(shape) for name, shape in tensor_shapes(config).items() if "gate.weight" in name) * 4
    assert sum(parts) > stored + routers and max(parts) < 0.7 * stored


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_has_experts_in_the_place_of_one_mlp(saved: Callable[..., Path], family: str) -> None:
    folder = saved(family)
    config, kernels = read_config(folder), ReferenceKernels((0,))
    assert config.experts is not None and config.intermediate_size == config.experts.inner == 35
    assert not [name for name in layer_shapes(config, 0) if "mlp.gate_proj" in name or "mlp.down_proj" in name]
    weights = load(folder, kernels)
    own = weights.layers[0]
    assert own.gate_up is None and own.down is None
    layer = Layer(config, own, kernels, None, *weights.rotary.tables(64))
    assert layer.mixed and layer.mlp_reader is None


def test_a_layer_without_experts_is_not_mixed(small: Callable[..., Path]) -> None:
    folder, kernels = small(), ReferenceKernels((0,))
    weights = load(folder, kernels, dummy_seed=1)
    layer = Layer(read_config(folder), weights.layers[0], kernels, None, *weights.rotary.tables(64))
    assert not layer.mixed and layer.mlp_reader is weights.layers[0].gate_up


W2, GATE = "model.layers.1.block_sparse_moe.experts.4.w2.weight", "model.layers.0.block_sparse_moe.gate.weight"
BROKEN: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = [
    ("an expert's part is missing", lambda tensors: tensors.pop(W2), f"lacks {W2}, which config.json asks for"),
    ("the router is missing", lambda tensors: tensors.pop(GATE), f"lacks {GATE}"),
    (
        "another shape",
        lambda tensors: tensors.update({W2: torch.ones(35, 64)}),
        rf"{W2} has the shape \[35, 64\].*\[64, 35",
    ),
    ("fewer experts in the router", lambda tensors: tensors.update({GATE: torch.ones(4, 64)}), rf"{GATE} .*\[4, 64\]"),
    (
        "an expert too many",
        lambda tensors: tensors.update({W2.replace("4", "5"): torch.ones(64, 35)}),
        "holds model.layers.1.block_sparse_moe.experts.5.w2.weight, which the model in config.json has no place for",
    ),
]


@pytest.mark.parametrize(("what", "breaking", "words"), BROKEN, ids=[row[0] for row in BROKEN])
def test_what_is_broken_is_named(
    saved: Callable[..., Path], what: str, breaking: Callable[[dict[str, torch.Tensor]], Any], words: str
) -> None:
    folder = saved("mixtral")
    tensors = load_file(folder / "model.safetensors")
    breaking(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load(folder, ReferenceKernels((0,)))


def test_files_of_another_family_are_not_taken_for_its(saved: Callable[..., Path]) -> None:
    folder = saved("mixtral")
    changes = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "moe_intermediate_size": 35}
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(
        CheckpointError, match=r"lacks model.layers.0.self_attn.q_norm.weight|lacks model.layers.0.mlp.gate"
    ):
        load(folder, ReferenceKernels((0,)))


def test_a_model_larger_than_the_machine_is_refused_with_both_numbers(small: Callable[..., Path]) -> None:
    folder = small(**FAMILIES["qwen3_moe"] | {"num_experts": 1024, "num_hidden_layers": 40, "hidden_size": 2**15})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"moe_intermediate_size": 2**15}))
    with pytest.raises(CheckpointError, match=r"take .* GiB in float32, and this machine has .* GiB"):
        load(folder, ReferenceKernels((0,)), dummy_seed=0)


# ---------------------------------------------------------------- a step


@built
def test_a_step_is_computed_call_by_call(saved: Callable[..., Path], backend: Callable[..., Kernels]) -> None:
    folder, kernels = saved("qwen2_moe"), backend(NATIVE[0])
    decoder = Decoder(read_config(folder), load(folder, kernels), kernels, 64)
    forward = open_forward(decoder, kernels, decoder.make_kv(4, BLOCK), BLOCK, max_tokens=32, max_slices=4)
    assert isinstance(forward, Plain)
    tokens = tuple(range(20))
    best = list(forward.run([Slice(0, 0, tokens, (2, 0))], [19]))
    whole = decoder.hidden(make_batch([Slice(0, 0, tokens, (1, 3))], BLOCK), decoder.make_kv(4, BLOCK))
    logits = decoder.logits(whole)[19]
    assert best == [(int(logits.argmax()), float(logits.max()))]
    parts = [list(forward.run([Slice(0, 0, tokens, (2, 0))], [19], part=part, parts=3)) for part in range(3)]
    assert parts == [[], [], best]


def test_the_memory_table_counts_what_experts_compute_with() -> None:
    dense = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    dense |= {"max_position_embeddings": 64}
    capacity = Capacity(blocks=4, block_size=16, max_tokens=10, max_slices=1, shares=1, max_model_len=64, vocabulary=8)

    def activations(**changes: Any) -> int:
        config = parse_config(dense | FAMILIES["qwen2_moe"] | changes)
        return dict(memory_rows(capacity, config, 0, 0, torch.bfloat16))["activations, at most about"]

    usual = activations(shared_expert_intermediate_size=20)
    assert activations(shared_expert_intermediate_size=35) == usual
    assert activations(shared_expert_intermediate_size=135) - usual == 10 * 3 * 100 * 2
    assert activations(shared_expert_intermediate_size=20, num_experts=106) - usual == 10 * 2 * 100 * 4
