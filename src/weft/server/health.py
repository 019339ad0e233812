"""Whether the server lives and takes requests, for the probes of whatever runs it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from weft import __version__
from weft.errors import Unavailable
from weft.server.errors import error_body, error_headers
from weft.server.state import Health


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

    # Some probes send HEAD.
    for path, answer in (("/health/live", live), ("/health/ready", ready), ("/health", health_)):
        router.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)
    return router


def _answer(problem: Unavailable | None, word: str) -> JSONResponse:
    if problem is None:
        return JSONResponse({"status": word})
    return JSONResponse(error_body(problem), problem.status, error_headers(problem))
