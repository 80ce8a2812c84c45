"""A connection to the source that TLS is spoken on."""

from __future__ import annotations

import contextlib
import socket

import trio

from criupy._tls.tls_linux import TlsContext, TlsFault
from criupy._uffd.pager_linux import Pager
from criupy.errors import LazyPagesError, TlsError
from criupy.lazy_pages._saying_linux import say
from criupy.wire.extension import Lane
from criupy.wire.page_server import Command

__all__ = ["SecuredSource"]

# How a source that speaks no TLS may take what it is sent.
_MAYBE_PLAIN = frozenset({TlsFault.CLOSED, TlsFault.SOCKET})


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
