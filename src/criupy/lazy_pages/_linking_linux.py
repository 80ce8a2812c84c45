"""The pager's connections to its page server: made, lost, made again, and ended in words.

A stock page server has one, once. One of criupy's may be reached again, and has two: on
the second go the pages that a thread waits for, which so never queue behind others.
"""

from __future__ import annotations

import errno
import logging
import socket
from typing import TYPE_CHECKING, Final

import trio

from criupy._tls.tls_linux import TlsContext
from criupy._uffd.pager_linux import Link, Pager, Phase
from criupy.errors import CriupyError
from criupy.images import frame_size
from criupy.lazy_pages._config import Config
from criupy.lazy_pages._extension import Extension, RefusedError
from criupy.lazy_pages._saying_linux import say
from criupy.lazy_pages._secured_linux import SecuredSource
from criupy.lazy_pages._source_linux import adopt_source, connect_source
from criupy.lazy_pages._telling_linux import trouble_of, was_refused
from criupy.lazy_pages._watching_linux import Changes, obeyed
from criupy.wire.extension import Lane, Refusal
from criupy.wire.page_server import Command

if TYPE_CHECKING:
    from criupy._uffd._native import Stats

__all__ = ["Links"]

log = logging.getLogger("criupy.lazy_pages")

# Between attempts to reach a page server again: at first, and at most.
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0


def _longer(pause: float) -> float:
    return min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)


def _came(stats: Stats) -> int:
    return stats.pages_received - stats.local_received


class Links:
    """The connections of one restore."""

    def __init__(self, config: Config, tls: TlsContext | None, changes: Changes) -> None:
        self._config = config
        self._tls = tls
        self._changes = changes
        self._secured: SecuredSource | None = None
        #: What the page server is beyond a stock one; known once the images are.
        self.extension: Extension | None = None
        #: Whether there ever was one.
        self.is_linked: bool = False
        #: Whether the relay let the source go on, whatever we do here.
        self.source_goes_on: bool = False
        #: What was lost, and that it did not come back.
        self.unreachable: str | None = None

    @property
    def is_secured(self) -> bool:
        """Whether a TLS session was begun."""
        return self._secured is not None

    @property
    def is_relayed(self) -> bool:
        """Whether a live source waits behind the page server."""
        return self.extension is not None and self.extension.is_relayed

    def close(self) -> None:
        """Close what the pager did not take."""
        if self._secured is not None:
            self._secured.close()

    # ---- the first time ------------------------------------------------------

    async def begin(self, pager: Pager) -> None:
        """Take over an inherited socket, before anything else."""
        if self._config.ps_socket is None:
            return
        if self._tls is None:
            self._adopt(pager, self._config.ps_socket)
        else:
            self._secured = await self._begin_secured(self._tls)

    def _adopt(self, pager: Pager, inherited: int) -> None:
        fd = adopt_source(inherited, link_timeout=self._config.link_timeout)
        size: int | None = None
        try:
            size = self._frame_size()
        finally:
            self.is_linked = True
            # Whatever is wrong with the images: it is for the pager to let the source go on.
            pager.set_link(fd, frame_size=size or 32, shared=True)
        log.info("using socket %d to the page server, frames of %d bytes", fd, size)

    async def connect(self, pager: Pager) -> None:
        """Connect, unless that has been done."""
        if self.is_linked or not self._config.remote:
            return
        size = self._frame_size()
        if self._tls is not None:
            await self._connect_secured(pager, self._tls, size)
            return
        if self._config.page_server is None:
            return
        host, port = self._config.page_server
        fd = await self._reach(host, port)
        self.is_linked = True
        self._set(pager, fd, size)
        log.info("connected to page server %s:%d, %s", host, port, self._describe(size))

    async def _connect_secured(self, pager: Pager, tls: TlsContext, size: int) -> None:
        if self._secured is None:
            # No checkpoint once it is connected: a stop comes later, and finds it.
            self._secured = await self._begin_secured(tls)
        await self._secured.handshake(connect_timeout=self._config.connect_timeout)
        self.is_linked = True
        kind = self._give(pager, self._secured, size)
        log.info("connected to page server %s by %s; %s", self._secured.where, kind, self._describe(size))

    def _describe(self, size: int) -> str:
        if self.extension is None:
            return f"frames of {size} bytes"
        what = "a relay" if self.is_relayed else "a criupy-page-server"
        lanes = "two lanes" if self._config.lanes == 2 else "one lane"
        return f"{what}: {lanes}, vectored requests"

    # ---- each time -----------------------------------------------------------

    def _frame_size(self) -> int:
        if self.extension is not None:
            return 32
        return self._config.frame_size or frame_size(self._config.images_dir) or 32

    async def _reach(self, host: str, port: int) -> int:
        expected = "the dump waiting there (criu dump --lazy-pages --address ... --port ...)"
        if self.extension is not None:
            expected = "criupy-page-server running there"
        return await connect_source(
            host,
            port,
            expected=expected,
            connect_timeout=self._config.connect_timeout,
            link_timeout=self._config.link_timeout,
        )

    async def _begin_secured(self, tls: TlsContext) -> SecuredSource:
        if self._config.page_server is not None:
            host, port = self._config.page_server
            fd, where, name = await self._reach(host, port), f"{host}:{port}", host.partition("%")[0]
        else:
            inherited = self._config.ps_socket
            assert inherited is not None  # noqa: S101 - the configuration is remote
            fd = adopt_source(inherited, link_timeout=self._config.link_timeout)
            where, name = f"at socket {fd}", None
        shared = self._config.page_server is None
        return SecuredSource(fd, tls, self._config.source_name or name, where, shared=shared)

    def _preamble(self, lane: Lane) -> bytes:
        return b"" if self.extension is None else self.extension.hello(lane)

    def _set(self, pager: Pager, fd: int, size: int, lane: Lane = Lane.BULK) -> None:
        pager.set_link(
            fd, frame_size=size, extended=self.extension is not None, lane=lane, preamble=self._preamble(lane)
        )

    def _give(self, pager: Pager, secured: SecuredSource, size: int, lane: Lane = Lane.BULK) -> str:
        return secured.give(
            pager,
            frame_size=size,
            extended=self.extension is not None,
            lane=lane,
            preamble=self._preamble(lane),
        )

    async def _link(self, pager: Pager, lane: Lane) -> str:
        """Make a further connection; return what it is."""
        assert self._config.page_server is not None  # noqa: S101 - or it is not asked to
        size = self._frame_size()
        if self._tls is None:
            self._set(pager, await self._reach(*self._config.page_server), size, lane)
            return "plain TCP"
        secured = await self._begin_secured(self._tls)
        try:
            await secured.handshake(connect_timeout=self._config.connect_timeout)
            return self._give(pager, secured, size, lane)
        finally:
            secured.close()

    # ---- lost, and made again ------------------------------------------------

    async def keep(self, pager: Pager) -> None:
        """Keep the links up as far as that was asked for; return when the first is lost for good."""
        if self._config.page_server is None:
            return
        async with trio.open_nursery() as nursery:
            if self.extension is not None and self._config.lanes == 2:
                nursery.start_soon(self._keep_urgent, pager)
            if self._config.reconnect is None:
                return
            await self._keep_bulk(pager, self._config.reconnect)
            nursery.cancel_scope.cancel()

    async def _keep_bulk(self, pager: Pager, patience: float) -> None:
        """Reach the page server again whenever it is lost; pages that were asked for are missing again.

        One that is reached and lost again, without a page in between, gets no more time.
        """
        deadline, received, pause = float("inf"), -1, 0.0
        while True:
            changed = self._changes.next
            stats = pager.snapshot()
            if not self.may_come_back(stats):
                await changed.wait()
                continue
            lost = trouble_of(stats, self._config.link_timeout)
            if _came(stats) > received:
                deadline, pause = trio.current_time() + patience, 0.0
                log.warning("%s; trying to reach it again for at most %g s", lost, patience)
            else:
                pause = _longer(pause)  # who is reached and brings nothing is not asked all the time
                log.debug("%s again, and no page came", lost)
            received = _came(stats)
            pager.drop_link()
            failure = await self._try_until(pager, Lane.BULK, deadline, pause)
            if failure is not None:
                self.unreachable = (
                    f"{lost}, and it could not be reached again within {patience:g} s: {failure}"
                )
                return
            await obeyed(pager, self._changes)

    async def _keep_urgent(self, pager: Pager) -> None:
        """Keep a second connection while there is a first; without it everything goes over that one."""
        received, pause = -1, 0.0
        while True:
            changed = self._changes.next
            stats = pager.snapshot()
            if (
                stats.link != Link.OPEN
                or stats.urgent_link not in {Link.NONE, Link.LOST}
                or stats.phase >= Phase.CLOSING
                or stats.refused
            ):
                await changed.wait()
                continue
            if stats.urgent_link == Link.LOST:
                if _came(stats) > received:
                    pause = 0.0
                    log.warning("the second connection to the page server was lost")
                else:
                    pause = _longer(pause)
                if self._config.reconnect is None:
                    return
                received = _came(stats)
                pager.drop_link(Lane.URGENT)
            patience = self._config.reconnect or self._config.connect_timeout
            failure = await self._try_until(pager, Lane.URGENT, trio.current_time() + patience, pause)
            if failure is not None:
                log.warning("no second connection to the page server, one has to do: %s", failure)
                return
            await obeyed(pager, self._changes)

    async def _try_until(self, pager: Pager, lane: Lane, deadline: float, pause: float) -> str | None:
        """Connect after a pause, and again until the time is up; return what was wrong then."""
        failure = "no answer"
        while True:
            with trio.move_on_at(deadline):
                await trio.sleep(pause)
                try:
                    kind = await self._link(pager, lane)
                except CriupyError as error:
                    failure = str(error)
                else:
                    log.info("%s lane: connected, %s", lane.name.lower(), kind)
                    return None
            pause = _longer(pause)
            if trio.current_time() + pause >= deadline:
                return failure

    def may_come_back(self, stats: Stats) -> bool:
        """Tell whether a link that is lost is one to make again."""
        return (
            self._config.reconnect is not None
            and self._config.page_server is not None
            and self.unreachable is None
            and not stats.error
            and stats.phase < Phase.CLOSING
            and stats.link == Link.LOST
            and stats.link_error != errno.EPROTO
            and not stats.refused
            and not was_refused(stats)
            and not self._has_done_its_part(stats)
        )

    def _has_done_its_part(self, stats: Stats) -> bool:
        """Tell whether what is missing is all here, and the tasks run: then a link may be lost.

        Not that to a relay, which waits to hear the end.
        """
        return (
            stats.local_total > 0
            and stats.phase == Phase.RUNNING
            and stats.pages_missing == stats.local_missing
            and not stats.error
            and not stats.refused
            and not self.is_relayed
        )

    def trouble(self, stats: Stats) -> str | None:
        """Say why a transfer cannot go on, None while it can."""
        if self.unreachable is not None or self.may_come_back(stats):
            return self.unreachable
        if self._has_done_its_part(stats):
            return None
        trouble = trouble_of(stats, self._config.link_timeout)
        if trouble is None or self.extension is None or self.is_relayed or stats.bytes_received:
            return trouble
        return f"{trouble}; is it a criupy-page-server, as --extended says?"

    # ---- the end, in words ---------------------------------------------------

    def can_tell(self, stats: Stats) -> bool:
        """Tell whether there is a relay that waits to hear how it ended."""
        # One that has no more pages may hold a source that is frozen still.
        return self.is_relayed and self.is_linked and stats.refused in {0, Refusal.GONE}

    async def conclude(self, stats: Stats, *, runs_here: bool) -> str | None:
        """Tell a relay how it ended, unless the pager has; say what becomes of the source if it is not so."""
        if not self.can_tell(stats):
            return None
        if runs_here and stats.link == Link.CLOSED:
            return self._answered(Command.CLOSE, stats.close_status)
        command = Command.CLOSE if runs_here else Command.ABORT
        patience = max(self._config.reconnect or 0.0, self._config.connect_timeout)
        deadline = trio.current_time() + patience
        # A relay without its source may have ended: then there is nothing to wait for.
        pause = patience if stats.refused else _FIRST_PAUSE
        while True:
            try:
                with trio.fail_at(deadline):
                    status = await self._say(command)
            except trio.TooSlowError:
                return self._untold("no answer came", stats)
            except RefusedError as error:
                self.source_goes_on = error.reason == Refusal.ENDED
                return str(error)
            except (CriupyError, OSError) as error:
                failure = str(error)
            else:
                log.info("told the relay: %s", command.name)
                return self._answered(command, status)
            if pause == _FIRST_PAUSE:
                log.warning("%s: trying to tell the relay for at most %g s", failure, patience)
            if trio.current_time() + pause >= deadline:
                return self._untold(failure, stats)
            await trio.sleep(pause)
            pause = _longer(pause)

    def _answered(self, command: Command, status: int) -> str | None:
        """Say what has become of the source, None where it is what was asked for."""
        if not status:
            return None
        if status != -errno.EALREADY:
            return f"the source ended with status {status}: see the log of the dump"
        if command is Command.ABORT:
            return "the source had ended before, with its spool or by itself"
        self.source_goes_on = True
        return "the source goes on, by somebody's decision"

    def _untold(self, why: str, stats: Stats) -> str:
        if stats.refused:
            return "the source was lost before"
        assert self.extension is not None  # noqa: S101 - there is a relay
        assert self.extension.marker is not None  # noqa: S101
        patience = self.extension.marker.hold_timeout
        until = "" if patience is None else f" for {patience:g} s at most (--hold-timeout)"
        return (
            f"the relay could not be told ({why}): unless it has decided it keeps the source frozen{until}, "
            "and criupy-page-server --abort on its host lets it go on"
        )

    async def _say(self, command: Command) -> int:
        assert self._config.page_server is not None  # noqa: S101 - a relay has an address
        assert self.extension is not None  # noqa: S101 - and is no stock page server
        hello = self.extension.hello(Lane.BULK)
        if self._tls is None:
            with socket.socket(fileno=await self._reach(*self._config.page_server)) as sock:
                return await say(sock, None, hello, command)
        secured = await self._begin_secured(self._tls)
        try:
            await secured.handshake(connect_timeout=self._config.connect_timeout)
            return await secured.say(hello, command)
        finally:
            secured.close()
