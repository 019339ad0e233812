"""Rotation, the paged KV and attention, at every level: against the reference, and that a row's bits are its own."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weft.core.plan import Slice
from weft.kernels.base import Batch, Kernels
from weft.kernels.reference import ReferenceKernels
from weft.models.batch import make_batch

many = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31)
reference = ReferenceKernels((0,))
MAX_LENGTH = 700


@dataclass(frozen=True)
class Shape:
    """Of the attention of a model. spread: how far scores go apart. cache: of the KV."""

    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    window: int | None = None
    norms: bool = False
    spread: float = 1.0
    cache: str = "auto"

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


shapes = st.builds(
    Shape,
    kv_heads=st.integers(1, 3),
    group=st.one_of(st.integers(1, 8), st.just(20)),
    head_dim=st.sampled_from([8, 16, 24, 64, 72, 80, 96, 128, 256]),
    block_size=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.one_of(st.none(), st.integers(1, 20), st.integers(200, 400)),
    norms=st.booleans(),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
)
any_cache = shapes.flatmap(lambda shape: st.sampled_from([replace(shape, cache=c) for c in ("auto", "int8", "int4")]))
# Around a vector of positions (16), a unit of rows (18), a block, a partition (256) and two of them.
lengths = st.one_of(st.integers(1, 40), st.integers(250, 262), st.sampled_from([64, 128]))
sequences = st.lists(lengths, min_size=1, max_size=3)  # the examples are longer
SMALL = Shape(kv_heads=2, group=3, head_dim=16, block_size=16, dtype=torch.bfloat16)
LLAMA = Shape(kv_heads=1, group=8, head_dim=64, block_size=16, dtype=torch.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """The reference works on small tensors, and torch's threads wait for one another longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class Inputs:
    """What attention is computed from: qkv of each sequence, rotation tables and norm weights."""

    qkv: tuple[torch.Tensor, ...]
    cos: torch.Tensor
    sin: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


def make_inputs(shape: Shape, sequences: Sequence[int], seed: int) -> Inputs:
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    angles = torch.arange(max(*sequences, MAX_LENGTH))[:, None] * torch.logspace(0, -4, shape.head_dim // 2)
    norms = [normal(seed + i, shape.head_dim, dtype=shape.dtype) if shape.norms else None for i in (1, 2)]
    qkv = [normal(seed + 3 + i, length, width, dtype=shape.dtype) for i, length in enumerate(sequences)]
    for rows in qkv:
        rows[:, : shape.heads * shape.head_dim] *= shape.spread
    return Inputs(tuple(qkv), angles.cos(), angles.sin(), *norms)


def pool_size(shape: Shape, sequences: Sequence[int]) -> int:
    return sum(-(-length // shape.block_size) for length in sequences) + 1


def tables_of(shape: Shape, sequences: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    """Block tables in a random order of block numbers."""
    order = torch.randperm(pool_size(shape, sequences), generator=torch.Generator().manual_seed(seed)).tolist()
    return [tuple(order.pop() for _ in range(-(-length // shape.block_size))) for length in sequences]


def step(kernels: Kernels, shape: Shape, inputs: Inputs, kv: Any, slices: Sequence[Slice]) -> torch.Tensor:
    """Rows of attention for these slices, whose keys and values are written first."""
    batch = make_batch(slices, shape.block_size)
    qkv = torch.cat([inputs.qkv[s.sequence][s.start : s.start + len(s.tokens)] for s in slices])
    q = kernels.rotary_write(
        qkv,
        inputs.cos,
        inputs.sin,
        kv,
        batch,
        shape.heads,
        shape.kv_heads,
        inputs.q_norm,
        inputs.k_norm,
        1e-6,
    )
    return kernels.attention(q, kv, batch, shape.heads, shape.kv_heads, shape.head_dim**-0.5, shape.window)


def piece(sequence: int, start: int, end: int, table: tuple[int, ...]) -> Slice:
    return Slice(sequence, start, (0,) * (end - start), table, None)


def at_once(kernels: Kernels, shape: Shape, inputs: Inputs, seed: int = 0, kv: Any = None) -> list[torch.Tensor]:
    """Every sequence from its start, all in one step. Returns rows of each."""
    sequences = [len(rows) for rows in inputs.qkv]
    if kv is None:
        kv = make_kv(kernels, shape, pool_size(shape, sequences))
    tables = tables_of(shape, sequences, seed)
    slices = [piece(i, 0, length, table) for i, (length, table) in enumerate(zip(sequences, tables, strict=True))]
    return list(step(kernels, shape, inputs, kv, slices).split(sequences))


def make_kv(kernels: Kernels, shape: Shape, blocks: int, poisoned: bool = False) -> Any:
    kv = kernels.make_kv(blocks, shape.block_size, shape.kv_heads, shape.head_dim, shape.dtype, shape.cache)
    if poisoned:  # every float of it is NaN, every code and zero its largest
        ctypes.memset(kv.native.address, 0xFF, kv.native.bytes)
    return kv


def memory_of(kv: Any, shape: Shape, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values where they lie: [blocks, kv_heads, channels / P, slots, P] and [.., slots / P, width, P]."""
    pack, element = (2, 2) if shape.dtype is torch.bfloat16 else (1, 4)
    width = -(-shape.head_dim // 16) * 16
    memory = (ctypes.c_char * kv.native.bytes).from_address(kv.native.address)
    count = blocks * shape.kv_heads * shape.block_size * shape.head_dim
    assert kv.native.bytes == blocks * shape.kv_heads * shape.block_size * (shape.head_dim + width) * element
    keys = torch.frombuffer(memory, dtype=shape.dtype, count=count)
    values = torch.frombuffer(memory, dtype=shape.dtype, offset=count * element)
    return (
        keys.view(blocks, shape.kv_heads, shape.head_dim // pack, shape.block_size, pack),
        values.view(blocks, shape.kv_heads, shape.block_size // pack, width, pack),
    )


def unturned(shape: Shape, inputs: Inputs) -> Inputs:
    """Without rotation and norms, so that q, k and v are known to the bit."""
    ones = torch.ones(MAX_LENGTH, shape.head_dim // 2)
    return Inputs(inputs.qkv, ones, torch.zeros_like(ones), None, None)


@many
@given(shape=shapes, sequences=sequences, seed=seeds)
@example(shape=replace(LLAMA, spread=6.0), sequences=[600, 1, 300], seed=0)
@example(shape=replace(LLAMA, window=300), sequences=[600, 1, 300], seed=0)
def test_attention_is_the_references(backends: Any, shape: Shape, sequences: list[int], seed: int) -> None:
    """Float32 sums in another order err by some 1e-5 of `bound`, sum(weight * |value|); more where scores are large.
    In bfloat16 (2**-8) there is the rounding of the result, and that of each weight at the AVX-512 level, in both the
    sum of values and that of weights.
    """
    inputs = unturned(shape, make_inputs(shape, sequences, seed))
    wide = replace(shape, dtype=torch.float32)
    signed = Inputs(tuple(rows.float() for rows in inputs.qkv), inputs.cos, inputs.sin, None, None)
    values = shape.kv_heads * shape.head_dim
    sizes = [torch.cat((rows[:, :-values], rows[:, -values:].abs()), dim=1) for rows in signed.qkv]
    expected = at_once(reference, wide, signed)
    size = at_once(reference, wide, replace(signed, qkv=tuple(sizes)))
    for kernels in (backends.one, backends.two):
        for y, exact, bound in zip(at_once(kernels, shape, inputs, seed), expected, size, strict=True):
            assert y.dtype is shape.dtype
            error = (y.float() - exact).abs()
            allowed = 1e-5 * (1 + shape.spread) * bound
            if shape.dtype is torch.bfloat16:
                allowed += 2.0**-8 * (2 * exact.abs() + bound)
            assert (error <= allowed).all(), float((error - allowed).max())


@many
@given(shape=any_cache, sequences=sequences, seed=seeds, data=st.data())
@example(shape=replace(LLAMA, norms=True), sequences=[600, 20, 260], seed=0, data=None)
@example(shape=replace(SMALL, window=100, spread=6.0), sequences=[600], seed=0, data=None)
@example(shape=replace(LLAMA, norms=True, cache="int4"), sequences=[600, 20, 260], seed=0, data=None)
@example(shape=replace(SMALL, window=100, spread=6.0, cache="int8"), sequences=[600], seed=0, data=None)
def test_the_bits_of_a_row_are_its_own(
    backends: Any, shape: Shape, sequences: list[int], seed: int, data: st.DataObject | None
) -> None:
    """In one step, or chunk by chunk beside others, in a poisoned KV of other block numbers, on other threads."""
    inputs = make_inputs(shape, sequences, seed)
    expected = at_once(backends.two, shape, inputs)
    chunks = [cut(length, data) for length in sequences]
    kv = make_kv(backends.one, shape, pool_size(shape, sequences), poisoned=True)
    tables = tables_of(shape, sequences, seed + 1)
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    for turn in range(max(map(len, chunks))):
        slices = [piece(i, *parts[turn], tables[i]) for i, parts in enumerate(chunks) if turn < len(parts)]
        rows = step(backends.one, shape, inputs, kv, slices).split([len(s.tokens) for s in slices])
        for s, part in zip(slices, rows, strict=True):
            found[s.sequence].append(part)
    for parts, whole in zip(found, expected, strict=True):
        assert torch.equal(torch.cat(parts), whole)


def cut(length: int, data: st.DataObject | None) -> list[tuple[int, int]]:
    """[0, length) in chunks: a few long ones, then single rows at the end."""
    inner = st.lists(st.integers(1, max(1, length - 1)), max_size=3)
    bounds = {0, *(data.draw(inner) if data else [length // 3, length // 2]), *range(max(0, length - 3), length + 1)}
    return list(pairwise(sorted(bound for bound in bounds if bound <= length)))


@many
@given(shape=any_cache, seed=seeds, length=st.sampled_from([5, 40, 300]), data=st.data())
def test_nan_stays_with_the_rows_that_see_it(
    backends: Any, shape: Shape, seed: int, length: int, data: st.DataObject
) -> None:
    clean = make_inputs(shape, [length], seed)
    bad = data.draw(st.integers(0, length - 1))
    sick = clean.qkv[0].clone()
    sick[bad] = data.draw(st.sampled_from([torch.nan, torch.inf]))
    kv = make_kv(backends.two, shape, pool_size(shape, [length]), poisoned=True)
    (y,) = at_once(backends.two, shape, replace(clean, qkv=(sick,)), seed, kv)
    (expected,) = at_once(backends.one, shape, clean)
    reach = length if shape.window is None else min(length, bad + shape.window)
    assert torch.equal(y[:bad], expected[:bad]) and torch.equal(y[reach:], expected[reach:])
    assert y[bad:reach].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "cache"),
    [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "int4"), (torch.float32, "int8")],
)
@pytest.mark.parametrize("window", [None, 3000])
def test_a_long_context_is_split_over_the_threads_without_a_trace(
    backends: Any, dtype: torch.dtype, cache: str, window: int | None
) -> None:
    """Beside a short one, and long enough for every thread to take some of its partitions."""
    shape = Shape(kv_heads=2, group=4, head_dim=64, block_size=32, dtype=dtype, window=window, cache=cache)
    inputs = make_inputs(shape, [20000, 5], 0)
    outs = []
    for kernels in (backends.one, backends.two):
        kv = make_kv(kernels, shape, pool_size(shape, [20000, 5]))
        tables = tables_of(shape, [20000, 5], 0)
        for start in range(0, 19998, 3333):
            batch = make_batch([piece(0, start, start + 3333, tables[0])], shape.block_size)
            qkv = inputs.qkv[0][start : start + 3333]
            kernels.rotary_write(qkv, inputs.cos, inputs.sin, kv, batch, 8, 2, None, None, 1e-6)
        outs.append(step(kernels, shape, inputs, kv, [piece(1, 0, 5, tables[1]), piece(0, 19998, 20000, tables[0])]))
    assert torch.equal(*outs)
    if window is None:  # the short one, and the two last rows of the long one, of which all keys are seen
        (short,) = at_once(backends.one, shape, replace(inputs, qkv=inputs.qkv[1:]))
        assert torch.equal(outs[0][:5], short)


@many
@given(shape=shapes, sequences=sequences, seed=seeds)
def test_q_k_and_v_are_the_references_and_land_in_their_slots_alone(
    backends: Any, shape: Shape, sequences: list[int], seed: int
) -> None:
    """Rotated and normalised in float32, and rounded once: at most the last bit differs."""
    inputs, blocks = make_inputs(shape, sequences, seed), pool_size(shape, sequences)
    slices = [
        piece(i, n // 2, n, t)
        for i, (n, t) in enumerate(zip(sequences, tables_of(shape, sequences, seed), strict=True))
    ]
    batch = make_batch(slices, shape.block_size)
    qkv = torch.cat([inputs.qkv[s.sequence][s.start :] for s in slices])
    kv, plain = make_kv(backends.two, shape, blocks, poisoned=True), make_kv(reference, shape, blocks)
    plain.keys.fill_(torch.nan), plain.values.fill_(torch.nan)
    q, expected = (
        kernels.rotary_write(
            qkv,
            inputs.cos,
            inputs.sin,
            store,
            batch,
            shape.heads,
            shape.kv_heads,
            inputs.q_norm,
            inputs.k_norm,
            1e-6,
        )
        for kernels, store in ((backends.two, kv), (reference, plain))
    )
    keys, values = memory_of(kv, shape, blocks)
    keys = keys.permute(0, 3, 1, 2, 4).reshape(plain.keys.shape)
    values = values.permute(0, 2, 4, 1, 3).reshape(*plain.values.shape[:3], -1)[..., : shape.head_dim]
    bits = {"rtol": 2.0**-7, "atol": 1e-2} if shape.dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(q, expected, **bits)
    torch.testing.assert_close(keys, plain.keys, equal_nan=True, **bits)
    torch.testing.assert_close(values, plain.values, equal_nan=True, rtol=0, atol=0)


def small_step(kernels: Kernels, kv: Any, **changes: Any) -> torch.Tensor:
    batch = make_batch([piece(0, 30, 33, (1, 0, 2)), piece(1, 0, 1, (3,))], SMALL.block_size)
    batch = replace(batch, **{name: change(getattr(batch, name).clone()) for name, change in changes.items()})
    inputs = make_inputs(SMALL, [4], 0)
    q = kernels.rotary_write(inputs.qkv[0], inputs.cos, inputs.sin, kv, batch, 6, 2, None, None, 1e-6)
    return kernels.attention(q, kv, batch, 6, 2, 0.25)


def put(index: Any, value: int) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": put((0, 1), 4)}, "no block 4 in slice 0; the KV has 4"),
        ({"tables": put((1, 0), -1)}, "no block -1 in slice 1"),
        ({"slots": put(3, 64)}, "no slot 64 for row 3; the KV has 64"),
        ({"slots": put(0, -1)}, "no slot -1 for row 0"),
        ({"positions": put(2, MAX_LENGTH)}, "row 2 is at position 700; the rotary tables have 700"),
        ({"positions": put(2, -5)}, "row 2 is at position -5"),
        ({"contexts": put(0, 2)}, "3 rows with a context of 2 in slice 0"),
        ({"contexts": put(0, 49)}, "a context of 49 needs 4 blocks, the table has 3 in slice 0"),
        ({"contexts": put(0, -7)}, "3 rows with a context of -7"),
        ({"starts": put(1, 5)}, "-1 rows with a context of 1 in slice 1"),
        ({"starts": put(2, 5)}, "starts must go from 0 to the number of rows, 4"),
    ],
)
def test_a_batch_that_reaches_outside_of_the_kv_is_refused(
    backends: Any, changes: dict[str, Any], message: str
) -> None:
    kv = make_kv(backends.two, SMALL, 4)
    with pytest.raises(ValueError, match=message):
        small_step(backends.two, kv, **changes)
    assert small_step(backends.two, kv).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"slots": torch.Tensor.int}, TypeError, "slots is torch.int32"),
        ({"contexts": torch.Tensor.long}, TypeError, "contexts is torch.int64"),
        ({"tables": torch.Tensor.t}, ValueError, "tables must be contiguous"),
        ({"starts": lambda starts: starts[:-1].contiguous()}, ValueError, "starts must be"),
        ({"positions": lambda positions: positions[:-1].contiguous()}, ValueError, "must be contiguous"),
    ],
)
def test_a_batch_of_other_tensors_is_refused(backends: Any, changes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_step(backends.one, make_kv(backends.one, SMALL, 4), **changes)


def test_what_does_not_fit_the_kv_is_refused(backends: Any) -> None:
    kernels, kv = backends.one, make_kv(backends.one, SMALL, 4)
    batch: Batch = make_batch([piece(0, 0, 2, (0,))], 16)
    q = torch.ones(2, 96, dtype=torch.bfloat16)
    for call, error, message in (
        (lambda: kernels.attention(q.float(), kv, batch, 6, 2, 0.25), TypeError, "q is torch.float32"),
        (lambda: kernels.attention(q[:, :80].contiguous(), kv, batch, 6, 2, 0.25), ValueError, "q must be"),
        (lambda: kernels.attention(q, kv, batch, 6, 3, 0.25), ValueError, "the KV has 2"),
        (lambda: kernels.attention(q, kv, batch, 5, 2, 0.25), ValueError, "heads = 5 must be a multiple"),
        (lambda: kernels.attention(q, kv, batch, 6, 2, 0.0), ValueError, "scale = 0.0"),
        (lambda: kernels.attention(q, kv, batch, 6, 2, 0.25, 0), ValueError, "window = 0"),
        (lambda: kernels.attention(q, kv, replace(batch, block_size=32), 6, 2, 0.25), ValueError, "blocks of 32"),
        (lambda: kernels.make_kv(4, 20, 2, 16, torch.float32), ValueError, "multiple of 16"),
        (lambda: kernels.make_kv(4, 16, 2, 12, torch.float32), ValueError, "head_dim is 12"),
        (lambda: kernels.make_kv(4, 16, 2, 264, torch.float32), ValueError, "head_dim is 264"),
        (lambda: kernels.make_kv(4, 16, 2, 16, torch.float16), TypeError, "float16"),
    ):
        with pytest.raises(error, match=message):
            call()
