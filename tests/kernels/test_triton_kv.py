"""Quantised keys and values in Triton against kernels/kv.py: stored to the bit, and read by attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.kernels.base import Batch
from weft.kernels.kv import Codes, QuantisedKv
from weft.kernels.reference import ReferenceKernels

pytest.importorskip("triton", reason="triton is not installed")

from weft.kernels import triton_kv
from weft.kernels.triton_kv import Part, TritonKv

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS, WIDTH = 12, 6
few = settings(max_examples=8, deadline=None)


def same(part: Part, codes: Codes, bits: int) -> None:
    """All that is stored; scales by their bits, for a NaN is not equal to itself."""
    found = part.codes.cpu()
    found = torch.cat((found & 15, found >> 4), dim=-1) if bits == 4 else found
    assert torch.equal(found, codes.codes) and torch.equal(part.zeros.cpu(), codes.zeros)
    assert torch.equal(part.scales.cpu(), codes.scales.view(torch.int16))


def part_of(codes: Codes, bits: int) -> Part:
    half = codes.codes.shape[-1] // 2
    packed = codes.codes if bits == 8 else codes.codes[..., :half] | (codes.codes[..., half:] << 4)
    return Part(*(x.contiguous().to(DEVICE) for x in (packed, codes.scales.view(torch.int16), codes.zeros)))


def filled(cache: str, head_dim: int, kv_heads: int, block_size: int, seed: int) -> tuple[TritonKv, QuantisedKv, Batch]:
    """Two sequences, the same in both, and a batch of their last tokens."""
    torch.manual_seed(seed)
    tables = torch.randperm(BLOCKS).int().view(2, WIDTH)
    contexts = torch.tensor([int(torch.randint(5, WIDTH * block_size, ())), 71]).int()
    truth = ReferenceKernels(()).make_kv(BLOCKS, block_size, kv_heads, head_dim, torch.float32, cache)
    for table, context in zip(tables, contexts.tolist(), strict=True):
        places = torch.arange(context)
        slots = table[places // block_size].long() * block_size + places % block_size
        keys, values = (torch.randn(context, kv_heads, head_dim) * size for size in (1, 5))
        keys[..., seed % head_dim] *= 30  # a channel of outliers
        truth.write(slots, keys, values)
    empty = triton_kv.make_kv(1, block_size, kv_heads, head_dim, cache, DEVICE)
    kv = TritonKv(part_of(truth.keys, empty.bits), part_of(truth.values, empty.bits), empty.signs, empty.bits)
    last = torch.tensor([contexts[0] - 3, contexts[0] - 2, contexts[0] - 1, contexts[1] - 1]).int()
    tokens = torch.zeros(4, dtype=torch.int64)
    return kv, truth, Batch(tokens, last, tokens, torch.tensor([0, 3, 4]).int(), contexts, tables, block_size)


@few
@given(
    cache=st.sampled_from(["int4", "int8"]),
    shape=st.sampled_from([(32, 1, 1), (64, 2, 3), (128, 1, 8), (64, 1, 20)]),  # head_dim, kv heads, queries for each
    block_size=st.sampled_from([16, 20]),
    window=st.sampled_from([None, 1, 9]),
    seed=st.integers(0, 2**31),
)
def test_attention_is_the_references(
    cache: str, shape: tuple[int, int, int], block_size: int, window: int | None, seed: int
) -> None:
    head_dim, kv_heads, group = shape
    kv, truth, batch = filled(cache, head_dim, kv_heads, block_size, seed)
    heads, scale = kv_heads * group, head_dim**-0.5
    q = torch.randn(4, heads * head_dim)
    spread = truth.queries(q.view(4, heads, head_dim)).reshape(4, -1)  # as its rotary_write does
    expected = ReferenceKernels(()).attention(spread, truth, batch, heads, kv_heads, scale, window)
    on_device = Batch(*(getattr(batch, name).to(DEVICE) for name in Batch.__slots__[:-1]), block_size)
    found = triton_kv.attention(q.to(DEVICE), kv, on_device, heads, scale, window)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@few
@given(cache=st.sampled_from(["int4", "int8"]), head_dim=st.sampled_from([32, 128]), seed=st.integers(0, 2**31))
def test_heads_are_stored_as_the_reference_stores_them(cache: str, head_dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    keys, values = torch.randn(2, 3, 2, head_dim)
    keys[..., seed % head_dim] *= 30
    truth = ReferenceKernels(()).make_kv(2, 4, 2, head_dim, torch.float32, cache)
    kv = triton_kv.make_kv(2, 4, 2, head_dim, cache, DEVICE)
    slots = torch.randperm(8)[:3]
    truth.write(slots, keys, values)
    triton_kv.write(kv, slots.to(DEVICE), keys.to(DEVICE), values.to(DEVICE))
    same(kv.keys, truth.keys, kv.bits)
    same(kv.values, truth.values, kv.bits)


@pytest.mark.parametrize("cache", ["int4", "int8"])
def test_unusual_heads_are_stored_as_the_reference_stores_them(cache: str) -> None:
    x = torch.zeros(8, 1, 64)
    x[1], x[2], x[3, 0, 5], x[4, 0, 5] = 3.0, -3.0, torch.inf, torch.nan
    x[5, 0, 7], x[6] = 1e-31, torch.randn(1, 64) * 1e36
    x[7] = torch.randn(1, 64) * 1e-3
    truth = ReferenceKernels(()).make_kv(1, 8, 1, 64, torch.float32, cache)
    kv = triton_kv.make_kv(1, 8, 1, 64, cache, DEVICE)
    slots = torch.arange(8)
    truth.write(slots, x, -x)
    triton_kv.write(kv, slots.to(DEVICE), x.to(DEVICE), -x.to(DEVICE))
    same(kv.keys, truth.keys, kv.bits)
    same(kv.values, truth.values, kv.bits)
    assert truth.keys.scales.isnan().view(-1).tolist() == [False] * 3 + [True] * 2 + [False] * 3


def test_a_head_takes_half_a_byte_for_each_channel_and_three_bytes() -> None:
    kv = triton_kv.make_kv(10, 16, 2, 128, "int4", DEVICE)
    assert kv.bytes == 10 * 16 * 2 * 2 * (128 // 2 + 3)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="int8, int4"):
        triton_kv.make_kv(1, 16, 1, 64, "bf16", DEVICE)
    with pytest.raises(ValueError, match="head_dim = 80"):
        triton_kv.make_kv(1, 16, 1, 80, "int4", DEVICE)
    kv = triton_kv.make_kv(1, 16, 2, 64, "int4", DEVICE)
    slots, x = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, 64)
    with pytest.raises(ValueError, match="keys or values are"):
        triton_kv.write(kv, slots, x[:, :1], x)
    zero = torch.zeros(1, dtype=torch.int32)
    batch = Batch(slots, zero, slots, torch.tensor([0, 1]).int(), zero + 1, zero[None], 16)
    q: dict[str, Any] = {"kv": kv, "batch": batch, "scale": 1.0}
    with pytest.raises(ValueError, match="q is"):
        triton_kv.attention(torch.zeros(1, 64), heads=2, **q)
    with pytest.raises(ValueError, match="must divide 3 heads"):
        triton_kv.attention(torch.zeros(1, 192), heads=3, **q)
