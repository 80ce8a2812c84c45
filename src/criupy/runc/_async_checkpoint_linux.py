"""The source's side of a container's migration, on trio."""

from __future__ import annotations

import os
import select
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import trio

from criupy._descriptor import Descriptor
from criupy.errors import CriupyError, LocalProtocolError, RuncError
from criupy.rpc import SourceOutcome
from criupy.rpc._async_operation_linux import insist, wait_ended
from criupy.rpc._daemon_linux import status_pipe
from criupy.runc._plans_linux import CheckpointPlan, has_zero
from criupy.runc._program_linux import Command

if TYPE_CHECKING:
    from criupy.runc._async_runc_linux import AsyncRunc

__all__ = ["AsyncContainerCheckpoint"]


class AsyncContainerCheckpoint:
    """A frozen container whose memory is served; made by ``AsyncRunc.lazy_checkpoint``.

    ``address`` and ``port`` are where CRIU listens, ``image_path`` holds all
    that is not lazy. ``outcome`` tells at the end what became of the container.
    """

    def __init__(self, runc: AsyncRunc, plan: CheckpointPlan, timeout: float | None) -> None:
        self._runc = runc
        self._plan = plan
        self._timeout = runc._program.timeout(timeout)
        self._command: Command | None = None
        self._entered = False
        self._is_aborted = False
        self._is_half_aborted = False
        self._aborting = trio.Lock()
        self.image_path: Path = plan.image_path
        self.outcome: SourceOutcome | None = None
        self.address: str = ""
        self.port: int = 0

    async def __aenter__(self) -> Self:
        if self._entered:
            raise LocalProtocolError("lazy_checkpoint: the block can be entered once")
        self._entered = True
        deadline = trio.current_time() + self._timeout
        plan = self._plan
        try:
            await self._runc._need("lazy_pages", "checkpoint", plan.container, self._timeout)
            left = max(deadline - trio.current_time(), 0.0)
            plan.watch(await self._runc.state(plan.container, request_timeout=left))
            await self._start(deadline)
        except BaseException:
            plan.close()
            raise
        return self

    @trio.lowlevel.enable_ki_protection
    async def _start(self, deadline: float) -> None:
        with status_pipe() as (reading, writing):
            self._command = command = self._plan.start(self._runc._program, writing.fileno())
            writing.close()
            try:
                await self._get_ready(command, reading, deadline)
            except BaseException as error:
                await self._give_up(command, error)
                raise

    async def _get_ready(self, command: Command, reading: Descriptor, deadline: float) -> None:
        with trio.move_on_at(deadline) as scope:
            # CRIU inherits the pipe, so the end of runC has to be looked for as well.
            with select.epoll() as either:
                either.register(reading.fileno(), select.EPOLLIN)
                either.register(command.worker.pidfd, select.EPOLLIN)
                await trio.lowlevel.wait_readable(either.fileno())
            is_ready = has_zero(reading.fileno())
            if not is_ready:
                await wait_ended(command.worker)
        if scope.cancelled_caught:
            raise command.overdue()
        if not is_ready:
            raise command.failure()
        self.address, self.port = self._plan.locate(command)

    async def _give_up(self, command: Command, error: BaseException) -> None:
        """End a checkpoint that is not ready, so that the container goes on."""
        try:
            self._plan.tell(error, await insist(self.abort))
        except CriupyError as failure:
            error.add_note(str(failure))
        finally:
            command.close()

    @property
    def _running(self) -> Command:
        if self._command is None:
            raise LocalProtocolError("lazy_checkpoint: enter the block first")
        return self._command

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self.wait()
            else:
                await self._see_out(error)
        except RuncError:
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
                self._running.close()
                self._plan.close()

    async def _see_out(self, error: BaseException) -> None:
        """End it after an error: by force, unless a destination may run already, which alone can say how.

        For that it waits, as long as that destination stays connected.
        """
        if self.outcome is not None and not self._is_half_aborted:
            return
        with trio.CancelScope(shield=True):
            try:
                if self._is_half_aborted or self._plan.is_unreached():
                    await self.abort()
                else:
                    await self.wait()
            except CriupyError as failure:
                error.add_note(str(failure))

    async def wait(self) -> SourceOutcome:
        """Wait until the destination has all pages and runC has removed the container here.

        Raise RuncError when it has not: ``outcome`` tells whether the container goes on here.
        """
        command = self._running
        if self.outcome is None:
            await self._wait_ended(command)
        if self.outcome is None:
            if command.worker.poll() == 0:
                self.outcome = self._plan.outcome(succeeded=True)
            else:
                failure = command.failure()
                # Who aborts it unlocks the network.
                tell = partial(self._plan.failed, failure, tell_lock=not self._is_aborted)
                self.outcome = await trio.to_thread.run_sync(tell)
                raise failure
        return self.outcome

    async def _wait_ended(self, command: Command) -> None:
        await wait_ended(command.worker)
        # A runC that was killed leaves CRIU behind, which still serves and then decides.
        if (command.worker.poll() or 0) < 0:
            self._plan.find_criu(command)
        if self._plan.criu is not None:
            with Descriptor(os.dup(self._plan.criu.fileno())) as pidfd:
                await trio.lowlevel.wait_readable(pidfd.fileno())

    async def abort(self) -> SourceOutcome:
        """End it now, so that the container goes on here and its network, too; also after it has failed.

        Only for when no destination runs it: after a destination has connected,
        nobody here can know that.
        """
        command = self._running
        with trio.CancelScope(shield=True):
            async with self._aborting:
                self._is_aborted = self._is_half_aborted = True
                if self.outcome is None:
                    await self._runc._end_checkpoint(partial(self._plan.kill, command))
                    await self._wait_ended(command)
                succeeded = command.worker.poll() == 0
                try:
                    if not succeeded and not self._plan.is_closed and not self._plan.is_held:
                        await self._let_go_on()
                except CriupyError:
                    self._end_abort(succeeded=succeeded)
                    raise
                outcome = self._end_abort(succeeded=succeeded)
        return outcome

    def _end_abort(self, *, succeeded: bool) -> SourceOutcome:
        self._is_half_aborted = False
        self.outcome = self.outcome or self._plan.outcome(succeeded=succeeded)
        return self.outcome

    async def _let_go_on(self) -> None:
        try:
            await self._runc._set_paused(self._plan.container, paused=self._plan.was_paused)
        finally:
            await trio.to_thread.run_sync(self._plan.unlock_network)
