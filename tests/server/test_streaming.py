"""Streams: silence, clients that go away, and what is left in the engine then."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from weft.errors import StepFailed

TEXT = "/v1/completions"
LONG = "on and on " * 1000


@asynccontextmanager
async def listening(site: Any) -> AsyncIterator[int]:
    """The site on a real socket; its port."""
    config = uvicorn.Config(site.app, host="127.0.0.1", port=0, log_config=None, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


def request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {TEXT} HTTP/1.1\r\nHost: weft\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def until(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("prompts", [1, 3])
async def test_a_closed_socket_aborts_its_requests(
    site: Any, engine: Any, stream: bool, reset: bool, prompts: int
) -> None:
    engine.say, engine.pause = (lambda prompt, index: LONG), 0.005
    async with listening(site) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request({"prompt": ["x"] * prompts, "max_tokens": 1900, "stream": stream}))
        if stream:
            assert b"200 OK" in await reader.readline()
        await until(lambda: len(engine.live) == prompts and engine.steps > 3)
        if reset:
            writer.transport.abort()
        else:
            writer.close()
        await until(lambda: not engine.live)
    assert len(engine.aborted) == prompts and engine.steps < 1000


async def test_a_client_that_goes_before_the_first_token_is_noticed(site: Any, engine: Any) -> None:
    engine.pause = 3600.0
    async with listening(site) as port:
        for stream in (False, True):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request({"prompt": "x", "stream": stream}))
            await until(lambda: engine.live)
            writer.close()
            await until(lambda: not engine.live)


async def test_a_client_that_goes_in_the_middle_of_its_body_leaves_nothing(site: Any, engine: Any) -> None:
    async with listening(site) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request({"prompt": "x"})[:-3])
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.close()
        await asyncio.sleep(0.02)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
    assert not engine.seen


async def test_requests_follow_one_another_on_one_connection(site: Any, engine: Any) -> None:
    engine.say = lambda prompt, index: prompt
    async with listening(site) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for text in ("one", "two"):
            writer.write(request({"prompt": text}))
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
            )
            assert json.loads(await reader.readexactly(length))["choices"][0]["text"] == text
        writer.close()
    assert not engine.aborted


async def test_abandoned_requests_are_counted(sites: Any) -> None:
    site = sites()
    site.engine.pause = 0.01
    task = asyncio.create_task(site.post(TEXT, prompt="x", max_tokens=1000))
    await until(lambda: site.engine.live)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not site.engine.live)
    text = (await site.http.get("/metrics")).text
    assert 'weft:request_success_total{finished_reason="abort",model_name="builtin"} 1.0' in text


async def test_silence_is_filled_with_comments(sites: Any) -> None:
    site = sites(sse_keep_alive=0.02)
    site.engine.pause = 0.1
    response = await site.post(TEXT, prompt="x", max_tokens=2, stream=True)
    lines = response.text.split("\n\n")
    assert lines.count(": keep-alive") >= 4 and lines[0] == ": keep-alive"
    data = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert len(data) == 2 and lines[-2] == "data: [DONE]"


async def test_no_comments_where_they_are_switched_off(sites: Any) -> None:
    site = sites(sse_keep_alive=0)
    site.engine.pause = 0.05
    assert "keep-alive" not in (await site.post(TEXT, prompt="x", max_tokens=2, stream=True)).text


async def test_a_refusal_after_a_comment_is_an_event(sites: Any) -> None:
    site = sites(sse_keep_alive=0.01)
    site.engine.pause, site.engine.fail = 0.05, (0, StepFailed("NaN"))
    response = await site.post(TEXT, prompt="x", stream=True)
    assert response.status_code == 200 and response.text.startswith(": keep-alive")
    assert json.loads(response.text.split("data: ")[1])["error"]["code"] == "step_failed"


async def test_tokens_that_arrive_together_leave_together(site: Any, engine: Any) -> None:
    """A burst of events becomes one chunk a sequence, in one piece of the body."""
    engine.say = lambda prompt, index: "a b c d e f g h"
    plain = engine.submit

    def submit(request: Any) -> Any:
        stream = plain(request)
        collected = stream.events

        async def burst() -> Any:
            events = [event async for event in collected]
            for event in events:
                yield event

        stream.events = burst()
        return stream

    engine.submit = submit
    chunks = await site.stream(n=2)
    assert [choice["text"] for chunk in chunks for choice in chunk["choices"]] == ["a b c d e f g h"] * 2


async def test_many_streams_at_once_keep_to_themselves(site: Any, engine: Any) -> None:
    engine.say = lambda prompt, index: prompt * 5 + str(index)

    async def one(number: int) -> None:
        chunks = await site.stream(prompt=f"<{number}>", n=2)
        found = ["", ""]
        for chunk in chunks:
            for choice in chunk["choices"]:
                found[choice["index"]] += choice["text"]
        assert found == [f"<{number}>" * 5 + str(index) for index in range(2)]

    await asyncio.gather(*(one(number) for number in range(64)))
