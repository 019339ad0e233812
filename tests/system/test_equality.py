"""One sequence, one answer: whatever the batch, the chunks, the cache, the preemptions, the lanes.

The C++ kernels promise the same bits (kernels/base.py), so with them the log-probabilities are compared exactly; with
the others, whose matrix products may round differently in another batch, the tokens are. The cuda device, which
is interpreted where there is no GPU, has a tiny random model answer briefly.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from weft import LLM
from weft.config import EngineConfig
from weft.core.plan import TokenScore
from weft.core.request import PromptScores, Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.kernels import available
from weft.loop.build import open_engine
from weft.loop.engine import Engine
from weft.text.tokenizer import Tokenizer

BUILTIN = Path(__file__).resolve().parents[2] / "src" / "weft" / "assets" / "builtin"
KERNELS = sorted({available()[0], "reference"})
DTYPES = ("bfloat16", "float32")
TWO_CORES = len(os.sched_getaffinity(0)) >= 2
LENGTH = 20
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True, logprobs=2)
LONG = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, logprobs=0)
TEXTS = (
    "import os\nimport sys\n\n\ndef main(argv):\n    ",
    "class Node:\n    def __init__(self, value, next=None):\n        self.value = value\n",
    "import os\nimport sys\n\n\ndef main(argv):\n    parser = argparse.ArgumentParser(description=__doc__)\n" * 3,
    "x",
    "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\nfor name in os.listdir('.'):\n",
)


@dataclass
class Answer:
    """What one request got, each of its `n` sequences by index."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    scores: dict[int, list[TokenScore | None]] = field(default_factory=dict)
    prompt: tuple[TokenScore, ...] = ()
    end: RequestEnd | None = None


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.from_folder(BUILTIN)
    return [tuple(tokenizer.encode(text)) for text in TEXTS]


@contextmanager
def opened(**settings: Any) -> Iterator[Engine]:
    if settings.get("kernels") == "reference" and "partition" not in settings:
        # Torch's threads wait for each other when another process wants a core; one does not.
        settings["cores"] = str(min(os.sched_getaffinity(0)))
    engine, _ = open_engine(EngineConfig(**{"num_blocks": 400, "max_num_seqs": 8} | settings), lambda phase: None)
    try:
        yield engine
    finally:
        engine.close()


def answer(engine: Engine, requests: Iterable[Request]) -> dict[str, Answer]:
    """Submit all requests at once and run the engine until they ended."""
    answers: dict[str, Answer] = {}
    for request in requests:
        engine.submit(request)
        answers[request.id] = Answer()
    while not engine.idle:
        for event in engine.step(60.0):
            found = answers[event.request]
            if isinstance(event, TokenOutput):
                assert event.token is not None, event
                found.tokens.setdefault(event.index, []).append(event.token)
                found.scores.setdefault(event.index, []).append(event.score)
            elif isinstance(event, PromptScores):
                found.prompt = event.scores
            else:
                assert found.end is None and event.error is None, event
                found.end = event
    assert all(found.end is not None for found in answers.values())
    return answers


def together(engine: Engine, prompts: Sequence[tuple[int, ...]], params: SamplingParams = GREEDY) -> list[Answer]:
    return list(answer(engine, [Request(str(i), prompt, params) for i, prompt in enumerate(prompts)]).values())


def one_by_one(engine: Engine, prompts: Sequence[tuple[int, ...]], params: SamplingParams = GREEDY) -> list[Answer]:
    return [together(engine, [prompt], params)[0] for prompt in prompts]


def same(case: Case, found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    if case.exact:
        assert [one.scores for one in found] == [one.scores for one in expected]  # floats, exactly
        assert [one.prompt for one in found] == [one.prompt for one in expected]


def cut(answer: Answer, length: int) -> Answer:
    """The beginning of an answer, to be compared with a shorter one."""
    tokens, scores = ({i: found[:length] for i, found in part.items()} for part in (answer.tokens, answer.scores))
    return replace(answer, tokens=tokens, scores=scores)


@dataclass(frozen=True)
class Case:
    """settings: of the engine. exact: whether a row's bits are its own."""

    settings: dict[str, Any]
    exact: bool
    greedy: SamplingParams = GREEDY

    @property
    def length(self) -> int:
        return self.greedy.max_tokens or 0


CASES = [(kernels, dtype) for kernels in KERNELS for dtype in DTYPES if (kernels, dtype) != ("reference", "bfloat16")]
CASES += [("experts", "bfloat16"), *[("cuda", "float32")] * (find_spec("triton") is not None)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest, tiny_model: Path, tiny_experts: Path) -> Case:
    name, dtype = request.param
    if name == "experts":
        return Case({"model": str(tiny_experts), "kernels": KERNELS[0], "dtype": dtype}, KERNELS[0] != "reference")
    if name == "cuda":
        # Without scores, which take the interpreter long.
        brief = replace(GREEDY, max_tokens=6, logprobs=None)
        return Case({"device": "cuda", "model": str(tiny_model), "dtype": dtype}, False, brief)
    return Case({"kernels": name, "dtype": dtype}, name != "reference")


@pytest.fixture(scope="module")
def expected(case: Case, prompts: list[tuple[int, ...]]) -> list[Answer]:
    """Each prompt alone, whole, on one mixed lane, nothing cached."""
    with opened(**case.settings, enable_prefix_caching=False) as engine:
        return one_by_one(engine, prompts, case.greedy)


def test_companions_change_nothing(case: Case, prompts: list[tuple[int, ...]], expected: list[Answer]) -> None:
    noise = SamplingParams(temperature=1.5, max_tokens=2 * case.length, ignore_eos=True, seed=3, repetition_penalty=1.2)
    with opened(**case.settings, enable_prefix_caching=False) as engine:
        same(case, together(engine, prompts, case.greedy), expected)
        requests = [Request(f"noise {i}", prompts[i], noise) for i in (1, 4)]
        requests += [Request(str(i), prompts[i], case.greedy) for i in reversed(range(len(prompts)))]
        found = answer(engine, requests)
        same(case, [found[str(i)] for i in range(len(prompts))], expected)


def test_prefix_hits_change_nothing(case: Case, prompts: list[tuple[int, ...]], expected: list[Answer]) -> None:
    with opened(**case.settings) as engine:
        same(case, one_by_one(engine, prompts, case.greedy), expected)
        again = together(engine, prompts, case.greedy)
        same(case, again, expected)
        assert again[2].end is not None and again[2].end.cached_tokens >= 16
        assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize("budget", [4, 7, 16, 33])
def test_chunk_boundaries_change_nothing(
    case: Case, prompts: list[tuple[int, ...]], expected: list[Answer], budget: int
) -> None:
    if case.settings.get("device") == "cuda" and budget != 7:
        pytest.skip("one budget is enough where kernels are interpreted")
    with opened(**case.settings, max_num_batched_tokens=budget, max_num_seqs=4) as engine:
        same(case, together(engine, prompts, case.greedy), expected)


def test_preemption_changes_nothing(case: Case, prompts: list[tuple[int, ...]], expected: list[Answer]) -> None:
    longest = max(map(len, prompts)) + LENGTH
    order = [0, 1, 3, 4, 2] * 3 if case.exact else [0, 1, 3, 4, 0, 1]
    grown = replace(case.greedy, max_tokens=LENGTH)
    # A pool that holds one sequence of full length, or a few short ones that then grow into each other.
    with opened(**case.settings, num_blocks=-(-longest // 16), max_model_len=longest) as engine:
        found = [cut(one, case.length) for one in together(engine, [prompts[i] for i in order], grown)]
        same(case, found, [expected[i] for i in order])
        assert engine.stats().preemptions > 0


@pytest.mark.skipif(not TWO_CORES, reason="two lanes need two cores")
def test_two_lanes_change_nothing(case: Case, prompts: list[tuple[int, ...]], expected: list[Answer]) -> None:
    for settings in ({}, {"max_num_batched_tokens": 16, "num_blocks": 22, "max_model_len": 352}):
        with opened(**case.settings, partition="1:1", **settings) as engine:
            same(case, together(engine, prompts, case.greedy), expected)
            assert {lane.lane for lane in engine.stats().lanes if lane.steps} == {"prefill", "decode"}


def test_prompt_scores_do_not_depend_on_chunks(case: Case, prompts: list[tuple[int, ...]]) -> None:
    params = replace(GREEDY, max_tokens=2, prompt_logprobs=1)
    with opened(**case.settings) as engine:
        whole = together(engine, prompts[:3], params)
    with opened(**case.settings, max_num_batched_tokens=8) as engine:
        parts = together(engine, prompts[:3], params)
    same(case, parts, whole)
    for one, other, prompt in zip(parts, whole, prompts, strict=False):
        assert [score.token for score in one.prompt] == list(prompt[1:])
        tolerance = 1e-4 if case.settings["dtype"] == "float32" else 0.1
        assert [score.logprob for score in one.prompt] == pytest.approx(
            [score.logprob for score in other.prompt], abs=tolerance
        )


def test_seeds_decide_whatever_the_batch(case: Case, prompts: list[tuple[int, ...]]) -> None:
    params = [
        SamplingParams(
            temperature=0.9, top_p=0.95, max_tokens=case.length, ignore_eos=True, seed=100 + i, n=2, logprobs=0
        )
        for i in range(len(prompts))
    ]
    requests = [Request(str(i), prompt, one) for i, (prompt, one) in enumerate(zip(prompts, params, strict=True))]
    requests = requests if case.exact else requests[:3]
    with opened(**case.settings, seed=1) as engine:
        at_once = answer(engine, requests)
        alone: dict[str, Answer] = {}
        for request in reversed(requests):
            alone |= answer(engine, [request])
    with opened(**case.settings, seed=2, max_num_batched_tokens=9, max_num_seqs=3) as engine:
        chunked = answer(engine, requests)
    for other in (alone, chunked):
        same(case, [other[request.id] for request in requests], list(at_once.values()))
    for one in at_once.values():
        assert one.tokens[0] != one.tokens[1]


@dataclass(frozen=True)
class Truth:
    """What transformers generates after a prompt, and the log-probability of each of these tokens."""

    tokens: list[int]
    logprobs: list[float]


@pytest.fixture(scope="module")
def truths(prompts: list[tuple[int, ...]]) -> list[Truth]:
    return _truths(BUILTIN, prompts)


def _truths(folder: Path, prompts: Sequence[tuple[int, ...]]) -> list[Truth]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two of them wait for each other when another process wants a core
    found = [_truth(model, prompt) for prompt in prompts]
    torch.set_num_threads(threads)
    return found


@torch.inference_mode()
def _truth(model: Any, prompt: tuple[int, ...]) -> Truth:
    tokens = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=48,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    following = tokens[0, len(prompt) :]
    table = torch.log_softmax(model(tokens).logits[0, len(prompt) - 1 : -1], -1)
    return Truth(following.tolist(), table.gather(1, following[:, None])[:, 0].tolist())


@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_is_that_of_transformers(kernels: str, prompts: list[tuple[int, ...]], truths: list[Truth]) -> None:
    with opened(kernels=kernels, dtype="float32") as engine:
        _compare(together(engine, prompts, LONG), truths)


@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_of_experts_is_that_of_transformers_in_chunks_and_after_prefix_hits(
    kernels: str, prompts: list[tuple[int, ...]], tiny_experts: Path
) -> None:
    truths = _truths(tiny_experts, prompts)
    settings = {"model": str(tiny_experts), "kernels": kernels, "dtype": "float32", "max_num_batched_tokens": 11}
    with opened(**settings) as engine:
        _compare(together(engine, prompts, LONG), truths)
        assert engine.stats().prefix_hits == 0
        _compare(together(engine, prompts, LONG), truths)
        assert engine.stats().prefix_hits > 0


def _compare(ours: Sequence[Answer], truths: Sequence[Truth]) -> None:
    for found, truth in zip(ours, truths, strict=True):
        assert found.tokens[0] == truth.tokens
        scores = [score for score in found.scores[0] if score is not None]
        assert [score.rank for score in scores] == [1] * 48
        assert [score.logprob for score in scores] == pytest.approx(truth.logprobs, abs=1e-4)


def test_the_builtin_model_continues_python() -> None:
    with LLM("builtin", num_blocks=128) as llm:
        text = llm.generate(TEXTS[1], SamplingParams(temperature=0.0, max_tokens=40), progress=False)[0].text
    whole_lines, _, _ = (TEXTS[1] + text).rpartition("\n")
    assert text.startswith("        self.") and ast.parse(whole_lines)
