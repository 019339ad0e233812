"""The official `openai` package against `weft serve` and the built-in model, as a user would use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

Served = Callable[..., AbstractContextManager[str]]
PROMPT = "import os\nimport sys\n\n\ndef main():\n"
TALK: list[dict[str, str]] = [
    {"role": "system", "content": "Write Python."},
    {"role": "user", "content": "def add(a, b):"},
]


@pytest.fixture(scope="module")
def client(builtin: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{builtin}/v1", api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["builtin", "gpt-like"]
    assert client.models.retrieve("builtin").owned_by == "weft"


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="builtin", messages=TALK, max_tokens=32, temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length") and answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 32
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = [*TALK, choice.message.model_dump(), {"role": "user", "content": "And then?"}]
    assert client.chat.completions.create(model="builtin", messages=again, max_tokens=8).choices[0].message.content


def test_chat_streamed_is_the_same_text(client: OpenAI) -> None:
    asked = {"model": "builtin", "messages": TALK, "max_tokens": 48, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    text, usage, reasons = "", None, []
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content and reasons == [whole.choices[0].finish_reason]
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_the_clients_stream_helper(client: OpenAI) -> None:
    asked = {"model": "builtin", "messages": TALK, "max_tokens": 32, "temperature": 0}
    text = client.chat.completions.create(**asked).choices[0].message.content
    with client.chat.completions.stream(**asked, stop=text[10:14]) as stream:  # it takes a length for an error
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content == text[: text.index(text[10:14])]


def test_completions(client: OpenAI) -> None:
    asked = {"model": "builtin", "prompt": PROMPT, "max_tokens": 32, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text
    chunks = client.completions.create(**asked, stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    echoed = client.completions.create(**asked, echo=True)
    assert echoed.choices[0].text == PROMPT + whole.choices[0].text
    several = client.completions.create(**{**asked, "prompt": [PROMPT, "class A:\n"]})
    assert [choice.index for choice in several.choices] == [0, 1] and several.choices[0].text == whole.choices[0].text


def test_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="builtin", messages=TALK, max_tokens=16, temperature=0, logprobs=True, top_logprobs=3
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content
    data = bytes(byte for entry in choice.logprobs.content for byte in entry.bytes or ())
    assert data.decode() == choice.message.content
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3
        best = entry.top_logprobs[0]
        assert best.logprob == pytest.approx(entry.logprob)  # greedy
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0001
    text = client.completions.create(model="builtin", prompt=PROMPT, max_tokens=8, logprobs=2, temperature=0)
    found = text.choices[0].logprobs
    assert found is not None and found.tokens and "".join(found.tokens) == text.choices[0].text
    assert found.top_logprobs is not None and all(2 <= len(top) <= 3 for top in found.top_logprobs)


def test_scores_of_an_echoed_prompt_are_those_of_generating_it(client: OpenAI) -> None:
    """Greedy text, scored again as a prompt, has the same probabilities."""
    text = client.completions.create(model="builtin", prompt=PROMPT, max_tokens=12, logprobs=1, temperature=0)
    made = text.choices[0].logprobs
    assert made is not None and made.token_logprobs
    echoed = client.completions.create(
        model="builtin", prompt=PROMPT + text.choices[0].text, max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    scored = echoed.choices[0].logprobs
    assert scored is not None and scored.token_logprobs and scored.tokens
    if scored.tokens[-len(made.tokens or ()) - 1 : -1] == made.tokens:  # the text was cut into the same tokens
        assert scored.token_logprobs[-len(made.token_logprobs) - 1 : -1] == pytest.approx(
            made.token_logprobs, abs=0.1, rel=0.05
        )


def test_three_answers_differ_and_a_seed_repeats_them(client: OpenAI) -> None:
    asked = {"model": "builtin", "messages": TALK, "max_tokens": 24, "temperature": 1.0, "n": 3, "seed": 7}
    first, second = (
        [choice.message.content for choice in client.chat.completions.create(**asked).choices] for _ in range(2)
    )
    assert first == second and len(set(first)) > 1
    other = client.chat.completions.create(**{**asked, "seed": 8})
    assert [choice.message.content for choice in other.choices] != first


def test_stop(client: OpenAI) -> None:
    asked = {"model": "builtin", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    (choice,) = client.completions.create(**asked, stop=[stop]).choices
    assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"


def test_vllms_fields_go_through_extra_body(client: OpenAI) -> None:
    answer = client.completions.create(
        model="builtin",
        prompt=PROMPT,
        max_tokens=20,
        extra_body={"top_k": 1, "ignore_eos": True, "return_token_ids": True, "min_p": 0.1},
    )
    assert len(answer.choices[0].model_extra["token_ids"]) == 20  # type: ignore[index]


def test_a_stream_that_is_closed_leaves_the_client_usable(client: OpenAI) -> None:
    with client.completions.create(model="builtin", prompt=PROMPT, max_tokens=1000, stream=True) as stream:
        next(iter(stream))
    assert client.completions.create(model="builtin", prompt=PROMPT, max_tokens=1).choices[0].text is not None


async def test_the_asynchronous_client(builtin: str) -> None:
    async with AsyncOpenAI(base_url=f"{builtin}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="builtin", messages=TALK, max_tokens=8, stream=True)  # type: ignore[call-overload]
        assert [chunk async for chunk in stream]


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens"),
        ({"extra_body": {"tempature": 1}}, openai.BadRequestError, "tempature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
    ],
)
def test_errors_are_the_clients_own_classes(client: OpenAI, fields: dict, kind: type, param: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "builtin", "messages": TALK, **fields})
    assert caught.value.param == param and caught.value.request_id


def test_keys_and_a_full_queue(served: Served) -> None:
    flags = ["--device", "simulated", "--api-key", "secret", "--max-num-seqs", "1", "--max-num-queued-reqs", "1"]
    with served(*flags, "--log-level", "error") as url:
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
        with OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
            asked = {"model": "builtin", "prompt": ["x"] * 8, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**asked)
            assert int(caught.value.response.headers["retry-after"]) > 0
        with OpenAI(base_url=f"{url}/v1", api_key="secret") as client:
            assert client.completions.create(model="builtin", prompt="x", max_tokens=3).choices[0].text
