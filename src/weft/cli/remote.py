"""A minimal client of an OpenAI-compatible server, on the standard library: what `weft chat --url` needs."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from weft.errors import ConfigError, Unavailable, WeftError

MAX_BODY = 2**20


class Remote:
    """One server. url: with or without /v1. timeout: seconds without a byte after which it counts as gone."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 300.0) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url is {url!r}; it must look like http://127.0.0.1:8000")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._address = parts.netloc.rpartition("@")[2]
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def first_model(self) -> str:
        """The name of the first model that the server lists."""
        with closing(self._connect()) as connection:
            listed = _json(self._ask(connection, "GET", "/v1/models").read(MAX_BODY))
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise WeftError(f"{self._address} lists no models") from error

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
                raise Unavailable(f"{self._address} broke off: {error}") from error

    def _connect(self) -> http.client.HTTPConnection:
        try:
            return self._kind(self._address, timeout=self._timeout)
        except http.client.InvalidURL as error:
            raise ConfigError(f"--url: {error}") from error

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
    ) -> http.client.HTTPResponse:
        try:
            connection.request(method, self._base + path, body, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"no server answers at {self._address}: {error}") from error
        if response.status != 200:
            content = _json(response.read(MAX_BODY))
            raise WeftError(f"{self._address} answers {response.status} {response.reason}: {_message(content)}")
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
