"""The two sides of a lazy migration, on trio."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import trio

from criupy.errors import CriuError, CriupyError, LocalProtocolError, RemoteProtocolError
from criupy.rpc._async_daemon_linux import AsyncDaemon
from criupy.rpc._async_operation_linux import AsyncOperation, AsyncProcess
from criupy.rpc._calls_linux import Call
from criupy.rpc._daemon_linux import DaemonPlan
from criupy.rpc._lazy_linux import LazyDumpPlan, check_listening
from criupy.rpc._notify import AsyncHooks, Script
from criupy.rpc._results import SourceOutcome

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
        self._is_aborted = False
        self._is_half_aborted = False
        self._aborting = trio.Lock()
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
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._plan.tell_lock, error)
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
            try:
                with trio.CancelScope(shield=True):
                    async with self._aborting:
                        pass  # another task's abort still needs what is closed
            finally:
                self._plan.close()

    async def _see_out(self, error: BaseException) -> None:
        """End it after an error: by force, unless a destination may run already, which alone can say how."""
        with trio.CancelScope(shield=True):
            if self.outcome is not None and not self._is_half_aborted:
                return
            try:
                if self._is_half_aborted or await trio.to_thread.run_sync(
                    self._plan.is_unreached, self._running._peer_pid, self.address, self.port
                ):
                    await self.abort()
                else:
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
            with trio.CancelScope(shield=True):
                # Who aborts it unlocks the network.
                tell = partial(self._plan.failed, error, tell_lock=not self._is_aborted)
                self.outcome = await trio.to_thread.run_sync(tell)
            raise
        self.outcome = self._plan.outcome(succeeded=True)
        return self.outcome

    async def abort(self) -> SourceOutcome:
        """End it now, so that the tree goes on here, and its network; also after it has failed.

        Only for when no destination runs it: after a destination has connected,
        nobody here can know that. A task in ``wait`` sees CRIU die.
        """
        with trio.CancelScope(shield=True):  # what begins is finished, within the grace
            async with self._aborting:
                self._is_aborted = self._is_half_aborted = True
                try:
                    outcome = await self._abort()
                except CriuError:
                    self._is_half_aborted = False
                    raise
                self._is_half_aborted = False
        return outcome

    async def _abort(self) -> SourceOutcome:
        stop = partial(self._plan.stop, self.address, self.port)
        seen = True
        if self.outcome is None and (left := self._waiter) is not None:
            await self._running._strike(stop)
            with trio.move_on_after(self._running._grace):
                await left.wait()
            seen = left.is_set()
        outcome = self.outcome
        if outcome is None:
            if seen:  # nobody waits, or whoever did was interrupted
                seen = await self._running._kill(stop)
            self.outcome = outcome = self._plan.aborted(seen=seen, succeeded=self._running._succeeded)
        if outcome is not SourceOutcome.KILLED and not self._plan.is_closed:
            await trio.to_thread.run_sync(self._plan.unlock_network)
        return outcome


class AsyncLazyRestore:
    """A restored tree whose memory follows; made by ``AsyncCriu.lazy_restore``.

    ``pid`` is its first process as the host sees it, ``command`` what CRIU
    became with ``exec_cmd``.
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
        self._daemon = None if plan is None else AsyncDaemon(plan)
        self._timeout = timeout
        self._entered = False
        self.pid: int = 0
        self.command: AsyncProcess | None = None

    @property
    def daemon(self) -> AsyncProcess | None:
        """The lazy-pages daemon, if it was started here."""
        return None if self._daemon is None else self._daemon.process

    async def __aenter__(self) -> Self:
        if self._entered:
            raise LocalProtocolError("lazy_restore: the block can be entered once")
        self._entered = True
        operation = self._client._operation(self._call, self._timeout)
        deadline = trio.current_time() + operation._timeout
        try:
            if self._daemon is None:
                check_listening(self._call.work_dir or Path())
            else:
                await self._daemon.start(deadline)
            operation._set_deadline(deadline)
            async with operation:
                await operation._serve(self._hooks)
            self.command = None if operation._worker is None else AsyncProcess(operation._worker)
            self.pid = operation.result
        except BaseException as error:
            self._call.close()
            if self._daemon is not None:
                await self._daemon.stop(error, self._client._transport.grace)
            raise
        return self

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
