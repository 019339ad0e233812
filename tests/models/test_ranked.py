"""Ranks that weave, fuse or do neither give the same bits as each other, and the logits of one rank.

Here the ranks are threads of one process, each with kernels, weights and KV of its own. They are joined in plain torch,
or as they are when served: through shared memory or sockets, woven seams by a communication thread.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.weave.local import Threads

from weft.core.plan import Slice
from weft.ipc.ranks import new_name
from weft.kernels import LEVELS, available, open_kernels
from weft.kernels.base import Kernels
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.forward import Plain
from weft.models.layers import Layer
from weft.models.loader import load_weights
from weft.models.ranked import Ranked, cut_step
from weft.models.shard import Part, shard_config
from weft.weave.choice import COLLECTIVES, Mode
from weft.weave.collective import Collective, Join, Joined, Quantise
from weft.weave.rows import plain
from weft.weave.seam import Strand, onward
from weft.weave.weaver import Weaver

BEST = available()[0]
pytestmark = pytest.mark.skipif(BEST not in LEVELS, reason="the C++ extension is not built")


BLOCK = 16
Pause = Callable[[int, int, str], None]
Format = Callable[[Any], Quantise | None]
Step = tuple[Sequence[Slice], Sequence[int], Mode, Sequence[int]]  # the last: tokens of each strand


ON_ALL_KERNELS = pytest.mark.parametrize(
    ("kernels", "dtype", "backend"),
    [
        (BEST, torch.float32, "threads"),
        ("reference", torch.float32, "threads"),
        (BEST, torch.bfloat16, "shm"),
        (BEST, torch.bfloat16, "sockets"),
    ],
)
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": 33,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "qwen2 with a shared expert": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 50,
        "shared_expert_intermediate_size": 70,
    },
    "qwen3": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 7,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 34,
        "norm_topk_prob": True,
    },
}


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
        parts = self._inner.gather(pending.partial)
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
    exact_a4: bool = False,
    backend: str = "threads",
    pause: Pause | None = None,
    quantised_gather: bool = False,
) -> Iterator[Group]:
    """seed: of random weights; None for the folder's own. name: of the kernels. backend: threads, shm or sockets."""
    config = read_config(folder)
    plans: list[tuple[Mode, tuple[int, ...]]] = []
    with ExitStack() as stack:
        kernels = [open_kernels(name, (0,), exact_a4=exact_a4) for _ in range(ranks)]
        for own in kernels:
            stack.callback(own.close)
        joined = joined_by_threads(kernels, pause) if backend == "threads" else joined_as_served(backend, kernels)
        forwards = []
        for rank, (own, modes) in enumerate(zip(kernels, joined, strict=True)):
            for collective in modes.values():
                stack.callback(collective.close)
            part = Part(rank, ranks)
            weights = load_weights(folder, config, own, dtype, dummy_seed=seed, part=part)
            decoder = Decoder(shard_config(config, part), weights, own, 128)
            kv = decoder.make_kv(blocks, BLOCK, cache)
            formats = _format(own) if quantised_gather else _no_format
            forwards.append(Ranked(decoder, kv, BLOCK, modes, lambda _slices: plans[0], formats))
        yield Group(forwards, plans)


def joined_by_threads(kernels: Sequence[Kernels], pause: Pause | None) -> list[dict[Mode, Collective]]:
    options: dict[str, Any] = {} if pause is None else {"pause": pause}
    threads = Threads(len(kernels), plain(kernels[0].rms_norm), **options).collectives()
    return [
        {Mode.FUSED: collective, Mode.WOVEN: collective, Mode.PLAIN: AllRows(collective, own)}
        for own, collective in zip(kernels, threads, strict=True)
    ]


def joined_as_served(backend: str, kernels: Sequence[Any]) -> list[dict[Mode, Collective]]:
    """There is no plain mode without sockets."""
    from weft.kernels.cpu import CpuKernels
    from weft.kernels.wire import FusedRows
    from weft.weave.distributed import AllReduceCollective, connect
    from weft.weave.native import NativeBackground, NativeCollective
    from weft.weave.shm import ShmCollective
    from weft.weave.sockets import open_sockets

    ranks, names = len(kernels), {mode: new_name() for mode in COLLECTIVES}
    met: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]

    def store(mode: Mode) -> Any:
        return torch.distributed.PrefixStore(names[mode], met)  # type: ignore[attr-defined]

    def native(rank: int, mode: Mode, own: CpuKernels) -> NativeCollective:
        if backend == "shm":
            return ShmCollective(names[mode], rank, ranks, own, timeout=20.0, spin=0.0)
        return open_sockets(store(mode), rank, ranks, own, timeout=20.0)

    def one(rank: int) -> dict[Mode, Collective]:
        own = kernels[rank]
        aside = CpuKernels(own.name, (0,), exact_a4=own.exact_a4)
        modes: dict[Mode, Collective] = {
            Mode.FUSED: native(rank, Mode.FUSED, own),
            Mode.WOVEN: NativeBackground(native(rank, Mode.WOVEN, aside)),
        }
        if backend == "sockets":
            modes[Mode.PLAIN] = AllReduceCollective(
                connect(store(Mode.PLAIN), rank, ranks, timeout=20.0), FusedRows(own)
            )
        return modes

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


@contextmanager
def open_alone(
    folder: Path,
    name: str,
    dtype: torch.dtype,
    *,
    seed: int | None = None,
    blocks: int = 12,
    cache: str = "auto",
    exact_a4: bool = False,
) -> Iterator[Callable[[Step], torch.Tensor]]:
    """One rank, by the forward pass that knows nothing of others."""
    config, kernels = read_config(folder), open_kernels(name, (0,), exact_a4=exact_a4)
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


@pytest.mark.parametrize(
    ("backend", "ranks"), [("threads", 2), ("threads", 3), ("threads", 4), ("shm", 2), ("shm", 3), ("sockets", 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_cut_gives_the_same_bits_on_every_rank(
    small: Callable[..., Path], backend: str, ranks: int, dtype: torch.dtype
) -> None:
    """But for the bits of a real all-reduce, which has its own order."""
    folder = small()
    with open_alone(folder, BEST, dtype, seed=3) as alone:
        wanted = [alone(step) for step in steps(Mode.FUSED, 14)]
    with open_group(folder, BEST, ranks, dtype, seed=3, backend=backend, pause=late) as group:
        bits: torch.Tensor | None = None
        cuts = [(14,), *((cut, 14 - cut) for cut in range(1, 14)), (1, 1, 12), (4, 5, 5), (2, 9, 1, 2)]
        for mode, strands in [(Mode.FUSED, (14,)), (Mode.PLAIN, (14,)), *((Mode.WOVEN, cut) for cut in cuts)]:
            if (mode, backend) == (Mode.PLAIN, "shm"):
                continue
            results = [group.run(step) for step in steps(mode, *strands)]
            for result, want in zip(results, wanted, strict=True):
                assert all(torch.equal(result[0], other) for other in result[1:]), (mode, strands)
                close = 1e-4 if dtype is torch.float32 else 0.03
                torch.testing.assert_close(result[0], want, atol=close, rtol=close)
            bits = results[1][0] if bits is None else bits
            if (mode, backend) != (Mode.PLAIN, "sockets"):
                assert torch.equal(bits, results[1][0]), (mode, strands)


@pytest.mark.parametrize("mode", [Mode.FUSED, Mode.PLAIN])
def test_a_woven_prompt_goes_on_in_other_ways(small: Callable[..., Path], mode: Mode) -> None:
    """As where steps of the prefill lane are woven and those of the decode lane are not."""
    folder, (first, second) = small(), steps(mode, 14)
    with (
        open_alone(folder, BEST, torch.float32, seed=3) as alone,
        open_group(folder, BEST, 2, torch.float32, seed=3, backend="sockets") as group,
    ):
        for step in ((*first[:2], Mode.WOVEN, (9, 13)), second, (*first[:2], Mode.WOVEN, (7, 8, 7)), second):
            result = group.run(step)
            assert torch.equal(*result)
            torch.testing.assert_close(result[0], alone(step), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
        {"attention_bias": True, "mlp_bias": True},
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5},
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ],
    ids=["tied, grouped heads", "biases", "mistral", "qwen2", "windows, norms of q and k"],
)
@ON_ALL_KERNELS
def test_models_of_every_kind(
    small: Callable[..., Path], changes: dict[str, Any], kernels: str, dtype: torch.dtype, backend: str
) -> None:
    folder, close = small(**changes), 1e-4 if dtype is torch.float32 else 0.03
    with (
        open_alone(folder, kernels, dtype, seed=5) as alone,
        open_group(folder, kernels, 2, dtype, seed=5, backend=backend) as group,
    ):
        for step in steps(Mode.WOVEN, 7, 7):
            result = group.run(step)
            assert torch.equal(*result)
            torch.testing.assert_close(result[0], alone(step), atol=close, rtol=close)


@pytest.mark.parametrize("changes", MIXTURES.values(), ids=MIXTURES)
@ON_ALL_KERNELS
def test_strands_may_rejoin_at_experts(
    small: Callable[..., Path],
    changes: dict[str, Any],
    kernels: str,
    dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether they do changes no bit; nor do ranks change which experts are taken."""
    folder, found, taken = small(**changes), [], list[int]()
    feed = Layer.feed

    def counted(self: Layer, hidden: Any) -> torch.Tensor:
        taken.append(len(hidden))
        return feed(self, hidden)

    monkeypatch.setattr(Layer, "feed", counted)
    with open_alone(folder, kernels, dtype, seed=5) as alone:
        wanted = [alone(step) for step in steps(Mode.FUSED, 14)]
    ways = [
        (Mode.FUSED, (14,)),
        (Mode.WOVEN, (7, 7)),
        *((Mode.REJOINED, cut) for cut in ((7, 7), (4, 5, 5), (1, 1, 12))),
    ]
    with open_group(folder, kernels, 2, dtype, seed=5, backend=backend, pause=late) as group:
        for mode, strands in ways:
            first, second = steps(mode, *strands)
            results = [group.run(first)]
            taken.clear()
            results.append(group.run(second))
            assert all(torch.equal(*result) for result in results), (mode, strands)
            calls = 1 if mode is Mode.REJOINED else len(strands)
            assert len(taken) == 2 * 2 * calls and sum(taken) == 2 * (14 + 3), "of two layers and two ranks; 3 are kept"
            found.append([result[0] for result in results])
    for results in found:
        for result, first, want in zip(results, found[0], wanted, strict=True):
            if kernels == BEST:  # whose rows do not depend on one another
                assert torch.equal(result, first)
            close = 1e-4 if dtype is torch.float32 else 0.03
            torch.testing.assert_close(result, want, atol=close, rtol=close)


def test_a_step_that_is_wanted_whole_and_one_of_which_nothing_is(small: Callable[..., Path]) -> None:
    folder = small()
    with open_group(folder, BEST, 2, torch.float32, seed=3) as group:
        first, (slices, rows, _, _) = steps(Mode.WOVEN, 7, 7)
        group.run(first)
        wanted = group.run((slices, rows, Mode.WOVEN, (7, 7)))
        whole = group.run((slices, rows, Mode.WOVEN, (7, 7)), whole=True)
        assert torch.equal(*whole) and torch.equal(whole[0][rows], wanted[0])
        assert [result.shape for result in group.run((slices, [], Mode.WOVEN, (7, 7)))] == [(0, 131)] * 2


@pytest.mark.parametrize(
    ("backend", "ranks", "dtype", "cache", "exact_a4"),
    [
        ("threads", 2, torch.float32, "auto", False),
        ("threads", 2, torch.bfloat16, "int4", True),
        ("shm", 2, torch.bfloat16, "auto", False),
        ("shm", 4, torch.float32, "int8", True),
        ("sockets", 2, torch.float32, "int4", False),
        ("sockets", 3, torch.bfloat16, "int4", True),
    ],
)
def test_four_bits_and_a_quantised_gather(
    tmp_path: Path,
    write_fmpq: Callable[..., None],
    backend: str,
    ranks: int,
    dtype: torch.dtype,
    cache: str,
    exact_a4: bool,
) -> None:
    """Rows that travel as the next linear wants them are, bit for bit, rows that are quantised after they came."""
    options: Any = {"cache": cache, "exact_a4": exact_a4}
    heads = {2: 8, 3: 6, 4: 8}[ranks]
    far = 0.01 if dtype is torch.float32 else 0.2 if exact_a4 else 0.05
    write_fmpq(tmp_path, 8, num_attention_heads=heads, num_key_value_heads=ranks)
    with open_alone(tmp_path, BEST, dtype, **options) as alone:
        wanted = [alone(step) for step in steps(Mode.FUSED, 14)]
    found = []
    for quantised_gather in (False, True):
        with open_group(
            tmp_path, BEST, ranks, dtype, backend=backend, quantised_gather=quantised_gather, **options
        ) as group:
            for mode, strands in ((Mode.FUSED, (14,)), (Mode.WOVEN, (7, 7)), (Mode.WOVEN, (2, 9, 3))):
                results = [group.run(step) for step in steps(mode, *strands)]
                found.append([result[0] for result in results])
                assert all(torch.equal(result[0], other) for result in results for other in result[1:])
    for results in found:
        assert all(torch.equal(*pair) for pair in zip(results, found[0], strict=True))
        for result, want in zip(results, wanted, strict=True):
            assert (result - want).abs().mean() < far * want.std()


@dataclass
class Member:
    """A rank of a model of four bits: its kernels, its decoder, and its keys and values."""

    kernels: Any
    decoder: Decoder
    kv: list[Any]

    def strands(self, *lengths: int) -> list[Strand]:
        """Of a prompt, all of whose rows are wanted."""
        prompt = Slice(0, 0, tokens(sum(lengths), 9), (0, 1))
        cut = cut_step([prompt], [], lengths)
        return [self.decoder.strand(make_batch(own, BLOCK), self.kv) for own, _ in cut]


@contextmanager
def members(folder: Path, ranks: int) -> Iterator[list[Member]]:
    config = read_config(folder)
    with ExitStack() as stack:
        found = []
        for rank in range(ranks):
            own, part = open_kernels(BEST, (0,)), Part(rank, ranks)
            stack.callback(own.close)
            decoder = Decoder(
                shard_config(config, part), load_weights(folder, config, own, torch.bfloat16, part=part), own, 128
            )
            found.append(Member(own, decoder, decoder.make_kv(2, BLOCK)))
        yield found


class Noted:
    """A collective whose joins are written down, with the residual as it was before the seam."""

    def __init__(self, inner: Collective) -> None:
        self.rank, self.ranks, self.owned = inner.rank, inner.ranks, inner.owned
        self.finish, self.gather, self.close = inner.finish, inner.gather, inner.close
        self.joins: list[Join] = []
        self._start = inner.start

    def start(self, join: Join) -> Any:
        self.joins.append(replace(join, residual=join.residual.clone()))
        return self._start(join)


@pytest.mark.parametrize("mode", [Mode.FUSED, Mode.PLAIN])
@pytest.mark.parametrize("lengths", [(9,), (4, 5)])
def test_the_embedding_is_not_exchanged(
    tmp_path: Path,
    write_fmpq: Callable[..., None],
    mode: Mode,
    lengths: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each strand has two seams for each layer. What a rank has before them is what one rank has: all hidden rows, made
    for the linear that reads them; of the residual it has the rows that it owns."""
    write_fmpq(tmp_path, 8)
    with members(tmp_path, 2) as ranks, torch.inference_mode():
        joined = joined_by_threads([one.kernels for one in ranks], None)
        noted = [Noted(modes[mode]) for modes in joined]

        def run(rank: int) -> list[Any]:
            torch.set_num_threads(1)
            own, readers = ranks[rank], []
            norm = own.kernels.rms_norm

            def seen(x: torch.Tensor, weight: torch.Tensor, eps: float, reader: Any = None) -> Any:
                readers.append(reader)
                return norm(x, weight, eps, reader)

            monkeypatch.setattr(own.kernels, "rms_norm", seen)
            with torch.inference_mode():
                Weaver(noted[rank], own.decoder.join).weave(own.strands(*lengths))
            return readers

        with ThreadPoolExecutor(2) as pool:
            readers = list(pool.map(run, range(2)))
        for one, collective, asked in zip(ranks, noted, readers, strict=True):
            assert len(collective.joins) == 2 * 2 * len(lengths)
            assert len(asked) == len(lengths)
            for join, strand, reader in zip(collective.joins, one.strands(*lengths), asked, strict=False):
                first = onward(strand)
                assert reader is first.reader is not None
                assert torch.equal(join.residual, first.partial[slice(*collective.owned(join.bounds))])
                assert torch.equal(join.partial, onward(strand, one.decoder.join(first)).partial)


def pumped(counts: list[int]) -> tuple[list[int], list[threading.Thread]]:
    """The ends of a connection between two ranks, and what carries and counts the bytes that each of them sends."""
    (first, ours), (theirs, second) = socket.socketpair(), socket.socketpair()

    def carry(rank: int, source: socket.socket, sink: socket.socket) -> None:
        with source:
            while data := source.recv(1 << 16):
                counts[rank] += len(data)
                sink.sendall(data)

    ends = ((ours, theirs), (theirs, ours))
    threads = [threading.Thread(target=carry, args=(rank, *pair)) for rank, pair in enumerate(ends)]
    for thread in threads:
        thread.start()
    return [first.detach(), second.detach()], threads


@pytest.mark.parametrize("quantised", [False, True])
def test_a_step_sends_the_rows_of_its_seams_and_no_other(
    tmp_path: Path, write_fmpq: Callable[..., None], quantised: bool
) -> None:
    """To the byte: a head for each seam, the partial sums of the other's rows, and the joined rows of one's own."""
    from weft import _native
    from weft.weave.native import NativeCollective

    write_fmpq(tmp_path, 8)
    counts, head, row = [0, 0], 16, 256 * torch.bfloat16.itemsize
    files, threads = pumped(counts)
    with members(tmp_path, 2) as ranks:

        def run(rank: int) -> None:
            torch.set_num_threads(1)
            own = ranks[rank]
            collective = NativeCollective(_native.Links(rank, [files[rank]] * 2, 20.0), own.kernels)
            formats = _format(own.kernels) if quantised else _no_format
            with torch.inference_mode():
                Weaver(collective, own.decoder.join, formats).weave(own.strands(9))
            collective.gather(torch.zeros(0))  # nobody leaves before the other has everything
            collective.close()

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, range(2)))
    for thread in threads:
        thread.join(10)
    joined = 256 + 2 * 4 if quantised else row  # integers of 8 bits, and the scales of two blocks
    gathered = [joined, joined, joined, row]  # what follows the last layer is not quantised
    for sent, own in zip(counts, (4, 5), strict=True):
        assert sent == head + sum(head + (9 - own) * row + own * one for one in gathered)
