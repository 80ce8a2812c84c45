"""A lazy-pages daemon that is started for a restore: how, and until when; here blocking."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from criupy._descriptor import Descriptor
from criupy.errors import (
    CriuError,
    CriupyError,
    CriuUnavailable,
    LazyPagesError,
    OptionError,
    RuncError,
)
from criupy.rpc._operation_linux import Process, end_worker, wait_for
from criupy.rpc._report import LogWatch, errors_in
from criupy.rpc._worker_linux import HeldInterrupt, Worker, ending

__all__ = [
    "OUR_DAEMON",
    "SOCKET_NAME",
    "Daemon",
    "DaemonPlan",
    "check_page_server",
    "explain",
    "goes_on",
    "plan_daemon",
    "status_pipe",
]

#: The command of criupy's own lazy-pages daemon, with this interpreter.
OUR_DAEMON: Final = (sys.executable, "-m", "criupy.lazy_pages")

#: The same, as it is installed.
OUR_PROGRAM: Final = "criupy-lazy-pages"

SOCKET_NAME: Final = "lazy-pages.socket"
DAEMON_LOG: Final = "lazy-pages.log"


@dataclass(frozen=True, slots=True)
class DaemonPlan:
    """How to start a lazy-pages daemon.

    That is its command, where the images are and where it works, where the
    pages come from (None is the images), and what it is told of TLS.
    ``overdue`` makes the error of the request that it is started for, when that takes too long;
    ``capture`` tells whether to keep what it prints.
    """

    overdue: Callable[[str], CriupyError]
    command: tuple[str, ...]
    images_dir: Path
    work_dir: Path
    page_server: tuple[str, int] | None
    tls: tuple[str, ...]
    capture: bool

    @property
    def is_ours(self) -> bool:
        """Whether SIGTERM makes it end in good order; it may have options of its own."""
        return self.command[: len(OUR_DAEMON)] == OUR_DAEMON or Path(self.command[0]).name == OUR_PROGRAM

    def words(self, status_fd: int) -> list[str]:
        """Return the command line, as ``criu lazy-pages`` takes it."""
        words = [*self.command, "--no-default-config", "-D", str(self.images_dir), "-W", str(self.work_dir)]
        words += ["-o", DAEMON_LOG, "--status-fd", str(status_fd)]
        if self.page_server is not None:
            host, port = self.page_server
            words += ["--page-server", "--address", host, "--port", str(port), *self.tls]
        if self.is_ours:
            words += ["--progress", "none"]
        return words

    def watch(self) -> LogWatch:
        """Watch the log that it will write."""
        return LogWatch.of(self.work_dir, DAEMON_LOG)

    def start(self, status_fd: int) -> Worker:
        """Start it."""
        try:
            return Worker.start(
                self.words(status_fd), request="lazy_restore", pass_fds=(status_fd,), capture=self.capture
            )
        except CriuUnavailable as error:
            raise LazyPagesError(f"the lazy-pages daemon cannot be started: {error.message}") from error

    def failure(
        self, log: LogWatch, output: str, status: int | None, *, ready: bool, served: bool = False
    ) -> LazyPagesError:
        """Make the error for one that ended otherwise than it should; ``served`` when tasks need it."""
        text = log.text()
        said = errors_in(text) or tuple(line for line in text.splitlines() if "Error" in line)
        lines = [*said, *output.splitlines()]
        ended = "still runs" if status is None else ending(status)
        what = "the lazy-pages daemon" if ready else "the lazy-pages daemon did not become ready: it"
        message = f"{what} {ended}: {lines[-1] if lines else 'it said nothing'}"
        if served and status is not None and (status < 0 or not self.is_ours):
            # The kernel lets what was registered with it go on without.
            message += " - what was restored may read zeros where its memory had not come: kill it"
        return LazyPagesError(message)

    def not_ready(self) -> CriupyError:
        """Make the error for one that took too long to listen."""
        return self.overdue("the lazy-pages daemon did not become ready in time")


def check_page_server(option: str, value: object) -> None:
    """Refuse what is no (host, port)."""
    if not (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and 0 < value[1] < 1 << 16
    ):
        raise OptionError(option, f"expected (host, port), the port from 1 to 65535; got {value!r}")


def plan_daemon(
    overdue: Callable[[str], CriupyError],
    daemon: object,
    images_dir: Path,
    work_dir: Path,
    page_server: tuple[str, int] | None,
    *,
    tls: tuple[str, ...] = (),
    capture: bool,
) -> DaemonPlan | None:
    """Plan the daemon of a restore; None where there is to be none."""
    if page_server is not None:
        check_page_server("page_server", page_server)
        if daemon is None:
            raise OptionError("page_server", "expected None: it is for the daemon that is started here")
    if daemon is None:
        return None
    if isinstance(daemon, str) or not isinstance(daemon, (tuple, list)) or not daemon:
        raise OptionError("daemon", f"expected the words of a command, got {daemon!r}")
    command = tuple(map(os.fspath, daemon))
    return DaemonPlan(overdue, command, images_dir, work_dir, page_server, tls, capture)


def explain(error: BaseException, failure: LazyPagesError) -> None:
    """Say in the error of a restore what the daemon had come to grief of; first, if CRIU only missed it."""
    if isinstance(error, (CriuError, RuncError)):
        if error.message.startswith("uffd: "):  # its part that talks to the daemon (criu/uffd.c)
            error.add_note(f"CRIU said: {error.message}")
            error.message, error.hint = str(failure), None
        else:
            error.hint = str(failure)


def goes_on(worker: Worker) -> str:
    """Say that a daemon is left behind; what it serves may depend on it."""
    if (status := worker.poll()) is not None:
        return f"the lazy-pages daemon {ending(status)}"
    return f"the lazy-pages daemon goes on as process {worker.pid}"


@contextlib.contextmanager
def status_pipe() -> Iterator[tuple[Descriptor, Descriptor]]:
    """Make the pipe in which a program tells that it is ready; both ends are closed in the end."""
    reading, writing = map(Descriptor, os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
    with reading, writing:
        os.set_blocking(writing.fileno(), True)
        yield reading, writing


class Daemon:
    """A lazy-pages daemon from its start to its end."""

    def __init__(self, plan: DaemonPlan) -> None:
        self._plan = plan
        self._log = plan.watch()
        self._worker: Worker | None = None
        self.process: Process | None = None

    def start(self, deadline: float) -> None:
        """Start it and wait until it listens; raise LazyPagesError, or CriuTimeout."""
        with status_pipe() as (reading, writing):
            with HeldInterrupt():  # whose end may raise it, so what was started has to be ours by then
                self._worker = worker = self._plan.start(writing.fileno())
            self.process = Process(worker)
            writing.close()
            if not wait_for(deadline, reading.fileno()):
                raise self._plan.not_ready()
            if os.read(reading.fileno(), 1) == b"\0":
                return
            # It has closed the pipe, so it has ended or is about to.
            wait_for(min(deadline, time.monotonic() + 1), worker.pidfd)
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

    def stop(self, error: BaseException, grace: float) -> None:
        """End the daemon of a restore that failed; it ends by itself if criu had connected."""
        worker = self._worker
        if worker is None:
            return
        if worker.poll() is None and not wait_for(time.monotonic() + 1, worker.pidfd):
            worker.terminate()
        elif status := worker.poll():
            explain(error, self._plan.failure(self._log, worker.output(), status, ready=True))
        # Tasks may run nevertheless, so ours is never killed: it ends by its own rules.
        try:
            end_worker(worker, math.inf if self._plan.is_ours else time.monotonic() + grace)
        except BaseException as interrupted:
            interrupted.add_note(goes_on(worker))
            raise
        self._worker = None

    def wait(self) -> None:
        """Wait for the last page; raise LazyPagesError if it did not come."""
        if self._worker is not None:
            Process(self._worker).wait()
            worker, self._worker = self._worker, None
            status, output = worker.poll(), worker.output()
            worker.close()
            if status:
                raise self._plan.failure(self._log, output, status, ready=True, served=True)

    def see_out(self, error: BaseException) -> None:
        """Wait for its end after an error elsewhere."""
        # The tasks run and need their memory: our daemon goes on fetching it for a limited time.
        if self._worker is not None and self._plan.is_ours:
            self._worker.terminate()
        try:
            self.wait()
        except CriupyError as failure:
            error.add_note(str(failure))

    def leave(self, error: BaseException | None) -> None:
        """Wait for the last page at the end of a block, which may have ended in an error."""
        if error is not None:
            self.see_out(error)
            return
        try:
            self.wait()
        except BaseException as interrupted:
            self.see_out(interrupted)
            raise
