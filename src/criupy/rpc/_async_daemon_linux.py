"""A lazy-pages daemon that is started for a restore, on trio."""

from __future__ import annotations

import math
import os
from functools import partial

import trio

from criupy.errors import CriupyError
from criupy.rpc._async_operation_linux import AsyncProcess, end_worker, wait_ended
from criupy.rpc._daemon_linux import DaemonPlan, explain, goes_on, status_pipe
from criupy.rpc._worker_linux import Worker

__all__ = ["AsyncDaemon"]


class AsyncDaemon:
    """A lazy-pages daemon from its start to its end."""

    def __init__(self, plan: DaemonPlan) -> None:
        self._plan = plan
        self._log = plan.watch()
        self._worker: Worker | None = None
        self.process: AsyncProcess | None = None

    @trio.lowlevel.enable_ki_protection
    async def start(self, deadline: float) -> None:
        """Start it and wait until it listens; raise LazyPagesError, or CriuTimeout."""
        with status_pipe() as (reading, writing):
            self._worker = worker = await trio.to_thread.run_sync(partial(self._plan.start, writing.fileno()))
            self.process = AsyncProcess(worker)
            writing.close()
            with trio.move_on_at(deadline) as scope:
                await trio.lowlevel.wait_readable(reading.fileno())
            if scope.cancelled_caught:
                raise self._plan.not_ready()
            if os.read(reading.fileno(), 1) == b"\0":
                return
            # It has closed the pipe, so it has ended or is about to.
            with trio.move_on_after(1):
                await wait_ended(worker)
            raise self._plan.failure(self._log, worker.output(), worker.poll(), ready=False)

    def poll(self) -> int | None:
        """Return its exit status; None while it runs, or is not started."""
        return None if self._worker is None else self._worker.poll()

    @property
    def pidfd(self) -> int | None:
        """What tells of its end; None when it has ended, or is not started."""
        return None if self._worker is None or self._worker.poll() is not None else self._worker.pidfd

    def terminate(self) -> None:
        """Make it veto a restore that is not finished, and otherwise hurry."""
        if self._worker is not None:
            self._worker.terminate()

    async def stop(self, error: BaseException, grace: float) -> None:
        """End the daemon of a restore that failed; it ends by itself if criu had connected."""
        worker = self._worker
        if worker is None:
            return
        with trio.CancelScope(shield=True):
            with trio.move_on_after(1):
                await wait_ended(worker)
            status = worker.poll()
            if status is None:
                worker.terminate()
            elif status:
                explain(error, self._plan.failure(self._log, worker.output(), status, ready=True))
            # Tasks may run nevertheless, so ours is never killed: it ends by its own rules.
            try:
                await end_worker(worker, math.inf if self._plan.is_ours else grace)
            except BaseException as interrupted:
                interrupted.add_note(goes_on(worker))
                raise
            self._worker = None

    async def wait(self) -> None:
        """Wait for the last page; raise LazyPagesError if it did not come."""
        if (worker := self._worker) is not None:
            await wait_ended(worker)
            if self._worker is None:
                return  # another task has waited, and was told
            self._worker = None
            status, output = worker.poll(), worker.output()
            worker.close()
            if status:
                raise self._plan.failure(self._log, output, status, ready=True, served=True)

    async def see_out(self, error: BaseException) -> None:
        """Wait for its end after an error elsewhere."""
        # The tasks run and need their memory: our daemon goes on fetching it for a limited time.
        if self._worker is not None and self._plan.is_ours:
            self._worker.terminate()
        with trio.CancelScope(shield=True):
            try:
                await self.wait()
            except CriupyError as failure:
                error.add_note(str(failure))

    async def leave(self, error: BaseException | None) -> None:
        """Wait for the last page at the end of a block, which may have ended in an error."""
        if error is not None:
            await self.see_out(error)
            return
        try:
            await self.wait()
        except BaseException as interrupted:
            await self.see_out(interrupted)
            raise
