"""What a client asked, and what it is told.

Every accepted request ends in exactly one `RequestEnd`, whatever happens to it. Before it come the `TokenOutput`s of
its `n` sequences, each sequence's last one carrying its `finish`; see `Request.told`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from weft.core.plan import TokenScore
from weft.core.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the engine takes it: token ids in, token ids out.

    priority: smaller is served first (vLLM's convention), and waiting improves it (ageing).
    cache_salt: requests share cached prefixes only with requests of the same salt.
    eos: the model's end-of-text ids, which end a sequence unless params.ignore_eos.
    told: whether its tokens are told. False: only the first one of each sequence, and how many there were at its end.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    eos: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str = ""
    told: bool = True


class Finish(str, Enum):
    """Why a sequence ended; the values are OpenAI's where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class TokenOutput(NamedTuple):
    """One token of sequence `index` of a request; `finish` on its last one.

    A sequence can finish without a token (abort, error): then `token` is None.
    stop_token: the id that ended the sequence, when `finish` is STOP by a stop id or an end-of-text id. It is
    counted as generated, and is `token` as well; the front end leaves it out of the text.
    """

    request: str
    index: int  # type: ignore[assignment]  # a field, and so not the method of tuples
    token: int | None
    score: TokenScore | None = None
    finish: Finish | None = None
    stop_token: int | None = None


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of prompt tokens 1.. (token 0 has none), delivered once per request when asked for."""

    request: str
    scores: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds on the engine's monotonic clock."""

    arrived: float
    scheduled: float | None = None
    first_token: float | None = None
    ended: float | None = None


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """The one terminal event of a request. `error`/`code` are set when reason is ERROR (code: weft.errors).

    generated_tokens: of all its `sequences` together."""

    request: str
    reason: Finish
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    timing: Timing
    error: str | None = None
    code: str | None = None
    preemptions: int = 0
    sequences: int = 1


Event = TokenOutput | PromptScores | RequestEnd
