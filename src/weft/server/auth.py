"""API keys: every path but two needs one, once there is any.

run.py wraps the whole application in `AuthMiddleware`, so that a route is closed until it is listed here as open.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import ConfigError, Unauthorized
from weft.server.errors import refuse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = frozenset({"/health/live", "/health/ready"})
MAX_KEY_FILE_BYTES = 2**20
log = logging.getLogger(__name__)


class AuthMiddleware:
    """Plain ASGI middleware: 401 for every request without one of `keys`, before its body is read."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = tuple(_digest(key.encode()) for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            raise RuntimeError(f"weft serves HTTP only, not {scope['type']}")
        elif self._knows(_bearer(scope["headers"])):
            await self._app(scope, receive, send)
        else:
            await refuse(receive, send, Unauthorized("a valid key is needed: Authorization: Bearer KEY"))

    def _knows(self, key: bytes | None) -> bool:
        """Compares digests, which have one length, and every one of them: the time tells nothing of any key."""
        if key is None:
            return False
        digest = _digest(key)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def load_keys(given: Iterable[str], file: Path | None) -> tuple[str, ...]:
    """The keys of --api-key and --api-key-file; empty when neither is given. Raises ConfigError."""
    keys = [_checked(key, "--api-key") for key in given]
    return tuple(keys) if file is None else (*keys, *_from_file(file))


def _from_file(path: Path) -> list[str]:
    where = f"--api-key-file {path}"
    try:
        with path.open("rb") as stream:
            mode = path.stat().st_mode
            data = stream.read(MAX_KEY_FILE_BYTES + 1)
        lines = [line.strip() for line in data.decode().splitlines()]
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text; it must hold one key a line") from error
    if len(data) > MAX_KEY_FILE_BYTES:
        raise ConfigError(f"{where} is larger than {MAX_KEY_FILE_BYTES} bytes; it must hold one key a line")
    keys = [_checked(line, where) for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{where} holds no key; it must hold one key a line")
    if mode & stat.S_IROTH:
        log.warning("%s can be read by every user of this machine; chmod 600 would close it", where)
    return keys


def _checked(key: str, where: str) -> str:
    """A key that a client can send in a header. The message does not show the key."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where}: a key is empty or has characters that a header cannot carry; use printable ASCII")
    return key


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key of the Authorization header; None when there is not exactly one of the form 'Bearer KEY'."""
    values = [value for name, value in headers if name.lower() == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, key = values[0].partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
