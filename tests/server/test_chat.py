"""/v1/chat/completions over an engine that recites: whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest

from weft.text.chat import ChatTemplate
from weft.text.hub import resolve_model
from weft.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(resolve_model("builtin"))
EOS = TOKENIZER.eos_ids[0]
TEXT = "one two three four 日本語 five six"
IDS = TOKENIZER.encode(TEXT, add_special_tokens=False)
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


def deltas(chunks: list[dict[str, Any]], n: int = 1) -> list[str]:
    found = [""] * n
    for chunk in chunks:
        for choice in chunk["choices"]:
            found[choice["index"]] += choice["delta"].get("content", "")
    return found


async def test_a_conversation_is_answered(site: Any, engine: Any) -> None:
    answer = await site.chat()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": TEXT, "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    text = site.context.template.render([USER])
    assert list(engine.seen[-1].prompt) == TOKENIZER.encode(text, add_special_tokens=False)
    assert answer["usage"]["completion_tokens"] == len(IDS) + 1


async def test_a_stream_begins_with_the_role_and_ends_with_the_reason(site: Any) -> None:
    first, *rest = await site.stream(CHAT)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert deltas(rest) == [TEXT]
    assert [chunk["choices"][0]["finish_reason"] for chunk in rest] == [None] * (len(rest) - 1) + ["stop"]


async def test_n_answers(site: Any, engine: Any) -> None:
    engine.say = lambda prompt, index: f"answer {index}"
    wanted = ["answer 0", "answer 1", "answer 2"]
    assert [choice["message"]["content"] for choice in (await site.chat(n=3))["choices"]] == wanted
    chunks = await site.stream(CHAT, n=3)
    assert deltas(chunks, 3) == wanted
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:3]] == ["assistant"] * 3


async def test_an_answer_may_fill_the_context(site: Any, engine: Any) -> None:
    await site.chat()
    assert engine.seen[-1].params.max_tokens is None


@pytest.mark.parametrize(
    "given", [{"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}]
)
async def test_both_names_of_the_limit(site: Any, given: dict[str, int]) -> None:
    answer = await site.chat(**given)
    assert answer["choices"][0]["message"]["content"] == TOKENIZER.decode(IDS[:3])
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_logprobs(site: Any) -> None:
    (choice,) = (await site.chat(logprobs=True, top_logprobs=2))["choices"]
    content = choice["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == TEXT
    for token, entry in zip(IDS, content, strict=True):
        assert entry["token"] == TOKENIZER.token_text(token) and entry["logprob"] == -0.5
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]
    streamed = [entry for chunk in await site.stream(CHAT, logprobs=True, top_logprobs=2) for entry in _content(chunk)]
    assert streamed == content
    (choice,) = (await site.chat(logprobs=True))["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


def _content(chunk: dict[str, Any]) -> list[Any]:
    found: list[Any] = (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    return found


async def test_prompt_logprobs_and_token_ids(site: Any, engine: Any) -> None:
    answer = await site.chat(prompt_logprobs=0, return_token_ids=True)
    prompt = list(engine.seen[-1].prompt)
    assert answer["prompt_token_ids"] == prompt and answer["choices"][0]["token_ids"] == [*IDS, EOS]
    assert [list(row) for row in answer["prompt_logprobs"][1:]] == [[str(token)] for token in prompt[1:]]
    first, *rest = await site.stream(CHAT, return_token_ids=True)
    assert first["prompt_token_ids"] == prompt
    assert [token for chunk in rest for token in chunk["choices"][0]["token_ids"]] == [*IDS, EOS]


async def test_content_may_come_in_text_parts(site: Any, engine: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await site.chat(messages=[{"role": "user", "content": parts}])
    split = engine.seen[-1].prompt
    await site.chat(messages=[{"role": "user", "content": "a\nb"}])
    assert engine.seen[-1].prompt == split


async def test_developer_is_the_new_word_for_system(site: Any, engine: Any) -> None:
    prompts = []
    for role in ("system", "developer"):
        await site.chat(messages=[{"role": role, "content": "be short"}, USER])
        prompts.append(engine.seen[-1].prompt)
    assert prompts[0] == prompts[1]


async def test_an_answer_of_the_official_client_can_be_sent_back(site: Any) -> None:
    given = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    await site.chat(messages=[USER, given, {**USER, "name": "me"}])


async def test_fields_that_ask_for_nothing_are_taken(site: Any) -> None:
    await site.chat(
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        modalities=["text"],
        safety_identifier="s",
        prompt_cache_key="k",
        verbosity="medium",
        continue_final_message=False,
        audio=None,
        functions=None,
        echo=False,
        use_beam_search=False,
        length_penalty=1.0,
        stream_options=None,
    )


async def test_null_is_a_field_that_is_not_there_whether_weft_knows_it_or_not(site: Any) -> None:
    given = {**USER, "reasoning": None, "content": [{"type": "text", "text": "hi", "cache_control": None}]}
    fields = {"guided_json": None, "chat_template": None, "truncate_prompt_tokens": None, "allowed_token_ids": None}
    plain = await site.chat(messages=[USER, USER], seed=1)
    response = await site.post("/v1/chat/completions", messages=[USER, {**given, "content": "hi"}], seed=1, **fields)
    assert response.json()["choices"] == plain["choices"]
    response = await site.post("/v1/chat/completions", messages=[given], foo=None)
    assert "cache_control is not a field" in response.json()["error"]["message"]


async def test_template_variables_come_from_the_request(site: Any, engine: Any) -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ enable_thinking }}/{{ reasoning_effort }}/"
        "{{ add_generation_prompt }}/{{ messages[0].name }}",
        {"bos_token": "<|endoftext|>"},
    )
    other = site.with_context(template=template)
    await other.chat(
        messages=[{**USER, "name": "me"}],
        chat_template_kwargs={"enable_thinking": False},
        reasoning_effort="low",
        add_generation_prompt=False,
    )
    assert TOKENIZER.decode(engine.seen[-1].prompt) == "False/low/False/me"
    response = await other.post(CHAT, messages=[USER], chat_template_kwargs={"tokenize": True})
    assert response.status_code == 400 and "enable_thinking" in response.json()["error"]["message"]


async def test_the_last_message_is_continued(site: Any, engine: Any) -> None:
    talk = [USER, {"role": "assistant", "content": "one two"}]
    engine.say = lambda prompt, index: " three"
    answer = await site.chat(messages=talk, continue_final_message=True, add_generation_prompt=False, logprobs=True)
    text = site.context.template.render(talk, continue_final_message=True)
    assert text.endswith("one two") and list(engine.seen[-1].prompt) == TOKENIZER.encode(text, add_special_tokens=False)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == " three"
    assert len(choice["logprobs"]["content"]) == len(TOKENIZER.encode(" three", add_special_tokens=False))
    counted = (await site.post("/tokenize", messages=talk, continue_final_message=True)).json()
    assert counted["tokens"] == list(engine.seen[-1].prompt)


async def test_a_model_without_a_template_says_what_to_do(site: Any) -> None:
    response = await site.with_context(template=None).post(CHAT, messages=[USER])
    assert response.status_code == 400 and "--chat-template" in response.json()["error"]["message"]


async def test_a_template_may_refuse(site: Any) -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    response = await site.with_context(template=template).post(CHAT, messages=[USER])
    assert response.status_code == 400 and "roles must alternate" in response.json()["error"]["message"]


async def test_a_template_that_renders_nothing_is_the_requests_error(site: Any) -> None:
    response = await site.with_context(template=ChatTemplate("", {})).post(CHAT, messages=[USER])
    assert response.status_code == 400 and "empty prompt" in response.json()["error"]["message"]


async def test_a_long_conversation_is_rendered_beside_the_event_loop(site: Any, engine: Any) -> None:
    await site.chat(messages=[USER] * 200)
    text = site.context.template.render([USER] * 200)
    assert list(engine.seen[-1].prompt) == TOKENIZER.encode(text, add_special_tokens=False)


async def test_any_served_name_is_answered_by_its_name(site: Any) -> None:
    assert (await site.chat(model="other/name"))["model"] == "other/name"
    assert (await site.chat())["model"] == "builtin"
