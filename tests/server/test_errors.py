"""Everything that a client can do wrong: the status, OpenAI's shape, the field's name, and what would work."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from weft.errors import ContextTooLong, InvalidRequest, NeverFits, QueueFull, StepFailed, Unavailable, WeftError
from weft.server.state import State
from weft.text.tokenizer import Tokenizer

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
BODIES: dict[str, dict[str, Any]] = {TEXT: {"prompt": "x"}, CHAT: {"messages": [USER]}}
JSON = {"content-type": "application/json"}


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (name, error), *others = response.json().items()
    assert name == "error" and not others and set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    assert len(error["message"]) < 500
    found: dict[str, Any] = error
    return found


BAD_FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    (TEXT, {"max_tokens": 2**63}, "max_tokens", "less than or equal to 2147483647"),
    (TEXT, {"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    (TEXT, {"max_tokens": 0, "min_tokens": 3}, "min_tokens", "more than max_tokens 0"),
    (TEXT, {"max_tokens": "5"}, "max_tokens", "integer"),
    (TEXT, {"max_tokens": 1.5}, "max_tokens", "integer"),
    (TEXT, {"max_tokens": True}, "max_tokens", "integer"),
    (TEXT, {"n": 10**9}, "n", "less than or equal to 128"),
    (TEXT, {"n": 0}, "n", "greater than or equal to 1"),
    (TEXT, {"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    (TEXT, {"temperature": 1e9}, "temperature", "less than or equal to 100"),
    (TEXT, {"temperature": "hot"}, "temperature", "number"),
    (TEXT, {"top_p": 0}, "top_p", "greater than 0"),
    (TEXT, {"top_k": -2}, "top_k", "greater than or equal to -1"),
    (TEXT, {"min_p": 2}, "min_p", "less than or equal to 1"),
    (TEXT, {"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
    (TEXT, {"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
    (TEXT, {"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
    (TEXT, {"seed": 2**64}, "seed", "less than or equal to 18446744073709551615"),
    (TEXT, {"logprobs": 21}, "logprobs", "less than or equal to 20"),
    (TEXT, {"logprobs": True}, "logprobs", "integer"),
    (TEXT, {"stop": ["a"] * 17}, "stop", "at most 16 texts"),
    (TEXT, {"stop": ["a"] * 10_000}, "stop", "at most 16 texts"),
    (TEXT, {"stop": [""]}, "stop[0]", "at least 1 character"),
    (TEXT, {"stop": "x" * 1025}, "stop", "1024 characters"),
    (TEXT, {"stop": 7}, "stop", "a text or a list"),
    (TEXT, {"stop_token_ids": [4096]}, "stop_token_ids", "between 0 and 4095"),
    (TEXT, {"stop_token_ids": [-1]}, "stop_token_ids[0]", "greater than or equal to 0"),
    (TEXT, {"stop_token_ids": [1] * 129}, "stop_token_ids", "at most 128 items"),
    (TEXT, {"logit_bias": {"cat": 1}}, "logit_bias", "keys are token ids"),
    (TEXT, {"logit_bias": {"-1": 1}}, "logit_bias", "keys are token ids"),
    (TEXT, {"logit_bias": {"٣": 1}}, "logit_bias", "keys are token ids"),
    (TEXT, {"logit_bias": {"9" * 5000: 1}}, "logit_bias", "keys are token ids"),
    (TEXT, {"logit_bias": {"4096": 1}}, "logit_bias", "between 0 and 4095"),
    (TEXT, {"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
    (TEXT, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
    (TEXT, {"logit_bias": [1]}, "logit_bias", "object"),
    (TEXT, {"min_tokens": 20}, "min_tokens", "more than max_tokens 16"),
    (TEXT, {"best_of": 2}, "best_of", "must equal n"),
    (TEXT, {"suffix": "x"}, "suffix", "fill in the middle"),
    (TEXT, {"cache_salt": "x" * 257}, "cache_salt", "256"),
    (TEXT, {"priority": 2**40}, "priority", "less than"),
    (TEXT, {"prompt": []}, "prompt", "a text, a list of texts, a list of token ids"),
    (TEXT, {"prompt": [[]]}, "prompt[0]", "at least 1"),
    (TEXT, {"prompt": [1, "a"]}, "prompt[1]", "integer"),
    (TEXT, {"prompt": [1.5]}, "prompt", "a list of token ids"),
    (TEXT, {"prompt": {"a": 1}}, "prompt", "a list of token ids"),
    (TEXT, {"prompt": None}, "prompt", "a list of token ids"),
    (TEXT, {"prompt": [5, 4096]}, "prompt", "token ids are 0 to 4095"),
    (TEXT, {"prompt": ["a"] * 1025}, "prompt", "at most 1024 items"),
    (TEXT, {"prompt": ["a"] * 10**6}, "prompt", "at most 1024 items"),
    (TEXT, {"prompt": [-1] * 10**6}, "prompt[0]", "greater than or equal to 0"),
    (TEXT, {"prompt": ["a"] * 100, "n": 100}, "n", "10000 sequences; at most 1024"),
    (
        TEXT,
        {"prompt": [5] * 1700, "prompt_logprobs": 20, "n": 120},
        "prompt_logprobs",
        "4284000 numbers",
    ),
    (TEXT, {"prompt": [5] * 1700, "echo": True, "logprobs": 20, "n": 120}, "logprobs", "logprobs = 20, are 4284000"),
    (TEXT, {"length_penalty": 2.0}, "length_penalty", "does not search"),
    (TEXT, {"use_beam_search": True}, "use_beam_search", "does not search"),
    (TEXT, {"foo": None, "temperature": None, "n": 0}, "n", "greater than or equal to 1"),
    (TEXT, {"foo": None, "bar": 1}, "bar", "not a field"),
    (CHAT, {"echo": True}, "echo", "must be false"),
    (TEXT, {"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    (TEXT, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not a field"),
    (TEXT, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "cannot be streamed"),
    (TEXT, {"stream": "yes"}, "stream", "boolean"),
    (TEXT, {"promt": "x"}, "promt", "did you mean prompt?"),
    (TEXT, {"messages": []}, "messages", "not a field that weft knows"),
    (TEXT, {"guided_json": {}}, "guided_json", "does not follow schemas"),
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": [USER] * 4097}, "messages", "at most 4096"),
    (CHAT, {"messages": "hi"}, "messages", "array"),
    (CHAT, {"messages": ["hi"]}, "messages[0]", "object"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "a text or a list of parts"),
    (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages[0].content", "a text or a list of parts"),
    (CHAT, {"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].role", "user or assistant"),
    (CHAT, {"messages": [{**USER, "weight": 1}]}, "messages[0].weight", "not a field"),
    (CHAT, {"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls", "does not call tools"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages[0].content[0].type",
        "reads text only",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        "messages[0].content[0].type",
        "reads text only",
    ),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "does not call tools"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "does not call tools"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions", "does not call tools"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format.type", "plain text"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.type", "plain text"),
    (CHAT, {"audio": {"voice": "x", "format": "mp3"}}, "audio", "text only"),
    (CHAT, {"modalities": ["audio"]}, "modalities[0]", "text only"),
    (CHAT, {"prediction": {"type": "content"}}, "prediction", "predicted outputs"),
    (CHAT, {"web_search_options": {}}, "web_search_options", "search the web"),
    (CHAT, {"store": True}, "store", "stores nothing"),
    (CHAT, {"service_tier": "flex"}, "service_tier", "one tier"),
    (
        CHAT,
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "leave out add_generation_prompt",
    ),
    (CHAT, {"chat_template": "{{ 1 }}"}, "chat_template", "--chat-template"),
    (
        CHAT,
        {"chat_template_kwargs": {"enable_thinking": [1]}},
        "chat_template_kwargs.enable_thinking",
        "a text, a number",
    ),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    (CHAT, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "give one of them"),
    (CHAT, {"metadata": {"a": 1}}, "metadata.a", "string"),
    (CHAT, {"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16"),
    (CHAT, {"prompt": "x"}, "prompt", "not a field"),
]


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"), BAD_FIELDS, ids=[f"{path}-{str(f)[:40]}" for path, f, _, _ in BAD_FIELDS]
)
async def test_a_field_that_cannot_be_honoured_is_named(
    site: Any, engine: Any, path: str, fields: dict[str, Any], param: str, words: str
) -> None:
    error = error_of(await site.post(path, **{**BODIES[path], **fields}))
    assert error["param"] == param and words in error["message"], error
    assert param.partition("[")[0].partition(".")[0] in error["message"] or "prompt" in error["message"]
    assert error["type"] == "invalid_request_error" and error["code"]
    assert not engine.seen


BAD_BODIES = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"{",
    b'{"prompt": "x",}',
    b'{"prompt": "x"} {"prompt": "y"}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": Infinity}',
    b'{"prompt": "x", "temperature": -Infinity}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"thinking": NaN}}',
    b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"prompt": "x", "\xf0\x9f": 1}',
    '{"prompt": "x"}'.encode("utf-16"),
    b"{" + b",".join(b'"%d":1' % i for i in range(5000)) + b"}",
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:30]))
@pytest.mark.parametrize("path", [TEXT, CHAT, "/tokenize", "/detokenize"])
async def test_a_body_that_is_no_object_in_json_is_the_clients_error(site: Any, path: str, body: bytes) -> None:
    error_of(await site.http.post(path, content=body, headers=JSON))


async def test_what_does_not_fit_the_context_is_told_with_the_numbers(site: Any, engine: Any) -> None:
    error = error_of(await site.post(TEXT, prompt=[5] * 2000, max_tokens=49))
    assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens"
    for word in ("2000 tokens", "max_tokens 49", "context of 2048", "at most 48"):
        assert word in error["message"]
    assert (await site.post(TEXT, prompt=[5] * 2000, max_tokens=48)).status_code == 200
    error = error_of(await site.post(TEXT, prompt=[5] * 2048, max_tokens=1))
    assert error["param"] == "prompt"
    error = error_of(await site.post(CHAT, messages=[{"role": "user", "content": "word " * 3000}]))
    assert "at least one token of output" in error["message"]


async def test_an_empty_prompt_needs_a_beginning_of_text(site: Any, engine: Any) -> None:
    await site.complete(prompt="")  # the built-in model's tokenizer has one
    assert len(engine.seen.pop().prompt) == 1
    bare = Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="a")), {})
    response = await site.with_context(tokenizer=bare).post(TEXT, prompt=["a", ""])
    assert error_of(response)["message"].startswith("prompt 1 is empty") and not engine.seen


async def test_null_bytes_are_characters_like_others(site: Any, engine: Any) -> None:
    engine.say = lambda prompt, index: prompt
    assert (await site.complete(prompt="a\0b"))["choices"][0]["text"] == "a\0b"
    assert (await site.complete(stop="\0", prompt="a\0b"))["choices"][0]["text"] == "a"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_a_body_must_call_itself_json(site: Any, kind: str) -> None:
    response = await site.http.post(TEXT, content=b'{"prompt": "x"}', headers={"content-type": kind})
    if kind:
        assert "application/json" in error_of(response, 415)["message"]
    else:
        assert response.status_code == 200
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        sent = await site.http.post(TEXT, content=b'{"prompt": "x"}', headers={"content-type": kind})
        assert sent.status_code == 200


async def test_an_unknown_model_is_not_found(site: Any) -> None:
    for path in (TEXT, CHAT):
        error = error_of(await site.post(path, **BODIES[path], model="gpt-9"), 404)
        assert error["code"] == "model_not_found" and error["param"] == "model"
        assert "'gpt-9'" in error["message"] and "builtin, other/name" in error["message"]


async def test_unknown_paths_and_methods_are_told_in_openais_shape(site: Any) -> None:
    assert error_of(await site.http.get("/v2/none"), 404)["code"] == "not_found"
    response = await site.http.get(TEXT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    error_of(await site.http.post("/v1/models"), 405)
    error_of(await site.http.get("/v1/completions/"), 404)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (QueueFull("1024 requests wait", retry_after=7), 429, "rate_limit_error"),
        (ContextTooLong("3000 tokens; at most 2048"), 400, "invalid_request_error"),
        (NeverFits("needs 200 blocks of 64"), 400, "invalid_request_error"),
        (InvalidRequest("no", param="prompt"), 400, "invalid_request_error"),
        (Unavailable("the engine is gone"), 503, "unavailable_error"),
        (StepFailed("NaN"), 500, "server_error"),
    ],
)
async def test_what_the_engine_refuses_has_its_own_status_even_where_a_stream_was_asked_for(
    site: Any, engine: Any, error: WeftError, status: int, kind: str, stream: bool
) -> None:
    engine.refuse = error
    for path in (TEXT, CHAT):
        response = await site.post(path, **BODIES[path], stream=stream)
        found = error_of(response, status)
        assert (found["message"], found["type"], found["code"]) == (error.message, kind, error.code)
        if status == 429:
            assert response.headers["retry-after"] == "7"
        if status == 503:
            assert int(response.headers["retry-after"]) > 0


async def test_one_refused_prompt_of_many_refuses_all(site: Any, engine: Any) -> None:
    engine.pause = 0.01
    plain = engine.submit

    def submit(request: Any) -> Any:
        engine.refuse = QueueFull("full") if len(engine.seen) == 2 else None
        stream = plain(request)
        if engine.refuse:
            stream.events = _raising(stream, engine.refuse)
        engine.refuse = None
        return stream

    engine.submit = submit
    error_of(await site.post(TEXT, prompt=["a", "b", "c", "d"], max_tokens=1000), 429)
    assert len(engine.aborted) == 3 and not engine.live


async def _raising(stream: Any, error: WeftError) -> Any:
    del stream.engine.live[stream.request.id]
    raise error
    yield


async def test_an_error_in_mid_stream_is_an_event_and_the_end(site: Any, engine: Any) -> None:
    for error in (StepFailed("NaN in the logits"), Unavailable("the engine is gone: killed")):
        engine.fail = (3, error)
        engine.pause = 0.001
        response = await site.post(TEXT, prompt="x", stream=True)
        assert response.status_code == 200
        *chunks, last, end = response.text.split("\n\n")
        assert end == "" and len(chunks) >= 1
        found = json.loads(last.removeprefix("data: "))["error"]
        assert found == {"message": error.message, "type": error.type, "param": None, "code": error.code}
        assert "[DONE]" not in response.text


async def test_an_error_of_a_whole_answer_has_its_status(site: Any, engine: Any) -> None:
    engine.fail = (3, StepFailed("NaN in the logits"))
    assert error_of(await site.post(TEXT, prompt="x"), 500)["code"] == "step_failed"
    engine.fail = (3, Unavailable("the engine is gone"))
    error_of(await site.post(TEXT, prompt="x"), 503)


async def test_a_request_that_the_server_aborts_is_told_so(site: Any, engine: Any) -> None:
    engine.pause = 0.01

    async def abort() -> None:
        while not engine.live:
            await asyncio.sleep(0.001)
        engine.aborted.extend(engine.live)

    _, response = await asyncio.gather(abort(), site.post(TEXT, prompt="x", max_tokens=1000))
    assert "the server ends" in error_of(response, 503)["message"]


@pytest.mark.parametrize(
    ("state", "words"),
    [(State.LOADING, "loading"), (State.DRAINING, "shutting down"), (State.DEAD, "killed by signal 9")],
)
async def test_a_server_that_is_not_ready_says_so(site: Any, state: State, words: str) -> None:
    site.context.health.state, site.context.health.reason = state, "killed by signal 9"
    for path in (TEXT, CHAT, "/tokenize"):
        response = await site.post(path, **BODIES.get(path, {"prompt": "x"}))
        assert words in error_of(response, 503)["message"]
        assert int(response.headers["retry-after"]) > 0


async def test_a_hundred_megabytes_are_too_many(site: Any) -> None:
    async def body() -> Any:
        for _ in range(100):
            yield b" " * 2**20

    error = error_of(await site.http.post(TEXT, content=body(), headers=JSON), 413)
    assert str(8 * 2**20) in error["message"]


async def test_an_error_that_nobody_expected_tells_nothing_of_the_inside(
    site: Any, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(request: Any) -> Any:
        raise RuntimeError("secret detail")

    engine.submit = fail
    for stream in (False, True):
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            error = error_of(await site.post(TEXT, prompt="x", stream=stream), 500)
        assert "secret" not in error["message"] and "log" in error["message"]
        assert "secret detail" in caplog.text


async def test_an_error_in_a_handler_is_a_500_as_well(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    response = await site.with_context(tokenizer=None).post(TEXT, prompt="x")
    assert "log" in error_of(response, 500)["message"]
    assert "AttributeError" in caplog.text and response.headers["x-request-id"] in caplog.text


async def test_the_clients_request_id_comes_back_where_it_is_sound(site: Any) -> None:
    for given, sound in (("abc-1.2:3", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("é", False)):
        response = await site.http.get("/v1/models", headers={"x-request-id": given.encode()})
        assert (response.headers["x-request-id"] == given) is sound
    first, second = [await site.http.get("/none") for _ in range(2)]
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_refusals_are_counted(sites: Any) -> None:
    site = sites()
    await site.post(TEXT, prompt="x", n=0)
    await site.post(TEXT, prompt="x", model="none")
    site.engine.refuse = QueueFull("full")
    await site.post(TEXT, prompt="x")
    text = (await site.http.get("/metrics")).text
    for reason in ("invalid_value", "model_not_found", "queue_full"):
        assert f'weft:admission_rejections_total{{model_name="builtin",reason="{reason}"}} 1.0' in text
