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
    stop_reason: str | int | None = Field(description="the stop string or stop id that ended it")
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


STREAM = "server-sent events, each a JSON chunk as OpenAI has it, the last one [DONE]; an error event ends the stream"
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
STREAMED: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"description": "the answer", "content": {"text/event-stream": {"schema": {"type": "string"}}}},
}
