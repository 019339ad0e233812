"""The seam between policy and device: plain frozen data, to be logged, replayed, sent to ranks, compared in a test.

The scheduler turns sequences into a `Plan`; a device turns a `Plan` into a `Result`. What is made anew for every token
is a named tuple, which takes a third of the time that a frozen dataclass takes to be made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from weft.core.sampling import SamplingParams

# Times as long as a step's fixed cost its tokens take at least, for it to be worth its cost.
WORTHWHILE = 8.0


class Lane(str, Enum):
    """An independent, ordered stream of steps on a share of a device."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"


class Sampling(NamedTuple):
    """How to draw the token that follows the last token of a slice.

    seed: 64-bit seed of the sequence. position: index of the drawn token in the sequence, prompt included.
    The pair keys the counter-based random number, so a draw does not depend on the batch it is made in.
    prompt, output: the tokens so far; empty unless `params.penalised`.
    forbidden: ids that must not be drawn (stop ids while fewer than `min_tokens` were generated).
    """

    params: SamplingParams
    seed: int
    position: int
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    forbidden: tuple[int, ...] = ()


class Slice(NamedTuple):
    """Tokens [start, start + len(tokens)) of one sequence, to compute now.

    blocks: the block table of the sequence, in order, long enough for start + len(tokens) positions. Position p
    lives in slot p % block_size of blocks[p // block_size].
    sample: how to draw the next token; None when the slice does not reach the end of what is known.
    prompt_logprobs: k to score the prompt: each row scores the token that follows it, with the k most probable ones.
    next_token: the token at position start + len(tokens) while the prompt goes on (chunked prefill), so that the last
    row has something to score; None at the prompt's end.
    source: blocks of the prefill pool that are copied into the first of `blocks` before the step; empty where both
    phases have one pool, and after the hand-over.
    """

    sequence: int
    start: int
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    sample: Sampling | None = None
    prompt_logprobs: int | None = None
    next_token: int | None = None
    source: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step of one lane, or a part of one. `step` is unique within an engine and grows.

    A step can be cut at layers, so that another lane may have a turn in between: this is part `part` of `parts`, about
    equal ones, which are given to the lane one after the other with nothing else between them. The last one samples
    and scores; only after it are the keys and values of the slices there.

    A step of decoding sequences can be carried out `repeats` times, or fewer, one after the other: each time, a slice
    is one position further, and its token is the one drawn the time before. See `Capacity.repeats`.
    """

    step: int
    lane: Lane
    slices: tuple[Slice, ...]
    part: int = 0
    parts: int = 1
    repeats: int = 1

    @property
    def tokens(self) -> int:
        return sum([len(piece.tokens) for piece in self.slices])

    @property
    def last(self) -> bool:
        """Whether the step ends with this part."""
        return self.part + 1 == self.parts


class Ticket(NamedTuple):
    """A plan that a device has accepted and not finished."""

    step: int
    lane: Lane


@dataclass(frozen=True, slots=True)
class TokenScore:
    """Natural-log probability of `token`, its rank (1 = most probable), and the most probable (token, logprob)."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class Sampled(NamedTuple):
    """The token drawn for one slice. `score` where logprobs were asked for."""

    sequence: int
    token: int
    score: TokenScore | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished ticket produced.

    sampled: one entry for each slice with `sample`, unless it is named in `failed`.
    prompt_scores: (sequence, scores of consecutive prompt tokens) for slices with prompt_logprobs.
    failed: (sequence, message) for slices that failed alone, such as NaN logits; the others are good.
    error: set when the whole step failed; nothing else is then to be trusted.
    seconds: device time of the step.
    gone: the lane carries out no plan any more, and nothing of this one is under way.
    repeats: how often the plan was carried out; `sampled` is what was drawn the last time.
    before: for each entry of `sampled`, the tokens drawn the times before.
    moved: seconds that the lane took to adopt a new share for this step, 0 when it had it already; what a GPU records
    anew on that share is in `seconds`, too.
    """

    ticket: Ticket
    sampled: tuple[Sampled, ...] = ()
    prompt_scores: tuple[tuple[int, tuple[TokenScore, ...]], ...] = ()
    failed: tuple[tuple[int, str], ...] = ()
    error: str | None = None
    seconds: float = 0.0
    gone: bool = False
    repeats: int = 1
    before: tuple[tuple[int, ...], ...] = ()
    moved: float = 0.0


@dataclass(frozen=True, slots=True)
class Partition:
    """The share of the device that each lane has, in units of `Capacity.shares` (cores on a CPU)."""

    prefill: int
    decode: int


class Regime(str, Enum):
    """How two lanes share one device."""

    SPLIT = "split"  # side by side, each on its share
    TURNS = "turns"  # one after the other, each on the whole device, in proportion to the shares
    MIXED = "mixed"  # the decode lane has the whole device and takes parts of prompts along


@dataclass(frozen=True, slots=True)
class Sharing:
    """What the scheduler and the device go by until told otherwise.

    partition: the shares (SPLIT), or the parts of the time (TURNS). chunk: most tokens in a step that has decoding
    sequences and prompts, of which prompts get a quarter at least (MIXED); the work of so many tokens is the longest
    turn of the prefill lane while somebody decodes (TURNS): steps are cut at layers where the device can do that, to
    fewer tokens otherwise. None: no limit. tpot: seconds for each token of an answer in the mean: where the cost of a
    step is known, a mixed step is as long as leaves every answer at that, instead of `chunk` tokens.
    size_weight: seconds that each token of its prompt puts a request back in the queue. 0: order of arrival.
    Otherwise the shortest goes first, and waiting makes up for size: a constant order, like that of priorities.
    """

    regime: Regime
    partition: Partition
    chunk: int | None = None
    size_weight: float = 0.0
    tpot: float | None = None


@dataclass(frozen=True, slots=True)
class StepLaw:
    """What a step takes on the whole device: fixed + token * T + slot * C seconds, for T tokens that read C slots; and
    read * R + pair * P for prompts, which read R of the slots, in P pairs of a token and a slot that it attends to."""

    fixed: float
    token: float
    slot: float
    read: float = 0.0
    pair: float = 0.0

    @property
    def worthwhile(self) -> float:
        """Tokens from which on a step spends little on what it costs whatever is in it."""
        return WORTHWHILE * self.fixed / self.token if self.token > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a device offers; fixed once it is open.

    blocks x block_size KV slots; max_tokens and max_slices bound one plan; shares: units that a Partition divides;
    max_model_len: longest sequence in tokens; vocabulary: number of token ids; layers: parts that a step can be cut
    into at most, 1 where it cannot be cut; ahead: slots behind the token of a decode slice that its table had better
    have, for a device that computes the step after it before it is asked to; decode_blocks: the last so many of the
    blocks are a pool of their own, the decode phase's (PD disaggregation), 0 where there is one pool for both phases;
    repeats: how often one lane for both phases carries out a plan at most, without blocks for more than the first time
    (a device that keeps no KV).
    """

    blocks: int
    block_size: int
    max_tokens: int
    max_slices: int
    shares: int
    max_model_len: int
    vocabulary: int
    layers: int = 1
    ahead: int = 0
    decode_blocks: int = 0
    repeats: int = 1
