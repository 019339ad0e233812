"""Whether the server lives and takes requests, for the probes of whatever runs it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from weft import __version__
from weft.errors import Unavailable
from weft.server.errors import error_body, error_headers


class State(str, Enum):
    """loading -> ready -> draining; dead from any of them, and final."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(slots=True)
class Health:
    """The state of the server. reason: why, when it is dead. run.py changes it, everybody else reads it."""

    state: State = State.LOADING
    reason: str = ""

    def die(self, reason: str) -> None:
        """The first reason stays."""
        if self.state is not State.DEAD:
            self.state, self.reason = State.DEAD, reason

    @property
    def unavailable(self) -> Unavailable | None:
        """What a new request is told now; None when the server takes it."""
        match self.state:
            case State.READY:
                return None
            case State.LOADING:
                return Unavailable("the model is still loading")
            case State.DRAINING:
                return Unavailable("the server is shutting down")
            case State.DEAD:
                return Unavailable(self.reason)

    def live(self) -> Unavailable | None:
        """Why the process should be replaced; None while it need not."""
        return self.unavailable if self.state is State.DEAD else None


def health_router(health: Health) -> APIRouter:
    """/health/live, /health/ready, /health (the same as ready; vLLM's probe path), /version."""
    router = APIRouter(tags=["health"])
    unavailable: dict[int | str, dict[str, Any]] = {503: {"description": "not now; the body says why"}}

    @router.get("/health/live", summary="Whether the process works", responses=unavailable)
    async def live() -> JSONResponse:
        return _answer(health.live(), "live")

    @router.get("/health/ready", summary="Whether requests are taken now", responses=unavailable)
    async def ready() -> JSONResponse:
        return _answer(health.unavailable, "ready")

    @router.get("/health", summary="The same as /health/ready", responses=unavailable)
    async def health_() -> JSONResponse:
        return _answer(health.unavailable, "ready")

    @router.get("/version", summary="The version of weft")
    async def version() -> JSONResponse:
        return JSONResponse({"version": __version__})

    return router


def _answer(problem: Unavailable | None, word: str) -> JSONResponse:
    if problem is None:
        return JSONResponse({"status": word})
    return JSONResponse(error_body(problem), problem.status, error_headers(problem))
