"""A source that outlives its relay: its socket, and the second holder of that."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from functools import partial

import trio

from criupy.errors import PageServerError
from criupy.images import FrameSize
from criupy.page_server._held_linux import Holder

__all__ = ["RETRY", "HeldTwice"]

log = logging.getLogger("criupy.page_server")

#: Seconds between attempts to start a holder.
RETRY = 1.0


class HeldTwice:
    """The socket to a source, and the process that is given it when a crash must tell the source nothing.

    ``holder`` has been started, and holds nothing before ``secure``. ``source`` is open until the holder has
    gone: else the holder's would be the last one, and its end what the source learns.
    """

    def __init__(
        self,
        source: socket.socket,
        control: socket.socket,
        frame_size: FrameSize,
        hold_timeout: float | None,
        holder: Holder,
    ) -> None:
        self.source = source
        self._control = control
        self._frame_size = frame_size
        self._hold_timeout = hold_timeout
        self._holder = holder
        self._lock = trio.Lock()
        self._is_over = False
        self._is_ending = False
        self._is_missing = False
        #: Whether the holder has the socket.
        self.is_given: bool = False
        #: Whether one ever had it: pages may have been given since.
        self.was_given: bool = False

    @property
    def pid(self) -> int | None:
        """The holder's."""
        return self._holder.pid

    async def secure(self) -> bool:
        """Make sure that the source outlives this process; tell whether that is so."""
        async with self._lock:
            return self._is_over or await self._find_holder(given=True)

    async def end(self) -> None:
        """From now on the holder, too, is to end the source, and not to keep it."""
        async with self._lock:
            self._is_ending = True
            if self.is_given:
                # One that has died is started again by who watches it, and told then.
                with contextlib.suppress(PageServerError):
                    await _in_thread(partial(self._holder.tell, "closing"))

    async def let_go(self, *, leave: bool) -> None:
        """End the holder, or leave the source to it."""
        async with self._lock:  # nobody gives it anything, or starts another, from now on
            self._is_over = True
            if leave:
                self._holder.leave()
            else:
                await _in_thread(self._holder.done)
            self.is_given = False
            self.source.close()

    async def watch(self) -> None:
        """Start another holder whenever one has died, as soon as that can be done."""
        while True:
            holder = self._holder
            if holder.pid is not None and not holder.has_died:
                await _exit_of(holder.pid)
            async with self._lock:
                if self._is_over:
                    return
                is_there = await self._find_holder(given=self.was_given)
            if not is_there:
                await trio.sleep(RETRY)

    async def _find_holder(self, *, given: bool) -> bool:
        """Have a holder that lives, and with ``given`` has the socket; tell whether that is so."""
        if self._holder.is_done or self._holder.has_died:
            self.is_given = False
            if self._holder.has_died:
                log.warning(
                    "the second holder of the source, process %s, has died: there will be another", self.pid
                )
        elif self.is_given or not given:
            return True
        try:
            await _in_thread(self._give if given else self._renew)
        except PageServerError as error:
            if not self._is_missing:  # it is tried again and again
                log.error("the source has no second holder: %s", error)  # noqa: TRY400
            self._is_missing = True
            return False
        if self._is_missing:
            log.warning("the source has a second holder again, process %s", self.pid)
        self._is_missing = False
        if given:
            self.is_given = self.was_given = True
        return True

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


async def _in_thread(work: Callable[[], None]) -> None:
    """Do what may block for a while, once."""
    has_begun = False

    def begin() -> None:
        nonlocal has_begun
        has_begun = True
        work()

    try:
        await trio.to_thread.run_sync(begin)
    except RuntimeError:
        if has_begun:
            raise
        work()  # no thread can be started, nor a process, most likely: that shows at once


async def _exit_of(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except OSError:  # no descriptor is left
        await trio.sleep(RETRY)
        return
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
