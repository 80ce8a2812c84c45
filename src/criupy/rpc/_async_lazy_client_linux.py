"""The two sides of a lazy migration, on trio."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import trio

from criupy._descriptor import Descriptor
from criupy.errors import CriuError, CriupyError, CriuTimeout, LocalProtocolError, RemoteProtocolError
from criupy.rpc._async_operation_linux import AsyncOperation, AsyncProcess, end_worker, wait_ended
from criupy.rpc._calls_linux import Call
from criupy.rpc._lazy_linux import (
    DaemonPlan,
    LazyDumpPlan,
    check_listening,
    daemon_failure,
    goes_on,
    status_pipe,
)
from criupy.rpc._notify import AsyncHooks, Script
from criupy.rpc._results import SourceOutcome
from criupy.rpc._worker_linux import Worker

if TYPE_CHECKING:
    from criupy.rpc._async_client_linux import AsyncCriu

__all__ = ["AsyncLazyDump", "AsyncLazyRestore"]


class AsyncLazyDump:
    """A frozen tree whose memory is served; made by ``AsyncCriu.lazy_dump``.

    ``address`` and ``port`` are where it listens, ``frame_size`` is what its
    page-server frames take in bytes, ``images_dir`` holds all that is not
    lazy. ``outcome`` tells at the end what became of the tree.
    """

    def __init__(
        self, client: AsyncCriu, plan: LazyDumpPlan, hooks: AsyncHooks | None, timeout: float | None
    ) -> None:
        self._client = client
        self._plan = plan
        self._hooks = hooks
        self._timeout = timeout
        self._operation: AsyncOperation[None] | None = None
        self._waiter: trio.Event | None = None
        """Set when the task that waits, if one does, has left."""
        self.outcome: SourceOutcome | None = None
        self.address: str = ""
        self.port: int = 0
        self.frame_size: Literal[24, 32] = 32
        self.images_dir: Path = Path()

    async def __aenter__(self) -> Self:
        if self._operation is not None:
            raise LocalProtocolError("lazy_dump: the block can be entered once")
        call = self._plan.open()
        self.images_dir = call.images_dir or self.images_dir
        try:
            self._operation = operation = self._client._operation(call, self._timeout)
            operation._set_deadline(trio.current_time() + operation._timeout)
            version = await self._client.version(request_timeout=operation._timeout)
            self.frame_size = self._plan.check_version(version)
            try:
                await operation.__aenter__()
                await self._get_ready(operation)
            except BaseException as error:
                await operation.__aexit__(type(error), error, error.__traceback__)
                raise
        except BaseException:
            call.close()
            self._plan.close()
            raise
        return self

    async def _get_ready(self, operation: AsyncOperation[None]) -> None:
        async for notification in operation:
            if notification.script == Script.STATUS_READY:
                self.address, self.port = self._plan.locate(operation._peer_pid)
            await operation._ask(self._hooks, notification)
            if notification.script == Script.STATUS_READY:
                await operation._answer()
                operation._set_deadline(math.inf)
                return
        raise CriuError("lazy_dump", "CRIU ended the dump without serving pages")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self.wait()
            else:
                await self._see_out(error)
        except (CriuError, RemoteProtocolError):
            raise
        except BaseException as interrupted:
            await self._see_out(interrupted)
            raise
        finally:
            self._plan.close()

    async def _see_out(self, error: BaseException) -> None:
        """End it after an error: by force, unless a destination may run already, which alone can say how."""
        with trio.CancelScope(shield=True):
            if self.outcome is not None:
                return
            unreached = await trio.to_thread.run_sync(
                self._plan.is_unreached, self._running._peer_pid, self.address, self.port
            )
            if unreached:
                await self.abort()
                return
            try:
                await self.wait()
            except CriupyError as failure:
                error.add_note(str(failure))

    @property
    def _running(self) -> AsyncOperation[None]:
        if self._operation is None:
            raise LocalProtocolError("lazy_dump: enter the block first")
        return self._operation

    async def wait(self) -> SourceOutcome:
        """Wait until the destination has all pages and the tree is killed here.

        Raise CriuError when it was not: ``outcome`` tells whether the tree goes on here.
        """
        if self.outcome is not None:
            return self.outcome
        if self._waiter is not None:
            raise LocalProtocolError("lazy_dump: another task waits already; only abort() can be called now")
        self._waiter = left = trio.Event()
        try:
            return await self._wait(self._running)
        finally:
            self._waiter = None
            left.set()

    async def _wait(self, operation: AsyncOperation[None]) -> SourceOutcome:
        try:
            async for _ in operation:
                pass
            await operation.__aexit__(None, None, None)
        except (CriuError, RemoteProtocolError) as error:
            await operation.__aexit__(type(error), error, error.__traceback__)
            self._end_with(self._plan.failed(error))
            raise
        return self._end_with(self._plan.outcome(succeeded=True))

    def _end_with(self, outcome: SourceOutcome) -> SourceOutcome:
        self.outcome = outcome
        return outcome

    async def abort(self) -> SourceOutcome:
        """End it now, so that the tree goes on here.

        Only for when no destination runs it: after a destination has connected,
        nobody here can know that. A task in ``wait`` sees CRIU die.
        """
        stop = partial(self._plan.stop, self.address, self.port)
        seen = True
        if self.outcome is None and (left := self._waiter) is not None:
            await self._running._strike(stop)
            with trio.move_on_after(self._running._grace):
                await left.wait()
            seen = left.is_set()
        if self.outcome is not None:
            return self.outcome
        if seen:  # nobody waits, or whoever did was interrupted
            seen = await self._running._kill(stop)
        return self._end_with(self._plan.aborted(seen=seen, succeeded=self._running._succeeded))


class AsyncLazyRestore:
    """A restored tree whose memory follows; made by ``AsyncCriu.lazy_restore``.

    ``pid`` is its first process as the host sees it, ``command`` what CRIU
    became with ``exec_cmd``, ``daemon`` the lazy-pages daemon if it was started here.
    """

    def __init__(
        self,
        client: AsyncCriu,
        call: Call[int],
        hooks: AsyncHooks | None,
        plan: DaemonPlan | None,
        timeout: float | None,
    ) -> None:
        self._client = client
        self._call = call
        self._hooks = hooks
        self._plan = plan
        self._work_dir = call.work_dir or Path()
        self._timeout = timeout
        self._worker: Worker | None = None
        self._entered = False
        self.pid: int = 0
        self.command: AsyncProcess | None = None
        self.daemon: AsyncProcess | None = None

    async def __aenter__(self) -> Self:
        if self._entered:
            raise LocalProtocolError("lazy_restore: the block can be entered once")
        self._entered = True
        operation = self._client._operation(self._call, self._timeout)
        deadline = trio.current_time() + operation._timeout
        try:
            if self._plan is None:
                check_listening(self._work_dir)
            else:
                await self._start(self._plan, deadline)
            operation._set_deadline(deadline)
            async with operation:
                await operation._serve(self._hooks)
            self.command = None if operation._worker is None else AsyncProcess(operation._worker)
            self.pid = operation.result
        except BaseException as error:
            self._call.close()
            await self._stop(error)
            raise
        return self

    @trio.lowlevel.enable_ki_protection
    async def _start(self, plan: DaemonPlan, deadline: float) -> None:
        with status_pipe() as (reading, writing):
            words = plan.words(self._call.images_dir or self._work_dir, self._work_dir, writing.fileno())
            self._worker = await trio.to_thread.run_sync(
                partial(
                    Worker.start,
                    words,
                    request="lazy_restore",
                    pass_fds=(writing.fileno(),),
                    capture=self._client._transport.capture_output,
                )
            )
            self.daemon = AsyncProcess(self._worker)
            writing.close()
            await self._await_ready(self._worker, reading, deadline)

    async def _await_ready(self, worker: Worker, reading: Descriptor, deadline: float) -> None:
        with trio.move_on_at(deadline) as scope:
            await trio.lowlevel.wait_readable(reading.fileno())
        if scope.cancelled_caught:
            raise CriuTimeout("lazy_restore", "the lazy-pages daemon did not become ready in time")
        if os.read(reading.fileno(), 1) == b"\0":
            return
        # It has closed the pipe, so it has ended or is about to.
        with trio.move_on_after(1):
            await wait_ended(worker)
        raise daemon_failure(self._work_dir, worker.output(), worker.poll(), ready=False)

    async def _stop(self, error: BaseException) -> None:
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
            elif status and isinstance(error, CriuError):
                error.hint = str(daemon_failure(self._work_dir, worker.output(), status, ready=True))
            # Tasks may run nevertheless, so ours is never killed: it ends by its own rules.
            is_ours = self._plan is not None and self._plan.is_ours
            try:
                await end_worker(worker, math.inf if is_ours else self._client._transport.grace)
            except BaseException as interrupted:
                interrupted.add_note(goes_on(worker))
                raise
            self._worker = None

    async def wait(self) -> None:
        """Wait for the last page; raise LazyPagesError if it did not come.

        Without a daemon of its own it returns at once.
        """
        if (worker := self._worker) is not None:
            await wait_ended(worker)
            if self._worker is None:
                return  # another task has waited, and was told
            self._worker = None
            status, output = worker.poll(), worker.output()
            worker.close()
            if status:
                raise daemon_failure(self._work_dir, output, status, ready=True)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            try:
                await self.wait()
            except BaseException as interrupted:
                await self._see_out(interrupted)
                raise
        else:
            await self._see_out(error)

    async def _see_out(self, error: BaseException) -> None:
        # The tasks run and need their memory: our daemon goes on fetching it for a limited time.
        if self._worker is not None and self._plan is not None and self._plan.is_ours:
            self._worker.terminate()
        with trio.CancelScope(shield=True):
            try:
                await self.wait()
            except CriupyError as failure:
                error.add_note(str(failure))
