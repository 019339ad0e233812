"""The reference kernels against what others have written: torch's own functions and transformers' rotation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from weft.core.plan import Slice
from weft.kernels.base import Kernels
from weft.kernels.reference import ReferenceKernels
from weft.models.batch import make_batch

few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return ReferenceKernels((0,))


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """The reference works on small tensors, and torch's threads wait for one another longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@few
@given(rows=st.integers(1, 5), size=st.integers(1, 70), seed=seeds)
def test_rms_norm_is_torchs(kernels: Kernels, rows: int, size: int, seed: int) -> None:
    x, weight = normal(seed, rows, size), normal(seed + 1, size)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), functional.rms_norm(x, (size,), weight, 1e-5))


def test_add_rms_norm_adds_in_place_and_normalises_what_it_rounded(kernels: Kernels) -> None:
    x, residual, weight = (normal(i, *shape).bfloat16() for i, shape in enumerate([(3, 64), (3, 64), (64,)]))
    expected = x + residual
    normed, returned = kernels.add_rms_norm(x, residual, weight, 1e-6)
    assert returned is residual and torch.equal(residual, expected)
    assert torch.equal(normed, kernels.rms_norm(expected, weight, 1e-6))


def test_silu_mul_is_torchs(kernels: Kernels) -> None:
    x = normal(0, 4, 22) * 10
    torch.testing.assert_close(kernels.silu_mul(x), functional.silu(x[:, :11]) * x[:, 11:])


def test_linear_is_the_product_in_float64_rounded(kernels: Kernels) -> None:
    x, weight, bias = (normal(i, *shape).bfloat16() for i, shape in enumerate([(3, 40), (7, 40), (7,)]))
    exact = functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(kernels.linear(x, kernels.pack_linear(weight, bias)), exact.bfloat16())


def test_q_and_k_are_normalised_per_head_rotated_as_in_transformers_and_put_into_their_slots(kernels: Kernels) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, kv_heads, head_dim, block_size = 4, 2, 16, 16
    batch = make_batch([Slice(0, 30, (1,) * 20, (5, 2, 0, 3), None), Slice(1, 0, (1,), (4,), None)], block_size)
    angles = torch.arange(64)[:, None] * torch.logspace(0, -3, head_dim // 2)
    qkv, q_norm, k_norm = normal(0, 21, (heads + 2 * kv_heads) * head_dim), normal(1, head_dim), normal(2, head_dim)
    kv = kernels.make_kv(6, block_size, kv_heads, head_dim, torch.float32)
    q = kernels.rotary_write(qkv, angles.cos(), angles.sin(), kv, batch, heads, kv_heads, q_norm, k_norm, 1e-6)

    parts = qkv.view(21, heads + 2 * kv_heads, head_dim).transpose(0, 1)[None]  # transformers' [1, heads, T, head_dim]
    turned = torch.cat((angles, angles), dim=-1)[batch.positions.long()][None]
    normed_q = functional.rms_norm(parts[:, :heads], (head_dim,), q_norm, 1e-6)
    normed_k = functional.rms_norm(parts[:, heads : heads + kv_heads], (head_dim,), k_norm, 1e-6)
    their_q, their_k = apply_rotary_pos_emb(normed_q, normed_k, turned.cos(), turned.sin())
    torch.testing.assert_close(q, their_q[0].transpose(0, 1).reshape(21, -1))
    places = [(0, 14), (0, 15), *((3, i) for i in range(2))]  # positions 46, 47, 48, 49 of the first slice
    for row, (block, offset) in zip(range(16, 20), places, strict=True):
        torch.testing.assert_close(kv.keys[block, offset], their_k[0, :, row])
        assert torch.equal(kv.values[block, offset], parts[0, -kv_heads:, row])
    torch.testing.assert_close(kv.keys[4, 0], their_k[0, :, 20])


@few
@given(
    lengths=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=3),
    group=st.integers(1, 4),
    window=st.none() | st.integers(1, 40),
    seed=seeds,
)
def test_attention_is_torchs_with_an_explicit_mask(
    kernels: Kernels, lengths: list[tuple[int, int]], group: int, window: int | None, seed: int
) -> None:
    kv_heads, head_dim, block_size = 2, 8, 16
    tables = iter(torch.randperm(5 * len(lengths), generator=torch.Generator().manual_seed(seed)).tolist())
    slices = [
        Slice(i, before, (0,) * count, tuple(next(tables) for _ in range(5)), None)
        for i, (before, count) in enumerate(lengths)
    ]
    batch = make_batch(slices, block_size)
    kv = kernels.make_kv(5 * len(lengths), block_size, kv_heads, head_dim, torch.float32)
    kv.keys.copy_(normal(seed, *kv.keys.shape))
    kv.values.copy_(normal(seed + 1, *kv.values.shape))
    q = normal(seed + 2, len(batch.tokens), group * kv_heads * head_dim)
    out = kernels.attention(q, kv, batch, group * kv_heads, kv_heads, 0.3, window)
    for i, piece in enumerate(slices):
        rows = slice(int(batch.starts[i]), int(batch.starts[i + 1]))
        positions, context = torch.arange(piece.start, piece.start + len(piece.tokens)), torch.arange(80)
        seen = context <= positions[:, None]
        if window is not None:
            seen &= context > positions[:, None] - window
        blocks = torch.tensor(piece.blocks)
        keys, values = (part[blocks].reshape(80, kv_heads, head_dim).transpose(0, 1) for part in (kv.keys, kv.values))
        expected = functional.scaled_dot_product_attention(
            q[rows].view(-1, group * kv_heads, head_dim).transpose(0, 1),
            keys,
            values,
            attn_mask=seen,
            scale=0.3,
            enable_gqa=True,
        )
        torch.testing.assert_close(out[rows], expected.transpose(0, 1).reshape(len(positions), -1))
