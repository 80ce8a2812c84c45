"""Receiving the tasks of a restore from criu.

The bytes are decoded by criupy.wire.restore_socket; this is the part with a
socket in it: descriptors that are owned from the first instant, and the host's
idea of who is sending, which the protocol itself does not carry.

The pid in the protocol is the one inside the restored pid namespace. The
kernel adds the sender's credentials, translated into our namespace, to each
message if the listening socket asked for them (SO_PASSCRED), and from Linux 6.5
on a pidfd (SO_PASSPIDFD). The sender is the restored task itself.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
from typing import Final

import trio

from criupy._descriptor import Descriptor
from criupy.errors import ProtocolError, RemoteProtocolError
from criupy.wire.restore_socket import NEED_DATA, RESTORE_FINISHED_WORD, RestoreSocketDecoder, Task, Zombie

__all__ = ["RestoreConnection", "RestoredTask"]

# include/linux/socket.h; Python names neither.
SCM_CREDENTIALS: Final = 2
SCM_PIDFD: Final = 4

_UCRED: Final = struct.Struct("=iII")
_INT: Final = struct.Struct("=i")
_FINISHED: Final = struct.pack("=I", RESTORE_FINISHED_WORD)
# More than one descriptor is an error of the peer's, but one to be seen, not truncated.
_MAX_DESCRIPTORS: Final = 4
_ANCILLARY: Final = (
    socket.CMSG_SPACE(_MAX_DESCRIPTORS * _INT.size)
    + socket.CMSG_SPACE(_UCRED.size)
    + socket.CMSG_SPACE(_INT.size)
)


class RestoredTask:
    """A task that waits for its memory.

    ``pid`` is its dump-time pid, ``host_pid`` what it is called here (None if
    the kernel did not say), ``pidfd`` refers to it (None likewise).
    """

    def __init__(self, pid: int, uffd: Descriptor, host_pid: int | None, pidfd: Descriptor | None) -> None:
        self.pid = pid
        self.uffd = uffd
        self.host_pid = host_pid
        self.pidfd = pidfd

    @property
    def has_ended(self) -> bool:
        """Whether the process is known to have exited."""
        if self.pidfd is None:
            return False
        poll = select.poll()
        poll.register(self.pidfd.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close what is still owned."""
        self.uffd.close()
        if self.pidfd is not None:
            self.pidfd.close()


class RestoreConnection:
    """The daemon's end of one connection from criu."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self._decoder = RestoreSocketDecoder[Descriptor]()
        self._host_pid: int | None = None
        self._pidfd: Descriptor | None = None
        self._held: list[Descriptor] = []  # received, and in no event yet

    async def receive_task(self) -> RestoredTask | Zombie:
        """Wait for the next announcement.

        Raise RemoteProtocolError for anything else, the end included: which
        task is the last the images say, and what follows it is the pager's.
        """
        while True:
            event = self._decoder.next_event()
            if isinstance(event, Task):
                pidfd, self._pidfd = self._pidfd, None
                self._held.clear()
                return RestoredTask(event.pid, event.uffd, self._host_pid, pidfd or self._open_pidfd())
            if isinstance(event, Zombie):
                return event
            if event is not NEED_DATA:
                raise RemoteProtocolError(
                    "criu reported the restore finished before all tasks came", offset=0
                )
            if self._decoder.bytes_wanted == len(_FINISHED) and await self._peek() == _FINISHED:
                # Left where it is: that the tasks run is for the pager to read.
                raise RemoteProtocolError(
                    "criu reported the restore finished before all tasks came", offset=0
                )
            await self._receive()

    async def _peek(self) -> bytes:
        return await self._socket.recv(len(_FINISHED), socket.MSG_PEEK)

    def shut_down(self) -> None:
        """Let nothing more come: what criu sent before can still be read, what it sends now fails."""
        with contextlib.suppress(OSError):  # it is gone already, which is as good
            self._socket.shutdown(socket.SHUT_RD)

    async def receive_rest(self) -> tuple[list[RestoredTask | Zombie], bool]:
        """After shut_down: return the announcements that were on their way, and whether restore-finished is.

        That is left to be read by the pager; without it the restore can only fail.
        """
        found: list[RestoredTask | Zombie] = []
        try:
            while True:
                found.append(await self.receive_task())
        except ProtocolError:  # local: it had failed before
            finished = self._decoder.bytes_wanted == len(_FINISHED) and (await self._peek() == _FINISHED)
            return found, finished

    def detach(self) -> int:
        """Give up the socket: restore-finished is next."""
        return self._socket.detach()

    def close(self) -> None:
        """Close the connection. Before restore-finished that is a veto: criu kills the tasks."""
        if self._pidfd is not None:
            self._pidfd.close()
        for descriptor in self._held:
            descriptor.close()
        self._socket.close()

    async def _receive(self) -> None:
        data, messages, flags, _ = await self._socket.recvmsg(
            self._decoder.bytes_wanted, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
        )
        descriptors: list[Descriptor] = []
        for level, kind, content in messages:
            if level != socket.SOL_SOCKET:
                continue
            if kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                descriptors += map(Descriptor, numbers)
            elif kind == SCM_CREDENTIALS:
                pid = _UCRED.unpack(content[: _UCRED.size])[0]
                self._host_pid = pid or None
            elif kind == SCM_PIDFD:
                if self._pidfd is not None:
                    self._pidfd.close()
                self._pidfd = Descriptor(_INT.unpack(content[: _INT.size])[0])
        self._held += descriptors
        if flags & socket.MSG_CTRUNC:
            raise RemoteProtocolError("criu sent more descriptors than one", offset=0, data=data)
        self._decoder.receive(data, descriptors)

    def _open_pidfd(self) -> Descriptor | None:
        if self._host_pid is None:
            return None
        # Gone already, or a kernel before 5.3: then only its memory tells of its end.
        with contextlib.suppress(OSError):
            return Descriptor(os.pidfd_open(self._host_pid))
        return None
