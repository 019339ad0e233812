"""Which requests are accepted: what can never be served is refused at once, and says why."""

from __future__ import annotations

import math
from array import array
from collections import deque
from dataclasses import dataclass
from hashlib import blake2b

from weft.core.plan import Capacity
from weft.core.request import Request
from weft.errors import ContextTooLong, InvalidRequest, NeverFits, QueueFull

RETRY_MOST = 60
MAX_PRIORITY = 2**31 - 1
STARTS_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """The part of the engine's configuration that the scheduler reads.

    max_num_seqs: most sequences at one time. max_num_batched_tokens: most tokens in one plan. max_num_queued_reqs,
    max_num_queued_tokens: most requests, and tokens of their prompts, that wait for their first step.
    seed: for requests that bring none.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int | None = None
    enable_prefix_caching: bool = True
    seed: int = 0


class Admission:
    """The bounded queue's door. It counts who waits for the first step; the sequences themselves wait elsewhere."""

    def __init__(self, capacity: Capacity, settings: SchedulerSettings) -> None:
        self._capacity = capacity
        self._settings = settings
        self._starts: deque[float] = deque(maxlen=STARTS_REMEMBERED)
        self.queued = 0
        self.queued_tokens = 0

    def check(self, request: Request, now: float) -> None:
        """Raises InvalidRequest, ContextTooLong, NeverFits or QueueFull; on return the request may be queued."""
        request.params.validate(self._capacity.vocabulary)
        self._check_prompt(request.prompt)
        if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
            raise InvalidRequest(
                f"priority is {request.priority}; it must be between {-MAX_PRIORITY} and {MAX_PRIORITY}",
                param="priority",
            )
        self._check_size(len(request.prompt))
        self._check_queue(len(request.prompt), now)

    def enter(self, prompt_tokens: int) -> None:
        self.queued += 1
        self.queued_tokens += prompt_tokens

    def leave(self, prompt_tokens: int, started: float | None) -> None:
        """A request gets its first step (started: when), or ends without one."""
        self.queued -= 1
        self.queued_tokens -= prompt_tokens
        if started is not None:
            self._starts.append(started)

    def _check_prompt(self, prompt: tuple[int, ...]) -> None:
        if not prompt:
            raise InvalidRequest("the prompt is empty; it needs at least one token", param="prompt")
        vocabulary = self._capacity.vocabulary
        try:
            array("Q", prompt)  # unsigned: a negative one overflows
            fits = max(prompt) < vocabulary
        except OverflowError:
            fits = False
        except TypeError as error:
            raise InvalidRequest(f"the prompt is not a list of token ids: {error}", param="prompt") from error
        if not fits:
            at, token = next((i, token) for i, token in enumerate(prompt) if not 0 <= token < vocabulary)
            raise InvalidRequest(
                f"prompt token {at} is {token}; token ids must be between 0 and {vocabulary - 1}", param="prompt"
            )

    def _check_size(self, prompt_tokens: int) -> None:
        limit = self._capacity.max_model_len
        if prompt_tokens + 1 > limit:
            raise ContextTooLong(
                f"the prompt has {prompt_tokens} tokens; with at least one token of output it does not fit the "
                f"context of {limit} tokens (max_model_len)",
                param="prompt",
            )
        size, total = self._capacity.block_size, self._capacity.blocks
        needed = math.ceil((prompt_tokens + 1) / size)
        if needed > total:
            raise NeverFits(
                f"the prompt of {prompt_tokens} tokens and one token of output need {needed} KV blocks of {size} "
                f"slots, and the pool has {total}; a larger --num-blocks or --kv-cache-memory-bytes would help",
                param="prompt",
            )

    def _check_queue(self, prompt_tokens: int, now: float) -> None:
        most, most_tokens = self._settings.max_num_queued_reqs, self._settings.max_num_queued_tokens
        if self.queued >= most:
            raise QueueFull(
                f"{self.queued} requests wait already, the most that --max-num-queued-reqs allows",
                retry_after=self.retry_after(now),
            )
        # An empty queue takes any prompt: otherwise one longer than the bound could never be served.
        if most_tokens is not None and self.queued and self.queued_tokens + prompt_tokens > most_tokens:
            raise QueueFull(
                f"{self.queued_tokens} prompt tokens wait already; {prompt_tokens} more exceed "
                f"--max-num-queued-tokens {most_tokens}",
                retry_after=self.retry_after(now),
            )

    def retry_after(self, now: float) -> int:
        """Whole seconds in which half of the queue should have started, at the pace of the latest starts."""
        if not self._starts:
            return 1
        seconds_each = max(0.0, now - self._starts[0]) / len(self._starts)
        return max(1, min(RETRY_MOST, math.ceil(seconds_each * self.queued / 2)))


def outgrown(tokens: int, capacity: Capacity) -> str | None:
    """Why a sequence of so many tokens can never be computed, or None when it can."""
    needed = math.ceil(tokens / capacity.block_size)
    if needed <= capacity.blocks:
        return None
    return (
        f"the sequence has grown to {tokens} tokens, which need {needed} KV blocks of {capacity.block_size} slots; "
        f"the pool has {capacity.blocks}; a smaller max_tokens, or a larger --num-blocks or --kv-cache-memory-bytes "
        "would help"
    )


def request_seed(seed: int | None, engine_seed: int, number: int) -> int:
    """The 64-bit seed of a request: its own, or one drawn from the engine's seed and the request's number."""
    return seed % 2**64 if seed is not None else _derive(engine_seed % 2**64, number)


def sequence_seed(seed: int, index: int) -> int:
    """The seeds of the n sequences of a request differ; the first one's is the request's."""
    return seed if index == 0 else _derive(seed, index)


def _derive(seed: int, number: int) -> int:
    return int.from_bytes(blake2b(b"%d/%d" % (seed, number), digest_size=8).digest(), "little")
