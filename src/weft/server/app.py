"""The ASGI application: routes and the layers around them."""

from __future__ import annotations

from fastapi import FastAPI

from weft.server.context import Client, Drain, EventStream, ServerContext

__all__ = ["Client", "Drain", "EventStream", "ServerContext", "create_app"]


def create_app(context: ServerContext) -> FastAPI:
    """The application over a running engine."""
    app = FastAPI(title="weft")
    app.state.context = context
    return app
