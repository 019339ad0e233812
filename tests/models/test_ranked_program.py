"""A rank's step as a program gives what it gives call by call, bit for bit; ranks are threads that share memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weft.core.plan import Slice
from weft.errors import RankLost
from weft.ipc.ranks import new_name
from weft.kernels import LEVELS, available, open_kernels
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.loader import load_weights
from weft.models.ranked import Ranked
from weft.models.shard import Part, shard_config
from weft.weave.choice import Mode

BEST = available()[0]
BLOCK = 16
pytestmark = pytest.mark.skipif(BEST not in LEVELS, reason="the C++ extension is not built")
Step = tuple[Sequence[Slice], Sequence[int]]


@contextmanager
def open_ranks(
    folder: Path, ranks: int, dtype: torch.dtype, seed: int | None, timeout: float = 20.0, **last: Any
) -> Iterator[Any]:
    """Of each rank: a step call by call, and one by the program, in this order, on the same KV. last: what the last
    rank takes for the model's configuration."""
    from weft.models.ranked_program import record_ranked
    from weft.weave.shm import ShmCollective

    config, name = read_config(folder), new_name()
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(ranks))
        kernels = [open_kernels(BEST, (0,)) for _ in range(ranks)]

        def open_rank(rank: int) -> tuple[Any, Any, Ranked, Ranked]:
            own: Any = kernels[rank]
            part = Part(rank, ranks)
            weights = load_weights(folder, config, own, dtype, dummy_seed=seed, part=part)
            changes = last if rank == ranks - 1 else {}
            decoder = Decoder(replace(shard_config(config, part), **changes), weights, own, 128)
            collective = ShmCollective(name, rank, ranks, own, timeout=timeout, spin=False)
            kv = decoder.make_kv(12, BLOCK)
            program = record_ranked(decoder, own, collective, kv, BLOCK, 64)

            def choose(slices: Sequence[Slice]) -> tuple[Mode, tuple[int, ...]]:
                return Mode.FUSED, (sum(len(piece.tokens) for piece in slices),)

            plain = Ranked(decoder, kv, BLOCK, {Mode.FUSED: collective}, choose)
            recorded = Ranked(decoder, kv, BLOCK, {Mode.FUSED: collective}, choose, program=program)
            return collective, program, plain, recorded

        opened = list(pool.map(open_rank, range(ranks)))
        for own in kernels:
            stack.callback(own.close)
        for collective, *_ in opened:
            stack.callback(collective.close)

        def run(step: Step) -> list[list[torch.Tensor]]:
            def one(rank: int) -> list[torch.Tensor]:
                torch.set_num_threads(1)
                found = []
                for forward in opened[rank][2:]:
                    best = forward.run(*step)
                    logits = torch.from_numpy(forward.logits().copy())
                    assert [token for token, _ in best] == logits.argmax(1).tolist()
                    found.append(logits)
                return found

            return list(pool.map(one, range(ranks)))

        yield run, opened


def tokens(count: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(131) for _ in range(count))


STEPS: tuple[Step, ...] = (
    ([Slice(1, 0, tokens(5, 1), (3,)), Slice(2, 0, tokens(17, 2), (7, 1))], [21]),
    (
        [Slice(1, 5, tokens(4, 3), (3,)), Slice(3, 0, tokens(6, 4), (0,)), Slice(2, 17, tokens(1, 5), (7, 1))],
        [3, 9, 10],
    ),
    ([Slice(2, 18, tokens(1, 6), (7, 1))], [0]),
    ([Slice(4, 0, tokens(9, 7), (5,))], []),
    ([Slice(4, 9, tokens(70, 8), (5, 8, 9, 10, 11))], [69]),  # more than the program takes
)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_program_gives_the_bits_of_its_calls(small: Callable[..., Path], ranks: int, dtype: torch.dtype) -> None:
    """Steps with fewer rows than ranks, with none that is wanted, and with too many tokens, one after the other."""
    with open_ranks(small(), ranks, dtype, seed=3) as (run, _):
        for step in STEPS:
            found = run(step)
            for plain, recorded in found:
                assert torch.equal(plain, recorded) and torch.equal(plain, found[0][0])


def test_four_bit_weights(tmp_path: Path, write_fmpq: Callable[..., None]) -> None:
    write_fmpq(tmp_path, 8)
    with open_ranks(tmp_path, 2, torch.bfloat16, seed=None) as (run, _):
        for step in STEPS:
            assert all(torch.equal(*pair) for pair in run(step))


def test_no_rank_waits_for_another_at_the_first_norm(tmp_path: Path, write_fmpq: Callable[..., None]) -> None:
    """Which is quantised in one pass, since all rows are there. A run has two seams for each layer."""
    from weft.kernels.record import Embed, MakeAndQuantise, Meet, Multiply, Norm, OwnRows

    write_fmpq(tmp_path, 8)
    with open_ranks(tmp_path, 2, torch.bfloat16, seed=None, timeout=0.5) as (_, opened):
        (compared, program), (other, theirs) = (opened[rank][:2] for rank in range(2))
        kinds = [type(operation) for operation, _ in program._program.timings()]
        assert kinds[:4] == [Embed, OwnRows, MakeAndQuantise, Multiply]
        assert kinds.count(Meet) == 2 * 2 and Norm not in kinds
        step = [Slice(1, 0, tokens(5, 1), (3,))], [4]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda one: one.run(*step), (program, theirs)))
        other.close()
        with pytest.raises(RankLost, match=rf"^seam {1 + 2 * 2 + 1}: rank 1"):  # the first is in which they compared
            compared.gather(torch.zeros(1))


def test_a_rank_that_does_not_come_is_named(small: Callable[..., Path]) -> None:
    with open_ranks(small(), 2, torch.float32, seed=3, timeout=0.5) as (_, opened):
        program = opened[0][1]
        with pytest.raises(RankLost, match=r"rank 1 .*did not come within 0\.5 s"):
            program.run([Slice(1, 0, tokens(5, 1), (3,))], [4])
        with pytest.raises(ValueError, match="ascending"):
            opened[1][1].run([Slice(1, 0, tokens(5, 1), (3,))], [4, 2])


@pytest.mark.parametrize("quantised", [False, True])
def test_the_time_of_the_layers_is_that_between_the_embeddings_norm_and_the_last_seam(quantised: bool) -> None:
    """Of the run alone, not of those before it; the embedding and the output layer are none of it."""
    from weft.kernels.record import MakeAndQuantise, Meet, Norm
    from weft.models.ranked_program import RankedProgram

    class Program:
        seconds: Any = (0.5,) * 8  # of a run that was timed before
        timed = False

        def run(self, _slices: Any, _rows: Any) -> None:
            if self.timed:
                self.seconds = tuple(before + 2**at for at, before in enumerate(self.seconds))

        def logits(self) -> Any:
            return np.zeros((1, 1), np.float32)

        def timings(self) -> list[tuple[Any, float]]:
            seam: Any = Meet(None, None, None, None, 0.0, None)  # type: ignore[arg-type]
            norm: Any = Norm(None, None, None, 0.0, None)  # type: ignore[arg-type]
            feed: Any = MakeAndQuantise(None, None)  # type: ignore[arg-type]
            first = MakeAndQuantise(norm, None) if quantised else norm  # type: ignore[arg-type]
            operations = ("embed", "own rows", first, "attend", seam, feed, seam, "logits")
            return list(zip(operations, self.seconds, strict=True))

    fake: Any = Program()
    program = RankedProgram(fake, 64)
    for _ in range(2):
        assert program.layers([], range(3)) == 8 + 16 + 32 + 64
        assert not fake.timed


def test_seams_that_differ_are_refused_before_the_first_step(small: Callable[..., Path]) -> None:
    with (
        pytest.raises(RankLost, match=r"rank 1 .*another plan"),
        open_ranks(small(), 2, torch.float32, seed=3, eps=1e-6),
    ):
        pass
