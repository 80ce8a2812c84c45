"""What the command does to be a good daemon: socket, background, limits."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from criupy.errors import LazyPagesError
from criupy.lazy_pages._sock_diag_linux import find_listener

__all__ = [
    "SOCKET_NAME",
    "bind_restore_socket",
    "check_descriptor",
    "daemonize",
    "lower_oom_score",
    "raise_descriptor_limit",
    "run_action_scripts",
    "status_ready",
    "write_pidfile",
]

#: LAZY_PAGES_SOCK_NAME in criu/uffd.c; criu restore looks for it in its work dir.
SOCKET_NAME: Final = "lazy-pages.socket"

# include/uapi/asm-generic/socket.h, Linux 6.5; Python does not name it.
_SO_PASSPIDFD: Final = 76

# From include/uapi/linux/oom.h: a process with this score is never chosen.
_OOM_SCORE_ADJ_MIN: Final = -1000


def bind_restore_socket(work_dir: str | os.PathLike[str]) -> socket.socket:
    """Listen on ``lazy-pages.socket`` in a directory, for one criu restore; not blocking.

    A stale socket is replaced, as CRIU does. Raise LazyPagesError, in one
    line, for a directory that cannot be written, for anything there that is no
    socket, and where a daemon still waits for its restore: CRIU would take the
    name away from it, and it would wait for ever.
    """
    where = Path(work_dir, SOCKET_NAME)
    try:
        directory = os.open(work_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LazyPagesError(
            f"work dir {os.fspath(work_dir)}: {error.strerror}; --work-dir has to be a directory"
        ) from error
    try:
        # sun_path holds 107 bytes; through the directory's descriptor any path fits.
        path = Path(f"/proc/self/fd/{directory}", SOCKET_NAME)
        with contextlib.suppress(FileNotFoundError):
            _remove_stale(path, where)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # Inherited by what accept returns: each message then names its sender in our pid namespace.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            with contextlib.suppress(OSError):  # before Linux 6.5
                listener.setsockopt(socket.SOL_SOCKET, _SO_PASSPIDFD, 1)
            listener.bind(os.fspath(path))
            listener.listen(1)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise LazyPagesError(
            f"{where}: {error.strerror}; --work-dir has to be a directory this process can write"
        ) from error
    finally:
        os.close(directory)
    return listener


def _remove_stale(path: Path, where: Path) -> None:
    status = path.stat(follow_symlinks=False)
    if not stat.S_ISSOCK(status.st_mode):
        raise LazyPagesError(f"{where}: exists and is not a socket; remove it or choose another --work-dir")
    listener = find_listener(status)
    if listener is not None:
        owner = "a process" if listener.pid is None else f"pid {listener.pid}"
        raise LazyPagesError(
            f"{where}: {owner} is already listening there; end it or choose another --work-dir"
        )
    path.unlink()


def daemonize() -> int:
    """Fork as CRIU does for ``--daemon``: return the child's pid in the parent, 0 in the child.

    The child leads a session of its own, with standard descriptors on
    /dev/null and the directory unchanged (cr_daemon in criu/util.c). Only for
    a process with one thread.
    """
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
    return 0


def write_pidfile(path: str | os.PathLike[str], pid: int) -> None:
    """Write a pid, without a newline, to a file that must not exist yet, as CRIU does."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_EXCL | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise LazyPagesError(
            f"pidfile {os.fspath(path)}: exists; remove it if no daemon runs with that pid"
        ) from error
    except OSError as error:
        raise LazyPagesError(f"pidfile {os.fspath(path)}: {error.strerror}") from error
    try:
        os.write(fd, str(pid).encode())
    except OSError as error:
        # Half a pid would stop the next start, too.
        with contextlib.suppress(OSError):
            Path(path).unlink()
        raise LazyPagesError(f"pidfile {os.fspath(path)}: {error.strerror}") from error
    finally:
        os.close(fd)


def check_descriptor(option: str, fd: int) -> None:
    """Raise LazyPagesError unless an inherited descriptor is open.

    To be called before this process opens anything: a number that nobody
    passed on would otherwise come to mean the log or the socket.
    """
    try:
        os.fstat(fd)
    except OSError as error:
        raise LazyPagesError(
            f"{option} {fd}: {error.strerror}; the descriptor has to be passed on open"
        ) from error


def status_ready(fd: int) -> None:
    """Tell whoever waits on the status descriptor that the socket listens: one zero byte, then closed."""
    try:
        os.write(fd, b"\0")
        if fd > 2:
            os.close(fd)
        else:
            # Closed for the reader, but the number must not be given to something else.
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, fd)
            os.close(null)
    except OSError as error:
        raise LazyPagesError(f"--status-fd {fd}: {error.strerror}") from error


def run_action_scripts(scripts: Sequence[str], action: str, images_dir: str | os.PathLike[str]) -> None:
    """Run ``--action-script`` programs for one action, with the environment that CRIU gives them.

    Raise LazyPagesError when one cannot be started or refuses (criu/action-scripts.c).
    """
    environment = {
        **os.environ,
        "CRTOOLS_SCRIPT_ACTION": action,
        "CRTOOLS_IMAGE_DIR": str(Path(images_dir).absolute()),
    }
    for script in scripts:
        try:
            status = subprocess.run([script], env=environment, check=False).returncode
        except OSError as error:
            raise LazyPagesError(f"--action-script {script}: {error.strerror}") from error
        if status:
            raise LazyPagesError(f"--action-script {script}: refused {action} with status {status}")


def lower_oom_score() -> int:
    """Become as unlikely a victim of the OOM killer as this process may; return the score.

    Losing the daemon loses the pages that it has not delivered. Going below
    the lowest value a privileged process set before needs CAP_SYS_RESOURCE.
    """
    path = Path("/proc/self/oom_score_adj")
    try:
        highest = int(path.read_text())
    except OSError:
        return 0  # hidden, as in some containers: what it is unless set
    with contextlib.suppress(OSError):  # or not to be written
        # Every score from the lowest allowed one on is accepted. Mostly that is the very lowest, or ours.
        lowest = tried = _OOM_SCORE_ADJ_MIN
        while lowest < highest:
            try:
                path.write_text(str(tried))
                highest = tried
            except PermissionError:
                lowest = tried + 1
            tried = (lowest + highest) // 2
    return highest


def raise_descriptor_limit() -> int:
    """Raise RLIMIT_NOFILE as far as allowed and return it: every fork of a task needs a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = {hard}
    with contextlib.suppress(OSError):  # hidden in some containers
        wanted.add(max(hard, int(Path("/proc/sys/fs/nr_open").read_text())))
    for limit in sorted(wanted, reverse=True):  # above hard needs CAP_SYS_RESOURCE
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            return limit
    return soft
