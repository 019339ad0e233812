"""`weft serve` as an operator meets it: real processes, signals, and what is left of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from weft.text.hub import resolve_model

SECONDS = 60.0
ENDING = 20.0


class Weft:
    """`weft serve ARGUMENTS` in a process group of its own, with its words in files."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self._out, self._log = folder / "out", folder / "log"
        self.sockets = folder / "tmp"  # where it makes the folder of its sockets
        self.sockets.mkdir()
        with self._out.open("wb") as out, self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "weft", "serve", *arguments],
                stdout=out,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self.sockets)},
                start_new_session=True,
            )

    @property
    def out(self) -> list[str]:
        return self._out.read_text().splitlines()

    @property
    def log(self) -> list[str]:
        return self._log.read_text().splitlines()

    def ready(self) -> httpx.Client:
        """Wait for the address, which is its last line; a client of it."""
        self.wait(lambda: bool(self.out) and self.out[-1].startswith("http://"))
        return httpx.Client(base_url=self.out[-1], timeout=SECONDS)

    def wait(self, condition: Callable[[], bool], alive: bool = True) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, (self.out, self.log)
            assert not alive or self.process.poll() is None, (self.out, self.log)
            time.sleep(0.02)

    def engine(self) -> int:
        """The process id of the engine process: the only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Wait for its end; the exit code. Nothing of it is left then."""
        code = self.process.wait(ENDING)
        self.wait(lambda: not members(self.process.pid) and not list(self.sockets.iterdir()), alive=False)
        return code

    def kill(self) -> None:
        if members(self.process.pid):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def members(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                fields = path.joinpath("stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(path.name))
    return found


def listeners(pids: Sequence[int]) -> set[tuple[str, int]]:
    """(address in hexadecimal, port) of every TCP socket on which one of the processes listens; UDP has no listeners,
    so any UDP socket counts."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            if match := re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink())):
                inodes.add(match[1])
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        path = Path(f"/proc/{pids[0]}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[9] in inodes and (fields[3] == "0A" or table.startswith("udp")):
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


def stream(http: httpx.Client, tokens: int) -> Iterator[str]:
    """The data of a streamed completion of so many tokens; a token takes two milliseconds."""
    body = {"prompt": [20, 21, 22], "max_tokens": tokens, "stream": True, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield line.removeprefix("data: ")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Weft]]:
    made: list[Weft] = []

    def start(*arguments: str) -> Weft:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Weft(folder, arguments))
        return made[-1]

    yield start
    for weft in made:
        weft.kill()


SIMULATED = ("--device", "simulated", "--port", "0")


def test_it_says_where_it_listens_and_listens_nowhere_else_and_drains_on_sigterm(serve: Callable[..., Weft]) -> None:
    weft = serve(*SIMULATED)
    with weft.ready() as http:
        port = http.base_url.port
        shown = "\n".join(weft.out)
        for words in ("Start-up", "seconds", "exec to ready", "Memory", "bytes", "KV pool"):
            assert words in shown
        assert port and port > 0 and not weft.process.poll()
        assert http.get("/health/ready").status_code == 200
        assert listeners([weft.process.pid, weft.engine()]) == {("0100007F", port)}
        (sockets,) = weft.sockets.iterdir()
        assert sockets.stat().st_mode & 0o777 == 0o700

        rival = serve("--device", "simulated", "--port", str(port))
        assert rival.ended() == 2
        assert f"--port {port}" in rival.log[-1] and "in use" in rival.log[-1]
        assert not rival.out

        events = stream(http, 600)
        text = [next(events)]
        weft.send(signal.SIGTERM)
        weft.wait(lambda: httpx.get(f"{http.base_url}/health/ready").status_code == 503)
        refused = httpx.post(f"{http.base_url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        text += events
        assert text[-1] == "[DONE]" and '"finish_reason":"length"' in text[-2]
    assert weft.ended() == 0
    assert "Traceback" not in "\n".join(weft.log)
    assert sum("ended: length" in line for line in weft.log) == 1


def test_ctrl_c_in_a_terminal_drains_and_a_second_one_ends_it_at_once(serve: Callable[..., Weft]) -> None:
    weft = serve(*SIMULATED)
    with weft.ready() as http:
        events = stream(http, 2000)
        next(events)
        # A terminal sends the signal to every process of the group.
        os.killpg(weft.process.pid, signal.SIGINT)
        weft.wait(lambda: any("shutting down" in line for line in weft.log))
        for _ in range(5):
            next(events)
        begun = time.monotonic()
        os.killpg(weft.process.pid, signal.SIGINT)
        rest = list(events)
        assert any("shutting down" in event for event in rest)
    assert weft.ended() == 1
    assert time.monotonic() - begun < ENDING
    assert "Traceback" not in "\n".join(weft.log)


def test_when_the_front_end_is_killed_the_engine_ends_as_well(serve: Callable[..., Weft]) -> None:
    weft = serve(*SIMULATED)
    weft.ready().close()
    engine = weft.engine()
    weft.send(signal.SIGKILL)
    assert weft.ended() == -signal.SIGKILL
    assert engine not in members(weft.process.pid)


def test_when_the_engine_is_killed_the_front_end_tells_its_clients_and_ends_with_the_reason(
    serve: Callable[..., Weft],
) -> None:
    weft = serve(*SIMULATED)
    with weft.ready() as http:
        events = stream(http, 2000)
        next(events)
        os.kill(weft.engine(), signal.SIGKILL)
        rest = list(events)
        assert "killed by SIGKILL" in json.loads(rest[-2] if rest[-1] == "[DONE]" else rest[-1])["error"]["message"]
    assert weft.ended() == 1
    assert "the engine process was killed by SIGKILL" in weft.log[-1]


def broken(folder: Path, name: str, content: str | None) -> Path:
    """A copy of the built-in model with one file replaced or left out."""
    made = folder / "model"
    shutil.copytree(resolve_model("builtin"), made)
    if content is None:
        made.joinpath(name).unlink()
    else:
        made.joinpath(name).write_text(content)
    return made


@pytest.mark.parametrize(
    ("name", "content", "flags", "words"),
    [
        ("config.json", "{}", ("--device", "simulated"), "config.json"),
        ("model.safetensors", None, ("--device", "cpu"), "safetensors"),
        ("tokenizer.json", "[]", ("--device", "simulated"), "tokenizer.json"),
    ],
)
def test_a_model_that_cannot_be_served_is_told_in_one_clear_last_line(
    serve: Callable[..., Weft], tmp_path: Path, name: str, content: str | None, flags: tuple[str, ...], words: str
) -> None:
    folder = broken(tmp_path, name, content)
    weft = serve(str(folder), *flags, "--port", "0")
    assert weft.ended() == 1
    assert weft.log[-1].startswith("weft serve: ") and words in weft.log[-1] and str(folder) in weft.log[-1]
    assert "Traceback" not in "\n".join(weft.log)
    assert not weft.out


def test_a_signal_while_it_loads_ends_it(serve: Callable[..., Weft]) -> None:
    weft = serve("--device", "cpu", "--port", "0")
    weft.wait(lambda: any("starting:" in line for line in weft.log))
    weft.send(signal.SIGTERM)
    assert weft.ended() == 0


def test_keys_are_asked_for_and_do_not_appear_in_what_it_says(serve: Callable[..., Weft]) -> None:
    weft = serve(*SIMULATED, "--api-key", "sesame-1234", "--host", "0.0.0.0")
    with weft.ready() as http:
        base = f"http://127.0.0.1:{http.base_url.port}"
        assert httpx.get(f"{base}/v1/models").status_code == 401
        keyed: Any = httpx.get(f"{base}/v1/models", headers={"authorization": "Bearer sesame-1234"})
        assert keyed.status_code == 200
    weft.send(signal.SIGTERM)
    assert weft.ended() == 0
    assert "sesame" not in "\n".join([*weft.out, *weft.log])
