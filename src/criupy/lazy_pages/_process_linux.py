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

__all__ = [
    "SOCKET_NAME",
    "bind_restore_socket",
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
    """Listen on ``lazy-pages.socket`` in a directory, for one criu restore.

    A stale socket is replaced. Raise LazyPagesError, in one line, for a
    directory that cannot be written and for anything there that is no socket.
    """
    where = Path(work_dir, SOCKET_NAME)
    try:
        directory = os.open(work_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LazyPagesError(f"work dir {os.fspath(work_dir)}: {error.strerror}") from error
    try:
        # sun_path holds 107 bytes; through the directory's descriptor any path fits.
        path = f"/proc/self/fd/{directory}/{SOCKET_NAME}"
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
                raise LazyPagesError(f"{where}: exists and is not a socket; remove it or choose another --work-dir")
            # Whether somebody listens could be told only by connecting, which
            # a daemon takes for its restore. CRIU replaces it, too.
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # Inherited by what accept returns: each message then names its sender in our pid namespace.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            with contextlib.suppress(OSError):  # before Linux 6.5
                listener.setsockopt(socket.SOL_SOCKET, _SO_PASSPIDFD, 1)
            listener.bind(path)
            listener.listen(1)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise LazyPagesError(f"{where}: {error.strerror}") from error
    finally:
        os.close(directory)
    return listener


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
        with open(path, "x", encoding="ascii", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(str(pid))
    except OSError as error:
        raise LazyPagesError(f"pidfile {os.fspath(path)}: {error.strerror}") from error


def status_ready(fd: int) -> None:
    """Tell whoever waits on the status descriptor that the socket listens: one zero byte, then closed."""
    try:
        os.write(fd, b"\0")
        os.close(fd)
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
    current = int(path.read_text())
    for score in range(_OOM_SCORE_ADJ_MIN, current, 50):
        with contextlib.suppress(PermissionError):
            path.write_text(str(score))
            return score
    return current


def raise_descriptor_limit() -> int:
    """Raise RLIMIT_NOFILE as far as allowed and return it: every fork of a task needs a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    for wanted in (most, hard):  # the first needs CAP_SYS_RESOURCE
        with contextlib.suppress(ValueError, PermissionError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
            return wanted
    return soft
