"""/v1/completions over an engine that recites: whole and streamed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from weft.errors import StepFailed
from weft.text.chat import ChatTemplate
from weft.text.generation import GenerationDefaults
from weft.text.hub import resolve_model
from weft.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(resolve_model("builtin"))
EOS = TOKENIZER.eos_ids[0]
TEXT = "one two three four 日本語 five six"
IDS = TOKENIZER.encode(TEXT, add_special_tokens=False)


def texts(chunks: list[dict[str, Any]], n: int = 1) -> list[str]:
    """The text of each choice, put together again."""
    found = [""] * n
    for chunk in chunks:
        for choice in chunk["choices"]:
            found[choice["index"]] += choice["text"]
    return found


async def test_a_text_is_continued(site: Any) -> None:
    answer = await site.complete()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["model"] == "builtin" and answer["system_fingerprint"].startswith("weft-")
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    prompt = len(TOKENIZER.encode("x"))
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(IDS) + 1,
        "total_tokens": prompt + len(IDS) + 1,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_a_stream_has_the_same_text_and_ends_as_it_should(site: Any) -> None:
    chunks = await site.stream()
    assert texts(chunks) == [TEXT]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1 and len(chunks) > 5
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_comes_in_a_last_chunk_where_it_is_asked_for(site: Any) -> None:
    *chunks, last = await site.stream(stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"] == (await site.complete())["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_usage_comes_in_every_chunk_where_that_is_asked_for(site: Any) -> None:
    chunks = await site.stream(stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert counts[-1] == (await site.complete())["usage"]["completion_tokens"]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_is_no_abort_in_the_metrics(site: Any, stream: bool, n: int) -> None:
    async def count(reason: str) -> float:
        text = (await site.http.get("/metrics")).text
        start = f'weft:request_success_total{{finished_reason="{reason}"'
        return float(next(line for line in text.splitlines() if line.startswith(start)).split()[-1])

    # In the second call the engine has come to the length when it could be told.
    whole = TOKENIZER.encode(TEXT, add_special_tokens=False)
    until = next(k for k in range(len(whole)) if "three" in TOKENIZER.decode(whole[:k]))
    for most in (None, until):
        before = [await count("stop"), await count("abort"), await count("length")]
        fields = {"stop": "three", "n": n, "max_tokens": most}
        await (site.stream(**fields) if stream else site.complete(**fields))
        assert [await count("stop"), await count("abort"), await count("length")] == [before[0] + 1, *before[1:]]


async def test_no_piece_of_a_stream_holds_half_a_character(site: Any, engine: Any) -> None:
    engine.say = lambda prompt, index: "日本語🙂é" * 5
    for chunk in await site.stream():
        assert "\ufffd" not in chunk["choices"][0]["text"]


async def test_length_within_a_character_gives_a_replacement_at_the_very_end(site: Any, engine: Any) -> None:
    engine.say = lambda prompt, index: "🙂"
    assert len(TOKENIZER.encode("🙂", add_special_tokens=False)) > 1
    (text,) = texts(await site.stream(max_tokens=1))
    (choice,) = (await site.complete(max_tokens=1))["choices"]
    assert text == choice["text"] == "\ufffd" and choice["finish_reason"] == "length"


async def test_sixteen_tokens_are_the_default(site: Any, engine: Any) -> None:
    engine.say = lambda prompt, index: TEXT * 10
    answer = await site.complete(max_tokens=None)
    assert answer["usage"]["completion_tokens"] == 16 and answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", ["a b", ["a b"], TOKENIZER.encode("a b"), [TOKENIZER.encode("a b")]])
async def test_the_four_forms_of_a_prompt(site: Any, engine: Any, prompt: Any) -> None:
    engine.say = lambda prompt, index: prompt.upper()
    assert [choice["text"] for choice in (await site.complete(prompt=prompt))["choices"]] == ["A B"]


async def test_special_tokens_are_added_to_a_text_unless_it_has_them(site: Any, engine: Any) -> None:
    for special in (None, True, False):
        await site.complete(prompt="a b", add_special_tokens=special)
        assert list(engine.seen[-1].prompt) == TOKENIZER.encode("a b", add_special_tokens=special is not False)


async def test_choices_are_numbered_through_prompts_and_n(site: Any, engine: Any) -> None:
    engine.say = lambda prompt, index: f"{prompt}/{index}"
    answer = await site.complete(prompt=["a", "b", "c"], n=2)
    wanted = ["a/0", "a/1", "b/0", "b/1", "c/0", "c/1"]
    assert [(c["index"], c["text"]) for c in answer["choices"]] == list(enumerate(wanted))
    assert texts(await site.stream(prompt=["a", "b", "c"], n=2), 6) == wanted
    assert answer["usage"]["prompt_tokens"] == 3 * len(TOKENIZER.encode("a"))
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 9


async def test_a_stop_string_ends_one_of_n_and_the_engine_goes_on_for_the_others(site: Any, engine: Any) -> None:
    engine.say = lambda prompt, index: ("a b c d e", "stop here and go on for a while", "short")[index]
    for stream in (False, True):
        if stream:
            chunks = await site.stream(n=3, stop="here", stream_options={"include_usage": True})
            usage, found = chunks[-1]["usage"], texts(chunks, 3)
        else:
            answer = await site.complete(n=3, stop="here")
            usage, found = answer["usage"], [choice["text"] for choice in answer["choices"]]
            assert [choice["stop_reason"] for choice in answer["choices"]] == [None, "here", None]
        assert found == ["a b c d e", "stop ", "short"]
        tokens = [len(TOKENIZER.encode(text, add_special_tokens=False)) for text in ("a b c d e", "stop here", "short")]
        assert usage["completion_tokens"] == engine.drawn == sum(tokens) + 2  # and two ends of text
        engine.drawn = 0
    assert not engine.aborted


async def test_an_id_that_was_named_is_the_reason_and_the_models_own_end_is_none(site: Any) -> None:
    for named, reason in (([EOS], EOS), ([EOS + 1], None)):
        (choice,) = (await site.complete(stop_token_ids=named))["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)
        *_, last = await site.stream(stop_token_ids=named)
        assert last["choices"][0]["stop_reason"] == reason


async def test_a_stop_string_in_the_last_open_sequence_ends_the_request(site: Any, engine: Any) -> None:
    engine.say = lambda prompt, index: "stop here " + "and go on for ever " * 100
    (choice,) = (await site.complete(stop=["nothing", "here"], max_tokens=None))["choices"]
    assert choice["text"] == "stop " and choice["finish_reason"] == "stop" and choice["stop_reason"] == "here"
    assert len(engine.stopped) == 1 and not engine.aborted and engine.steps < 20
    assert texts(await site.stream(stop=["here"], include_stop_str_in_output=True)) == ["stop here"]


async def test_echo_begins_with_the_prompt(site: Any) -> None:
    for prompt in ("def f", TOKENIZER.encode("def f")):
        (choice,) = (await site.complete(prompt=prompt, echo=True))["choices"]
        assert choice["text"] == "def f" + TEXT
        assert texts(await site.stream(prompt=prompt, echo=True)) == ["def f" + TEXT]


async def test_logprobs_lie_beside_their_tokens(site: Any) -> None:
    (choice,) = (await site.complete(logprobs=2))["choices"]
    found = choice["logprobs"]
    count = len(IDS) + 1  # the end of the text has a score, as it was generated
    assert found["token_logprobs"] == [-0.5] * count
    assert len(found["top_logprobs"]) == len(found["tokens"]) == count
    assert found["tokens"][-1] == TOKENIZER.token_text(EOS) and found["text_offset"][-1] == len(TEXT)
    assert all(-1.5 in top.values() for top in found["top_logprobs"])
    for token, offset in zip(found["tokens"][:-1], found["text_offset"][:-1], strict=True):
        assert token.startswith("bytes:") or TEXT[offset:].startswith(token)
    streamed: dict[str, list[Any]] = {name: [] for name in found}
    length = 0
    for chunk in await site.stream(logprobs=2):
        (choice,) = chunk["choices"]
        length += len(choice["text"])
        for name, values in choice["logprobs"].items():
            streamed[name] += values
        last = length + (choice["finish_reason"] is not None)
        assert all(offset < last for offset in choice["logprobs"]["text_offset"])
    assert streamed == found


async def test_the_bytes_of_half_characters_are_shown_as_openai_shows_them(site: Any, engine: Any) -> None:
    engine.say = lambda prompt, index: "🙂"
    (choice,) = (await site.complete(logprobs=0))["choices"]
    *tokens, _ = choice["logprobs"]["tokens"]
    shown = [token.removeprefix("bytes:") for token in tokens]
    assert bytes(int(part, 16) for token in shown for part in token.split("\\x")[1:]) == "🙂".encode()
    assert set(choice["logprobs"]["text_offset"][:-1]) == {0}


async def test_logprobs_of_a_text_that_a_stop_string_cut(site: Any) -> None:
    for answer in ((await site.complete(logprobs=0, stop=" four"))["choices"],):
        (choice,) = answer
        assert choice["text"] == "one two three"
        assert "".join(choice["logprobs"]["tokens"]) == "one two three"
    tokens = []
    for chunk in await site.stream(logprobs=0, stop=" four"):
        tokens += chunk["choices"][0]["logprobs"]["tokens"]
    assert "".join(tokens) == "one two three"


async def test_echo_with_logprobs_scores_the_prompt(site: Any) -> None:
    ids = TOKENIZER.encode("def f")
    (choice,) = (await site.complete(prompt="def f", echo=True, logprobs=1, max_tokens=3))["choices"]
    found = choice["logprobs"]
    assert found["tokens"] == [TOKENIZER.token_text(token) for token in ids + IDS[:3]]
    assert found["token_logprobs"] == [None] + [-0.5] * (len(ids) + 2)
    assert found["top_logprobs"][0] is None
    assert found["text_offset"][len(ids)] == len("def f")
    assert "prompt_logprobs" not in choice
    (first, *rest) = await site.stream(prompt="def f", echo=True, logprobs=1, max_tokens=3)
    assert first["choices"][0]["text"] == "def f"
    streamed = first["choices"][0]["logprobs"]["tokens"]
    assert streamed + [t for chunk in rest for t in chunk["choices"][0]["logprobs"]["tokens"]] == found["tokens"]


def continuation_score(logprobs: dict[str, Any], context: int) -> tuple[float, bool]:
    """What lm-eval's local-completions makes of the logprobs of an echoed prompt and one token that it asks for: the
    score of the prompt's tokens from number `context` on, and whether each of them was the most probable."""
    scores, tops = (logprobs[name][context:-1] for name in ("token_logprobs", "top_logprobs"))
    return sum(scores), all(score == max(top.values()) for score, top in zip(scores, tops, strict=True))


@pytest.mark.parametrize("said", ["more", ""], ids=["a token follows", "the text ends"])
async def test_a_harness_scores_a_continuation(site: Any, engine: Any, said: str) -> None:
    engine.say = lambda prompt, index: said
    lists = [TOKENIZER.encode("def f(x):"), TOKENIZER.encode("import os, sys")]
    body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    for choice, ids in zip((await site.complete(prompt=lists, **body))["choices"], lists, strict=True):
        assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1
        assert continuation_score(choice["logprobs"], 2) == (-0.5 * (len(ids) - 2), True)


@pytest.mark.parametrize("said", ["more", ""], ids=["a token follows", "the text ends"])
async def test_no_tokens_and_echo_score_the_prompt_alone(site: Any, engine: Any, said: str) -> None:
    engine.say = lambda prompt, index: said
    ids = TOKENIZER.encode("def f")
    body = {"prompt": ["def f"] * 2, "n": 2, "max_tokens": 0, "echo": True, "logprobs": 1, "return_token_ids": True}
    answer = await site.complete(**body)
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["prompt_tokens"] == 2 * len(ids)
    assert len(answer["choices"]) == 4
    for choice in answer["choices"]:
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("def f", "length", None)
        assert choice["logprobs"]["token_logprobs"] == [None] + [-0.5] * (len(ids) - 1)
        assert choice["logprobs"]["tokens"] == [TOKENIZER.token_text(token) for token in ids]
        assert choice["token_ids"] == []
    chunks = await site.stream(**body)
    assert texts(chunks, 4) == ["def f"] * 4
    ends = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert ends.count("length") == 4 and ends.count(None) == 4
    assert engine.seen[0].params.logprobs is None


async def test_no_tokens_without_echo_are_no_text(site: Any) -> None:
    (choice,) = (await site.complete(max_tokens=0, prompt_logprobs=0))["choices"]
    assert choice["text"] == "" and len(choice["prompt_logprobs"]) == len(TOKENIZER.encode("x"))


async def test_a_prompt_that_is_only_scored_can_fail_like_any_other(site: Any, engine: Any) -> None:
    engine.fail = (0, StepFailed("the step failed"))
    response = await site.post("/v1/completions", prompt="x", max_tokens=0)
    assert response.status_code == 500 and response.json()["error"]["code"] == "step_failed"


async def test_prompt_logprobs_are_vllms(site: Any) -> None:
    ids = TOKENIZER.encode("def f")
    (choice,) = (await site.complete(prompt="def f", prompt_logprobs=2))["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None and len(rest) == len(ids) - 1
    for token, row in zip(ids[1:], rest, strict=True):
        assert row[str(token)] == {"logprob": -0.5, "rank": 1, "decoded_token": TOKENIZER.token_text(token)}
        assert row[str((token + 1) % TOKENIZER.vocabulary)]["rank"] == 2


async def test_token_ids_come_where_they_are_asked_for(site: Any) -> None:
    (choice,) = (await site.complete(return_token_ids=True))["choices"]
    assert choice["token_ids"] == [*IDS, EOS] and choice["prompt_token_ids"] == TOKENIZER.encode("x")
    first, *rest = await site.stream(return_token_ids=True)
    assert first["choices"][0]["prompt_token_ids"] == TOKENIZER.encode("x")
    assert [token for chunk in rest for token in chunk["choices"][0]["token_ids"]] == [*IDS, EOS]


async def test_fields_reach_the_engine_over_the_checkpoints_defaults(site: Any, engine: Any) -> None:
    await site.complete()
    params = engine.seen[-1].params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.8, 0.95, 100)  # generation_config.json
    given = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "seed": 2**64 - 1,
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "n": 2,
    }
    listed = {"stop": ["zzz"], "stop_token_ids": [5], "logit_bias": {"7": -100, "8": 1.5}}
    await site.complete(**given, **listed, cache_salt="salt", priority=-3, user="me")
    request = engine.seen[-1]
    for name, value in given.items():
        assert getattr(request.params, name) == value
    assert request.params.stop == ("zzz",) and request.params.stop_token_ids == (5,)
    assert request.params.logit_bias == ((7, -100.0), (8, 1.5))
    assert (request.cache_salt, request.priority, request.eos) == ("salt", -3, TOKENIZER.eos_ids)


async def test_null_stands_for_absent(site: Any, engine: Any) -> None:
    names = ["temperature", "top_p", "n", "stop", "logprobs", "echo", "stream", "logit_bias", "seed", "best_of", "user"]
    await site.complete(**dict.fromkeys(names))
    assert engine.seen[-1].params == site.context.defaults.params(max_tokens=100)


async def test_a_long_prompt_is_tokenised_beside_the_event_loop(site: Any, engine: Any) -> None:
    words = "word " * 5000
    engine.ready = msgspec.structs.replace(engine.ready, max_model_len=10**5)
    await site.complete(prompt=words, max_tokens=1)
    assert list(engine.seen[-1].prompt) == TOKENIZER.encode(words)


async def test_a_probability_of_zero_is_a_number_in_json(site: Any, engine: Any) -> None:
    engine.logprob = float("-inf")
    (choice,) = (await site.complete(logprobs=1, prompt_logprobs=1, max_tokens=1))["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-9999.0]
    assert all(row["logprob"] == -9999.0 for row in choice["prompt_logprobs"][1].values())


async def test_a_text_goes_on_from_its_prompt_and_an_answer_begins(sites: Any) -> None:
    """With decoders that leave out the space before the first word of a text."""
    words = Backend(models.WordLevel({"▁one": 0, "▁two": 1, "▁three": 2}, unk_token="▁one"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    plain = sites()
    tokenizer = plain.engine.tokenizer = Tokenizer(words, {})
    plain.engine.say = lambda prompt, index: "two three"
    defaults, template = GenerationDefaults(), ChatTemplate("{{ messages[0].content }}", {})
    site = plain.with_context(tokenizer=tokenizer, defaults=defaults, template=template)
    (choice,) = (await site.complete(prompt="one", logprobs=0))["choices"]
    assert choice["text"] == " two three" and choice["logprobs"]["text_offset"] == [0, 4]
    answer = await site.chat(messages=[{"role": "user", "content": "one"}], logprobs=True)
    assert answer["choices"][0]["message"]["content"] == "two three"
    assert len(answer["choices"][0]["logprobs"]["content"]) == 2
