"""The two sides of a lazy migration, blocking."""

from __future__ import annotations

import math
import os
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from criupy._descriptor import Descriptor
from criupy.errors import CriuError, CriupyError, CriuTimeout, LocalProtocolError, RemoteProtocolError
from criupy.rpc._calls_linux import Call
from criupy.rpc._lazy_linux import (
    DaemonPlan,
    LazyDumpPlan,
    check_listening,
    daemon_failure,
    goes_on,
    status_pipe,
)
from criupy.rpc._notify import Hooks, Script
from criupy.rpc._operation_linux import Operation, Process, end_worker, wait_for
from criupy.rpc._results import SourceOutcome
from criupy.rpc._worker_linux import HeldInterrupt, Worker

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
        if self.outcome is not None:
            return
        if self._plan.is_unreached(self._running._peer_pid, self.address, self.port):
            self.abort()
            return
        try:
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
        """End it now, so that the tree goes on here.

        Only for when no destination runs it: after a destination has connected,
        nobody here can know that.
        """
        if self.outcome is None:
            seen = self._running._kill(partial(self._plan.stop, self.address, self.port))
            self.outcome = self._plan.aborted(seen=seen, succeeded=self._running._succeeded)
        return self.outcome


class LazyRestore:
    """A restored tree whose memory follows; made by ``Criu.lazy_restore``.

    ``pid`` is its first process as the host sees it, ``command`` what CRIU
    became with ``exec_cmd``, ``daemon`` the lazy-pages daemon if it was started here.
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
        self._plan = plan
        self._work_dir = call.work_dir or Path()
        self._timeout = timeout
        self._worker: Worker | None = None
        self._entered = False
        self.pid: int = 0
        self.command: Process | None = None
        self.daemon: Process | None = None

    def __enter__(self) -> Self:
        if self._entered:
            raise LocalProtocolError("lazy_restore: the block can be entered once")
        self._entered = True
        operation = self._client._operation(self._call, self._timeout)
        deadline = time.monotonic() + operation._timeout
        try:
            if self._plan is None:
                check_listening(self._work_dir)
            else:
                self._start(self._plan, deadline)
            operation._set_deadline(deadline)
            with operation:
                operation._serve(self._hooks)
            self.command = None if operation._worker is None else Process(operation._worker)
            self.pid = operation.result
        except BaseException as error:
            self._call.close()
            self._stop(error)
            raise
        return self

    def _start(self, plan: DaemonPlan, deadline: float) -> None:
        with status_pipe() as (reading, writing):
            words = plan.words(self._call.images_dir or self._work_dir, self._work_dir, writing.fileno())
            with HeldInterrupt():
                self._worker = Worker.start(
                    words,
                    request="lazy_restore",
                    pass_fds=(writing.fileno(),),
                    capture=self._client._transport.capture_output,
                )
            self.daemon = Process(self._worker)
            writing.close()
            self._await_ready(self._worker, reading, deadline)

    def _await_ready(self, worker: Worker, reading: Descriptor, deadline: float) -> None:
        if not wait_for(deadline, reading.fileno()):
            raise CriuTimeout("lazy_restore", "the lazy-pages daemon did not become ready in time")
        if os.read(reading.fileno(), 1) == b"\0":
            return
        # It has closed the pipe, so it has ended or is about to.
        wait_for(min(deadline, time.monotonic() + 1), worker.pidfd)
        raise daemon_failure(self._work_dir, worker.output(), worker.poll(), ready=False)

    def _stop(self, error: BaseException) -> None:
        """End the daemon of a restore that failed; it ends by itself if criu had connected."""
        worker = self._worker
        if worker is None:
            return
        if worker.poll() is None and not wait_for(time.monotonic() + 1, worker.pidfd):
            worker.terminate()
        elif (status := worker.poll()) and isinstance(error, CriuError):
            error.hint = str(daemon_failure(self._work_dir, worker.output(), status, ready=True))
        # Tasks may run nevertheless, so ours is never killed: it ends by its own rules.
        is_ours = self._plan is not None and self._plan.is_ours
        try:
            end_worker(worker, math.inf if is_ours else self._client._until_grace())
        except BaseException as interrupted:
            interrupted.add_note(goes_on(worker))
            raise
        self._worker = None

    def wait(self) -> None:
        """Wait for the last page; raise LazyPagesError if it did not come.

        Without a daemon of its own it returns at once.
        """
        if self._worker is not None:
            Process(self._worker).wait()
            worker, self._worker = self._worker, None
            status, output = worker.poll(), worker.output()
            worker.close()
            if status:
                raise daemon_failure(self._work_dir, output, status, ready=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self.wait()
            except BaseException as interrupted:
                self._see_out(interrupted)
                raise
        else:
            self._see_out(error)

    def _see_out(self, error: BaseException) -> None:
        # The tasks run and need their memory: our daemon goes on fetching it for a limited time.
        if self._worker is not None and self._plan is not None and self._plan.is_ours:
            self._worker.terminate()
        try:
            self.wait()
        except CriupyError as failure:
            error.add_note(str(failure))
