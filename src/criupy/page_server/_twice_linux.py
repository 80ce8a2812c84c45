"""A source that outlives its relay: its socket, and the second holder of that."""

from __future__ import annotations

import contextlib
import logging
import os
import socket

import trio

from criupy.errors import PageServerError
from criupy.images import FrameSize
from criupy.page_server._held_linux import Holder

__all__ = ["HeldTwice"]

log = logging.getLogger("criupy.page_server")


class HeldTwice:
    """The socket to a source, and the process that is given it when a crash must tell the source nothing.

    ``source`` is open until the holder has gone: else the holder's would be the last one, and
    its end what the source learns.
    """

    def __init__(
        self, source: socket.socket, control: socket.socket, frame_size: FrameSize, hold_timeout: float | None
    ) -> None:
        self.source = source
        self._control = control
        self._frame_size = frame_size
        self._hold_timeout = hold_timeout
        self._holder = Holder()
        self._lock = trio.Lock()
        self._is_over = False
        self._is_ending = False
        #: Whether the holder has the socket.
        self.is_given: bool = False

    @property
    def pid(self) -> int | None:
        """The holder's."""
        return self._holder.pid

    async def start(self) -> None:
        """Start the holder, which holds nothing yet."""
        await trio.to_thread.run_sync(self._holder.start)

    async def secure(self) -> bool:
        """Make sure that the source outlives this process; tell whether that is so."""
        async with self._lock:
            if self.is_given or self._is_over:
                return True
            try:
                await trio.to_thread.run_sync(self._give)
            except PageServerError as error:
                log.error("no page is given: %s", error)  # noqa: TRY400
                return False
            self.is_given = True
            return True

    async def end(self) -> None:
        """From now on the holder, too, is to end the source, and not to keep it."""
        async with self._lock:
            self._is_ending = True
            if self.is_given:
                # One that has died is started again by who watches it, and told then.
                with contextlib.suppress(PageServerError):
                    await trio.to_thread.run_sync(self._holder.tell, "closing")

    async def let_go(self, *, leave: bool) -> None:
        """End the holder, or leave the source to it."""
        async with self._lock:  # nobody gives it anything, or starts another, from now on
            self._is_over = True
            if leave:
                self._holder.leave()
            else:
                await trio.to_thread.run_sync(self._holder.done)
            self.is_given = False
            self.source.close()

    def _give(self) -> None:
        if self._holder.is_done or self._holder.has_died:
            self._renew()
        self._holder.give(self.source.fileno(), self._control.fileno(), self._frame_size, self._hold_timeout)
        if self._is_ending:
            self._holder.tell("closing")

    def _renew(self) -> None:
        self._holder.done()
        self._holder = Holder()
        self._holder.start()

    def _replace(self) -> None:
        self._renew()
        if self.is_given:
            self._give()

    async def watch(self) -> None:
        """Start another holder whenever one has died."""
        while True:
            holder = self._holder
            if holder.pid is None:
                return
            pid = holder.pid
            with contextlib.suppress(ProcessLookupError):
                await _exit_of(pid)
            async with self._lock:
                if self._is_over:
                    return
                if holder is not self._holder:  # there is another already
                    continue
                log.warning(
                    "the second holder of the source, process %d, has died: there will be another", pid
                )
                try:
                    await trio.to_thread.run_sync(self._replace)
                except PageServerError as error:
                    log.error("a crash of this relay would let the source go on: %s", error)  # noqa: TRY400
                    return


async def _exit_of(pid: int) -> None:
    fd = os.pidfd_open(pid)
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
