"""What one request has produced so far, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from weft.core.plan import TokenScore
from weft.core.request import Event, Finish, PromptScores, Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.text.detokenizer import TextStream
from weft.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Completion:
    """One continuation of a prompt.

    finish_reason: stop, length, abort or error. stop_reason: the stop string or id of stop_token_ids that ended it, if
    one did; None for the model's own end of text (as in vLLM).
    logprobs: one entry for each token, when they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: tuple[TokenScore, ...] | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What came of one prompt: its `n` completions, of which text, token_ids, ... are the first one's.

    prompt: the text that was given or rendered; None for token ids. error: why, where finish_reason is error.
    prompt_logprobs: of prompt tokens 1.., when they were asked for.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenScore, ...] | None = None
    cached_tokens: int = 0
    error: str | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenScore, ...] | None:
        return self.outputs[0].logprobs


@dataclass(slots=True)
class Continuation:
    """What one continuation has so far; `pieces` are those that `take` has not handed out."""

    stream: TextStream
    text: list[str] = field(default_factory=list)
    taken: int = 0
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish: Finish | None = None
    stop: str | int | None = None

    def apply(self, event: TokenOutput) -> None:
        if event.token is not None:
            self.tokens.append(event.token)
        if event.score is not None:
            self.scores.append(event.score)
        if event.token is not None and event.stop_token is None:
            fed = self.stream.feed(event.token)
            self.text.append(fed.text)
            if fed.stop is not None:
                self.finish, self.stop = Finish.STOP, fed.stop
                return
        if event.finish is not None:
            self.end(event.finish, event.stop_token)

    def end(self, reason: Finish, stop_token: int | None = None) -> None:
        fed = self.stream.finish()
        self.text.append(fed.text)
        self.finish = reason if fed.stop is None else Finish.STOP
        self.stop = stop_token if fed.stop is None else fed.stop

    def take(self) -> list[str]:
        """The pieces of text that are new."""
        new = [piece for piece in self.text[self.taken :] if piece]
        self.taken = len(self.text)
        return new


def continuations(tokenizer: Tokenizer, params: SamplingParams, before: Sequence[int]) -> list[Continuation]:
    """Those that a request asks for. before: the tokens that their text goes on from."""
    return [
        Continuation(
            TextStream(
                tokenizer,
                params.stop,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
                prompt=before,
            )
        )
        for _ in range(params.n)
    ]


def stop_reason(sequence: Continuation, params: SamplingParams) -> str | int | None:
    """What the caller named that ended a sequence, if anything."""
    stop = sequence.stop
    return stop if isinstance(stop, str) or stop in params.stop_token_ids else None


@dataclass(slots=True)
class Job:
    """One request on its way. prompt_only: what is generated is thrown away."""

    request: Request
    prompt: str | None
    sequences: list[Continuation]
    prompt_only: bool = False
    scores: tuple[TokenScore, ...] | None = None
    cached: int = 0
    error: str | None = None

    def apply(self, event: Event) -> int | None:
        """Take in an event. The index of its sequence where that has met a stop string, which the engine is to hear."""
        if isinstance(event, PromptScores):
            self.scores = event.scores
        elif isinstance(event, RequestEnd):
            self.cached, self.error = event.cached_tokens, event.error
            for sequence in self.sequences:
                if sequence.finish is None:
                    sequence.end(event.reason)
        elif self.prompt_only and event.token is not None:
            self.sequences[event.index].end(Finish.LENGTH)
        elif self.sequences[event.index].finish is None:  # the engine may be ahead of a stop string
            self.sequences[event.index].apply(event)
            if event.finish is None and self.sequences[event.index].finish is not None:
                return event.index
        return None

    def output(self) -> Output:
        with_scores = self.request.params.logprobs is not None
        completions = (
            Completion(
                index,
                "".join(sequence.text),
                tuple(sequence.tokens),
                (sequence.finish or Finish.ERROR).value,
                stop_reason(sequence, self.request.params),
                tuple(sequence.scores) if with_scores else None,
            )
            for index, sequence in enumerate(self.sequences)
        )
        return Output(self.prompt, self.request.prompt, tuple(completions), self.scores, self.cached, self.error)
