"""The sockets of a page server: one that listens, and what those that are connected need."""

from __future__ import annotations

import socket

import trio

from criupy.errors import PageServerError
from criupy.page_server._access import at

__all__ = ["listen", "prepare"]

_BACKLOG = 128
# Dead peers show within 40 seconds also while they ask for nothing; with something under way to them the
# kernel would go on for a quarter of an hour.
_DEAD = 40.0
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


def listen(address: str, port: int) -> socket.socket:
    """Listen on an address; raise PageServerError, in one line, where that is not possible."""
    where = at(address, port)
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "not a name"
        raise PageServerError(f"{where}: no such address ({reason}); see --address") from error
    # Of a name that has both, what CRIU's users know.
    family, kind, protocol, _, bound = min(found, key=lambda one: one[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(bound)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise PageServerError(f"{where}: {error.strerror}; see --address and --port") from error
    return listener


def prepare(connection: trio.socket.SocketType, stall_timeout: float) -> None:
    """Set what a connection needs, which a peer that takes nothing keeps for so many seconds."""
    if connection.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Counts also while the peer's window is closed.
    patience = int(max(_DEAD, stall_timeout) * 1000)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
    for name, value in _KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
