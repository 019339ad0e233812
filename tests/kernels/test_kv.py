"""Keys and values in 8 and 4 bits: the reference against plain statements, and every level against the reference.

That a row's bits are its own, for these too, is in test_attention.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weft.core.plan import Slice
from weft.kernels import kv
from weft.kernels.base import Batch
from weft.kernels.kv import Codes, QuantisedKv
from weft.kernels.reference import ReferenceKernels
from weft.models.batch import make_batch

reference = ReferenceKernels((0,))
many = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

rows = st.builds(
    lambda seed, size, power: (
        torch.randn(4, size, generator=torch.Generator().manual_seed(seed)) * 2.0 ** torch.tensor(power)
    ),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([8, 64, 72, 80, 128, 256]),
    power=st.sampled_from([-40.0, 0.0, 100.0]),
)


@settings(max_examples=50, deadline=None)
@given(x=rows, bits=st.sampled_from([4, 8]), shift=st.sampled_from([-3.0, 0.0, 3.0]))
def test_what_comes_back_is_within_half_a_step(x: torch.Tensor, bits: int, shift: float) -> None:
    x = x + shift * x.std()
    back = kv.dequantise(*kv.quantise(x, bits), bits)
    low, high = x.amin(dim=-1, keepdim=True).clamp(max=0), x.amax(dim=-1, keepdim=True).clamp(min=0)
    # half a step, half of the zero's step, and 2^-9 of the range because the step is a bfloat16
    step = (high - low) / (2**bits - 1)
    allowed = step * (0.5 + 0.5 / kv.STEPS[bits]) + (high - low) * 2.0**-9
    assert ((back - x).abs() <= allowed * 1.01).all()


@pytest.mark.parametrize("size", [8, 16, 32, 64, 80, 128, 256])
def test_spreading_keeps_scores_and_is_undone(size: int) -> None:
    q, k = torch.randn(2, 7, size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(kv.gather(kv.spread(k)), k, atol=1e-5)
    scores = kv.spread(q) @ kv.spread(k).T / (size if kv.spreads(size) else 1)
    assert torch.allclose(scores, q @ k.T, atol=1e-4)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_an_outlier_becomes_a_little_of_every_channel_and_so_does_one_that_was_spread_by_a_checkpoint(
    size: int,
) -> None:
    assert (kv.spread(torch.eye(size)).abs() == 1).all()
    rows_of_a_hadamard_matrix = kv.spread(torch.eye(size)) * kv.spread(torch.eye(size))[:1]
    assert (kv.spread(rows_of_a_hadamard_matrix).abs() <= 2 * size**0.5).all()


def test_what_is_not_finite_becomes_nan_and_nothing_stays_nothing() -> None:
    x = torch.ones(5, 64)
    x[0, 3], x[1, 5], x[2], x[3] = torch.nan, -torch.inf, 0.0, 1e-38
    codes, scale, zero = kv.quantise(x, 4)
    assert scale.isnan().tolist() == [True, True, False, False, False]
    assert not codes[:4].any() and not zero.any() and scale[2] == 0 and scale[3] == 0
    assert kv.dequantise(codes, scale, zero, 4)[4].tolist() == pytest.approx([1.0] * 64, rel=0.005)


def test_int4_takes_less_than_28_hundredths_of_bfloat16() -> None:
    for size, most in ((64, 0.28), (128, 0.27)):
        ratio = kv.token_bytes(4, size, torch.bfloat16, "int4") / kv.token_bytes(4, size, torch.bfloat16, "bf16")
        assert ratio <= most


def test_a_cache_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="bf16 needs activations of bfloat16, and they are float32"):
        kv.bits_of("bf16", torch.float32)
    with pytest.raises(ValueError, match="no KV cache of 'int2'; what would work: auto, bf16, int8, int4"):
        kv.bits_of("int2", torch.float32)


# The C++ kernels.


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """The reference works on small tensors, and torch's threads wait for one another longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """A sequence of `length` tokens in one slice, and a KV for it."""

    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    length: int
    dtype: torch.dtype
    cache: str
    seed: int
    window: int | None = None

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def blocks(self) -> int:
        return -(-self.length // self.block_size) + 1

    def batch(self) -> Batch:
        order = torch.randperm(self.blocks, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return make_batch([Slice(0, 0, (0,) * self.length, tuple(order[1:]), None)], self.block_size)

    def make_kv(self, kernels: Any) -> Any:
        return kernels.make_kv(self.blocks, self.block_size, self.kv_heads, self.head_dim, self.dtype, self.cache)

    def rows(self) -> torch.Tensor:
        """qkv with what is hard to quantise: outliers, heads on one side of zero, constant, tiny and huge ones."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.length, self.heads + 2 * self.kv_heads, self.head_dim, generator=generator)
        kinds = torch.randint(0, 12, x.shape[:2], generator=generator)
        x[kinds == 0, 3] *= 300
        x[kinds == 1] += 9
        x[kinds == 2] = -0.75
        x[kinds == 3] = 0
        x[kinds == 4] *= 2.0**-110
        x[:, self.heads :][kinds[:, self.heads :] == 5] *= 2.0**100
        return x.to(self.dtype).view(self.length, -1)

    def write(self, kernels: Any, store: Any, qkv: torch.Tensor) -> torch.Tensor:
        angles = torch.rand(self.length, self.head_dim // 2, generator=torch.Generator().manual_seed(self.seed)) * 6
        tables = angles.cos(), angles.sin()
        return kernels.rotary_write(qkv, *tables, store, self.batch(), self.heads, self.kv_heads, None, None, 1e-6)

    def attend(self, kernels: Any, store: Any, q: torch.Tensor) -> torch.Tensor:
        scale = self.head_dim**-0.5
        return kernels.attention(q, store, self.batch(), self.heads, self.kv_heads, scale, self.window)


cases = st.builds(
    Case,
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 5, 7, 8, 9, 20]),
    head_dim=st.sampled_from([8, 16, 24, 64, 72, 80, 96, 128, 256]),
    block_size=st.sampled_from([16, 32, 64, 128]),
    length=st.one_of(st.integers(1, 40), st.integers(250, 262)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cache=st.sampled_from(["int8", "int4"]),
    seed=st.integers(0, 2**31),
    window=st.one_of(st.none(), st.integers(1, 20), st.integers(200, 400)),
)


def stored(native: Any, case: Case) -> QuantisedKv:
    """What lies in the memory of the C++ kernels, by the description in csrc/attention.h."""
    bits = kv.BITS[case.cache]
    spread_over = 2 if bits == 4 else 1  # channels in a byte of values
    multiple = 16 * spread_over
    width = -(-case.head_dim // multiple) * multiple
    slots = case.blocks * case.kv_heads * case.block_size
    memory = np.frombuffer(bytes((ctypes.c_ubyte * native.bytes).from_address(native.address)), np.uint8)
    sizes = slots * case.head_dim * bits // 8, slots * width * bits // 8, slots * 6
    assert native.bytes == sum(sizes)
    key_bytes, value_bytes, number_bytes = np.split(memory, np.cumsum(sizes)[:2])
    shape = (case.blocks, case.kv_heads)

    words = key_bytes.view(np.uint32).reshape(*shape, -1, case.block_size)
    at = np.array([j * bits + high for j in range(16 // bits) for high in (0, 16)])
    keys = words[:, :, :, None] >> at[:, None].astype(np.uint32) & (1 << bits) - 1
    keys = keys.reshape(*shape, case.head_dim, case.block_size).transpose(0, 3, 1, 2)

    words = value_bytes.view(np.uint32).reshape(*shape, case.block_size // 4, -1)
    parts = [[words >> (j * 8 + high + half * 4) & (1 << bits) - 1 for j in (0, 1) for high in (0, 16)]
             for half in range(spread_over)]  # fmt: skip
    by_word = np.stack([np.stack(part, axis=-2) for part in parts], axis=-2)  # [.., block_size / 4, 4, halves, words]
    by_word = by_word.reshape(*shape, case.block_size, spread_over, -1, 16)
    values = (
        by_word.swapaxes(-3, -2).reshape(*shape, case.block_size, width)[..., : case.head_dim].transpose(0, 2, 1, 3)
    )

    numbers = number_bytes.reshape(*shape, case.block_size // 16, 96)
    scales = [numbers[..., i : i + 32].copy().view(np.uint16).reshape(*shape, -1) for i in (0, 32)]
    zeros = [numbers[..., i : i + 16].reshape(*shape, -1) for i in (64, 80)]
    found = [
        Codes(
            torch.from_numpy(codes.astype(np.uint8)),
            torch.from_numpy(scale.swapaxes(1, 2).astype(np.int16)).view(torch.bfloat16),
            torch.from_numpy(zero.swapaxes(1, 2).copy()),
        )
        for codes, scale, zero in zip((keys, values), scales, zeros, strict=True)
    ]
    return QuantisedKv(*found, bits)


@many
@given(case=cases, sick=st.sampled_from([None, torch.nan, torch.inf, -torch.inf]))
@example(case=Case(2, 2, 64, 16, 300, torch.bfloat16, "int4", 0), sick=torch.nan)
@example(case=Case(2, 2, 80, 32, 300, torch.float32, "int8", 1), sick=-torch.inf)
def test_queries_codes_scales_and_zeros_are_the_references_to_the_bit(
    backends: Any, case: Case, sick: float | None
) -> None:
    qkv = case.rows()
    if sick is not None:
        qkv[case.length // 2, case.head_dim * case.heads :: case.head_dim] = sick  # the first channel of each head
    native, plain = case.make_kv(backends.two), case.make_kv(reference)
    q, expected = (case.write(kernels, store, qkv) for kernels, store in ((backends.two, native), (reference, plain)))
    assert torch.equal(q, expected)
    found = stored(native.native, case)
    for ours, truth in ((found.keys, plain.keys), (found.values, plain.values)):
        assert torch.equal(ours.scales.view(torch.int16), truth.scales.view(torch.int16))
        assert torch.equal(ours.zeros, truth.zeros)
        assert torch.equal(ours.codes, truth.codes)


def in_8_bits(q: torch.Tensor) -> torch.Tensor:
    """q float32 [..., D] in steps of a 127th of its greatest, of each head of each token by itself."""
    top = q.abs().amax(dim=-1, keepdim=True)
    steps = torch.where(top > 1e-30, torch.tensor(127.0) / top, 0.0)
    return (q * steps).round() * torch.where(top > 1e-30, top / 127, 1.0)


@many
@given(case=cases, spread=st.sampled_from([0.1, 1.0, 6.0]))
@example(case=Case(1, 8, 64, 16, 600, torch.bfloat16, "int4", 0), spread=1.0)
@example(case=Case(1, 8, 64, 16, 600, torch.bfloat16, "int8", 0, window=300), spread=6.0)
@example(case=Case(2, 7, 128, 32, 300, torch.float32, "int4", 0), spread=6.0)
def test_attention_is_that_over_the_dequantised_keys_and_values(backends: Any, case: Case, spread: float) -> None:
    """In float64, over what the memory holds. Float32 sums in another order err by some 1e-5 of sum(weight * |value|);
    the AVX-512 level rounds weights to bfloat16, and queries of bfloat16 to 8 bits. What was spread averages the errors
    of all channels."""
    generator = torch.Generator().manual_seed(case.seed)
    qkv = torch.randn(case.length, case.heads + 2 * case.kv_heads, case.head_dim, generator=generator)
    qkv[:, : case.heads] *= spread
    native = case.make_kv(backends.two)
    q = case.write(backends.two, native, qkv.to(case.dtype).view(case.length, -1))
    y = case.attend(backends.two, native, q)
    keys, values = (
        part[: case.length].double().repeat_interleave(case.group, dim=1).transpose(0, 1)
        for part in stored(native.native, case).read(case.batch().tables[0].long())
    )
    if backends.two.name == "avx512" and case.dtype is torch.bfloat16:
        q = in_8_bits(q.float().view(case.length, case.heads, case.head_dim))
    queries = q.double().view(case.length, case.heads, case.head_dim).transpose(0, 1)
    distance = torch.arange(case.length)[:, None] - torch.arange(case.length)
    hidden = (distance < 0) | (distance >= (case.window or case.length))
    weights = (queries @ keys.mT * case.head_dim**-0.5).masked_fill(hidden, -torch.inf).softmax(dim=-1)
    exact = kv.gather(weights @ values).transpose(0, 1).reshape(case.length, -1)
    bound = (weights @ values.abs()).amax(dim=-1)
    bound = bound.T.repeat_interleave(case.head_dim, dim=1) / (case.head_dim**0.5 if kv.spreads(case.head_dim) else 1)
    allowed = 3e-5 * (1 + spread) * bound
    if case.dtype is torch.bfloat16:
        allowed += 2.0**-8 * (2 * exact.abs() + 2 * bound)
    error = (y.double() - exact).abs()
    assert (error <= allowed).all(), float((error / allowed).max())


@pytest.mark.parametrize("cache", ["auto", "int8", "int4"])
@pytest.mark.parametrize("sick", [torch.nan, torch.inf])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(backends: Any, cache: str, sick: float) -> None:
    """And one of zeros weighs all positions alike."""
    case = Case(1, 2, 64, 16, 40, torch.bfloat16, cache, 0)
    store = case.make_kv(backends.two)
    q = case.write(backends.two, store, torch.randn(case.length, 4 * case.head_dim).bfloat16())
    q[7, : case.head_dim] = 0
    good = case.attend(backends.two, store, q)
    assert good.isfinite().all()
    q[20, 3] = sick
    y = case.attend(backends.two, store, q)
    assert y[20, : case.head_dim].isnan().all()
    y[20, : case.head_dim] = good[20, : case.head_dim]
    assert torch.equal(y, good)


@pytest.mark.parametrize("cache", ["auto", "int8", "int4"])
@pytest.mark.parametrize("plain", [False, True], ids=["native", "reference"])
def test_a_copied_block_is_read_like_the_one_it_was_copied_from(backends: Any, cache: str, plain: bool) -> None:
    case = Case(2, 3, 72, 16, 40, torch.bfloat16, cache, 0)
    kernels = reference if plain else backends.one
    store = kernels.make_kv(9, 16, 2, 72, torch.bfloat16, cache)
    qkv = torch.randn(40, 10 * 72, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = case.write(kernels, store, qkv)
    before = case.attend(kernels, store, q)
    old, new = [int(block) for block in case.batch().tables[0]], [5, 8, 6]
    store.copy(old, new)
    moved = make_batch([Slice(0, 0, (0,) * 40, tuple(new), None)], 16)
    assert torch.equal(kernels.attention(q, store, moved, case.heads, 2, 72**-0.5, None), before)
    assert torch.equal(case.attend(kernels, store, q), before), "the old ones stay as they are"


def test_a_copy_to_a_block_that_is_not_there_is_refused(backends: Any) -> None:
    store = backends.one.make_kv(4, 16, 2, 64, torch.bfloat16, "auto")
    for source, target in (([0], [4]), ([-1], [0])):
        with pytest.raises(ValueError, match="there is no block"):
            store.copy(source, target)
    with pytest.raises(ValueError, match="as many blocks"):
        store.copy([0, 1], [2])


@pytest.mark.parametrize(("cache", "head_dim", "most"), [("int4", 64, 0.28), ("int4", 128, 0.27), ("int8", 64, 0.53)])
def test_the_pool_takes_this_part_of_bfloat16s(backends: Any, cache: str, head_dim: int, most: float) -> None:
    """kv_bytes_ratio, of the memory that is really taken; and what the pool is planned with is what it takes."""
    small, wide = (backends.one.make_kv(64, 16, 4, head_dim, torch.bfloat16, name) for name in (cache, "bf16"))
    assert small.bytes / wide.bytes <= most
    for store, name in ((small, cache), (wide, "bf16")):
        assert store.bytes == 64 * 16 * kv.token_bytes(4, head_dim, torch.bfloat16, name)


@pytest.mark.parametrize("head_dim", [8, 24, 72, 80, 256])
@pytest.mark.parametrize("cache", ["auto", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bytes_of_a_token_are_planned_as_they_are_taken(
    backends: Any, head_dim: int, cache: str, dtype: torch.dtype
) -> None:
    taken = backends.one.make_kv(3, 32, 2, head_dim, dtype, cache).bytes
    assert taken == 3 * 32 * kv.token_bytes(2, head_dim, dtype, cache)


def test_a_cache_that_the_activations_cannot_have_is_refused(backends: Any) -> None:
    with pytest.raises(ValueError, match="a KV cache of bf16 needs activations of bfloat16, and they are float32"):
        backends.one.make_kv(4, 16, 2, 64, torch.float32, "bf16")
    with pytest.raises(ValueError, match="no KV cache of 'fp8'"):
        backends.one.make_kv(4, 16, 2, 64, torch.bfloat16, "fp8")
