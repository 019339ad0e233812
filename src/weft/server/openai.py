"""The routes of OpenAI's API, and vLLM's /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from weft.errors import InvalidRequest, Unavailable, WeftError
from weft.server import calls
from weft.server.context import ServerContext
from weft.server.forms import ChatForm, TextForm, encode
from weft.server.parsing import Model, parse
from weft.server.replies import (
    ERRORS,
    ChatChunk,
    ChatCompletion,
    DetokenizeReply,
    ModelCard,
    ModelList,
    TextChunk,
    TextCompletion,
    TokenizeReply,
    streamed,
)
from weft.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from weft.server.streaming import Answer


def takes(kind: type[Model]) -> dict[str, Any]:
    """The OpenAPI of a JSON body, which the handler reads by itself (openapi.py adds the schema)."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def openai_router(context: ServerContext) -> APIRouter:
    """/v1/chat/completions, /v1/completions, /v1/models."""
    router = APIRouter(tags=["openai"])

    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        response_model=ChatCompletion,
        responses=streamed(ChatChunk),
        openapi_extra=takes(ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        try:
            call = await calls.chat_call(context, await _read(context, ChatRequest, request))
        except WeftError as error:
            context.metrics.refused(error)
            raise
        return Answer(context, call, ChatForm(call, context.tokenizer))

    @router.post(
        "/v1/completions",
        summary="Continue a text",
        response_model=TextCompletion,
        responses=streamed(TextChunk),
        openapi_extra=takes(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        try:
            call = await calls.completion_call(context, await _read(context, CompletionRequest, request))
        except WeftError as error:
            context.metrics.refused(error)
            raise
        return Answer(context, call, TextForm(call, context.tokenizer))

    @router.get("/v1/models", summary="The names that the model answers to", response_model=ModelList, responses=ERRORS)
    async def models() -> Response:
        return _json({"object": "list", "data": [_card(context, name) for name in context.names]})

    @router.get("/v1/models/{model:path}", summary="One of these names", response_model=ModelCard, responses=ERRORS)
    async def model(model: str) -> Response:
        return _json(_card(context, calls.check_model(context, model)))

    return router


def tokens_router(context: ServerContext) -> APIRouter:
    """/tokenize, /detokenize."""
    router = APIRouter(tags=["tokens"])

    @router.post(
        "/tokenize",
        summary="The tokens of a text or of a conversation",
        response_model=TokenizeReply,
        responses=ERRORS,
        openapi_extra=takes(TokenizeRequest),
    )
    async def tokenize(request: Request) -> Response:
        body = await _read(context, TokenizeRequest, request)
        ids = await _tokenize(context, body)
        strings = await calls.token_texts(context, ids) if body.return_token_strs else None
        limit = context.client.ready.max_model_len
        return _json({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": strings})

    @router.post(
        "/detokenize",
        summary="The text of tokens",
        response_model=DetokenizeReply,
        responses=ERRORS,
        openapi_extra=takes(DetokenizeRequest),
    )
    async def detokenize(request: Request) -> Response:
        body = await _read(context, DetokenizeRequest, request)
        calls.check_model(context, body.model or context.names[0])
        calls.check_tokens(context, body.tokens, "tokens")
        return _json({"prompt": await calls.decode(context, body.tokens)})

    return router


async def _tokenize(context: ServerContext, body: TokenizeRequest) -> list[int]:
    calls.check_model(context, body.model or context.names[0])
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if body.prompt is not None:
        (ids,) = await calls.encode(context, [body.prompt], body.add_special_tokens is not False)
        return ids
    text, ids = await calls.render(context, body, body.messages or [], body.chat_template_kwargs or {})
    if body.add_special_tokens:
        (ids,) = await calls.encode(context, [text])
    return ids


async def _read(context: ServerContext, kind: type[Model], request: Request) -> Model:
    """The body of a request. Raises Unavailable while none is taken, InvalidRequest, UnsupportedMedia."""
    if (problem := context.health.unavailable) is not None:
        raise problem
    return parse(kind, await request.body(), request.headers.get("content-type"))


def _card(context: ServerContext, name: str) -> dict[str, Any]:
    if not context.client.alive:
        raise Unavailable(context.client.dead_reason or "the engine is gone")
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "weft",
        "max_model_len": context.client.ready.max_model_len,
    }


def _json(content: Any) -> Response:
    return Response(encode(content), media_type="application/json")
