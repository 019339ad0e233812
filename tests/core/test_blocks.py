from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.core.blocks import BlockPool, PoolError


def pool(total: int = 4) -> tuple[BlockPool, list[int]]:
    forgotten: list[int] = []
    return BlockPool(total, forgotten.append), forgotten


def states(blocks: BlockPool) -> tuple[int, int, int, int]:
    blocks.check()
    assert blocks.conserved
    return blocks.free, blocks.cached, blocks.held, blocks.pinned


def test_a_block_goes_free_held_free() -> None:
    blocks, _ = pool()
    taken = blocks.take(3)
    assert len(set(taken)) == 3 and states(blocks) == (1, 0, 3, 0)
    blocks.release(taken)
    assert states(blocks) == (4, 0, 0, 0)


def test_a_published_block_is_cached_and_can_be_shared_again() -> None:
    blocks, forgotten = pool()
    (block,) = blocks.take(1)
    blocks.publish(block)
    blocks.release((block,))
    assert states(blocks) == (3, 1, 0, 0) and blocks.idle([block]) == 1
    blocks.share([block])
    blocks.share([block])
    assert states(blocks) == (3, 0, 1, 0) and blocks.idle([block]) == 0
    blocks.release((block,))
    assert states(blocks) == (3, 0, 1, 0)
    blocks.release((block,))
    assert states(blocks) == (3, 1, 0, 0) and forgotten == []


def test_cached_blocks_are_evicted_oldest_first_and_the_end_of_a_table_before_its_beginning() -> None:
    blocks, forgotten = pool()
    first, second = blocks.take(2), blocks.take(2)
    for block in (*first, *second):
        blocks.publish(block)
    blocks.release(second)
    blocks.release(first)
    assert blocks.available == 4
    blocks.take(4)
    assert forgotten == [second[1], second[0], first[1], first[0]]


def test_a_pinned_block_is_not_reused_before_its_ticket_lands() -> None:
    blocks, _ = pool(2)
    table = blocks.take(2)
    blocks.pin(table)
    blocks.release(table)
    assert states(blocks) == (0, 0, 0, 2) and blocks.available == 0
    with pytest.raises(PoolError, match="0 of 2 are available"):
        blocks.take(1)
    blocks.unpin(table)
    assert states(blocks) == (2, 0, 0, 0)


def test_a_pinned_block_that_is_findable_can_be_held_again() -> None:
    blocks, _ = pool(1)
    table = blocks.take(1)
    blocks.publish(table[0])
    blocks.pin(table)
    blocks.release(table)
    blocks.share(table)
    assert states(blocks) == (0, 0, 1, 0)
    blocks.unpin(table)
    assert states(blocks) == (0, 0, 1, 0)
    blocks.release(table)
    assert states(blocks) == (0, 1, 0, 0)


def test_reset_keeps_only_what_tickets_name() -> None:
    blocks, _ = pool(4)
    table = blocks.take(4)
    blocks.publish(table[0])
    blocks.reset([table[:2], table[1:2]])
    assert states(blocks) == (2, 0, 0, 2)
    blocks.unpin(table[:2])
    blocks.unpin(table[1:2])
    assert states(blocks) == (4, 0, 0, 0)


@pytest.mark.parametrize("wrong", ["release", "unpin", "pin", "publish", "share"])
def test_what_would_break_the_invariant_is_refused(wrong: str) -> None:
    blocks, _ = pool()
    with pytest.raises(PoolError):
        getattr(blocks, wrong)(0 if wrong == "publish" else (0,))
    assert states(blocks) == (4, 0, 0, 0)


def test_check_sees_a_block_in_two_states_and_a_lost_block() -> None:
    blocks, _ = pool()
    (block,) = blocks.take(1)
    blocks._free.append(block)
    assert not blocks.conserved
    with pytest.raises(PoolError, match="wrong"):
        blocks.check()
    blocks, _ = pool()
    blocks._free.pop()
    with pytest.raises(PoolError):
        blocks.check()


@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["take", "release", "pin", "unpin", "publish", "share"]), st.integers(0, 7))
    )
)
def test_the_pool_agrees_with_a_model_of_four_lines(moves: list[tuple[str, int]]) -> None:
    blocks, _ = pool(5)
    owners: list[int] = [0] * 5
    pins: list[int] = [0] * 5
    found: set[int] = set()
    tables: list[Any] = []
    pinned: list[Any] = []
    for move, pick in moves:
        if move == "take" and pick % 3 <= blocks.available:
            table = blocks.take(pick % 3)
            assert all(owners[block] == pins[block] == 0 for block in table), "a block in use was given away"
            tables.append(table)
            found -= set(table)
            for block in table:
                owners[block] += 1
        elif move == "release" and tables:
            table = tables.pop(pick % len(tables))
            blocks.release(table)
            for block in table:
                owners[block] -= 1
        elif move == "pin" and tables:
            pinned.append(tables[pick % len(tables)])
            blocks.pin(pinned[-1])
            for block in pinned[-1]:
                pins[block] += 1
        elif move == "unpin" and pinned:
            table = pinned.pop(pick % len(pinned))
            blocks.unpin(table)
            for block in table:
                pins[block] -= 1
        elif move == "publish" and pick < 5 and owners[pick]:
            blocks.publish(pick)
            found.add(pick)
        elif move == "share" and pick in found:
            blocks.share((pick,))
            tables.append((pick,))
            owners[pick] += 1
        held = sum(count > 0 for count in owners)
        left = sum(pin > 0 and not owner for pin, owner in zip(pins, owners, strict=True))
        cached = sum(not owners[block] and not pins[block] for block in found)
        assert states(blocks) == (5 - held - left - cached, cached, held, left)
