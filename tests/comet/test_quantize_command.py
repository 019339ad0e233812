"""`weft quantize` on a tiny checkpoint: the folder it makes, its report, and that nothing is left half done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weft.cli.quantize
import weft.comet.calibrate
import weft.comet.work
from weft.cli import main
from weft.comet.checkpoint import parse
from weft.models.families import parse_config

from .conftest import random_layer, tiny_config

BUILTIN = Path(weft.__file__).parent / "assets" / "builtin"
FEW = ["--samples", "3", "--length", "24", "--held-out", "2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny float checkpoint with the built-in model's tokenizer."""
    raw, config = tiny_config(vocab_size=4096, dtype="bfloat16")
    place = tmp_path / "model"
    place.mkdir()
    tensors = {
        f"model.layers.{index}.{name}": tensor.bfloat16()
        for index in range(config.layers)
        for name, tensor in random_layer(config, index).items()
    }
    tensors["model.embed_tokens.weight"] = torch.randn(4096, 128).bfloat16()
    tensors["model.norm.weight"] = torch.full((128,), 0.125).bfloat16()
    save_file(tensors, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, place)
    return place


def test_a_folder_is_made_whole(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "out", tmp_path / "report.png"
    assert main(["quantize", str(folder), "-o", str(out), *FEW, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "top-1 flips" in printed and str(out) in printed
    assert not (tmp_path / "out.partial").exists()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "quantization_report.json",
        "model.safetensors.index.json",
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
    }
    raw = json.loads((out / "config.json").read_text())
    described = raw.pop("quantization_config")
    assert raw == json.loads((folder / "config.json").read_text())
    assert parse(described, parse_config(raw)).as_json() == described
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["totals"]["outlier_share"] <= 0.1
    assert report["settings"]["method"]["budget"] == 0.1
    assert report["sizes"]["file_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("flags", "stored"),
    [
        ([], {"embed_tokens.weight_outlier", "lm_head.weight_outlier"}),
        (["--head-bits", "4", "--embedding-bits", "4"], {"embed_tokens.weight_packed", "lm_head.permutation"}),
        (["--head-bits", "16", "--embedding-bits", "16"], {"embed_tokens.weight"}),
        (["--head-bits", "16", "--embedding-bits", "8"], {"embed_tokens.weight_outlier", "lm_head.weight"}),
    ],
)
def test_head_and_embedding_have_the_bits_that_are_asked_for(
    folder: Path, tmp_path: Path, flags: list[str], stored: set[str]
) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(folder), "-o", str(out), *FEW, *flags]) == 0
    names = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert stored <= {name.removeprefix("model.") for name in names}
    assert ("lm_head.weight" in names) == ("lm_head.weight" in stored)  # a tied head is written only where it must be
    report = json.loads((out / "quantization_report.json").read_text())
    assert (report["head"] is None) == ("16" in flags[:2])


def test_a_wide_model_has_4_bits_throughout(folder: Path) -> None:
    namespace = weft.cli.quantize._parser().read([str(folder), "-o", "out"])
    for width, bits in ((768, 8), (2048, 4)):
        settings = weft.cli.quantize._settings(namespace, width)
        assert (settings.head_bits, settings.embedding_bits, settings.rounding.outlier_bits) == (bits, bits, bits)


def test_a_stopped_command_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(["quantize", str(folder), "-o", str(whole), *FEW]) == 0
    original = weft.comet.calibrate.quantise_layer

    def stops(*arguments: object) -> object:
        if arguments[3] == 1:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(weft.comet.calibrate, "quantise_layer", stops)
        assert main(["quantize", str(folder), "-o", str(out), *FEW]) == 130
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    assert main(["quantize", str(folder), "-o", str(out), *FEW]) == 0
    assert "going on" in capsys.readouterr().err
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_full_disk_leaves_no_output_and_is_told_by_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weft.comet.work, "save_file", full)
        assert main(["quantize", str(folder), "-o", str(tmp_path / "out"), *FEW]) == 1
    told = capsys.readouterr().err
    assert "rows-00000" in told and "No space left on device" in told and "same command" in told
    assert not (tmp_path / "out").exists()
    assert main(["quantize", str(folder), "-o", str(tmp_path / "out"), *FEW]) == 0


def test_inputs_that_blocks_do_not_divide_are_refused_by_file_and_tensor(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, config = tiny_config(vocab_size=4096, dtype="bfloat16", intermediate_size=320)
    tensors = {
        f"model.layers.{index}.{name}": tensor.bfloat16()
        for index in range(config.layers)
        for name, tensor in random_layer(config, index).items()
    }
    tensors |= {"model.embed_tokens.weight": torch.randn(4096, 128).bfloat16()}
    tensors |= {"model.norm.weight": torch.ones(128).bfloat16()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    assert main(["quantize", str(folder), "-o", str(tmp_path / "out"), *FEW]) == 1
    told = capsys.readouterr().err
    assert "model.safetensors: model.layers.0.mlp.down_proj.weight (down) has 320 input channels" in told
    assert not (tmp_path / "out").exists()


def test_other_settings_begin_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weft.comet.calibrate, "quantise_layers", stops)
        assert main(["quantize", str(folder), "-o", str(tmp_path / "out"), *FEW]) == 130
    assert main(["quantize", str(folder), "-o", str(tmp_path / "out"), *FEW, "--outlier-budget", "0"]) == 0
    assert "beginning anew" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["totals"]["outlier_share"] == 0


def test_the_papers_method_and_a_text_of_ones_own(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 80)
    arguments = ["--method", "paper", "--outlier-threshold", "8", "--weight-bits-outlier", "8"]
    out = tmp_path / "out"
    assert main(["quantize", str(folder), "-o", str(out), *FEW, *arguments, "--calibration", str(text)]) == 0
    described = json.loads((out / "config.json").read_text())["quantization_config"]
    assert described["outlier_weight_bits"] == 8
    assert not any(map(any, described["hadamard"].values()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--outlier-budget", "1.5"], "--outlier-budget is 1.5; it must be from 0 to 1"),
        (["--outlier-budget", "nan"], "--outlier-budget is nan"),
        (["--method", "papers"], "invalid choice: 'papers'"),
        (["--method", "paper", "--outlier-budget", "0.1"], "--outlier-budget is for --method fmpq"),
        (["--outlier-threshold", "5"], "--outlier-threshold is for --method paper"),
        (["--samples", "0"], "--samples is 0; it must be at least 1"),
        (["--length", "65"], "--length is 65; the model's context is 64 tokens"),
        (["--weight-bits-outlier", "6"], "invalid choice: '6'"),
        (["--plot", "nowhere/report.png"], "--plot is nowhere/report.png; there is no folder nowhere"),
        (["--plot", "report.foo"], "--plot is report.foo; its name must end with one of .png, .svg, .pdf, .jpg, .webp"),
        (["--calibration", "nowhere.txt"], "--calibration nowhere.txt cannot be read: No such file or directory"),
    ],
)
def test_wrong_flags_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["quantize", str(folder), "-o", str(tmp_path / "out"), *FEW[:2], *arguments]) == 2
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_missing_output_and_folders_in_the_way_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(folder)]) == 2
    assert "--output is missing" in capsys.readouterr().err
    assert main(["quantize", str(folder), "-o", str(folder)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["quantize", str(folder), "-o", "/"]) == 2
    assert "--output / exists" in capsys.readouterr().err
    (tmp_path / "out.partial").mkdir()
    assert main(["quantize", str(folder), "-o", str(tmp_path / "out"), *FEW]) == 2
    assert "is in the way" in capsys.readouterr().err


def test_experts_are_refused_by_name(tiny_experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tiny_experts), "-o", str(tmp_path / "out"), *FEW]) == 1
    assert "is a mixtral with 5 experts in each layer, which `weft quantize` cannot" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_broken_models_are_refused_by_file_and_tensor(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"intermediate_size": 320}))
    assert main(["quantize", str(folder), "-o", out, *FEW]) == 1
    assert "mlp.gate_proj.weight has the shape [256, 128]" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(raw))
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert main(["quantize", str(folder), "-o", out, *FEW]) == 1
    assert "model.safetensors is cut short" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
