"""Operators who come to a living relay, by its control socket."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable

import trio

from criupy.errors import PageServerError
from criupy.page_server._control_linux import ABORT, MAX_LINE, answer, request_in

__all__ = ["listen_to_operators"]

log = logging.getLogger("criupy.page_server")

_PATIENCE = 10.0
_PAUSE = 1.0


async def listen_to_operators(control: socket.socket, abort: Callable[[], Awaitable[None]]) -> None:
    """Call ``abort`` for whoever asks for it; the PageServerError that it raises is the answer."""
    listener = trio.socket.from_stdlib_socket(control)
    while True:
        try:
            connection, _ = await listener.accept()
        except OSError as error:
            log.warning("an operator cannot be heard: %s", error.strerror)
            await trio.sleep(_PAUSE)
            continue
        with connection, trio.move_on_after(_PATIENCE), contextlib.suppress(OSError):
            await _converse(connection, abort)


async def _converse(connection: trio.socket.SocketType, abort: Callable[[], Awaitable[None]]) -> None:
    data = b""
    while (request := request_in(data)) is None:
        piece = await connection.recv(MAX_LINE)
        if not piece:
            return
        data += piece
    if request != ABORT:
        await connection.send(answer(f"expected '{ABORT}', not {request!r}", ok=False))
        return
    # With the source all this ends, but not before its operator knows.
    with trio.move_on_after(_PATIENCE, shield=True):
        try:
            await abort()
        except PageServerError as error:
            await connection.send(answer(str(error), ok=False))
        else:
            await connection.send(answer("the source goes on", ok=True))
