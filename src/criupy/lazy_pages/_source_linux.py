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

from criupy._tls.tls_linux import TlsContext, TlsFault
from criupy._uffd.pager_linux import Pager
from criupy.errors import LazyPagesError, TlsError
from criupy.lazy_pages._extension_linux import say
from criupy.wire.extension import Lane
from criupy.wire.page_server import Command

__all__ = ["SecuredSource", "adopt_source", "connect_source"]

# How a source that speaks no TLS may take what it is sent.
_MAYBE_PLAIN = frozenset({TlsFault.CLOSED, TlsFault.SOCKET})
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


class SecuredSource:
    """A connection to the source, from the connect until the pager takes it with its TLS session.

    It outlives a stop in the middle of the handshake: the tasks may run by then,
    and the source, which accepts once, is still needed.
    """

    def __init__(self, fd: int, context: TlsContext, name: str | None, where: str, *, shared: bool) -> None:
        self.where = where
        self._shared = shared
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(False)
        try:
            self._session = context.session(fd, name)
        except BaseException:
            self._sock.close()
            raise

    async def handshake(self, *, connect_timeout: float) -> None:
        """Do the handshake or go on with it; raises LazyPagesError."""
        import trio

        with trio.move_on_after(connect_timeout) as patience:
            try:
                await self._session.handshake()
            except TlsError as error:
                hint = ""
                if self._session.fault in _MAYBE_PLAIN:
                    hint = " in the TLS handshake; was it told to use TLS (--tls)?"
                raise LazyPagesError(f"page server {self.where}: {error}{hint}") from error
        if patience.cancelled_caught:
            raise LazyPagesError(
                f"page server {self.where}: no TLS handshake within {connect_timeout:g} s; "
                "was it told to use TLS (--tls)? See --connect-timeout"
            )

    def give(self, pager: Pager, *, frame_size: int, extended: bool, lane: Lane, preamble: bytes) -> str:
        """Hand it to the pager and return what the session is."""
        kind = self._session.describe()
        pager.set_link(
            self._sock.fileno(),
            frame_size=frame_size,
            shared=self._shared,
            transport=self._session.transport,
            extended=extended,
            lane=lane,
            preamble=preamble,
        )
        self._session.given()
        self._sock.detach()
        return kind

    async def say(self, hello: bytes, command: Command) -> int:
        """Say ABORT or CLOSE to a relay and return the answer; raise OSError when it is lost."""
        return await say(self._sock, self._session, hello, command)

    def close(self) -> None:
        """End it, unless it was handed over, so that the source goes on.

        Where somebody else holds the socket there is no reset, but an end of
        the stream without a close_notify does the same.
        """
        self._session.close()
        if self._shared and self._sock.fileno() >= 0:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
