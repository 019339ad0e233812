"""Memory of the C++ extension: blocks are cut from shared regions, and must not notice."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Any

import pytest

_native = pytest.importorskip("weft._native")

SIZES = (1, 63, 64, 4095, 4096, 4097, 100_000, 2 * 2**20, 2 * 2**20 + 1, 40 * 2**20, 65, 30 * 2**20, 5)


def view(memory: Any) -> Any:
    return (ctypes.c_char * memory.bytes).from_address(memory.address)


def test_blocks_are_zeroed_and_do_not_overlap() -> None:
    backend = _native.Backend("portable", [0])
    blocks = [_native.Memory(size, backend) for size in SIZES]
    for block, size in zip(blocks, SIZES, strict=True):
        assert block.bytes == size and block.address % 64 == 0
        assert not any(view(block)[:: max(1, size // 1000)])
    spans = sorted((block.address, block.address + block.bytes) for block in blocks)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_a_released_block_leaves_its_neighbours_alone() -> None:
    backend = _native.Backend("portable", [0])
    blocks = [_native.Memory(size, backend) for size in SIZES]
    for number, block in enumerate(blocks):
        ctypes.memset(block.address, number + 1, block.bytes)
    for block in blocks[::2]:
        block.release()
        block.release()
        assert block.bytes == 0
    for number, block in list(enumerate(blocks))[1::2]:
        assert set(bytes(view(block))) == {number + 1}
    fresh = [_native.Memory(size, backend) for size in SIZES]
    assert not any(any(view(block)[:: max(1, block.bytes // 1000)]) for block in fresh)
