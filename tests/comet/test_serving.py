"""A checkpoint of `weft quantize` is served as it is: loaded, decoded through paged KV, refused when it is broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from weft import LLM, SamplingParams
from weft.cli import main
from weft.comet.linear import QuantisedReferenceKernels
from weft.core.plan import Slice
from weft.errors import CheckpointError, ConfigError
from weft.kernels import REFERENCE, available, open_kernels
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.loader import load_weights

BUILTIN = Path(weft.__file__).parent / "assets" / "builtin"
NATIVE = [name for name in available() if name != REFERENCE]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model in 4 bits."""
    out = tmp_path_factory.mktemp("quantised") / "builtin-fmpq"
    assert main(["quantize", "builtin", "-o", str(out), "--samples", "2", "--length", "64", "--held-out", "1"]) == 0
    return out


def logits(folder: Path, kernels: object, tokens: list[int]) -> torch.Tensor:
    config = read_config(folder)
    weights = load_weights(folder, config, kernels, torch.float32)  # type: ignore[arg-type]
    decoder = Decoder(config, weights, kernels, 64)  # type: ignore[arg-type]
    batch = make_batch([Slice(0, 0, tuple(tokens), (2, 0, 1))], 16)
    return decoder.logits(decoder.hidden(batch, decoder.make_kv(3, 16)))


def divergence(of: torch.Tensor, to: torch.Tensor) -> float:
    """Mean KL divergence of the next token's distribution, in nats."""
    rows = torch.nn.functional.kl_div(of.log_softmax(-1), to.log_softmax(-1), log_target=True, reduction="none")
    return float(rows.sum(-1).mean())


def test_four_bits_say_nearly_what_the_model_says(quantised: Path) -> None:
    tokens = [int(token) for token in torch.randint(16, 4096, (40,), generator=torch.Generator().manual_seed(0))]
    kernels = QuantisedReferenceKernels((0,))
    assert 1e-3 < divergence(logits(quantised, kernels, tokens), logits(BUILTIN, kernels, tokens)) < 0.5


@pytest.fixture(scope="module")
def all_in_4_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with embedding and output layer in 4 bits too, as wide models have them."""
    out = tmp_path_factory.mktemp("quantised") / "builtin-4"
    few = ["--samples", "2", "--length", "64", "--held-out", "1", "--weight-bits-outlier", "4"]
    assert main(["quantize", "builtin", "-o", str(out), *few, "--head-bits", "4", "--embedding-bits", "4"]) == 0
    return out


@pytest.mark.parametrize("name", NATIVE)
def test_head_and_embedding_in_4_bits_are_served(all_in_4_bits: Path, name: str) -> None:
    tokens = [int(token) for token in torch.randint(16, 4096, (40,), generator=torch.Generator().manual_seed(0))]
    slow = QuantisedReferenceKernels((0,))
    expected = logits(all_in_4_bits, slow, tokens)
    assert divergence(expected, logits(BUILTIN, slow, tokens)) < 0.5
    kernels = open_kernels(name, (0,))
    try:
        found = logits(all_in_4_bits, kernels, tokens)
    finally:
        kernels.close()
    assert divergence(found, expected) < 1e-3


def test_the_weights_of_a_model_in_4_bits_take_26_percent(all_in_4_bits: Path) -> None:
    config = read_config(all_in_4_bits)
    weights = load_weights(all_in_4_bits, config, QuantisedReferenceKernels((0,)), torch.bfloat16)
    plain = load_weights(BUILTIN, read_config(BUILTIN), QuantisedReferenceKernels((0,)), torch.bfloat16)
    # 4.125 of 16 bits are 25.8 %; norms and permutations are the rest.
    assert 0.25 < weights.size / plain.size < 0.265


@pytest.mark.parametrize("name", NATIVE)
def test_native_kernels_say_what_the_reference_says(quantised: Path, name: str) -> None:
    # The linears are equal bit for bit (tests/kernels/test_w4ax.py). The norms between them are not, and where a number
    # lies between two integers, that is a whole step: so distributions are compared, far closer than 4 bits are to 16.
    tokens = list(range(100, 140))
    kernels = open_kernels(name, (0,))
    try:
        found = logits(quantised, kernels, tokens)
    finally:
        kernels.close()
    assert divergence(found, logits(quantised, QuantisedReferenceKernels((0,)), tokens)) < 1e-3


@pytest.mark.parametrize("name", NATIVE)
def test_with_exact_a4_native_linears_give_the_bits_of_the_reference(quantised: Path, name: str) -> None:
    config = read_config(quantised)
    eight, four = QuantisedReferenceKernels((0,)), QuantisedReferenceKernels((0,), exact_a4=True)
    plain = load_weights(quantised, config, four, torch.float32)
    kernels = open_kernels(name, (0,), exact_a4=True)
    try:
        packed = load_weights(quantised, config, kernels, torch.float32)
        for layer, other in zip(packed.layers, plain.layers, strict=True):
            for site in ("qkv", "output", "gate_up", "down"):
                linear = getattr(other, site)
                x = torch.randn(5, linear.form.channels, generator=torch.Generator().manual_seed(2))
                expected = four.linear(x, linear)
                assert torch.equal(kernels.linear(x, getattr(layer, site)), expected)
                all_outliers = linear.form.outlier_blocks == linear.form.blocks
                assert torch.equal(eight.linear(x, linear), expected) == all_outliers
    finally:
        kernels.close()


@pytest.mark.parametrize("name", [REFERENCE, NATIVE[0]] if NATIVE else [REFERENCE])
def test_exact_a4_is_a_flag_of_the_engine(quantised: Path, name: str) -> None:
    prompt, params = ["import os\n"], SamplingParams(max_tokens=1, temperature=0, logprobs=1)
    scores = []
    for exact_a4 in (False, True):
        with LLM(str(quantised), kernels=name, max_model_len=64, exact_a4=exact_a4) as llm:
            scores.append(llm.generate(prompt, params)[0].logprobs)
    assert scores[0] != scores[1]


def test_exact_a4_is_refused_where_no_outlier_blocks_were_chosen() -> None:
    with pytest.raises(ConfigError, match=r"--exact-a4 is for fmpq checkpoints.*are not quantised: leave the flag out"):
        LLM("builtin", kernels="reference", exact_a4=True)


@pytest.mark.parametrize("name", available())
def test_a_quantised_folder_answers(quantised: Path, name: str) -> None:
    params = SamplingParams(max_tokens=6, temperature=0)
    with LLM(str(quantised), kernels=name, max_model_len=64) as llm:
        together = llm.generate(["import os\n", "class Stack:\n"], params)
        assert [llm.generate(one.prompt or "", params)[0].token_ids for one in together] == [
            one.token_ids for one in together
        ]


def broken(quantised: Path, folder: Path) -> Path:
    shutil.copytree(quantised, folder)
    return folder


def test_broken_files_are_told_by_name(quantised: Path, tmp_path: Path) -> None:
    folder = broken(quantised, tmp_path / "permutation")
    name = "model.layers.0.attention.permutation"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][0] = tensors[name][1]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{file.name}: attention.permutation of layer 0 is no permutation"):
        LLM(str(folder), kernels="reference")

    folder = broken(quantised, tmp_path / "head")
    name = "lm_head.weight_scale"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][7, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{file.name}: lm_head.weight_scale has a value that is not finite"):
        LLM(str(folder), kernels="reference")

    folder = broken(quantised, tmp_path / "short")
    file = folder / file.name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{file.name} is cut short"):
        LLM(str(folder), kernels="reference")

    folder = broken(quantised, tmp_path / "garbled")
    file = folder / file.name
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    with pytest.raises(CheckpointError, match=rf"{file.name} is cut short or not a safetensors file"):
        LLM(str(folder), kernels="reference")

    folder = broken(quantised, tmp_path / "method")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"quantization_config.version is 99"):
        LLM(str(folder), kernels="reference")


def test_a_quantised_folder_is_not_quantised_again(
    quantised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(quantised), "-o", str(tmp_path / "again")]) == 1
    assert "is quantised already" in capsys.readouterr().err
