"""Plain products in Triton: the reference's within their rounding, and that a row's bits are its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weft.kernels.reference import PlainLinear, ReferenceKernels

pytest.importorskip("triton", reason="triton is not installed")

from weft.kernels.triton_linear import linear
from weft.kernels.triton_tiles import LINEAR, LinearTile, architecture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
reference = ReferenceKernels((0,))
few = settings(max_examples=15, deadline=None)
# Tiles of 16 and 32 rows and steps of 32 channels, so that small shapes have several; a GPU keeps its own.
SMALL = LinearTile(32, 32, (16, 1, 1), (32, 1, 1)) if DEVICE.type == "cpu" else None


def made(outputs: int, channels: int, rows: int, seed: int, dtype: torch.dtype = torch.bfloat16, *, bias: bool = True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, channels, generator=generator).to(dtype)
    added = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    return PlainLinear(weight, added), torch.randn(rows, channels, generator=generator).to(dtype)


def on_device(packed: PlainLinear) -> PlainLinear:
    return PlainLinear(packed.weight.to(DEVICE), None if packed.bias is None else packed.bias.to(DEVICE))


@few
@given(
    outputs=st.integers(1, 70),
    channels=st.integers(1, 100),
    rows=st.integers(0, 70),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    wide=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(outputs=33, channels=65, rows=17, dtype=torch.bfloat16, wide=True, bias=True, seed=0)
def test_products_are_the_references(
    outputs: int, channels: int, rows: int, dtype: torch.dtype, wide: bool, bias: bool, seed: int
) -> None:
    packed, x = made(outputs, channels, rows, seed, dtype, bias=bias)
    asked = torch.float32 if wide else None
    found, expected = (
        linear(x.to(DEVICE), on_device(packed), asked, tile=SMALL).cpu(),
        reference.linear(x, packed, asked),
    )
    assert found.dtype is expected.dtype and found.shape == expected.shape
    sizes = x.float().abs() @ packed.weight.float().abs().T + 1
    error = (found.float() - expected.float()).abs() / sizes
    assert not rows or error.max() < (1e-6 if wide else torch.finfo(dtype).eps)


@few
@given(
    outputs=st.integers(1, 70),
    channels=st.integers(1, 100),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    wide=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(outputs=40, channels=100, cuts=[1, 16, 17, 33], wide=False, seed=0)
def test_the_bits_of_a_row_are_its_own(outputs: int, channels: int, cuts: list[int], wide: bool, seed: int) -> None:
    """Alone, in any place of any tile, beside other rows or beside rows of NaN."""
    packed, x = made(outputs, channels, sum(cuts), seed)
    x[0] = torch.nan  # what stands beside the others
    packed, x, asked = on_device(packed), x.to(DEVICE), torch.float32 if wide else None
    whole = linear(x, packed, asked, tile=SMALL)
    parts = [linear(part.contiguous(), packed, asked, tile=SMALL) for part in x.split(cuts)]
    assert torch.equal(torch.cat(parts)[1:], whole[1:]) and whole[1:].isfinite().all()
    backwards = linear(x.flip(0), packed, asked, tile=SMALL).flip(0)
    assert torch.equal(backwards[1:], whole[1:])


def test_the_tiles_in_use_give_a_row_the_same_bits() -> None:
    packed, x = made(300, 600, 70, 1)
    packed, x = on_device(packed), x.to(DEVICE)
    whole = linear(x, packed)
    for first, last in ((0, 1), (5, 69), (0, 65)):
        assert torch.equal(linear(x[first:last].contiguous(), packed), whole[first:last])


def test_few_rows_take_the_low_tile_and_steps_are_the_same() -> None:
    for chosen in LINEAR.values():
        assert chosen.of(1) == chosen.of(chosen.low[0]) == chosen.low
        assert chosen.of(chosen.low[0] + 1) == chosen.high
    assert LINEAR[architecture(DEVICE)].channels % 16 == 0


def test_wrong_arguments_are_refused() -> None:
    packed, x = made(4, 8, 3, 0)
    packed, x = on_device(packed), x.to(DEVICE)
    with pytest.raises(ValueError, match=r"x is \[3, 4\]"):
        linear(x[:, :4], packed)
    with pytest.raises(ValueError, match=r"contiguous \[T, 8\]"):
        linear(x.T.contiguous().T, packed)
    with pytest.raises(TypeError, match="one type"):
        linear(x.float(), packed)
