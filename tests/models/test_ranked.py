"""Ranks that weave, fuse or do neither give the same bits as each other, and the logits of one rank.

Here the ranks are threads of one process, each with kernels, weights and KV of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.core.plan import Slice
from weft.kernels import LEVELS, available, open_kernels
from weft.kernels.base import Kernels
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.forward import Plain
from weft.models.loader import load_weights
from weft.models.ranked import Ranked
from weft.models.shard import Part, shard_config
from weft.weave.choice import Mode
from weft.weave.collective import Collective, Join, Joined, Quantise
from weft.weave.local import Threads
from weft.weave.rows import plain

BEST = available()[0]
pytestmark = pytest.mark.skipif(BEST not in LEVELS, reason="the C++ extension is not built")


BLOCK = 16
Pause = Callable[[int, int, str], None]
Format = Callable[[Any], Quantise | None]
Step = tuple[Sequence[Slice], Sequence[int], Mode, Sequence[int]]  # the last: tokens of each strand


class AllRows:
    """The plain baseline: every rank sums all rows and normalises them itself."""

    def __init__(self, inner: Collective, kernels: Kernels) -> None:
        self.rank, self.ranks = inner.rank, inner.ranks
        self._inner = inner
        self._join_rows = plain(kernels.rms_norm)

    def owned(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        return bounds[0], bounds[-1]

    def start(self, join: Join) -> Join:
        return join

    def finish(self, pending: Join) -> Joined:
        parts = [pending.partial] if pending.replicated else self._inner.gather(pending.partial)
        hidden, residual = self._join_rows(parts, pending.residual, pending.weight, pending.eps, None)
        return Joined(hidden, residual)

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return self._inner.gather(rows)

    def close(self) -> None:
        self._inner.close()


class Group:
    """Ranks that carry out the same steps. `run` gives the logits of each rank."""

    def __init__(self, forwards: Sequence[Ranked], plans: list[tuple[Mode, tuple[int, ...]]]) -> None:
        self._forwards = forwards
        self._plans = plans

    def run(self, step: Step, *, whole: bool = False) -> list[torch.Tensor]:
        slices, rows, mode, strands = step
        self._plans[:] = [(mode, tuple(strands))]

        def one(forward: Ranked) -> torch.Tensor:
            torch.set_num_threads(1)
            forward.run(slices, rows, whole=whole)
            return forward.head.logits(forward.hidden()) if whole else torch.from_numpy(forward.logits().copy())

        with ThreadPoolExecutor(len(self._forwards)) as pool:
            return list(pool.map(one, self._forwards))


@contextmanager
def open_group(
    folder: Path,
    name: str,
    ranks: int,
    dtype: torch.dtype,
    *,
    seed: int | None = None,
    blocks: int = 12,
    cache: str = "auto",
    pause: Pause | None = None,
    quantised_gather: bool = False,
) -> Iterator[Group]:
    """seed: of random weights; None for the folder's own. name: of the kernels."""
    config = read_config(folder)
    plans: list[tuple[Mode, tuple[int, ...]]] = []
    with ExitStack() as stack:
        kernels = [open_kernels(name, (0,)) for _ in range(ranks)]
        for own in kernels:
            stack.callback(own.close)
        options: dict[str, Any] = {} if pause is None else {"pause": pause}
        threads = Threads(ranks, plain(kernels[0].rms_norm), **options)
        forwards = []
        for own, collective in zip(kernels, threads.collectives(), strict=True):
            part = Part(collective.rank, ranks)
            weights = load_weights(folder, config, own, dtype, dummy_seed=seed, part=part)
            decoder = Decoder(shard_config(config, part), weights, own, 128)
            modes: dict[Mode, Collective] = {
                Mode.FUSED: collective,
                Mode.WOVEN: collective,
                Mode.PLAIN: AllRows(collective, own),
            }
            kv = decoder.make_kv(blocks, BLOCK, cache)
            formats = _format(own) if quantised_gather else _no_format
            forwards.append(Ranked(decoder, kv, BLOCK, modes, lambda _slices: plans[0], formats))
        yield Group(forwards, plans)


@contextmanager
def open_alone(
    folder: Path, name: str, dtype: torch.dtype, *, seed: int | None = None, blocks: int = 12, cache: str = "auto"
) -> Iterator[Callable[[Step], torch.Tensor]]:
    """One rank, by the forward pass that knows nothing of others."""
    config, kernels = read_config(folder), open_kernels(name, (0,))
    try:
        decoder = Decoder(config, load_weights(folder, config, kernels, dtype, dummy_seed=seed), kernels, 128)
        forward = Plain(decoder, decoder.make_kv(blocks, BLOCK, cache), BLOCK)

        def run(step: Step) -> torch.Tensor:
            forward.run(step[0], step[1])
            return torch.from_numpy(forward.logits().copy())

        yield run
    finally:
        kernels.close()


def _no_format(_packed: Any) -> None:
    return None


def _format(kernels: Kernels) -> Format:
    from weft.kernels.wire import input_format

    return lambda packed: input_format(kernels, packed)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """What nobody has written is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def tokens(count: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(131) for _ in range(count))


def steps(mode: Mode, *strands: int) -> tuple[Step, Step]:
    """A step of a prompt; then 14 tokens: the end of that prompt, two new ones, of which one goes on, and a decode."""
    old = tokens(9, 1)
    first: Step = ([Slice(1, 0, old[:5], (3,)), Slice(2, 0, tokens(17, 2), (7, 1))], [21], Mode.FUSED, (22,))
    second = [
        Slice(1, 5, old[5:], (3,)),
        Slice(3, 0, tokens(6, 3), (0,)),
        Slice(2, 17, tokens(1, 4), (7, 1)),
        Slice(4, 0, tokens(3, 5), (9,)),
    ]
    return first, (second, [3, 9, 10], mode, strands)


def late(rank: int, seam: int, stage: str) -> None:
    """Each rank is late in its own way."""
    if (seam * 7 + rank * 3 + len(stage)) % 5 == 0:
        time.sleep(0.001 * (rank + 1))


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_cut_gives_the_same_bits_on_every_rank(
    small: Callable[..., Path], ranks: int, dtype: torch.dtype
) -> None:
    folder = small()
    with open_alone(folder, BEST, dtype, seed=3) as alone:
        wanted = [alone(step) for step in steps(Mode.FUSED, 14)]
    with open_group(folder, BEST, ranks, dtype, seed=3, pause=late) as group:
        bits: torch.Tensor | None = None
        cuts = [(14,), *((cut, 14 - cut) for cut in range(1, 14)), (1, 1, 12), (4, 5, 5), (2, 9, 1, 2)]
        for mode, strands in [(Mode.FUSED, (14,)), (Mode.PLAIN, (14,)), *((Mode.WOVEN, cut) for cut in cuts)]:
            results = [group.run(step) for step in steps(mode, *strands)]
            for result, want in zip(results, wanted, strict=True):
                assert all(torch.equal(result[0], other) for other in result[1:]), (mode, strands)
                close = 1e-4 if dtype is torch.float32 else 0.03
                torch.testing.assert_close(result[0], want, atol=close, rtol=close)
            bits = results[1][0] if bits is None else bits
            assert torch.equal(bits, results[1][0]), (mode, strands)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
        {"attention_bias": True, "mlp_bias": True},
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ],
    ids=["tied, grouped heads", "biases", "windows, norms of q and k"],
)
@pytest.mark.parametrize("kernels", sorted({BEST, "reference"}))
def test_models_of_every_kind(small: Callable[..., Path], changes: dict[str, Any], kernels: str) -> None:
    folder = small(**changes)
    with (
        open_alone(folder, kernels, torch.float32, seed=5) as alone,
        open_group(folder, kernels, 2, torch.float32, seed=5) as group,
    ):
        for step in steps(Mode.WOVEN, 7, 7):
            result = group.run(step)
            assert torch.equal(*result)
            torch.testing.assert_close(result[0], alone(step), atol=1e-4, rtol=1e-4)


def test_a_step_that_is_wanted_whole_and_one_of_which_nothing_is(small: Callable[..., Path]) -> None:
    folder = small()
    with open_group(folder, BEST, 2, torch.float32, seed=3) as group:
        first, (slices, rows, _, _) = steps(Mode.WOVEN, 7, 7)
        group.run(first)
        wanted = group.run((slices, rows, Mode.WOVEN, (7, 7)))
        whole = group.run((slices, rows, Mode.WOVEN, (7, 7)), whole=True)
        assert torch.equal(*whole) and torch.equal(whole[0][rows], wanted[0])
        assert [result.shape for result in group.run((slices, [], Mode.WOVEN, (7, 7)))] == [(0, 131)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", ["auto", "int4"])
def test_four_bits_and_a_quantised_gather(
    tmp_path: Path, write_fmpq: Callable[..., None], dtype: torch.dtype, cache: str
) -> None:
    """Rows that travel as the next linear wants them are, bit for bit, rows that are quantised after they came."""
    write_fmpq(tmp_path, 8)
    with open_alone(tmp_path, BEST, dtype, cache=cache) as alone:
        wanted = [alone(step) for step in steps(Mode.FUSED, 14)]
    found = []
    for quantised_gather in (False, True):
        with open_group(tmp_path, BEST, 2, dtype, cache=cache, quantised_gather=quantised_gather) as group:
            for mode, strands in ((Mode.FUSED, (14,)), (Mode.WOVEN, (7, 7)), (Mode.WOVEN, (2, 9, 3))):
                results = [group.run(step) for step in steps(mode, *strands)]
                found.append([result[0] for result in results])
                assert all(torch.equal(*result) for result in results)
    for results in found:
        assert all(torch.equal(*pair) for pair in zip(results, found[0], strict=True))
        for result, want in zip(results, wanted, strict=True):
            assert (result - want).abs().mean() < 0.05 * want.std()
