"""The destination's side of a container's migration, blocking."""

from __future__ import annotations

import time
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from criupy.errors import LocalProtocolError
from criupy.rpc import Process
from criupy.rpc._daemon_linux import Daemon
from criupy.rpc._lazy_linux import check_listening
from criupy.rpc._operation_linux import insist, wait_for
from criupy.rpc._worker_linux import HeldInterrupt
from criupy.runc._plans_linux import PAUSE, RestorePlan
from criupy.runc._program_linux import Command

if TYPE_CHECKING:
    from criupy.runc._runc_linux import Runc

__all__ = ["ContainerRestore"]


class ContainerRestore:
    """A restored container whose memory follows; made by ``Runc.lazy_restore``.

    ``pid`` is its first process as the host sees it.
    """

    def __init__(self, runc: Runc, plan: RestorePlan) -> None:
        self._runc = runc
        self._plan = plan
        self._timeout = runc._program.timeout(plan.request_timeout)
        self._daemon = None if plan.daemon is None else Daemon(plan.daemon)
        self._entered = False
        self._runs = False
        self.pid: int = 0

    @property
    def daemon(self) -> Process | None:
        """The lazy-pages daemon, if it was started here."""
        return None if self._daemon is None else self._daemon.process

    def __enter__(self) -> Self:
        if self._entered:
            raise LocalProtocolError("lazy_restore: the block can be entered once")
        self._entered = True
        deadline = time.monotonic() + self._timeout
        plan, runc = self._plan, self._runc
        runc._need("lazy_pages", "restore", plan.container, self._timeout)
        left = max(deadline - time.monotonic(), 0.0)
        plan.refuse(runc.state(plan.container, request_timeout=left))
        try:
            if self._daemon is None:
                check_listening(plan.work_dir)
            else:
                self._daemon.start(deadline)
            self._restore(deadline)
            # It runs, and only its pid is asked for.
            left = max(deadline - time.monotonic(), runc._program.grace)
            state = runc.state(plan.container, request_timeout=left)
        except BaseException as error:
            self._end(error)
            raise
        self.pid = 0 if state is None else state.pid
        return self

    def _end(self, error: BaseException) -> None:
        """End what serves a restore that failed, or was told to fail and runs."""
        if self._runs:
            self._plan.runs(error)
        if self._daemon is None:
            return
        if self._runs:
            self._daemon.see_out(error)
        else:
            self._daemon.stop(error, self._runc._program.grace)

    def _restore(self, deadline: float) -> None:
        """Let runC restore; raise, with ``_runs`` set if the container runs all the same."""
        command = None
        try:
            with HeldInterrupt():  # whose end may raise it, so what was started has to be ours by then
                command = self._plan.start(self._runc._program)
            self._wait_restored(command, deadline)
        except BaseException as error:
            if command is not None:
                try:
                    insist(partial(self._give_up, command))
                finally:
                    if not self._runs:
                        self._plan.tidy(self._runc._program, command, error)
            raise
        finally:
            if command is not None:
                command.close()

    def _wait_restored(self, command: Command, deadline: float) -> None:
        while command.worker.poll() is None:
            daemon = None if self._daemon is None else self._daemon.pidfd
            if not wait_for(deadline, command.worker.pidfd, *([] if daemon is None else [daemon])):
                raise command.overdue()
            if self._daemon is not None and self._daemon.poll():
                # CRIU, which has lost it, may hang, and runC with it.
                self._wait_grace(command)
                if command.worker.poll() is None:
                    raise command.stuck()
        self._runs = command.worker.poll() == 0
        if not self._runs:
            raise command.failure()

    def _give_up(self, command: Command) -> None:
        """End a restore that is under way, unless its tasks may run."""
        daemon, plan = self._daemon, self._plan
        if command.worker.poll() is None and daemon is not None and plan.has_our_daemon:
            daemon.terminate()
            self._wait_grace(command)
        status = command.worker.poll()
        if status is None:
            self._kill_criu(command)
        else:
            self._runs = status == 0

    def _may_run(self) -> bool:
        return self._plan.may_run(None if self._daemon is None else self._daemon.poll())

    def _kill_criu(self, command: Command) -> None:
        """Kill what runC starts, until it gives up; it may not have started CRIU yet."""
        deadline = time.monotonic() + self._runc._program.grace
        while command.worker.poll() is None:
            if self._may_run():
                self._runs = True
                return
            if time.monotonic() > deadline:
                command.worker.abandon()
                break
            self._plan.kill_criu(command)
            wait_for(min(deadline, time.monotonic() + PAUSE), command.worker.pidfd)
        self._runs = command.worker.poll() == 0

    def _wait_grace(self, command: Command) -> None:
        deadline = time.monotonic() + self._runc._program.grace
        while command.worker.poll() is None and wait_for(deadline, command.worker.pidfd):
            pass

    def wait(self) -> None:
        """Wait for the last page; raise LazyPagesError if it did not come.

        Without a daemon of its own it returns at once.
        """
        if self._daemon is not None:
            self._daemon.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._daemon is not None:
            self._daemon.leave(error)
