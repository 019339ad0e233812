"""Chat templates: a conversation becomes the one text that the model was trained to continue.

Templates come from the operator (the checkpoint, or --chat-template), never from a request; text/sandbox.py runs them.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from weft.errors import CheckpointError, ConfigError, InvalidRequest
from weft.text.sandbox import BUDGET, Budget, Refusal, compile_template
from weft.text.tokenizer import read_config, read_json, special_tokens

MAX_MESSAGES = 4096
MAX_CHARS = 16 * 2**20
MAX_ROUNDS = 1_000_000
MAX_SECONDS = 10.0
# The template variables that a request may set, each to a scalar.
REQUEST_VARIABLES = frozenset({"enable_thinking", "thinking", "reasoning_effort", "date_string"})


class ChatTemplate:
    """One compiled template with the checkpoint's special tokens (`bos_token` and so on) as variables."""

    def __init__(self, source: str, tokens: Mapping[str, str], origin: str = "the chat template") -> None:
        """Raises CheckpointError for a template that cannot be compiled."""
        self.source = source
        self._tokens = dict(tokens)
        try:
            self._template = compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{origin}, line {error.lineno}: {error.message}") from error
        except Exception as error:  # nested too deeply, or a number too long: whatever Python says of the code
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            raise CheckpointError(f"{origin} cannot be compiled: {reason}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate | None:
        """The template of a checkpoint: chat_template.jinja, chat_template.json or tokenizer_config.json; or None.

        Of several named templates the one named default. Raises CheckpointError when it cannot be used.
        """
        config = read_config(folder)
        path = folder / "chat_template.jinja"
        if path.is_file():
            return cls(_read_text(path), special_tokens(config), str(path))
        for path, content in (
            (folder / "chat_template.json", read_json(folder / "chat_template.json")),
            (folder / "tokenizer_config.json", config),
        ):
            source = _default(content.get("chat_template"), path)
            if source is not None:
                return cls(source, special_tokens(config), f"chat_template in {path}")
        return None

    @classmethod
    def from_file(cls, path: Path, folder: Path) -> ChatTemplate:
        """The template in a file of its own (--chat-template), with the special tokens of the checkpoint `folder`."""
        try:
            return cls(_read_text(path), special_tokens(read_config(folder)), str(path))
        except CheckpointError as error:
            raise ConfigError(f"--chat-template {path} cannot be used: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_chars: int = MAX_CHARS,
        max_seconds: float = MAX_SECONDS,
        **variables: Any,
    ) -> str:
        """The text for the model; encode it with add_special_tokens=False, the template writes them itself.

        messages: role and content (a string, or a list of {"type": "text", "text": ...} parts, which are joined by line
        ends); other keys are passed on. continue_final_message: the text ends where the last message does, instead of
        with the beginning of a new one. variables: those of REQUEST_VARIABLES, scalars. Raises InvalidRequest for
        whatever cannot be rendered.
        """
        for name, value in variables.items():
            _check_variable(name, value)
        plain = plain_messages(messages)
        # Where the last message ends is found by what nobody can have written there: templates trim and cut messages.
        mark = secrets.token_hex(16) if continue_final_message else ""
        if mark:
            plain[-1]["content"] = (plain[-1]["content"] or "") + mark
        budget = Budget(MAX_ROUNDS, max_chars, time.monotonic() + max_seconds)
        values = {
            **self._tokens,
            "messages": plain,
            "tools": None if tools is None else json.loads(json.dumps(tools)),
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            **variables,
            BUDGET: budget,
        }
        try:
            text = "".join(map(budget.count_text, self._template.generate(values)))
        except Refusal as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error
        except Exception as error:  # a template may fail in any way on data that it does not expect
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            raise InvalidRequest(
                f"the chat template cannot render these messages: {reason}", param="messages"
            ) from error
        return _before(text, mark) if mark else text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; it must be a text file in UTF-8") from error


def _before(text: str, mark: str) -> str:
    if text.count(mark) != 1:
        raise InvalidRequest(
            f"the chat template shows the last message {text.count(mark)} times, so it cannot be continued; "
            "leave out continue_final_message",
            param="continue_final_message",
        )
    return text[: text.index(mark)]


def missing_template() -> InvalidRequest:
    """What a chat request to a model without a template is told."""
    return InvalidRequest(
        "this model has no chat template, so it cannot take messages; use /v1/completions, "
        "or start the server with --chat-template FILE",
        param="messages",
    )


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A fresh copy of the conversation made of JSON types, each content a string or None. Raises InvalidRequest."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(f"messages has {len(messages)} entries; 1 to {MAX_MESSAGES} are allowed", param="messages")
    found = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"{where} must be an object with a role (a string) and content", param=where)
        try:
            plain: dict[str, Any] = json.loads(json.dumps({**message, "content": None}))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"{where} holds something that is not JSON: {error}", param=where) from error
        plain["content"] = _text(message.get("content"), f"{where}.content")
        found.append(plain)
    return found


def _text(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequest(
            f"{where} is of type {type(content).__name__}; it must be a string or a list of text parts", param=where
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InvalidRequest(
                f'{where} has a part that is not {{"type": "text", "text": "..."}}; this model reads text only',
                param=where,
            )
        texts.append(text)
    return "\n".join(texts)


def _check_variable(name: str, value: Any) -> None:
    if name not in REQUEST_VARIABLES:
        raise InvalidRequest(
            f"chat_template_kwargs has {name!r}; allowed are {', '.join(sorted(REQUEST_VARIABLES))}",
            param="chat_template_kwargs",
        )
    if value is not None and not isinstance(value, str | int | float | bool):
        raise InvalidRequest(
            f"chat_template_kwargs.{name} is a {type(value).__name__}; it must be a string, a number or a boolean",
            param="chat_template_kwargs",
        )


def _default(value: Any, path: Path) -> str | None:
    """The template under `chat_template`: a string, or a list of {"name", "template"}."""
    if value is None or isinstance(value, str):
        return value
    named = {}
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    chosen = named.get("default")
    if not isinstance(chosen, str):
        raise CheckpointError(
            f"{path}: of its chat templates {sorted(map(str, named))} none is named default; give --chat-template FILE"
        )
    return chosen
