"""The engine process's own parts, and a real one on the simulated device."""

from __future__ import annotations

import asyncio
import os
import random
import runpy
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.config import EngineConfig
from weft.core.plan import TokenScore
from weft.core.request import Event, Finish, PromptScores, Request, RequestEnd, Timing, TokenOutput
from weft.core.sampling import SamplingParams
from weft.devices.simulated import continuation
from weft.errors import CheckpointError, DeviceError, NeverFits, QueueFull
from weft.ipc.channel import TO_ENGINE, Sender, make_folder
from weft.ipc.messages import Abort, AskStats, Died, Refused, Shutdown, Stats, Submit, ToEngine, Tokens
from weft.loop.client import EngineClient, launch
from weft.loop.worker import Inbox, batches, died, serve

stub = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("stub_worker.py"))))
SECONDS = 20.0


class Letters:
    """An inbox that has its messages already, and a sender that keeps what it is given."""

    def __init__(self, *rounds: list[ToEngine | Exception]) -> None:
        self.rounds = list(rounds)
        self.sent: list[Any] = []

    def take(self) -> list[Any]:
        return self.rounds.pop(0) if self.rounds else [Shutdown()]

    def send(self, message: Any) -> None:
        self.sent.append(message)


def run(*rounds: list[ToEngine | Exception]) -> list[Any]:
    letters = Letters(*rounds)
    engine = stub.StubEngine()
    engine.wake()
    serve(engine, letters, letters)  # type: ignore[arg-type]
    return letters.sent


def test_every_message_is_answered_before_the_next_step() -> None:
    refused, bad, stats, tokens = run(
        [
            Submit(Request("full", (stub.FULL,))),
            Submit(Request("bad", (stub.BAD,))),
            Submit(Request("a", (stub.ECHO, 5))),
            AskStats(),
            Abort("nobody"),
        ]
    )
    assert refused == Refused("full", "the queue is full: 3 requests wait", "queue_full", None, 7)
    assert bad == Refused("bad", "temperature is 9; use less", "invalid_value", "temperature", None)
    assert isinstance(stats, Stats) and stats.running == 1
    assert tokens == Tokens((TokenOutput("a", 0, 5),))


def test_a_fault_of_ours_refuses_the_request_and_tells_nothing_of_the_inside() -> None:
    (refused,) = run([Submit(Request("a", (stub.FAULT,)))])
    assert refused == Refused("a", "internal error: ZeroDivisionError", "", None, None)


def test_when_the_device_dies_the_ends_are_sent_first() -> None:
    letters = Letters([Submit(Request("a", (stub.DEAD,)))])
    with pytest.raises(DeviceError, match="burnt out"):
        serve(stub.StubEngine(), letters, letters)  # type: ignore[arg-type]
    (tokens,) = letters.sent
    assert [end.reason for end in tokens.ends] == [Finish.ERROR]


EVENTS = st.lists(
    st.one_of(
        st.builds(TokenOutput, st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 9)),
        st.builds(PromptScores, st.sampled_from("abc"), st.just((TokenScore(1, -1.0, 1),))),
        st.builds(
            lambda name: RequestEnd(name, Finish.STOP, 1, 0, 1, Timing(0.0)),
            st.sampled_from("abc"),
        ),
    ),
    max_size=12,
)


@given(events=EVENTS)
def test_a_round_crosses_whole_and_in_order_of_each_kind(events: list[Event]) -> None:
    sent = list(batches(events))
    for kind, name in ((TokenOutput, "outputs"), (PromptScores, "scores"), (RequestEnd, "ends")):
        assert [e for batch in sent for e in getattr(batch, name)] == [e for e in events if isinstance(e, kind)]
    assert all(len(batch.scores) <= 1 for batch in sent)
    assert len(sent) == sum(isinstance(e, PromptScores) for e in events) + any(
        not isinstance(e, PromptScores) for e in events
    )
    assert not sent or not any(batch.ends for batch in sent[:-1])  # an end comes after all else


def test_an_error_dies_in_its_own_words() -> None:
    assert died(CheckpointError("no weights")) == Died("no weights", "invalid_checkpoint")
    assert died(KeyError("hidden")) == Died("KeyError: 'hidden'", None)
    assert died(NotImplementedError()) == Died("NotImplementedError", None)
    assert died(OSError("caf\udce9")) == Died("OSError: caf\\udce9", None)


@pytest.fixture
def folder() -> Any:
    made = make_folder()
    yield made
    shutil.rmtree(made)


def test_the_inbox_wakes_the_engine_for_each_arrival_and_dies_with_its_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[float] = []
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as lifeline, os.fdopen(writer, "wb"):
        inbox: Inbox[ToEngine] = Inbox(folder, lifeline, TO_ENGINE, ToEngine)
        inbox.wake = lambda: woken.append(time.monotonic())
        sender: Sender[ToEngine] = Sender(folder, TO_ENGINE)
        sender.send(Abort("a"))
        _until(lambda: bool(woken))
        assert list(inbox.take()) == [Abort("a")] and list(inbox.take()) == []
        monkeypatch.setattr(inbox._receiver, "take", _fail)
        sender.send(Abort("b"))
        _until(lambda: len(woken) > 1)
        with pytest.raises(RuntimeError, match="deaf"):
            list(inbox.take())
        sender.close()
        inbox.close()


def _fail() -> None:
    raise RuntimeError("deaf")


def _until(condition: Any) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("partition", ["off", "1:1"])
async def test_a_real_engine_answers_as_the_oracle_although_it_preempts_and_clients_leave(partition: str) -> None:
    # Eleven blocks hold a quarter of what eight sequences need.
    config = EngineConfig(device="simulated", num_blocks=11, max_num_seqs=8, partition=partition)
    client = await EngineClient.start(config, launched=launch(config))
    rng = random.Random(7)
    try:
        vocabulary = client.ready.vocabulary

        async def ask(name: str, leave: bool) -> None:
            prompt = tuple(rng.randrange(16, vocabulary) for _ in range(rng.randint(1, 20)))
            count = rng.randint(30, 100)
            params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            stream = client.submit(Request(name, prompt, params))
            tokens: list[int | None] = []
            async for event in stream:
                if isinstance(event, TokenOutput):
                    tokens.append(event.token)
                    if leave and len(tokens) * 2 >= count:
                        await stream.aclose()
            assert tuple(tokens) == continuation(prompt, count, vocabulary)[: len(tokens)]
            assert leave or len(tokens) == count

        async with asyncio.timeout(60):
            await asyncio.gather(*(ask(f"r{i}", leave=i % 4 == 3) for i in range(24)))
            stats = await client.stats()
            while stats.running or stats.blocks_held:
                await asyncio.sleep(0.01)
                stats = await client.stats()
        assert stats.blocks_free + stats.blocks_cached == 11 and stats.preemptions > 0
        with pytest.raises(NeverFits):
            await anext(client.submit(Request("big", tuple(range(16, 216)))))
    finally:
        await client.close()
    assert client.launched.process.returncode == 0


async def test_the_queue_of_a_real_engine_is_bounded() -> None:
    config = EngineConfig(device="simulated", max_num_seqs=1, max_num_queued_reqs=2)
    client = await EngineClient.start(config, launched=launch(config))
    try:
        params = SamplingParams(max_tokens=1500, ignore_eos=True)
        streams = [client.submit(Request(f"r{i}", (20, 21), params)) for i in range(8)]
        results = await asyncio.gather(*(anext(stream) for stream in streams[4:]), return_exceptions=True)
        assert any(isinstance(result, QueueFull) and result.retry_after >= 1 for result in results)
    finally:
        await client.close()
