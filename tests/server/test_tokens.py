"""/tokenize and /detokenize, /v1/models."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from weft.text.hub import resolve_model
from weft.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(resolve_model("builtin"))
USER = {"role": "user", "content": "hi"}


async def test_a_text_and_its_tokens(site: Any) -> None:
    text = "def f(): return '日本語'"
    answer = (await site.post("/tokenize", prompt=text, return_token_strs=True)).json()
    ids = TOKENIZER.encode(text)
    assert answer["tokens"] == ids and answer["count"] == len(ids) and answer["max_model_len"] == 2048
    assert answer["token_strs"] == [TOKENIZER.token_text(token) for token in ids]
    answer = (await site.post("/tokenize", prompt=text, add_special_tokens=False)).json()
    assert answer["tokens"] == ids[1:] and answer["token_strs"] is None
    assert (await site.post("/detokenize", tokens=ids[1:])).json() == {"prompt": text}


async def test_special_tokens_are_shown(site: Any) -> None:
    assert (await site.post("/detokenize", tokens=[0, 5])).json()["prompt"].startswith("<|endoftext|>")
    assert (await site.post("/detokenize", tokens=[])).json() == {"prompt": ""}


async def test_the_tokens_of_a_conversation(site: Any) -> None:
    text = site.context.template.render([USER])
    answer = (await site.post("/tokenize", messages=[USER])).json()
    assert answer["tokens"] == TOKENIZER.encode(text, add_special_tokens=False)
    answer = (await site.post("/tokenize", messages=[USER], add_special_tokens=True)).json()
    assert answer["tokens"] == TOKENIZER.encode(text)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/tokenize", {}, 400, "either prompt or messages"),
        ("/tokenize", {"prompt": "x", "messages": [USER]}, 400, "either prompt or messages"),
        ("/tokenize", {"prompt": "x", "model": "none"}, 404, "does not exist"),
        ("/tokenize", {"messages": [USER], "chat_template_kwargs": {"x": 1}}, 400, "chat_template_kwargs"),
        (
            "/tokenize",
            {"messages": [USER], "continue_final_message": True, "add_generation_prompt": True},
            400,
            "both true",
        ),
        ("/detokenize", {"tokens": [4096]}, 400, "0 to 4095"),
        ("/detokenize", {"tokens": [2**32]}, 400, "less than or equal"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0] is -1"),
        ("/detokenize", {"tokens": [1], "model": "none"}, 404, "does not exist"),
        ("/detokenize", {}, 400, "tokens is missing"),
    ],
)
async def test_what_cannot_be_honoured(site: Any, path: str, body: dict[str, Any], status: int, words: str) -> None:
    response = await site.post(path, **body)
    assert response.status_code == status and words in response.json()["error"]["message"]


async def test_the_names_of_the_model(site: Any) -> None:
    listed = (await site.http.get("/v1/models")).json()
    assert listed["object"] == "list" and [card["id"] for card in listed["data"]] == ["builtin", "other/name"]
    for card in listed["data"]:
        assert (await site.http.get(f"/v1/models/{card['id']}")).json() == card
        assert card["object"] == "model" and card["max_model_len"] == 2048
    response = await site.http.get("/v1/models/none")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


async def test_a_dead_engine_has_no_models(site: Any, engine: Any) -> None:
    engine.alive, engine.dead_reason = False, "killed by signal 9"
    response = await site.http.get("/v1/models")
    assert response.status_code == 503 and "signal 9" in response.json()["error"]["message"]


async def test_a_long_text_does_not_hold_up_the_others(site: Any) -> None:
    """Neither the loop nor the interpreter's lock is held while it is taken apart or put together."""
    text = "def f(x): return 1\n" * 20_000
    ids = TOKENIZER.backend.encode(text).ids
    assert (await _beside(site.post("/tokenize", prompt=text)))["tokens"] == ids
    answer = await _beside(site.post("/tokenize", prompt=text, return_token_strs=True))
    assert "".join(answer["token_strs"][1:]) == text
    answer = await _beside(site.post("/detokenize", tokens=ids[1:] * 4))
    assert answer["prompt"] == text * 4


async def _beside(asked: Any) -> Any:
    """The answer, while others get their turns."""
    turns, task = 0, asyncio.create_task(asked)
    while not task.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 20
    return task.result().json()
