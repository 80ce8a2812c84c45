"""A connection to CRIU: the socket, the session on it and, where it is ours, the process behind it.

Nothing here waits. What would block says so, and the two clients wait each in
its own way; so the mode of a socket that was given to us is never changed.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
import struct
from collections.abc import Sequence
from typing import Final

from criupy._descriptor import Descriptor
from criupy._proc_linux import parent_of
from criupy.errors import CriuError, CriuUnavailable, OptionError
from criupy.rpc._session import Answer, Notified, Session, State
from criupy.rpc._worker_linux import Orphan, Worker, find_program

__all__ = ["BUSY_PAUSE", "Connection", "Ended", "adopt", "connect", "start_detached_worker", "start_worker"]

_UCRED: Final = struct.Struct("=iII")
# One is all that CRIU ever sends; more are an error to be seen, not truncated.
_MAX_DESCRIPTORS: Final = 4
# As plain numbers: or-ing Python's flag enumerations costs more than the system call.
_SEND: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_PEEK: Final = int(socket.MSG_PEEK | socket.MSG_TRUNC | socket.MSG_DONTWAIT)
_RECEIVE: Final = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
_CTRUNC: Final = int(socket.MSG_CTRUNC)
_USABLE: Final = (State.IDLE, State.PRE_DUMPED)
_ANCILLARY: Final = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4) + socket.CMSG_SPACE(_UCRED.size)

#: Seconds between attempts to reach a service at whose socket too many wait.
BUSY_PAUSE: Final = 0.01


class Ended:
    """CRIU has closed the connection."""


class Connection:
    """One connection; ``worker`` is the process at the other end if we started it."""

    def __init__(self, sock: socket.socket, worker: Worker | Orphan | None = None) -> None:
        self.session: Session = Session()
        self.worker = worker
        self._socket = sock
        self._length = bytearray(1)
        self._peer_pid: int | None = None
        self._is_shut = False
        # A child that outlives the worker would keep the socket open: what ends a wait is either of the two.
        self._events: select.epoll | None = None
        if isinstance(worker, Worker):
            self._events = select.epoll()
            try:
                self._events.register(sock.fileno(), select.EPOLLIN)
                self._events.register(worker.pidfd, select.EPOLLIN)
            except BaseException:
                self._events.close()
                raise

    def fileno(self) -> int:
        """Return the socket's number; -1 once closed."""
        return self._socket.fileno()

    def event_fd(self) -> int:
        """Return what is readable when a packet has come, or a worker of our own has ended."""
        return self.fileno() if self._events is None else self._events.fileno()

    @property
    def peer_pid(self) -> int | None:
        """The pid of the process at the other end, as far as it is known: after its first packet."""
        return self.worker.pid if self.worker is not None else self._peer_pid

    @property
    def usable(self) -> bool:
        """Whether another request can be sent."""
        return self.fileno() >= 0 and not self._is_shut and self.session.state in _USABLE

    def send_now(self, packet: bytes, request: str) -> bool:
        """Send a packet; False if that would block. That CRIU has closed shows at the next receive."""
        try:
            self._socket.send(packet, _SEND)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionError):
            return True
        except OSError as error:
            # EMSGSIZE: longer than the send buffer, so than net.core.wmem_max.
            raise CriuError(
                request, f"a request of {len(packet)} bytes cannot be sent", errno=error.errno
            ) from error
        return True

    def receive_now(self) -> Notified | Answer | Ended | None:
        """Receive what has come; None if nothing has. Descriptors in it are the caller's to close."""
        try:
            size = self._socket.recv_into(self._length, 1, _PEEK)
            packet, ancillary, flags, _ = self._socket.recvmsg(size, _ANCILLARY, _RECEIVE)
        except BlockingIOError:
            return None
        except ConnectionError:
            # A worker that ended with something unread has reset the connection. The kernel tells that once,
            # before what came earlier.
            return self.receive_now()
        descriptors = self._unpack(ancillary)
        try:
            return self._take(packet, descriptors, truncated=bool(flags & _CTRUNC))
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def _take(
        self, packet: bytes, descriptors: tuple[int, ...], *, truncated: bool
    ) -> Notified | Answer | Ended:
        if not packet and not descriptors and self._is_ended():
            return Ended()
        return self.session.receive(packet, descriptors, truncated=truncated)

    def _is_ended(self) -> bool:
        # What an empty packet is not: recv(2) returns 0 for both.
        poll = select.poll()
        poll.register(self.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def _unpack(self, ancillary: Sequence[tuple[int, int, bytes]]) -> tuple[int, ...]:
        descriptors = array.array("i")
        for level, kind, data in ancillary:
            if level != socket.SOL_SOCKET:
                continue
            if kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
            elif kind == socket.SCM_CREDENTIALS and len(data) >= _UCRED.size:
                # 0 is a process of another pid namespace.
                self._peer_pid = _UCRED.unpack_from(data)[0] or None
        return tuple(descriptors)

    def is_alive(self) -> bool:
        """Tell whether CRIU still waits for a request: it may have ended meanwhile."""
        return self.usable and self.receive_now() is None

    def shut_down(self) -> None:
        """Tell CRIU that nothing more will come: its next notification fails, and it undoes what it did."""
        self._is_shut = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def kill_child(self, pid: int) -> None:
        """Kill a child of the process at the other end, as far as it is sure to be one.

        The number comes from the peer, which may count in another pid namespace.
        """
        if self.worker is not None:
            self.worker.kill()
            return
        if self._peer_pid is None:
            return
        with (
            contextlib.suppress(ProcessLookupError, PermissionError),
            Descriptor(os.pidfd_open(pid)) as pidfd,
        ):
            if parent_of(pid) == self._peer_pid:
                signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)

    def close_socket(self) -> None:
        """Close our end."""
        self._socket.close()
        if self._events is not None:
            self._events.close()


def _pair() -> tuple[socket.socket, socket.socket]:
    # CRIU takes who made the pair for its client, and needs its end blocking, whatever
    # socket.setdefaulttimeout says.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(None)
    theirs.settimeout(None)
    return ours, theirs


def _command(binary: str, arguments: Sequence[str], fd: int, request: str) -> list[str]:
    return [find_program(binary, request), *arguments, "swrk", str(fd)]


def start_worker(
    binary: str,
    arguments: Sequence[str],
    *,
    request: str,
    inherit: Sequence[int],
    capture: bool,
    own_group: bool,
) -> Connection:
    """Start ``criu swrk`` with these descriptors inherited under their own numbers."""
    ours, theirs = _pair()
    try:
        with theirs:
            command = _command(binary, arguments, theirs.fileno(), request)
            worker = Worker.start(
                command,
                request=request,
                pass_fds=(theirs.fileno(), *inherit),
                capture=capture,
                own_group=own_group,
            )
    except BaseException:
        ours.close()
        raise
    try:
        return Connection(ours, worker)
    except BaseException:
        ours.close()
        worker.abandon()
        raise


def start_detached_worker(
    binary: str, arguments: Sequence[str], *, request: str, inherit: Sequence[int]
) -> Connection:
    """Start ``criu swrk`` as no child of ours, so that it can dump us."""
    ours, theirs = _pair()
    try:
        with theirs:
            command = _command(binary, arguments, theirs.fileno(), request)
            orphan = Orphan.start(command, request=request, pass_fds=(theirs.fileno(), *inherit))
    except BaseException:
        ours.close()
        raise
    return Connection(ours, orphan)


def connect(path: str, *, request: str) -> Connection | None:
    """Connect to the socket of ``criu service``; None while too many wait there, which no event ends."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.setblocking(False)
        # So the kernel says who answers: a worker of its own for each connection.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.connect(path)
    except BlockingIOError:
        sock.close()
        return None
    except OSError as error:
        sock.close()
        hints = {
            "ConnectionRefusedError": "nobody listens there any more: start criu service --address PATH",
            "FileNotFoundError": "start criu service --address PATH, or name its socket",
        }
        raise CriuUnavailable(
            request,
            f"{path}: {error.strerror or error}",
            errno=error.errno,
            hint=hints.get(type(error).__name__),
        ) from error
    return Connection(sock)


def adopt(fd: int) -> Connection:
    """Use a connected socket that the caller owns; a duplicate of it is used, and closed."""
    duplicate = Descriptor(-1)
    try:
        duplicate = Descriptor(os.dup(fd))
        blocking = os.get_blocking(fd)
        sock = socket.socket(fileno=duplicate.fileno())
        duplicate.detach()
        # With socket.setdefaulttimeout Python has changed the mode, which the caller shares.
        sock.settimeout(None)
        os.set_blocking(fd, blocking)
    except (OSError, OverflowError) as error:
        duplicate.close()
        why = error.strerror if isinstance(error, OSError) else "no descriptor has such a number"
        raise OptionError("fd", f"expected a socket connected to CRIU, {fd} is none ({why})") from error
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET:
        sock.close()
        raise OptionError("fd", f"expected an AF_UNIX socket of type SOCK_SEQPACKET, {fd} is none")
    try:
        sock.getpeername()
    except OSError:
        sock.close()
        raise OptionError("fd", f"expected a socket connected to CRIU, {fd} is not connected") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return Connection(sock)
