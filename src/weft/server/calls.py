"""A request body becomes a call: requests for the engine, and what its answer needs to know."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from weft.core.request import Request
from weft.core.sampling import SamplingParams
from weft.errors import ContextTooLong, InvalidRequest, NotFound
from weft.jobs import Job, continuations
from weft.server.context import ServerContext
from weft.server.schemas import (
    MAX_SEQUENCES,
    ChatRequest,
    CompletionRequest,
    Generation,
    Message,
    TokenizeRequest,
)
from weft.text.chat import missing_template

# Characters from which a text is rendered and tokenised in a thread, so that the others' streams go on: a few
# milliseconds of work. A message counts as some, whatever it holds.
THREAD_CHARS = 4096
MESSAGE_CHARS = 64
# Of one answer, about 64 bytes each: those of a prompt of 128k tokens with the 20 most probable ones fit.
MAX_PROMPT_SCORES = 2**22
Made = TypeVar("Made")
# Fields that SamplingParams has under the same name.
SAME_NAME = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "n", "prompt_logprobs"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_tokens", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"),
)


class ModelNotFound(NotFound):
    type = "invalid_request_error"
    code = "model_not_found"


@dataclass(frozen=True, slots=True)
class Call:
    """One API call on its way.

    jobs: one for each prompt; choice number i is sequence i % n of job i // n.
    continues: the text goes on from its prompt, rather than being an answer to it.
    stop_scored: an id that ended a sequence has its score among those of the text.
    echoes: the text of each prompt where it is to come back.
    logprobs: number of most probable tokens beside each; None where no scores were asked for.
    prompt_scores: whether prompt_logprobs was asked for (echo with logprobs scores the prompt as well).
    """

    id: str
    created: int
    model: str
    jobs: tuple[Job, ...]
    logprobs: int | None
    continues: bool = False
    stop_scored: bool = False
    echoes: tuple[str, ...] | None = None
    prompt_scores: bool = False
    token_ids: bool = False
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False

    @property
    def n(self) -> int:
        return len(self.jobs[0].sequences)


async def chat_call(context: ServerContext, body: ChatRequest) -> Call:
    """Raises NotFound for the model, InvalidRequest for what cannot be honoured."""
    model = _model(context, body)
    limit = body.max_completion_tokens
    if limit is not None and body.max_tokens not in (None, limit):
        raise InvalidRequest(
            f"max_tokens is {body.max_tokens} and max_completion_tokens {limit}; give one of them", param="max_tokens"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = _params(context, body, max_tokens=limit or body.max_tokens, logprobs=logprobs)
    text, ids = await render(context, body, body.messages, _variables(body))
    name = f"chatcmpl-{secrets.token_hex(12)}"
    # An answer begins a text of its own, so the prompt is no context to it.
    continues = bool(body.continue_final_message)
    job = _job(context, name, ids, text, ids if continues else (), params, body)
    return _call(name, model, body, (job,), logprobs, continues=continues)


async def completion_call(context: ServerContext, body: CompletionRequest) -> Call:
    """Raises NotFound for the model, InvalidRequest for what cannot be honoured."""
    model = _model(context, body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest(f"best_of is {body.best_of}; it must equal n, which is {body.n or 1}", param="best_of")
    prompt_only = body.max_tokens == 0
    if prompt_only and body.min_tokens:
        raise InvalidRequest(f"min_tokens is {body.min_tokens}, more than max_tokens 0", param="min_tokens")
    # The engine draws one token at least; it is thrown away where none is wanted.
    given: dict[str, Any] = {} if body.max_tokens is None else {"max_tokens": max(1, body.max_tokens)}
    if body.echo and body.logprobs is not None:
        given["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    params = _params(context, body, logprobs=None if prompt_only else body.logprobs, **given)
    prompts = await _prompts(context, body.prompt, body.add_special_tokens is not False)
    _check_scores(prompts, params, "logprobs" if body.prompt_logprobs is None else "prompt_logprobs")
    if len(prompts) * params.n > MAX_SEQUENCES:
        raise InvalidRequest(
            f"{len(prompts)} prompts of n = {params.n} make {len(prompts) * params.n} sequences; "
            f"at most {MAX_SEQUENCES} are allowed in one call",
            param="n",
        )
    name = f"cmpl-{secrets.token_hex(12)}"
    jobs = tuple(
        _job(context, f"{name}-{number}", ids, text, ids, params, body, prompt_only)
        for number, (text, ids) in enumerate(prompts)
    )
    echoes = None
    if body.echo:
        skip = params.skip_special_tokens
        echoes = tuple(text or context.tokenizer.decode(ids, skip_special_tokens=skip) for text, ids in prompts)
    return _call(name, model, body, jobs, body.logprobs, echoes, continues=True, stop_scored=True)


async def render(
    context: ServerContext,
    body: ChatRequest | TokenizeRequest,
    messages: Sequence[Message],
    variables: dict[str, Any],
) -> tuple[str, list[int]]:
    """The text of a conversation and its token ids, of which the template has written the special ones. Raises
    InvalidRequest."""
    template = context.template
    if template is None:
        raise missing_template()
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt are both true; leave out add_generation_prompt",
            param="continue_final_message",
        )
    plain = [_plain(message) for message in messages]

    def work() -> tuple[str, list[int]]:
        text = template.render(
            plain,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            **variables,
        )
        return text, context.tokenizer.encode(text, add_special_tokens=False)

    size = sum(MESSAGE_CHARS + len(str(message["content"])) for message in plain)
    return await _beside(work, size)


async def encode(context: ServerContext, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """The token ids of each text."""

    def work() -> list[list[int]]:
        return [context.tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    return await _beside(work, sum(map(len, texts)))


async def decode(context: ServerContext, ids: Sequence[int]) -> str:
    """The text of tokens, special ones included."""
    return await _beside(lambda: context.tokenizer.decode(ids, skip_special_tokens=False), len(ids))


async def token_texts(context: ServerContext, ids: Sequence[int]) -> list[str]:
    """The text of each token alone."""
    return await _beside(lambda: [context.tokenizer.token_text(token) for token in ids], len(ids))


async def _beside(work: Callable[[], Made], size: int) -> Made:
    """What the work gives; in a thread where it is long. size: characters or tokens."""
    return await asyncio.to_thread(work) if size > THREAD_CHARS else work()


def check_tokens(context: ServerContext, tokens: Sequence[int], name: str) -> None:
    """Raises InvalidRequest for ids that the model does not have."""
    vocabulary = context.client.ready.vocabulary
    if max(tokens, default=0) >= vocabulary:
        wrong = next(token for token in tokens if token >= vocabulary)
        raise InvalidRequest(f"{name} holds {wrong}; token ids are 0 to {vocabulary - 1}", param=name)


def check_model(context: ServerContext, name: str) -> str:
    """The name, where it is one of ours. Raises ModelNotFound."""
    if name not in context.names:
        raise ModelNotFound(
            f"the model {name!r} does not exist; this server has {', '.join(context.names)}", param="model"
        )
    return name


def _model(context: ServerContext, body: Generation) -> str:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs cannot be streamed; leave out stream", param="prompt_logprobs")
    return check_model(context, body.model or context.names[0])


def _params(context: ServerContext, body: Generation, **given: Any) -> SamplingParams:
    """The checkpoint's sampling defaults, and what the client gave over them."""
    named = {name: value for name in SAME_NAME if (value := getattr(body, name)) is not None}
    stop = () if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    params = context.defaults.params(
        **{**named, **given},
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logit_bias=tuple(_bias(body.logit_bias or {})),
    )
    params.validate(context.client.ready.vocabulary)
    return params


def _bias(given: dict[str, float]) -> list[tuple[int, float]]:
    found: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidRequest(f"logit_bias has the key {key[:40]!r}; keys are token ids", param="logit_bias")
        found[int(key)] = value
    return list(found.items())


async def _prompts(context: ServerContext, prompt: Any, special: bool) -> list[tuple[str, list[int]]]:
    """Text and token ids of each prompt."""
    if isinstance(prompt, str) or isinstance(prompt[0], str):
        texts = [prompt] if isinstance(prompt, str) else prompt
        prompts = list(zip(texts, await encode(context, texts, special), strict=True))
    else:
        lists = [prompt] if isinstance(prompt[0], int) else prompt
        for ids in lists:
            check_tokens(context, ids, "prompt")
        prompts = [("", ids) for ids in lists]
    for number, (_, ids) in enumerate(prompts):
        if not ids:
            raise InvalidRequest(f"prompt {number} is empty; give a text or at least one token id", param="prompt")
    return prompts


def _check_scores(prompts: Sequence[tuple[str, list[int]]], params: SamplingParams, field: str) -> None:
    """Each choice comes with the scores of its prompt: a few kilobytes could ask for gigabytes. field: that asked."""
    if params.prompt_logprobs is None:
        return
    scores = sum(len(ids) for _, ids in prompts) * params.n * (params.prompt_logprobs + 1)
    if scores > MAX_PROMPT_SCORES:
        raise InvalidRequest(
            f"the prompts' scores, for n = {params.n} and {field} = {params.prompt_logprobs}, are "
            f"{scores} numbers; at most {MAX_PROMPT_SCORES} come with one call: ask for fewer of them",
            param=field,
        )


def _check_length(context: ServerContext, prompt: int, output: int | None) -> None:
    """The engine would generate as much as fits; who asks for a number of tokens is to know that there are fewer."""
    limit = context.client.ready.max_model_len
    if prompt + (output or 1) > limit:
        wanted = "at least one token of output" if output is None else f"max_tokens {output}"
        most = f"; at most {limit - prompt} would" if prompt < limit else ""
        raise ContextTooLong(
            f"the prompt has {prompt} tokens, and with {wanted} does not fit the context of {limit} tokens{most}",
            param="max_tokens" if most else "prompt",
        )


def _plain(message: Message) -> dict[str, Any]:
    """The message as a template sees it. developer is what OpenAI calls system now; templates know the old word."""
    content = message.content
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content if isinstance(content, str) else "\n".join(part.text for part in content),
    }
    return plain if message.name is None else {**plain, "name": message.name}


def _variables(body: ChatRequest) -> dict[str, Any]:
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return {**effort, **(body.chat_template_kwargs or {})}


def _job(
    context: ServerContext,
    name: str,
    ids: list[int],
    text: str,
    before: Sequence[int],
    params: SamplingParams,
    body: Generation,
    prompt_only: bool = False,
) -> Job:
    """before: the tokens that the generated text goes on from."""
    if not ids:
        raise InvalidRequest("the messages become an empty prompt; give some content", param="messages")
    _check_length(context, len(ids), None if prompt_only else params.max_tokens)
    request = Request(name, tuple(ids), params, context.defaults.eos_ids, body.priority or 0, body.cache_salt or "")
    return Job(request, text, continuations(context.tokenizer, params, before), prompt_only)


def _call(
    name: str,
    model: str,
    body: Generation,
    jobs: tuple[Job, ...],
    logprobs: int | None,
    echoes: tuple[str, ...] | None = None,
    *,
    continues: bool = False,
    stop_scored: bool = False,
) -> Call:
    return Call(
        id=name,
        created=int(time.time()),
        model=model,
        jobs=jobs,
        logprobs=logprobs,
        continues=continues,
        stop_scored=stop_scored,
        echoes=echoes,
        prompt_scores=body.prompt_logprobs is not None,
        token_ids=bool(body.return_token_ids),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        continuous_usage=body.stream_options is not None and bool(body.stream_options.continuous_usage_stats),
    )
