"""HTTP/1.1 and server-sent events, as much as a load generator needs: bytes in, events out.

One connection carries one request. Nothing here waits: sockets are the client's business (client.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from weft.errors import ConfigError, WeftError

MAX_HEADER = 64 * 1024
HEX_DIGITS = b"0123456789abcdefABCDEF"
MAX_BODY = 64 * 2**20  # of one answer, or of one event that has not ended


class WireError(WeftError):
    """The server's bytes are not HTTP/1.1, or broke off."""

    code = "bad_response"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is. base: path before /v1, without a trailing slash."""

    host: str
    port: int
    tls: bool
    base: str

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_url(text: str) -> Address:
    """An address from a URL with or without /v1. Raises ConfigError."""
    problem = ConfigError(f"--url is {text!r}; it must look like http://127.0.0.1:8000")
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode()  # fails for a name with an empty or too long part
    except ValueError:
        raise problem from None
    path = parts.path.isascii() and parts.path.isprintable() and " " not in parts.path
    if parts.scheme not in ("http", "https") or not host or any(c.isspace() for c in text) or not path:
        raise problem
    tls = parts.scheme == "https"
    return Address(host, port or (443 if tls else 80), tls, parts.path.rstrip("/").removesuffix("/v1"))


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries a key, if there is one. Raises ConfigError; the message does not show the key."""
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise ConfigError("--api-key has characters that a header cannot carry; use printable ASCII")
    return {"Authorization": f"Bearer {api_key}"}


def request_bytes(address: Address, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """One whole request; the server is asked to close the connection after its answer."""
    lines = [
        f"{method} {address.base}{path} HTTP/1.1",
        f"Host: {address.netloc}",
        "Connection: close",
        "Accept: application/json, text/event-stream",
        f"Content-Length: {len(body)}",
        *(["Content-Type: application/json"] if body else []),
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


@dataclass(slots=True)
class ResponseParser:
    """Takes in the bytes of one answer, however they are cut.

    status: None until the head is complete. done: whether the answer has ended as its head said it would.
    body: the payload that `take` has not handed out, without the chunked coding.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    done: bool = False
    body: bytearray = field(default_factory=bytearray)
    _raw: bytearray = field(default_factory=bytearray)
    _left: int | None = None  # bytes left in the body or in this chunk; None: until the connection closes
    _chunked: bool = False
    _in_chunk: bool = False

    def feed(self, data: bytes) -> None:
        """More bytes. Raises WireError."""
        self._raw += data
        while self.status is None:
            if not self._read_head():
                return
        if self._chunked:
            while not self.done and self._read_chunk():
                pass
        elif not self.done:
            self._read_plain()
        if len(self.body) + len(self._raw) > MAX_BODY:
            raise WireError(f"more than {MAX_BODY} bytes without an end")

    def close(self) -> None:
        """The connection has ended. Raises WireError when the answer had not."""
        if self.status is not None and not self._chunked and self._left is None:
            self.done = True
        if not self.done:
            raise WireError("the connection closed before the answer ended")

    def take(self) -> bytes:
        """The payload so far."""
        data = bytes(self.body)
        self.body.clear()
        return data

    def _read_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            if len(self._raw) > MAX_HEADER:
                raise WireError(f"more than {MAX_HEADER} bytes of headers")
            return False
        lines = self._raw[:end].decode("latin-1").split("\r\n")
        del self._raw[: end + 4]
        version, _, rest = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
            raise WireError(f"this is no HTTP/1.1 status line: {lines[0][:80]!r}")
        if rest.startswith("1"):  # 100 Continue and the like: the real head follows
            return True
        self.headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length", "")
        self._left = int(length) if length.isdecimal() and not self._chunked else None
        self.status = int(rest[:3])
        return True

    def _read_plain(self) -> None:
        if self._left is None:
            self.body += self._raw
            self._raw.clear()
            return
        part = self._raw[: self._left]
        del self._raw[: self._left]
        self.body += part
        self._left -= len(part)
        self.done = self._left == 0

    def _read_chunk(self) -> bool:
        """One step through the chunked coding; False when more bytes are needed."""
        if not self._in_chunk:
            end = self._raw.find(b"\r\n")
            if end < 0:
                return False
            size = bytes(self._raw[:end].partition(b";")[0].strip())
            if not size or size.strip(HEX_DIGITS) or len(size) > 16:
                raise WireError(f"{size[:20]!r} is no chunk size")
            self._left = int(size, 16)
            del self._raw[: end + 2]
            if self._left == 0:  # trailers, if any, carry nothing that is needed here
                self.done = True
                return False
            self._in_chunk = True
        left = self._left or 0
        if len(self._raw) < left + 2:
            return False
        self.body += self._raw[:left]
        del self._raw[: left + 2]
        self._in_chunk = False
        return True


@dataclass(slots=True)
class EventParser:
    """Takes in the payload of a server-sent event stream, however it is cut, and hands out the data of its events."""

    _pending: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> list[bytes]:
        """The data of every event that is now complete. Comments and other fields are passed over."""
        if len(self._pending) + len(data) > MAX_BODY:
            raise WireError(f"an event has more than {MAX_BODY} bytes")
        self._pending += data
        # A line may end in \r\n or \n. A \r at the very end waits for its \n, which may come with the next bytes.
        whole, found, rest = bytes(self._pending).replace(b"\r\n", b"\n").rpartition(b"\n\n")
        if not found:
            return []
        self._pending = bytearray(rest)
        return [event for event in (_data(block) for block in whole.split(b"\n\n")) if event is not None]


def _data(block: bytes) -> bytes | None:
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def error_words(body: bytes) -> str:
    """The message and code of an error in OpenAI's shape, or the beginning of whatever the body is."""
    try:
        content = json.loads(body)
    except ValueError:
        return body[:200].decode("utf-8", "replace").strip()
    error = content.get("error", content) if isinstance(content, dict) else content
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:300] if message else "no reason given"
