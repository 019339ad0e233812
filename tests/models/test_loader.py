"""Loading: every layout of files gives the same weights; every broken file is named; memory stays at a layer."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from weft.core.plan import Slice
from weft.errors import CheckpointError
from weft.kernels.reference import PlainLinear, ReferenceKernels
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.loader import Weights, compute_dtype, load_weights, stored_dtype, weight_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = tuple(range(3, 60, 2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 (it has biases), untied, in one file."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Weights:
    return load_weights(folder, read_config(folder), ReferenceKernels((0,)), dtype, **options)


def logits(folder: Path, weights: Weights) -> torch.Tensor:
    decoder = Decoder(read_config(folder), weights, ReferenceKernels((0,)), 64)
    batch = make_batch([Slice(0, 0, TOKENS, (1, 0))], 16)
    return decoder.logits(decoder.hidden(batch, decoder.make_kv(2, 16)))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def shard(folder: Path) -> list[Path]:
    """The same tensors in several files with an index."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / SINGLE).unlink(missing_ok=True)
    return sorted(folder.glob("model-*.safetensors"))


def test_shards_are_the_same_model(folder: Path) -> None:
    whole = logits(folder, load(folder))
    assert len(shard(folder)) > 3
    assert logits(folder, load(folder)).equal(whole)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chosen", [torch.float32, torch.bfloat16])
def test_any_stored_dtype_becomes_the_chosen_one(folder: Path, stored: torch.dtype, chosen: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=stored)
    model.save_pretrained(folder)
    weights = load(folder, chosen)
    want = model.state_dict()
    assert weights.dtype == weights.norm.dtype == weights.embedding.values.dtype == chosen
    assert weights.embedding.values.equal(want["model.embed_tokens.weight"].to(chosen))
    assert weights.layers[2].down.weight.equal(want["model.layers.2.mlp.down_proj.weight"].to(chosen))
    qkv = [want[f"model.layers.1.self_attn.{part}_proj.bias"].to(chosen) for part in "qkv"]
    assert weights.layers[1].qkv.bias.equal(torch.cat(qkv))


def test_auto_takes_the_dtype_of_the_checkpoint_and_says_where_it_cannot(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())

    def of(dtype: str) -> str | None:
        (folder / "config.json").write_text(json.dumps(raw | {"dtype": dtype}))
        return read_config(folder).dtype

    assert compute_dtype("auto", of("float32")) == (torch.float32, None)
    assert compute_dtype("auto", of("bfloat16")) == (torch.bfloat16, None)
    assert compute_dtype("auto", None) == (torch.bfloat16, None)
    assert compute_dtype("float32", of("float16")) == (torch.float32, None)
    dtype, note = compute_dtype("auto", of("float16"))
    assert dtype == torch.bfloat16 and note is not None and "float16" in note


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_tell_their_dtype_where_the_config_does_not(dtype: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    assert stored_dtype(tmp_path) == dtype


def test_a_tied_model_uses_its_embedding_unless_it_brings_an_output_layer(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / SINGLE)
    weights = load(tmp_path)
    assert weights.head.weight.equal(weights.embedding.values)
    other = torch.randn(96, 32)
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": other}))
    assert load(tmp_path).head.weight.equal(other)


def test_old_rotary_frequencies_in_a_checkpoint_are_passed_over(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    load(folder)


def test_dummy_weights_need_no_files_and_follow_the_seed(folder: Path) -> None:
    (folder / SINGLE).unlink()
    first, again, other = (logits(folder, load(folder, dummy_seed=seed)) for seed in (1, 1, -2))
    assert first.isfinite().all() and first.std() > 0.01
    assert first.equal(again) and not first.equal(other)
    spread = load(folder, dummy_seed=1).layers[0].down.weight
    assert abs(spread.mean()) < 2e-3 and 0.018 < spread.std() < 0.022


def test_loading_says_what_it_does_and_how_large_it_is(folder: Path) -> None:
    said: list[str] = []
    weights = load(folder, say=said.append)
    stored = sum(tensor.nbytes for tensor in load_file(folder / SINGLE).values())
    assert said == ["weights"]
    assert weights.size == weight_bytes(read_config(folder), torch.float32) == stored
    assert weight_bytes(read_config(folder), torch.bfloat16) == stored // 2


class CountingKernels(ReferenceKernels):
    """Packs into copies and remembers how many bytes of the loader's tensors are alive at each packing."""

    def __init__(self) -> None:
        super().__init__((0,))
        self.given: list[weakref.ref[torch.Tensor]] = []
        self.peak = 0

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PlainLinear:
        self.given.append(weakref.ref(weight))
        alive = [tensor for ref in self.given if (tensor := ref()) is not None]
        self.peak = max(self.peak, sum(tensor.nbytes for tensor in alive))
        return PlainLinear(weight.clone(), bias)


def test_loading_holds_no_layer_and_no_file_after_packing_it(folder: Path) -> None:
    files = shard(folder)
    kernels = CountingKernels()
    weights = load_weights(folder, read_config(folder), kernels, torch.float32)
    gc.collect()
    layer = weights.layers[0]
    parts = (layer.qkv, layer.output, layer.gate_up, layer.down)
    assert kernels.peak <= max(weights.embedding.values.nbytes, sum(part.weight.nbytes for part in parts))
    assert all(ref() is None for ref in kernels.given)
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text()
        assert not [file for file in files if str(file) in maps]


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: tensors.pop(name))


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: tensors.update({name: tensor}))


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / SINGLE).unlink()
        (folder / name).write_bytes(content)

    return apply


def cut(keep: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(data[: int(len(data) * keep)])

    return apply


def index(raw: Any) -> Callable[[Path], None]:
    return write(INDEX, json.dumps(raw).encode())


Q = "model.layers.1.self_attn.q_proj.weight"
BROKEN: list[tuple[str, Callable[[Path], None], str]] = [
    ("lacks a tensor", drop(Q), f"{SINGLE} lacks {Q}, which config.json asks for"),
    ("lacks the norm", drop("model.norm.weight"), f"{SINGLE} lacks model.norm.weight"),
    ("lacks the head", drop("lm_head.weight"), f"{SINGLE} lacks lm_head.weight"),
    ("lacks a bias", drop(Q.replace("weight", "bias")), "lacks model.layers.1.self_attn.q_proj.bias"),
    ("an extra tensor", put("model.layers.1.mlp.up_proj.bias", torch.ones(64)), f"{SINGLE} holds .*up_proj.bias"),
    ("an extra layer", put("model.layers.3.mlp.up_proj.weight", torch.ones(64, 32)), "holds model.layers.3.mlp"),
    ("another shape", put(Q, torch.ones(32, 16)), rf"{SINGLE}: {Q} has the shape \[32, 16\]; config.json asks for \["),
    ("one dimension too many", put("model.norm.weight", torch.ones(32, 1)), r"model.norm.weight has the shape \[32, 1"),
    ("integers", put(Q, torch.ones(32, 32, dtype=torch.int8)), f"{Q} has the dtype I8; weft reads F32, BF16, F16"),
    ("cut in the data", cut(0.9), f"{SINGLE} is cut short or not a safetensors file"),
    ("cut in the header", cut(0.001), f"{SINGLE} is cut short or not a safetensors file"),
    ("empty", write(SINGLE, b""), f"{SINGLE} is cut short|{SINGLE} cannot be read"),
    ("nonsense", write(SINGLE, b"\x80\x02pickle" * 100), f"{SINGLE} is cut short or not a safetensors file"),
    ("a huge header", write(SINGLE, b"\xff" * 8 + b"{}"), f"{SINGLE} is cut short or not a safetensors file"),
    ("a folder for a file", lambda folder: folder_for_file(folder), SINGLE),
    ("a link to nothing", lambda folder: link_to_nothing(folder), "is missing: it is a link to /nowhere/blob"),
    ("pickles only", write("pytorch_model.bin", b"x"), "has pytorch_model.bin .*weft reads safetensors only"),
    ("files of other names", write("consolidated.safetensors", b"x"), "has consolidated.safetensors, but neither"),
    ("no files", lambda folder: (folder / SINGLE).unlink(), "has no weights"),
    ("an index that is no JSON", write(INDEX, b"{"), f"{INDEX} is not JSON"),
    ("an index that is a list", index([]), f"{INDEX} holds a JSON list; it must be an object"),
    ("an index without tensors", index({"weight_map": {}}), f"{INDEX} has no weight_map"),
    ("an index of wrong types", index({"weight_map": {Q: 3}}), f"names the file 3 for {Q}"),
    ("an index that leaves its folder", index({"weight_map": {Q: "../x.safetensors"}}), "must be a plain name"),
    ("an index of the parent", index({"weight_map": {Q: ".."}}), "must be a plain name"),
    (
        "an index of absent files",
        index({"weight_map": {Q: "a.safetensors"}}),
        f"a.safetensors is missing, though {INDEX}",
    ),
]


def link_to_nothing(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("/nowhere/blob")


def folder_for_file(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()


@pytest.mark.parametrize(("what", "breaking", "words"), BROKEN, ids=[row[0] for row in BROKEN])
def test_what_is_broken_is_named(folder: Path, what: str, breaking: Callable[[Path], None], words: str) -> None:
    breaking(folder)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_a_shard_that_is_missing_or_lacks_its_tensor_is_named(folder: Path) -> None:
    files = shard(folder)
    kept = files[1].read_bytes()
    save_file({"other": torch.ones(2)}, files[1])
    with pytest.raises(CheckpointError, match=f"{files[1].name} lacks the tensor .*{INDEX} says"):
        load(folder)
    files[1].write_bytes(kept)
    save_file(load_file(files[1]) | load_file(files[2]), files[2])
    with pytest.raises(CheckpointError, match=f"{files[2].name} and .*{files[1].name} both hold"):
        load(folder)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"{files[1].name} is missing, though {INDEX} names it"):
        load(folder)


def test_a_config_of_another_size_is_named_by_the_first_tensor_that_differs(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 97, "layer_types": None}))
    with pytest.raises(
        CheckpointError, match=r"embed_tokens.weight has the shape \[96, 32\]; config.json asks for \[97"
    ):
        load(folder)
    (folder / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 5, "layer_types": None}))
    with pytest.raises(CheckpointError, match=r"lacks model.layers.3.* and \d+ more, which config.json asks for"):
        load(folder)


def test_a_model_larger_than_the_machine_is_refused_with_both_numbers(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    huge = {"num_hidden_layers": 9000, "intermediate_size": 2**20, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(raw | huge))
    with pytest.raises(CheckpointError, match=r"take .* GiB in float32, and this machine has .* GiB"):
        load(folder, dummy_seed=0)
