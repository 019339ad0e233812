"""Everything that crosses between the front end and the engine process: a closed union of msgspec structs.

Bytes that are not one of these messages are refused by the decoder; nothing here can carry code.
"""

from __future__ import annotations

import msgspec

from weft.core.request import PromptScores, Request, RequestEnd, TokenOutput

# Tokens of a step, by which steps are counted: vLLM's bounds.
STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    request: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """The text of one sequence of a request holds a stop string."""

    request: str
    index: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Abort what is left and end the process."""


class AskStats(msgspec.Struct, frozen=True, tag=True):
    """Ask for a `Stats`."""


class LaneStats(msgspec.Struct, frozen=True):
    """share: units of the device. busy: seconds of device time since start. steps, tokens: counts since start.
    running: sequences the lane owns now. moves: steps for which it took on another share than it had before;
    move_seconds: what that took."""

    lane: str
    share: int
    busy: float
    steps: int
    tokens: int
    running: int
    moves: int = 0
    move_seconds: float = 0.0


class Stats(msgspec.Struct, frozen=True, tag=True):
    """A snapshot of the engine; counters grow from start. Blocks: free + cached + held + pinned = total.

    iteration_tokens: computed by all lanes. step_sizes: how many steps had up to each of STEP_BUCKETS tokens, but more
    than the bound before, and how many had more than the last. partition_*: of the controller; regime is "" without
    one, chunk 0 without a limit; seconds are those that the device took to be told of new shares, and that the
    decisions took; put_back and refused are requests that could not make the TTFT target when they came; ttft and tpot
    are mean seconds as the last decision predicts them, None where it does not.
    """

    running: int
    waiting: int
    blocks_free: int
    blocks_cached: int
    blocks_held: int
    blocks_pinned: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    prompt_tokens: int
    generation_tokens: int
    uptime: float
    lanes: tuple[LaneStats, ...] = ()
    iteration_tokens: int = 0
    step_sizes: tuple[int, ...] = (0,) * (len(STEP_BUCKETS) + 1)
    partition_regime: str = ""
    partition_chunk: int = 0
    partition_switches: int = 0
    partition_switch_seconds: float = 0.0
    partition_decide_seconds: float = 0.0
    partition_put_back: int = 0
    partition_refused: int = 0
    partition_decisions: int = 0
    partition_ttft: float | None = None
    partition_tpot: float | None = None


class Phase(msgspec.Struct, frozen=True):
    """One row of the start-up table."""

    name: str
    seconds: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine serves. Sent once, before any other message."""

    model: str
    device: str
    dtype: str
    kernels: str
    max_model_len: int
    vocabulary: int
    blocks: int
    block_size: int
    max_num_seqs: int
    phases: tuple[Phase, ...]
    memory: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()


class Starting(msgspec.Struct, frozen=True, tag=True):
    """A start-up phase has begun; sent for progress before `Ready`."""

    phase: str


class Died(msgspec.Struct, frozen=True, tag=True):
    """The engine process ends because of an error. `code` names a class of weft.errors, where it is one of ours."""

    error: str
    code: str | None = None


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A submitted request was not accepted; no other event follows for it. `code` names a class of weft.errors."""

    request: str
    error: str
    code: str
    param: str | None = None
    retry_after: int | None = None


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """What one round of the engine loop produced, in order."""

    outputs: tuple[TokenOutput, ...] = ()
    scores: tuple[PromptScores, ...] = ()
    ends: tuple[RequestEnd, ...] = ()


ToEngine = Submit | Abort | Stop | Shutdown | AskStats
FromEngine = Starting | Ready | Died | Refused | Tokens | Stats
