"""Prometheus metrics: vLLM's stems under the prefix weft:, so that its dashboards work after one search-and-replace."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter

from weft.core.request import Event, Request
from weft.errors import WeftError
from weft.ipc.messages import Stats


class Metrics:
    """All metrics of one server. stats: asks the engine; called on every scrape, with a time-out."""

    def __init__(self, model_name: str, stats: Callable[[], Awaitable[Stats]]) -> None: ...

    def watch(self, request: Request) -> RequestWatch:
        """Measures one request. Call it when the request has arrived, before it is submitted."""
        raise NotImplementedError

    def refused(self, error: WeftError) -> None:
        """A request that never reached the engine (validation, not ready, ...): admission_rejections_total."""

    async def render(self) -> bytes:
        """The text of /metrics."""
        raise NotImplementedError


class RequestWatch:
    """Measures one request: give it every event of the engine, in order, or the error that ended it instead."""

    def event(self, event: Event) -> None:
        """Take in TokenOutput, PromptScores or RequestEnd as it comes."""

    def error(self, error: WeftError) -> None:
        """The engine refused the request (QueueFull, ...) or died under it; no RequestEnd will come."""


def metrics_router(metrics: Metrics) -> APIRouter:
    """GET /metrics."""
    raise NotImplementedError
