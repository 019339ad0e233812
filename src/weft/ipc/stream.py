"""Messages between nodes: msgspec over one TCP connection, each message with its length before it."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any, Generic, TypeVar

import msgspec

from weft.ipc.channel import MAX_MESSAGE_BYTES

Message = TypeVar("Message")
_LENGTH = struct.Struct("<I")
_READ = 1 << 20
# An end whose host has lost its power, or its network, closes nothing: half a minute of silence does.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))


class Stream(Generic[Message]):
    """One end. union: the messages that are understood. timeout: seconds that sending may take."""

    def __init__(self, connection: socket.socket, union: Any, timeout: float) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.settimeout(timeout)
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(union)
        self._encoder = msgspec.msgpack.Encoder()
        self._read = bytearray()

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def address(self) -> str:
        """This end's own."""
        return str(self._connection.getsockname()[0])

    @property
    def peer(self) -> str:
        """The other end's address."""
        return str(self._connection.getpeername()[0])

    def send(self, message: Any) -> None:
        """Raises OSError when the other end is gone, or takes nothing for too long."""
        data = self._encoder.encode(message)
        self._connection.sendall(_LENGTH.pack(len(data)) + data)

    def take(self) -> list[Message]:
        """The messages that are there, without waiting. Raises OSError when the other end is gone, or sends bytes that
        are no message: then nothing that follows could be trusted."""
        try:
            data = os.read(self.fileno(), _READ)  # recv would wait for as long as sending may take
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionResetError("the connection was closed")
        self._read += data
        found: list[Message] = []
        while len(self._read) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._read)
            if size > MAX_MESSAGE_BYTES:
                raise ConnectionError(f"a message of {size} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
            end = _LENGTH.size + size
            if len(self._read) < end:
                break
            try:
                found.append(self._decoder.decode(bytes(self._read[_LENGTH.size : end])))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise ConnectionError(f"{size} bytes that are not a message: {error}") from error
            del self._read[:end]
        return found

    def close(self) -> None:
        self._connection.close()
