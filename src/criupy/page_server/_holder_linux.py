"""The second holder of a relay's connection to its source: it decides when the relay has died.

What a source learns of a crash is chance: a reset, and its process goes on, though the
destination may run by then; or a plain end, which it takes for success, and its process
is killed. So from the destination's first question on, this process has a duplicate of
the socket. A duplicate keeps the kernel from telling the source anything.

    told        when the relay dies
    nothing     ends; the source was never ours
    holding     keeps the source frozen until an operator says abort, or the time is up; then it goes on
    closing     the destination has all pages: ends the source, whose process is killed
    done        ends at once, also while the relay lives, without touching the source

When the source goes away by itself there is nothing left to hold. What stops a service does not
stop this process. When it is killed all the same the source goes on, as the socket is set to be reset.

``python -m criupy.page_server._holder_linux FD`` is started by ``_held_linux``, whose end of
a socket pair is FD's other one. It waits for days perhaps, beside processes that need the memory
more: it imports little, and everything at the start, for the files may be others by then. It
writes what it does to its standard error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from typing import Final

from criupy.page_server._control_linux import ABORT, MAX_LINE, answer, request_in

__all__ = ["CLOSING", "DONE", "GIVE", "HOLDING", "LINGER_RESET", "READY", "reset"]

READY: Final = b"ready"
#: Then the frame size and the seconds to hold, ``-`` for no end; with two descriptors.
GIVE: Final = b"give"
HOLDING: Final = b"holding"
CLOSING: Final = b"closing"
DONE: Final = b"done"

#: A close, and a crash, is a reset.
LINGER_RESET: Final = struct.pack("ii", 1, 0)
_LINGER_OFF: Final = struct.pack("ii", 0, 0)

# criu/page-xfer.c
_CLOSE: Final = {24: struct.pack("<IIQQ", 0x1023, 0, 0, 0), 32: struct.pack("<I4xQQQ", 0x1023, 0, 0, 0)}

# include/uapi/linux/tcp.h: u32 tcpi_notsent_bytes, u64 tcpi_bytes_sent and tcpi_bytes_retrans
_NOT_SENT: Final = struct.Struct("<144xI")
_SENT: Final = struct.Struct("<200xQQ")
_TCP_INFO_SIZE: Final = 256

#: Seconds for somebody at the control socket to finish a line.
_PATIENCE: Final = 2.0

_libc: Final = ctypes.CDLL(None)


@dataclass(slots=True)
class _Held:
    upstream: socket.socket
    control: socket.socket
    frame_size: int
    hold_timeout: float | None
    is_closing: bool = False


def _log(text: str) -> None:
    """Write a line; nothing may stop us, so one that nobody takes is lost."""
    line = f"criupy-holder {os.getpid()}: {text}\n".encode(errors="replace")
    with contextlib.suppress(OSError):
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if any(events & select.POLLOUT for _, events in poll.poll(0)):
            os.write(2, line)


def _listen_to(relay: socket.socket) -> _Held | None:
    """Do as told until the relay dies; return what is to be held then, None when it is nothing."""
    held = None
    while True:
        try:
            message, fds, _, _ = socket.recv_fds(relay, 256, 2)
        except ConnectionResetError:
            continue  # it has not read what we said; what it said still comes
        if not message:
            return held
        what, *words = message.split()
        if what == GIVE:
            upstream, control = (socket.socket(fileno=fd) for fd in fds)
            seconds = None if words[1] == b"-" else float(words[1])
            held = _Held(upstream, control, int(words[0]), seconds)
        elif what == DONE:
            return None
        elif held is not None:
            held.is_closing = what == CLOSING


# ---- deciding ------------------------------------------------------------------------------------


def _hold(held: _Held) -> None:
    """Keep the source frozen until it is to go on."""
    upstream, control, seconds = held.upstream, held.control, held.hold_timeout
    # Should this process be killed, too, the source goes on.
    upstream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    _log(
        f"the relay has died; {_name(upstream)} stays frozen until --abort"
        + ("" if seconds is None else f", or for {seconds:g} seconds")
    )
    deadline = None if seconds is None else time.monotonic() + seconds
    poll = select.poll()
    poll.register(upstream, select.POLLRDHUP)
    poll.register(control, select.POLLIN)
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            _log(f"no --abort within {seconds:g} seconds: the source goes on")
            reset(upstream)
            return
        # A whole millisecond more, or the last one would be spent in circles.
        ready = {fd for fd, _ in poll.poll(None if left is None else min(left, 3600.0) * 1000 + 1)}
        if upstream.fileno() in ready:
            _log("the source has gone by itself")
            return
        if control.fileno() in ready and (asking := _next_request(control)) is not None:
            connection, request = asking
            if request == ABORT:
                _log("--abort: the source goes on")
                reset(upstream)
                _reply(connection, "the source goes on", ok=True)
                return
            _reply(connection, f"expected {ABORT}, not {request!r}", ok=False)


def _end_source(held: _Held) -> None:
    """Let the source see the end of the stream, between two frames, which it takes for success."""
    upstream, control = held.upstream, held.control
    upstream.setblocking(False)
    upstream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_OFF)
    _log(f"the relay has died when the destination had all pages; {_name(upstream)} is ended")
    # Whether the relay has said CLOSE is not known, and the source fails at anything that follows it. It
    # needs none: only a frame that was begun has to be finished, and that can be nothing else.
    rest = _CLOSE[held.frame_size][_written(upstream) % held.frame_size or held.frame_size :]
    poll = select.poll()
    poll.register(upstream, select.POLLIN | select.POLLOUT)
    poll.register(control, select.POLLIN)
    is_ended = False
    while True:
        try:
            if rest:
                with contextlib.suppress(BlockingIOError):
                    rest = rest[upstream.send(rest) :]
            if not rest and not is_ended:
                upstream.shutdown(socket.SHUT_WR)
                is_ended = True
                poll.modify(upstream, select.POLLIN)
            # What the relay had asked for is still to be read: else the end of this socket would be a reset.
            with contextlib.suppress(BlockingIOError):
                while upstream.recv(1 << 16):
                    pass
                break
        except OSError as error:
            _log(f"the source has ended the connection: {error.strerror}")
            return
        if control.fileno() in {fd for fd, _ in poll.poll()} and (asking := _next_request(control)):
            _reply(asking[0], "the destination has all pages and runs: the source is being ended", ok=False)
    _log("the source has ended")


def reset(upstream: socket.socket) -> None:
    """Reset the connection, also where somebody else has the socket and close alone would send nothing."""
    upstream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    # struct sockaddr of AF_UNSPEC. A failure means that it is gone already, which is the aim.
    _libc.connect(upstream.fileno(), bytes(16), 16)
    upstream.close()


def _written(upstream: socket.socket) -> int:
    """Count the bytes that were written to a connection in all."""
    info = upstream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE).ljust(
        _TCP_INFO_SIZE, b"\0"
    )
    (not_sent,) = _NOT_SENT.unpack_from(info)
    sent, sent_again = _SENT.unpack_from(info)
    return int(sent - sent_again + not_sent)


def _name(upstream: socket.socket) -> str:
    try:
        host, port = upstream.getpeername()[:2]
    except OSError:
        return "the source"
    return f"the source at {host}, port {port},"


def _next_request(control: socket.socket) -> tuple[socket.socket, str] | None:
    """Take a connection of the control socket and its question; None where there is none, or no patience."""
    deadline = time.monotonic() + _PATIENCE
    try:
        control.setblocking(False)  # who was there may be gone
        connection, _ = control.accept()
    except OSError:
        return None
    data = b""
    try:
        while (request := request_in(data)) is None:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            piece = connection.recv(MAX_LINE)
            if not piece:
                break
            data += piece
    except OSError:
        request = None
    if request is None:
        connection.close()
        return None
    return connection, request


def _reply(connection: socket.socket, text: str, *, ok: bool) -> None:
    with connection, contextlib.suppress(OSError):  # who asked need not wait for it
        connection.sendall(answer(text, ok=ok))


def main(arguments: list[str]) -> int:
    """Hold what the process at the other end of a socket pair gives; 0 when all is decided."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    with socket.socket(fileno=int(arguments[0])) as relay:
        relay.send(READY)
        held = _listen_to(relay)
    if held is not None:
        with held.upstream, held.control:
            if held.is_closing:
                _end_source(held)
            else:
                _hold(held)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
