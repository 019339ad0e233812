"""The cuda device computes ahead of its plans: whatever happens to the sequences meanwhile, nobody gets a wrong token.

The GPU here is one that puts everything off: what is launched lies in its stream until somebody waits for it, or chance
has it done, whatever other streams do. It computes what the simulated device does: tokens that are a function of the
whole prefix as it is found in the blocks. So a launch that should have waited for another's writes gives itself away.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weft.core.plan import Capacity, Lane, Partition, Plan, Result, Sampling, Slice
from weft.core.request import Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices import cuda_lane
from weft.devices.base import Description
from weft.devices.cuda import CudaDevice
from weft.devices.cuda_green import GreenSms
from weft.devices.cuda_lane import CudaLane, Pending
from weft.devices.cuda_streams import SharedStream
from weft.devices.oracle import Executor, Faults, continuation
from weft.errors import DeviceError
from weft.loop.engine import Engine

BLOCK, VOCABULARY = 4, 211
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


class Later:
    """An event: so many operations of a stream."""

    def __init__(self, stream: LazyStream, place: int) -> None:
        self.stream, self.place = stream, place

    def wait(self) -> None:
        with self.stream.lock:
            if self.stream.broken:
                raise DeviceError("the GPU failed: it was told to")
            self.stream.run(self.place)

    def reached(self) -> bool:
        return self.stream.done >= self.place

    def seconds_since(self, earlier: Later) -> float:
        return 0.001


class LazyStream:
    pace = 0.3

    def __init__(self, lock: threading.RLock, streams: list[LazyStream], chance: random.Random) -> None:
        self.lock, self.streams, self.chance = lock, streams, chance
        self.work: list[Callable[[], None]] = []
        self.done = 0
        self.broken = False
        self.followed: list[Later] = []
        streams.append(self)

    @contextmanager
    def use(self) -> Iterator[None]:
        with self.lock:
            for stream in self.streams:  # a GPU gets on as it likes
                if self.chance.random() < self.pace:
                    stream.run(self.chance.randint(stream.done, len(stream.work)))
            yield

    def run(self, place: int) -> None:
        while self.done < place:
            self.work[self.done]()
            self.done += 1

    def mark(self) -> Later:
        return Later(self, len(self.work))

    def follow(self, event: Later) -> None:
        self.followed.append(event)
        self.work.append(lambda: event.stream.run(event.place))

    def check(self) -> None:
        Later(self, len(self.work)).wait()

    def move(self, share: int) -> None:
        assert share == 4, "a mixed lane does not move"

    def moved(self) -> float:
        return 0.0

    @property
    def now(self) -> LazyStream:
        return self


class LazyForward:
    """Computes on the executor's slots; `launched` has what was asked of it, and whether its tokens were fed."""

    head: Any = None

    def __init__(self, stream: Any, executor: Executor) -> None:
        self.stream, self.executor = stream, executor
        self.drawn: list[int] = []
        self.launched: list[tuple[tuple[int, ...], bool]] = []

    def run(self, slices: Sequence[Slice], rows: Sequence[int], feeds: Sequence[int] | None = None) -> list[int | str]:
        self.launched.append((tuple(piece.sequence for piece in slices), feeds is not None))
        outcome: list[int | str] = []

        def work() -> None:
            fed = slices
            if feeds is not None:
                fed = [
                    Slice(piece.sequence, piece.start, (self.drawn[feed],), piece.blocks, piece.sample)
                    for piece, feed in zip(slices, feeds, strict=True)
                ]
            found = self.executor.run(Plan(0, Lane.MIXED, tuple(fed)), 0.0)
            tokens = {sampled.sequence: sampled.token for sampled in found.sampled}
            outcome.extend(tokens[piece.sequence] for piece in slices if piece.sample is not None)
            self.drawn = [token for token in outcome if isinstance(token, int)]

        self.stream.now.work.append(work)
        return outcome

    def hidden(self) -> torch.Tensor:
        raise AssertionError("nobody asks for scores here")

    def look(self) -> Callable[[Any], None]:
        return lambda done: done.wait()


def lazy_draw(gpu: Any, logits: list[int | str], samplings: Sequence[Sampling], drawn: Any) -> Any:
    return SimpleNamespace(read=lambda: [(token, None) for token in logits])


class Lazy:
    """A cuda device on a GPU that puts everything off."""

    def __init__(
        self,
        blocks: int,
        lanes: tuple[Lane, ...],
        *,
        seed: int = 0,
        max_model_len: int | None = None,
        adopt: Callable[[], None] = lambda: None,
        have: Callable[[Lane, int], Any] = lambda lane, share: None,
    ) -> None:
        """adopt: what a thread does first. have: what a lane does to have a share for the first time."""
        capacity = Capacity(blocks, BLOCK, 16, 6, 8, max_model_len or blocks * BLOCK, VOCABULARY, ahead=1)
        executor, lock, streams = Executor(capacity, Faults()), threading.RLock(), list[LazyStream]()
        decoder: Any = SimpleNamespace(max_model_len=capacity.max_model_len)
        gpu: Any = SimpleNamespace(shares=8, adopt=adopt)
        self.forwards: dict[Lane, LazyForward] = {}
        self.lanes: dict[Lane, CudaLane] = {}
        for lane in lanes:

            def make(share: int, lane: Lane = lane) -> Any:
                have(lane, share)
                return LazyStream(lock, streams, random.Random(seed))

            stream: Any = make(0) if lane is Lane.MIXED else SharedStream(make, 4)
            self.forwards[lane] = LazyForward(stream, executor)
            forward: Any = self.forwards[lane]
            self.lanes[lane] = CudaLane(gpu, stream, decoder, forward, BLOCK)
        self.streams = streams
        self.device = CudaDevice(
            capacity,
            gpu,
            self.lanes,
            description=Description("cuda", "none", "none"),
            memory=(),
            partition=None if lanes == (Lane.MIXED,) else Partition(4, 4),
        )


@pytest.fixture(autouse=True)
def lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_lane, "start_draw", lazy_draw)


@pytest.fixture
def lane() -> Iterator[tuple[CudaLane, LazyForward]]:
    lazy = Lazy(32, (Lane.MIXED,), max_model_len=40)
    yield lazy.lanes[Lane.MIXED], lazy.forwards[Lane.MIXED]
    lazy.device.close()


def piece(sequence: int, prefix: Sequence[int], count: int = 1, room: int = 4, **changes: Any) -> Slice:
    """The last `count` tokens of a prefix; blocks are the sequence's own, with room for `room` more."""
    blocks = tuple(range(8 * sequence, 8 * sequence + -(-(len(prefix) + room) // BLOCK)))
    changes.setdefault("sample", Sampling(GREEDY, 0, len(prefix)))
    return Slice(sequence, len(prefix) - count, tuple(prefix[len(prefix) - count :]), blocks, **changes)


def begin(lane: CudaLane, *sequences: int) -> dict[int, list[int]]:
    """Prefill a prompt of each sequence: what is known of them then."""
    prefixes = {sequence: [sequence, 7, 9] for sequence in sequences}
    slices = tuple(piece(sequence, prefix, len(prefix)) for sequence, prefix in prefixes.items())
    take(prefixes, lane.start(Plan(1, Lane.MIXED, slices)).finish())
    return prefixes


def take(prefixes: dict[int, list[int]], result: Result) -> None:
    """Append what was drawn; it must be the oracle's."""
    assert result.error is None and not result.failed
    for sampled in result.sampled:
        prefix = prefixes[sampled.sequence]
        assert (sampled.token,) == continuation(prefix, 1, VOCABULARY)
        prefix.append(sampled.token)


def test_a_result_says_what_its_lane_took_to_adopt_a_new_share() -> None:
    lazy = Lazy(32, (Lane.PREFILL, Lane.DECODE))
    one = lazy.lanes[Lane.DECODE]
    found = []
    for share in (4, 5, 5):
        found.append(one.start(Plan(1, Lane.DECODE, (piece(0, [1, 2], 2),)), share=share).finish().moved)
    assert found[0] == found[2] == 0.0 < found[1]
    lazy.device.close()


def test_a_share_that_the_driver_refuses_costs_no_step_and_is_told_of_once(
    driver: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lazy = Lazy(32, (Lane.PREFILL, Lane.DECODE), have=GreenSms(0, driver, (9, 0)).stream)
    driver.set_contexts(0)
    try:
        moved, steps = [], iter(range(1, 99))
        for share, contexts in ((4, 0), (5, 0), (5, 0), (4, 0), (5, 0), (4, 0), (5, 1)):
            driver.set_contexts(contexts)
            lazy.device.set_partition(Partition(share, 4))
            found = answers(
                lazy, *[Plan(next(steps), name, (piece(number, [1, 2], 2),)) for number, name in enumerate(lazy.lanes)]
            )
            assert [one.error for one in found.values()] == [None, None]
            moved.append([one.moved > 0 for one in found.values() if one.ticket.lane is Lane.PREFILL])
        assert moved == [[False]] * 6 + [[True]]
        wanted = (
            "lane prefill keeps the share that it has, not 5: "
            "DeviceError: cuGreenCtxCreate failed: CUDA_ERROR_OUT_OF_MEMORY (2)"
        )
        assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", wanted)]
    finally:
        driver.set_contexts(1000)
        lazy.device.close()


def decode(lane: CudaLane, prefixes: dict[int, list[int]], *sequences: int, **changes: Any) -> None:
    slices = tuple(piece(sequence, prefixes[sequence], **changes) for sequence in sequences)
    take(prefixes, lane.start(Plan(2, Lane.MIXED, slices)).finish())


def test_a_decode_step_is_launched_before_it_is_asked_for(lane: tuple[CudaLane, LazyForward]) -> None:
    one, forward = lane
    prefixes = begin(one, 0, 1)
    assert forward.launched == [((0, 1), False)]  # after prompts nothing is guessed
    decode(one, prefixes, 0, 1)
    assert forward.launched[1:] == [((0, 1), False), ((0, 1), True)]
    for _ in range(3):
        decode(one, prefixes, 0, 1)
    assert forward.launched[3:] == [((0, 1), True)] * 3  # one step in flight, the next one behind it, and no other


def test_who_has_ended_costs_a_row_and_who_is_new_a_launch(lane: tuple[CudaLane, LazyForward]) -> None:
    one, forward = lane
    prefixes = begin(one, 0, 1, 2)
    decode(one, prefixes, 0, 1)
    del forward.launched[:]
    decode(one, prefixes, 1)
    assert forward.launched == [((1,), True)]
    decode(one, prefixes, 1, 2)
    assert forward.launched[1:] == [((2,), False)]  # and nothing ahead: the two are not in one launch
    decode(one, prefixes, 1, 2)
    assert forward.launched[2:] == [((1, 2), False), ((1, 2), True)]


def test_a_plan_that_asks_something_else_is_computed_anew(lane: tuple[CudaLane, LazyForward]) -> None:
    one, forward = lane
    others: list[dict[str, Any]] = [
        {"sample": Sampling(SamplingParams(temperature=0.5), 3, 9)},
        {"sample": None},
        {"count": 2},
    ]
    for number, changes in enumerate(others):
        prefixes = begin(one, 0)
        decode(one, prefixes, 0)
        decode(one, prefixes, 0)
        launched = len(forward.launched)
        decode(one, prefixes, 0, **changes)
        assert not forward.launched[launched][1], number
    prefixes = begin(one, 0)
    decode(one, prefixes, 0)
    prefixes[0][-1] += 1  # another token than was drawn
    decode(one, prefixes, 0)
    moved = piece(0, prefixes[0])
    moved = Slice(0, moved.start, moved.tokens, (*moved.blocks[:-1], 30), moved.sample)
    assert one.start(Plan(3, Lane.MIXED, (moved,))).finish().error is None
    assert not forward.launched[-2][1]


@pytest.mark.parametrize(
    "changes",
    [
        {"room": 0},
        {"sample": Sampling(SamplingParams(repetition_penalty=1.1), 0, 5)},
        {"sample": Sampling(GREEDY, 0, 5, forbidden=(3,))},
    ],
    ids=["no room", "penalties", "min_tokens"],
)
def test_what_nobody_can_know_is_not_guessed(lane: tuple[CudaLane, LazyForward], changes: dict[str, Any]) -> None:
    one, forward = lane
    prefixes = begin(one, 0)
    prefixes[0].extend(continuation(prefixes[0], 3, VOCABULARY))
    decode(one, prefixes, 0, count=4)
    assert len(prefixes[0]) == 2 * BLOCK
    launched = len(forward.launched)
    one.start(Plan(2, Lane.MIXED, (piece(0, prefixes[0], **changes),))).finish()
    assert len(forward.launched) == launched + 1


def test_nothing_is_computed_beyond_the_longest_length(lane: tuple[CudaLane, LazyForward]) -> None:
    one, forward = lane
    prefixes = begin(one, 0)
    for _ in range(36):
        decode(one, prefixes, 0)
    assert len(prefixes[0]) == 40
    decode(one, prefixes, 0)
    assert len(forward.launched) == 1 + 37  # the prompt and each plan once: nothing after the last


def test_a_launch_waits_for_the_other_lanes_guess_only_where_both_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LazyStream, "pace", 0.0)
    lazy = Lazy(32, (Lane.PREFILL, Lane.DECODE))
    try:
        lane, other = lazy.lanes[Lane.DECODE], lazy.lanes[Lane.PREFILL]
        prefixes = begin(lane, 0)
        decode(lane, prefixes, 0)
        (guessed,) = piece(0, prefixes[0]).blocks[len(prefixes[0]) // BLOCK :][:1]
        free = Slice(5, 0, (1, 2, 3), (20,), Sampling(GREEDY, 0, 3))
        assert other.start(Plan(9, Lane.PREFILL, (free,)), [lane]).finish().error is None
        assert lazy.streams[0].followed == []
        taken = Slice(6, 0, (1, 2, 3), (guessed,), Sampling(GREEDY, 0, 3))
        take({6: [1, 2, 3]}, other.start(Plan(10, Lane.PREFILL, (taken,)), [lane]).finish())
        assert len(lazy.streams[0].followed) == 1
    finally:
        lazy.device.close()


def test_a_guess_is_void_once_another_lane_has_written_to_its_block() -> None:
    """A sequence is preempted, somebody else has its blocks for a while, and then it gets the very same ones again."""
    lazy = Lazy(32, (Lane.PREFILL, Lane.DECODE))
    try:
        lane, other = lazy.lanes[Lane.DECODE], lazy.lanes[Lane.PREFILL]
        prefixes = begin(lane, 0)
        decode(lane, prefixes, 0)
        (block,) = piece(0, prefixes[0]).blocks[len(prefixes[0]) // BLOCK :][:1]
        somebody = Slice(5, 0, (1, 2, 3, 4), (block,), Sampling(GREEDY, 0, 4))
        take({5: [1, 2, 3, 4]}, other.start(Plan(9, Lane.PREFILL, (somebody,)), [lane]).finish())
        back = piece(0, prefixes[0][:-1], len(prefixes[0]) - 1)
        assert other.start(Plan(10, Lane.PREFILL, (back,)), [lane]).finish().error is None
        launched = len(lazy.forwards[Lane.DECODE].launched)
        for _ in range(3):
            decode(lane, prefixes, 0)
        assert not lazy.forwards[Lane.DECODE].launched[launched][1], "computed anew"
    finally:
        lazy.device.close()


@pytest.mark.parametrize("lanes", [(Lane.MIXED,), (Lane.PREFILL, Lane.DECODE)], ids=["mixed", "two lanes"])
@pytest.mark.parametrize("seed", range(6))
def test_everybody_gets_the_oracles_tokens_in_a_pool_that_is_too_small(lanes: tuple[Lane, ...], seed: int) -> None:
    """Preemption, aborts, stop ids and prefix hits: blocks change hands all the time, guesses in flight or not. Lanes
    move between streams, each of which gets on as it likes."""
    chance = random.Random(seed)
    lazy = Lazy(14, lanes, seed=seed)
    scheduler = Scheduler(lazy.device.capacity(), lanes, SchedulerSettings(max_num_seqs=6, max_num_batched_tokens=16))
    engine = Engine(lazy.device, scheduler)
    wanted: dict[str, list[int]] = {}
    found: dict[str, list[int]] = {}
    ends: dict[str, RequestEnd] = {}
    try:
        for number in range(40):
            prompt = tuple(chance.choice((5, 6)) for _ in range(chance.randint(1, 20)))
            whole = list(continuation(prompt, chance.randint(1, 24), VOCABULARY))
            stop = chance.choice(whole)
            params = SamplingParams(temperature=0.0, max_tokens=len(whole), ignore_eos=True, stop_token_ids=(stop,))
            wanted[str(number)] = whole[: whole.index(stop) + 1]
            found[str(number)] = []
            engine.submit(Request(str(number), prompt, params))
        while not engine.idle:
            for event in engine.step(10.0):
                if isinstance(event, TokenOutput) and event.token is not None:
                    found[event.request].append(event.token)
                elif isinstance(event, RequestEnd):
                    ends[event.request] = event
            if chance.random() < 0.05:
                engine.abort(str(chance.randrange(40)))
            if chance.random() < 0.1:
                scheduler.preempt(str(chance.randrange(40)))
            if len(lanes) == 2 and chance.random() < 0.3:
                lazy.device.set_partition(Partition(chance.randint(1, 8), chance.randint(1, 8)))
        launched = [entry for forward in lazy.forwards.values() for entry in forward.launched]
        assert sum(fed for _, fed in launched) > 20
    finally:
        engine.close()
    assert len(ends) == 40
    for name, end in ends.items():
        assert end.error is None
        assert found[name] == wanted[name][: len(found[name])]
        assert len(found[name]) == len(wanted[name]) or end.reason.value == "abort"


def test_a_gpu_that_has_failed_ends_the_device() -> None:
    lazy = Lazy(32, (Lane.MIXED,))
    try:
        plan = Plan(1, Lane.MIXED, (piece(0, [1, 2, 3], 3),))
        lazy.device.submit(plan)
        (first,) = lazy.device.poll(10.0)
        assert first.error is None
        lazy.streams[0].broken = True
        lazy.device.submit(plan)
        (second,) = lazy.device.poll(10.0)
        assert second.error == "the GPU failed: it was told to"
        with pytest.raises(DeviceError, match="it was told to"):
            lazy.device.submit(plan)
    finally:
        lazy.device.close()


def answers(lazy: Lazy, *plans: Plan) -> dict[int, Result]:
    for plan in plans:
        lazy.device.submit(plan)
    found: dict[int, Result] = {}
    while len(found) < len(plans):
        results = lazy.device.poll(10.0)
        assert results, "a plan without a result"
        found |= {result.ticket.step: result for result in results}
    return found


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("which", ["launch", "collect"])
def test_a_lane_whose_thread_cannot_work_for_the_gpu_says_so_and_the_other_goes_on(which: str) -> None:
    def adopt() -> None:
        if threading.current_thread().name == f"weft-prefill-{which}":
            raise RuntimeError("no context for this thread")

    lazy = Lazy(32, (Lane.PREFILL, Lane.DECODE), adopt=adopt)
    try:
        plans = [Plan(step, Lane.PREFILL, (piece(step, [1, 2], 2),)) for step in (1, 2)]
        found = answers(lazy, *plans, Plan(3, Lane.DECODE, (piece(3, [1, 2], 2),)))
        found |= answers(lazy, Plan(4, Lane.PREFILL, (piece(1, [1, 2], 2),)))
        wanted = "the thread of lane prefill has ended: RuntimeError: no context for this thread"
        assert {step: (one.error, one.gone) for step, one in found.items()} == {
            1: (wanted, True),
            2: (wanted, True),
            3: (None, False),
            4: (wanted, True),
        }
    finally:
        lazy.device.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["start", "finish"])
def test_a_lane_is_gone_when_the_device_has_done_what_it_launched(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Plans that were launched before its first thread ended have their results."""
    monkeypatch.setattr(LazyStream, "pace", 0.0)  # the device does nothing before somebody waits for it
    lazy = Lazy(32, (Lane.MIXED,))
    owner = CudaLane if where == "start" else Pending
    whole = getattr(owner, where)

    def ends(self: Any, *given: Any, **named: Any) -> Any:
        plan = given[0] if where == "start" else self.plan
        found = whole(self, *given, **named) if where == "start" or plan.step == 1 else None
        if plan.step == 2:
            raise SystemExit("told to go")
        return found

    monkeypatch.setattr(owner, where, ends)
    try:
        found = answers(lazy, *[Plan(step, Lane.MIXED, (piece(step, [1, 2], 2),)) for step in (1, 2, 3)])
        assert (found[1].error, found[2].gone, found[3].gone) == (None, True, True)
        assert found[2].error == "the thread of lane mixed has ended: SystemExit: told to go"
        (stream,) = lazy.streams
        assert stream.done == len(stream.work)
    finally:
        lazy.device.close()
