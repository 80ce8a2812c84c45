"""Every error criupy raises, as one tree.

Expected outcomes (a partial copy, a page that is already there, a task that
exited) are values, not exceptions; what is raised here is for a caller to
handle or a person to read.
"""

from __future__ import annotations

import os

__all__ = [
    "CriupyError",
    "ImageError",
    "LazyPagesError",
    "LocalProtocolError",
    "ProtocolError",
    "RemoteProtocolError",
    "UffdError",
    "UffdUnavailable",
]


class CriupyError(Exception):
    """The root of criupy's errors."""


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


class ImageError(CriupyError, ValueError):
    """A checkpoint image is not what CRIU writes.

    ``path`` is the file, ``offset`` the byte in it (None when the whole file
    is meant), ``expected`` what should have been there.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int | None, expected: str) -> None:
        self.path = os.fspath(path)
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
