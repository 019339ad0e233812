"""What weft answers, as the OpenAPI description has it. The answers themselves are made in forms.py, from bytes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorInfo(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    error: ErrorInfo


class PromptDetails(Reply):
    cached_tokens: int


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Reply):
    logprob: float
    rank: int
    decoded_token: str


class AssistantMessage(Reply):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChoiceReply(Reply):
    index: int
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = Field(description="the stop string or id of stop_token_ids that ended it")
    token_ids: list[int] = Field([], description="with return_token_ids")


class ChatChoice(ChoiceReply):
    message: AssistantMessage
    logprobs: ChatLogprobs | None


class TextChoice(ChoiceReply):
    text: str
    logprobs: TextLogprobs | None
    prompt_token_ids: list[int] = Field([], description="with return_token_ids")
    prompt_logprobs: list[dict[str, PromptLogprob] | None] = Field([], description="with prompt_logprobs")


class CompletionReply(Reply):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatCompletion(CompletionReply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[int] = Field([], description="with return_token_ids")
    prompt_logprobs: list[dict[str, PromptLogprob] | None] = Field([], description="with prompt_logprobs")


class TextCompletion(CompletionReply):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class Delta(Reply):
    role: Literal["assistant"] = Field("assistant", description="in the first chunk of a choice")
    content: str = ""


class ChunkChoice(Reply):
    index: int
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = Field(None, description="in the last chunk of a choice")
    token_ids: list[int] = Field([], description="with return_token_ids")


class ChatChunkChoice(ChunkChoice):
    delta: Delta
    logprobs: ChatLogprobs | None


class TextChunkChoice(ChunkChoice):
    text: str
    logprobs: TextLogprobs | None
    prompt_token_ids: list[int] = Field([], description="in the first chunk, with return_token_ids")


class Chunk(Reply):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | None = Field(None, description="with include_usage: null but in the last chunk")


class ChatChunk(Chunk):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice] = Field(description="one; none in the chunk with the usage")
    prompt_token_ids: list[int] = Field([], description="in the first chunk, with return_token_ids")


class TextChunk(Chunk):
    object: Literal["text_completion"]
    choices: list[TextChunkChoice] = Field(description="one; none in the chunk with the usage")


class ModelCard(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="longest sequence in tokens, prompt and output")


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeReply(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(Reply):
    prompt: str


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": words}
    for status, words in {
        400: "a field that cannot be honoured; the message names it",
        401: "no valid key",
        404: "no such model",
        408: "the body came too slowly",
        413: "the body is too large",
        415: "the body does not call itself JSON",
        429: "the queue is full; Retry-After says when to come back",
        500: "a step failed",
        503: "the server drains, or is not ready",
    }.items()
}


def streamed(chunk: type[Chunk]) -> dict[int | str, dict[str, Any]]:
    """The answers of a route that can stream: each event's data is a chunk, an error, or [DONE] at the end."""
    parts = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in (chunk, ErrorReply)]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": parts}}
    event = {
        "type": "object",
        "description": "a server-sent event",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }
    return {**ERRORS, 200: {"description": "the answer", "content": {"text/event-stream": {"schema": event}}}}
