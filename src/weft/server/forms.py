"""The JSON of answers: OpenAI's chat and text completions, whole and in chunks.

64 clients may stream at once on one core, so a chunk is put together from bytes, of which most are made once a call.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from weft import __version__
from weft.jobs import Job
from weft.server.calls import Call
from weft.server.choices import Piece, usage
from weft.server.scores import chat_logprobs, prompt_logprobs, prompt_scored, text_logprobs
from weft.text.tokenizer import Tokenizer

FINGERPRINT = f"weft-{__version__}"
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
OPEN = b',"finish_reason":null'
encode = msgspec.json.encode


class Form(Protocol):
    """How a call is answered: the `opening` of each job's choices, a `chunk` for each piece, the `end`; or `whole`."""

    def opening(self, number: int, /) -> bytes: ...
    def chunk(self, piece: Piece) -> bytes: ...
    def end(self) -> bytes: ...
    def whole(self, pieces: list[Piece]) -> bytes: ...


class ChatForm:
    """/v1/chat/completions"""

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._frame = _Frame(call, "chat.completion.chunk")

    def opening(self, _: int) -> bytes:
        """The chunks that say whose turn it is; the first brings the prompt's token ids where they were asked for."""
        extra = _field("prompt_token_ids", self._call.jobs[0].request.prompt) if self._call.token_ids else b""
        delta = b'"delta":{"role":"assistant","content":""}'
        return b"".join(
            self._frame.chunk(choice, delta, b"null", OPEN, extra if choice == 0 else b"")
            for choice in range(self._call.n)
        )

    def chunk(self, piece: Piece) -> bytes:
        delta = b'"delta":{"content":%b}' % encode(piece.text) if piece.text else b'"delta":{}'
        return self._frame.chunk(piece.choice, delta, self._logprobs(piece), _ending(piece))

    def end(self) -> bytes:
        return self._frame.end()

    def whole(self, pieces: list[Piece]) -> bytes:
        call, job = self._call, self._call.jobs[0]
        choices = [
            {
                "index": piece.choice,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": msgspec.Raw(self._logprobs(piece)),
                **_closing(piece),
            }
            for piece in pieces
        ]
        extra: dict[str, Any] = {}
        if call.prompt_scores and job.scores is not None:
            extra["prompt_logprobs"] = prompt_logprobs(self._tokenizer, job.scores)
        if call.token_ids:
            extra["prompt_token_ids"] = job.request.prompt
        return encode({**_head(call, "chat.completion"), "choices": choices, "usage": usage(call), **extra})

    def _logprobs(self, piece: Piece) -> bytes:
        if piece.scored is None or self._call.logprobs is None:
            return b"null"
        return encode(chat_logprobs(self._tokenizer, piece.scored, self._call.logprobs))


class TextForm:
    """/v1/completions"""

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._frame = _Frame(call, "text_completion")

    def opening(self, number: int) -> bytes:
        """The echo of a prompt, and its token ids where they were asked for; otherwise nothing."""
        call = self._call
        if call.echoes is None and not call.token_ids:
            return b""
        first = number * call.n
        text = b'"text":%b' % encode("" if call.echoes is None else call.echoes[number])
        scores = self._echoed_scores(number)
        ids = _field("prompt_token_ids", call.jobs[number].request.prompt) if call.token_ids else b""
        logprobs = b"null" if scores is None else encode(scores)
        return b"".join(self._frame.chunk(first + index, text, logprobs, OPEN + ids) for index in range(call.n))

    def chunk(self, piece: Piece) -> bytes:
        scores = self._scores(piece)
        logprobs = b"null" if scores is None else encode(scores)
        return self._frame.chunk(piece.choice, b'"text":%b' % encode(piece.text), logprobs, _ending(piece))

    def end(self) -> bytes:
        return self._frame.end()

    def whole(self, pieces: list[Piece]) -> bytes:
        call = self._call
        # As long as the prompt, and the same for all choices of a job.
        echoed = [self._echoed_scores(number) for number in range(len(call.jobs))]
        prompts = [self._prompt_logprobs(job) for job in call.jobs]
        choices = []
        for piece in pieces:
            number = piece.choice // call.n
            scores, before = self._scores(piece), echoed[number]
            if scores is not None and before is not None:
                scores = {name: before[name] + values for name, values in scores.items()}
            echo = "" if call.echoes is None else call.echoes[number]
            choice = {"index": piece.choice, "text": echo + piece.text, "logprobs": scores, **_closing(piece)}
            job = call.jobs[number]
            if (prompt := prompts[number]) is not None:
                choice["prompt_logprobs"] = prompt
            if call.token_ids:
                choice["prompt_token_ids"] = job.request.prompt
            choices.append(choice)
        return encode({**_head(call, "text_completion"), "choices": choices, "usage": usage(call)})

    def _prompt_logprobs(self, job: Job) -> msgspec.Raw | None:
        if not self._call.prompt_scores or job.scores is None:
            return None
        return msgspec.Raw(encode(prompt_logprobs(self._tokenizer, job.scores)))

    def _scores(self, piece: Piece) -> dict[str, Any] | None:
        if piece.scored is None or self._call.logprobs is None:
            return None
        return text_logprobs(self._tokenizer, piece.scored, self._call.logprobs)

    def _echoed_scores(self, number: int) -> dict[str, Any] | None:
        call, job = self._call, self._call.jobs[number]
        if call.echoes is None or call.logprobs is None or job.scores is None:
            return None
        skip = job.request.params.skip_special_tokens
        scored = prompt_scored(self._tokenizer, job.request.prompt, job.scores, skip)
        return text_logprobs(self._tokenizer, scored, call.logprobs)


class _Frame:
    """What all chunks of one call have around their choice."""

    def __init__(self, call: Call, kind: str) -> None:
        self._call = call
        self._head = b"data: " + encode(_head(call, kind))[:-1]
        self._usage = b',"usage":null' if call.include_usage else b""
        self._continuous = call.include_usage and call.continuous_usage

    def chunk(self, choice: int, content: bytes, logprobs: bytes, ending: bytes, extra: bytes = b"") -> bytes:
        """One event. content: the delta or text field; ending, extra: further fields of the choice, of the chunk."""
        return b'%b,"choices":[{"index":%d,%b,"logprobs":%b%b}]%b%b}\n\n' % (
            self._head,
            choice,
            content,
            logprobs,
            ending,
            b',"usage":%b' % encode(usage(self._call)) if self._continuous else self._usage,
            extra,
        )

    def end(self) -> bytes:
        if not self._call.include_usage:
            return DONE
        return b'%b,"choices":[],"usage":%b}\n\n%b' % (self._head, encode(usage(self._call)), DONE)


def _head(call: Call, kind: str) -> dict[str, Any]:
    return {
        "id": call.id,
        "object": kind,
        "created": call.created,
        "model": call.model,
        "system_fingerprint": FINGERPRINT,
    }


def _closing(piece: Piece) -> dict[str, Any]:
    """The last fields of a choice."""
    tokens = {} if piece.tokens is None else {"token_ids": piece.tokens}
    return {"finish_reason": piece.finish, "stop_reason": piece.stop, **tokens}


def _ending(piece: Piece) -> bytes:
    """The last fields of a chunk's choice, each with its comma."""
    ids = b"" if piece.tokens is None else _field("token_ids", piece.tokens)
    if piece.finish is None:
        return OPEN + ids
    return b',"finish_reason":"%b","stop_reason":%b%b' % (piece.finish.encode(), encode(piece.stop), ids)


def _field(name: str, value: Any) -> bytes:
    return b',"%b":%b' % (name.encode(), encode(value))
