"""`weft chat`: the conversation, and the client of a server behind --url."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any, Self

import pytest

from weft.cli import main
from weft.cli.chat import converse, default_interrupt, gentle_interrupt, printable
from weft.cli.remote import Remote
from weft.core.sampling import SamplingParams
from weft.errors import ConfigError, InvalidRequest, Unavailable, WeftError
from weft.text.generation import GenerationDefaults


def reader(*lines: str) -> Callable[[str], str]:
    left = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


class Talks:
    """Answers with the words it was asked, and keeps what it was told."""

    def __init__(self) -> None:
        self.heard: list[list[dict[str, str]]] = []

    def __call__(self, messages: list[dict[str, str]]) -> Iterator[str]:
        self.heard.append([dict(message) for message in messages])
        if messages[-1]["content"] == "fail":
            raise InvalidRequest("too long")
        if messages[-1]["content"] == "break":
            yield "half"
            raise Unavailable("gone")
        if messages[-1]["content"] == "interrupt":
            yield "so "
            signal.raise_signal(signal.SIGINT)  # to this thread, which has it before it goes on
            yield "far"
            yield "never"
            return
        yield from ("you said ", messages[-1]["content"])


def contents(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def test_a_conversation_is_remembered_until_it_is_reset(capsys: pytest.CaptureFixture[str]) -> None:
    talks = Talks()
    start = [{"role": "system", "content": "be kind"}]
    lines = ("a", "", "  b ", "/what", "/reset", "c", "/exit", "never")
    assert converse(talks, start, default_interrupt, reader(*lines)) == 0
    assert [contents(heard) for heard in talks.heard] == [
        ["be kind", "a"],
        ["be kind", "a", "you said a", "b"],
        ["be kind", "c"],
    ]
    shown = capsys.readouterr().out
    assert "you said b\n" in shown and "/reset forgets" in shown and "never" not in shown


def test_a_question_that_fails_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    talks = Talks()
    assert converse(talks, [], default_interrupt, reader("fail", "break", "a")) == 0
    assert contents(talks.heard[-1]) == ["a"]
    assert capsys.readouterr().err == "too long\n\ngone\n"


@pytest.fixture
def keyboard() -> Iterator[None]:
    """Ctrl+C as a terminal's program has it; one that a shell has put into the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("keyboard")
@pytest.mark.parametrize("interrupt", [default_interrupt, gentle_interrupt])
def test_ctrl_c_stops_the_answer_and_not_the_conversation(interrupt: Any, capsys: pytest.CaptureFixture[str]) -> None:
    talks = Talks()
    before = signal.getsignal(signal.SIGINT)
    assert converse(talks, [], interrupt, reader("interrupt", "a")) == 0
    assert signal.getsignal(signal.SIGINT) is before
    kept = contents(talks.heard[-1])
    assert kept[0] == "interrupt" and kept[1].startswith("so ") and kept[2] == "a"
    assert "never" not in capsys.readouterr().out


def test_ctrl_c_at_the_prompt_ends() -> None:
    def read(prompt: str) -> str:
        raise KeyboardInterrupt

    assert converse(Talks(), [], default_interrupt, read) == 0


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2J\x07\r\n\tb\x9b日") == "a[2J\n\tb日"


class Handler(BaseHTTPRequestHandler):
    """Enough of an OpenAI-compatible server; `script` maps a path to (status, content type, body)."""

    script: dict[str, tuple[int, str, bytes]]
    heard: list[tuple[str, Any, str | None]]

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: Any) -> None:
        self.heard.append((self.path, body, self.headers.get("Authorization")))
        status, kind, content = self.script.get(self.path, (404, "text/html", b"<html>"))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: Any) -> None:
        """Silence."""


@pytest.fixture
def server() -> Iterator[tuple[str, Any]]:
    handler = type("Scripted", (Handler,), {"script": {}, "heard": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}", handler
        finally:
            listening.shutdown()
            thread.join()


def sse(*events: Any) -> bytes:
    lines = (f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)
    return (": keep-alive\n\n" + "".join(lines)).encode()


def delta(text: str | None) -> dict[str, Any]:
    return {"choices": [{"delta": {} if text is None else {"content": text}}]}


CHAT, MODELS = "/v1/chat/completions", "/v1/models"
STREAM = "text/event-stream"


def test_chat_with_a_server(server: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    url, handler = server
    handler.script[MODELS] = (200, "application/json", b'{"data": [{"id": "tiny"}]}')
    handler.script[CHAT] = (
        200,
        STREAM,
        sse(delta(None), delta("Grü"), delta("ße"), {"choices": []}, "[DONE]", delta("x")),
    )
    monkeypatch.setattr("builtins.input", reader("hello"))
    assert main(["chat", "--url", url + "/v1/", "--api-key", "hush", "--temperature", "0", "--system", "be kind"]) == 0
    assert "Grüße\n" in capsys.readouterr().out
    path, body, key = handler.heard[-1]
    assert (path, key) == (CHAT, "Bearer hush")
    talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert body == {"messages": talk, "stream": True, "model": "tiny", "temperature": 0.0}
    monkeypatch.setattr("builtins.input", reader("hello"))
    monkeypatch.setenv("WEFT_API_KEY", "first, second")  # as weft serve takes it
    assert main(["chat", "--url", url]) == 0 and handler.heard[-1][2] == "Bearer first"


def test_what_a_server_may_answer(server: tuple[str, Any]) -> None:
    url, handler = server
    remote = Remote(url)
    with pytest.raises(WeftError, match="answers 404 Not Found: no reason given"):
        remote.first_model()
    handler.script[MODELS] = (200, "application/json", b'{"data": []}')
    with pytest.raises(WeftError, match="lists no models"):
        remote.first_model()
    handler.script[CHAT] = (401, "application/json", b'{"error": {"message": "no key"}}')
    with pytest.raises(WeftError, match="answers 401 Unauthorized: no key"):
        list(remote.stream_chat([]))
    handler.script[CHAT] = (200, STREAM, sse(delta("a"), {"error": {"message": "step failed"}}))
    with pytest.raises(WeftError, match="step failed"):
        list(remote.stream_chat([]))
    handler.script[CHAT] = (200, STREAM, sse("not json", delta("a"), delta("b")))
    assert list(remote.stream_chat([])) == ["a", "b"]


def test_no_server_there() -> None:
    with pytest.raises(Unavailable, match=r"no server answers at 127\.0\.0\.1:9"):
        Remote("http://127.0.0.1:9").first_model()


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://host:port", "http://[::1", "http://a..b"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        Remote(url)


@pytest.mark.parametrize("key", ["a\nb", "schlüssel"])
def test_keys_that_no_header_carries(key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key has characters") as refused:
        Remote("http://127.0.0.1:9", key)
    assert key not in refused.value.message


def test_engine_flags_are_not_for_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9", "--max-num-seqs", "4"]) == 2
    assert "--max-num-seqs: these are for a model in this process" in capsys.readouterr().err


def test_chat_in_this_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    opened: list[tuple[str, dict[str, Any]]] = []
    asked: list[SamplingParams] = []

    class Model:
        def __init__(self, model: str, **settings: Any) -> None:
            opened.append((model, settings))
            self.defaults = GenerationDefaults((0,), {"temperature": 0.5, "top_p": 0.9})
            self.info = SimpleNamespace(model=model, device="cpu", dtype="bfloat16")

        def stream_chat(self, messages: list[dict[str, str]], params: SamplingParams) -> Iterator[str]:
            asked.append(params)
            yield from Talks()(messages)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
            opened.append(("closed", {}))

    module = ModuleType("weft.llm")
    module.LLM = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "weft.llm", module)
    monkeypatch.setattr("builtins.input", reader("hello"))
    assert main(["chat", "--max-num-seqs", "2", "--temperature", "0.1"]) == 0
    assert "you said hello\n" in capsys.readouterr().out
    assert opened[0][0] == "builtin" and opened[0][1]["max_num_seqs"] == 2 and opened[1][0] == "closed"
    assert asked == [SamplingParams(max_tokens=None, temperature=0.1, top_p=0.9)]
    assert main(["chat", "--temperature", "-1"]) == 1
    assert "temperature is -1.0" in capsys.readouterr().err
