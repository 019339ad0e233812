"""A device that computes ahead wants room for one token more: it gets it where nobody else pays for it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core.plan import Capacity, Lane, Plan
from weft.core.request import Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices.simulated import ManualDevice, continuation

BLOCK = 4
VOCABULARY = 97


def serve(blocks: int, lengths: list[tuple[int, int]], ahead: int) -> tuple[list[Plan], Scheduler]:
    """Serve requests of (prompt, output) tokens to their ends; every answer is checked. The plans that were made."""
    capacity = Capacity(blocks, BLOCK, 16, 8, 1, blocks * BLOCK, VOCABULARY, ahead=ahead)
    device = ManualDevice(capacity)
    scheduler = Scheduler(capacity, (Lane.MIXED,), SchedulerSettings(), key=b"k")
    wanted = {}
    for number, (prompt_len, output_len) in enumerate(lengths):
        prompt = tuple((number + i) % VOCABULARY for i in range(prompt_len))
        params = SamplingParams(max_tokens=output_len, ignore_eos=True)
        scheduler.submit(Request(str(number), prompt, params), 0.0)
        wanted[str(number)] = list(continuation(prompt, output_len, VOCABULARY))
    found: dict[str, list[int]] = {name: [] for name in wanted}
    plans = []
    while (plan := scheduler.schedule(Lane.MIXED, 0.0)) is not None:
        plans.append(plan)
        device.submit(plan)
        device.run(Lane.MIXED)
        for event in scheduler.complete(device.poll(0.0)[0], 0.0):
            if isinstance(event, TokenOutput) and event.token is not None:
                found[event.request].append(event.token)
            assert not isinstance(event, RequestEnd) or event.error is None, event
        assert scheduler.pool.conserved
    assert found == wanted
    return plans, scheduler


def test_every_decode_slice_has_room_for_the_next_token_but_for_the_last_of_a_request() -> None:
    plans, scheduler = serve(64, [(5, 20), (8, 20), (3, 20)], ahead=1)
    decode = [piece for plan in plans for piece in plan.slices if piece.start and len(piece.tokens) == 1]
    last = {piece.sequence: piece for piece in decode}
    assert len(decode) > 50
    for piece in decode:
        if piece is not last[piece.sequence]:
            assert len(piece.blocks) * BLOCK > piece.end
    assert scheduler.running.preemptions == 0


def test_without_the_wish_a_table_is_no_longer_than_it_must_be() -> None:
    plans, _ = serve(64, [(5, 20), (8, 20), (3, 20)], ahead=0)
    for plan in plans:
        for piece in plan.slices:
            if piece.start and len(piece.tokens) == 1:
                assert len(piece.blocks) == -(-piece.end // BLOCK)


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.integers(8, 14),
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 16)), min_size=1, max_size=8),
)
def test_a_tight_pool_serves_everybody_and_preempts_no_more_often(blocks: int, lengths: list[tuple[int, int]]) -> None:
    _, with_room = serve(blocks, lengths, ahead=1)
    _, without = serve(blocks, lengths, ahead=0)
    assert with_room.running.preemptions <= without.running.preemptions + 1
    for scheduler in (with_room, without):
        assert scheduler.pool.free + scheduler.pool.cached == blocks
