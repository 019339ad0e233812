"""What a client may ask of sampling: the names are vLLM's and OpenAI's, the bounds are ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weft.errors import InvalidRequest

MAX_N = 128
MAX_STOP = 16
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_TOKENS = 2**31 - 1
SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the continuations of one request are drawn and when they end.

    temperature 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 switch each filter off.
    `max_tokens` None means up to the model's context. `seed` None draws a random one at admission.
    `logprobs` k returns the drawn token's log-probability and the k most probable; 0 only the drawn one.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether drawing a token needs the tokens that came before it."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def validate(self, vocabulary: int | None = None) -> None:
        """Raise InvalidRequest for the first field out of bounds, naming field, value and what would work."""
        whole: list[tuple[str, int | None, int, int]] = [
            ("min_tokens", self.min_tokens, 0, MAX_TOKENS),
            ("top_k", self.top_k, -1, MAX_TOKENS),
            ("n", self.n, 1, MAX_N),
        ]
        optional: list[tuple[str, int | None, int, int]] = [
            ("max_tokens", self.max_tokens, 1, MAX_TOKENS),
            ("logprobs", self.logprobs, 0, MAX_LOGPROBS),
            ("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS),
            ("seed", self.seed, SEED_MIN, SEED_MAX),
        ]
        for name, value, low, high in whole:
            _whole(name, value, low, high)
        for name, value, low, high in optional:
            if value is not None:
                _whole(name, value, low, high)
        for name, real, low_real, high_real in (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
        ):
            _real(name, real, low_real, high_real)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p is 0.0, which leaves no token to draw; use a value in (0, 1]", param="top_p")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}", param="min_tokens"
            )
        self._validate_stops(vocabulary)
        self._validate_bias(vocabulary)

    def _validate_stops(self, vocabulary: int | None) -> None:
        if not isinstance(self.stop, tuple | list) or not all(isinstance(text, str) for text in self.stop):
            raise InvalidRequest(f"stop is {self.stop!r}; it must be a tuple of texts", param="stop")
        if not isinstance(self.stop_token_ids, tuple | list):
            raise InvalidRequest(
                f"stop_token_ids is {self.stop_token_ids!r}; it must be a tuple of token ids", param="stop_token_ids"
            )
        if len(self.stop) > MAX_STOP:
            raise InvalidRequest(f"stop has {len(self.stop)} strings; at most {MAX_STOP} are allowed", param="stop")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise InvalidRequest(
                    f"a stop string has {len(text)} characters; 1 to {MAX_STOP_CHARS} are allowed", param="stop"
                )
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise InvalidRequest(
                f"stop_token_ids has {len(self.stop_token_ids)} ids; at most {MAX_STOP_IDS} are allowed",
                param="stop_token_ids",
            )
        for token in self.stop_token_ids:
            _token("stop_token_ids", token, vocabulary)

    def _validate_bias(self, vocabulary: int | None) -> None:
        if not isinstance(self.logit_bias, tuple | list) or not all(
            isinstance(pair, tuple | list) and len(pair) == 2 for pair in self.logit_bias
        ):
            raise InvalidRequest(
                f"logit_bias is {self.logit_bias!r}; it must be a tuple of (token id, bias)", param="logit_bias"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are allowed",
                param="logit_bias",
            )
        for token, bias in self.logit_bias:
            _token("logit_bias", token, vocabulary)
            _real("logit_bias", bias, -100.0, 100.0)


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{name} is {value!r}; it must be a whole number", param=name)
    _bounded(name, value, low, high)


def _real(name: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidRequest(f"{name} is {value!r}; it must be a number", param=name)
    _bounded(name, value, low, high)


def _bounded(name: str, value: float, low: float, high: float) -> None:
    # Not `value < low or value > high`: this is true for NaN as well.
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}; it must be between {low} and {high}", param=name)


def _token(name: str, token: Any, vocabulary: int | None) -> None:
    if not isinstance(token, int) or token < 0 or (vocabulary is not None and token >= vocabulary):
        limit = "non-negative" if vocabulary is None else f"between 0 and {vocabulary - 1}"
        raise InvalidRequest(f"{name} names token {token!r}; token ids must be {limit}", param=name)
