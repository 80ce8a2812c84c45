"""Starting, watching and ending the processes this package starts: ``criu swrk``, the lazy-pages daemon.

Python forks nowhere here: subprocess does it in C and closes every descriptor
that is not passed on. A pidfd tells of the end to whoever can poll.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from criupy._descriptor import Descriptor
from criupy._kill_linux import kill_trees
from criupy.errors import CriuUnavailable

__all__ = [
    "HeldInterrupt",
    "Orphan",
    "Worker",
    "ending",
    "find_program",
]

_MAX_OUTPUT = 64 * 1024


def find_program(name: str, request: str) -> str:
    """Return the path of a program, looked up as a shell does, or raise CriuUnavailable."""
    found = shutil.which(name)
    if found is not None:
        return found
    if "/" not in name:
        raise CriuUnavailable(
            request, f"there is no program {name} on PATH", hint="install CRIU, or name it with binary="
        )
    if not Path(name).exists():
        why = "there is no such program"
    elif Path(name).is_dir():
        why = "this is a directory"
    else:
        why = "it is not executable"
    raise CriuUnavailable(request, f"{name}: {why}", hint="name CRIU's program with binary=")


def _start(command: Sequence[str], request: str, **options: object) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, **options)  # type: ignore[call-overload, no-any-return]
    except OSError as error:
        raise CriuUnavailable(request, f"{command[0]}: {error.strerror}", errno=error.errno) from error


def ending(status: int) -> str:
    """Say how a process ended, by its exit status, negative for a signal."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time one
        return f"was killed by signal {-status}"


class HeldInterrupt:
    """A block at whose end Ctrl-C comes, if it came in it: what is started there has an owner by then.

    Of all signals Python makes an exception of this one only, and in the main thread only.
    """

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], object] | None = None
        self._held: list[FrameType | None] = []

    def __enter__(self) -> Self:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            try:
                signal.signal(signal.SIGINT, lambda _, frame: self._held.append(frame))
            except ValueError:  # of an interpreter that is not the main one
                return self
            except BaseException:  # by the program's handler of another signal
                signal.signal(signal.SIGINT, handler)
                raise
            self._handler = handler
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handler is not None:
            try:
                signal.signal(signal.SIGINT, self._handler)
            except BaseException:  # the same
                signal.signal(signal.SIGINT, self._handler)
                raise
            if self._held:
                self._handler(signal.SIGINT, self._held[0])


class Worker:
    """A child process."""

    def __init__(self, process: subprocess.Popen[bytes], output: Descriptor | None) -> None:
        self._process = process
        self._pidfd = Descriptor(os.pidfd_open(process.pid))
        self._output = output
        self._status: int | None = None
        self._said = ""

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        *,
        request: str,
        pass_fds: Sequence[int] = (),
        capture: bool,
        own_group: bool = True,
        stdio: tuple[int, int, int] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Worker:
        """Start a program; what it prints goes where ours goes, or with ``capture`` is kept in memory.

        ``stdio`` are descriptors for its standard input, output and error. In a process group of its own a
        terminal's Ctrl-C does not reach it: it is ours to pass on.
        """
        output = Descriptor(os.memfd_create("criupy-output")) if capture else None
        process = None
        try:
            number = None if output is None else output.fileno()
            streams = (None, number, number) if stdio is None else stdio
            process = _start(
                command,
                request,
                pass_fds=pass_fds,
                **dict(zip(("stdin", "stdout", "stderr"), streams, strict=True)),
                env=env,
                process_group=0 if own_group else None,
            )
            return cls(process, output)
        except BaseException:
            if process is not None:  # no descriptor was left for it
                process.kill()
                process.wait()
            if output is not None:
                output.close()
            raise

    @property
    def pid(self) -> int:
        """Its pid; ours to reap until it was."""
        return self._process.pid

    @property
    def pidfd(self) -> int:
        """Readable when it has ended."""
        return self._pidfd.fileno()

    def poll(self) -> int | None:
        """Reap it if it has ended; return its exit status, negative for a signal, or None."""
        # Not by subprocess alone: interrupted, its poll can leave a lock that nobody opens, or lose a status.
        if self._status is None:
            try:
                ended = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # reaped below, and then interrupted
                self._status = self._process.wait()
                return self._status
            if ended is None:
                return None
            self._process.wait()
            self._status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        return self._status

    def output(self) -> str:
        """Return what it printed so far, if that is captured; the last 64 KiB of it."""
        if self._output is None or self._output.fileno() < 0:
            return self._said
        size = os.fstat(self._output.fileno()).st_size
        data = os.pread(self._output.fileno(), _MAX_OUTPUT, max(0, size - _MAX_OUTPUT))
        return data.decode(errors="replace").strip()

    def terminate(self) -> None:
        """Send SIGTERM, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)

    def kill(self) -> None:
        """Kill it with all that it started, unless it has ended; it has to be reaped all the same."""
        with HeldInterrupt():  # which would leave what is stopped already so
            if self.poll() is None:
                kill_trees([(self.pid, self.pidfd)])

    def abandon(self) -> None:
        """Kill it and let go of it."""
        self.kill()
        if self._status is None:
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
        self.poll()
        self.close()

    def close(self) -> None:
        """Let go of a process that was reaped; what it printed is kept."""
        self._said = self.output()
        self._pidfd.close()
        if self._output is not None:
            self._output.close()


class Orphan:
    """A process that is nobody's child of ours: what a self-dump needs, since it dumps all our children.

    No descriptor is held, which would be dumped as well. ``pid`` and the
    start time of the process tell it from a later one with its pid.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._started = _start_time(pid)

    @classmethod
    def start(cls, command: Sequence[str], *, request: str, pass_fds: Sequence[int] = ()) -> Orphan:
        """Start a program whose parent has ended when this returns."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        with open(reading, "rb") as report:  # noqa: PTH123 - a descriptor, not a path
            try:
                shell = _start(
                    # The shell says the pid of what it leaves behind; standard input stays ours.
                    ["/bin/sh", "-c", f'"$@" <&0 & echo $! >/dev/fd/{writing}', "sh", *command],
                    request,
                    pass_fds=(writing, *pass_fds),
                    # In our session or group, as a zombie, it would keep us from being restored.
                    start_new_session=True,
                )
            finally:
                os.close(writing)
            said = report.readline().strip()
            status = shell.wait()
        if not said.isdigit():
            raise CriuUnavailable(request, f"/bin/sh could not start {command[0]} (exit status {status})")
        return cls(int(said))

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        with contextlib.suppress(ProcessLookupError), Descriptor(os.pidfd_open(self.pid)) as pidfd:
            if self._started is not None and _start_time(self.pid) == self._started:
                kill_trees([(self.pid, pidfd.fileno())])

    @property
    def has_ended(self) -> bool:
        """Whether it has ended, reaped or not."""
        return _start_time(self.pid) != self._started or self._started is None


def _start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since the boot; None once it is gone or a zombie."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if words[0] in {"Z", "X"} else int(words[19])
