"""Checkpoints that others quantised, served: written here after the formats' descriptions, compared with transformers.

The writer shares nothing with weft's reader: it packs number by number, and keeps the float weights that its integers
stand for. A transformers model with those weights is the truth; with inputs rounded to 8 bits by a hook, it is what
weft promises.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

import weft
from weft import LLM, SamplingParams
from weft.comet.linear import QuantisedReferenceKernels
from weft.config import EngineConfig
from weft.core.plan import Slice
from weft.devices.cpu import open_cpu
from weft.errors import CheckpointError
from weft.kernels import REFERENCE, available, open_kernels
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.loader import Weights, load_weights

BUILTIN = Path(weft.__file__).parent / "assets" / "builtin"
NATIVE = [name for name in available() if name != REFERENCE]
SHAPE: dict[str, Any] = {
    "vocab_size": 136,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SHAPE),
}
TOKENS = tuple(int(token) for token in np.random.default_rng(4).integers(0, 136, 40))
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(form: str, bits: int, strategy: str, group: int | None = None, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group}
    group_0 = {
        "targets": ["Linear"],
        "weights": weights | more.pop("weights", {}),
        "input_activations": more.pop("activations", None),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group_0},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    } | more


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
ZEROS = {"weights": {"symmetric": False}}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("llama", GPTQ),
    "gptq per output": ("llama", GPTQ | {"group_size": -1}),
    "gptq in order of activations": ("qwen2", GPTQ | {"desc_act": True, "sym": False}),
    "gptq v2": ("llama", GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}),
    "gptq 8 bits": ("qwen2", GPTQ | {"bits": 8}),
    "gptq output layer": ("llama", GPTQ | {"lm_head": True}),
    "gptq groups of 32": ("llama", GPTQ | {"group_size": 32, "desc_act": True}),
    "awq": ("qwen2", AWQ),
    "awq groups of 64": ("llama", AWQ | {"group_size": 64}),
    "w4a16": ("tied", compressed("pack-quantized", 4, "group", 128)),
    "w4a16 zero points": ("qwen2", compressed("pack-quantized", 4, "group", 128, **ZEROS)),
    "w4a16 in order": ("llama", compressed("pack-quantized", 4, "group", 128, weights={"actorder": "group"})),
    "w4a16 per output": ("llama", compressed("pack-quantized", 4, "channel")),
    "w4a16 output layer": ("llama", compressed("pack-quantized", 4, "group", 128, ignore=[])),
    "w4a8": ("llama", compressed("pack-quantized", 4, "group", 128, activations=TOKEN)),
    "w4a8 in bytes": ("qwen2", compressed("int-quantized", 4, "group", 128, activations=TOKEN)),
    "w8a8": ("tied", compressed("int-quantized", 8, "channel", activations=TOKEN)),
    "w8a16": ("qwen2", compressed("pack-quantized", 8, "channel")),
    "w8a16 zero points": ("llama", compressed("pack-quantized", 8, "group", 128, **ZEROS)),
    "some layers left": (
        "llama",
        compressed(
            "pack-quantized", 4, "group", 128, ignore=["lm_head", "re:.*1.mlp.down_proj", "re:.*0.self.*k_proj"]
        ),
    ),
}
ROUNDED = ("gptq groups of 32", "awq groups of 64", "w8a16 zero points")  # what does not fit blocks of 128 channels


# ---------------------------------------------------------------- the writer


def words(numbers: np.ndarray, bits: int = 4, places: tuple[int, ...] | None = None) -> torch.Tensor:
    """Unsigned [R, C] -> int32 [R, C * bits / 32]; the lowest bits hold the first neighbour, or that of places[0]."""
    per_word = 32 // bits
    out = np.zeros((numbers.shape[0], numbers.shape[1] // per_word), np.int64)
    for place, neighbour in enumerate(places or range(per_word)):
        out |= numbers[:, neighbour::per_word].astype(np.int64) << (bits * place)
    return torch.from_numpy(out.astype(np.uint32).view(np.int32))


@dataclass
class Written:
    """tensors by suffix, the float weight [out, in] that they stand for, and the group of each input channel."""

    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor
    index: torch.Tensor


def write(weight: np.ndarray, raw: dict[str, Any], order_seed: int) -> Written:
    """Round to the nearest, in the groups of the config. order_seed: of what is alike for linears with one input."""
    method = raw["quant_method"]
    setting = raw if method != "compressed-tensors" else raw["config_groups"]["group_0"]["weights"]
    bits = setting["bits" if method != "compressed-tensors" else "num_bits"]
    symmetric = setting.get("sym", setting.get("symmetric", not setting.get("zero_point", False)))
    inputs = weight.shape[1]
    size = setting["group_size"] if setting["group_size"] not in (None, -1) else inputs
    index = np.arange(inputs) // size
    if setting.get("desc_act") or setting.get("actorder") == "group":
        index = np.random.default_rng(order_seed).permutation(index)
    values, zeros, scales = rounded(weight, index, bits, symmetric)
    stood_for = torch.from_numpy((values - zeros[:, index]) * scales.astype(np.float32)[:, index]).float()
    halves = torch.from_numpy(scales)
    if method == "gptq":
        less = 0 if raw.get("checkpoint_format") == "gptq_v2" else 1
        tensors = {
            "qweight": words(values, bits).T.contiguous(),
            "qzeros": words(zeros.T - less, bits),
            "scales": halves.T.contiguous(),
            "g_idx": torch.from_numpy(index).int(),
        }
    elif method == "awq":
        places = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {
            "qweight": words(values.T, 4, places),
            "qzeros": words(zeros.T, 4, places),
            "scales": halves.T.contiguous(),
        }
    else:
        tensors = compressed_tensors(raw, values, zeros, bits) | {"weight_scale": halves.to(torch.bfloat16)}
        stood_for = torch.from_numpy(values - zeros[:, index]) * tensors["weight_scale"].float()[:, index]
        if setting.get("actorder") == "group":
            tensors["weight_g_idx"] = torch.from_numpy(index).int()
    return Written(tensors, stood_for.float(), torch.from_numpy(index))


def rounded(
    weight: np.ndarray, index: np.ndarray, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values [N, K] and zeros [N, G], from 0 to 2**bits - 1; scales float16 [N, G])."""
    most, middle = 2**bits - 1, 2 ** (bits - 1)
    groups = [weight[:, index == group] for group in range(index.max() + 1)]
    low = np.minimum(np.stack([group.min(axis=1) for group in groups], axis=1), 0)
    high = np.maximum(np.stack([group.max(axis=1) for group in groups], axis=1), 0)
    if symmetric:
        scales = (np.maximum(-low, high) / (most / 2)).astype(np.float16)  # so that the lowest integer occurs
        zeros = np.full(low.shape, middle)
    else:
        scales = ((high - low) / most).astype(np.float16)
        zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 1, most).astype(np.int64)
    values = np.rint(weight / scales.astype(np.float32)[:, index]) + zeros[:, index]
    return np.clip(values, 0, most).astype(np.int64), zeros, scales


def compressed_tensors(
    raw: dict[str, Any], values: np.ndarray, zeros: np.ndarray, bits: int
) -> dict[str, torch.Tensor]:
    middle = 2 ** (bits - 1)
    if raw["format"] == "int-quantized":
        return {"weight": torch.from_numpy(values - middle).to(torch.int8)}
    tensors = {"weight_packed": words(values, bits), "weight_shape": torch.tensor(values.shape)}
    if not raw["config_groups"]["group_0"]["weights"]["symmetric"]:
        tensors["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    return tensors


@dataclass
class Made:
    """A checkpoint, and a transformers model of the weights that its integers stand for.

    hooks: what to hang before the linears whose inputs weft rounds to 8 bits.
    """

    folder: Path
    model: Any
    hooks: list[tuple[torch.nn.Module, Callable[..., torch.Tensor]]] = field(default_factory=list)


def is_left(name: str, raw: dict[str, Any]) -> bool:
    if name == "lm_head" and raw["quant_method"] != "compressed-tensors":
        return not raw.get("lm_head", False)
    marks = [entry.removeprefix("re:.*").split(".*")[-1].split(".")[-1] for entry in raw.get("ignore", [])]
    layers = {"down_proj": "1", "k_proj": "0"}
    return any(name.endswith(mark) and (mark == "lm_head" or f".{layers[mark]}." in name) for mark in marks)


def make(folder: Path, family: str, raw: dict[str, Any], model: Any = None) -> Made:
    """A checkpoint in `raw`'s format, of a random model or of `model`."""
    if model is None:
        model = AutoModelForCausalLM.from_config(MODELS[family](), attn_implementation="eager").float().eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5, generator=generator)
                else:
                    parameter.normal_(0, 0.3 if parameter.dim() == 1 else 0.06, generator=generator)
    model.save_pretrained(folder)
    made = Made(folder, model)
    tensors = load_file(folder / "model.safetensors")
    seeds = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2, "gate_proj": 3, "up_proj": 3, "down_proj": 4}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or is_left(name, raw):
            continue
        written = write(module.weight.detach().numpy(), raw, seeds.get(name.split(".")[-1], 5))
        module.weight = torch.nn.Parameter(written.weight)
        # What shares an input with a layer that is left alone is left alone, too.
        if not is_left(name.replace("q_proj", "k_proj").replace("v_proj", "k_proj"), raw):
            made.hooks.append((module, in_8_bits(written.index)))
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in written.tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": raw}))
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    done: dict[str, Made] = {}

    def of(name: str) -> Made:
        if name not in done:
            done[name] = make(tmp_path_factory.mktemp("foreign"), *FORMATS[name])
        return done[name]

    return of


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- what is served


def served(folder: Path, kernels: Any, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Weights]:
    config = read_config(folder)
    weights = load_weights(folder, config, kernels, dtype)
    decoder = Decoder(config, weights, kernels, 64)
    batch = make_batch([Slice(0, 0, TOKENS, (2, 0, 1))], 16)
    return decoder.logits(decoder.hidden(batch, decoder.make_kv(3, 16))), weights


def in_8_bits(index: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A hook that rounds an input in blocks of 128 channels: those of a group, where groups are as large as that."""
    order = index.argsort(stable=True) if int((index == 0).sum()) % 128 == 0 else torch.arange(len(index))

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        blocks = inputs[0][..., order].unflatten(-1, (-1, 128))
        step = blocks.abs().amax(dim=-1, keepdim=True) / 127
        return ((blocks / step).round() * step).flatten(-2)[..., order.argsort()]

    return hook


def truth(made: Made, tokens: Sequence[int] = TOKENS, *, rounded_inputs: bool) -> torch.Tensor:
    hooks = [module.register_forward_pre_hook(hook) for module, hook in made.hooks if rounded_inputs]
    try:
        with torch.inference_mode():
            return made.model(torch.tensor([tokens])).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_what_transformers_says(made: Callable[[str], Made], name: str) -> None:
    one = made(name)
    found, weights = served(one.folder, QuantisedReferenceKernels((0,)))
    exact, rounded_inputs = truth(one, rounded_inputs=False), truth(one, rounded_inputs=True)
    of_8_bits = distance(rounded_inputs, exact)
    assert 0.01 < of_8_bits < 0.04
    assert distance(found, exact) < 1.5 * of_8_bits
    # A last bit may put a value on the other side of a rounding boundary, which moves all that follows by a whole step:
    # hence not closer. Where that happens to no value, the distance is a ten-thousandth of this.
    assert distance(found, rounded_inputs) < (1.6 if name in ROUNDED else 0.6) * of_8_bits
    assert any("held in 8 bits" in note for note in weights.notes) == (name in ROUNDED)
    assert any("leaves activations in 16 bits" in note for note in weights.notes) == ("a8" not in name)


@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize("name", FORMATS)
def test_native_linears_give_the_bits_of_the_reference(made: Callable[[str], Made], name: str, level: str) -> None:
    folder = made(name).folder
    _, expected = served(folder, reference := QuantisedReferenceKernels((0,)))
    kernels = open_kernels(level, (0,))
    try:
        found, weights = served(folder, kernels)
        for layer, other in zip(weights.layers, expected.layers, strict=True):
            for site in ("qkv", "output", "gate_up", "down"):
                packed, plain = getattr(layer, site), getattr(other, site)
                if not hasattr(plain, "form"):
                    continue  # left unquantised
                x = torch.randn(9, plain.form.channels, generator=torch.Generator().manual_seed(1))
                assert torch.equal(kernels.linear(x, packed), reference.linear(x, plain))
    finally:
        kernels.close()
    exact = truth(made(name), rounded_inputs=False)
    assert distance(found, exact) < 1.5 * distance(truth(made(name), rounded_inputs=True), exact)


def test_layers_that_the_config_leaves_alone_stay_as_they_are(made: Callable[[str], Made]) -> None:
    one = made("some layers left")
    _, weights = served(one.folder, QuantisedReferenceKernels((0,)))
    model = one.model.model
    assert torch.equal(weights.layers[1].down.weight, model.layers[1].mlp.down_proj.weight)
    attention = model.layers[0].self_attn
    whole = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.allclose(weights.layers[0].qkv.weight, whole, rtol=1e-6)
    (mixed,) = (note for note in weights.notes if "only some of the layers" in note)
    assert "model.layers.0.self_attn.q_proj" in mixed


def test_biases_of_zero_that_AutoGPTQ_wrote_are_read(made: Callable[[str], Made], tmp_path: Path) -> None:
    expected, _ = served(made("gptq").folder, QuantisedReferenceKernels((0,)))
    folder = changed(
        made("gptq").folder,
        tmp_path,
        lambda tensors: tensors.update(
            {
                name.replace("qweight", "bias"): torch.zeros(tensor.shape[1], dtype=torch.float16)
                for name, tensor in list(tensors.items())
                if name.endswith(("o_proj.qweight", "q_proj.qweight"))
            }
        ),
    )
    assert torch.equal(served(folder, QuantisedReferenceKernels((0,)))[0], expected)


def test_the_config_that_AutoGPTQ_wrote_beside_is_read(made: Callable[[str], Made], tmp_path: Path) -> None:
    expected, _ = served(made("gptq").folder, QuantisedReferenceKernels((0,)))
    folder = changed(made("gptq").folder, tmp_path, lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    setting = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(
        json.dumps({key: setting[key] for key in setting if key[:5] != "quant"})
    )
    assert torch.equal(served(folder, QuantisedReferenceKernels((0,)))[0], expected)


def test_orders_that_differ_within_a_site_are_held_in_8_bits(made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made("gptq in order of activations")
    name = "model.layers.0.self_attn.v_proj.g_idx"

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = 1 - tensors[name]

    folder = changed(one.folder, tmp_path, swap)
    _, weights = served(folder, QuantisedReferenceKernels((0,)))
    assert any("model.layers.0.self_attn.q_proj: groups of 128" in note for note in weights.notes)


# ---------------------------------------------------------------- what is refused


def changed(folder: Path, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    copy = Path(shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True))
    tensors = load_file(copy / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors")
    return copy


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda tensors: tensors.pop(f"{DOWN}.scales"), rf"lacks {DOWN}.scales, which config.json asks for"),
        (lambda tensors: tensors.update({f"{DOWN}.extra": torch.ones(1)}), rf"{DOWN}.extra, which .* no place for"),
        (
            lambda tensors: tensors.update({f"{DOWN}.scales": tensors[f"{DOWN}.scales"][:2].clone()}),
            rf"model.safetensors: {DOWN}.scales has the shape \[2, 256\]",
        ),
        (
            lambda tensors: tensors.update({f"{DOWN}.qweight": tensors[f"{DOWN}.qweight"].float()}),
            rf"{DOWN}.qweight has the dtype F32; the config asks for I32",
        ),
        (lambda tensors: tensors[f"{DOWN}.scales"].fill_(torch.nan), rf"{DOWN}.scales has a value that is not finite"),
        (lambda tensors: tensors[f"{DOWN}.scales"][1].zero_(), rf"{DOWN}.scales is 0 for 256 groups"),
        (lambda tensors: tensors[f"{DOWN}.g_idx"].fill_(7), rf"{DOWN}.g_idx does not put 128 channels"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "nan", "zero", "groups"],
)
def test_broken_files_are_told_by_name(
    made: Callable[[str], Made], tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        served(changed(made("gptq").folder, tmp_path, edit), QuantisedReferenceKernels((0,)))


def test_a_file_that_is_cut_short_is_told_by_name(made: Callable[[str], Made], tmp_path: Path) -> None:
    folder = changed(made("awq").folder, tmp_path, lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"model.safetensors is cut short"):
        served(folder, QuantisedReferenceKernels((0,)))


def test_settings_that_cannot_be_honoured_are_told_by_key(made: Callable[[str], Made], tmp_path: Path) -> None:
    folder = changed(made("gptq").folder, tmp_path, lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())

    def refused(**settings: Any) -> str:
        (folder / "config.json").write_text(json.dumps(config | settings))
        with pytest.raises(CheckpointError) as caught:
            served(folder, QuantisedReferenceKernels((0,)))
        return caught.value.message

    assert "quantization_config.bits is 3; weft reads 4 and 8" in refused(quantization_config=GPTQ | {"bits": 3})
    assert "gptq, awq or compressed-tensors" in refused(quantization_config={"quant_method": "bitsandbytes"})
    assert "groups of 100 do not divide" in refused(quantization_config=GPTQ | {"group_size": 100})
    assert "lm_head.qweight" in refused(quantization_config=GPTQ | {"lm_head": True})


def test_dummy_weights_are_refused_for_a_quantised_config(made: Callable[[str], Made]) -> None:
    config = read_config(made("gptq").folder)
    with pytest.raises(CheckpointError, match="--load-format dummy draws unquantised weights"):
        load_weights(made("gptq").folder, config, QuantisedReferenceKernels((0,)), torch.float32, dummy_seed=0)


# ---------------------------------------------------------------- the whole


ANSWERS = [(kernels, "w4a16") for kernels in available()]
ANSWERS += [(available()[0], name) for name in ("gptq in order of activations", "awq", "w8a8", "some layers left")]


@pytest.mark.parametrize(("kernels", "name"), ANSWERS)
def test_a_folder_answers_with_nothing_else_to_say(tmp_path: Path, kernels: str, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32).eval()
    one = make(tmp_path, "", FORMATS[name][1], model)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / file, tmp_path)
    with LLM(str(tmp_path), kernels=kernels, max_model_len=64, dtype="float32") as llm:
        (answer,) = llm.generate(["import os\n"], SamplingParams(max_tokens=6, temperature=0))
    tokens = [*answer.prompt_token_ids]
    for token in answer.token_ids:
        scores = truth(one, tokens, rounded_inputs=True)[-1]
        assert scores[token] > scores.max() - 0.05  # or so near that rounding may decide
        tokens.append(token)


def test_the_start_says_what_is_done_to_activations(made: Callable[[str], Made]) -> None:
    device = open_cpu(EngineConfig(max_model_len=64), made("awq").folder, lambda phase: None)
    try:
        assert any("rounds what enters its quantised layers to 8 bits" in note for note in device.describe().notes)
    finally:
        device.close()
