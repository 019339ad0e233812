"""Bytes of a request become one of the schemas, or an error that names the field, its value and what would work."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from weft.errors import InvalidRequest, UnsupportedMedia

MAX_ERRORS = 1000
SHOWN = 80
Location = Sequence[int | str]
Model = TypeVar("Model", bound=BaseModel)

# What a client asked for, where it asked for something that weft does not do.
NOT_DONE = {
    "tools": "weft does not call tools",
    "tool_choice": "weft does not call tools",
    "tool_calls": "weft does not call tools",
    "functions": "weft does not call tools",
    "function_call": "weft does not call tools",
    "response_format": 'weft answers in plain text, {"type": "text"}, and does not follow schemas',
    "guided_json": "weft does not follow schemas",
    "guided_regex": "weft does not follow schemas",
    "guided_choice": "weft does not follow schemas",
    "guided_grammar": "weft does not follow schemas",
    "structured_outputs": "weft does not follow schemas",
    "audio": "weft reads and writes text only",
    "modalities": 'weft reads and writes text only: ["text"]',
    "prediction": "weft does not take predicted outputs",
    "web_search_options": "weft does not search the web",
    "moderation": "weft does not moderate",
    "prompt_cache_retention": "weft keeps prefixes as long as there is room",
    "prompt_cache_options": "weft keeps prefixes as long as there is room; cache_salt keeps them apart",
    "verbosity": "weft does not steer verbosity",
    "store": "weft stores nothing; leave it out or send false",
    "service_tier": "weft has one tier; leave it out, or send auto or default",
    "include_obfuscation": "weft pads nothing; leave it out or send false",
    "suffix": "weft does not fill in the middle",
    "use_beam_search": "weft draws its tokens and does not search",
    "length_penalty": "weft draws its tokens and does not search",
    "truncate_prompt_tokens": "weft does not cut prompts; shorten the prompt",
    "chat_template": "templates come from the operator (--chat-template), not from requests",
    "documents": "weft hands no documents to the chat template; put them into a message",
}
# What would work, where pydantic tries several forms and says only what is wrong with each.
FORMS = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists, none of them empty",
    "stop": "a text or a list of at most 16 texts, each of 1 to 1024 characters",
    "content": "a text or a list of parts {'type': 'text', 'text': ...}",
    "chat_template_kwargs": "a text, a number or a boolean",
    "role": "system, developer, user or assistant",
}
# What pydantic puts into a location for the forms of a field; schemas.py writes its own in angle brackets.
FORM_TAGS = ("str", "int", "float", "bool", "constrained-str")


def parse(kind: type[Model], body: bytes, content_type: str | None) -> Model:
    """Raises InvalidRequest for the first thing that is wrong, UnsupportedMedia for a body that is not called JSON."""
    media = (content_type or "application/json").partition(";")[0].strip().lower()
    if media != "application/json":
        raise UnsupportedMedia(f"Content-Type is {media[:SHOWN]!r}; it must be application/json")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error
    unknown = [one["loc"] for one in _errors(problem) if one["type"] == "extra_forbidden" and one["input"] is None]
    if unknown:
        try:
            return kind.model_validate_json(_without(body, unknown))
        except ValidationError as error:
            problem = error
    raise _explain(kind, problem) from None  # the cause would carry the whole body into a log


def _errors(error: ValidationError) -> list[Any]:
    return [] if error.error_count() > MAX_ERRORS else error.errors(include_url=False)


def _without(body: bytes, fields: Sequence[Location]) -> str:
    """The body without these fields of its objects: null says as little as a field that is not there."""
    whole = from_json(body)
    for *path, name in fields:
        inner = whole
        for part in path:
            inner = _part(inner, part)
        if isinstance(inner, dict):
            inner.pop(name, None)
    return json.dumps(whole)


def _part(value: Any, part: int | str) -> Any:
    """An element of a list or an object; None of anything else, since a location also names forms."""
    if isinstance(value, dict):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) else None


def _explain(kind: type[BaseModel], error: ValidationError) -> InvalidRequest:
    if error.error_count() > MAX_ERRORS:
        return InvalidRequest(f"the body has {error.error_count()} errors; see /openapi.json for what it may hold")
    found = error.errors(include_url=False)
    first = found[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not JSON in UTF-8: {first['ctx']['error']}")
    if not first["loc"]:
        return InvalidRequest("the body must be a JSON object")
    # Of the forms that a field may have, the one that was meant is the one whose check got farthest.
    same = [one for one in found if one["loc"][0] == first["loc"][0]]
    meant = max(same, key=lambda one: len(one["loc"]))
    several = len({len(one["loc"]) for one in same}) == 1 and len(same) > 1
    path = tuple(part for part in meant["loc"] if not _is_tag(part))
    return InvalidRequest(_sentence(kind, path, meant, several), param=_name(path))


def _sentence(kind: type[BaseModel], path: Location, error: Any, several: bool) -> str:
    """What is wrong with the value at `path`. several: it has none of the forms that it may have."""
    name, value = _name(path), _short(error.get("input"))
    fields = [part for part in path if isinstance(part, str)]
    last = fields[-1]
    if error["type"] == "missing":
        return f"{name} is missing"
    if last == "type" and "content" in fields:
        return f"{name} is {value}; weft reads text only, in parts {FORMS['content'].partition('parts ')[2]}"
    for field in (last, fields[0]):
        if field in NOT_DONE:
            return f"{name} is {value}: {NOT_DONE[field]}"
    if error["type"] == "extra_forbidden":
        known = kind.model_fields if len(path) == 1 else ()
        near = difflib.get_close_matches(last, known, n=1)
        return f"{name} is not a field that weft knows" + (f"; did you mean {near[0]}?" if near else "")
    if several or error["type"] in ("union_tag_not_found", "literal_error"):
        form = FORMS.get(last) or FORMS.get(fields[0])
        if form is not None:
            return f"{name} is {value}; it must be {form}"
    return f"{name} is {value}; {_requirement(error)}"


def _requirement(error: Any) -> str:
    words = str(error["msg"]).replace("Input should be", "it must be").replace("List should have", "it must have")
    return words.replace(" after validation", "").replace("String should have", "it must have")


def _is_tag(part: int | str) -> bool:
    return isinstance(part, str) and (part in FORM_TAGS or part.startswith(("<", "list[")))


def _name(path: Location) -> str:
    """messages[0].content"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:SHOWN]}"
    return text.removeprefix(".").encode(errors="replace").decode()


def _short(value: Any) -> str:
    """The value as JSON, cut."""
    if isinstance(value, str):
        value = value[:SHOWN]
    elif isinstance(value, list):
        value = value[:10]
    elif isinstance(value, dict):
        value = dict(list(value.items())[:5])
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
