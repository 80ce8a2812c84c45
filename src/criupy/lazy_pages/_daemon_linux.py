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
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from criupy._kill_linux import kill_trees
from criupy._tls.tls_linux import TlsContext
from criupy._uffd.pager_linux import Link, Outcome, Pager, Phase
from criupy.errors import CriupyError, LazyPagesError
from criupy.lazy_pages._config import Config
from criupy.lazy_pages._cores_linux import usable_cores
from criupy.lazy_pages._extension import extension_for
from criupy.lazy_pages._handshake_linux import RestoreConnection, RestoredTask
from criupy.lazy_pages._images_linux import DumpedTask, load_tasks
from criupy.lazy_pages._linking_linux import Links
from criupy.lazy_pages._restore_socket_linux import SOCKET_NAME, bind_restore_socket
from criupy.lazy_pages._statistics import State, Statistics
from criupy.lazy_pages._telling_linux import log_completion, log_notice, was_refused
from criupy.lazy_pages._watching_linux import Changes, obeyed, reached
from criupy.wire.restore_socket import Zombie

if TYPE_CHECKING:
    from criupy._uffd._native import Stats

__all__ = ["Config", "LazyPages", "open_lazy_pages"]

log = logging.getLogger("criupy.lazy_pages")

# After SIGKILL an address space goes within milliseconds, unless its tasks hang in the kernel.
_KILL_PATIENCE = 10.0
_PROBE_INTERVAL = 0.02
# Beside the pager's own thread. More would wait for the locks of the address space.
_MOST_COPIERS = 2
# A round trip on one machine or to the next one, and what a thread takes from one fault to another.
_BUSY_POLL = 100e-6


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
        self._changes = Changes()
        self._ended = trio.Event()
        self._failure: BaseException | None = None
        self._pager: Pager | None = None
        self._connection: RestoreConnection | None = None
        self._handover_done = False
        self._links = Links(config, tls, self._changes)
        self._announced: set[int] = set()
        self._tasks: list[RestoredTask] = []
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
        self._changes.notify()

    async def wait(self) -> Statistics:
        """Wait until the restore is served; raise LazyPagesError if it was not."""
        await self._ended.wait()
        if self._failure is not None:
            raise self._failure
        return self._last

    # ---- the whole life --------------------------------------------------------

    def _release_images(self) -> None:
        for task in self._dumped.values():
            if task.image is not None:
                task.image.close()

    def _new_pager(self) -> Pager:
        other_cores = usable_cores() - 1
        busy_poll = self.config.busy_poll
        if busy_poll is None:
            busy_poll = _BUSY_POLL if other_cores else 0.0
        return Pager(
            link_timeout=self.config.link_timeout,
            nr_copiers=min(other_cores, _MOST_COPIERS),
            busy_poll=busy_poll,
        )

    async def _run(self) -> None:
        try:
            with self._new_pager() as pager:
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
            self._release_images()
            self._close_listener()
            if self._connection is not None:
                self._connection.close()
            self._links.close()
            for task in self._tasks:
                task.close()
            self._last = self._last.with_state(self._state)
            self._ended.set()

    async def _serve(self, pager: Pager) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen_to, pager)
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
            if self._links.trouble(pager.snapshot()) is not None:
                self._before.cancel()
            self._changes.notify()

    async def _keep_linked(self, pager: Pager) -> None:
        await self._links.keep(pager)
        if self._links.unreachable is not None:
            self._before.cancel()
            self._changes.notify()

    # ---- before restore-finished -------------------------------------------------

    async def _restore(self, pager: Pager, nursery: trio.Nursery) -> None:
        await self._links.begin(pager)
        if self._to_load:
            with trio.CancelScope(shield=True):  # the thread cannot be stopped, and its result may be needed
                self._dumped = await trio.to_thread.run_sync(
                    partial(load_tasks, self.config.images_dir, local=not self.config.remote)
                )
        self._links.extension = extension_for(self.config, self._dumped)
        nursery.start_soon(self._keep_linked, pager)
        sock, _ = await self._listener.accept()
        self._connection = connection = RestoreConnection(sock)
        self._close_listener()
        self._state = State.RESTORING
        await self._links.connect(pager)
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

    def _take(self, pager: Pager, nursery: trio.Nursery | None, task: RestoredTask | Zombie) -> None:
        self._announced.add(task.pid)
        known = self._dumped.get(task.pid)
        if isinstance(task, Zombie):
            log.debug("%d: zombie", task.pid)
            if known is None:
                raise self._stranger(task.pid)
            return
        self._tasks.append(task)
        if known is None or known.image is None:
            raise self._stranger(task.pid)
        if not _is_userfaultfd(task.uffd.fileno()):
            raise LazyPagesError(
                f"what came as the userfaultfd of pid {task.pid} is none: is it criu that connected?"
            )
        pager.add_task(task.pid, task.uffd.fileno(), known.image)
        task.uffd.detach()
        log.info("%d: %d lazy pages in %d extents", task.pid, known.image.nr_pages, known.image.nr_extents)
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
            changed = self._changes.next
            stats = pager.snapshot()
            if stats.phase == Phase.ENDED:
                return await self._report_end(stats)
            if stats.phase == Phase.RUNNING and self._state is State.RESTORING:
                self._state = State.TRANSFERRING
                log.info("restore finished, %d pages to go", stats.pages_missing)
            trouble = self._links.trouble(stats)
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
        stats = await obeyed(pager, self._changes)
        if stats.phase == Phase.ENDED:
            raise LazyPagesError(await self._undone("stopped"))
        try:
            await self._links.connect(pager)
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

    async def _report_end(self, stats: Stats) -> None:
        match stats.outcome:
            case Outcome.VETOED:
                raise LazyPagesError(f"the restore was aborted; {await self._source_goes_on()}")
            case Outcome.RESTORE_FAILED:
                raise LazyPagesError(
                    f"criu closed the connection before restore-finished: the restore failed, "
                    f"see its log; {await self._source_goes_on()}"
                )
        why = await self._links.conclude(stats, runs_here=True)
        if why is None:
            log_completion(stats)
        elif self._links.source_goes_on or (self._must_kill and stats.pages_dropped):
            # The relay keeps a source only of a destination that was given every page.
            raise LazyPagesError(f"every page arrived, but {why}; {await self._kill_late(self._pager)}")
        else:
            log.error("every page arrived, the tasks run, but %s", why)

    async def _source_goes_on(self) -> str:
        """Tell a relay that no task runs here, and say what becomes of the source."""
        if not self.config.remote:
            return "the images are untouched"
        assert self._pager is not None  # noqa: S101 - this is what it was for
        stats = self._pager.snapshot()
        if stats.refused and not self._links.can_tell(stats):
            return "the source is as it was"
        why = await self._links.conclude(stats, runs_here=False)
        if why is not None:
            return why
        return (
            "a live source goes on (its network stays locked unless it was dumped with --network-lock skip)"
        )

    # ---- failure ------------------------------------------------------------------------

    async def _give_up(self, pager: Pager, trouble: str) -> str | None:
        """End what cannot go on, by the rules of the period; return the whole story.

        None when there is nothing to give up: the last page had come meanwhile.
        """
        await self._conclude(pager)
        pager.abort()
        stats = await obeyed(pager, self._changes)
        if stats.outcome in {Outcome.VETOED, Outcome.RESTORE_FAILED}:
            return await self._undone(trouble)
        if stats.phase >= Phase.CLOSING:
            await reached(pager, self._changes, Phase.ENDED)
            return None
        pager.give_up()
        stats = await obeyed(pager, self._changes)
        missing = stats.pages_missing
        told = ""
        if self._may_poison(stats):
            pager.poison()
            stats = await obeyed(pager, self._changes)
            if stats.nr_live:
                told = f"this kernel cannot poison pages ({os.strerror(stats.poison_error)}), so "
            else:
                pager.end(reset=False)
                await reached(pager, self._changes, Phase.ENDED)
                why = await self._links.conclude(pager.snapshot(), runs_here=True)
                story = f"{trouble}; {stats.pages_poisoned} missing pages were poisoned"
                if self._links.source_goes_on:
                    return f"{story}; {why}; {await self._kill_late(pager)}"
                if why is not None:
                    log.error("the tasks run, but %s", why)
                return f"{story}: touching one is a SIGBUS"
        left = await self._kill(pager)
        if left:
            # Children that no pidfd led to. Poison is better than zeros.
            pager.poison()
            stats = await obeyed(pager, self._changes)
            told += f"{left} forked processes could not be found, "
            if stats.nr_live:
                log.error(
                    "%d address spaces with missing pages are let go: their processes are damaged", left
                )
        pager.end(reset=not left)
        await reached(pager, self._changes, Phase.ENDED)
        fate = await self._fate(stats, left)
        return f"{trouble}; {told}the tasks were killed with {missing} pages missing; {fate}"

    def _may_poison(self, stats: Stats) -> bool:
        # A source that will go on, or does (as one whose dump has died), or that is another's.
        if self._must_kill or stats.refused:
            return False
        return self.config.on_failure == "poison" and not self._strangers() and self._was_reached(stats)

    def _was_reached(self, stats: Stats) -> bool:
        # A source that never heard of us has the process as it was: better restored again
        # than left to run here without its memory. One that did not let us in runs it on.
        return not self.config.remote or (self._links.is_linked and not was_refused(stats))

    async def _fate(self, stats: Stats, left: int) -> str:
        if not self.config.remote:
            return "the images are untouched"
        if self._links.can_tell(stats):
            why = await self._links.conclude(stats, runs_here=bool(left))
            if why is not None:
                return why
            return "the source had to end, too" if left else "a live source goes on"
        if was_refused(stats) or (self._links.is_secured and not self._links.is_linked):
            return "a live source goes on"
        if not self._links.is_linked:
            return "the source was not reached and still holds the process: restore it again"
        if stats.link == Link.LOST:
            return "the source was lost before"
        return "the source had to end, too" if left else "a live source goes on"

    async def _undone(self, trouble: str) -> str:
        if self._state is State.WAITING:
            return f"{trouble}; no restore had connected"
        self._state = State.ABORTED
        return f"{trouble}; the restore was vetoed and {await self._source_goes_on()}"

    @property
    def _must_kill(self) -> bool:
        """Whether the source will go on, some day, unless a relay hears of us."""
        return self._links.extension is not None and self._links.extension.must_kill

    async def _kill_late(self, pager: Pager | None) -> str:
        """Kill tasks that have their memory and may not run, and say so."""
        assert pager is not None  # noqa: S101 - until the very end
        left = await self._kill(pager)
        return f"{left} of the tasks could not be killed" if left else "the tasks were killed"

    async def _kill(self, pager: Pager) -> int:
        """Kill the restored tasks with all that they forked; return how many address spaces are left."""
        kill_trees([(task.host_pid, task.pidfd.fileno()) for task in self._tasks if task.pidfd is not None])
        with trio.move_on_after(_KILL_PATIENCE):
            while True:
                pager.probe()
                if not (await obeyed(pager, self._changes)).nr_live and not self._strangers(alive=True):
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
    default). Raises TlsError for files that TLS cannot be done with. Leaving the
    block waits for the end and raises LazyPagesError if the restore could not
    be served; leaving it by an exception or cancellation stops at once, as the
    second stop() does.
    """
    # For the command, which does these before it loads trio: dumped is what load_tasks read, listener a
    # socket that listens there, tls what was made of config.tls.
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
