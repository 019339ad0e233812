"""The tokenizer agrees with transformers, and knows the bytes of each token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from weft.errors import CheckpointError, InvalidRequest
from weft.text.tokenizer import Tokenizer, read_json, special_tokens

KINDS = ("builtin", "byte_level", "byte_fallback", "unigram")
TEXTS = st.text(st.sampled_from("aethlqu  \n.,x_()日語你😀é\u0301\u200d\ufffd<s|>") | st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def oracles(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS | st.sampled_from(["<s>the</s> the", "<tool>x", "<|tool|>", "<|begin|>", "<|extra|> a", "<|pad|>"]))
@settings(max_examples=60, deadline=None)
def test_encodes_and_decodes_as_transformers(
    kind: str, text: str, tokenizers: dict[str, Tokenizer], oracles: dict[str, Any]
) -> None:
    ours, oracle = tokenizers[kind], oracles[kind]
    for add in (True, False):
        ids = oracle.encode(text, add_special_tokens=add)
        assert ours.encode(text, add_special_tokens=add) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_knows_the_ids_that_transformers_knows(
    kind: str, tokenizers: dict[str, Tokenizer], oracles: dict[str, Any]
) -> None:
    ours, oracle = tokenizers[kind], oracles[kind]
    assert ours.bos_id == oracle.bos_token_id
    assert ours.eos_ids == (oracle.eos_token_id,)
    assert ours.vocabulary == len(oracle)
    assert ours.special_ids == set(oracle.all_special_ids) | {
        index for index, token in oracle.added_tokens_decoder.items() if token.special
    }


@pytest.mark.parametrize("kind", ["builtin", "byte_level", "byte_fallback"])
@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(
    kind: str, text: str, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = b"".join(map(tokenizer.token_bytes, ids))
    if kind == "byte_fallback":
        # Each stretch between special tokens begins with the space that sentencepiece puts before a word.
        assert whole.replace(b" ", b"") == text.encode().replace(b" ", b"")
    else:
        assert whole == text.encode()


def test_the_text_of_a_single_token(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_fallback"]
    by_text = tokenizer.backend.token_to_id
    assert tokenizer.token_text(by_text("▁the")) == " the"
    assert tokenizer.token_text(by_text("<0x41>")) == "A"
    assert tokenizer.token_bytes(by_text("<0xE4>")) == b"\xe4"
    assert tokenizer.token_text(by_text("<0xE4>")) == "\ufffd"
    assert tokenizer.token_text(by_text("</s>")) == "</s>"
    assert tokenizers["unigram"].token_text(tokenizers["unigram"].encode("the", False)[0]).startswith(" ")
    for beyond in (tokenizer.vocabulary, 2**63, -1):
        assert tokenizer.token_text(beyond) == "" and tokenizer.token_bytes(beyond) == b""


def test_texts_and_ids_that_are_none(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
            tokenizer.encode("a\ud800b")
        for beyond in (-1, 2**63):
            with pytest.raises(InvalidRequest, match="token ids must be between 0 and"):
                tokenizer.decode([beyond])
        assert tokenizer.decode([tokenizer.vocabulary + 1]) == ""


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold an object"):
        read_json(tmp_path / "list.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_json(tmp_path / "bad.json")

    for text in ("[" * 100_000, '{"a": "\xff"}'):
        (tmp_path / "bad.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"bad\.json is not JSON"):
            read_json(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, r"added_tokens_decoder\['x'\] is .* under a token id"),
        ({"added_tokens_decoder": [1]}, r"added_tokens_decoder is \[1\]; it must be an object"),
        ({"added_tokens_decoder": {"1": {}}}, r"added_tokens_decoder\['1'\] is \{\}; it must be an object with"),
        ({"added_tokens_decoder": {"1": {"content": 2}}}, r"added_tokens_decoder\['1'\] is \{'content': 2\}"),
        ({"added_tokens_decoder": {"1": "<x>"}}, r"added_tokens_decoder\['1'\] is '<x>'"),
        (
            {"additional_special_tokens": 7},
            r"tokenizer_config\.json .*additional_special_tokens is 7; it must be a list",
        ),
        ({"extra_special_tokens": 7}, "extra_special_tokens is 7; it must be a list"),
        ({"extra_special_tokens": "<x>"}, "extra_special_tokens is '<x>'; it must be a list"),
    ],
)
def test_added_tokens_that_are_none(
    config: dict[str, Any], words: str, tmp_path: Path, folders: dict[str, Path]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_fallback"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        Tokenizer.from_folder(tmp_path)


def test_special_tokens_in_the_older_file(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_fallback"] / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": None}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.bos_id is None
    assert special_tokens({"eos_token": 3}) == {}
