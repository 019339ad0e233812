"""Small tokenizers of the kinds that checkpoints have, each in a folder as transformers would write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from weft.text.hub import resolve_model
from weft.text.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "def f(x):\n    return x + 1\n",
    "日本語 你好世界",
    "Ünïcödé",
] * 20
KINDS = ("builtin", "byte_level", "byte_fallback", "unigram")


def byte_level() -> tuple[Backend, dict[str, Any]]:
    """As Llama 3 has it; the beginning is added by the post-processor, whatever add_bos_token says."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
    )
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return backend, {
        "bos_token": {"__type": "AddedToken", "content": "<|begin|>", "lstrip": False, "rstrip": False},
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "add_bos_token": False,
        "added_tokens_decoder": {"400": {"content": "<|extra|>", "special": True, "normalized": False}},
    }


def byte_fallback() -> tuple[Backend, dict[str, Any]]:
    """As Llama 2 has it: sentencepiece pieces, bytes for what has no piece; the post-processor adds both ends."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("l", "l"), ("▁", "▁"), ("h", "e")]
    for piece in [*"▁abcdefghijklmnopqrstuvwxyz日語", *("".join(pair) for pair in merges)]:
        vocabulary[piece] = len(vocabulary)
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def unigram() -> tuple[Backend, dict[str, Any]]:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend, {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": True,
        "additional_special_tokens": ["<|tool|>"],
    }


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {"builtin": resolve_model("builtin")}
    for make in (byte_level, byte_fallback, unigram):
        folder = tmp_path_factory.mktemp(make.__name__)
        backend, config = make()
        backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        found[make.__name__] = folder
    return found


@pytest.fixture(scope="session")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.from_folder(folder) for name, folder in folders.items()}
