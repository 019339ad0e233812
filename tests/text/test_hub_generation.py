"""Finding the model's folder, and what it says about generating."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from weft.core.sampling import SamplingParams
from weft.errors import CheckpointError
from weft.text.generation import GenerationDefaults
from weft.text.hub import resolve_model


def test_the_builtin_model_is_in_the_package() -> None:
    assert (resolve_model("builtin") / "model.safetensors").is_file()


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("", "not a folder here"),
        ("~nobody-of-that-name/model", "not a folder here"),
        ("llama3", "not a folder here, and does not look like a hub id"),
        ("./a/b/c", "not a folder here"),
        ("/none/at/all", "not a folder here"),
        ("../../etc", "not a folder here"),
        ("buildin", "did you mean builtin"),
    ],
)
def test_what_is_no_model(model: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        resolve_model(model)


def test_the_nearest_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "Llama-3.2-1B").mkdir()
    with pytest.raises(CheckpointError, match=r"did you mean .*Llama-3\.2-1B\?"):
        resolve_model(str(tmp_path / "Llama-3.2-1b"))


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_a_hub_id_is_fetched_without_pickles_or_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/name", "v2") == tmp_path
    assert (asked["model"], asked["revision"]) == ("org/name", "v2")
    names = ["a.safetensors", "config.json", "t.jinja", "m.bin", "code.py", "m.pt", "original/c.safetensors"]
    kept = huggingface_hub.utils.filter_repo_objects(
        names, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == names[:3]


def test_offline_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(model: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network, not in the cache\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        resolve_model("org/name", "main")
    assert str(caught.value) == (
        "model 'org/name': there is no such folder here, and the hub id at revision 'main' could not be fetched: "
        "no network, not in the cache"
    )


def defaults(folder: Path, generation: Any, config: Any = None, eos: tuple[int, ...] = ()) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return GenerationDefaults.from_folder(folder, eos)


def test_without_files_there_are_no_defaults(tmp_path: Path) -> None:
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults()


def test_the_ids_that_end_a_text(tmp_path: Path) -> None:
    assert defaults(tmp_path, {"eos_token_id": [5, 7]}, {"eos_token_id": 9}, (7, 8)).eos_ids == (5, 7, 8)
    assert defaults(tmp_path, {}, {"eos_token_id": 9}).eos_ids == (9,)


def test_the_checkpoint_sets_what_the_request_leaves_open(tmp_path: Path) -> None:
    found = defaults(tmp_path, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096})
    assert found.params(top_p=0.5, n=2) == SamplingParams(temperature=0.6, top_p=0.5, n=2)
    assert defaults(tmp_path, {"do_sample": False, "temperature": 0.6}).params() == SamplingParams()


@pytest.mark.parametrize(
    "generation", [{"temperature": -1}, {"temperature": "hot"}, {"eos_token_id": "</s>"}, {"eos_token_id": [True]}]
)
def test_values_that_cannot_be_honoured(tmp_path: Path, generation: Any) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        defaults(tmp_path, generation)
