"""The choices of a call, and what each has that is new: whole answers and streams are made of the same pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weft.core.request import Finish
from weft.core.sampling import SamplingParams
from weft.jobs import Continuation, stop_reason
from weft.server.calls import Call
from weft.server.scores import ScoreCursor, Scored
from weft.text.detokenizer import Detokenizer
from weft.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one choice. scored: the scores of its tokens, where they were asked for; tokens: the ids likewise.

    finish: set on the last piece. stop: see `weft.jobs.stop_reason`.
    """

    choice: int
    text: str
    scored: list[Scored] | None
    tokens: list[int] | None
    finish: str | None = None
    stop: str | int | None = None


@dataclass(slots=True)
class Choice:
    """One sequence as the client sees it. length: characters that were handed out; sent: tokens likewise."""

    number: int
    sequence: Continuation
    params: SamplingParams
    cursor: ScoreCursor | None
    with_tokens: bool
    length: int = 0
    sent: int = 0
    finished: bool = False

    def news(self) -> Piece | None:
        """What is new since the last time; None when nothing can be told yet."""
        sequence = self.sequence
        text = "".join(sequence.take())
        self.length += len(text)
        scored = None if self.cursor is None else self.cursor.take(sequence, self.length)
        # Sequences that were aborted or failed have no last piece: the call ends with an error.
        ended = sequence.finish in (Finish.STOP, Finish.LENGTH) and not self.finished
        if not text and not scored and not ended:
            return None
        tokens = sequence.tokens[self.sent :] if self.with_tokens else None
        self.sent = len(sequence.tokens)
        if not ended or sequence.finish is None:
            return Piece(self.number, text, scored, tokens)
        self.finished = True
        return Piece(self.number, text, scored, tokens, sequence.finish.value, stop_reason(sequence, self.params))


def choices_of(call: Call, tokenizer: Tokenizer) -> list[Choice]:
    """The choices of a call, in the order of their numbers."""
    found = []
    for number, job in enumerate(call.jobs):
        echo = 0 if call.echoes is None else len(call.echoes[number])
        # The text of an answer begins of its own, that of a completion goes on from its prompt.
        before = job.request.prompt if call.continues else ()
        for index, sequence in enumerate(job.sequences):
            params, cursor = job.request.params, None
            if call.logprobs is not None:
                detokenizer = Detokenizer(tokenizer, params.skip_special_tokens, before)
                cursor = ScoreCursor(detokenizer, echo, stop_id=call.stop_scored)
            found.append(Choice(number * call.n + index, sequence, params, cursor, call.token_ids, echo))
    return found


def usage(call: Call) -> dict[str, Any]:
    """OpenAI's usage object over all prompts and choices. A stop string's tokens count, as they were generated."""
    prompt = sum(len(job.request.prompt) for job in call.jobs)
    generated = sum(len(sequence.tokens) for job in call.jobs for sequence in job.sequences)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached for job in call.jobs)},
    }
