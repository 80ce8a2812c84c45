"""The program ``runc``: how it is started, what it said, and what of CRIU's log belongs to it."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from criupy._descriptor import Descriptor
from criupy.errors import CriuUnavailable, OptionError, RuncError, RuncTimeout
from criupy.rpc._report import MAX_LINES, LogWatch, best_of, hint_for
from criupy.rpc._transport import check_seconds
from criupy.rpc._worker_linux import HeldInterrupt, Worker, ending
from criupy.runc._words import (
    CheckpointOptions,
    ContainerState,
    RestoreOptions,
    check_container,
    errors_of,
    parse_state,
)

__all__ = ["Command", "Program", "asking_criu", "lacks", "make_program", "no_such_container"]

#: runC looks for CRIU under this name only.
CRIU = "criu"


@dataclass(frozen=True, slots=True)
class Program:
    """How runC is started; ``criu`` is the CRIU that it is made to find, times are in seconds."""

    binary: str
    root: str | None
    systemd_cgroup: bool
    criu: str
    request_timeout: float | None
    grace: float

    def timeout(self, request_timeout: float | None) -> float:
        """Return how long a request may take."""
        given = check_seconds("request_timeout", request_timeout)
        seconds = self.request_timeout if given is None else given
        return math.inf if seconds is None else seconds

    def environment(self) -> Mapping[str, str] | None:
        """Return the environment in which runC finds this CRIU; None is ours."""
        directory = os.path.dirname(self.criu)  # noqa: PTH120 - of a name without one, nothing
        if not directory:
            return None
        path = os.environ.get("PATH", os.defpath)
        return {**os.environ, "PATH": f"{os.path.abspath(directory)}{os.pathsep}{path}"}  # noqa: PTH100

    def start(
        self,
        name: str,
        container: str,
        words: Sequence[str] = (),
        *,
        pass_fds: Sequence[int] = (),
        stdio: tuple[int, int, int] | None = None,
        criu_log: LogWatch | None = None,
    ) -> Command:
        """Start one of runC's commands; without ``stdio`` what it prints is kept."""
        check_container(container)
        if shutil.which(self.binary) is None:
            raise RuncError(
                name,
                container,
                f"there is no program {self.binary}{'' if '/' in self.binary else ' on PATH'}",
                hint="install runC, or name it with binary=",
            )
        log = Descriptor(os.memfd_create("criupy-runc-log"))
        try:
            all_words = [self.binary, "--log", f"/proc/self/fd/{log.fileno()}", "--log-format", "json"]
            if self.root is not None:
                all_words += ["--root", self.root]
            if self.systemd_cgroup:
                all_words.append("--systemd-cgroup")
            worker = Worker.start(
                [*all_words, name, *words, container],
                request=f"runc {name}",
                pass_fds=(log.fileno(), *pass_fds),
                capture=stdio is None,
                stdio=stdio,
                env=self.environment(),
            )
        except BaseException:
            log.close()
            raise
        return Command(name, container, worker, log, criu_log)

    @contextlib.contextmanager
    def running(
        self,
        name: str,
        container: str,
        words: Sequence[str] = (),
        *,
        criu_log: LogWatch | None = None,
    ) -> Iterator[Command]:
        """Start one of runC's commands for a block; it does not outlive it."""
        command = None
        try:
            with HeldInterrupt():  # whose end may raise it, so what was started has to be ours by then
                command = self.start(name, container, words, criu_log=criu_log)
            yield command
        finally:
            if command is not None:
                if command.worker.poll() is None:
                    command.worker.abandon()
                command.close()


class Command:
    """One of runC's commands under way."""

    def __init__(
        self, name: str, container: str, worker: Worker, log: Descriptor, criu_log: LogWatch | None
    ) -> None:
        self.name = name
        self.container = container
        self.worker = worker
        self._log = log
        self._criu_log = criu_log
        self._started = time.monotonic()

    def processes(self) -> list[tuple[int, int]]:
        """Return its (pid, pidfd), if it runs."""
        return [] if self.worker.poll() is not None else [(self.worker.pid, self.worker.pidfd)]

    def errors(self) -> tuple[str, ...]:
        """Return the errors that runC has logged so far."""
        size = os.fstat(self._log.fileno()).st_size
        return errors_of(os.pread(self._log.fileno(), size, 0).decode(errors="replace"))

    def close(self) -> None:
        """Let go of it, once it was reaped."""
        self.worker.close()
        self._log.close()

    def failure(self) -> RuncError:
        """Make the error for one that ended otherwise than with 0."""
        status = self.worker.poll()
        lines = self.errors()
        criu_lines = self._criu_log.errors() if self._criu_log is not None else ()
        # The last is what it ended with; what went before was tidying up.
        message = next(iter(lines[-1].splitlines()), "") if lines else ""
        message = message or f"{'has not ended' if status is None else ending(status)}, without a word"
        if lines and lines[-1].startswith("criu failed") and criu_lines:
            message = best_of(criu_lines) or message
        log = self._criu_log
        return RuncError(
            self.name,
            self.container,
            message,
            status=status,
            log_lines=lines,
            log_errors=criu_lines[-MAX_LINES:],
            log_file=log.name if log is not None and log.is_written else None,
            hint=self._hint("\n".join((*criu_lines, *lines)), message),
        )

    def _hint(self, said: str, message: str) -> str | None:
        if "executable file not found in $PATH" in said:
            return "install CRIU, or name it with criu="
        request = "restore" if self.name == "restore" else "dump"
        hint = hint_for(request, None, said, message)
        known = (CheckpointOptions if request == "dump" else RestoreOptions).__annotations__
        if hint is not None and any(option not in known for option in re.findall(r"(\w+)=", hint)):
            hint += "; where runC has no such option, CRIU's configuration has (annotation org.criu.config)"
        return hint

    def overdue(self) -> RuncTimeout:
        """Make the error for one that took too long."""
        seconds = time.monotonic() - self._started
        return RuncTimeout(
            self.name, self.container, f"not done after {seconds:.2f} s", log_lines=self.errors()
        )

    def stuck(self) -> RuncError:
        """Make the error for a CRIU that hangs, having lost its lazy-pages daemon."""
        return RuncError(
            self.name,
            self.container,
            "the lazy-pages daemon has ended, and CRIU did not",
            log_lines=self.errors(),
        )

    def state(self) -> ContainerState | None:
        """Return what a ``runc state`` that has ended told; None if there is no such container."""
        if self.worker.poll() == 0:
            try:
                return parse_state(self.worker.output())
            except ValueError as error:
                raise RuncError(self.name, self.container, str(error)) from error
        failure = self.failure()
        if "does not exist" in failure.message:
            return None
        raise failure


def make_program(
    binary: str | os.PathLike[str],
    root: str | os.PathLike[str] | None,
    criu: str | os.PathLike[str],
    *,
    systemd_cgroup: bool,
    request_timeout: float | None,
    grace: float,
) -> Program:
    """Check what a client was given."""
    for name, path in (("binary", binary), ("criu", criu), *((("root", root),) if root is not None else ())):
        given: object = path
        if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
            raise OptionError(name, f"expected a path, got {path!r}")
    if Path(criu).name != CRIU:
        raise OptionError(
            "criu", f"expected a program of the name {CRIU}, which runC looks for; got {criu!r}"
        )
    seconds = check_seconds("grace", grace)
    if seconds is None:
        raise OptionError("grace", "expected seconds, got None")
    return Program(
        os.fsdecode(binary),
        None if root is None else os.path.abspath(os.fsdecode(root)),  # noqa: PTH100 - links stay
        systemd_cgroup,
        os.fsdecode(criu),
        check_seconds("request_timeout", request_timeout),
        seconds,
    )


def no_such_container(command: str, container: str) -> RuncError:
    """Make the error for a container that is not there."""
    return RuncError(
        command, container, "there is no such container", hint="runc list shows those of one root"
    )


@contextlib.contextmanager
def asking_criu() -> Iterator[None]:
    """Ask CRIU itself: what is its ``binary`` there is ``criu`` here."""
    try:
        yield
    except CriuUnavailable as error:
        if error.hint is not None:
            error.hint = error.hint.replace("binary=", "criu=")
        raise


def lacks(command: str, container: str, feature: str) -> RuncError:
    """Make the error for a CRIU that cannot do what is asked on this kernel."""
    return RuncError(
        command, container, f"CRIU lacks {feature} on this kernel", hint="criupy check tells what is missing"
    )
