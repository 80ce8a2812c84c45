"""The socket that criu restore connects to."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path
from typing import Final

from criupy.errors import LazyPagesError
from criupy.lazy_pages._sock_diag_linux import find_listener

__all__ = ["SOCKET_NAME", "bind_restore_socket", "let_in"]

#: LAZY_PAGES_SOCK_NAME in criu/uffd.c; criu restore looks for it in its work dir.
SOCKET_NAME: Final = "lazy-pages.socket"

# include/uapi/asm-generic/socket.h, Linux 6.5; Python does not name it.
_SO_PASSPIDFD: Final = 76


def bind_restore_socket(work_dir: str | os.PathLike[str], *, held: bool = False) -> socket.socket:
    """Listen on ``lazy-pages.socket`` in a directory, for one criu restore; not blocking.

    With ``held`` its connect waits until let_in is called. criu waits for nothing else:
    once it is connected the tasks may run, and then nobody would serve them.

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
            if held:
                _listen_held(listener, path)
            else:
                listener.bind(os.fspath(path))
                listener.listen(1)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            raise
        raise LazyPagesError(
            f"{where}: {error.strerror}; --work-dir has to be a directory this process can write"
        ) from error
    finally:
        os.close(directory)
    return listener


def _listen_held(listener: socket.socket, path: Path) -> None:
    """Listen with the one place in the queue taken; it stays taken when the end that did is closed."""
    # Whoever looks for the name could be there first, so the socket gets it last.
    unnamed = path.with_name(f".{SOCKET_NAME}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        unnamed.unlink()
    listener.bind(os.fspath(unnamed))
    try:
        listener.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first:
            first.connect(os.fspath(unnamed))
        path.hardlink_to(unnamed)
    finally:
        unnamed.unlink()


def let_in(listener: socket.socket) -> None:
    """Let whoever connects to a held socket go on."""
    first, _ = listener.accept()
    first.close()


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
