"""A minimal client of an OpenAI-compatible server, on the standard library: what `weft chat --url` needs."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from weft.bench.wire import authorization, parse_url
from weft.errors import Unavailable, WeftError

MAX_BODY = 2**20


class Remote:
    """One server. url: with or without /v1. timeout: seconds without a byte after which it counts as gone. Raises
    ConfigError for a URL or a key that cannot be."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 300.0) -> None:
        self._address = parse_url(url)
        self._name = self._address.netloc
        self._timeout = timeout
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
            **authorization(api_key),
        }

    def first_model(self) -> str:
        """The name of the first model that the server lists."""
        with closing(self._connect()) as connection:
            listed = _json(self._ask(connection, "GET", "/v1/models").read(MAX_BODY))
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise WeftError(f"{self._name} lists no models") from error

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> Iterator[str]:
        """The answer, piece by piece; close the iterator to stop it. fields: of the request, None is left out."""
        body = {"messages": list(messages), "stream": True, **{k: v for k, v in fields.items() if v is not None}}
        with closing(self._connect()) as connection:
            response = self._ask(connection, "POST", "/v1/chat/completions", json.dumps(body).encode())
            try:
                for event in _events(response):
                    if "error" in event:
                        raise WeftError(_message(event))
                    for choice in event.get("choices", []):
                        yield choice.get("delta", {}).get("content") or ""
            except (OSError, http.client.HTTPException) as error:
                raise Unavailable(f"{self._name} broke off: {error}") from error

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._address.tls else http.client.HTTPConnection
        return kind(self._address.host, self._address.port, timeout=self._timeout)

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
    ) -> http.client.HTTPResponse:
        try:
            connection.request(method, self._address.base + path, body, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or error
            raise Unavailable(f"no server answers at {self._name}: {reason}") from error
        if response.status != 200:
            content = _json(response.read(MAX_BODY))
            raise WeftError(f"{self._name} answers {response.status} {response.reason}: {_message(content)}")
        return response


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The data of a server-sent event stream, up to [DONE]."""
    while line := response.readline():
        name, _, data = line.strip().partition(b":")
        if name != b"data":
            continue
        if data.strip() == b"[DONE]":
            return
        event = _json(data)
        if isinstance(event, dict):
            yield event


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _message(content: Any) -> str:
    """The words of an error in OpenAI's shape, whatever else it may be."""
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message) if message else "no reason given"
