"""The tokenizer of a checkpoint folder: text to token ids and back, and what a single token stands for.

Reads tokenizer.json, and from tokenizer_config.json what that file leaves open: which special tokens there are, and
what each is for. Whether beginning and end of text are added is tokenizer.json's word (its post-processor), and
`add_bos_token` in the other file is a note of how it was made: so transformers has it, with which this agrees.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from weft.errors import CheckpointError, InvalidRequest

NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_ID = 2**32 - 1
TOKEN_ID = re.compile(r"[0-9]{1,10}")
# Characters or ids from which a text is a batch of one: `encode` and `decode` hold the interpreter's lock all the
# while, for seconds where the text has megabytes, and `encode_batch` and `decode_batch` do not.
LONG = 4096
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """Text to ids and back.

    backend: the `tokenizers.Tokenizer`. bos_id, eos_ids: beginning and end of text where the checkpoint names them.
    special_ids: ids that `skip_special_tokens` leaves out. vocabulary: number of tokens.
    """

    def __init__(self, backend: Backend, config: dict[str, Any]) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        self.backend = backend
        self.special_tokens = special_tokens(config)
        _add_missing(backend, config, self.special_tokens)
        added = backend.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items()}
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.bos_id = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        self.vocabulary: int = backend.get_vocab_size(with_added_tokens=True)
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
        steps = list(_decoder_steps(decoder))
        self._byte_level = any(step["type"] == "ByteLevel" for step in steps)
        self._byte_fallback = any(step["type"] == "ByteFallback" for step in steps)
        self._replacements = [pair for step in steps for pair in _replacement(step)]

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Raises CheckpointError when tokenizer.json is missing or cannot be read."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json; weft reads no other tokenizer format. "
                "transformers writes one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception for whatever is wrong with the file
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return cls(backend, read_config(folder))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequest for a text with half of a surrogate pair, which JSON can carry and UTF-8 cannot."""
        try:
            if len(text) > LONG:
                (encoding,) = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
            else:
                encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
        except TypeError as error:
            raise InvalidRequest(
                "the text holds half of a surrogate pair (\\ud800 to \\udfff), no character"
            ) from error
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Bytes that are no UTF-8 become U+FFFD; ids without a token give nothing. Raises InvalidRequest for ids that
        no tokenizer can have."""
        text: str
        try:
            if len(ids) > LONG:
                (text,) = self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
            else:
                text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise InvalidRequest(f"token ids must be between 0 and {self.vocabulary - 1}", param="tokens") from error
        return text

    def visible(self, token: int, skip_special_tokens: bool) -> bool:
        """Whether the token adds to the text: it exists (a model's vocabulary may be padded) and is not left out."""
        if skip_special_tokens and token in self.special_ids:
            return False
        return self.backend.id_to_token(token) is not None

    def token_bytes(self, token: int) -> bytes:
        """The bytes that the token stands for, also where they are a part of a character; none for an unknown id."""
        if token in self._added:
            return self._added[token].encode()
        text = self.backend.id_to_token(token) if 0 <= token <= MAX_ID else None
        if text is None:
            return b""
        if self._byte_level and all(char in BYTES_OF_CHARS for char in text):
            return bytes(BYTES_OF_CHARS[char] for char in text)
        if self._byte_fallback and (match := BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        for pattern, content in self._replacements:
            text = text.replace(pattern, content)
        return text.encode()

    def token_text(self, token: int) -> str:
        """The token as text, with U+FFFD where it holds a part of a character."""
        return self.token_bytes(token).decode(errors="replace")

    def _id_of(self, name: str) -> int | None:
        content = self.special_tokens.get(name)
        return None if content is None else self.backend.token_to_id(content)


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, over special_tokens_map.json where older checkpoints keep their special tokens."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        merged |= read_json(folder / name)
    return merged


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file. Raises CheckpointError for anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are both ValueError
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; it must hold an object")
    return content


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The named special tokens, such as {"bos_token": "<s>"}; the file has strings or AddedToken objects."""
    found = {}
    for name in NAMED_SPECIALS:
        content = _content(config.get(name))
        if content is not None:
            found[name] = content
    return found


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _add_missing(backend: Backend, config: dict[str, Any], named: dict[str, str]) -> None:
    """Give an id to added tokens that tokenizer.json lacks, and make every named one special."""
    for entry in _declared(config):
        if backend.token_to_id(entry["content"]) is None:
            backend.add_tokens([_added_token(entry)])
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for content in [*named.values(), *_extra(config)]:
        if content not in known or not known[content].special:
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _declared(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens of added_tokens_decoder, such as {"7": {"content": "<x>"}}, in the order of their ids."""
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict):
        raise _unusable("added_tokens_decoder", declared, 'an object such as {"7": {"content": "<x>"}}')
    for index, entry in declared.items():
        where = f"added_tokens_decoder[{index!r}]"
        if not TOKEN_ID.fullmatch(index):
            raise _unusable(where, entry, "under a token id, a whole number")
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise _unusable(where, entry, 'an object with the token as its content, such as {"content": "<x>"}')
    return [declared[index] for index in sorted(declared, key=int)]


def _extra(config: dict[str, Any]) -> list[str]:
    """The special tokens without a purpose of their own: a list of them, or an object that names each."""
    key = "additional_special_tokens" if config.get("additional_special_tokens") else "extra_special_tokens"
    extra = config.get(key) or []
    if not isinstance(extra, dict | list):
        raise _unusable(key, extra, 'a list of tokens such as ["<x>"]')
    contents = [_content(value) for value in (extra.values() if isinstance(extra, dict) else extra)]
    return [content for content in contents if content is not None]


def _unusable(key: str, value: Any, wanted: str) -> CheckpointError:
    shown = repr(value)[:200]
    return CheckpointError(f"tokenizer_config.json or special_tokens_map.json: {key} is {shown}; it must be {wanted}")


def _added_token(entry: dict[str, Any]) -> AddedToken:
    flags = {name: bool(entry[name]) for name in ("lstrip", "rstrip", "single_word", "normalized") if name in entry}
    return AddedToken(entry["content"], special=bool(entry.get("special", False)), **flags)


def _decoder_steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _decoder_steps(step)
    elif decoder:
        yield decoder


def _replacement(step: dict[str, Any]) -> list[tuple[str, str]]:
    if step["type"] == "Metaspace":
        return [(step["replacement"], " ")]
    if step["type"] == "Replace" and "String" in step["pattern"]:
        return [(step["pattern"]["String"], step["content"])]
    return []


def _bytes_of_chars() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and onward."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTES_OF_CHARS = _bytes_of_chars()
