"""How an operator talks to a relay, or to who holds its source after its death.

A connection to a unix socket in the relay's work dir carries one question and its answer,
a line each:

    abort     let the source go on, whatever the destination does
    ok ...    it is done
    error ... it is not, and why
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from criupy.errors import PageServerError

__all__ = ["ABORT", "MAX_LINE", "SOCKET_NAME", "answer", "ask", "listen", "request_in"]

#: In the relay's work dir.
SOCKET_NAME: Final = "criupy-relay.socket"
ABORT: Final = "abort"
#: The most bytes of a line.
MAX_LINE: Final = 1024

_BACKLOG: Final = 8


def listen(path: Path) -> socket.socket:
    """Listen for who may do as this user does; the name of one that is gone is taken over."""
    try:
        with _short(path) as name:
            _remove_stale(name, path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                listener.bind(name)
                Path(name).chmod(0o600)  # before anybody can connect
                listener.listen(_BACKLOG)
            except BaseException:
                listener.close()
                raise
    except OSError as error:
        raise PageServerError(f"{path}: {error.strerror}; --work-dir has to be a directory") from error
    return listener


def ask(path: Path, request: str, timeout: float) -> str:
    """Ask and return the answer; raise PageServerError for an error, or none within ``timeout`` seconds."""
    try:
        with _short(path) as name, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(name)
            connection.sendall(request.encode() + b"\n")
            line = _receive_line(connection)
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError) as error:
        raise PageServerError(f"{path}: no relay is there, nor anybody who holds its source") from error
    except TimeoutError as error:
        raise PageServerError(f"{path}: no answer within {timeout:g} seconds") from error
    except OSError as error:
        raise PageServerError(f"{path}: {error.strerror}") from error
    verdict, _, text = line.partition(" ")
    if verdict != "ok":
        raise PageServerError(text if verdict == "error" else f"{path}: it was closed without an answer")
    return text


def request_in(data: bytes) -> str | None:
    """Take the question out of what was received so far; None when it is not all there."""
    line, end, _ = data.partition(b"\n")
    return line.decode("ascii", "replace") if end or len(data) >= MAX_LINE else None


def answer(text: str, *, ok: bool) -> bytes:
    """Encode an answer."""
    return f"{'ok' if ok else 'error'} {text}\n".encode()


def _receive_line(connection: socket.socket) -> str:
    data = b""
    while b"\n" not in data and len(data) < MAX_LINE and (piece := connection.recv(MAX_LINE)):
        data += piece
    return data.partition(b"\n")[0].decode(errors="replace")


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Yield a name of a path that fits into the 107 bytes of a socket's address."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _remove_stale(name: str, path: Path) -> None:
    try:
        mode = os.lstat(name).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise PageServerError(f"{path}: it exists and is not a socket; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            Path(name).unlink()
            return
        except BlockingIOError:  # its queue is full, so it is somebody's
            pass
    raise PageServerError(
        f"{path}: a relay answers there, or who holds the source of one that has died; "
        "end it, or let its source go on with --abort"
    )
