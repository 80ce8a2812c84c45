"""The lazy-pages daemon: one restore, from criu's connect to the last page.

The pager thread moves the pages; here is what happens once per task or once per
restore, and above all how it may end. Two periods, with opposite rules:

before restore-finished   No task has run. Whatever goes wrong, the restore is
                          vetoed and the source reset, so that it goes on.
after it                  The tasks run and the source must not. What goes wrong
                          leaves pages that will never come; by ``on_failure``
                          they are poisoned (a touch is a SIGBUS) or the tasks
                          are killed. A userfaultfd is never just closed.

Which of the two holds is known to the pager alone, since criu may be sending
the four bytes at this moment; so every abort is a command to it, and the answer
says what came of it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import trio

from criupy._kill_linux import kill_trees
from criupy._tls.files import TlsFiles
from criupy._tls.tls_linux import TlsContext
from criupy._uffd.image_linux import Image
from criupy._uffd.pager_linux import Link, Outcome, Pager, Phase
from criupy.errors import CriupyError, LazyPagesError
from criupy.images import frame_size
from criupy.lazy_pages._handshake_linux import RestoreConnection, RestoredTask
from criupy.lazy_pages._images import DumpedTask, check_reconnect, load_tasks
from criupy.lazy_pages._restore_socket_linux import SOCKET_NAME, bind_restore_socket
from criupy.lazy_pages._source_linux import SecuredSource, adopt_source, connect_source
from criupy.lazy_pages._statistics import State, Statistics
from criupy.lazy_pages._telling_linux import log_completion, log_notice, trouble_of, was_refused
from criupy.wire.restore_socket import Zombie

if TYPE_CHECKING:
    from criupy._uffd._native import Stats

__all__ = ["Config", "LazyPages", "open_lazy_pages"]

log = logging.getLogger("criupy.lazy_pages")

# After SIGKILL an address space goes within milliseconds, unless its tasks hang in the kernel.
_KILL_PATIENCE = 10.0
_PROBE_INTERVAL = 0.02
# Between attempts to reach a page server again: at first, and at most.
_RECONNECT_PAUSE = 0.05
_LONGEST_PAUSE = 1.0


@dataclass(frozen=True, slots=True)
class Config:
    """What one restore needs to know.

    ``page_server`` is the source's (host, port), ``ps_socket`` an inherited
    connected socket instead; with neither, pages come from the images.
    Timeouts are in seconds. ``frame_size`` None takes what the images tell.
    ``reconnect`` is how long a page server that was lost is tried to be reached
    again; only one that serves full images can be. With ``tls`` the source's
    certificate must be for ``source_name``, which is the host of
    ``page_server`` unless given.
    """

    images_dir: Path
    page_server: tuple[str, int] | None = None
    ps_socket: int | None = None
    frame_size: Literal[24, 32] | None = None
    connect_timeout: float = 10.0
    link_timeout: float = 30.0
    stop_timeout: float = 30.0
    on_failure: Literal["poison", "kill"] = "poison"
    reconnect: float | None = None
    tls: TlsFiles | None = None
    source_name: str | None = None

    @property
    def remote(self) -> bool:
        """Whether the pages come over a connection."""
        return self.page_server is not None or self.ps_socket is not None


def _is_userfaultfd(fd: int) -> bool:
    try:
        return "userfaultfd" in str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return True  # without /proc, the kernel's first answer tells


class LazyPages:
    """A restore being served; made by open_lazy_pages."""

    def __init__(
        self,
        config: Config,
        dumped: Mapping[int, DumpedTask] | None,
        listener: trio.socket.SocketType,
        socket_path: Path,
        tls: TlsContext | None = None,
    ) -> None:
        self.config = config
        self.socket_path = socket_path
        self._to_load = dumped is None
        self._dumped: Mapping[int, DumpedTask] = dumped or {}
        self._listener = listener
        self._before = trio.CancelScope()  # what stop() may simply cancel: no task can have run
        self._stops = 0
        self._changed = trio.Event()
        self._ended = trio.Event()
        self._failure: BaseException | None = None
        self._pager: Pager | None = None
        self._connection: RestoreConnection | None = None
        self._handover_done = self._linked = False
        self._tls = tls
        self._secured: SecuredSource | None = None
        self._announced: set[int] = set()
        self._tasks: list[RestoredTask] = []
        self._unreachable: str | None = None  # what was lost, and that it did not come back
        self._mismatch: str | None = None  # tasks run whose lazy pages no image tells
        self._last = Statistics()
        self._state = State.WAITING

    # ---- for the caller ------------------------------------------------------

    def statistics(self) -> Statistics:
        """Return the counters as of now (or as of the end)."""
        if self._pager is not None:
            self._last = Statistics.from_pager(self._pager.snapshot(), self._state, time.monotonic_ns())
        return self._last

    def stop(self) -> None:
        """Ask for the end.

        Before restore-finished: veto the restore, the source goes on. After
        it, the first call lets the transfer complete within ``stop_timeout``,
        the second applies ``on_failure`` at once.
        """
        self._stops += 1
        self._before.cancel()
        self._wake()

    async def wait(self) -> Statistics:
        """Wait until the restore is served; raise LazyPagesError if it was not."""
        await self._ended.wait()
        if self._failure is not None:
            raise self._failure
        return self._last

    # ---- the whole life --------------------------------------------------------

    async def _run(self) -> None:
        try:
            with Pager(link_timeout=self.config.link_timeout) as pager:
                self._pager = pager
                try:
                    await self._serve(pager)
                except BaseException as error:
                    # Cancelled, or a defect of ours: the rules hold all the same.
                    with trio.CancelScope(shield=True):
                        await self._settle(pager, error)
                    raise
                finally:
                    self.statistics()
                    self._pager = None
        except LazyPagesError as error:
            self._failure = error
            if self._state is not State.ABORTED:
                self._state = State.FAILED
        except BaseException:
            self._failure = LazyPagesError("the daemon was cancelled")
            self._state = State.FAILED
            raise
        else:
            self._state = State.COMPLETE
        finally:
            self._close_listener()
            if self._connection is not None:
                self._connection.close()
            if self._secured is not None:
                self._secured.close()
            for task in self._tasks:
                task.close()
            self._last = self._last.with_state(self._state)
            self._ended.set()

    async def _serve(self, pager: Pager) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen_to, pager)
            if self.config.reconnect is not None and self.config.page_server is not None:
                nursery.start_soon(self._keep_linked, pager, self.config.reconnect)
            try:
                try:
                    with self._before:
                        await self._restore(pager, nursery)
                except CriupyError as error:
                    raise LazyPagesError(await self._give_up(pager, str(error)) or str(error)) from error
                await self._supervise(pager, nursery)
            except CriupyError as error:
                # Out of the nursery as what it is, not as a group of one.
                failure: CriupyError | None = error
            else:
                failure = None
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _listen_to(self, pager: Pager) -> None:
        while True:
            await trio.lowlevel.wait_readable(pager.event_fd)
            for notice in pager.notices():
                log_notice(notice)
            if self._trouble(pager.snapshot()) is not None:
                self._before.cancel()
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ---- before restore-finished -------------------------------------------------

    async def _restore(self, pager: Pager, nursery: trio.Nursery) -> None:
        if self.config.ps_socket is not None:
            if self._tls is None:
                self._adopt(pager, self.config.ps_socket)
            else:
                self._secured = await self._begin_secured(self._tls)
        if self._to_load:
            with trio.CancelScope(shield=True):  # the thread cannot be stopped, and its result may be needed
                self._dumped = await trio.to_thread.run_sync(
                    partial(load_tasks, self.config.images_dir, local=not self.config.remote)
                )
        check_reconnect(self._dumped, asked_for=self.config.reconnect is not None and self.config.remote)
        sock, _ = await self._listener.accept()
        self._connection = connection = RestoreConnection(sock)
        self._close_listener()
        self._state = State.RESTORING
        await self._connect(pager)
        while len(self._announced) < len(self._dumped):
            self._take(pager, nursery, await connection.receive_task())
        log.info("all %d tasks have come, waiting for restore-finished", len(self._announced))
        self._handover_done = True
        pager.watch_restore(connection.detach())

    async def _conclude(self, pager: Pager, nursery: trio.Nursery | None = None) -> None:
        """Settle a restore that is stopped before all tasks came.

        criu waits for nobody: it may have sent all that it has to say while
        nothing of it was read, and then the tasks run, and closing what they
        sent would give them zeros. What it has not said by now, it cannot.
        """
        if self._handover_done:
            return
        self._handover_done = True
        self._connection = connection = self._connection or self._unaccepted()
        if connection is None:
            return
        connection.shut_down()
        rest, finished = await connection.receive_rest()
        if not finished:
            for task in rest:
                if isinstance(task, RestoredTask):
                    task.close()
            connection.close()
            return
        for task in rest:
            try:
                self._take(pager, nursery, task)
            except CriupyError as error:
                self._mismatch = str(error)
        if self._announced != self._dumped.keys() or any(task.uffd.fileno() >= 0 for task in self._tasks):
            self._mismatch = self._mismatch or (
                f"criu restored {len(self._announced)} tasks, {self.config.images_dir} holds "
                f"{len(self._dumped)}: give restore and daemon the same --images-dir"
            )
        if self._mismatch is not None:
            pager.give_up()  # or what it knows may seem complete to it
        pager.watch_restore(connection.detach())

    def _unaccepted(self) -> RestoreConnection | None:
        if self._listener.fileno() < 0:
            return None
        # A listening unix socket that is shut down refuses new connections and still yields old ones.
        with socket.socket(fileno=os.dup(self._listener.fileno())) as listener:
            listener.shutdown(socket.SHUT_RD)
            try:
                sock, _ = listener.accept()
            except OSError:
                return None
        self._state = State.RESTORING
        sock.setblocking(False)
        return RestoreConnection(trio.socket.from_stdlib_socket(sock))

    def _adopt(self, pager: Pager, inherited: int) -> None:
        fd = adopt_source(inherited, link_timeout=self.config.link_timeout)
        size: int | None = None
        try:
            size = self._frame_size()
        finally:
            self._linked = True
            # Whatever is wrong with the images: it is for the pager to let the source go on.
            pager.set_link(fd, frame_size=size or 32, shared=True)
        log.info("using socket %d to the page server, frames of %d bytes", fd, size)

    async def _connect(self, pager: Pager) -> None:
        if self._tls is not None:
            await self._connect_secured(pager, self._tls)
            return
        if self._linked or self.config.page_server is None:
            return
        host, port = self.config.page_server
        size = self._frame_size()
        fd = await self._reach(host, port)
        self._linked = True
        pager.set_link(fd, frame_size=size, shared=False)
        log.info("connected to page server %s:%d, frames of %d bytes", host, port, size)

    async def _keep_linked(self, pager: Pager, patience: float) -> None:
        """Reach the page server again whenever it is lost; pages that were asked for are missing again.

        One that is reached and lost again, without a page in between, gets no more time.
        """
        deadline, received = float("inf"), -1
        while True:
            changed = self._changed
            stats = pager.snapshot()
            if not self._may_reconnect(stats):
                await changed.wait()
                continue
            lost = trouble_of(stats, self.config.link_timeout)
            if stats.pages_received > received:
                deadline = trio.current_time() + patience
            received = stats.pages_received
            log.warning("%s; trying to reach it again for at most %g s", lost, patience)
            pager.drop_link()
            failure = await self._relink(pager, deadline)
            if failure is not None:
                self._unreachable = (
                    f"{lost}, and it could not be reached again within {patience:g} s: {failure}"
                )
                self._before.cancel()
                self._wake()
                return
            await self._obeyed(pager)
            log.info("reached the page server again")

    def _may_reconnect(self, stats: Stats) -> bool:
        return (
            self.config.reconnect is not None
            and self.config.page_server is not None
            and not stats.error
            and stats.phase < Phase.CLOSING
            and stats.link == Link.LOST
            and stats.link_error != errno.EPROTO
            and not was_refused(stats)
        )

    async def _relink(self, pager: Pager, deadline: float) -> str | None:
        """Connect again and again; return what was wrong when the time is up."""
        pause = _RECONNECT_PAUSE
        failure = "no answer"
        while True:
            with trio.move_on_at(deadline):
                try:
                    await self._link_again(pager)
                except CriupyError as error:
                    failure = str(error)
                else:
                    return None
                await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            if trio.current_time() >= deadline:
                return failure

    async def _link_again(self, pager: Pager) -> None:
        assert self.config.page_server is not None  # noqa: S101 - or it is not asked to
        size = self._frame_size()
        if self._tls is None:
            pager.set_link(await self._reach(*self.config.page_server), frame_size=size, shared=False)
            return
        secured = await self._begin_secured(self._tls)
        try:
            await secured.handshake(connect_timeout=self.config.connect_timeout)
            secured.give(pager, frame_size=size)
        finally:
            secured.close()

    async def _reach(self, host: str, port: int) -> int:
        return await connect_source(
            host,
            port,
            connect_timeout=self.config.connect_timeout,
            link_timeout=self.config.link_timeout,
        )

    async def _connect_secured(self, pager: Pager, tls: TlsContext) -> None:
        if self._linked or not self.config.remote:
            return
        size = self._frame_size()
        if self._secured is None:
            # No checkpoint once it is connected: a stop comes later, and finds it.
            self._secured = await self._begin_secured(tls)
        await self._secured.handshake(connect_timeout=self.config.connect_timeout)
        self._linked = True
        kind = self._secured.give(pager, frame_size=size)
        log.info("connected to page server %s by %s; frames of %d bytes", self._secured.where, kind, size)

    async def _begin_secured(self, tls: TlsContext) -> SecuredSource:
        if self.config.page_server is not None:
            host, port = self.config.page_server
            fd, where, name = await self._reach(host, port), f"{host}:{port}", host.partition("%")[0]
        else:
            inherited = self.config.ps_socket
            assert inherited is not None  # noqa: S101 - the configuration is remote
            fd = adopt_source(inherited, link_timeout=self.config.link_timeout)
            where, name = f"at socket {fd}", None
        shared = self.config.page_server is None
        return SecuredSource(fd, tls, self.config.source_name or name, where, shared=shared)

    def _frame_size(self) -> int:
        return self.config.frame_size or frame_size(self.config.images_dir) or 32

    def _take(self, pager: Pager, nursery: trio.Nursery | None, task: RestoredTask | Zombie) -> None:
        self._announced.add(task.pid)
        known = self._dumped.get(task.pid)
        if isinstance(task, Zombie):
            log.debug("%d: zombie", task.pid)
            if known is None:
                raise self._stranger(task.pid)
            return
        self._tasks.append(task)
        if known is None or known.extents is None:
            raise self._stranger(task.pid)
        if not _is_userfaultfd(task.uffd.fileno()):
            raise LazyPagesError(
                f"what came as the userfaultfd of pid {task.pid} is none: is it criu that connected?"
            )
        extents = known.extents
        image = Image(
            task.pid,
            extents.starts,
            extents.nr_pages,
            None if known.pages is None else extents.page_indices,
            known.not_inherited,
        )
        if known.pages is not None:
            try:
                image.map(known.pages)
            except OSError as error:
                raise LazyPagesError(f"{known.pages}: {error.strerror}") from error
        pager.add_task(task.pid, task.uffd.fileno(), image)
        task.uffd.detach()
        log.info("%d: %d lazy pages in %d extents", task.pid, extents.total_pages, len(extents))
        if task.pidfd is not None and nursery is not None:
            nursery.start_soon(self._watch_exit, pager, task.pidfd.fileno())

    def _stranger(self, pid: int) -> LazyPagesError:
        return LazyPagesError(
            f"criu restores pid {pid}, which {self.config.images_dir} does not hold: "
            "give restore and daemon the same --images-dir"
        )

    async def _watch_exit(self, pager: Pager, pidfd: int) -> None:
        await trio.lowlevel.wait_readable(pidfd)
        pager.probe()

    def _close_listener(self) -> None:
        if self._listener.fileno() < 0:
            return
        self._listener.close()
        # criu connects once; a later restore should see that nobody listens.
        with contextlib.suppress(FileNotFoundError):
            self.socket_path.unlink()

    # ---- until the end ----------------------------------------------------------------

    async def _supervise(self, pager: Pager, nursery: trio.Nursery) -> None:
        deadline = float("inf")
        while True:
            changed = self._changed
            stats = pager.snapshot()
            if stats.phase == Phase.ENDED:
                return self._report_end(stats)
            if stats.phase == Phase.RUNNING and self._state is State.RESTORING:
                self._state = State.TRANSFERRING
                log.info("restore finished, %d pages to go", stats.pages_missing)
            trouble = self._trouble(stats)
            if trouble is None and self._stops:
                if stats.phase == Phase.RESTORING:
                    await self._stop_early(pager, nursery)
                    continue
                if deadline == float("inf"):
                    deadline = trio.current_time() + self.config.stop_timeout
                    log.info(
                        "asked to stop: transferring the last %d pages, for at most %g s",
                        stats.pages_missing,
                        self.config.stop_timeout,
                    )
                trouble = self._impatience(stats, deadline)
            if trouble is not None and stats.phase != Phase.CLOSING:
                await self._fail_with(pager, trouble)
                continue
            # Once closing, nothing is left that more haste could change.
            with trio.move_on_at(float("inf") if stats.phase == Phase.CLOSING else deadline):
                await changed.wait()

    async def _stop_early(self, pager: Pager, nursery: trio.Nursery) -> None:
        """Veto the restore; return only if restore-finished was there already, for a stop after it."""
        await self._conclude(pager, nursery)
        if self._mismatch is not None:
            await self._fail_with(pager, self._mismatch)
        pager.abort()
        stats = await self._obeyed(pager)
        if stats.phase == Phase.ENDED:
            raise LazyPagesError(self._undone("stopped"))
        try:
            await self._connect(pager)
        except CriupyError as error:
            await self._fail_with(pager, str(error))

    def _impatience(self, stats: Stats, deadline: float) -> str | None:
        if self._stops > 1:
            return f"stopped at the second request, {stats.pages_missing} pages were missing"
        if trio.current_time() >= deadline:
            return f"stopped after --stop-timeout, {stats.pages_missing} pages were missing"
        return None

    async def _fail_with(self, pager: Pager, trouble: str) -> None:
        """Give up and raise; return only if the last page had come meanwhile."""
        story = await self._give_up(pager, trouble)
        if story is not None:
            raise LazyPagesError(story)

    def _trouble(self, stats: Stats) -> str | None:
        if self._unreachable is not None or self._may_reconnect(stats):
            return self._unreachable
        return trouble_of(stats, self.config.link_timeout)

    def _report_end(self, stats: Stats) -> None:
        match stats.outcome:
            case Outcome.VETOED:
                raise LazyPagesError(f"the restore was aborted; {self._source_goes_on()}")
            case Outcome.RESTORE_FAILED:
                raise LazyPagesError(
                    f"criu closed the connection before restore-finished: the restore failed, "
                    f"see its log; {self._source_goes_on()}"
                )
        log_completion(stats)

    def _source_goes_on(self) -> str:
        if not self.config.remote:
            return "the images are untouched"
        return (
            "a live source goes on (its network stays locked unless it was dumped with --network-lock skip)"
        )

    # ---- failure ------------------------------------------------------------------------

    async def _obeyed(self, pager: Pager) -> Stats:
        while True:
            changed = self._changed
            stats = pager.snapshot()
            if pager.obeyed(stats):
                return stats
            await changed.wait()

    async def _give_up(self, pager: Pager, trouble: str) -> str | None:
        """End what cannot go on, by the rules of the period; return the whole story.

        None when there is nothing to give up: the last page had come meanwhile.
        """
        await self._conclude(pager)
        pager.abort()
        stats = await self._obeyed(pager)
        if stats.outcome in {Outcome.VETOED, Outcome.RESTORE_FAILED}:
            return self._undone(trouble)
        if stats.phase >= Phase.CLOSING:
            await self._phase(pager, Phase.ENDED)
            return None
        pager.give_up()
        stats = await self._obeyed(pager)
        missing = stats.pages_missing
        told = ""
        if self.config.on_failure == "poison" and not self._strangers() and self._was_reached(stats):
            pager.poison()
            stats = await self._obeyed(pager)
            if stats.nr_live:
                told = f"this kernel cannot poison pages ({os.strerror(stats.poison_error)}), so "
            else:
                pager.end(reset=False)
                await self._phase(pager, Phase.ENDED)
                return (
                    f"{trouble}; {stats.pages_poisoned} missing pages were poisoned: touching one is a SIGBUS"
                )
        left = await self._kill(pager)
        if left:
            # Children that no pidfd led to. Poison is better than zeros.
            pager.poison()
            stats = await self._obeyed(pager)
            told += f"{left} forked processes could not be found, "
            if stats.nr_live:
                log.error(
                    "%d address spaces with missing pages are let go: their processes are damaged", left
                )
        pager.end(reset=not left)
        await self._phase(pager, Phase.ENDED)
        return (
            f"{trouble}; {told}the tasks were killed with {missing} pages missing; {self._fate(stats, left)}"
        )

    def _was_reached(self, stats: Stats) -> bool:
        # A source that never heard of us has the process as it was: better restored again
        # than left to run here without its memory. One that did not let us in runs it on.
        return not self.config.remote or (self._linked and not was_refused(stats))

    def _fate(self, stats: Stats, left: int) -> str:
        if not self.config.remote:
            return "the images are untouched"
        if was_refused(stats) or (self._secured is not None and not self._linked):
            return "a live source goes on"
        if not self._linked:
            return "the source was not reached and still holds the process: restore it again"
        if stats.link == Link.LOST:
            return "the source was lost before"
        return "the source had to end, too" if left else "a live source goes on"

    def _undone(self, trouble: str) -> str:
        if self._state is State.WAITING:
            return f"{trouble}; no restore had connected"
        self._state = State.ABORTED
        return f"{trouble}; the restore was vetoed and {self._source_goes_on()}"

    async def _phase(self, pager: Pager, phase: Phase) -> None:
        while True:
            changed = self._changed
            if pager.snapshot().phase >= phase:
                return
            await changed.wait()

    async def _kill(self, pager: Pager) -> int:
        """Kill the restored tasks with all that they forked; return how many address spaces are left."""
        kill_trees([(task.host_pid, task.pidfd.fileno()) for task in self._tasks if task.pidfd is not None])
        with trio.move_on_after(_KILL_PATIENCE):
            while True:
                pager.probe()
                if not (await self._obeyed(pager)).nr_live and not self._strangers(alive=True):
                    return 0
                await trio.sleep(_PROBE_INTERVAL)
        return int(pager.snapshot().nr_live) + len(self._strangers(alive=True))

    def _strangers(self, *, alive: bool = False) -> list[RestoredTask]:
        """Return the tasks whose memory only their own end can keep from becoming zeros."""
        if self._mismatch is None:
            return []
        return [task for task in self._tasks if not alive or not task.has_ended]

    async def _settle(self, pager: Pager, error: BaseException) -> None:
        """Bring the pager to an end after an error that no one told it of."""
        if pager.snapshot().phase == Phase.ENDED:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen_to, pager)
            story = await self._give_up(pager, str(error) or type(error).__name__)
            log.debug("%s", story or "the last page had come")
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def open_lazy_pages(
    config: Config,
    *,
    work_dir: str | os.PathLike[str] | None = None,
    dumped: Mapping[int, DumpedTask] | None = None,
    listener: socket.socket | None = None,
    tls: TlsContext | None = None,
) -> AsyncGenerator[LazyPages, None]:
    """Serve one restore; the socket listens when the block is entered.

    ``work_dir`` is where ``lazy-pages.socket`` appears (the images directory by
    default). ``dumped`` is what load_tasks read and ``listener`` a socket that
    listens there, ``tls`` what was made of ``config.tls``, for a caller that had
    to do these before trio. Raises TlsError for files that TLS cannot be done with. Leaving the
    block waits for the end and raises LazyPagesError if the restore could not
    be served; leaving it by an exception or cancellation stops at once, as the
    second stop() does.
    """
    directory = Path(config.images_dir if work_dir is None else work_dir)
    if config.tls is not None and config.remote and tls is None:
        tls = TlsContext(config.tls, server=False)
    if listener is None:
        listener = bind_restore_socket(directory)
    listening = trio.socket.from_stdlib_socket(listener)
    daemon = LazyPages(config, dumped, listening, directory / SOCKET_NAME, tls)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(daemon._run)
        yield daemon
        await daemon._ended.wait()
    await daemon.wait()
