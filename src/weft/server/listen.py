"""The one TCP port of weft."""

from __future__ import annotations

import ipaddress
import math
import os
import socket

from weft.errors import ConfigError

BACKLOG = 2048


def listen(host: str, port: int, write_timeout: float = 0.0) -> socket.socket:
    """A socket that listens on host and port (0: any free one). Raises ConfigError that says why it cannot.

    write_timeout: seconds after which the kernel ends a connection whose client takes in nothing; 0: never. Connections
    inherit it from the socket that accepts them. It covers what a stream is held up by, what a closed connection has
    still to send, and a client whose machine has gone.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host is {host!r}, which is not an address of this machine: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(write_timeout * 1000))
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there: {reason}; give another --port, or 0 for any free one"
        ) from error
    listener.setblocking(False)
    return listener


def url(listener: socket.socket) -> str:
    """http://127.0.0.1:8000, the address as it is bound."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
