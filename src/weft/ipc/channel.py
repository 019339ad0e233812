"""Messages between the front end and the engine process: zmq over ipc://, msgspec in, msgspec out.

Each direction is one pair of sockets, so that each socket belongs to one thread. The receiving end binds and the
sending end connects: what is sent before the other process is up waits in the sender. Both sockets lie in a folder
that only this user can enter, and bytes that are not a message of the closed union are refused and harm nothing.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from weft.errors import ConfigError

Message = TypeVar("Message")
log = logging.getLogger(__name__)

# The longest message: the scores of a prompt of a hundred thousand tokens, with the twenty most probable ones each.
MAX_MESSAGE_BYTES = 2**28
# Seconds in which a closed sender hands over what it still holds.
LINGER_SECONDS = 2.0
# A Unix socket's path has at most 107 bytes, and the kernel says no more than that it is too long.
MAX_PATH_BYTES = 107
TO_ENGINE, FROM_ENGINE = "to-engine", "from-engine"


def make_folder() -> Path:
    """A new folder for the sockets, of mode 0700. Raises ConfigError when the temporary folder cannot serve."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="weft-"))
    except OSError as error:
        raise ConfigError(f"no temporary folder for the engine's sockets: {error}; set TMPDIR") from error
    longest = folder / FROM_ENGINE
    if len(bytes(longest)) > MAX_PATH_BYTES:
        shutil.rmtree(folder)
        raise ConfigError(
            f"the temporary folder has too long a name for a socket ({longest}); set TMPDIR to a shorter one"
        )
    return folder


class Sender(Generic[Message]):
    """The sending end of one direction. It never blocks, and holds what the other end has not fetched."""

    def __init__(self, folder: Path, name: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(_address(folder, name))
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: Message) -> None:
        """Raises ValueError for what cannot be encoded (half of a surrogate pair) or is too long."""
        data = self._encoder.encode(message)
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
        self._socket.send(data, zmq.NOBLOCK)

    def close(self, linger: float = 0.0) -> None:
        """linger: seconds in which what was sent may still reach the other end. Idempotent."""
        self._socket.close(linger=round(1000 * linger))
        self._context.term()


class Receiver(Generic[Message]):
    """The receiving end of one direction. union: the messages that are understood; every other one is refused."""

    def __init__(self, folder: Path, name: str, union: Any) -> None:
        self._context = zmq.Context()
        self._decoder = msgspec.msgpack.Decoder(union)
        self.socket = self._context.socket(zmq.PULL)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.socket.bind(_address(folder, name))

    def fileno(self) -> int:
        """A descriptor for an event loop. It is readable once for all that has come since `take` was last empty."""
        return int(self.socket.getsockopt(zmq.FD))

    def take(self) -> Message | None:
        """The next message that is there, without waiting; None when there is none."""
        while True:
            try:
                data = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return None
            try:
                message: Message = self._decoder.decode(data)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                log.warning("refused %d bytes that are not a message: %s", len(data), error)
                continue
            return message

    @property
    def closed(self) -> bool:
        return bool(self.socket.closed)

    def close(self) -> None:
        """Idempotent."""
        self.socket.close(linger=0)
        self._context.term()


def _address(folder: Path, name: str) -> str:
    return f"ipc://{folder / name}"
