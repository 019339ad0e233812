"""What the request handlers share: the engine's client, the texts' tools, the names, and the server's state."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

from weft.config import ServerConfig
from weft.core.request import Event, Request
from weft.ipc.messages import Ready, Stats
from weft.text.chat import ChatTemplate
from weft.text.generation import GenerationDefaults
from weft.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from weft.server.metrics import Metrics
    from weft.server.state import Health


class EventStream(Protocol):
    """The events of one submitted request; it ends after the RequestEnd. `aclose` before that aborts the request."""

    def __aiter__(self) -> Self: ...
    async def __anext__(self) -> Event: ...
    async def aclose(self) -> None: ...


class Client(Protocol):
    """The engine as the front end sees it; loop/client.py has the real one."""

    @property
    def ready(self) -> Ready: ...
    @property
    def alive(self) -> bool: ...
    @property
    def dead_reason(self) -> str | None: ...
    def submit(self, request: Request) -> EventStream: ...
    def stop(self, request_id: str, index: int, /) -> None: ...
    async def stats(self) -> Stats: ...


@dataclass(frozen=True, slots=True)
class ServerContext:
    """Everything that the routes need.

    names: what the model answers to; the first is the one in responses. created: when the server began, for /v1/models.
    """

    client: Client
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: GenerationDefaults
    names: tuple[str, ...]
    config: ServerConfig
    metrics: Metrics
    health: Health
    created: int = field(default_factory=lambda: int(time.time()))
