"""Copying from one file to another, by the kernel where it can."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from criupy.errors import ImageError

__all__ = ["CLOEXEC", "copy_range", "reading"]

CLOEXEC: Final = getattr(os, "O_CLOEXEC", 0)
_PIECE: Final = 1 << 20

#: A file system, or two of them, that cannot copy by itself; and what might be either file's.
_NO_COPYING: Final = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EIO}
)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[int]:
    """Open a file to read; an ImageError says why that cannot be."""
    try:
        fd = os.open(path, os.O_RDONLY | CLOEXEC)
    except OSError as error:
        raise ImageError(path, None, f"expected a file that can be read: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def copy_range(path: Path, source: int, start: int, target: int, to: int, size: int) -> None:
    """Copy bytes from file to file, by the kernel where it can; ``path`` is the source's."""
    by_kernel = True
    while size:
        done = 0
        if by_kernel and hasattr(os, "copy_file_range"):
            try:
                done = os.copy_file_range(source, target, size, start, to)
            except OSError as error:
                if error.errno not in _NO_COPYING:
                    raise
        # Some file systems answer with nothing instead of an error.
        by_kernel = done > 0
        if not done:
            done = _copy_piece(path, source, start, target, to, min(size, _PIECE))
        start, to, size = start + done, to + done, size - done


def _copy_piece(path: Path, source: int, start: int, target: int, to: int, size: int) -> int:
    try:
        piece = os.pread(source, size, start)
    except OSError as error:
        raise ImageError(path, start, f"it cannot be read: {error.strerror}") from error
    if not piece:
        raise ImageError(path, start, f"expected {size} more bytes, the file has become shorter")
    return os.pwrite(target, piece, to)
