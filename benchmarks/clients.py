"""Clients that behave and clients that do not, for the soak: whole answers, and connections cut in every phase."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from weft.bench.client import READ_BYTES, connection
from weft.bench.wire import Address, EventParser, ResponseParser, WireError, error_words, request_bytes

PATH = "/v1/completions"


class Manner(str, Enum):
    """How a client treats one request."""

    STREAM = "stream, read to the end"
    PLAIN = "not streamed, read to the end"
    CUT_STREAM = "stream, connection cut in the middle"
    CUT_PLAIN = "not streamed, connection cut while waiting"


SHARES = {Manner.STREAM: 0.5, Manner.PLAIN: 0.2, Manner.CUT_STREAM: 0.2, Manner.CUT_PLAIN: 0.1}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. expected: the text that must come back; None where nobody knows it."""

    prompt: tuple[int, ...]
    output: int
    temperature: float = 0.0
    seed: int = 0
    expected: str | None = None

    def body(self, stream: bool) -> bytes:
        fields: dict[str, Any] = {
            "model": "builtin",
            "prompt": self.prompt,
            "max_tokens": self.output,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": stream,
        }
        if stream:
            fields["stream_options"] = {"include_usage": True}
        return json.dumps(fields).encode()


@dataclass(slots=True)
class Tally:
    """What came of all requests. errors: those that no client caused, by reason; mismatches: texts that were wrong."""

    ended: dict[Manner, int] = field(default_factory=lambda: dict.fromkeys(Manner, 0))
    tokens: int = 0
    compared: int = 0
    mismatches: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def error(self, reason: str) -> None:
        self.errors[reason] = self.errors.get(reason, 0) + 1


@dataclass(slots=True)
class Answer:
    """text, finish and usage of a whole answer; events of a stream, so far."""

    text: str = ""
    finish: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    events: int = 0

    def take(self, chunk: dict[str, Any]) -> None:
        if chunk.get("error"):
            raise WireError(f"error in the stream: {error_words(json.dumps(chunk).encode())}")
        self.events += 1
        for choice in chunk.get("choices", ()):
            self.text += choice.get("text", "")
            self.finish = choice.get("finish_reason") or self.finish
        self.usage = chunk.get("usage") or self.usage


async def client(
    address: Address, make: Callable[[random.Random], Ask], rng: random.Random, until: Callable[[], bool], tally: Tally
) -> None:
    """Send one request after another, in manners drawn from SHARES, until told to stop."""
    while not until():
        ask = make(rng)
        manner = rng.choices(list(SHARES), list(SHARES.values()))[0]
        try:
            if manner is Manner.CUT_PLAIN:
                await _cut_plain(address, ask, rng)
            else:
                after = rng.randint(0, ask.output) if manner is Manner.CUT_STREAM else None
                await whole(address, ask, tally, manner is not Manner.PLAIN, after, rng)
            tally.ended[manner] += 1
        except (OSError, WireError, ValueError) as error:
            tally.error(f"{type(error).__name__}: {error}"[:200])


async def whole(
    address: Address,
    ask: Ask,
    tally: Tally,
    stream: bool = True,
    cut_after: int | None = None,
    rng: random.Random | None = None,
) -> Answer:
    """Read an answer to its end and check it; or cut the connection after so many events."""
    parser, events, answer = ResponseParser(), EventParser(), Answer()
    async with connection(address) as (reader, writer):
        writer.write(request_bytes(address, "POST", PATH, ask.body(stream), {}))
        while not parser.done:
            if cut_after is not None and answer.events >= cut_after:
                _cut(writer, rng)
                return answer
            data = await reader.read(READ_BYTES)
            if data:
                parser.feed(data)
            else:
                parser.close()
            if parser.status == 200 and stream:
                for event in events.feed(parser.take()):
                    if event.strip() != b"[DONE]":
                        answer.take(json.loads(event))
    if parser.status != 200:
        raise WireError(f"HTTP {parser.status}: {error_words(parser.take())}")
    if not stream:
        answer.take(json.loads(parser.take()))
    _check(ask, answer, tally)
    return answer


async def _cut_plain(address: Address, ask: Ask, rng: random.Random) -> None:
    async with connection(address) as (_, writer):
        writer.write(request_bytes(address, "POST", PATH, ask.body(stream=False), {}))
        await writer.drain()
        await asyncio.sleep(rng.random() ** 2)
        _cut(writer, rng)


def _cut(writer: asyncio.StreamWriter, rng: random.Random | None) -> None:
    """Half of the clients go with a reset, the others close in good order."""
    if rng is not None and rng.random() < 0.5:
        writer.transport.abort()


def _check(ask: Ask, answer: Answer, tally: Tally) -> None:
    """Raises WireError for an answer of another form than was asked for; counts a text that is wrong."""
    if answer.finish != "length":
        raise WireError(f"finish_reason is {answer.finish!r} instead of 'length'")
    wanted = (len(ask.prompt), ask.output)
    if (answer.usage.get("prompt_tokens"), answer.usage.get("completion_tokens")) != wanted:
        raise WireError(f"usage is {answer.usage}; {wanted} tokens were asked for")
    tally.tokens += ask.output
    if ask.expected is not None:
        tally.compared += 1
        tally.mismatches += answer.text != ask.expected
