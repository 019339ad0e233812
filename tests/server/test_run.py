"""`serve` in this process, around the stub engine of tests/loop: what it prints, answers and returns in every turn of
its life. tests/system/test_lifecycle.py has the real command."""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from weft.config import EngineConfig, ServerConfig
from weft.errors import CheckpointError, ConfigError, WeftError
from weft.ipc.messages import Phase, Ready
from weft.loop.client import launch
from weft.server import listen as listening
from weft.server import run
from weft.server.listen import is_local, listen, url
from weft.server.startup import exec_time, human_bytes, show
from weft.text.hub import resolve_model

STUB = Path(__file__).parents[1] / "loop" / "stub_worker.py"
stub = SimpleNamespace(**runpy.run_path(str(STUB)))
SECONDS = 20.0


class Run:
    """One life of a server: `serve` in the main thread, as signals need it, and a script of a client beside it."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=SECONDS)

    def __call__(self, script: Callable[[Run], Any], model: str = "builtin", **settings: Any) -> tuple[Any, Any]:
        """What `serve` returned or raised, and what the script returned."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(self._play, script)
            try:
                code: Any = run.serve(EngineConfig(model=model), ServerConfig(port=self.port, **settings))
            except WeftError as error:
                code = error
            return code, future.result(SECONDS)

    def _play(self, script: Callable[[Run], Any]) -> Any:
        try:
            return script(self)
        except BaseException:
            self.stop()
            self.stop()
            raise

    def until(self, status: int, path: str = "/health/ready") -> httpx.Response:
        """Ask until the answer has this status."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            try:
                answer = self.http.get(path)
                if answer.status_code == status:
                    return answer
            except httpx.TransportError:
                pass
            time.sleep(0.01)
        raise AssertionError(f"{path} never had the status {status}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        os.kill(os.getpid(), number)

    def complete(self, *prompt: int) -> httpx.Response:
        body = {"prompt": list(prompt), "max_tokens": 1000, "ignore_eos": True}
        return self.http.post("/v1/completions", json=body)

    def stream(self, *prompt: int) -> Iterator[str]:
        """The data of a streamed completion, event by event."""
        body = {"prompt": list(prompt), "max_tokens": 1000, "stream": True, "ignore_eos": True}
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield line.removeprefix("data: ")


@pytest.fixture
def life(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    monkeypatch.setattr(run, "launch", functools.partial(launch, command=(sys.executable, str(STUB))))
    monkeypatch.setattr(run, "resolve_model", lambda model, revision: resolve_model("builtin"))
    monkeypatch.setattr(run.logs, "set_up", lambda level: None)
    monkeypatch.setattr(run.gc, "freeze", lambda: None)  # this process goes on after the server
    made = Run(capsys)
    yield made
    made.http.close()


@pytest.fixture
def engines(life: Run, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is launched."""
    launched: list[Any] = []
    inner = run.launch

    def noted(*arguments: Any, **named: Any) -> Any:
        launched.append(inner(*arguments, **named))
        return launched[-1]

    monkeypatch.setattr(run, "launch", noted)
    return launched


def test_a_server_that_nobody_asks_starts_and_ends_well(life: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def script(life: Run) -> str:
        life.until(200)
        answers = {
            path: life.http.get(path) for path in ("/health/live", "/health", "/version", "/v1/models", "/metrics")
        }
        assert {answer.status_code for answer in answers.values()} == {200}
        assert answers["/v1/models"].json()["data"][0]["id"] == "builtin"
        assert 'weft:kv_blocks{model_name="builtin",state="held"} 4.0' in answers["/metrics"].text
        assert all(answer.headers["x-request-id"] and "server" not in answer.headers for answer in answers.values())
        life.stop()
        return ""

    assert life(script)[0] == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"http://127.0.0.1:{life.port}"
    for words in ("weights", "0.25", "engine imports", "server imports", "tokenizer and template", "exec to ready"):
        assert words in out
    assert "3,221,225,472" in out and "3.0 GiB" in out and "512 B" in out
    assert "note: a stub is fast" in out


def test_settings_of_the_server_are_heeded(life: Run, tmp_path: Path) -> None:
    keys, template = tmp_path / "keys", tmp_path / "template.jinja"
    keys.write_text("secret\n")
    keys.chmod(0o600)
    template.write_text("{{ messages[0].content }}")

    def script(life: Run) -> None:
        life.until(200)
        assert life.http.get("/v1/models").status_code == 401
        life.http.headers["authorization"] = "Bearer secret"
        names = [model["id"] for model in life.http.get("/v1/models").json()["data"]]
        assert names == ["one", "two"]
        assert life.http.get("/metrics").status_code == 404
        assert life.http.post("/tokenize", json={"prompt": "x" * 2000}).status_code == 413
        life.stop(signal.SIGINT)

    code, _ = life(
        script,
        api_key_file=keys,
        served_model_name=("one", "two"),
        enable_metrics=False,
        max_body_bytes=1024,
        chat_template=template,
    )
    assert code == 0


def test_while_it_loads_it_lives_and_is_not_ready_and_a_signal_ends_it(life: Run) -> None:
    def script(life: Run) -> None:
        assert life.until(200, "/health/live").json() == {"status": "live"}
        for path in ("/health/ready", "/v1/models", "/metrics"):
            answer = life.http.get(path)
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert "loading" in answer.json()["error"]["message"]
        life.stop()

    begun = time.monotonic()
    assert life(script, "slow")[0] == 0
    assert time.monotonic() - begun < SECONDS


def test_a_drain_lets_running_requests_finish_and_takes_no_others(life: Run) -> None:
    def script(life: Run) -> list[str]:
        life.until(200)
        stream = life.stream(stub.SLOW, *range(30, 50))
        events = [next(stream)]
        life.stop()
        assert "shutting down" in life.until(503).json()["error"]["message"]
        refused = life.complete(stub.ECHO, 5)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert life.http.get("/health/live").status_code == 200
        assert life.http.get("/metrics").status_code == 200
        return events + list(stream)

    code, events = life(script)
    assert code == 0
    assert events[-1] == "[DONE]"
    assert sum("text" in choice for event in events[:-1] for choice in json.loads(event)["choices"]) >= 1
    assert '"finish_reason":"stop"' in events[-2]


@pytest.mark.parametrize("how", ["second signal", "time is up"])
def test_requests_that_do_not_finish_are_aborted_and_told_so(life: Run, how: str) -> None:
    def script(life: Run) -> list[str]:
        life.until(200)
        stream = life.stream(stub.FOREVER)
        events = [next(stream)]
        life.stop()
        life.until(503)
        if how == "second signal":
            life.stop()
        return events + list(stream)

    begun = time.monotonic()
    code, events = life(script, shutdown_timeout=0.3 if how == "time is up" else 600)
    assert code == 1 and time.monotonic() - begun < SECONDS
    assert any("shutting down" in event for event in events[-2:])


def test_a_client_that_does_not_read_cannot_hold_up_the_end(
    life: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small_buffers(*where: Any) -> socket.socket:
        listener = listen(*where)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(run, "listen", small_buffers)
    body = json.dumps({"prompt": [stub.FOREVER], "max_tokens": 1000, "stream": True, "ignore_eos": True}).encode()
    lines = (
        "POST /v1/completions HTTP/1.1",
        "Host: weft",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )

    def script(life: Run) -> socket.socket:
        life.until(200)
        stalled = socket.create_connection(("127.0.0.1", life.port))
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        time.sleep(3)  # the buffers on the way fill up
        life.stop()
        life.until(503)
        life.stop()
        return stalled

    code, stalled = life(script)
    stalled.close()
    assert code == 1
    assert "their clients do not take them" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_when_the_engine_dies_every_client_is_told_and_serve_raises_its_words(life: Run) -> None:
    def script(life: Run) -> tuple[list[str], httpx.Response]:
        life.until(200)
        stream = life.stream(stub.FOREVER)
        events = [next(stream)]
        other = life.complete(stub.CRASH)
        return events + list(stream), other

    error, (events, other) = life(script)
    assert isinstance(error, WeftError) and error.message == "RuntimeError: the stub fell over"
    assert any("the stub fell over" in event for event in events)
    assert other.status_code == 503 and "the stub fell over" in other.json()["error"]["message"]


def test_an_engine_that_died_is_started_again_as_often_as_was_allowed(
    life: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """Who is served when it dies is told; who comes after it is served by the next one, at the same port."""

    def script(life: Run) -> list[int]:
        found = []
        for _ in range(3):
            life.until(200)
            events = [life.complete(stub.ECHO, 7).status_code, life.complete(stub.CRASH).status_code]
            found += events
        return found

    with caplog.at_level(logging.WARNING, run.__name__):
        error, found = life(script, engine_restarts=2)
    assert isinstance(error, WeftError) and error.message == "RuntimeError: the stub fell over"
    assert found == [200, 503] * 3
    words = [record.getMessage() for record in caplog.records if "started again" in record.getMessage()]
    assert [line.rpartition("allows ")[2] for line in words] == ["1 more", "0 more"]


def test_a_server_that_was_told_to_end_starts_nothing_again(life: Run, engines: list[Any]) -> None:
    def script(life: Run) -> None:
        life.until(200)
        stream = life.stream(stub.FOREVER)
        next(stream)
        life.stop()
        life.until(503)
        engines[0].process.kill()
        assert any("killed by SIGKILL" in event for event in stream)

    error, _ = life(script, engine_restarts=5)
    assert isinstance(error, WeftError) and "killed by SIGKILL" in error.message
    assert len(engines) == 1


def test_what_the_engine_died_of_at_start_up_is_raised(life: Run) -> None:
    error, _ = life(lambda life: None, "broken", engine_restarts=3)
    assert isinstance(error, CheckpointError) and error.message.startswith("model.safetensors is missing")


def test_what_the_front_end_cannot_use_ends_the_engine_too(
    life: Run, engines: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "resolve_model", lambda model, revision: tmp_path)
    error, _ = life(lambda life: None, "slow")
    assert isinstance(error, CheckpointError) and "tokenizer.json" in error.message
    assert engines[0].process.returncode is not None and not engines[0].folder.exists()


def test_settings_that_cannot_be_are_refused_before_anything_starts(life: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(run, "launch", never)
    with pytest.raises(ConfigError, match="--max-num-seqs"):
        run.serve(EngineConfig(max_num_seqs=0), ServerConfig())
    with pytest.raises(ConfigError, match="--engine-restarts is -1"):
        run.serve(EngineConfig(), ServerConfig(engine_restarts=-1))
    with pytest.raises(ConfigError, match="--port"):
        run.serve(EngineConfig(), ServerConfig(port=99999))
    with pytest.raises(ConfigError, match="--api-key-file"):
        run.serve(EngineConfig(), ServerConfig(port=0, api_key_file=Path("missing")))
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="Address already in use"):
        run.serve(EngineConfig(), ServerConfig(port=taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("host", "keys", "warned"), [("0.0.0.0", (), True), ("0.0.0.0", ("k",), False), ("127.0.0.1", (), False)]
)
def test_an_open_door_is_warned_of(
    life: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    host: str,
    keys: tuple[str],
    warned: bool,
) -> None:
    def stop(*arguments: Any) -> Any:
        raise CheckpointError("stop here")

    monkeypatch.setattr(run, "resolve_model", stop)
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError):
        run.serve(EngineConfig(), ServerConfig(host=host, port=0, api_key=keys))
    assert ("--api-key" in caplog.text) is warned


def test_the_address_is_the_one_that_is_bound() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert (url(listener), is_local(listener)) == (f"http://127.0.0.1:{port}", True)
        with pytest.raises(ConfigError, match=f"--port {port}.*in use"):
            listen("127.0.0.1", port)
    with listen("localhost", 0) as listener:
        assert is_local(listener)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_ipv6_address_is_in_brackets() -> None:
    try:
        listener = listen("::1", 0)
    except ConfigError:
        pytest.skip("no IPv6 address here")
    with listener:
        assert re.fullmatch(r"http://\[::1\]:\d+", url(listener)) and is_local(listener)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "x" * 300, "\ud800", "a..b"])
def test_a_host_that_is_not_here_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        listen(host, 0)
    assert listening.BACKLOG > 0


def test_bytes_are_shown_as_people_read_them() -> None:
    sizes = (0, 1023, 1024, 1536, 2**20, 5 * 2**29, 3 * 2**40, 2**60)
    shown = ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "2.5 GiB", "3.0 TiB", "1048576.0 TiB"]
    assert [human_bytes(size) for size in sizes] == shown


def test_the_process_began_before_now() -> None:
    assert 0 < time.monotonic() - exec_time() < 86400


def test_words_in_brackets_are_shown_as_they_are() -> None:
    out = io.StringIO()
    ready = Ready("[bold]x", "cpu", "f", "k", 10, 5, 1, 1, 1, (), (("[red]w", 1),), ("[link=x]note",))
    show(out, ready, [Phase("[a]", 1.0)], [Phase("[b]", 2.0)], 3.0, "http://[::1]:80")
    assert out.getvalue().splitlines()[-1] == "http://[::1]:80"
    for words in ("[bold]x", "[red]w", "[link=x]note", "[a]", "[b]"):
        assert words in out.getvalue()
