"""How often a step can be repeated before anything else could happen: for devices in virtual time.

Most steps of a run only decode, the same sequences as the step before. Where it is certain that nobody begins, ends or
is preempted, one plan stands for all of them, and what it costs to plan them is paid once. What comes from outside,
such as a request, ends it: see `VirtualDevice.cut`. So a run has the same steps as if each had been planned.
"""

from __future__ import annotations

from weft.core.running import Running
from weft.core.sequence import Sequence


def often(running: Running, members: list[Sequence], most: int) -> int:
    """Times, at most `most`, that a step of these sequences can be carried out. In the last one somebody may end.

    1 where prompts are computed, in this step or later.
    """
    # Somebody who waits cannot begin yet, or would be here. What is written meanwhile may be a part of its prompt.
    if running.prefilling or (running.caching and running.waiting):
        return 1
    size, free = running.block_size, running.pool.free
    slots = running.pool.total * size
    times, room = min(most, size + 1), []
    for one in members:
        # Its end has to be known, and each draw to depend on nothing that the device does not have.
        if one.stop_ids or one.plain is None or one.plain.logprobs is not None:
            return 1
        length = len(one.tokens)
        times = min(times, min(one.max_len, slots + 1) - length)
        room.append(len(one.table) * size - length)
    if free < len(room):
        # Nobody needs more than one block in so few steps. Those who need one first get those that are free.
        times = min(times, 1 + sorted(room)[free])
    return times
