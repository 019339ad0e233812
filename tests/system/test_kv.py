"""Serving with keys and values in 8 and 4 bits: the same answers whatever happens to the blocks, and more sequences.

The prefix cache, preemption and a full pool at once are where KV caches of few bits have corrupted others' output.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from weft.config import EngineConfig
from weft.core.plan import TokenScore
from weft.core.request import PromptScores, Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.errors import ConfigError
from weft.kernels import REFERENCE, available
from weft.loop.build import open_engine
from weft.loop.engine import Engine
from weft.text.tokenizer import Tokenizer

BUILTIN = Path(__file__).resolve().parents[2] / "src" / "weft" / "assets" / "builtin"
TWO_CORES = len(os.sched_getaffinity(0)) >= 2
LENGTH = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True, logprobs=1)
HEAD = (
    "import argparse\nimport os\nimport sys\n\n\n"
    "class Reader:\n    def __init__(self, path):\n        self.path = path\n"
)
TEXTS = (
    HEAD + "\n    def read(self):\n        with open(self.path) as file:\n",
    HEAD + "\n    def names(self):\n        return os.listdir(self.path)\n\n\ndef main(argv):\n    ",
    "x",
    HEAD * 2 + "for name in os.listdir('.'):\n",
    "def total(numbers):\n    result = 0\n",
)
needs_native = pytest.mark.skipif(available()[0] == REFERENCE, reason="the C++ extension is not built")


@dataclass
class Answer:
    """What one request got; scores are compared as floats, exactly."""

    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore | None] = field(default_factory=list)
    prompt: tuple[TokenScore, ...] = ()
    end: RequestEnd | None = None


@dataclass
class Watch:
    """The most sequences that ran at once, and the fewest blocks that were free."""

    running: int = 0
    free: int = 1 << 30


@contextmanager
def opened(**settings: Any) -> Iterator[Engine]:
    engine, _ = open_engine(EngineConfig(**{"num_blocks": 400, "max_num_seqs": 8} | settings), lambda phase: None)
    try:
        yield engine
    finally:
        engine.close()


def together(
    engine: Engine, prompts: Sequence[tuple[int, ...]], params: SamplingParams = GREEDY, watch: Watch | None = None
) -> list[Answer]:
    """Submit all at once and run until they ended."""
    answers = {str(i): Answer() for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        engine.submit(Request(str(i), prompt, params))
    while not engine.idle:
        for event in engine.step(60.0):
            found = answers[event.request]
            if isinstance(event, TokenOutput):
                assert event.token is not None
                found.tokens.append(event.token)
                found.scores.append(event.score)
            elif isinstance(event, PromptScores):
                found.prompt = event.scores
            else:
                assert event.error is None, event
                found.end = event
        if watch is not None:
            stats = engine.stats()
            watch.running = max(watch.running, stats.running)
            watch.free = min(watch.free, stats.blocks_free)
    return list(answers.values())


def texts_of(answers: Sequence[Answer]) -> list[tuple[list[int], list[TokenScore | None]]]:
    return [(answer.tokens, answer.scores) for answer in answers]


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.from_folder(BUILTIN)
    return [tuple(tokenizer.encode(text)) for text in TEXTS]


@pytest.fixture(scope="module", params=[("int4", "bfloat16"), ("int8", "bfloat16"), ("int4", "float32")], ids="-".join)
def case(request: pytest.FixtureRequest) -> dict[str, str]:
    cache, dtype = request.param
    return {"kv_cache_dtype": cache, "dtype": dtype}


@pytest.fixture(scope="module")
def alone(case: dict[str, str], prompts: list[tuple[int, ...]]) -> list[Answer]:
    """Each prompt by itself, whole, on one mixed lane, nothing cached."""
    with opened(**case, enable_prefix_caching=False) as engine:
        return [together(engine, [prompt])[0] for prompt in prompts]


@needs_native
@pytest.mark.parametrize("partition", ["off", pytest.param("1:1", marks=pytest.mark.skipif(not TWO_CORES, reason="-"))])
@pytest.mark.parametrize("budget", [9, 64])
def test_a_full_pool_with_prefix_hits_and_preemption_changes_nothing(
    case: dict[str, str], prompts: list[tuple[int, ...]], alone: list[Answer], partition: str, budget: int
) -> None:
    longest = -(-(max(map(len, prompts)) + LENGTH) // 16)
    order = [0, 1, 3, 4, 2, 0, 3, 1] * 2
    watch = Watch()
    with opened(
        **case,
        num_blocks=longest + 3,
        max_model_len=longest * 16,
        max_num_batched_tokens=budget,
        partition=partition,
    ) as engine:
        for _ in range(2):
            found = together(engine, [prompts[i] for i in order], watch=watch)
            assert texts_of(found) == texts_of([alone[i] for i in order])
        stats = engine.stats()
    assert stats.preemptions > 0 and stats.prefix_hits > 0
    assert watch.free == 0


@needs_native
def test_answers_are_those_of_the_reference_kernels(prompts: list[tuple[int, ...]]) -> None:
    """In float32, where their sums differ in the last bits only: nothing is lost that the format keeps."""
    found, core = [], str(min(os.sched_getaffinity(0)))
    for kernels in ("auto", REFERENCE):
        with opened(kv_cache_dtype="int4", dtype="float32", kernels=kernels, cores=core) as engine:
            found.append(together(engine, [prompts[0]])[0])
    ours, truth = found
    assert ours.tokens == truth.tokens
    assert [score.logprob for score in ours.scores if score] == pytest.approx(
        [score.logprob for score in truth.scores if score], abs=2e-2
    )


@needs_native
@pytest.mark.parametrize(("cache", "most"), [("int8", 0.01), ("int4", 0.04)])
def test_little_is_lost_against_bfloat16(prompts: list[tuple[int, ...]], cache: str, most: float) -> None:
    """Nats of the prompt's tokens, which are predicted from the KV of those before them."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    nats = []
    for name in ("bf16", cache):
        with opened(kv_cache_dtype=name, dtype="bfloat16") as engine:
            answers = together(engine, [prompts[1], prompts[3]], params)
        nats.append(-fmean(score.logprob for answer in answers for score in answer.prompt))
    assert nats[1] == pytest.approx(nats[0], rel=most) and nats[1] != nats[0]


@needs_native
def test_the_same_memory_holds_three_and_a_half_times_as_many_sequences(prompts: list[tuple[int, ...]]) -> None:
    prompt = (prompts[3] * 2)[: 128 - LENGTH]  # eight blocks with its output
    most, blocks = {}, {}
    for cache in ("bf16", "int4"):
        watch = Watch()
        with opened(
            kv_cache_dtype=cache,
            dtype="bfloat16",
            num_blocks=None,
            kv_cache_memory_bytes=4 * 128 * 6 * 2 * 2 * 64 * 2,  # four sequences in bfloat16
            max_model_len=128,
            max_num_seqs=32,
            enable_prefix_caching=False,
        ) as engine:
            blocks[cache] = engine.stats().blocks_free
            # as many as fit: all of them run at once and none has to be put back
            together(engine, [prompt] * (blocks[cache] // 8), watch=watch)
            assert engine.stats().preemptions == 0
        most[cache] = watch.running
    assert most == {"bf16": 4, "int4": 14}
    assert blocks["int4"] / blocks["bf16"] >= 3.5


def test_the_start_up_says_what_the_cache_is() -> None:
    engine, ready = open_engine(EngineConfig(kv_cache_dtype="int4", num_blocks=8), lambda phase: None)
    engine.close()
    assert ready.dtype == "bfloat16, KV int4"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"kv_cache_dtype": "bf16", "dtype": "float32"},
            "--kv-cache-dtype is bf16: a KV cache of bf16 needs activations of bfloat16, and they are float32; "
            "auto, int8 and int4 would work",
        ),
        (
            {"kv_cache_dtype": "int4", "device": "simulated"},
            "--kv-cache-dtype is int4; the simulated device keeps neither keys nor values, so only auto would work",
        ),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype is 'fp8'; it must be one of auto, bf16, int8, int4"),
    ],
)
def test_a_cache_that_cannot_be_had_is_an_error(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_engine(EngineConfig(**settings), lambda phase: None)
    assert str(refused.value) == words
