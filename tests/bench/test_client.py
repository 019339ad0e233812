"""The client against a server on a real socket: what it times, and that every failure is counted with its reason."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from weft.bench.client import Target, fetch, first_model, send
from weft.bench.load import run_load
from weft.bench.stats import Record
from weft.bench.traffic import Shot
from weft.bench.wire import Address, WireError, parse_url

Start = Callable[..., Awaitable[Any]]
SHOT = Shot(0.0, (20, 21, 22), 3, 4)


async def shoot(fake: Any, shot: Shot = SHOT, **settings: Any) -> Record:
    return await send(Target(parse_url(fake.url), "fake", **settings), shot, time.perf_counter)


async def test_a_stream_is_timed_and_counted(start_server: Start) -> None:
    fake = await start_server()
    record = await shoot(fake, api_key="secret", extra={"ignore_eos": True})
    assert record.error is None
    assert (record.input_tokens, record.output_tokens) == (3, 4)
    assert record.first is not None and record.last is not None
    assert record.sent < record.first < record.last <= record.ended
    assert len(record.gaps) == 3 and sum(record.gaps) == pytest.approx(record.last - record.first)
    body = fake.bodies[0]
    assert fake.paths == ["/v1/completions"] and fake.headers[0]["authorization"] == "bearer secret"
    assert body["prompt"] == [20, 21, 22] and body["max_tokens"] == 4
    assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["ignore_eos"]


async def test_chat_chunks_without_text_are_no_tokens(start_server: Start) -> None:
    async def chat(exchange: Any) -> None:
        await exchange.begin()
        await exchange.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(0.02)
        for text in ("a", "", "b"):
            await exchange.event({"choices": [{"delta": {"content": text}}]})
            await asyncio.sleep(0.002)
        await exchange.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        await exchange.end()

    fake = await start_server(chat)
    record = await shoot(fake, Shot(0.0, "hello there", 2, 4), chat=True)
    assert record.error is None
    assert record.output_tokens == 2 and len(record.gaps) == 1  # no usage: chunks with text
    assert record.ttft is not None and record.ttft >= 0.02
    assert fake.bodies[0]["messages"] == [{"role": "user", "content": "hello there"}]


async def test_a_stream_without_any_text_begins_where_it_ends(start_server: Start) -> None:
    async def silent(exchange: Any) -> None:
        await exchange.begin()
        await exchange.event({"choices": [{"text": "", "finish_reason": "stop"}], "usage": {"completion_tokens": 2}})
        await exchange.end()

    record = await shoot(await start_server(silent))
    assert record.error is None and record.first == record.last and record.output_tokens == 2


async def refuse(exchange: Any) -> None:
    await exchange.reply(429, {"error": {"message": "queue is full"}})


async def hang_up(exchange: Any) -> None:
    exchange.writer.close()


async def break_off(exchange: Any) -> None:
    await exchange.begin()
    await exchange.event({"choices": [{"text": "a"}]})


async def no_finish(exchange: Any) -> None:
    await exchange.begin()
    await exchange.event({"choices": [{"text": "a"}]})
    await exchange.end()


async def error_event(exchange: Any) -> None:
    await exchange.begin()
    await exchange.event({"error": {"message": "a step failed"}})
    await exchange.end()


async def garbage(exchange: Any) -> None:
    await exchange.begin()
    await exchange.event(b"data: {nonsense\n\n")


async def odd_choices(exchange: Any) -> None:
    await exchange.begin()
    await exchange.event({"choices": ["a"]})


async def stall(exchange: Any) -> None:
    await asyncio.sleep(1.0)


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (refuse, "HTTP 429: queue is full"),
        (hang_up, "the connection closed before the answer ended"),
        (break_off, "the connection closed before the answer ended"),
        (no_finish, "the stream ended without a finish_reason"),
        (error_event, "error in the stream: a step failed"),
        (garbage, "this is no completion chunk"),
        (odd_choices, "this is no completion chunk"),
        (stall, "no end within 0.2 s"),
    ],
)
async def test_every_failure_has_its_reason(
    start_server: Start, handler: Callable[[Any], Awaitable[None]], reason: str
) -> None:
    record = await shoot(await start_server(handler), timeout=0.2)
    assert record.error is not None and record.error.startswith(reason)
    assert record.ended >= record.sent


async def test_no_server_is_a_failure_of_the_request() -> None:
    record = await send(Target(Address("127.0.0.1", 1, False, ""), "x"), SHOT, time.perf_counter)
    assert record.error is not None and record.error.startswith("connection: ")


@pytest.mark.parametrize("most", [1, 3, None])
async def test_the_closed_loop_keeps_within_its_concurrency_and_loses_nothing(
    start_server: Start, most: int | None
) -> None:
    fake = await start_server()
    shots = [Shot(0.0, (20 + i,), 1, 3) for i in range(9)]
    ended: list[Record] = []
    records = await run_load(Target(parse_url(fake.url), "fake"), shots, most, ended.append)
    assert len(records) == len(ended) == len(fake.bodies) == 9
    assert all(record.error is None for record in records)
    assert fake.peak <= (most or 9)
    assert most != 1 or fake.peak == 1


async def test_the_open_loop_sends_when_due_and_mixes_good_and_bad(start_server: Start) -> None:
    async def every_other(exchange: Any) -> None:
        await (refuse(exchange) if exchange.body["prompt"][0] % 2 else exchange.stream())

    fake = await start_server(every_other)
    shots = [Shot(i * 0.03, (20 + i,), 1, 2) for i in range(6)]
    records = await run_load(Target(parse_url(fake.url), "fake"), shots, None, lambda _: None)
    assert [record.error is None for record in records] == [True, False] * 3
    assert [record.due for record in records] == [shot.due for shot in shots]
    assert all(record.sent >= record.due for record in records)


async def test_the_first_listed_model_is_taken(start_server: Start) -> None:
    fake = await start_server()
    assert await first_model(parse_url(fake.url)) == "fake"
    assert (await fetch(parse_url(fake.url), "/v1/models"))[0] == 200
    with pytest.raises(WireError, match="no server answers"):
        await first_model(Address("127.0.0.1", 1, False, ""))
