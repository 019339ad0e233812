"""The channel between front end and engine: what it carries, and what it refuses."""

from __future__ import annotations

import logging
import pickle
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.core.plan import TokenScore
from weft.core.request import Finish, PromptScores, Request, RequestEnd, Timing, TokenOutput
from weft.core.sampling import SamplingParams
from weft.errors import ConfigError
from weft.ipc import channel
from weft.ipc.channel import FROM_ENGINE, TO_ENGINE, Receiver, Sender, make_folder
from weft.ipc.messages import (
    Abort,
    AskStats,
    Died,
    FromEngine,
    Phase,
    Ready,
    Refused,
    Shutdown,
    Starting,
    Stats,
    Stop,
    Submit,
    ToEngine,
    Tokens,
)

SECONDS = 10.0
TEXT = "naïve 日本 \U0001f642"


@pytest.fixture
def folder() -> Iterator[Path]:
    made = make_folder()
    yield made
    channel.shutil.rmtree(made)


@pytest.fixture
def to_engine(folder: Path) -> Iterator[tuple[Sender[ToEngine], Receiver[ToEngine]]]:
    receiver: Receiver[ToEngine] = Receiver(folder, TO_ENGINE, ToEngine)
    sender: Sender[ToEngine] = Sender(folder, TO_ENGINE)
    yield sender, receiver
    sender.close()
    receiver.close()


def wait(take: Callable[[], object]) -> object:
    """The next message, which is on its way."""
    end = time.monotonic() + SECONDS
    while (message := take()) is None:
        if time.monotonic() > end:
            raise AssertionError("no message came")
        time.sleep(0.001)
    return message


def raw(folder: Path, name: str, *parts: bytes) -> None:
    """Send bytes as they are, as somebody would who is no weft process."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.LINGER, 5000)
        socket.connect(f"ipc://{folder / name}")
        for data in parts:
            socket.send(data)


REQUEST = Request(
    "cmpl-1",
    tuple(range(300)),
    SamplingParams(seed=2**64 - 1, stop=(TEXT,), logit_bias=((3, -1.5),), logprobs=3),
    eos=(2, 7),
    priority=-3,
    cache_salt=TEXT,
)
TO = [Submit(REQUEST), Abort("cmpl-1"), Stop("cmpl-1", 3), Shutdown(), AskStats()]
FROM = [
    Starting("weights"),
    Ready("m", "cpu", "bfloat16", "avx512", 2048, 512, 9, 16, 4, (Phase("KV", 0.5),), (("KV pool", 2**40),), (TEXT,)),
    Died(TEXT, "device_error"),
    Refused("a", "no", "queue_full", "prompt", 3),
    Stats(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12.5),
    Tokens(
        (TokenOutput("a", 1, 5, TokenScore(5, -0.25, 1, ((5, -0.25), (6, -3.5))), Finish.STOP, 5),),
        (PromptScores("a", (TokenScore(9, float("-inf"), 77),)),),
        (RequestEnd("a", Finish.ERROR, 3, 1, 2, Timing(1.0, None, 2.0, 3.0), TEXT, "step_failed", 4),),
    ),
]


def test_the_folder_is_closed_to_others(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    Receiver(folder, TO_ENGINE, ToEngine).close()


def test_a_temporary_folder_with_too_long_a_name_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(channel.tempfile, "tempdir", str(long))
    with pytest.raises(ConfigError, match="TMPDIR"):
        make_folder()
    assert list(long.iterdir()) == []
    monkeypatch.setattr(channel.tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="TMPDIR"):
        make_folder()


@pytest.mark.parametrize("union, name, messages", [(ToEngine, TO_ENGINE, TO), (FromEngine, FROM_ENGINE, FROM)])
def test_every_message_arrives_as_it_was_sent_and_in_order(
    folder: Path, union: object, name: str, messages: list[object]
) -> None:
    sender: Sender[object] = Sender(folder, name)
    for message in messages:
        sender.send(message)  # before anybody is there to take it
    receiver: Receiver[object] = Receiver(folder, name, union)
    assert [wait(receiver.take) for _ in messages] == messages
    assert receiver.take() is None
    sender.close()
    receiver.close()


def test_what_was_sent_last_arrives_although_the_sender_closes(folder: Path) -> None:
    sender: Sender[FromEngine] = Sender(folder, FROM_ENGINE)
    receiver: Receiver[FromEngine] = Receiver(folder, FROM_ENGINE, FromEngine)
    sender.send(Died("the last word"))
    sender.close(5.0)
    assert wait(receiver.take) == Died("the last word")
    receiver.close()
    receiver.close()
    assert receiver.closed


def test_pickle_is_refused(folder: Path, to_engine: tuple[Sender[ToEngine], Receiver[ToEngine]]) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return open, (str(folder / "exploded"), "w")  # type: ignore[return-value]

    sender, receiver = to_engine
    raw(folder, TO_ENGINE, *(pickle.dumps(Bomb(), protocol) for protocol in range(6)))
    sender.send(AskStats())
    assert wait(receiver.take) == AskStats()
    assert not (folder / "exploded").exists()


def encoded(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


SUBMIT = msgspec.to_builtins(Submit(REQUEST))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"GET / HTTP/1.1\r\n\r\n",
        encoded(AskStats())[:-1],
        encoded(AskStats()) + b"\x00",
        encoded({"type": "Exec", "code": "1"}),
        encoded({"type": "Stats"}),  # a message of the other direction
        encoded({"request": "a"}),
        encoded({"type": "Abort", "request": 7}),
        encoded({"type": "Abort"}),
        encoded({"type": "Abort", "request": b"\xff"}),
        b"\x82\xa4type\xa5Abort\xa7request\xa2\xff\xfe",  # a text that is not UTF-8
        encoded({**SUBMIT, "request": None}),
        encoded({**SUBMIT, "request": {**SUBMIT["request"], "prompt": "text"}}),
        encoded({**SUBMIT, "request": {**SUBMIT["request"], "prompt": [1.5]}}),
        encoded({**SUBMIT, "request": {**SUBMIT["request"], "params": {"temperature": "hot"}}}),
        encoded(msgspec.msgpack.Ext(1, b"code")),
        b"\x91" * 5000,  # lists within lists
        b"\x83\xa4type\xa5Abort\xa7request\xa1a\xa5extra" + b"\x91" * 1_000_000 + b"\xc0",
    ],
)
def test_what_is_no_message_is_refused_and_logged_and_the_next_one_arrives(
    data: bytes,
    folder: Path,
    to_engine: tuple[Sender[ToEngine], Receiver[ToEngine]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, receiver = to_engine
    with caplog.at_level(logging.WARNING):
        raw(folder, TO_ENGINE, data, encoded(Abort("next")))
        assert wait(receiver.take) == Abort("next")
    assert f"refused {len(data)} bytes" in caplog.text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.lists(st.binary(max_size=200), max_size=5))
def test_no_bytes_harm_the_receiver(
    junk: list[bytes], to_engine: tuple[Sender[ToEngine], Receiver[ToEngine]], folder: Path
) -> None:
    _, receiver = to_engine
    raw(folder, TO_ENGINE, *junk, encoded(Abort("end")))
    assert wait(receiver.take) == Abort("end")


def test_a_message_beyond_the_limit_is_sent_by_nobody_and_taken_from_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "MAX_MESSAGE_BYTES", 1000)
    sender: Sender[ToEngine] = Sender(folder, TO_ENGINE)
    receiver: Receiver[ToEngine] = Receiver(folder, TO_ENGINE, ToEngine)
    with pytest.raises(ValueError, match="at most 1000"):
        sender.send(Abort("x" * 1000))
    raw(folder, TO_ENGINE, encoded(Abort("y" * 1000)))
    sender.send(Abort("z" * 900))
    assert wait(receiver.take) == Abort("z" * 900)
    sender.close()
    receiver.close()


def test_half_of_a_surrogate_pair_cannot_be_sent(to_engine: tuple[Sender[ToEngine], Receiver[ToEngine]]) -> None:
    with pytest.raises(ValueError):
        to_engine[0].send(Abort("\ud800"))
