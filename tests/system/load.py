"""Requests to a server whose ranks are lost under them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

REQUESTS = 4


@dataclass
class Answer:
    """What a client was told, and when the answer ended."""

    text: str = ""
    ended: float = 0.0


def ask(url: str, content: dict[str, Any], answers: list[Answer], number: int) -> None:
    """A request that goes on for as long as it may, as a stream or not."""
    changed = {"prompt": list(range(10 + number, 40 + number)), "max_tokens": 400, "stream": number % 2 == 0}
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{url}/v1/completions", json=content | changed) as reply,
    ):
        for part in reply.iter_text():
            answers[number].text += part
    answers[number].ended = time.monotonic()


def ask_until(lose: Callable[[], None], url: str, content: dict[str, Any]) -> tuple[float, list[Answer]]:
    """Ask for much at once; when `lose` was called, and how the requests ended."""
    answers = [Answer() for _ in range(REQUESTS)]
    threads = [threading.Thread(target=ask, args=(url, content, answers, each)) for each in range(REQUESTS)]
    for thread in threads:
        thread.start()
    while not all(answer.text for answer in answers[::2]):  # the streams run
        time.sleep(0.01)
    lose()
    when = time.monotonic()
    for thread in threads:
        thread.join(60)
    return when, answers
