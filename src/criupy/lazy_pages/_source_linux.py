"""Connecting to the source of a migration.

How this connection ends decides whether the source kills its process or lets
it go on (facts at the top of _uffd/pager_end.c), so SO_LINGER with a time of 0
is set before connect: if this daemon dies, the kernel resets the connection,
and the source resumes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from typing import Any

from criupy.errors import LazyPagesError

__all__ = ["adopt_source", "connect_source"]

# Dead peers show within this many seconds also while nothing is outstanding.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


def _prepare(sock: socket.socket, link_timeout: float) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(link_timeout * 1000)))
    for name, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _connect(sock: socket.socket, address: Any) -> None:
    """Connect; a cancellation that comes when it is connected shows at the caller's next checkpoint.

    The source accepts once: to close what it has accepted would be to lose it
    (trio's own connect does that).
    """
    import trio

    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.connect(address)
    try:
        await trio.lowlevel.wait_writable(sock)
    except trio.Cancelled:
        with contextlib.suppress(OSError):
            sock.getpeername()
            return
        raise
    if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(error, os.strerror(error))


async def connect_source(
    host: str, port: int, *, expected: str, connect_timeout: float, link_timeout: float
) -> int:
    """Connect to a page server and return the descriptor, non-blocking.

    Every address of the name is tried in turn, never two at a time: a live
    source accepts once. Timeouts are in seconds; raises LazyPagesError, which asks
    whether what is ``expected`` is there.
    """
    import trio

    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    last = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
    with trio.move_on_after(connect_timeout):
        try:
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise LazyPagesError(
                f"page server {where}: no such host ({error.strerror}); see --address"
            ) from error
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            try:
                _prepare(sock, link_timeout)
                await _connect(sock, address)
            except OSError as error:
                sock.close()
                last = error
            except BaseException:
                sock.close()
                raise
            else:
                return sock.detach()
        raise LazyPagesError(f"page server {where}: {os.strerror(last.errno or 0)}; is {expected}?") from last
    raise LazyPagesError(
        f"page server {where}: no answer within {connect_timeout:g} s; see --connect-timeout"
    )


def adopt_source(fd: int, *, link_timeout: float) -> int:
    """Take over an inherited, connected socket (--ps-socket) and return its descriptor."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise LazyPagesError(f"--ps-socket {fd}: {error.strerror}; it must be a connected socket") from error
    try:
        if sock.type != socket.SOCK_STREAM:
            raise LazyPagesError(f"--ps-socket {fd}: not a stream socket")
        sock.getpeername()
        with contextlib.suppress(OSError):  # a unix socket knows none of the TCP options
            _prepare(sock, link_timeout)
    except OSError as error:
        raise LazyPagesError(
            f"--ps-socket {fd}: {error.strerror}; it must be connected to the source"
        ) from error
    finally:
        sock.detach()
    os.set_inheritable(fd, False)
    return fd
