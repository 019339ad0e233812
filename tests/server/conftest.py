"""A server over an engine that recites: the real application and texts, and a made-up client of the engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from weft.config import ServerConfig
from weft.core.plan import TokenScore
from weft.core.request import Event, Finish, PromptScores, Request, RequestEnd, Timing, TokenOutput
from weft.errors import Unavailable, WeftError
from weft.ipc.messages import Ready, Stats
from weft.server.app import ServerContext, create_app
from weft.server.gate import guard
from weft.server.limits import BodyLimitMiddleware
from weft.server.metrics import Metrics
from weft.server.state import Health, State
from weft.text.chat import ChatTemplate
from weft.text.generation import GenerationDefaults
from weft.text.hub import resolve_model
from weft.text.tokenizer import Tokenizer

FOLDER = resolve_model("builtin")
TOKENIZER = Tokenizer.from_folder(FOLDER)
TEXT = "one two three four 日本語 five six"
READY = Ready("builtin", "reciter", "text", "none", 2048, TOKENIZER.vocabulary, 64, 16, 64, (), ())
CACHED = 3


@dataclass
class Reciter:
    """The engine's client as the contract has it: sequence i of a request recites `say(prompt, i)`, a token a step.

    pause: seconds between steps. refuse: raised instead of the first event. fail: after so many steps, that error in a
    RequestEnd, or raised where it is Unavailable. live, aborted: ids of requests. stopped: sequences of them. drawn:
    tokens that were computed.
    """

    say: Callable[[str, int], str] = lambda prompt, index: TEXT
    pause: float = 0.0
    refuse: WeftError | None = None
    fail: tuple[int, WeftError] | None = None
    ready: Ready = READY
    tokenizer: Tokenizer = TOKENIZER
    logprob: float = -0.5
    alive: bool = True
    dead_reason: str | None = None
    live: dict[str, Request] = field(default_factory=dict)
    seen: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    stopped: list[tuple[str, int]] = field(default_factory=list)
    steps: int = 0
    drawn: int = 0

    def submit(self, request: Request) -> Recital:
        self.seen.append(request)
        return Recital(self, request)

    def stop(self, request_id: str, index: int) -> None:
        if request_id in self.live:
            self.stopped.append((request_id, index))

    def score(self, token: int, k: int) -> TokenScore:
        """The token itself is the most probable, the ids after it follow."""
        top = tuple(((token + i) % self.ready.vocabulary, self.logprob - i) for i in range(k))
        return TokenScore(token, self.logprob, 1, top)

    async def stats(self) -> Stats:
        return Stats(len(self.live), 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 1.0)


class Recital:
    def __init__(self, engine: Reciter, request: Request) -> None:
        self.engine = engine
        self.request = request
        self.events = self.recite()
        engine.live[request.id] = request

    def __aiter__(self) -> Recital:
        return self

    async def __anext__(self) -> Event:
        return await anext(self.events)

    async def aclose(self) -> None:
        if self.engine.live.pop(self.request.id, None) is not None:
            self.engine.aborted.append(self.request.id)
        await self.events.aclose()

    async def recite(self) -> AsyncIterator[Event]:
        engine, request, params = self.engine, self.request, self.request.params
        if engine.refuse is not None:
            del engine.live[request.id]
            raise engine.refuse
        prompt = engine.tokenizer.decode(request.prompt)
        if params.prompt_logprobs is not None:
            k = params.prompt_logprobs
            yield PromptScores(request.id, tuple(engine.score(token, k) for token in request.prompt[1:]))
        scripts = [
            [*engine.tokenizer.encode(engine.say(prompt, index), add_special_tokens=False), *request.eos[:1]]
            for index in range(params.n)
        ]
        limits = [min(len(script), params.max_tokens or len(script)) for script in scripts]
        position = 0
        while any(self.open(index, position, limit) for index, limit in enumerate(limits)):
            await asyncio.sleep(engine.pause)
            engine.steps += 1
            if request.id in engine.aborted:
                yield self.end(Finish.ABORT)
                return
            if engine.fail is not None and position == engine.fail[0]:
                error = engine.fail[1]
                if isinstance(error, Unavailable):
                    raise error
                yield self.end(Finish.ERROR, error.message, error.code)
                return
            for index, script in enumerate(scripts):
                if self.open(index, position, limits[index]):
                    engine.drawn += 1
                    yield self.output(index, script[position], position + 1 == limits[index])
            position += 1
        cut = limits[0] < len(scripts[0]) and (request.id, 0) not in engine.stopped
        yield self.end(Finish.LENGTH if cut else Finish.STOP)

    def open(self, index: int, position: int, limit: int) -> bool:
        return position < limit and (self.request.id, index) not in self.engine.stopped

    def output(self, index: int, token: int, last: bool) -> TokenOutput:
        request, k = self.request, self.request.params.logprobs
        finish = (Finish.STOP if token in request.eos else Finish.LENGTH) if last else None
        stop = token if finish is Finish.STOP else None
        return TokenOutput(request.id, index, token, None if k is None else self.engine.score(token, k), finish, stop)

    def end(self, reason: Finish, error: str | None = None, code: str | None = None) -> RequestEnd:
        self.engine.live.pop(self.request.id, None)
        return RequestEnd(self.request.id, reason, len(self.request.prompt), CACHED, 0, Timing(0.0), error, code)


@dataclass
class Site:
    """An application over a reciter, and what tests ask it."""

    engine: Reciter
    context: ServerContext

    def __post_init__(self) -> None:
        config = self.context.config
        self.bare = create_app(self.context)
        self.app = guard(BodyLimitMiddleware(self.bare, config.max_body_bytes), config, config.api_key)
        transport = httpx.ASGITransport(app=self.app)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://weft")

    def with_context(self, **changes: Any) -> Site:
        return Site(self.engine, replace(self.context, **changes))

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def complete(self, **body: Any) -> dict[str, Any]:
        """The whole answer of /v1/completions."""
        return good(await self.post("/v1/completions", **{"prompt": "x", "max_tokens": 100, **body}))

    async def chat(self, **body: Any) -> dict[str, Any]:
        """The whole answer of /v1/chat/completions."""
        return good(await self.post("/v1/chat/completions", **{"messages": user("hi"), **body}))

    async def stream(self, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
        """The chunks of a streamed answer."""
        subject = {"messages": user("hi")} if "chat" in path else {"prompt": "x", "max_tokens": 100}
        response = await self.post(path, **{**subject, "stream": True, **body})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return chunks(response.text)


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def good(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def chunks(text: str) -> list[dict[str, Any]]:
    """The data of a whole stream; checks that it is one."""
    assert text.endswith("data: [DONE]\n\n"), text[-200:]
    events = text.removesuffix("\n\n").split("\n\n")
    found = [event.removeprefix("data: ") for event in events if not event.startswith(":")]
    assert found.pop() == "[DONE]"
    return [json.loads(data) for data in found]


def make_site(engine: Reciter, **config: Any) -> Site:
    context = ServerContext(
        client=engine,
        tokenizer=TOKENIZER,
        template=ChatTemplate.from_folder(FOLDER),
        defaults=GenerationDefaults.from_folder(FOLDER, TOKENIZER.eos_ids),
        names=("builtin", "other/name"),
        config=ServerConfig(**config),
        metrics=Metrics("builtin", engine.stats),
        health=Health(State.READY),
    )
    return Site(engine, context)


@pytest.fixture
def engine(shared: Site) -> Reciter:
    return shared.engine


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    """Whatever a test does, no request is left in the engine."""
    yield shared
    assert not shared.engine.live


@pytest.fixture(scope="session")
def _once() -> Site:
    return make_site(Reciter())


@pytest.fixture
def shared(_once: Site) -> Site:
    """One application for all tests, as it is slow to make; with an engine as good as new."""
    vars(_once.engine).update(vars(Reciter()))
    vars(_once.engine).pop("submit", None)
    _once.context.health.state, _once.context.health.reason = State.READY, ""
    return _once


@pytest.fixture
def sites() -> Callable[..., Site]:
    """Makes a site with settings of its own."""
    return lambda **config: make_site(Reciter(), **config)
