"""The destination's side of a container's migration, on trio."""

from __future__ import annotations

import select
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

import trio

from criupy.errors import LocalProtocolError
from criupy.rpc import AsyncProcess
from criupy.rpc._async_daemon_linux import AsyncDaemon
from criupy.rpc._async_operation_linux import insist, wait_ended
from criupy.rpc._lazy_linux import check_listening
from criupy.runc._plans_linux import PAUSE, RestorePlan
from criupy.runc._program_linux import Command

if TYPE_CHECKING:
    from criupy.runc._async_runc_linux import AsyncRunc

__all__ = ["AsyncContainerRestore"]


class AsyncContainerRestore:
    """A restored container whose memory follows; made by ``AsyncRunc.lazy_restore``.

    ``pid`` is its first process as the host sees it.
    """

    def __init__(self, runc: AsyncRunc, plan: RestorePlan) -> None:
        self._runc = runc
        self._plan = plan
        self._timeout = runc._program.timeout(plan.request_timeout)
        self._daemon = None if plan.daemon is None else AsyncDaemon(plan.daemon)
        self._entered = False
        self._runs = False
        self.pid: int = 0

    @property
    def daemon(self) -> AsyncProcess | None:
        """The lazy-pages daemon, if it was started here."""
        return None if self._daemon is None else self._daemon.process

    async def __aenter__(self) -> Self:
        if self._entered:
            raise LocalProtocolError("lazy_restore: the block can be entered once")
        self._entered = True
        deadline = trio.current_time() + self._timeout
        plan, runc = self._plan, self._runc
        await runc._need("lazy_pages", "restore", plan.container, self._timeout)
        left = max(deadline - trio.current_time(), 0.0)
        plan.refuse(await runc.state(plan.container, request_timeout=left))
        try:
            if self._daemon is None:
                check_listening(plan.work_dir)
            else:
                await self._daemon.start(deadline)
            await self._restore(deadline)
            # It runs, and only its pid is asked for.
            left = max(deadline - trio.current_time(), runc._program.grace)
            state = await runc.state(plan.container, request_timeout=left)
        except BaseException as error:
            await self._end(error)
            raise
        self.pid = 0 if state is None else state.pid
        return self

    async def _end(self, error: BaseException) -> None:
        """End what serves a restore that failed, or was told to fail and runs."""
        if self._runs:
            self._plan.runs(error)
        if self._daemon is None:
            return
        if self._runs:
            await self._daemon.see_out(error)
        else:
            await self._daemon.stop(error, self._runc._program.grace)

    @trio.lowlevel.enable_ki_protection
    async def _restore(self, deadline: float) -> None:
        """Let runC restore; raise, with ``_runs`` set if the container runs all the same."""
        command = self._plan.start(self._runc._program)
        try:
            await self._wait_restored(command, deadline)
        except BaseException as error:
            try:
                await insist(partial(self._give_up, command))
            finally:
                if not self._runs:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(self._plan.tidy, self._runc._program, command, error)
            raise
        finally:
            command.close()

    async def _wait_restored(self, command: Command, deadline: float) -> None:
        with trio.move_on_at(deadline) as scope:
            while command.worker.poll() is None:
                daemon = None if self._daemon is None else self._daemon.pidfd
                with select.epoll() as either:
                    for pidfd in (command.worker.pidfd, *([] if daemon is None else [daemon])):
                        either.register(pidfd, select.EPOLLIN)
                    await trio.lowlevel.wait_readable(either.fileno())
                if self._daemon is not None and self._daemon.poll():
                    # CRIU, which has lost it, may hang, and runC with it.
                    await self._wait_grace(command)
                    if command.worker.poll() is None:
                        raise command.stuck()
        if scope.cancelled_caught:
            raise command.overdue()
        self._runs = command.worker.poll() == 0
        if not self._runs:
            raise command.failure()

    async def _give_up(self, command: Command) -> None:
        """End a restore that is under way, unless its tasks may run."""
        daemon, plan = self._daemon, self._plan
        if command.worker.poll() is None and daemon is not None and plan.has_our_daemon:
            daemon.terminate()
            await self._wait_grace(command)
        status = command.worker.poll()
        if status is None:
            await self._kill_criu(command)
        else:
            self._runs = status == 0

    def _may_run(self) -> bool:
        return self._plan.may_run(None if self._daemon is None else self._daemon.poll())

    async def _kill_criu(self, command: Command) -> None:
        """Kill what runC starts, until it gives up; it may not have started CRIU yet."""
        deadline = trio.current_time() + self._runc._program.grace
        while command.worker.poll() is None:
            if self._may_run():
                self._runs = True
                return
            if trio.current_time() > deadline:
                command.worker.abandon()
                break
            self._plan.kill_criu(command)
            with trio.move_on_at(min(deadline, trio.current_time() + PAUSE)):
                await wait_ended(command.worker)
        self._runs = command.worker.poll() == 0

    async def _wait_grace(self, command: Command) -> None:
        with trio.move_on_after(self._runc._program.grace):
            await wait_ended(command.worker)

    async def wait(self) -> None:
        """Wait for the last page; raise LazyPagesError if it did not come.

        Without a daemon of its own it returns at once.
        """
        if self._daemon is not None:
            await self._daemon.wait()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._daemon is not None:
            await self._daemon.leave(error)
