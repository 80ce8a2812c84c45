"""What becomes of a live source: a relay decides, and nobody else.

The source takes an end of its one connection for a verdict on its process, so that
connection ends for these reasons only:

    the destination's CLOSE       the source ends
    its ABORT                     it goes on; no task runs there, and none will
    an operator's "abort"         it goes on
    --hold-timeout                it goes on: for so long nothing was heard of the destination
    the spool is complete         it ends, if the tasks run elsewhere or nobody waits for that

A connection of the destination that is lost is none of them. Until the destination
asks for its first page, or says that its tasks run, a crash of the relay lets the
source go on; after that a second holder of the socket decides in its place
(_holder_linux).
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import socket

import trio

from criupy._uffd.pager_linux import Link
from criupy._uffd.server_linux import Account, Question, Server
from criupy._uffd.upstream_linux import Upstream, UpstreamState
from criupy.errors import ImageError, PageServerError
from criupy.images import FrameSize
from criupy.page_server._control_linux import ABORT, MAX_LINE, answer, request_in
from criupy.page_server._held_linux import Holder
from criupy.page_server._holder_linux import reset
from criupy.page_server._relay_config import RelayConfig
from criupy.page_server._session import Session
from criupy.page_server._spool import Spool
from criupy.page_server._statistics import counted
from criupy.page_server._telling_linux import tell
from criupy.wire.extension import Refusal
from criupy.wire.page_server import Command

__all__ = ["Fate", "Relay"]

log = logging.getLogger("criupy.page_server")

_CONTROL_PATIENCE = 10.0
# The upstream has lost its source, and the source nobody: it is frozen still.
_HELD_STILL = frozenset({errno.ETIMEDOUT, errno.EPROTO, errno.ECANCELED})
_PAUSE = 0.005
_REFUSALS = {
    Refusal.KEY: "it does not know the key of the marker beside the images",
    Refusal.TAKEN: "a live process goes to one destination, and another one has begun",
    Refusal.REPLAYED: "it says what was said before",
    Refusal.VERSION: "it is of another version of criupy",
    Refusal.ENDED: "the source has ended",
    Refusal.GONE: "the source is gone",
}


class Fate(enum.Enum):
    """What has become of the source."""

    #: It waits, and its process is frozen.
    HELD = "it is frozen"
    #: Its process runs elsewhere; it has ended.
    CLOSED = "it has ended"
    #: It goes on.
    RESUMED = "it goes on"
    #: It has gone by itself, or the connection to it is lost.
    LOST = "it is gone"


class Relay:
    """A live source between its one connection and its destination; made by ``open_relay``."""

    def __init__(
        self,
        config: RelayConfig,
        native: Server,
        upstream: Upstream,
        source: socket.socket,
        frame_size: FrameSize,
        session: Session,
        spool: Spool | None,
        control: socket.socket,
    ) -> None:
        self._config = config
        self._native = native
        self._upstream = upstream
        self._source = source  # the socket once more: it is open until the holder has gone
        self._frame_size = frame_size
        self._spool = spool
        self._holder = Holder()
        self._holding = trio.Lock()
        self._is_held_twice = False
        self._control = control
        self._verdict: Fate | None = None
        self._ended = trio.Event()
        self._changed = trio.Event()
        self._peers: dict[int, str] = {}
        self.session: Session = session
        #: What was fetched, as of the end or the last snapshot.
        self.last: UpstreamState = upstream.snapshot()
        #: Why it was decided so.
        self.why: str = ""
        #: What has become of the source.
        self.fate: Fate = Fate.HELD
        #: Whether all pages are in the spool, which is a full image then.
        self.is_spooled: bool = False
        #: Whether the source is left to the second holder.
        self.is_left: bool = False
        #: What the source said at its end, 0 when all was well.
        self.status: int = 0

    # ---- for the caller ------------------------------------------------------

    def snapshot(self) -> UpstreamState:
        """Return what was fetched so far."""
        self.last = self._upstream.snapshot()
        return self.last

    async def wait(self) -> Fate:
        """Wait until the source has ended, for good or bad."""
        await self._ended.wait()
        return self.fate

    async def abort(self, why: str) -> None:
        """Let the source go on, whatever the destination does; raise PageServerError when it is too late."""
        if self._verdict is not None or self._ended.is_set():
            raise PageServerError(f"the source cannot go on: {self._describe_end()}")
        self._decide(Fate.RESUMED, why)
        await self._ended.wait()
        if self.fate is not Fate.RESUMED:
            raise PageServerError(f"the source could not be told to go on: {self.fate.value}")

    async def start(self) -> None:
        """Start the second holder, which holds nothing before a page is asked for."""
        await trio.to_thread.run_sync(self._holder.start)

    @property
    def is_needed(self) -> bool:
        """Whether a destination waits for the source, here or lost."""
        return self.session.is_taken and not self._ended.is_set()

    def _describe_end(self) -> str:
        return self.fate.value if self._ended.is_set() else self.why

    # ---- what connections ask ------------------------------------------------

    async def answer(self, question: Question) -> None:
        """Answer what a connection asked."""
        self._native.answer(question.serial, await self._find_answer(question))

    async def _find_answer(self, question: Question) -> int:
        serial, command = question.serial, Command(question.command)
        is_open_to_all = self.is_spooled and self.fate is Fate.CLOSED
        if is_open_to_all:
            return 0
        if command is Command.HELLO:
            return -self._let_in(serial, self.session.hello(serial, question.hello))
        if command is Command.FINISHED:
            if self.session.speaks_for(serial) and not self.session.has_finished:
                self.session.has_finished = True
                log.info("connection %d: the restore has finished, its tasks run", serial)
                self._notify()
            return -await self._hold_twice()  # they may run on without a page
        if command is Command.ABORT or serial in self.session.lanes.values():
            if command in {Command.GET, Command.GETV}:
                self.session.has_pages = True
                return -await self._hold_twice()
            return await self._end_session(serial, command)
        refusal = self._let_in(serial, self.session.begin(serial))
        if refusal or command in {Command.CLOSE, Command.FORCE_CLOSE}:
            return -refusal
        self.session.has_pages = True
        return -await self._hold_twice()

    def _let_in(self, serial: int, found: Refusal | int | None) -> int:
        """Return why not, or 0."""
        if self.fate is Fate.LOST:
            found = Refusal.GONE
        elif self._ended.is_set() or self._verdict is not None:
            found = Refusal.ENDED
        if isinstance(found, Refusal):
            log.warning("connection %d: refused, %s", serial, _REFUSALS[found])
            return found
        if found is not None:
            self._native.cut(found)
            log.info("connection %d: comes in place of connection %d", serial, found)
        self._notify()
        return 0

    async def _end_session(self, serial: int, command: Command) -> int:
        """End the source as its destination says; return the status."""
        if not self.session.speaks_for(serial):
            return 0  # a lane ends, or what was replaced
        if command is Command.ABORT:
            if self._verdict is None:
                self._decide(Fate.RESUMED, "the destination has given up, and nothing of it runs there")
            await self._ended.wait()
            return 0 if self.fate is Fate.RESUMED else -errno.EALREADY
        if not self.session.has_pages and self.snapshot().pages_total:
            log.warning(
                "connection %d: closes the session and never asked for a page; the source ends as it says",
                serial,
            )
        if self._verdict is None:
            self._decide(Fate.CLOSED, "the destination has all that it needs")
        if self._spool is not None and not self.is_spooled and self.fate is Fate.HELD:
            return 0  # all is well with it; the source is needed for the spool
        await self._ended.wait()
        if self.fate is Fate.LOST:
            log.error("the source had gone before its end: should its process have gone on, two run now")
            return 0
        return self.status

    async def end(self, account: Account, peer: str) -> bool:
        """Tell of a connection that has ended."""
        tell(account, peer)
        if self.session.lost(account.serial) and not self.session.is_connected and self.fate is Fate.HELD:
            if self._verdict is None:
                log.warning("the destination is lost; its source stays frozen%s", self._until())
            self._notify()
        return True

    def _until(self) -> str:
        patience = self._config.hold_timeout
        waits = "" if self.session.stock is not None else " until it comes back"
        return f"{waits}, for {patience:g} s at most" if patience is not None else waits

    # ---- what is decided -----------------------------------------------------

    def _decide(self, verdict: Fate, why: str) -> None:
        self._verdict, self.why = verdict, why
        log.info("%s: the source %s", why, "goes on" if verdict is Fate.RESUMED else "may end")
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _may_close(self) -> bool:
        if self.is_spooled and (self.session.has_finished or self._config.close_when_spooled):
            return True
        return self._verdict is Fate.CLOSED and (self.is_spooled or self._spool is None)

    async def run(self) -> None:
        """Hold the source until its end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_upstream)
            nursery.start_soon(self._watch_holder)
            nursery.start_soon(self._listen)
            if self._config.hold_timeout is not None:
                nursery.start_soon(self._watch_destination, self._config.hold_timeout)
            if self._spool is not None:
                nursery.start_soon(self._commit, self._spool)
            await self._hold()
            nursery.cancel_scope.cancel()
        self._control.close()  # there is nothing to decide any more

    async def leave(self) -> None:
        """Let go of a source that nothing was decided about: it goes on, or the second holder has it."""
        if self._ended.is_set():
            return
        if self._is_held_twice:
            log.error(
                "%s; it is left to process %s, which --abort finds in the work dir%s",
                "no end of the destination's session was seen: the source stays frozen",
                self._holder.pid,
                "" if self._config.hold_timeout is None else f", for {self._config.hold_timeout:g} s at most",
            )
            self.is_left = True
            self._upstream.leave()
        else:
            self.why = "nothing was asked for"
            await self._resume()
        await self._let_go()

    async def _hold(self) -> None:
        is_stuck = False
        while True:
            changed = self._changed
            state = self._upstream.snapshot()
            if state.link is Link.LOST and not state.complete:
                if state.errno not in _HELD_STILL:
                    log.error(
                        "the source is lost: %s; %d pages of it are missing", _why(state), _missing(state)
                    )
                    self.fate = Fate.LOST
                    break
                if not is_stuck:
                    log.error(
                        "no more pages can be had: %s; the source stays frozen%s", _why(state), self._until()
                    )
                    is_stuck = True
            if self._verdict is Fate.RESUMED or self._may_close():
                break
            await changed.wait()
        with trio.CancelScope(shield=True):  # what was decided is done
            if self._verdict is Fate.RESUMED:
                await self._resume()
            elif self.fate is Fate.HELD:
                await self._close()
            await self._let_go()

    async def _let_go(self) -> None:
        if self.is_left:
            self._holder.leave()
        else:
            await trio.to_thread.run_sync(self._holder.done)
            log.info("the source: %s", self.fate.value)
        self._source.close()
        self.snapshot()
        self._is_held_twice = False
        self._ended.set()
        self._notify()

    async def _resume(self) -> None:
        self._upstream.reset()
        link = await self._has_left()
        if link is Link.LOST and self.snapshot().errno in _HELD_STILL:
            reset(self._source)  # the upstream has let go of it
            link = Link.RESET
        self.fate = Fate.RESUMED if link is Link.RESET else Fate.LOST

    async def _close(self) -> None:
        if self._is_held_twice:
            with contextlib.suppress(PageServerError):  # it has died, and is started again by who watches it
                await trio.to_thread.run_sync(self._holder.tell, "closing")
        self._upstream.close()
        link = await self._has_left()
        state = self._upstream.snapshot()
        self.fate = Fate.CLOSED if link is Link.CLOSED else Fate.LOST
        self.status = state.close_status or 0
        if link is Link.LOST and state.errno in _HELD_STILL and self._is_held_twice:
            log.warning(
                "the source could not be ended in good order (%s): process %s does it",
                _why(state),
                self._holder.pid,
            )
            self.is_left = True
            self.fate = Fate.CLOSED
        if self.status:
            log.warning("the source ended with status %d", self.status)

    async def _has_left(self) -> Link:
        # Nobody may be there to wait for its event.
        while (link := self._upstream.snapshot().link) is Link.OPEN:  # noqa: ASYNC110
            await trio.sleep(_PAUSE)
        return link

    async def _watch_upstream(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._upstream.event_fd)
            self._upstream.snapshot()
            self._notify()

    async def _watch_destination(self, patience: float) -> None:
        while True:
            changed = self._changed
            if not self._is_missed():
                await changed.wait()
                continue
            with trio.move_on_after(patience) as scope:
                while self._is_missed():
                    changed = self._changed
                    await changed.wait()
            if scope.cancelled_caught and self._is_missed():
                self._decide(Fate.RESUMED, f"nothing was heard of the destination for {patience:g} s")

    def _is_missed(self) -> bool:
        return self.session.is_taken and not self.session.is_connected and self._verdict is None

    # ---- the spool -----------------------------------------------------------

    async def _commit(self, spool: Spool) -> None:
        while True:
            changed = self._changed
            state = self._upstream.snapshot()
            if state.complete:
                break
            if state.disk_errno:
                log.error("%s cannot be written: %s", self._config.spool, os.strerror(state.disk_errno))
                self._spool = None
                self._notify()
                return
            await changed.wait()
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(spool.commit)
        except (OSError, ImageError, PageServerError) as error:
            log.error("%s: the spool could not be made: %s", self._config.spool, error)  # noqa: TRY400
            self._spool = None
        else:
            self.is_spooled = True
            log.info(
                "%s: all of %s are spooled, it is a full image",
                self._config.spool,
                counted(state.pages_total, "page"),
            )
        self._notify()

    # ---- the second holder ---------------------------------------------------

    async def _hold_twice(self) -> int:
        """Make sure that the source outlives this process; return why that cannot be, or 0."""
        async with self._holding:
            if self._is_held_twice or self._ended.is_set():
                return 0
            try:
                await trio.to_thread.run_sync(self._give)
            except PageServerError as error:
                log.error("no page is given: %s", error)  # noqa: TRY400
                return Refusal.GONE
            self._is_held_twice = True
            return 0

    def _give(self) -> None:
        if self._holder.has_died:
            self._holder.done()
            self._holder = Holder()
            self._holder.start()
        self._holder.give(
            self._source.fileno(), self._control.fileno(), self._frame_size, self._config.hold_timeout
        )

    async def _watch_holder(self) -> None:
        while True:
            holder = self._holder
            if holder.pid is None:
                return
            pid = holder.pid
            with contextlib.suppress(ProcessLookupError):
                await _exit_of(pid)
            if holder.is_done:
                return
            log.warning("the second holder of the source, process %d, has died: there will be another", pid)
            async with self._holding:
                try:
                    await trio.to_thread.run_sync(self._renew)
                except PageServerError as error:
                    log.error("a crash of this relay would let the source go on: %s", error)  # noqa: TRY400
                    return

    def _renew(self) -> None:
        self._holder.done()
        self._holder = Holder()
        self._holder.start()
        if self._is_held_twice:
            self._give()

    # ---- the operator --------------------------------------------------------

    async def _listen(self) -> None:
        listener = trio.socket.from_stdlib_socket(self._control)
        while True:
            connection, _ = await listener.accept()
            with connection, trio.move_on_after(_CONTROL_PATIENCE), contextlib.suppress(OSError):
                await self._converse(connection)

    async def _converse(self, connection: trio.socket.SocketType) -> None:
        data = b""
        while (request := request_in(data)) is None:
            piece = await connection.recv(MAX_LINE)
            if not piece:
                return
            data += piece
        if request != ABORT:
            await connection.send(answer(f"expected '{ABORT}', not {request!r}", ok=False))
            return
        runs = " (the destination said that its tasks run)" if self.session.has_finished else ""
        # With the source all this ends, but not before its operator knows.
        with trio.move_on_after(_CONTROL_PATIENCE, shield=True):
            try:
                await self.abort(f"an operator decided so{runs}")
            except PageServerError as error:
                await connection.send(answer(str(error), ok=False))
            else:
                await connection.send(answer("the source goes on", ok=True))


async def _exit_of(pid: int) -> None:
    fd = os.pidfd_open(pid)
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)


def _missing(state: UpstreamState) -> int:
    return state.pages_total - state.pages_kept


def _why(state: UpstreamState) -> str:
    if state.errno == errno.EPROTO:
        return f"it broke the protocol ({state.reply_fault.name.lower()}) at byte {state.offset}"
    if state.errno == errno.EPIPE:
        return "it closed the connection"
    return os.strerror(state.errno)
