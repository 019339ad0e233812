"""/openapi.json: the routes as FastAPI sees them, with the bodies that the handlers read by themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from weft.server.replies import ChatChunk, TextChunk
from weft.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

# What the routes name in their descriptions, and FastAPI does not see.
NAMED = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, ChatChunk, TextChunk)
DESCRIPTION = "OpenAI's chat and text completions, and a little of vLLM's API, served by weft."


def describe(app: FastAPI, *, locked: bool) -> dict[str, Any]:
    """The OpenAPI description. locked: whether requests need a key."""
    found = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    components = found.setdefault("components", {})
    schemas: dict[str, Any] = components.setdefault("schemas", {})
    for kind in NAMED:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[kind.__name__] = schema
    # FastAPI's own answer to a wrong parameter, which no route here gives.
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    for path in found["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    if locked:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found
