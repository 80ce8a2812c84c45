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

import enum
import errno
import logging
import os
import socket

import trio

from criupy._uffd.pager_linux import Link
from criupy._uffd.server_linux import Account, Ending, Question, Server
from criupy._uffd.upstream_linux import Upstream, UpstreamState
from criupy.errors import ImageError, PageServerError
from criupy.page_server._holder_linux import reset
from criupy.page_server._operator_linux import listen_to_operators
from criupy.page_server._relay_config import RelayConfig
from criupy.page_server._session import Session
from criupy.page_server._spool import Spool
from criupy.page_server._statistics import counted
from criupy.page_server._telling_linux import tell
from criupy.page_server._twice_linux import RETRY, HeldTwice
from criupy.wire.extension import Refusal
from criupy.wire.page_server import Command

__all__ = ["Fate", "Relay"]

log = logging.getLogger("criupy.page_server")

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
        source: HeldTwice,
        session: Session,
        spool: Spool | None,
        control: socket.socket,
    ) -> None:
        self._config = config
        self._native = native
        self._upstream = upstream
        self._source = source
        self._spool = spool
        # The verdict: whether it was the destination's, and whether that has heard what came of it.
        self._is_by_session = False
        self._is_heard = False
        self._control = control
        self._verdict: Fate | None = None
        self._ended = trio.Event()
        self._changed = trio.Event()
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

    async def _abort_by_operator(self) -> None:
        runs = " (the destination said that its tasks run)" if self.session.has_finished else ""
        await self.abort(f"an operator decided so{runs}")

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
            return -errno.EALREADY if command is Command.ABORT else 0
        if command is Command.HELLO:
            return -self._let_in(serial, self.session.hello(serial, question.hello))
        if command is Command.FINISHED:
            if self._verdict is Fate.RESUMED:
                log.error("connection %d: its tasks run, and the source goes on: %s", serial, self.why)
                return -Refusal.ENDED
            if self.session.speaks_for(serial) and not self.session.has_finished:
                self.session.has_finished = True
                log.info("connection %d: the restore has finished, its tasks run", serial)
                self._notify()
            return -await self._secure()  # they may run on without a page
        if command is Command.ABORT or serial in self.session.lanes.values():
            if command in {Command.GET, Command.GETV}:
                self.session.has_pages = True
                return -await self._secure()
            return await self._end_session(serial, command)
        refusal = self._let_in(serial, self.session.begin(serial))
        if refusal or command in {Command.CLOSE, Command.FORCE_CLOSE}:
            return -refusal
        self.session.has_pages = True
        return -await self._secure()

    def _let_in(self, serial: int, found: Refusal | int | None) -> int:
        """Return why not, or 0."""
        if self.fate is Fate.LOST:
            found = Refusal.GONE
        elif self._verdict is Fate.CLOSED and not isinstance(found, Refusal):
            pass  # the answer to its CLOSE was lost, and it says that again
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
        self._is_by_session = True
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
        if self._verdict is Fate.CLOSED and self._is_spooling:
            # All is well with it, the source is needed for the spool. But it must not go on any more.
            await self._insist()
            await self._source.end()
            return 0
        await self._ended.wait()
        if self.fate is Fate.RESUMED:
            log.error("the destination has all pages and runs, and the source goes on: %s", self.why)
            return -errno.EALREADY
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
        self._is_heard = self._is_heard or account.ending is Ending.CLOSED
        self._notify()
        return True

    async def heard(self) -> None:
        """Wait until a destination that decided, or is connected, has heard what became of the source."""
        while self.session.is_connected or (self._is_by_session and not self._is_heard):
            changed = self._changed
            await changed.wait()

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

    @property
    def _may_run(self) -> bool:
        """Whether tasks may run at the destination, as far as nothing was decided."""
        return self.session.has_pages or self.session.has_finished

    @property
    def _is_spooling(self) -> bool:
        return self._spool is not None and not self.is_spooled and self.fate is Fate.HELD

    def _may_close(self) -> bool:
        if self.is_spooled and (self.session.has_finished or self._config.close_when_spooled):
            return True
        return self._verdict is Fate.CLOSED and (self.is_spooled or self._spool is None)

    async def run(self) -> None:
        """Hold the source until its end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_upstream)
            nursery.start_soon(self._source.watch)
            nursery.start_soon(listen_to_operators, self._control, self._abort_by_operator)
            if self._config.hold_timeout is not None:
                nursery.start_soon(self._watch_destination, self._config.hold_timeout)
            if self._spool is not None:
                nursery.start_soon(self._commit, self._spool)
            await self._hold()
            nursery.cancel_scope.cancel()
        self._control.close()  # there is nothing to decide any more

    async def leave(self) -> None:
        """Let go of a source that nothing was decided about: it goes on, or the second holder has it.

        Where tasks may run at the destination, this waits for a holder as long as it takes.
        """
        if self._ended.is_set():
            return
        async with trio.open_nursery() as nursery:
            if self._verdict is None and self._may_run:
                await self._await_holder(nursery)
            await self._leave()
            nursery.cancel_scope.cancel()

    async def _await_holder(self, nursery: trio.Nursery) -> None:
        """Wait until a second holder has the source, or nothing is left to be held."""
        if await self._source.secure():
            return
        log.error(
            "this relay cannot end before the source has a second holder; --abort lets the source go on"
        )
        nursery.start_soon(listen_to_operators, self._control, self._abort_by_operator)
        if self._config.hold_timeout is not None:
            nursery.start_soon(self._watch_destination, self._config.hold_timeout)
        while self._verdict is None and not _has_lost(self._upstream.snapshot()):
            if await self._source.secure():
                return
            await trio.sleep(RETRY)

    async def _leave(self) -> None:
        if self._verdict is Fate.CLOSED:  # it waited for the spool
            log.error("the spool is given up: it was not complete")
            await self._close()
        elif self._verdict is Fate.RESUMED:
            await self._resume()
        elif self._source.is_given:
            log.error(
                "%s; it is left to process %s, which --abort finds in the work dir%s",
                "no end of the destination's session was seen: the source stays frozen",
                self._source.pid,
                "" if self._config.hold_timeout is None else f", for {self._config.hold_timeout:g} s at most",
            )
            self.is_left = True
            self._upstream.leave()
            await self._has_left()  # or its end would be a reset
        elif self._may_run:
            self.fate = Fate.LOST
        else:
            self.why = "nothing was asked for"
            await self._resume()
        await self._let_go()

    async def _hold(self) -> None:
        is_stuck = False
        while True:
            changed = self._changed
            state = self._upstream.snapshot()
            if _has_lost(state):
                # With all its pages here, tasks that run can go on; others must not begin to.
                if not (state.complete and self.session.has_finished):
                    log.error(
                        "the source is lost: %s; %d pages of it are missing", _why(state), _missing(state)
                    )
                    self._lose_source()
                    break
            elif state.link is Link.LOST and not state.complete and not is_stuck:
                log.error(
                    "no more pages can be had: %s; the source stays frozen%s", _why(state), self._until()
                )
                is_stuck = True
            if self._verdict is None and self._may_close():
                self._decide(Fate.CLOSED, "the spool has everything")
            if self._verdict is Fate.RESUMED or self._may_close():
                break
            await changed.wait()
        with trio.CancelScope(shield=True):  # what was decided is done
            if self._verdict is Fate.RESUMED:
                await self._resume()
            elif self.fate is Fate.HELD:
                await self._close()
            await self._let_go()

    def _lose_source(self) -> None:
        self.fate = Fate.LOST
        if not self.session.has_finished and self.session.stock is None:
            # Its process goes on, most likely: one of ours is told when it comes back, and restores nothing.
            for serial in self.session.lanes.values():
                self._native.cut(serial)

    async def _let_go(self) -> None:
        await self._source.let_go(leave=self.is_left)
        if not self.is_left:
            log.info("the source: %s", self.fate.value)
        self.snapshot()
        self._ended.set()
        self._notify()

    async def _secure(self) -> int:
        """Make sure that the source outlives this process; return why no page may be given, or 0."""
        if self._source.was_given or self.session.has_finished:
            await self._insist()  # it waits for its pages, where a refusal would cost its tasks
        elif not await self._source.secure():
            log.error("no page is given")
            return Refusal.GONE
        return Refusal.ENDED if self._verdict is Fate.RESUMED else 0

    async def _insist(self) -> None:
        while not await self._source.secure():  # noqa: ASYNC110 - nobody tells when a process can be started
            await trio.sleep(RETRY)

    async def _note_end(self, *, has_ended: bool) -> None:
        assert self._spool is not None  # noqa: S101 - it is complete
        try:
            await trio.to_thread.run_sync(self._spool.note_end, has_ended)
        except PageServerError as error:
            log.error("%s", error)  # noqa: TRY400 - the spool is good all the same

    async def _resume(self) -> None:
        self._upstream.reset()
        link = await self._has_left()
        if link is Link.LOST and self.snapshot().errno in _HELD_STILL:
            reset(self._source.source)  # the upstream has let go of it
            link = Link.RESET
        self.fate = Fate.RESUMED if link is Link.RESET else Fate.LOST

    async def _close(self) -> None:
        # From the note on, which has the spool served again, nothing may let the source go on.
        is_secure = self.is_spooled and await self._source.secure()
        await self._source.end()
        if is_secure:
            await self._note_end(has_ended=True)
        self._upstream.close()
        link = await self._has_left()
        state = self._upstream.snapshot()
        self.fate = Fate.CLOSED if link is Link.CLOSED else Fate.LOST
        self.status = state.close_status or 0
        if link is Link.LOST and state.errno in _HELD_STILL:
            await self._insist()  # else the end of our socket would let it go on
            log.warning(
                "the source could not be ended in good order (%s): process %s does it",
                _why(state),
                self._source.pid,
            )
            self.is_left = True
            self.fate = Fate.CLOSED
        if self.is_spooled:
            await self._note_end(has_ended=self.fate is Fate.CLOSED)
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
            if not scope.cancelled_caught or not self._is_missed():
                continue
            if self._may_be_complete():
                log.error(
                    "nothing was heard of the destination for %g s, but it was given every page, and may run "
                    "with them: the source stays frozen for an operator to decide",
                    patience,
                )
                return
            self._decide(Fate.RESUMED, f"nothing was heard of the destination for {patience:g} s")

    def _may_be_complete(self) -> bool:
        state = self.snapshot()
        return self.session.has_finished and state.pages_given >= state.pages_total

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


def _has_lost(state: UpstreamState) -> bool:
    """Whether the source is gone, and not just frozen for good."""
    return state.link is Link.LOST and state.errno not in _HELD_STILL


def _missing(state: UpstreamState) -> int:
    return state.pages_total - state.pages_kept


def _why(state: UpstreamState) -> str:
    if state.errno == errno.EPROTO:
        return f"it broke the protocol ({state.reply_fault.name.lower()}) at byte {state.offset}"
    if state.errno == errno.EPIPE:
        return "it closed the connection"
    return os.strerror(state.errno)
