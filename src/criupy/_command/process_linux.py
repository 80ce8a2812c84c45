"""What a command does to be a good daemon: background, descriptors, scripts, limits."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from criupy.errors import CommandError

__all__ = [
    "check_descriptor",
    "check_inherited",
    "daemonize",
    "lower_oom_score",
    "raise_descriptor_limit",
    "run_action_scripts",
    "status_ready",
    "write_child_pidfile",
    "write_pidfile",
]

# From include/uapi/linux/oom.h: a process with this score is never chosen.
_OOM_SCORE_ADJ_MIN: Final = -1000


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
        raise CommandError(
            f"pidfile {os.fspath(path)}: exists; remove it if no daemon runs with that pid"
        ) from error
    except OSError as error:
        raise CommandError(f"pidfile {os.fspath(path)}: {error.strerror}") from error
    try:
        os.write(fd, str(pid).encode())
    except OSError as error:
        # Half a pid would stop the next start, too.
        with contextlib.suppress(OSError):
            Path(path).unlink()
        raise CommandError(f"pidfile {os.fspath(path)}: {error.strerror}") from error
    finally:
        os.close(fd)


def write_child_pidfile(path: Path, child: int) -> None:
    """Write the pid of a child that ``daemonize`` made, which is killed if that is not possible."""
    try:
        write_pidfile(path, child)
    except CommandError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


def check_inherited(
    descriptors: Mapping[str, int | None], directories: Mapping[str, Path], close_fds: Sequence[int]
) -> None:
    """Check what the options with these names were given, then close what ``--close`` names."""
    for option, descriptor in descriptors.items():
        if descriptor is not None:
            check_descriptor(option, descriptor)
    for option, directory in directories.items():
        if not directory.is_dir():
            raise CommandError(f"{option} {directory}: no such directory")
    for descriptor in close_fds:
        with contextlib.suppress(OSError):  # closed already is what was wanted
            os.close(descriptor)


def check_descriptor(option: str, fd: int) -> None:
    """Raise CommandError unless an inherited descriptor is open.

    To be called before this process opens anything: a number that nobody
    passed on would otherwise come to mean the log or the socket.
    """
    try:
        os.fstat(fd)
    except OSError as error:
        raise CommandError(
            f"{option} {fd}: {error.strerror}; the descriptor has to be passed on open"
        ) from error


def status_ready(fd: int) -> None:
    """Tell whoever waits on the status descriptor that all is ready: one zero byte, then closed."""
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
        raise CommandError(f"--status-fd {fd}: {error.strerror}") from error


def run_action_scripts(scripts: Sequence[str], action: str, images_dir: str | os.PathLike[str]) -> None:
    """Run ``--action-script`` programs for one action, with the environment that CRIU gives them.

    Raise CommandError when one cannot be started or refuses (criu/action-scripts.c).
    """
    if not scripts:
        return
    import subprocess  # for few, and everybody waits until this process is ready

    environment = {
        **os.environ,
        "CRTOOLS_SCRIPT_ACTION": action,
        "CRTOOLS_IMAGE_DIR": str(Path(images_dir).absolute()),
    }
    for script in scripts:
        try:
            status = subprocess.run([script], env=environment, check=False).returncode
        except OSError as error:
            raise CommandError(f"--action-script {script}: {error.strerror}") from error
        if status:
            raise CommandError(f"--action-script {script}: refused {action} with status {status}")


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
