"""Attention, norms and activation on a real GPU in the shapes of an 8B model, BF16, against the reference.

W4Ax is in test_w4ax.py; tests/kernels/test_triton_*.py have small and odd shapes, and run on the same GPU.
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("hypothesis", reason="hypothesis is not installed, which the tests of small shapes need")

from tests.kernels.test_triton_attention import (
    Shape,
    close,
    kv_of,
    make_inputs,
    on_device,
    piece,
    reference,
    step,
    stored,
    stored_by_reference,
    tables_of,
)

from weft.kernels import triton_norm
from weft.kernels.triton_attention import attention
from weft.models.batch import make_batch

LENGTHS = (1300, 513, 64, 1)
HEADS = {"kv_heads": 8, "group": 4, "head_dim": 128, "dtype": torch.bfloat16}
SHAPES = [
    Shape(**HEADS),
    Shape(**HEADS, window=600),
    Shape(**HEADS, cache="int8"),
    Shape(**HEADS, cache="int4"),
    Shape(**{**HEADS, "kv_heads": 2, "group": 8}, cache="int4", window=600),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_the_references_and_decodes_bits_are_prefills(shape: Shape) -> None:
    inputs, tables = make_inputs(shape, LENGTHS, 3), tables_of(shape, LENGTHS, 4)
    whole = [piece(i, 0, length, table) for i, (length, table) in enumerate(zip(LENGTHS, tables, strict=True))]
    kv = kv_of(shape, LENGTHS, poisoned=True)
    q, mixed = step(shape, inputs, kv, whole, None)

    batch = make_batch(whole, shape.block_size)
    blocks, heads, kv_heads = kv.keys.codes.shape[0], shape.heads, shape.kv_heads
    truth = reference.make_kv(blocks, shape.block_size, kv_heads, shape.head_dim, shape.dtype, shape.cache)
    given = torch.cat(inputs.qkv), inputs.cos, inputs.sin, truth, batch, heads, kv_heads, None, None, 1e-6
    turned = reference.rotary_write(*given)
    assert torch.equal(q.cpu(), turned)
    named = sorted({block for table in tables for block in table})  # the others are poison
    for found, expected in zip(stored(kv), stored_by_reference(truth), strict=True):
        last = [(table[-1], length % shape.block_size) for length, table in zip(LENGTHS, tables, strict=True)]
        found, expected = found.clone(), expected.clone()
        for block, used in last:
            if used:
                found[block, used:] = expected[block, used:] = 0
        assert torch.equal(found[named], expected[named])
    scale = shape.head_dim**-0.5
    close(mixed, reference.attention(turned, truth, batch, heads, kv_heads, scale, shape.window), shape.dtype)

    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    last_rows = make_batch(
        [piece(i, n - 1, n, table) for i, (n, table) in enumerate(zip(LENGTHS, tables, strict=True))], 16
    )
    decoded = attention(q[ends.to(q.device)], kv, on_device(last_rows), heads, kv_heads, scale, shape.window)
    assert torch.equal(decoded, mixed[ends.to(q.device)])


@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_norms_and_activation_are_the_references(rows: int) -> None:
    torch.manual_seed(rows)
    x, residual = (torch.randn(rows, 4096).bfloat16() for _ in range(2))
    gain = torch.randn(4096).bfloat16()
    found, added = triton_norm.add_rms_norm(x.cuda(), residual.cuda(), gain.cuda(), 1e-5)
    expected, summed = reference.add_rms_norm(x, residual.clone(), gain, 1e-5)
    assert torch.equal(added.cpu(), summed)
    torch.testing.assert_close(found.cpu(), expected, rtol=2**-7, atol=0)
    alone = triton_norm.rms_norm(added[:1].contiguous(), gain.cuda(), 1e-5)
    assert torch.equal(alone, found[:1])
    both = torch.randn(rows, 2 * 14336).bfloat16()
    torch.testing.assert_close(triton_norm.silu_mul(both.cuda()).cpu(), reference.silu_mul(both), rtol=2**-7, atol=1e-6)
