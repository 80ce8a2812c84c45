"""Whom a page server with TLS lets in: the handshake, and how a refusal reaches the peer."""

from __future__ import annotations

import ipaddress
import socket

import trio

from criupy._tls.tls_linux import TlsContext, TlsFault, TlsFiles, TlsSession
from criupy.errors import PageServerError, TlsError
from criupy.wire.page_server import Command

__all__ = ["Admission", "take"]

# An alert that is under way is lost where the connection is closed with something unread.
_FAREWELL = 1.0
# A fatal alert as TLS 1.2 has it: "protocol version". OpenSSL has no word for who does not speak TLS.
_NO_TLS_HERE = bytes.fromhex("15 0303 0002 02 46")
# By our daemon, which says hello, asks for pages or closes. A dump takes any byte for an answer to what it
# sends first.
_UNDERSTOOD_BY = frozenset(bytes([command & 0xFF]) for command in (Command.HELLO, Command.GET, Command.CLOSE))


def take(connection: trio.socket.SocketType) -> trio.socket.SocketType:
    """Take a connection out of the ``with`` that would close it."""
    return trio.socket.from_stdlib_socket(socket.socket(fileno=connection.detach()))


class Admission:
    """The files of a page server, and the name that its peers' certificates must be for."""

    def __init__(self, files: TlsFiles, address: str) -> None:
        self._context = TlsContext(files, server=True)
        self._name = address.partition("%")[0]
        if files.verify_name and _is_wildcard(self._name):
            raise PageServerError(
                f"with TLS a peer's certificate must be for the address that is listened on, and none is for "
                f"{self._name}: see --address and --tls-no-cn-verify"
            )

    async def handshake(self, connection: trio.socket.SocketType, timeout: float) -> TlsSession:
        """Return a session with a peer that proved who it is; raise TlsError otherwise."""
        session = self._context.session(connection.fileno(), self._name)
        first = b""
        try:
            with trio.move_on_after(timeout) as patience:
                first = await connection.recv(1, socket.MSG_PEEK)
                await session.handshake()
                return session
        except TlsError:
            is_plain = session.fault is TlsFault.PLAIN
            session.close()
            await _say_goodbye(connection, with_alert=is_plain and first in _UNDERSTOOD_BY)
            raise
        except BaseException:
            session.close()
            raise
        assert patience.cancelled_caught  # noqa: S101
        session.close()
        raise TlsError(f"no TLS handshake within {timeout:g} s")


def _is_wildcard(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False


async def _say_goodbye(connection: trio.socket.SocketType, *, with_alert: bool) -> None:
    with trio.move_on_after(_FAREWELL):
        try:
            if with_alert:
                await connection.send(_NO_TLS_HERE)
            connection.shutdown(socket.SHUT_WR)
            while await connection.recv(4096):
                pass
        except OSError:
            return  # it has gone, and needs no goodbye
