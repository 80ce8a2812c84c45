"""The source's side of a container's migration, blocking."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from criupy._descriptor import Descriptor
from criupy.errors import CriupyError, LocalProtocolError, RuncError
from criupy.rpc import SourceOutcome
from criupy.rpc._daemon_linux import status_pipe
from criupy.rpc._operation_linux import insist, wait_for
from criupy.rpc._worker_linux import HeldInterrupt
from criupy.runc._plans_linux import CheckpointPlan, has_zero
from criupy.runc._program_linux import Command

if TYPE_CHECKING:
    from criupy.runc._runc_linux import Runc

__all__ = ["ContainerCheckpoint"]


class ContainerCheckpoint:
    """A frozen container whose memory is served; made by ``Runc.lazy_checkpoint``.

    ``address`` and ``port`` are where CRIU listens, ``image_path`` holds all
    that is not lazy. ``outcome`` tells at the end what became of the container.
    """

    def __init__(self, runc: Runc, plan: CheckpointPlan, timeout: float | None) -> None:
        self._runc = runc
        self._plan = plan
        self._timeout = runc._program.timeout(timeout)
        self._command: Command | None = None
        self._entered = False
        self._is_half_aborted = False
        self.image_path: Path = plan.image_path
        self.outcome: SourceOutcome | None = None
        self.address: str = ""
        self.port: int = 0

    def __enter__(self) -> Self:
        if self._entered:
            raise LocalProtocolError("lazy_checkpoint: the block can be entered once")
        self._entered = True
        deadline = time.monotonic() + self._timeout
        plan = self._plan
        try:
            self._runc._need("lazy_pages", "checkpoint", plan.container, self._timeout)
            left = max(deadline - time.monotonic(), 0.0)
            plan.watch(self._runc.state(plan.container, request_timeout=left))
            self._start(deadline)
        except BaseException:
            plan.close()
            raise
        return self

    def _start(self, deadline: float) -> None:
        with status_pipe() as (reading, writing):
            try:
                with HeldInterrupt():  # whose end may raise it, so what was started has to be ours by then
                    self._command = self._plan.start(self._runc._program, writing.fileno())
                writing.close()
                self._get_ready(self._command, reading, deadline)
            except BaseException as error:
                if self._command is not None:
                    self._give_up(self._command, error)
                raise

    def _get_ready(self, command: Command, reading: Descriptor, deadline: float) -> None:
        # CRIU inherits the pipe, so the end of runC has to be looked for as well.
        if not wait_for(deadline, reading.fileno(), command.worker.pidfd):
            raise command.overdue()
        if not has_zero(reading.fileno()):
            while command.worker.poll() is None:
                if not wait_for(deadline, command.worker.pidfd):
                    raise command.overdue()
            raise command.failure()
        self.address, self.port = self._plan.locate(command)

    def _give_up(self, command: Command, error: BaseException) -> None:
        """End a checkpoint that is not ready, so that the container goes on."""
        try:
            self._plan.tell(error, insist(self.abort))
        except CriupyError as failure:
            error.add_note(str(failure))
        finally:
            command.close()

    @property
    def _running(self) -> Command:
        if self._command is None:
            raise LocalProtocolError("lazy_checkpoint: enter the block first")
        return self._command

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
            else:
                self._see_out(error)
        except RuncError:
            raise
        except BaseException as interrupted:
            self._see_out(interrupted)
            raise
        finally:
            self._running.close()
            self._plan.close()

    def _see_out(self, error: BaseException) -> None:
        """End it after an error: by force, unless a destination may run already, which alone can say how.

        For that it waits, as long as that destination stays connected.
        """
        if self.outcome is not None and not self._is_half_aborted:
            return
        try:
            if self._is_half_aborted or self._plan.is_unreached():
                self.abort()
            else:
                self.wait()
        except CriupyError as failure:
            error.add_note(str(failure))

    def wait(self) -> SourceOutcome:
        """Wait until the destination has all pages and runC has removed the container here.

        Raise RuncError when it has not: ``outcome`` tells whether the container goes on here.
        """
        command = self._running
        if self.outcome is None:
            self._wait_ended(command)
            if command.worker.poll() == 0:
                self.outcome = self._plan.outcome(succeeded=True)
            else:
                failure = command.failure()
                self.outcome = self._plan.failed(failure)
                raise failure
        return self.outcome

    def _wait_ended(self, command: Command) -> None:
        while command.worker.poll() is None:
            wait_for(math.inf, command.worker.pidfd)
        # A runC that was killed leaves CRIU behind, which still serves and then decides.
        if (command.worker.poll() or 0) < 0:
            self._plan.find_criu(command)
        if self._plan.criu is not None:
            wait_for(math.inf, self._plan.criu.fileno())

    def _let_go_on(self) -> None:
        try:
            self._runc._set_paused(self._plan.container, paused=self._plan.was_paused)
        finally:
            self._plan.unlock_network()

    def abort(self) -> SourceOutcome:
        """End it now, so that the container goes on here and its network, too; also after it has failed.

        Only for when no destination runs it: after a destination has connected,
        nobody here can know that.
        """
        command = self._running
        self._is_half_aborted = True
        if self.outcome is None:
            self._runc._end_checkpoint(partial(self._plan.kill, command))
            self._wait_ended(command)
        succeeded = command.worker.poll() == 0
        try:
            if not succeeded and not self._plan.is_closed and not self._plan.is_held:
                self._let_go_on()
        except CriupyError:
            self._end_abort(succeeded=succeeded)
            raise
        return self._end_abort(succeeded=succeeded)

    def _end_abort(self, *, succeeded: bool) -> SourceOutcome:
        self._is_half_aborted = False
        self.outcome = self.outcome or self._plan.outcome(succeeded=succeeded)
        return self.outcome
