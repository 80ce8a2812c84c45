"""Saying to a page server of criupy how a restore ended, over a connection of its own."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable
from typing import Final

import trio

from criupy._tls.tls_linux import TlsSession
from criupy._uffd.image_linux import ffi
from criupy.lazy_pages._extension import RefusedError
from criupy.wire.extension import encode_plain
from criupy.wire.page_server import Command, Frame

__all__ = ["say"]

_STATUS: Final = struct.Struct("<i")


async def say(sock: socket.socket, session: TlsSession | None, hello: bytes, command: Command) -> int:
    """Say ABORT or CLOSE over a new connection and return the answer; raise OSError when it is lost.

    ``session`` carries the bytes if there is one; its handshake is done. Raises RefusedError
    when nothing is listened to any more.
    """
    stream = _Plain(sock) if session is None else _Secured(sock, session)
    await stream.send(hello + encode_plain(command))
    data = await _receive(stream, _STATUS.size)
    (status,) = _STATUS.unpack(data)
    if status == Command.REFUSED:
        frame = Frame.decode(data + await _receive(stream, 32 - _STATUS.size), 32)
        raise RefusedError(frame.nr_pages)
    return int(status)


async def _receive(stream: _Plain | _Secured, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive(size - len(data))
        if not piece:
            raise ConnectionResetError("the page server closed the connection")
        data += piece
    return data


class _Plain:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def send(self, data: bytes) -> None:
        while data:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)

    async def receive(self, size: int) -> bytes:
        while True:
            try:
                return self._sock.recv(size)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)


class _Secured:
    def __init__(self, sock: socket.socket, session: TlsSession) -> None:
        self._sock = sock
        self._transport = ffi.cast("struct criupy_transport *", session.transport)

    async def send(self, data: bytes) -> None:
        buffer = ffi.from_buffer("uint8_t[]", data)
        await self._when_ready(lambda: self._transport.send(self._transport, buffer, len(data)))
        await self._when_ready(lambda: self._transport.flush(self._transport))

    async def receive(self, size: int) -> bytes:
        buffer = bytearray(size)
        into = ffi.from_buffer("uint8_t[]", buffer)
        got = await self._when_ready(lambda: self._transport.receive(self._transport, into, size))
        return bytes(buffer[:got])

    async def _when_ready(self, call: Callable[[], int]) -> int:
        while True:
            result = call()
            if result >= 0:
                return result
            if result != -errno.EAGAIN:
                raise OSError(-result, os.strerror(-result))
            if self._transport.events & select.POLLOUT:
                await trio.lowlevel.wait_writable(self._sock)
            else:
                await trio.lowlevel.wait_readable(self._sock)
