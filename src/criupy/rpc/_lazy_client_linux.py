"""The two sides of a lazy migration, blocking."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from criupy.errors import CriuError, CriupyError, LocalProtocolError, RemoteProtocolError
from criupy.rpc._calls_linux import Call
from criupy.rpc._daemon_linux import Daemon, DaemonPlan
from criupy.rpc._lazy_linux import LazyDumpPlan, check_listening
from criupy.rpc._notify import Hooks, Script
from criupy.rpc._operation_linux import Operation, Process
from criupy.rpc._results import SourceOutcome

if TYPE_CHECKING:
    from criupy.rpc._client_linux import Criu

__all__ = ["LazyDump", "LazyRestore"]


class LazyDump:
    """A frozen tree whose memory is served; made by ``Criu.lazy_dump``.

    ``address`` and ``port`` are where it listens, ``frame_size`` is what its
    page-server frames take in bytes, ``images_dir`` holds all that is not
    lazy. ``outcome`` tells at the end what became of the tree.
    """

    def __init__(self, client: Criu, plan: LazyDumpPlan, hooks: Hooks | None, timeout: float | None) -> None:
        self._client = client
        self._plan = plan
        self._hooks = hooks
        self._timeout = timeout
        self._operation: Operation[None] | None = None
        self._is_half_aborted = False
        self.outcome: SourceOutcome | None = None
        self.address: str = ""
        self.port: int = 0
        self.frame_size: Literal[24, 32] = 32
        self.images_dir: Path = Path()

    def __enter__(self) -> Self:
        if self._operation is not None:
            raise LocalProtocolError("lazy_dump: the block can be entered once")
        call = self._plan.open()
        self.images_dir = call.images_dir or self.images_dir
        try:
            self._operation = operation = self._client._operation(call, self._timeout)
            operation._set_deadline(time.monotonic() + operation._timeout)
            version = self._client.version(request_timeout=operation._timeout)
            self.frame_size = self._plan.check_version(version)
            try:
                operation.__enter__()
                self._get_ready(operation)
            except BaseException as error:
                operation.__exit__(type(error), error, error.__traceback__)
                self._plan.tell_lock(error)
                raise
        except BaseException:
            call.close()
            self._plan.close()
            raise
        return self

    def _get_ready(self, operation: Operation[None]) -> None:
        for notification in operation:
            if notification.script == Script.STATUS_READY:
                self.address, self.port = self._plan.locate(operation._peer_pid)
            operation._ask(self._hooks, notification)
            if notification.script == Script.STATUS_READY:
                operation._answer()
                operation._set_deadline(math.inf)
                return
        raise CriuError("lazy_dump", "CRIU ended the dump without serving pages")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
            else:
                self._see_out(error)
        except (CriuError, RemoteProtocolError):
            raise
        except BaseException as interrupted:
            self._see_out(interrupted)
            raise
        finally:
            self._plan.close()

    def _see_out(self, error: BaseException) -> None:
        """End it after an error: by force, unless a destination may run already, which alone can say how."""
        if self.outcome is not None and not self._is_half_aborted:
            return
        try:
            if self._is_half_aborted or self._plan.is_unreached(
                self._running._peer_pid, self.address, self.port
            ):
                self.abort()
            else:
                self.wait()
        except CriupyError as failure:
            error.add_note(str(failure))

    @property
    def _running(self) -> Operation[None]:
        if self._operation is None:
            raise LocalProtocolError("lazy_dump: enter the block first")
        return self._operation

    def wait(self) -> SourceOutcome:
        """Wait until the destination has all pages and the tree is killed here.

        Raise CriuError when it was not: ``outcome`` tells whether the tree goes on here.
        """
        operation = self._running
        if self.outcome is not None:
            return self.outcome
        try:
            for _ in operation:
                pass
            operation.__exit__(None, None, None)
        except (CriuError, RemoteProtocolError) as error:
            operation.__exit__(type(error), error, error.__traceback__)
            self.outcome = self._plan.failed(error)
            raise
        self.outcome = self._plan.outcome(succeeded=True)
        return self.outcome

    def abort(self) -> SourceOutcome:
        """End it now, so that the tree goes on here, and its network; also after it has failed.

        Only for when no destination runs it: after a destination has connected,
        nobody here can know that.
        """
        self._is_half_aborted = True
        try:
            outcome = self._abort()
        except CriuError:
            self._is_half_aborted = False
            raise
        self._is_half_aborted = False
        return outcome

    def _abort(self) -> SourceOutcome:
        if self.outcome is None:
            seen = self._running._kill(partial(self._plan.stop, self.address, self.port))
            self.outcome = self._plan.aborted(seen=seen, succeeded=self._running._succeeded)
        if self.outcome is not SourceOutcome.KILLED and not self._plan.is_closed:
            self._plan.unlock_network()
        return self.outcome


class LazyRestore:
    """A restored tree whose memory follows; made by ``Criu.lazy_restore``.

    ``pid`` is its first process as the host sees it, ``command`` what CRIU
    became with ``exec_cmd``.
    """

    def __init__(
        self,
        client: Criu,
        call: Call[int],
        hooks: Hooks | None,
        plan: DaemonPlan | None,
        timeout: float | None,
    ) -> None:
        self._client = client
        self._call = call
        self._hooks = hooks
        self._daemon = None if plan is None else Daemon(plan)
        self._timeout = timeout
        self._entered = False
        self.pid: int = 0
        self.command: Process | None = None

    @property
    def daemon(self) -> Process | None:
        """The lazy-pages daemon, if it was started here."""
        return None if self._daemon is None else self._daemon.process

    def __enter__(self) -> Self:
        if self._entered:
            raise LocalProtocolError("lazy_restore: the block can be entered once")
        self._entered = True
        operation = self._client._operation(self._call, self._timeout)
        deadline = time.monotonic() + operation._timeout
        try:
            if self._daemon is None:
                check_listening(self._call.work_dir or Path())
            else:
                self._daemon.start(deadline)
            operation._set_deadline(deadline)
            with operation:
                operation._serve(self._hooks)
            self.command = None if operation._worker is None else Process(operation._worker)
            self.pid = operation.result
        except BaseException as error:
            self._call.close()
            if self._daemon is not None:
                self._daemon.stop(error, self._client._transport.grace)
            raise
        return self

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
