"""Log-probabilities in OpenAI's two forms, and which of them belong to which piece of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from weft.core.plan import TokenScore
from weft.jobs import Continuation
from weft.text.detokenizer import Detokenizer
from weft.text.tokenizer import Tokenizer

# JSON has no infinity: what OpenAI sends for a token that cannot come.
LEAST = -9999.0


class Scored(NamedTuple):
    """A token's score and where its text begins; no score for the very first token of a prompt."""

    token: int
    score: TokenScore | None
    offset: int


@dataclass(slots=True)
class ScoreCursor:
    """Hands out the scores of one sequence: each with the piece of text that its token begins in.

    detokenizer: one of its own, as a stop string that is held back must not move the offsets.
    offset: characters before the sequence (the prompt, where it is echoed).
    stop_id: whether the id that ended the sequence has its score, too. OpenAI leaves it out of a chat; of a completion,
    vLLM and evaluation harnesses take the last score to be that of the last token that was generated.
    """

    detokenizer: Detokenizer
    offset: int = 0
    stop_id: bool = False
    seen: int = 0
    waiting: list[Scored] = field(default_factory=list)

    def take(self, sequence: Continuation, length: int) -> list[Scored]:
        """What is new, of tokens that begin before character `length`, the text so far.

        At the end all the rest, but for tokens behind the place where a stop string cut the text.
        """
        tokens = sequence.tokens
        for index in range(self.seen, len(tokens)):
            if index < len(sequence.scores):
                self.waiting.append(Scored(tokens[index], sequence.scores[index], self.offset))
            self.offset += len(self.detokenizer.push(tokens[index]))
        self.seen = len(tokens)
        ended_by_id = isinstance(sequence.stop, int)
        if sequence.finish is not None and not isinstance(sequence.stop, str):
            ready = self.waiting[:-1] if ended_by_id and not self.stop_id else self.waiting
            self.waiting = []
            return ready
        count = next((i for i, one in enumerate(self.waiting) if one.offset >= length), len(self.waiting))
        ready, self.waiting = self.waiting[:count], self.waiting[count:]
        return ready


def prompt_scored(tokenizer: Tokenizer, ids: Sequence[int], scores: Sequence[TokenScore], skip: bool) -> list[Scored]:
    """The tokens of a prompt with their offsets in its text; the first has no score. skip: leave special tokens out of
    the text."""
    detokenizer = Detokenizer(tokenizer, skip)
    offset, found = 0, []
    first: tuple[TokenScore | None, ...] = (None,)
    for token, score in zip(ids, first + tuple(scores), strict=True):
        found.append(Scored(token, score, offset))
        offset += len(detokenizer.push(token))
    return found


def chat_logprobs(tokenizer: Tokenizer, scored: Sequence[Scored], k: int) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""
    content = [
        {
            **_entry(tokenizer, one.token, one.score.logprob),
            "top_logprobs": [_entry(tokenizer, token, value) for token, value in one.score.top[:k]],
        }
        for one in scored
        if one.score is not None
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer: Tokenizer, scored: Sequence[Scored], k: int) -> dict[str, Any]:
    """The `logprobs` of a text choice. The first token of an echoed prompt has null."""
    return {
        "tokens": [_shown(tokenizer, one.token) for one in scored],
        "token_logprobs": [None if one.score is None else _finite(one.score.logprob) for one in scored],
        "top_logprobs": [None if one.score is None else _most_probable(tokenizer, one.score, k) for one in scored],
        "text_offset": [one.offset for one in scored],
    }


def prompt_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScore]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each prompt token but the first, token id to its score."""
    found: list[dict[str, Any] | None] = [None]
    for score in scores:
        rows = {token: (value, rank) for rank, (token, value) in enumerate(score.top, 1)}
        rows[score.token] = (score.logprob, score.rank)
        found.append(
            {
                str(token): {
                    "logprob": _finite(value),
                    "rank": rank,
                    "decoded_token": tokenizer.token_text(token),
                }
                for token, (value, rank) in rows.items()
            }
        )
    return found


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token)),
    }


def _most_probable(tokenizer: Tokenizer, score: TokenScore, k: int) -> dict[str, float]:
    """The k most probable tokens, and the drawn one."""
    rows = [*score.top[:k], (score.token, score.logprob)]
    return {_shown(tokenizer, token): _finite(value) for token, value in rows}


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token; of one with half a character its bytes, as OpenAI writes them."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
