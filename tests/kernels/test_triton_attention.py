"""Rotation, KV write and attention in Triton, against the reference, and that a row's bits are its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weft.core.plan import Slice
from weft.kernels.base import Batch
from weft.kernels.kv import Codes
from weft.kernels.reference import ReferenceKernels
from weft.models.batch import make_batch

pytest.importorskip("triton", reason="triton is not installed")

from weft.kernels.triton_attention import attention
from weft.kernels.triton_kv import TritonKv, make_kv, token_bytes
from weft.kernels.triton_rotary import rotary_write
from weft.kernels.triton_tiles import ATTENTION, AttentionTile

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets, for NaN
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
reference = ReferenceKernels((0,))
few = settings(max_examples=6, deadline=None)
# Splits of 32 positions, so that short sequences have several.
SMALL = AttentionTile(tokens=16, split=32, prefill=(64, 4, 1), decode=(64, 4, 1), programs=3)
# Few rows, as GPUs have for keys and values in 8 and 4 bits.
LOW = replace(SMALL, prefill=(16, 1, 1), decode=(16, 1, 1))
INTERPRETER = ATTENTION[0]


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Shape:
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 32
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache: str = "auto"
    window: int | None = None
    norms: bool = False

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@dataclass(frozen=True)
class Inputs:
    """qkv of each sequence, rotation tables and norm weights."""

    qkv: tuple[torch.Tensor, ...]
    cos: torch.Tensor
    sin: torch.Tensor
    norm: torch.Tensor | None


def make_inputs(shape: Shape, lengths: Sequence[int], seed: int) -> Inputs:
    torch.manual_seed(seed)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    qkv = [torch.randn(length, width) for length in lengths]
    for rows in qkv:
        rows[:, seed % width] *= 8  # a channel of outliers
    angles = torch.arange(max(lengths))[:, None] * torch.logspace(0, -4, shape.head_dim // 2)
    norm = torch.randn(shape.head_dim).to(shape.dtype) if shape.norms else None
    return Inputs(tuple(rows.to(shape.dtype) for rows in qkv), angles.cos(), angles.sin(), norm)


def tables_of(shape: Shape, lengths: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    counts = [-(-length // shape.block_size) for length in lengths]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(seed)).tolist()
    return [tuple(order.pop() for _ in range(count)) for count in counts]


def kv_of(shape: Shape, lengths: Sequence[int], *, poisoned: bool = False) -> TritonKv:
    """poisoned: every float is NaN, every code and zero the largest."""
    blocks = sum(-(-length // shape.block_size) for length in lengths) + 1
    kv = make_kv(blocks, shape.block_size, shape.kv_heads, shape.head_dim, shape.dtype, shape.cache, DEVICE)
    if poisoned:
        for tensor in kv.tensors:
            if tensor is not None:
                tensor.view(torch.uint8).fill_(0xFF)
    return kv


def on_device(batch: Batch) -> Batch:
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: x.to(DEVICE) for name, x in tensors.items() if isinstance(x, torch.Tensor)})


def step(
    shape: Shape, inputs: Inputs, kv: TritonKv, slices: Sequence[Slice], tile: AttentionTile | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rotated queries, attention) of these slices, whose keys and values are written first."""
    batch = on_device(make_batch(slices, shape.block_size))
    qkv = torch.cat([inputs.qkv[s.sequence][s.start : s.end] for s in slices]).to(DEVICE)
    norm = None if inputs.norm is None else inputs.norm.to(DEVICE)
    tables = inputs.cos.to(DEVICE), inputs.sin.to(DEVICE)
    q = rotary_write(qkv, *tables, kv, batch, shape.heads, shape.kv_heads, norm, norm, 1e-6)
    scale = shape.head_dim**-0.5
    return q, attention(q, kv, batch, shape.heads, shape.kv_heads, scale, shape.window, tile=tile)


def piece(sequence: int, start: int, end: int, table: tuple[int, ...]) -> Slice:
    return Slice(sequence, start, (0,) * (end - start), table, None)


def stored(kv: TritonKv) -> list[torch.Tensor]:
    """Everything, as the reference has it: [blocks, block_size, kv_heads, ..]."""
    found = []
    for part in (kv.keys, kv.values):
        codes = part.codes.cpu().transpose(1, 2)
        found.append(torch.cat((codes & 15, codes >> 4), dim=-1) if kv.bits == 4 else codes)
        if part.numbers is not None:
            words = part.numbers.cpu().transpose(1, 2)
            found += [words.to(torch.int16), (words >> 16).to(torch.uint8)]
    return found


def stored_by_reference(kv: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for part in (kv.keys, kv.values):
        found += [part.codes, part.scales.view(torch.int16), part.zeros] if isinstance(part, Codes) else [part]
    return found


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Float32 sums in another order; in bfloat16 the result is rounded, and so are the weights of a GPU."""
    error = 1e-5 if dtype is torch.float32 else 2.0**-8
    bound = error * expected.float().abs().max().item()
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=2 * error, atol=2 * bound)


CASES = [
    Shape(norms=True),
    Shape(head_dim=80, group=1, block_size=20, window=9),
    Shape(dtype=torch.bfloat16, kv_heads=1, group=20, norms=True),
    Shape(cache="int8", head_dim=64, window=40),
    Shape(cache="int4", head_dim=128, kv_heads=1, group=4),
    Shape(cache="int4", dtype=torch.bfloat16, head_dim=32, group=2, norms=True, window=1),
    Shape(head_dim=16, kv_heads=1, group=2),
]


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_rotation_and_attention_are_the_references(shape: Shape) -> None:
    lengths = [70, 5, 1]
    inputs, tables = make_inputs(shape, lengths, 3), tables_of(shape, lengths, 4)
    slices = [piece(i, 0, length, table) for i, (length, table) in enumerate(zip(lengths, tables, strict=True))]
    batch = make_batch(slices, shape.block_size)
    kv = kv_of(shape, lengths)
    q, mixed = step(shape, inputs, kv, slices, SMALL if shape.head_dim < 64 else None)
    blocks = kv.keys.codes.shape[0]
    truth = reference.make_kv(blocks, shape.block_size, shape.kv_heads, shape.head_dim, shape.dtype, shape.cache)
    qkv, norm = torch.cat(inputs.qkv), inputs.norm
    heads, kv_heads = shape.heads, shape.kv_heads
    turned = reference.rotary_write(qkv, inputs.cos, inputs.sin, truth, batch, heads, kv_heads, norm, norm, 1e-6)
    if shape.norms:  # the norm's sum is taken in another order, so that the last bit may differ
        torch.testing.assert_close(q.cpu(), turned, rtol=4 * torch.finfo(shape.dtype).eps, atol=1e-5)
    else:
        assert torch.equal(q.cpu(), turned)
        for found, expected in zip(stored(kv), stored_by_reference(truth), strict=True):
            assert torch.equal(found, expected)
    scale = shape.head_dim**-0.5
    expected = reference.attention(turned, truth, batch, heads, kv_heads, scale, shape.window)
    close(mixed, expected, shape.dtype)


def in_one_step(shape: Shape, inputs: Inputs, tile: AttentionTile | None) -> list[torch.Tensor]:
    lengths = [len(rows) for rows in inputs.qkv]
    tables = tables_of(shape, lengths, 0)
    slices = [piece(i, 0, length, table) for i, (length, table) in enumerate(zip(lengths, tables, strict=True))]
    return list(step(shape, inputs, kv_of(shape, lengths), slices, tile)[1].split(lengths))


@few
@given(
    shape=st.builds(
        Shape,
        kv_heads=st.integers(1, 2),
        group=st.sampled_from([1, 3, 4]),
        cache=st.sampled_from(["auto", "int8", "int4"]),
        window=st.sampled_from([None, 1, 20, 50]),
        norms=st.booleans(),
    ),
    length=st.integers(36, 110),
    cut=st.integers(1, 33),
    tile=st.sampled_from([SMALL, LOW]),
    seed=st.integers(0, 2**31),
)
@example(shape=Shape(head_dim=16), length=97, cut=31, tile=SMALL, seed=0)
@example(shape=Shape(cache="int4", window=50), length=97, cut=31, tile=SMALL, seed=0)
@example(shape=Shape(cache="int4", group=4), length=97, cut=31, tile=LOW, seed=0)
def test_the_bits_of_a_row_are_its_own(shape: Shape, length: int, cut: int, tile: AttentionTile, seed: int) -> None:
    """A prompt at once; or in chunks beside others, its last rows by decode, in a poisoned KV of other blocks."""
    lengths = [length, 40]
    inputs = make_inputs(shape, lengths, seed)
    expected = in_one_step(shape, Inputs(inputs.qkv[:1], *(inputs.cos, inputs.sin, inputs.norm)), tile)[0]
    kv, tables = kv_of(shape, lengths, poisoned=True), tables_of(shape, lengths, seed)
    first, second = tables
    steps = [
        [piece(1, 0, 38, second)],
        [piece(0, 0, cut, first)],
        [piece(1, 38, 39, second), piece(0, cut, length - 2, first)],
        [piece(0, length - 2, length - 1, first), piece(1, 39, 40, second)],
        [piece(0, length - 1, length, first)],
    ]
    found = []
    for slices in steps:
        rows = step(shape, inputs, kv, slices, tile)[1].split([len(s.tokens) for s in slices])
        found += [part for s, part in zip(slices, rows, strict=True) if s.sequence == 0]
    assert torch.equal(torch.cat(found), expected)


def test_a_long_context_crosses_the_splits_of_the_tiles_in_use() -> None:
    shape = Shape(kv_heads=1, group=2, head_dim=32)
    inputs = make_inputs(shape, [INTERPRETER.split * 2 + 9], 1)
    length = len(inputs.qkv[0])
    (table,) = tables_of(shape, [length], 0)
    kv = kv_of(shape, [length])
    step(shape, inputs, kv, [piece(0, 0, length - 2, table)], None)
    two = step(shape, inputs, kv, [piece(0, length - 2, length, table)], None)[1]
    one = step(shape, inputs, kv, [piece(0, length - 1, length, table)], None)[1]
    assert torch.equal(two[1:], one)
    qkv = inputs.qkv[0]
    truth = reference.make_kv(kv.keys.codes.shape[0], 16, 1, 32, torch.float32)
    batch = make_batch([piece(0, 0, length, table)], 16)
    q = reference.rotary_write(qkv, inputs.cos, inputs.sin, truth, batch, 2, 1, None, None, 1e-6)
    last = make_batch([piece(0, length - 2, length, table)], 16)
    close(two, reference.attention(q[-2:], truth, last, 2, 1, 32**-0.5), torch.float32)


def test_rows_of_padding_write_nothing_and_get_zeros() -> None:
    shape = Shape()
    inputs, tables = make_inputs(shape, [20, 20], 0), tables_of(shape, [20, 20], 0)
    kv = kv_of(shape, [20, 20])
    step(shape, inputs, kv, [piece(i, 0, 19, table) for i, table in enumerate(tables)], SMALL)
    before = [tensor.clone() for tensor in kv.tensors if tensor is not None]
    batch = on_device(make_batch([piece(i, 19, 20, table) for i, table in enumerate(tables)], 16))
    qkv = torch.stack([rows[19] for rows in inputs.qkv]).to(DEVICE)
    cos, sin = inputs.cos.to(DEVICE), inputs.sin.to(DEVICE)
    q = rotary_write(qkv, cos, sin, kv, batch, shape.heads, shape.kv_heads, None, None, 1e-6)
    whole = attention(q, kv, batch, shape.heads, shape.kv_heads, 0.2, tile=SMALL)
    for tensor, old in zip((t for t in kv.tensors if t is not None), before, strict=True):
        tensor.copy_(old)
    slots, contexts = batch.slots.clone(), batch.contexts.clone()
    slots[1], contexts[1] = -1, 0
    padded = replace(batch, slots=slots, contexts=contexts)
    assert torch.equal(rotary_write(qkv, cos, sin, kv, padded, shape.heads, shape.kv_heads, None, None, 1e-6), q)
    changed = sum(int((a != b).any(-1).sum()) for a, b in zip(kv.tensors[::2], before, strict=True) if a is not None)
    assert changed == 2 * shape.kv_heads  # the key and the value of one token
    found = attention(q, kv, padded, shape.heads, shape.kv_heads, 0.2, tile=SMALL)
    assert torch.equal(found[0], whole[0]) and not found[1].any()


@pytest.mark.parametrize("cache", ["int4", "int8"])
def test_unusual_heads_are_stored_as_the_reference_stores_them(cache: str) -> None:
    x = torch.zeros(8, 64)
    x[1], x[2], x[3, 5], x[4, 5] = 3.0, -3.0, torch.inf, torch.nan
    x[5, 7], x[6], x[7] = 1e-31, torch.randn(64) * 1e36, torch.randn(64) * 1e-3
    qkv = torch.cat((torch.zeros(8, 64), x, -x), dim=1)
    batch = make_batch([piece(0, 0, 8, (0,))], 8)
    ones = torch.ones(8, 32)
    truth = reference.make_kv(1, 8, 1, 64, torch.float32, cache)
    reference.rotary_write(qkv, ones, ones * 0, truth, batch, 1, 1, None, None, 1e-6)
    kv = make_kv(1, 8, 1, 64, torch.float32, cache, DEVICE)
    given = [x.to(DEVICE) for x in (qkv, ones, ones * 0)]
    rotary_write(*given, kv, on_device(batch), 1, 1, None, None, 1e-6)
    for found, expected in zip(stored(kv), stored_by_reference(truth), strict=True):
        assert torch.equal(found, expected)


def test_storage_takes_what_is_said() -> None:
    for cache, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.float32)):
        kv = make_kv(10, 16, 2, 128, dtype, cache, DEVICE)
        assert kv.bytes == 10 * 16 * token_bytes(2, 128, dtype, cache)
    assert token_bytes(2, 128, torch.bfloat16, "int4") == 2 * 2 * (128 // 2 + 4)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="auto, bf16, int8, int4"):
        make_kv(1, 16, 1, 64, torch.float32, "fp8", DEVICE)
    with pytest.raises(ValueError, match="head_dim = 80"):
        make_kv(1, 16, 1, 80, torch.float32, "int4", DEVICE)
    with pytest.raises(ValueError, match="head_dim = 264"):
        make_kv(1, 16, 1, 264, torch.float32, "auto", DEVICE)
    with pytest.raises(TypeError, match="float64"):
        make_kv(1, 16, 1, 64, torch.float64, "auto", DEVICE)
    kv = make_kv(1, 16, 2, 64, torch.float32, "auto", DEVICE)
    batch = on_device(make_batch([piece(0, 0, 1, (0,))], 16))
    given: dict[str, Any] = {"kv": kv, "batch": batch, "kv_heads": 2, "scale": 1.0}
    q = torch.zeros(1, 128, device=DEVICE)
    for call, error, message in (
        (lambda: attention(q[:, :64].contiguous(), heads=2, **given), ValueError, "q is"),
        (lambda: attention(q, heads=3, **given), ValueError, "must be a multiple"),
        (lambda: attention(q.half(), heads=2, **given), TypeError, "one type"),
        (lambda: attention(q, heads=2, **(given | {"scale": 0.0})), ValueError, "scale = 0.0"),
        (lambda: attention(q, heads=2, window=0, **given), ValueError, "window = 0"),
        (lambda: attention(q, heads=2, **(given | {"batch": replace(batch, block_size=8)})), ValueError, "blocks of 8"),
        (lambda: rotary_write(q, q, q, kv, batch, 2, 2, None, None, 1e-6), ValueError, "qkv is"),
        (lambda: rotary_write(q.repeat(1, 3), q, q, kv, batch, 2, 2, None, None, 1e-6), ValueError, "cos is"),
    ):
        with pytest.raises(error, match=message):
            call()
