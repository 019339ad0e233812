"""The engine process and its client, mostly around a stub engine (stub_worker.py)."""

from __future__ import annotations

import asyncio
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from weft.config import EngineConfig
from weft.core.request import Event, Finish, Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.errors import CheckpointError, InvalidRequest, QueueFull, Unavailable, WeftError
from weft.ipc.messages import Ready
from weft.loop.client import EngineClient, EventStream, Launched, launch

STUB = Path(__file__).with_name("stub_worker.py")
COMMAND = (sys.executable, str(STUB))
stub = SimpleNamespace(**runpy.run_path(str(STUB)))
SECONDS = 20.0


def launched(model: str = "stub") -> Launched:
    return launch(EngineConfig(model=model), command=COMMAND)


@asynccontextmanager
async def started(model: str = "stub") -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(EngineConfig(), launched=launched(model))
    try:
        yield client
    finally:
        await client.close()


async def collect(stream: EventStream) -> list[Event]:
    async with asyncio.timeout(SECONDS):
        return [event async for event in stream]


def gone(launched: Launched) -> bool:
    return launched.process.returncode is not None and not launched.folder.exists()


async def test_start_up_tells_of_each_phase_and_of_what_serves() -> None:
    phases: list[str] = []
    client = await EngineClient.start(EngineConfig(), on_phase=phases.append, launched=launched("stub"))
    assert phases == ["weights", "KV"]
    assert isinstance(client.ready, Ready) and (client.ready.model, client.ready.blocks) == ("stub", 100)
    assert [phase.name for phase in client.ready.phases] == ["engine imports", "weights", "KV"]
    assert client.alive and client.dead_reason is None
    await client.close()
    assert gone(client.launched) and client.launched.process.returncode == 0
    await client.close()
    assert not client.alive and client.dead_reason == "it was shut down"


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("broken", CheckpointError, "model.safetensors is missing\nfrom the folder"),
        ("odd", WeftError, "KeyError: 'hidden_size'"),
        ("killed", WeftError, "the engine process was killed by SIGKILL (which the system does when memory runs out)"),
        ("exits", WeftError, "the engine process ended with exit code 3"),
    ],
)
async def test_a_death_at_start_up_is_raised_in_the_engines_own_words(
    model: str, kind: type[WeftError], words: str
) -> None:
    process = launched(model)
    with pytest.raises(WeftError) as caught:
        await EngineClient.start(EngineConfig(), launched=process)
    assert (type(caught.value), caught.value.message) == (kind, words)
    assert gone(process)


async def test_a_command_that_is_no_engine_is_an_error_and_no_hang() -> None:
    process = launch(EngineConfig(), command=(sys.executable, "-c", "raise SystemExit(9)"))
    with pytest.raises(WeftError, match="ended with exit code 9"):
        await EngineClient.start(EngineConfig(), launched=process)


async def test_closing_while_the_engine_loads_ends_it_at_once() -> None:
    process = launched("slow")
    client = EngineClient(process)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.wait_ready(), 0.5)
    with pytest.raises(Unavailable, match="not ready"):
        _ = client.ready
    begun = time.monotonic()
    await client.close()
    assert time.monotonic() - begun < 5 and gone(process)


async def test_requests_side_by_side_get_their_own_events_in_order() -> None:
    async with started() as client:
        streams = [client.submit(Request(f"r{i}", (stub.ECHO, *range(i, i + 20)))) for i in range(50)]
        for i, events in enumerate(await asyncio.gather(*map(collect, streams))):
            assert all(event.request == f"r{i}" for event in events)
            tokens = [event.token for event in events if isinstance(event, TokenOutput)]
            assert tokens == list(range(i, i + 20))
            ends = [event for event in events if isinstance(event, RequestEnd)]
            assert ends == events[-1:] and ends[0].reason is Finish.STOP


async def test_a_refusal_keeps_its_class_and_what_it_carries() -> None:
    async with started() as client:
        with pytest.raises(QueueFull, match="3 requests wait") as full:
            await collect(client.submit(Request("a", (stub.FULL,))))
        assert full.value.retry_after == 7
        with pytest.raises(InvalidRequest, match="use less") as bad:
            await collect(client.submit(Request("a", (stub.BAD,))))
        assert bad.value.param == "temperature"


async def test_a_request_that_finds_a_fault_of_ours_does_not_end_the_others() -> None:
    async with started() as client:
        other = client.submit(Request("other", (stub.FOREVER,)))
        with pytest.raises(WeftError, match="internal error") as fault:
            await collect(client.submit(Request("a", (stub.FAULT,))))
        assert fault.value.status == 500
        assert isinstance(await anext(other), TokenOutput)


async def test_what_cannot_be_sent_is_the_clients_error() -> None:
    async with started() as client:
        with pytest.raises(InvalidRequest, match="cannot be handed"):
            client.submit(Request("a", (stub.ECHO,), SamplingParams(stop=("\ud800",))))
        client.submit(Request("b", (stub.FOREVER,)))
        with pytest.raises(InvalidRequest, match="under way"):
            client.submit(Request("b", (stub.ECHO,)))
        assert len(await collect(client.submit(Request("a", (stub.ECHO, 1))))) == 3


async def test_aclose_aborts_the_request_in_the_engine() -> None:
    async with started() as client:
        stream = client.submit(Request("a", (stub.FOREVER,)))
        await anext(stream)
        assert (await client.stats()).running == 1
        await stream.aclose()
        assert (await client.stats()).running == 0
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await stream.aclose()
        await collect(client.submit(Request("b", (stub.ECHO, 1))))
        assert len(await collect(client.submit(Request("a", (stub.ECHO, 1))))) == 3  # the id is free again


async def test_abort_still_delivers_the_end_and_an_unknown_id_is_ignored() -> None:
    async with started() as client:
        client.abort("nobody")
        stream = client.submit(Request("a", (stub.FOREVER,)))
        await anext(stream)
        client.abort("a")
        last = (await collect(stream))[-1]
        assert isinstance(last, RequestEnd) and last.reason is Finish.ABORT
        client.abort("a")


async def test_a_stop_names_the_sequence_and_an_unknown_id_is_ignored() -> None:
    async with started() as client:
        client.stop("nobody", 0)
        stream = client.submit(Request("a", (stub.FOREVER,)))
        await anext(stream)
        client.stop("a", 3)
        *_, output, end = await collect(stream)
        assert isinstance(output, TokenOutput) and (output.index, output.finish) == (3, Finish.STOP)
        assert isinstance(end, RequestEnd) and end.reason is Finish.STOP
        client.stop("a", 3)


async def test_stats_are_answered_to_everybody_who_asks_also_while_requests_run() -> None:
    async with started() as client:
        stream = client.submit(Request("a", (stub.FOREVER,)))
        await anext(stream)
        answers = await asyncio.gather(*(client.stats() for _ in range(10)))
        assert {answer.running for answer in answers} == {1}
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.stats(), 0)  # one who asked and left harms nobody
        assert (await client.stats()).blocks_held == 4


async def test_a_crash_of_the_engine_wakes_everybody_with_its_own_words() -> None:
    async with started() as client:
        waiting = [asyncio.create_task(collect(client.submit(Request(f"w{i}", (stub.FOREVER,))))) for i in range(3)]
        await client.stats()
        crash = client.submit(Request("c", (stub.CRASH,)))
        results = await asyncio.gather(*waiting, collect(crash), return_exceptions=True)
        for result in results:
            assert isinstance(result, Unavailable) and "RuntimeError: the stub fell over" in result.message
        assert (await client.death).message == client.dead_reason == "RuntimeError: the stub fell over"
        assert not client.alive
        with pytest.raises(Unavailable, match="the stub fell over"):
            await collect(client.submit(Request("late", (stub.ECHO, 1))))
        with pytest.raises(Unavailable, match="the stub fell over"):
            await client.stats()
        client.abort("late")


async def test_when_the_device_dies_requests_get_their_ends_before_the_death() -> None:
    async with started() as client:
        events = await collect(client.submit(Request("a", (stub.DEAD,))))
        assert isinstance(events[-1], RequestEnd) and events[-1].reason is Finish.ERROR
        death = await asyncio.wait_for(client.death, SECONDS)
        assert (death.code, death.message) == ("device_error", "the stub's device burnt out")
    assert client.launched.process.returncode == stub.CLOSED  # it had the time to close


async def test_a_killed_engine_is_noticed() -> None:
    async with started() as client:
        with pytest.raises(Unavailable, match="killed by SIGKILL"):
            await collect(client.submit(Request("a", (stub.KILL,))))
        assert "SIGKILL" in (client.dead_reason or "")


async def test_closing_ends_open_streams_with_the_reason() -> None:
    async with started() as client:
        open_stream = asyncio.create_task(collect(client.submit(Request("a", (stub.FOREVER,)))))
        asking = asyncio.create_task(client.stats())
        await asyncio.sleep(0)
        await client.close("the server is shutting down")
        with pytest.raises(Unavailable, match="the server is shutting down"):
            await open_stream
        with pytest.raises(Unavailable, match="the server is shutting down"):
            await asking
        assert gone(client.launched)


async def test_signals_to_the_whole_group_do_not_end_the_engine() -> None:
    async with started() as client:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(client.launched.process.pid, number)
        assert len(await collect(client.submit(Request("a", (stub.ECHO, 1))))) == 3


async def test_an_idle_engine_sleeps() -> None:
    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def switches(pid: int) -> int:
        text = "".join(task.joinpath("status").read_text() for task in Path(f"/proc/{pid}/task").iterdir())
        return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("voluntary_ctxt_switches"))

    async with started() as client:
        pid = client.launched.process.pid
        await collect(client.submit(Request("a", (stub.ECHO, 1))))
        await asyncio.sleep(0.2)
        before, woken = ticks(pid), switches(pid)
        await asyncio.sleep(1.5)
        assert ticks(pid) - before <= 1
        assert switches(pid) - woken <= 5  # it waits in the kernel and does not look again and again


PARENT = """
import asyncio, sys, time
from weft.config import EngineConfig
from weft.loop.client import EngineClient, launch

async def main():
    launched = launch(EngineConfig(model=sys.argv[1]), command=sys.argv[2:])
    client = EngineClient(launched)
    if sys.argv[1] != "slow":
        await client.wait_ready()
    print(launched.process.pid, launched.folder, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("model", ["stub", "slow"])
def test_when_the_parent_is_killed_the_engine_ends_and_tidies_up(model: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, model, *COMMAND], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().split()
    if model == "slow":
        time.sleep(0.3)  # it is on its way into the load
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and (_alive(int(pid)) or Path(folder).exists()):
        time.sleep(0.02)
    assert not _alive(int(pid)) and not Path(folder).exists()


def _alive(pid: int) -> bool:
    """Whether it runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
