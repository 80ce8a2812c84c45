"""Processes to be dumped by the tests of the RPC clients, and what is seen of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from criupy.rpc import Descriptor

_COUNTER = """
import os, sys, time
count, path = 0, sys.argv[1]
os.chdir("/")
fd = os.open(path, os.O_RDWR | os.O_CREAT)
while True:
    count += 1
    os.pwrite(fd, b"%20d" % count, 0)
    time.sleep(0.002)
"""

# The first process of namespaces of its own, on a terminal whose master it hands out and closes.
_CONTAINER = """
import ctypes, fcntl, os, struct, sys, termios, time
libc = ctypes.CDLL(None, use_errno=True)
def mount(source, target, kind, flags, data):
    if libc.mount(source, target, kind, flags, data):
        raise OSError(ctypes.get_errno(), target)
mount(b"none", b"/", None, (1 << 18) | (1 << 14), None)  # MS_PRIVATE | MS_REC
mount(b"devpts", b"/dev/pts", b"devpts", 0, b"newinstance,ptmxmode=0666")
master = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
fcntl.ioctl(master, 0x40045431, ctypes.c_int(0))  # TIOCSPTLCK: unlock
(number,) = struct.unpack("i", fcntl.ioctl(master, 0x80045430, bytes(4)))  # TIOCGPTN
slave = os.open("/dev/pts/%d" % number, os.O_RDWR | os.O_NOCTTY)
if os.getsid(0) != os.getpid():
    os.setsid()
fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
print(master, flush=True)
sys.stdin.readline()
os.close(master)
for number in range(3):
    os.dup2(slave, number)
os.closerange(3, 100)
count = 0
while True:
    count += 1
    os.write(1, b"count %d\\n" % count)
    time.sleep(0.02)
"""


def state_of(pid: int) -> str | None:
    """Return the one-letter state of a process, None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def until(condition: object, what: str) -> None:
    """Wait until a condition holds."""
    assert callable(condition)
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@dataclass(slots=True)
class Counter:
    """A process that counts in a file."""

    process: subprocess.Popen[bytes]
    path: Path
    adopted: int | None = None
    """Its pid after a restore as a child of ours."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def count(self) -> int:
        return int(self.path.read_bytes() or b"0")

    def assert_running(self) -> None:
        before = self.count()
        until(lambda: self.count() > before, "it does not count")

    def assert_killed(self) -> None:
        assert self.process.wait(30) == -signal.SIGKILL

    def reap_restored(self, pid: int, sign: int = signal.SIGKILL) -> None:
        """End what was restored as a child of ours."""
        os.kill(pid, sign)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -sign


@contextlib.contextmanager
def counter(
    directory: Path,
    *,
    wrap: Sequence[str] = (),
    stdout: int = subprocess.DEVNULL,
    prefix: str = "",
) -> Iterator[Counter]:
    """Run a counter; whatever has its pid in the end and is ours is killed."""
    path = directory / f"count-{time.monotonic_ns()}"
    path.touch()
    path.chmod(0o666)
    process = subprocess.Popen(
        [*wrap, sys.executable, "-I", "-S", "-c", prefix + _COUNTER, path],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    found = Counter(process, path)
    try:
        until(lambda: found.count() > 0 or process.poll() is not None, "it does not start")
        assert process.poll() is None
        yield found
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        else:  # perhaps restored, as our child or init's
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if str(path) in Path(f"/proc/{process.pid}/cmdline").read_text():
                    os.kill(process.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, 0)


@contextlib.contextmanager
def sleeper(uid: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process of a user, in a session of its own."""
    with subprocess.Popen(
        ["/bin/sleep", "1000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        user=uid,
    ) as process:
        try:
            until(lambda: state_of(process.pid) == "S", "it does not start")
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def zombie() -> Iterator[int]:
    """Give the pid of a process that has ended, and is reaped in the end."""
    with subprocess.Popen(["/bin/true"]) as process:
        until(lambda: state_of(process.pid) == "Z", "it does not end")
        yield process.pid


@contextlib.contextmanager
def led(command: Sequence[str]) -> Iterator[int]:
    """Run a command that leads a session, and give the pid of its one child, which does not."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as leader:
        children = Path(f"/proc/{leader.pid}/task/{leader.pid}/children")
        until(lambda: children.read_text() != "", "it has no child")
        child = int(children.read_text())
        try:
            until(lambda: Path(f"/proc/{child}/comm").read_text() == "sleep\n", "it does not start")
            yield child
        finally:
            os.kill(child, signal.SIGKILL)  # with which its leader ends, having reaped it


@contextlib.contextmanager
def disk(directory: Path, options: str) -> Iterator[None]:
    """Mount a small file system over a directory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


@contextlib.contextmanager
def subreaper() -> Iterator[None]:
    """Adopt orphans, so that they can be reaped: pid 1 of a container may leave them zombies for long."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
    try:
        yield
    finally:
        libc.prctl(36, 0, 0, 0, 0)


def until_reaped(pid: int) -> None:
    """Wait until a process is gone with its pid, reaping it if it becomes our child."""

    def gone() -> bool:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        return state_of(pid) is None

    until(gone, f"process {pid} does not end")


@dataclass(slots=True)
class Container:
    """The first process of its own namespaces; ``master`` is its terminal, seen from outside."""

    process: subprocess.Popen[str]
    pid: int
    master: Descriptor


def last_count(master: Descriptor) -> int:
    """Read what a container wrote to its terminal since; return the last whole count."""
    text = b""
    deadline = time.monotonic() + 30
    while text.count(b"\n") < 2:
        assert time.monotonic() < deadline, "it does not count"
        if select.select([master.fileno()], [], [], 0.1)[0]:
            text += os.read(master.fileno(), 4096)
    return int(text.rsplit(b"\n", 2)[-2].split()[-1])


@contextlib.contextmanager
def container() -> Iterator[Container]:
    """Run a process in pid, mount, network and UTS namespaces of its own, with an orphaned terminal."""
    process = subprocess.Popen(
        ["unshare", "-mpfnu", "--mount-proc", sys.executable, "-I", "-S", "-c", _CONTAINER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin, process.stdout:
        try:
            number = int(process.stdout.readline())
            pid = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
            with Descriptor(os.pidfd_open(pid)) as pidfd:
                libc = ctypes.CDLL(None, use_errno=True)
                master = Descriptor(libc.syscall(438, pidfd.fileno(), number, 0))  # pidfd_getfd
            with master:
                assert master.fileno() >= 0
                process.stdin.write("go\n")
                process.stdin.flush()
                yield Container(process, pid, master)
        finally:
            # Not by unshare's --kill-child: the signal at the parent's death would be restored with the rest.
            for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
                for child in path.read_text().split():
                    os.kill(int(child), signal.SIGKILL)
            process.kill()


def children() -> list[int]:
    """List our children, zombies included."""
    found: list[int] = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            found += map(int, (thread / "children").read_text().split())
    return sorted(found)


def interrupt_once(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> None:
    """Have one of its methods interrupted, as by a Ctrl-C that comes while another is seen to."""
    real = getattr(kind, name)
    interruptions = [KeyboardInterrupt()]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if interruptions:
            raise interruptions.pop()
        return real(*arguments, **options)

    monkeypatch.setattr(kind, name, interrupted)
