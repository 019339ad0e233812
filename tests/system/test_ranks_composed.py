"""Two ranks with all that may come together: woven steps in one lane beside decode steps in the other, weights and KV
of 4 bits, prompts in chunks and from the prefix cache. It changes no bit of what two ranks answer without."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.models.conftest import SMALL, write_fmpq

from weft.config import EngineConfig
from weft.core.plan import TokenScore
from weft.core.request import Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.kernels import REFERENCE, available
from weft.loop.build import open_engine
from weft.loop.engine import Engine

pytestmark = pytest.mark.skipif(available()[0] == REFERENCE, reason="the C++ extension is not built")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
SIMPLE = {"weave": "fused", "partition": "off", "enable_prefix_caching": False, "max_num_batched_tokens": 128}
COMPOSED = {"weave": "woven", "partition": "100%:100%", "enable_prefix_caching": True, "max_num_batched_tokens": 48}
Answer = list[tuple[int, TokenScore | None]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Of random integers of 4 bits."""
    write_fmpq(tmp_path, 8)
    return tmp_path


@contextmanager
def opened(model: Path, **settings: Any) -> Iterator[Engine]:
    limits = {"num_blocks": 40, "max_model_len": 128, "max_num_seqs": 8, "dtype": "float32", "kv_cache_dtype": "int4"}
    engine, _ = open_engine(EngineConfig(model=os.fspath(model), **(limits | settings)), lambda _phase: None)
    try:
        yield engine
    finally:
        engine.close()


def together(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> list[Answer]:
    answers: list[Answer] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        engine.submit(Request(str(number), prompt, GREEDY))
    while not engine.idle:
        for event in engine.step(20.0):
            if isinstance(event, TokenOutput) and event.token is not None:
                answers[int(event.request)].append((event.token, event.score))
            elif isinstance(event, RequestEnd):
                assert event.error is None, event
    return answers


def tokens_of(answer: Answer) -> list[int]:
    return [token for token, _ in answer]


def test_all_at_once_changes_nothing(model: Path) -> None:
    draw = random.Random(5)
    prompts = [tuple(draw.randrange(131) for _ in range(length)) for length in (70, 41, 90)]
    with opened(model, tensor_parallel_size=2, **SIMPLE) as engine:
        simple = [together(engine, [prompt])[0] for prompt in prompts]
    with opened(model, tensor_parallel_size=2, **COMPOSED) as engine:
        for _ in range(2):  # the second time from the prefix cache
            assert together(engine, prompts) == simple
        assert engine.stats().prefix_hits > 0
    with opened(model) as engine:  # one rank: a part of a row that a rank quantises by itself changes its scores
        assert [tokens_of(answer) for answer in together(engine, prompts)] == [tokens_of(answer) for answer in simple]


@pytest.mark.parametrize("weave", ["auto", "woven", "rejoined"])
def test_experts_are_served_by_ranks_as_by_one(tmp_path: Path, weave: str) -> None:
    """Of a mixture, in chunks, beside decode steps and from the prefix cache, whether its strands rejoin or not."""
    mixture = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 5}
    (tmp_path / "config.json").write_text(json.dumps(SMALL | mixture | {"num_experts_per_tok": 2}))
    draw = random.Random(6)
    prompts = [tuple(draw.randrange(131) for _ in range(length)) for length in (70, 41, 90)]
    settings: dict[str, Any] = {"load_format": "dummy", "kv_cache_dtype": "auto"}
    with opened(tmp_path, **settings) as engine:
        alone = [tokens_of(together(engine, [prompt])[0]) for prompt in prompts]
    with opened(tmp_path, tensor_parallel_size=2, **settings | SIMPLE) as engine:
        simple = [together(engine, [prompt])[0] for prompt in prompts]
    with opened(tmp_path, tensor_parallel_size=2, **settings | COMPOSED | {"weave": weave}) as engine:
        for _ in range(2):
            assert together(engine, prompts) == simple
        assert engine.stats().prefix_hits > 0
    assert [tokens_of(answer) for answer in simple] == alone
