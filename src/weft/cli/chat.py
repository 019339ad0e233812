"""`weft chat`: a conversation in the terminal, with a model in this process or on a server (--url)."""

from __future__ import annotations

import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from typing import Any

from weft.cli.flags import Parser, add_settings, load
from weft.cli.remote import Remote
from weft.config import EngineConfig
from weft.errors import ConfigError, WeftError

Message = dict[str, str]
Answer = Callable[[list[Message]], Iterator[str]]
HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends; Ctrl-C stops an answer."


def main(arguments: Sequence[str]) -> int:
    parser = Parser("weft chat", "Talk to a model in the terminal. " + HELP)
    parser.add_argument("--url", help="address of a running server; default: load the model in this process")
    parser.add_argument("--api-key", help="key to send to the server; default: the first of the variable WEFT_API_KEY")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: what the context holds)")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 always takes the most probable token")
    add_settings(parser, (EngineConfig,))
    namespace = parser.read(arguments)
    loaded = load((EngineConfig,), namespace, os.environ)
    wanted = {"max_tokens": namespace.max_tokens, "temperature": namespace.temperature}
    start = [{"role": "system", "content": namespace.system}] if namespace.system else []
    if namespace.url:
        return _remote(namespace, loaded.given, wanted, start)
    return _local(loaded.configs[0], wanted, start)


def _remote(namespace: Any, given: Sequence[tuple[str, str, str]], wanted: dict[str, Any], start: list[Message]) -> int:
    extra = [origin for name, _, origin in given if name != "model" and origin.startswith("--")]
    if extra:
        raise ConfigError(f"{', '.join(extra)}: these are for a model in this process, not for one behind --url")
    named = [value for name, value, origin in given if name == "model"]
    server = Remote(namespace.url, namespace.api_key or os.environ.get("WEFT_API_KEY", "").partition(",")[0].strip())
    model = named[0] if named else server.first_model()
    print(f"{model} at {namespace.url}. {HELP}")
    return converse(lambda messages: server.stream_chat(messages, model=model, **wanted), start, default_interrupt)


def _local(config: EngineConfig, wanted: dict[str, Any], start: list[Message]) -> int:
    from weft.llm import LLM  # torch comes with it

    print(f"loading {config.model} ...", file=sys.stderr)
    settings = asdict(config)
    with LLM(settings.pop("model"), **settings) as llm:
        params = llm.defaults.params(max_tokens=wanted.pop("max_tokens"), **_present(wanted))
        params.validate()
        print(f"{llm.info.model} on {llm.info.device}, {llm.info.dtype}. {HELP}")
        return converse(lambda messages: llm.stream_chat(messages, params), start, gentle_interrupt)


@contextmanager
def default_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C raises KeyboardInterrupt where the program is: right for waiting on a socket."""
    yield lambda: False


@contextmanager
def gentle_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C only sets a flag, so that the engine in this process is not torn in the middle of a step."""
    pressed = False

    def note(_number: int, _frame: object) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def converse(
    answer: Answer, start: list[Message], interrupt: Callable[[], Any], read: Callable[[str], str] | None = None
) -> int:
    """Questions from `read` (the terminal), answers to standard output, until the end of input or /exit."""
    ask = read or input
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() a history and editing keys)
    messages = list(start)
    while True:
        try:
            line = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line in ("/exit", "/quit"):
            return 0
        if line == "/reset":
            messages = list(start)
        elif line.startswith("/"):
            print(HELP)
        elif line:
            question = {"role": "user", "content": line}
            text = _show(answer, [*messages, question], interrupt)
            # A question that could not be answered is forgotten; an answer that was stopped is kept as far as it went.
            if text is not None:
                messages += [question, {"role": "assistant", "content": text}]


def _show(answer: Answer, messages: list[Message], interrupt: Callable[[], Any]) -> str | None:
    """Print an answer as it comes; its text, or None when there was none."""
    pieces: list[str] = []
    try:
        with interrupt() as pressed, closing(answer(messages)) as stream:  # type: ignore[type-var]
            for piece in stream:
                pieces.append(piece)
                print(printable(piece), end="", flush=True)
                if pressed():
                    break
    except KeyboardInterrupt:
        pass  # the answer ends here
    except WeftError as error:
        print(f"\n{error.message}" if pieces else error.message, file=sys.stderr)
        return None
    print()
    return "".join(pieces) or None


def _present(wanted: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in wanted.items() if value is not None}


def printable(text: str) -> str:
    """Without control characters, with which a text could move the cursor or rename the window."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")
