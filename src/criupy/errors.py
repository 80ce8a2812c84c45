"""Every error criupy raises, as one tree.

Expected outcomes (a partial copy, a page that is already there, a task that
exited) are values, not exceptions; what is raised here is for a caller to
handle or a person to read.
"""

from __future__ import annotations

import os

__all__ = [
    "CommandError",
    "CriuDied",
    "CriuError",
    "CriuTimeout",
    "CriuUnavailable",
    "CriupyError",
    "ImageError",
    "LazyPagesError",
    "LocalProtocolError",
    "NeedsLinux",
    "OptionError",
    "PageServerError",
    "ProtocolError",
    "RemoteProtocolError",
    "RuncError",
    "RuncTimeout",
    "TlsError",
    "UffdError",
    "UffdUnavailable",
]


class CriupyError(Exception):
    """The root of criupy's errors."""


class NeedsLinux(CriupyError, ImportError):
    """Elsewhere than on Linux something was touched that needs it: ``what``. This is ``platform``."""

    def __init__(self, what: str, platform: str) -> None:
        super().__init__(what, platform)
        self.what = what
        self.platform = platform

    def __str__(self) -> str:
        return f"{self.what} needs Linux, and this is {self.platform}"


class ProtocolError(CriupyError):
    """A byte protocol was violated; one of the two subclasses says by whom."""


class LocalProtocolError(ProtocolError):
    """This side called a codec out of order or with values it cannot carry."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something the protocol does not allow.

    ``offset`` counts the bytes received on the connection before the
    offending ones, which are ``data``.
    """

    def __init__(self, message: str, *, offset: int, data: bytes = b"") -> None:
        shown = data[:32].hex(" ") + (" ..." if len(data) > 32 else "")
        suffix = f" at byte {offset}" + (f": {shown}" if data else "")
        super().__init__(message + suffix)
        self.offset = offset
        self.data = data


class OptionError(CriupyError, ValueError):
    """An option has a value that CRIU would refuse, ignore or misread; nothing was sent.

    ``option`` is its name, ``expected`` what would have been right.
    """

    def __init__(self, option: str, expected: str) -> None:
        super().__init__(f"{option}: {expected}")
        self.option = option
        self.expected = expected


class CriuError(CriupyError):
    """CRIU said no, or could not be asked; the subclasses tell the second.

    ``request`` is what was asked. ``errno`` is CRIU's, None when it gave none.
    ``message`` is the sentence that says what went wrong. ``log_errors`` are
    the last error lines of CRIU's log, oldest first, and ``log_file`` is where
    the rest is (None when no log was written). ``output`` is what the worker
    printed, where that is captured. ``hint`` says what to do about a known
    case, or is None.
    """

    def __init__(
        self,
        request: str,
        message: str,
        *,
        errno: int | None = None,
        log_errors: tuple[str, ...] = (),
        log_file: str | None = None,
        output: str = "",
        hint: str | None = None,
    ) -> None:
        super().__init__(request, message)
        self.request = request
        self.message = message
        self.errno = errno
        self.log_errors = log_errors
        self.log_file = log_file
        self.output = output
        self.hint = hint

    def __str__(self) -> str:
        words = [f"{self.request}: {self.message}"]
        if self.errno is not None:
            words.append(f"({os.strerror(self.errno)}, errno {self.errno})")
        if self.log_file is not None:
            words.append(f"[log: {self.log_file}]")
        if self.hint is not None:
            words.append(f"- {self.hint}")
        return " ".join(words)


class CriuUnavailable(CriuError):
    """There is no CRIU to ask: the program does not start, or nothing listens at the socket."""


class CriuDied(CriuError):
    """CRIU closed the connection without an answer."""


class CriuTimeout(CriuError, TimeoutError):
    """CRIU did not answer in the time it was given; a worker of our own was ended."""


class RuncError(CriupyError):
    """runC said no, or could not be asked.

    ``command`` is runC's command, ``container`` the container's name.
    ``message`` is the sentence that says what went wrong, CRIU's where it was
    CRIU that failed. ``status`` is runC's exit status, negative for a signal,
    None when it did not end by itself. ``log_lines`` are the errors that runC
    logged, ``log_errors`` the last error lines of CRIU's log, oldest first,
    and ``log_file`` is where the rest of these is (None when there is no such
    log). ``hint`` says what to do about a known case, or is None.
    """

    def __init__(
        self,
        command: str,
        container: str,
        message: str,
        *,
        status: int | None = None,
        log_lines: tuple[str, ...] = (),
        log_errors: tuple[str, ...] = (),
        log_file: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(command, container, message)
        self.command = command
        self.container = container
        self.message = message
        self.status = status
        self.log_lines = log_lines
        self.log_errors = log_errors
        self.log_file = log_file
        self.hint = hint

    def __str__(self) -> str:
        words = [f"runc {self.command} {self.container}: {self.message}"]
        if self.log_file is not None:
            words.append(f"[log: {self.log_file}]")
        if self.hint is not None:
            words.append(f"- {self.hint}")
        return " ".join(words)


class RuncTimeout(RuncError, TimeoutError):
    """runC did not do it in the time it was given, and was ended."""


class ImageError(CriupyError, ValueError):
    """A checkpoint image is not what CRIU writes.

    ``path`` is the file, ``offset`` the byte in it (None when the whole file
    is meant), ``expected`` what should have been there.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int | None, expected: str) -> None:
        self.path: str = os.fspath(path)
        self.offset = offset
        self.expected = expected
        where = self.path if offset is None else f"{self.path}, byte {offset}"
        super().__init__(f"{where}: {expected}")


class UffdError(CriupyError, OSError):
    """A userfaultfd operation failed.

    ``operation`` names it, ``address`` is the faulting run-time address or
    None, ``errno`` the kernel's answer.
    """

    def __init__(self, operation: str, errno: int, address: int | None = None) -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        self.operation = operation
        self.address = address

    def __str__(self) -> str:
        where = "" if self.address is None else f" at {self.address:#x}"
        return f"{self.operation}{where}: {self.strerror}"


class UffdUnavailable(UffdError):
    """userfaultfd cannot be used here; ``remedy`` says what would change that."""

    def __init__(self, operation: str, errno: int, remedy: str) -> None:
        super().__init__(operation, errno)
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{super().__str__()} ({self.remedy})"


class LazyPagesError(CriupyError):
    """The lazy-pages daemon failed; the cause, if any, is chained."""


class PageServerError(CriupyError):
    """The page server cannot start or go on; the cause, if any, is chained."""


class CommandError(CriupyError):
    """A daemon's command cannot do what its command line says; the cause, if any, is chained."""


class TlsError(CriupyError):
    """TLS cannot be used: a file, a certificate or the peer is not as it must be."""
