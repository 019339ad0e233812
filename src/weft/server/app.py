"""The ASGI application: routes and the layers around them."""

from __future__ import annotations

import difflib
from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from weft import __version__
from weft.errors import WeftError
from weft.server.context import ServerContext
from weft.server.errors import error_body, error_headers
from weft.server.health import health_router
from weft.server.metrics import metrics_router
from weft.server.openai import openai_router, tokens_router
from weft.server.openapi import describe

__all__ = ["ServerContext", "create_app"]


def create_app(context: ServerContext) -> FastAPI:
    """The routes over a running engine. Request ids, keys, CORS and limits stand before it (gate.py, run.py).

    FastAPI's pages for browsers load their scripts from elsewhere, so there are none; /openapi.json is there.
    """
    app = FastAPI(title="weft", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(openai_router(context))
    app.include_router(tokens_router(context))
    app.include_router(health_router(context.health))
    if context.config.enable_metrics:
        app.include_router(metrics_router(context.metrics))
    app.add_exception_handler(WeftError, _weft_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _any_error)
    locked = bool(context.config.api_key or context.config.api_key_file)

    @cache
    def openapi() -> dict[str, Any]:
        return describe(app, locked=locked)

    app.openapi = openapi  # type: ignore[method-assign]
    return app


async def _weft_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, WeftError):
        raise error
    return JSONResponse(error_body(error), error.status, error_headers(error))


async def _http_error(request: Request, error: Exception) -> Response:
    """A path or method that there is not."""
    if not isinstance(error, HTTPException):
        raise error
    path = str(request.scope["path"])[:100]  # request.url takes //v1 for a host
    near = difflib.get_close_matches(path, request.app.openapi()["paths"], n=1, cutoff=0.75)
    words = {
        404: f"there is no {path} here; " + (f"did you mean {near[0]}?" if near else "see /openapi.json"),
        405: f"{request.method} is not a method of {path}; see /openapi.json",
    }
    problem = WeftError(words.get(error.status_code, error.detail))
    problem.type = "invalid_request_error"
    problem.code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    return JSONResponse(error_body(problem), error.status_code, error.headers)


async def _any_error(_: Request, __: Exception) -> Response:
    """Starlette raises the exception again after this answer, for `Envelope` to log."""
    problem = WeftError("an error within the server; its log has the details")
    return JSONResponse(error_body(problem), problem.status)
