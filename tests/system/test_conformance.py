"""Responses and stream chunks validate against OpenAI's own description of its API."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

from weft.server.parsing import NOT_DONE
from weft.server.schemas import ChatRequest, CompletionRequest

# A folder beside the checkout; the project does not ship it.
DESCRIPTION = Path(__file__).parents[3] / "shared" / "data" / "conformance" / "openapi.yaml.gz"
pytestmark = pytest.mark.skipif(not DESCRIPTION.is_file(), reason="OpenAI's description is not there")
USER = [{"role": "user", "content": "def f(x):"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    with gzip.open(DESCRIPTION) as stream:
        found: dict[str, Any] = yaml.load(stream, yaml.CSafeLoader)
    return found


@pytest.fixture(scope="module")
def schemas(description: dict[str, Any]) -> dict[str, Any]:
    return {name: _with_null(schema) for name, schema in description["components"]["schemas"].items()}


def _with_null(schema: Any) -> Any:
    """The description says nullable as OpenAPI 3.0 did, which is no keyword of the JSON schema of 3.1."""
    if isinstance(schema, list):
        return [_with_null(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _with_null(value) for key, value in schema.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if schema.get("nullable") is True else plain


@pytest.fixture(scope="module")
def check(schemas: dict[str, Any]) -> Any:
    def check(content: Any, name: str) -> None:
        root = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
        jsonschema.Draft202012Validator(root).validate(content)

    return check


@pytest.fixture(scope="module")
def http(simulated: str) -> Any:
    with httpx.Client(base_url=simulated, timeout=60) as client:
        yield client


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    subject = {"messages": USER} if path == CHAT else {"prompt": "def f(x):"}
    response = http.post(path, json={"model": "builtin", **subject, "max_tokens": 20, **body})
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return response.json()
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


FIELDS: list[dict[str, Any]] = [
    {},
    {"n": 3, "temperature": 1.5, "seed": 4},
    {"stop": ["a", "e", " "], "logit_bias": {"5": -100}},
    {"max_tokens": 1},
    {"return_token_ids": True, "ignore_eos": True},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("logprobs", [None, 0, 5])
def test_chat(http: httpx.Client, check: Any, fields: dict[str, Any], logprobs: int | None) -> None:
    scores = {} if logprobs is None else {"logprobs": True, "top_logprobs": logprobs}
    check(post(http, CHAT, **fields, **scores), "CreateChatCompletionResponse")
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = post(http, CHAT, stream=True, **fields, **scores, **options)
        assert len(chunks) > 1
        for chunk in chunks:
            check(chunk, "CreateChatCompletionStreamResponse")


@pytest.mark.parametrize("fields", [*FIELDS, {"echo": True}, {"prompt": ["a", "b"]}, {"prompt": [5, 6]}], ids=str)
@pytest.mark.parametrize("logprobs", [None, 0, 5])
def test_completions(http: httpx.Client, check: Any, fields: dict[str, Any], logprobs: int | None) -> None:
    answer = post(http, TEXT, **fields, logprobs=logprobs)
    for choice in answer["choices"]:
        if fields.get("echo") and choice["logprobs"]:
            # OpenAI's server has null here as well, whatever its description says: nothing comes before the first.
            for name in ("token_logprobs", "top_logprobs"):
                assert choice["logprobs"][name].pop(0) is None
    check(answer, "CreateCompletionResponse")
    if not (fields.get("echo") and logprobs is not None):
        for chunk in post(http, TEXT, stream=True, **fields, logprobs=logprobs):
            # The description has no chunks of text completions but "the same object"; OpenAI's server sends null for
            # the reason until there is one.
            (choice,) = chunk["choices"]
            choice["finish_reason"] = choice["finish_reason"] or "stop"
            check(chunk, "CreateCompletionResponse")


def test_models_and_errors(http: httpx.Client, check: Any) -> None:
    check(http.get("/v1/models").json(), "ListModelsResponse")
    check(http.get("/v1/models/builtin").json(), "Model")
    for response in (
        http.get("/v1/models/none"),
        http.get("/v1/none"),
        http.get(CHAT),
        http.post(CHAT, json={"messages": []}),
        http.post(CHAT, content=b"{"),
        http.post(TEXT, content=b"x", headers={"content-type": "text/plain"}),
    ):
        assert response.status_code >= 400
        check(response.json(), "ErrorResponse")


@pytest.mark.parametrize(
    ("kind", "name"), [(ChatRequest, "CreateChatCompletionRequest"), (CompletionRequest, "CreateCompletionRequest")]
)
def test_every_field_of_openais_requests_is_known(kind: Any, name: str, description: dict[str, Any]) -> None:
    """Taken, or refused with a reason of its own."""
    fields = set(_properties(description["components"]["schemas"], {"$ref": f"#/components/schemas/{name}"}))
    assert len(fields) > 15 and fields <= set(kind.model_fields) | set(NOT_DONE), fields - set(kind.model_fields)


def _properties(schemas: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    own = list(schema.get("properties", ()))
    return own + [name for part in schema.get("allOf", ()) for name in _properties(schemas, part)]


def test_the_check_itself_finds_what_is_wrong(http: httpx.Client, check: Any) -> None:
    answer = post(http, CHAT, logprobs=True, top_logprobs=1)

    def broken(change: Any) -> dict[str, Any]:
        found: dict[str, Any] = copy.deepcopy(answer)
        change(found, found["choices"][0])
        return found

    for change in (
        lambda answer, choice: answer.pop("created"),
        lambda answer, choice: answer.update(object="text_completion"),
        lambda answer, choice: choice.update(finish_reason="abort"),
        lambda answer, choice: choice.update(finish_reason=None),
        lambda answer, choice: choice["message"].update(content=5),
        lambda answer, choice: choice["logprobs"]["content"][0].pop("bytes"),
        lambda answer, choice: choice["logprobs"].pop("refusal"),
        lambda answer, choice: answer["usage"].pop("total_tokens"),
    ):
        with pytest.raises(jsonschema.ValidationError):
            check(broken(change), "CreateChatCompletionResponse")
